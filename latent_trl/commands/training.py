"""How a training command runs its trainer: progress, resuming, saving, pushing."""

import sys
from contextlib import nullcontext
from typing import Any

RL_FIGURES = {"reward": "reward", "entropy": "entropy", "kl": "kl"}
RL_NAMES = {"grpo": "LatentActionGRPO", "rloo": "LatentActionRLOO", "ppo": "LatentActionPPO"}


def run_training(trainer: Any, name, figures: dict[str, str]) -> int:
    """
    Trains, saves the model to `output_dir`, and pushes it when that was asked for.

    Args:
        trainer (`Trainer`): Ready to train.
        name (`str` or `Callable[[], str]`): What the bar says.
        figures (`dict[str, str]`): Logged metrics to show, and their short names.
    """
    from .progress import BarCallback, console, draw_with, progress_bars

    args, main_process = trainer.args, trainer.is_world_process_zero()
    output_dir = args.output_dir
    draws = main_process and not args.disable_tqdm
    with progress_bars() if draws else nullcontext() as bars:
        if draws:
            draw_with(trainer, BarCallback(bars, name if callable(name) else lambda: name, figures))
        trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
    trainer.save_model(output_dir)
    if main_process:
        console.print(f"The model is in {output_dir}", highlight=False, soft_wrap=True)
    if args.push_to_hub:
        trainer.push_to_hub()
        if main_process:
            console.print(f"The model is on the Hub: {trainer.hub_model_id}", highlight=False, soft_wrap=True)
    trainer.accelerator.end_training()
    return 0


def _resume(value: str | bool | None) -> str | bool | None:
    """`true` and `false` of a flag or a YAML file, or a folder."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def run_reinforcement(argv: list[str] | None, algorithm: str) -> int:
    """`latent-trl grpo`, `latent-trl rloo` and `latent-trl ppo`, over codes or over plans."""
    from .arguments import RewardArguments, parse_training
    from .plan_arguments import names_plans

    argv = list(sys.argv[1:] if argv is None else argv)
    if names_plans(f"latent-trl {algorithm}", argv):
        from .bandit import run_over_plans

        return run_over_plans(argv, algorithm)
    names = RL_NAMES[algorithm]
    given, args, model_args = parse_training(argv, f"latent-trl {algorithm}", RewardArguments, f"{names}Config")
    from trl import get_peft_config

    import latent_trl

    from .loading import backbone_kwargs, load_model
    from .rows import check_reward_columns

    rewards, rows = given.rewards(), given.rows("prompts")
    check_reward_columns(rewards, rows, given.dataset_name)
    test = given.rows("prompts", "test") if args.eval_strategy != "no" else None
    anchor = given.anchor_rows()
    loading = backbone_kwargs(model_args) | {"trust_remote_code": args.trust_remote_code or None}
    model = load_model(model_args.model_name_or_path, is_trainable=args.train_backbone, **loading)
    trainer = getattr(latent_trl, f"{names}Trainer")(
        model,
        rewards,
        args,
        train_dataset=rows,
        eval_dataset=test,
        peft_config=get_peft_config(model_args),
        anchor_dataset=anchor,
    )
    return run_training(trainer, f"RL over codes ({algorithm.upper()})", RL_FIGURES)
