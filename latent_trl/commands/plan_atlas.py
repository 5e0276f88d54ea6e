"""`latent-trl atlas` on plans: a page of what each plan says."""

import argparse
from pathlib import Path
from typing import Any

from .arguments import refuse_given


def made_plan_atlas(
    report: Any, rows: Any, chosen: list[int] | None, name: str, data: str, shown: int = 6, segment: Any = "answer"
) -> Any:
    """
    A page's content from what all plans answered.

    Args:
        report (`PlanReport`): Of B prompts.
        rows (`OpenedRows`): The prompts.
        chosen (`list[int]`, *optional*): `[B]`, the plan of each prompt, where there is a chooser.
        name (`str`), data (`str`): Of the model and of the data.
        shown (`int`, defaults to `6`): Prompts that are shown with all answers.
        segment (`str` or `int`, defaults to `"answer"`): For what the model holds a plan.
    """
    from ..evaluation.plan_atlas import PlanAtlas, PlanEntry, plan_example
    from ..hub.plan_card import held_for

    summary, figures = report.summary(chosen, per_plan=8), report.metrics()
    entries = [PlanEntry(one["plan"], one["answers"], one["chosen"], one["reward"]) for one in summary.plans]
    examples = [
        plan_example(rows[i], report.texts[i], report.own[i], None if chosen is None else chosen[i])
        for i in range(min(shown, len(rows)))
    ]
    names = {"ceiling": "best plan a prompt", "best_single_plan": "one plan for all", "backbone": "backbone"}
    told = {label: figures[key] for key, label in names.items() if key in figures}
    return PlanAtlas(name, data, len(rows), figures["distinct"], entries, examples, told, held_for(segment))


def chosen_plans(model: Any, encoder: Any, prompts: list[Any], batch_size: int) -> list[int] | None:
    """The chooser's plan for each encoded prompt; `None` where no chooser has been trained."""
    if not model.chooser_is_trained:
        return None
    found: list[int] = []
    for start in range(0, len(prompts), batch_size):
        inputs = encoder.collate(prompts[start : start + batch_size])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        found += model.plan_logits(**inputs).argmax(dim=-1).tolist()
    return found


def draw_plans(args: argparse.Namespace, rows: Any) -> Path:
    """The page of `latent-trl atlas`."""
    from ..data.prompts import PromptEncoder
    from ..evaluation.plan_atlas import write_plan_atlas
    from ..generation.answers import end_tokens
    from ..trainer.plans.report import report_plans
    from .loading import load_processor
    from .plan_loading import load_plans

    refuse_given(
        "latent-trl atlas", args, ("seed",), f"is not for plans, which {args.model!r} holds: nothing is drawn."
    )
    model = load_plans(args.model, args.backbone, dtype=args.dtype).eval()
    encoder = PromptEncoder(load_processor(model, args.backbone))
    ends = end_tokens(model.backbone, encoder.encoder.tokenizer, {}) or []
    every = [rows[i] for i in range(len(rows))]
    report = report_plans(model, encoder, every, args.max_new_tokens, ends, batch_size=args.batch_size)
    chosen = chosen_plans(model, encoder, [encoder(row) for row in every], args.batch_size)
    atlas = made_plan_atlas(
        report,
        rows,
        chosen,
        args.model,
        f"{args.dataset}, {args.split}",
        shown=args.forced_prompts,
        segment=model.plan_config.segment,
    )
    return write_plan_atlas(atlas, args.output)
