"""`latent-trl distill`: teach what a policy says to its backbone alone, so that anything serves it."""

import json
import sys
from pathlib import Path

from .arguments import DistillArguments, UsageError, parse_training
from .training import run_training

FIGURES = {"loss": "KL", "eval_loss": "eval KL"}
REPORT_FILE = "what_is_kept.json"
# What may stand without an option, in this order.
BARE = ("--model_name_or_path", "--dataset_name")


def with_options(argv: list[str]) -> list[str]:
    """`FOLDER DATA --output DIR` as options of a training command."""
    bare = argv[: next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))]
    named = [word for option, value in zip(BARE, bare, strict=False) for word in (option, value)]
    words = [*named, *bare[len(BARE) :], *argv[len(bare) :]]
    heads = [word.split("=")[0] for word in words]
    given = [head for head in heads if head in ("--output", "--output_dir", "--output-dir")]
    if len(given) > 1:
        raise UsageError("latent-trl distill", f"`{given[0]}` and `{given[1]}` are the same. Give one.")
    return ["--output_dir" + word.removeprefix("--output") if _is_output(word) else word for word in words]


def _is_output(word: str) -> bool:
    return word.split("=")[0] == "--output"


def main(argv: list[str] | None = None) -> int:
    argv = with_options(list(sys.argv[1:] if argv is None else argv))
    given, args, model_args = parse_training(
        argv, "latent-trl distill", DistillArguments, "LatentActionDistillationConfig"
    )
    from trl import get_peft_config

    from latent_trl import LatentActionDistillationTrainer

    from .loading import backbone_kwargs, load_model
    from .rows import check_reward_columns

    rows, rewards = given.rows("prompts"), given.rewards()
    held_out = given.rows("prompts", "test") if args.eval_strategy != "no" or rewards else None
    if rewards:
        check_reward_columns(rewards, held_out, given.dataset_name)
    model = load_model(model_args.model_name_or_path, **backbone_kwargs(model_args))
    trainer = LatentActionDistillationTrainer(
        model,
        args,
        rows,
        held_out if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer, "Distill", FIGURES)
    if rewards and trainer.is_world_process_zero():
        report(trainer, held_out, rewards)
    return 0


def report(trainer, rows, rewards) -> None:
    """Prints what the plain model keeps of the policy, and writes it beside the model."""
    from rich.table import Table

    from ..data.reading import OpenedRows
    from ..evaluation.kept import what_is_kept
    from .progress import console

    args, law = trainer.args, trainer.law
    found = what_is_kept(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        OpenedRows(rows, args.image_root),
        rewards,
        args.max_completion_length,
        args.per_device_eval_batch_size,
        args.seed,
        action_temperature=law.temperature,
        action_top_k=law.top_k,
        action_top_p=law.top_p,
    )
    table = Table(title=f"What is kept, on {len(rows)} prompts")
    table.add_column("figure")
    for name in found:
        table.add_column(name, justify="right")
    for figure in next(iter(found.values())):
        table.add_row(figure, *(f"{values[figure]:.3f}" for values in found.values()))
    console.print(table)
    path = Path(args.output_dir) / REPORT_FILE
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"What is kept: {path}", highlight=False, soft_wrap=True)
