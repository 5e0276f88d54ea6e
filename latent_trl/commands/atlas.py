"""`latent-trl atlas MODEL DATA`: one HTML page that shows what each code or plan does."""

import argparse
from pathlib import Path

from .arguments import DATASET, CommandParser, at_least


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl atlas",
        description="Draws a codebook on one self-contained HTML page: usage, tokens, contexts, transitions, a map, "
        "and what an answer becomes when one code is forced; or what each plan says.",
    )
    parser.add_argument("model", help="folder or Hub id of latent actions")
    parser.add_argument("dataset", help="prompts: " + DATASET)
    parser.add_argument("--split", default="test", help="(%(default)s)")
    parser.add_argument("--limit", type=at_least(1), default=300, help="the first so many prompts (%(default)s)")
    parser.add_argument("--image-root", metavar="FOLDER", help="the only folder from which rows may name image files")
    parser.add_argument("--output", type=Path, default=Path("atlas.html"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--backbone", help="folder or Hub id of the backbone, where the checkpoint's own is not right")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=48, help="(%(default)s)")
    parser.add_argument(
        "--forced-prompts",
        type=at_least(1),
        default=6,
        help="on which each code is forced, or each plan is shown (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from transformers.utils import logging

    from ..data.reading import OpenedRows
    from ..evaluation.atlas import make_atlas, write_atlas
    from .loading import load_model, load_processor
    from .plan_atlas import draw_plans
    from .plan_loading import is_plan_model
    from .progress import console, progress_bars
    from .rows import load_rows

    logging.set_verbosity_error()
    rows = load_rows(args.dataset, args.split, limit=args.limit, purpose="prompts")
    rows = OpenedRows(rows, args.image_root)
    if is_plan_model(args.model):
        console.print(f"The page is {draw_plans(args, rows)}", highlight=False, soft_wrap=True)
        return 0
    model = load_model(args.model, args.backbone, dtype=args.dtype)
    with progress_bars() as bars:
        task = bars.add_task("Atlas", total=len(rows) + min(args.forced_prompts, len(rows)), figures="")
        atlas = make_atlas(
            model,
            load_processor(model, args.backbone),
            rows,
            name=args.model,
            data=f"{args.dataset}, {args.split}",
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            forced_prompts=args.forced_prompts,
            seed=args.seed,
            progress=lambda done: bars.update(task, completed=done),
        )
        bars.update(task, figures=f"{atlas.used} codes used, perplexity {atlas.perplexity:.1f}")
    console.print(f"The page is {write_atlas(atlas, args.output)}", highlight=False, soft_wrap=True)
    return 0
