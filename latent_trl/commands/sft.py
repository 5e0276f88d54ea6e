"""`latent-trl sft`: tune the backbone on a task while it follows codes."""

from .arguments import DataArguments, parse_training
from .training import run_training


def main(argv: list[str] | None = None) -> int:
    given, args, model_args = parse_training(argv, "latent-trl sft", DataArguments, "LatentActionSFTConfig")
    from .training import quiet

    quiet(args)
    from trl import get_peft_config

    from latent_trl import LatentActionSFTTrainer

    from .loading import backbone_kwargs, load_model
    from .rows import load_rows

    name, asked = given.dataset_name, {"limit": given.dataset_limit, "purpose": "conversations"}
    rows = load_rows(name, given.dataset_train_split, given.dataset_config, **asked)
    test = None
    if args.eval_strategy != "no":
        test = load_rows(name, given.dataset_test_split, given.dataset_config, **asked)
    model = load_model(model_args.model_name_or_path, is_trainable=True, **backbone_kwargs(model_args))
    trainer = LatentActionSFTTrainer(model, args, rows, test, peft_config=get_peft_config(model_args))
    return run_training(trainer, "Fine-tune (SFT)", {"loss": "loss", "eval_loss": "eval"})
