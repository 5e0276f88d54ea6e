"""`latent-trl sft`: tune the backbone on a task while it follows codes."""

from .arguments import DataArguments, parse_training
from .training import run_training


def main(argv: list[str] | None = None) -> int:
    given, args, model_args = parse_training(argv, "latent-trl sft", DataArguments, "LatentActionSFTConfig")
    from trl import get_peft_config

    from latent_trl import LatentActionSFTTrainer

    from .loading import backbone_kwargs, load_model

    rows = given.rows("conversations")
    test = given.rows("conversations", "test") if args.eval_strategy != "no" else None
    model = load_model(model_args.model_name_or_path, is_trainable=True, **backbone_kwargs(model_args))
    trainer = LatentActionSFTTrainer(model, args, rows, test, peft_config=get_peft_config(model_args))
    return run_training(trainer, "Fine-tune (SFT)", {"loss": "loss", "eval_loss": "eval"})
