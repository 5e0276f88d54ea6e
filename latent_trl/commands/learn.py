"""`latent-trl learn`: learn a latent action space on a backbone, stage by stage."""

from .arguments import LearnArguments, parse_training
from .training import quiet, run_training

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
    quiet(args)
    from latent_trl import LatentActionSpaceTrainer

    from .loading import backbone_kwargs, load_learner

    fields, rows, text = given.model_fields(), given.rows("conversations"), given.text_rows()
    model = load_learner(model_args.model_name_or_path, fields, **backbone_kwargs(model_args))
    test = given.rows("conversations", "test") if args.eval_strategy != "no" else None
    trainer = LatentActionSpaceTrainer(model, args, rows, text_dataset=text, eval_dataset=test)
    return run_training(trainer, lambda: f"Learn: {trainer.stage}", FIGURES)
