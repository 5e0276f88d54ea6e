"""`latent-trl sft`: tune the backbone on a task while it follows codes."""

from .arguments import DataArguments, parse_training
from .training import run_training


def main(argv: list[str] | None = None) -> int:
    given, args, model_args = parse_training(argv, "latent-trl sft", DataArguments, "LatentActionSFTConfig")
    from trl import get_peft_config

    from latent_trl import LatentActionSFTTrainer

    from .loading import backbone_kwargs, load_model, load_rows

    rows = load_rows(given.dataset_name, given.dataset_train_split, given.dataset_config, given.dataset_limit)
    test = None
    if args.eval_strategy != "no":
        test = load_rows(given.dataset_name, given.dataset_test_split, given.dataset_config, given.dataset_limit)
    model = load_model(model_args.model_name_or_path, is_trainable=True, **backbone_kwargs(model_args))
    trainer = LatentActionSFTTrainer(model, args, rows, test, peft_config=get_peft_config(model_args))
    return run_training(trainer, "Fine-tune (SFT)", {"loss": "loss", "eval_loss": "eval"})
