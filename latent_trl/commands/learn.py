"""`latent-trl learn`: learn a latent action space on a backbone, stage by stage."""

import sys

from .arguments import LearnArguments, parse_training
from .plan_arguments import PlanLearnArguments, asked_kind, refuse_peft
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


PLAN_FIGURES = {"loss": "loss", "assignment/gain": "gain", "eval_ceiling": "ceiling", "eval_coverage": "coverage"}


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return learn_plans(argv) if asked_kind("latent-trl learn", argv) == "plans" else learn_codes(argv)


def learn_codes(argv: list[str]) -> int:
    given, args, model_args = parse_training(argv, "latent-trl learn", LearnArguments, "LatentActionSpaceConfig")
    refuse_peft("latent-trl learn", model_args)
    from latent_trl import LatentActionSpaceTrainer

    from .loading import backbone_kwargs, load_learner

    fields, rows, text = given.model_fields(), given.rows("conversations"), given.text_rows()
    model = load_learner(model_args.model_name_or_path, fields, **backbone_kwargs(model_args))
    test = given.rows("conversations", "test") if args.eval_strategy != "no" else None
    trainer = LatentActionSpaceTrainer(model, args, rows, text_dataset=text, eval_dataset=test)
    return run_training(trainer, lambda: f"Learn: {trainer.stage}", FIGURES)


def learn_plans(argv: list[str]) -> int:
    prog = "latent-trl learn --kind plans"
    given, args, model_args = parse_training(argv, prog, PlanLearnArguments, "PlanSpaceConfig")
    refuse_peft(prog, model_args)
    from latent_trl import PlanSpaceTrainer

    from .loading import backbone_kwargs
    from .plan_loading import load_plan_learner
    from .rows import check_reward_columns

    rewards = given.rewards() if given.reward_funcs else None
    rows = given.rows("prompts")
    held_out = None if args.eval_strategy == "no" else given.held_out()
    check_reward_columns(rewards or [], held_out or rows, given.eval_dataset_name or given.dataset_name)
    model = load_plan_learner(model_args.model_name_or_path, given.model_fields(), **backbone_kwargs(model_args))
    trainer = PlanSpaceTrainer(model, args, rows, held_out, reward_funcs=rewards)
    return run_training(trainer, "Learn plans", PLAN_FIGURES)
