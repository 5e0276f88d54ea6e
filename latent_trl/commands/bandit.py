"""`latent-trl bandit`: learn which plan to hold for a prompt."""

from .arguments import parse_training
from .plan_arguments import HeldOutArguments, refuse_peft
from .training import quiet, run_training

FIGURES = {"reward": "reward", "plans/entropy": "entropy", "eval_reward": "eval", "eval_ceiling": "ceiling"}


def main(argv: list[str] | None = None) -> int:
    given, args, model_args = parse_training(argv, "latent-trl bandit", HeldOutArguments, "PlanBanditConfig")
    refuse_peft("latent-trl bandit", model_args)
    quiet(args)
    from latent_trl import PlanBanditTrainer

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
    trainer = PlanBanditTrainer(model, rewards, args, rows, held_out)
    return run_training(trainer, "RL over plans (bandit)", FIGURES)
