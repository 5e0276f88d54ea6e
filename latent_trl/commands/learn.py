"""`latent-trl learn`: learn a latent action space on a backbone, stage by stage."""

from .arguments import LearnArguments, parse_training
from .training import run_training

FIGURES = {
    "world_model/ce": "CE",
    "codebook/used": "codes",
    "codebook/perplexity": "perplexity",
    "projector/nll": "nll",
    "policy/cloning_accuracy": "cloned",
    "policy/backbone_kl": "KL to the backbone",
    "eval_loss": "eval",
}


def main(argv: list[str] | None = None) -> int:
    given, args, model_args = parse_training(argv, "latent-trl learn", LearnArguments, "LatentActionSpaceConfig")
    from latent_trl import LatentActionSpaceTrainer

    from .loading import backbone_kwargs, load_learner, load_rows

    rows = load_rows(given.dataset_name, given.dataset_train_split, given.dataset_config, given.dataset_limit)
    text = None
    if given.text_dataset_name:
        text = load_rows(given.text_dataset_name, given.text_dataset_split, limit=given.dataset_limit)
    test = None
    if args.eval_strategy != "no":
        test = load_rows(given.dataset_name, given.dataset_test_split, given.dataset_config, given.dataset_limit)
    model = load_learner(model_args.model_name_or_path, given.model_fields(), **backbone_kwargs(model_args))
    trainer = LatentActionSpaceTrainer(model, args, rows, text_dataset=text, eval_dataset=test)
    return run_training(trainer, lambda: f"Learn: {trainer.stage}", FIGURES)
