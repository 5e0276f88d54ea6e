"""`latent-trl bandit`, and `grpo`, `rloo` and `ppo` of a model of plans: learn which plan to hold for a prompt."""

from .arguments import UsageError, parse_training
from .plan_arguments import HeldOutArguments, asked_value, refuse_peft
from .training import run_training

FIGURES = {"reward": "reward", "plans/entropy": "entropy", "eval_reward": "eval", "eval_ceiling": "ceiling"}
# The trainer of each algorithm, and what it is told besides.
TRAINERS: dict[str, tuple[str, list[str]]] = {
    "bandit": ("PlanBandit", []),
    "grpo": ("PlanGRPO", []),
    "rloo": ("PlanGRPO", ["--advantage_estimator", "rloo"]),
    "ppo": ("PlanPPO", []),
}


def run_over_plans(argv: list[str] | None, algorithm: str) -> int:
    """RL over plans by one of [`TRAINERS`]."""
    prog, (names, more) = f"latent-trl {algorithm}", TRAINERS[algorithm]
    if more:
        if asked_value(prog, argv or [], "advantage_estimator") is not None:
            raise UsageError(prog, "`--advantage_estimator` is that of `rloo`. Leave it out, or run `latent-trl grpo`.")
        argv = [*(argv or []), *more]
    given, args, model_args = parse_training(argv, prog, HeldOutArguments, f"{names}Config")
    refuse_peft(prog, model_args)
    import latent_trl

    from .loading import backbone_kwargs
    from .plan_loading import load_plans
    from .rows import check_reward_columns

    rewards, rows = given.rewards(), given.rows("prompts")
    check_reward_columns(rewards, rows, given.dataset_name)
    held_out = None
    if given.eval_dataset_name or args.eval_strategy != "no":
        held_out = given.held_out()
        check_reward_columns(rewards, held_out, given.eval_dataset_name or given.dataset_name)
    model = load_plans(model_args.model_name_or_path, **backbone_kwargs(model_args))
    trainer = getattr(latent_trl, f"{names}Trainer")(model, rewards, args, rows, held_out)
    return run_training(trainer, f"RL over plans ({algorithm})", FIGURES)


def main(argv: list[str] | None = None) -> int:
    return run_over_plans(argv, "bandit")
