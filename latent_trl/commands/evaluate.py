"""`latent-trl evaluate MODEL DATA`: reward with intervals, diversity, use of codes, and whether pictures matter."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def parse(argv: list[str] | None) -> argparse.Namespace:
    from .arguments import DATASET

    parser = argparse.ArgumentParser(
        prog="latent-trl evaluate",
        description="Answers the prompts of a data set and measures the answers. Intervals are 95 % bootstrap.",
    )
    parser.add_argument("model", help="folder or Hub id of latent actions")
    parser.add_argument("dataset", help=DATASET)
    parser.add_argument("--split", default="test", help="(%(default)s)")
    parser.add_argument("--limit", type=int, help="the first so many prompts")
    parser.add_argument("--reward-funcs", nargs="+", default=[], metavar="NAME", help="as for `latent-trl grpo`")
    parser.add_argument("--reward-kwargs", help="as for `latent-trl grpo`")
    parser.add_argument("--samples", type=int, default=0, help="also sample so many answers a prompt, for diversity")
    parser.add_argument("--embedder", help="sentence encoder, for semantic diversity of the samples")
    parser.add_argument("--image-ablation", action="store_true", help="also answer with another row's picture")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all figures and answers")
    parser.add_argument("--backbone", help="folder or Hub id of the backbone, where the checkpoint's own is not right")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples' codes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.samples == 1:
        parser.error("--samples must be at least 2: one answer has nothing to differ from")
    if args.image_ablation and not args.reward_funcs:
        parser.error("--image-ablation compares rewards: give --reward-funcs")
    return args


@dataclass
class Measured:
    """
    Args:
        figures (`dict`): Name to a number or an [`~latent_trl.evaluation.intervals.Interval`].
        answers (`list[str]`), swapped (`list[str]`): With the most likely codes; with another row's picture.
        action_ids (`list[list[int]]`): Codes of `answers`.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    action_ids: list[list[int]] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)


def score(reward, rows, texts: list[str]) -> list[float]:
    """Rewards of one answer for each row; NaN where the function cannot say."""
    import asyncio
    import inspect

    columns = {name: rows[name][:] for name in rows.column_names if name not in ("prompt", "completion")}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    values = reward(prompts=rows["prompt"][:], completions=completions, **columns)
    if inspect.isawaitable(values):
        values = asyncio.run(_await(values))
    return [float("nan") if value is None else float(value) for value in values]


async def _await(values):
    return await values


def swap_images(rows):
    """The same rows, each with the pictures of the next row that has some."""
    if "images" not in rows.column_names or not any(rows["images"][:]):
        raise ValueError("`--image-ablation` needs a data set with `images`.")
    images = rows["images"][:]
    have = [i for i, own in enumerate(images) if own]
    moved = list(images)
    for place, i in enumerate(have):
        moved[i] = images[have[(place + 1) % len(have)]]
    return [{**{k: v for k, v in row.items() if k != "images"}, "images": moved[i]} for i, row in enumerate(rows)]


def interval(values: list[float]):
    from ..evaluation.intervals import bootstrap_interval

    return bootstrap_interval([value for value in values if value == value])


def diversity(texts: list[list[str]], embedder: str | None) -> dict[str, Any]:
    """Figures of several samples for each prompt."""
    from ..evaluation.diversity import distinct_n, self_bleu, semantic_diversity

    figures: dict[str, Any] = {
        "distinct_2": distinct_n([text for group in texts for text in group]),
        "self_bleu": sum(map(self_bleu, texts)) / len(texts),
        "different answers a prompt": sum(len(set(group)) for group in texts) / len(texts),
    }
    if embedder is not None:
        from ..rewards.embedding import TextEmbedder

        embed = TextEmbedder(embedder)
        figures["semantic_diversity"] = semantic_diversity([embed(group) for group in texts])
    return figures


def measure(model, processor, rows, rewards: list[Any], args: argparse.Namespace, bars) -> Measured:
    """Everything that was asked for."""
    import torch

    from ..evaluation.answers import answer
    from ..evaluation.intervals import paired_bootstrap
    from ..hub.facts import CodebookReport

    def answers(name: str, prompts, **options):
        task = bars.add_task(name, total=len(prompts), figures="")
        return answer(
            model,
            processor,
            prompts,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            progress=lambda done: bars.update(task, completed=done),
            **options,
        )

    named = {reward.__name__: reward for reward in rewards}
    measured = Measured()
    found = answers("Most likely codes", rows)
    measured.answers, measured.action_ids = found.texts, found.action_ids
    kept = {name: score(reward, rows, found.texts) for name, reward in named.items()}
    for name, values in kept.items():
        measured.figures[f"reward/{name}"] = interval(values)
    if args.image_ablation:
        measured.swapped = answers("Another picture", swap_images(rows)).texts
        for name, reward in named.items():
            other = score(reward, rows, measured.swapped)
            measured.figures[f"reward/{name}, another picture"] = interval(other)
            pairs = [(a, b) for a, b in zip(kept[name], other) if a == a and b == b]
            measured.figures[f"reward/{name}, gain by the picture"] = paired_bootstrap(*zip(*pairs))
    report = CodebookReport.from_choices(found.action_ids, model.config.num_codes)
    measured.figures["codebook/used"] = report.used
    measured.figures["codebook/perplexity"] = report.perplexity
    if args.samples:
        generator = torch.Generator(device=model.device).manual_seed(args.seed)
        options = {"action_do_sample": True, "action_temperature": args.temperature, "action_generator": generator}
        rounds = [answers(f"Samples {i + 1}/{args.samples}", rows, **options).texts for i in range(args.samples)]
        measured.figures |= diversity([list(group) for group in zip(*rounds)], args.embedder)
        for name, reward in named.items():
            scores = list(zip(*[score(reward, rows, texts) for texts in rounds]))
            measured.figures[f"reward/{name}, mean of samples"] = interval([sum(s) / len(s) for s in scores])
            measured.figures[f"reward/{name}, best of {args.samples}"] = interval([max(s) for s in scores])
    return measured


def write_json(measured: Measured, path: Path) -> None:
    from dataclasses import asdict, is_dataclass

    figures = {k: asdict(v) if is_dataclass(v) else v for k, v in measured.figures.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**asdict(measured), "figures": figures}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from rich.table import Table
    from transformers.utils import logging

    from .arguments import as_dict
    from .loading import load_model, load_processor, load_rewards, load_rows
    from .progress import console, progress_bars

    logging.set_verbosity_error()
    rows = load_rows(args.dataset, args.split, limit=args.limit)
    rewards = load_rewards(args.reward_funcs, as_dict("reward_kwargs", args.reward_kwargs)) if args.reward_funcs else []
    if "prompt" not in rows.column_names:
        raise ValueError(f"{args.dataset!r} has the columns {rows.column_names}; it needs a conversational `prompt`.")
    model = load_model(args.model, args.backbone, dtype=args.dtype)
    with progress_bars() as bars:
        measured = measure(model, load_processor(model, args.backbone), rows, rewards, args, bars)
    table = Table(title=f"{args.model} on {len(rows)} prompts of {args.dataset}, {args.split}")
    table.add_column("figure")
    table.add_column("value [95 %]", justify="right")
    for name, value in measured.figures.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    if args.output:
        write_json(measured, args.output)
        console.print(f"All figures and answers: {args.output}", highlight=False)
    return 0
