"""`latent-trl evaluate MODEL DATA`: reward, judge, diversity, perplexity, use of codes, and whether pictures matter."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import DATASET, CommandParser, above_zero, at_least, refuse_given
from .engines import OF_ENGINES, add_engine, check_engine, load_engine_answers

# Those of `latent_trl.evaluation.perplexity`, which imports torch.
LAWS = ("most_likely", "marginal", "inferred", "backbone")
PERPLEXITY = "of reference answers, by most_likely, marginal or inferred codes, or by the backbone without codes"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl evaluate",
        description="Answers the prompts of a data set and measures the answers. Intervals are 95 % bootstrap.",
    )
    parser.add_argument("model", help="folder or Hub id of latent actions")
    parser.add_argument("dataset", help=DATASET)
    parser.add_argument("--split", default="test", help="(%(default)s)")
    parser.add_argument("--limit", type=at_least(1), help="the first so many prompts")
    parser.add_argument("--image-root", metavar="FOLDER", help="the only folder from which rows may name image files")
    parser.add_argument("--key", metavar="COLUMN", help="of unique keys (`key`, `id`, or the row's number)")
    parser.add_argument("--reward-funcs", nargs="+", default=[], metavar="NAME", help="as for `latent-trl grpo`")
    parser.add_argument("--reward-kwargs", help="as for `latent-trl grpo`")
    parser.add_argument(
        "--reward-timeout", type=above_zero, metavar="SECONDS", help="that a reward function may take for a batch"
    )
    parser.add_argument("--judge", metavar="JSON", help="options of JudgeReward: grade sampled answers by aspect")
    parser.add_argument(
        "--generations", type=at_least(1), default=3, help="answers a prompt for the judge (%(default)s)"
    )
    parser.add_argument("--generation-temperature", type=float, default=0.1, help="of their codes (%(default)s)")
    parser.add_argument("--generation-top-k", type=int, default=64, help="of their codes (%(default)s)")
    parser.add_argument(
        "--samples", type=at_least(0), default=0, help="also sample so many answers a prompt, for diversity"
    )
    parser.add_argument("--embedder", help="sentence encoder, for semantic diversity and Vendi score of the samples")
    parser.add_argument("--perplexity", nargs="+", default=[], choices=LAWS, metavar="LAW", help=PERPLEXITY)
    parser.add_argument("--reference", default="reference", metavar="COLUMN", help="for --perplexity (%(default)s)")
    parser.add_argument("--image-ablation", action="store_true", help="also answer with another row's picture")
    parser.add_argument(
        "--code-ceiling",
        type=at_least(1),
        nargs="?",
        const=1,
        metavar="N",
        help="also the best reward over all codes at each of the first N steps (1), or over all plans",
    )
    parser.add_argument("--plan", type=at_least(0), metavar="N", help="hold this plan, where the model has plans")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all figures and answers")
    parser.add_argument("--backbone", help="folder or Hub id of the backbone, where the checkpoint's own is not right")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16")
    add_engine(parser)
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples' codes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.samples == 1:
        parser.error("--samples must be at least 2: one answer has nothing to differ from")
    if args.image_ablation and not args.reward_funcs:
        parser.error("--image-ablation compares rewards: give --reward-funcs")
    if args.code_ceiling and not args.reward_funcs:
        parser.error("--code-ceiling is of rewards: give --reward-funcs")
    if args.embedder and not args.samples:
        parser.error("--embedder compares samples: give --samples")
    return args


@dataclass
class Measured:
    """
    Args:
        keys (`list[str]`): Of the rows; all lists below have an entry for each.
        figures (`dict`): Name to a number or an [`~latent_trl.evaluation.intervals.Interval`].
        answers (`list[str]`), swapped (`list[str]`): Greedy ones; with another row's picture.
        action_ids (`list[list[int]]`): Codes of `answers`.
        samples (`list[list[str]]`), generations (`list[list[str]]`): For diversity, and for the judge.
    """

    keys: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    action_ids: list[list[int]] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    samples: list[list[str]] = field(default_factory=list)
    generations: list[list[str]] = field(default_factory=list)


def score(reward, rows, answers) -> list[float]:
    """Rewards of [`~latent_trl.evaluation.answers.Answers`] to the rows; NaN where the function cannot say."""
    from ..evaluation.answers import score_answers

    return score_answers(reward, rows, answers.texts, answers.token_ids)


def swap_images(rows):
    """The same rows, each with the pictures of the next row whose pictures are different."""
    from ..data.images import load_image

    if "images" not in rows.column_names or not any(rows["images"][:]):
        raise ValueError("`--image-ablation` needs a data set with `images`.")
    images = rows["images"][:]
    have = [i for i, own in enumerate(images) if own]
    seen = {i: [(picture.size, picture.tobytes()) for picture in map(load_image, images[i])] for i in have}
    moved = list(images)
    for place, i in enumerate(have):
        others = [*have[place + 1 :], *have[:place]]
        other = next((j for j in others if seen[j] != seen[i]), None)
        if other is None:
            raise ValueError("`--image-ablation` needs different pictures; all rows have the same.")
        moved[i] = images[other]
    return [{**{k: v for k, v in row.items() if k != "images"}, "images": moved[i]} for i, row in enumerate(rows)]


def interval(values: list[float], statistic=None):
    """Bootstrap interval of the values that are there, by default of their mean; NaN where there is none."""
    from ..evaluation.intervals import bootstrap_interval

    kept = [value for value in values if value == value]
    if not kept:
        return float("nan")
    return bootstrap_interval(kept) if statistic is None else bootstrap_interval(kept, statistic)


def largest(values: list[float]) -> float:
    """The largest of the values that are there; NaN where there is none."""
    return max((value for value in values if value == value), default=float("nan"))


def diversity(texts: list[list[str]], embedder: str | None) -> dict[str, Any]:
    """Figures of several samples for each prompt: each is worked out for every prompt, and then averaged."""
    from ..evaluation.diversity import distinct_n, inverse_mean, mean_pairwise_cosine, self_bleu, vendi_score

    figures: dict[str, Any] = {
        "distinct_2": interval([distinct_n(group) for group in texts]),
        "self_bleu": interval([self_bleu(group) for group in texts]),
        "different answers a prompt": interval([len(set(group)) for group in texts]),
    }
    if embedder is not None:
        from ..rewards.embedding import TextEmbedder

        embed = TextEmbedder(embedder)
        embeddings = [embed(group) for group in texts]
        figures["semantic_diversity"] = interval([mean_pairwise_cosine(e) for e in embeddings], inverse_mean)
        figures["vendi_score"] = interval([vendi_score(e) for e in embeddings])
    return figures


class Measurement:
    """
    The measurements on one model and data set, one after the other.

    Args:
        model (`LatentActionModel`), processor: The model and its backbone's processor.
        rows (`Dataset`): The prompts.
        rewards (`list`): Reward functions.
        args (`argparse.Namespace`): Of the command.
        bars: Where progress is shown.
        engine (`AnswerSource`, *optional*): Answers in the model's place.
    """

    def __init__(self, model, processor, rows, rewards: list[Any], args: argparse.Namespace, bars, engine=None):
        from ..evaluation.judge_protocol import sample_keys
        from ..rewards.calling import RewardCaller

        self.model, self.processor, self.rows, self.args, self.bars = model, processor, rows, args, bars
        self.answering = model if engine is None else engine
        limit = {"timeout": args.reward_timeout, "timeout_name": "--reward-timeout"}
        self.rewards = {reward.__name__: RewardCaller(reward, **limit) for reward in rewards}
        self.measured = Measured(sample_keys(rows, args.key))
        self.figures = self.measured.figures

    def run(self) -> Measured:
        """Everything that was asked for."""
        kept = self.answers_and_codes()
        if self.args.image_ablation:
            self.image_ablation(kept)
        if self.args.code_ceiling:
            self.code_ceiling(kept)
        if self.args.samples:
            self.samples()
        if self.args.judge:
            self.judged()
        if self.args.perplexity:
            self.perplexity()
        return self.measured

    def _bar(self, name: str, total: int):
        task = self.bars.add_task(name, total=total, figures="")
        return lambda done: self.bars.update(task, completed=done)

    def _answers(self, name: str, prompts, **options):
        from ..evaluation.answers import answer

        sizes = {"batch_size": self.args.batch_size, "max_new_tokens": self.args.max_new_tokens}
        return answer(
            self.answering, self.processor, prompts, progress=self._bar(name, len(prompts)), **sizes, **options
        )

    def answers_and_codes(self) -> dict[str, list[float]]:
        """Greedy answers: their rewards, which are returned, their fluency, and the use of the codebook."""
        from ..evaluation.atlas import code_token_information
        from ..evaluation.perplexity import answer_perplexity
        from ..hub.facts import CodebookReport

        found = self._answers("Greedy answers", self.rows)
        self.measured.answers, self.measured.action_ids = found.texts, found.action_ids
        kept = {name: score(reward, self.rows, found) for name, reward in self.rewards.items()}
        for name, values in kept.items():
            self.figures[f"reward/{name}"] = interval(values)
            unscored = sum(value != value for value in values)
            if unscored:
                self.figures[f"reward/{name}, not scored"] = unscored
        report = CodebookReport.from_choices(found.action_ids, self.model.config.num_codes)
        self.figures["codebook/used"] = report.used
        self.figures["codebook/perplexity"] = report.perplexity
        self.figures["codebook/mutual_information"] = code_token_information(found.tokens, found.action_ids)
        self.figures["answers/empty"] = sum(not text for text in found.texts)
        bar = self._bar("Perplexity of the answers", len(self.rows))
        fluency = answer_perplexity(self.model, self.processor, self.rows, found.texts, progress=bar)
        self.figures["answers/perplexity"] = fluency.interval(seed=self.args.seed)
        return kept

    def image_ablation(self, kept: dict[str, list[float]]) -> None:
        """Rewards with another row's picture, and what the own picture gains over it."""
        from ..evaluation.intervals import paired_bootstrap

        found = self._answers("Another picture", swap_images(self.rows))
        self.measured.swapped = found.texts
        for name, reward in self.rewards.items():
            other = score(reward, self.rows, found)
            self.figures[f"reward/{name}, another picture"] = interval(other)
            pairs = [(a, b) for a, b in zip(kept[name], other) if a == a and b == b]
            if pairs:
                self.figures[f"reward/{name}, gain by the picture"] = paired_bootstrap(*zip(*pairs))

    def code_ceiling(self, kept: dict[str, list[float]]) -> None:
        """The best reward of a prompt over all codes at each of the first steps, the greedy answer among them."""
        from ..evaluation.answers import Answers
        from ..evaluation.code_ceiling import forced_answers

        steps, bar = self.args.code_ceiling, self._bar("All codes", len(self.rows))
        found = forced_answers(
            self.answering, self.processor, self.rows, steps, max_new_tokens=self.args.max_new_tokens, progress=bar
        )
        rows = [self.rows[i] for i, of_prompt in enumerate(found) for _ in of_prompt.texts]
        every = Answers([t for one in found for t in one.texts], token_ids=[i for one in found for i in one.token_ids])
        for name, reward in self.rewards.items():
            scores = score(reward, rows, every)
            count = len(scores) // len(found)
            groups = [[*scores[i * count : (i + 1) * count], own] for i, own in enumerate(kept[name])]
            where = "the first step" if steps == 1 else f"one of the first {steps} steps"
            self.figures[f"reward/{name}, best code at {where}"] = interval([largest(group) for group in groups])

    def samples(self) -> None:
        """Diversity of sampled answers, and their rewards; a prompt with an answer that was not scored is left out."""
        import torch

        args = self.args
        generator = torch.Generator(device=self.answering.device).manual_seed(args.seed)
        options = {"action_do_sample": True, "action_temperature": args.temperature, "action_generator": generator}
        names = [f"Samples {i + 1}/{args.samples}" for i in range(args.samples)]
        rounds = [self._answers(name, self.rows, **options) for name in names]
        self.measured.samples = [list(group) for group in zip(*(found.texts for found in rounds))]
        self.figures |= diversity(self.measured.samples, args.embedder)
        for name, reward in self.rewards.items():
            scores = list(zip(*[score(reward, self.rows, found) for found in rounds]))
            means = [sum(s) / len(s) for s in scores]
            self.figures[f"reward/{name}, mean of samples"] = interval(means)
            best = [max(s) if mean == mean else mean for s, mean in zip(scores, means)]
            self.figures[f"reward/{name}, best of {args.samples}"] = interval(best)

    def judged(self) -> None:
        """Ratio of a judge's scores over several generations, by aspect."""
        from ..evaluation.judge_protocol import judge_model
        from ..rewards.judge import JudgeReward
        from .arguments import as_dict

        args = self.args
        judge = JudgeReward(**as_dict("judge", args.judge))
        judge.check()
        found = judge_model(
            self.answering,
            self.processor,
            self.rows,
            judge,
            num_generations=args.generations,
            action_temperature=args.generation_temperature,
            action_top_k=args.generation_top_k,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=args.seed,
            key_column=args.key,
            progress=self._bar("Answers for the judge", args.generations * len(self.rows)),
        )
        self.measured.generations = [list(group) for group in zip(*found.generations)]
        report = found.report
        self.figures["judge/ratio"] = report.interval
        self.figures["judge/ratio, deviation over generations"] = report.std
        self.figures |= {f"judge/{aspect}": value for aspect, value in report.aspect_intervals.items()}
        self.figures["judge/not scored"] = report.num_unscored

    def perplexity(self) -> None:
        """Of the reference answers under each law."""
        from ..evaluation.perplexity import text_perplexity

        references = self.rows[self.args.reference][:]
        for law in self.args.perplexity:
            bar = self._bar(f"Perplexity, {law}", len(self.rows))
            found = text_perplexity(self.model, self.processor, self.rows, references, law, progress=bar)
            self.figures[f"reference_perplexity/{law}"] = found.interval(seed=self.args.seed)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with_engine = check_engine(args)
    from transformers.utils import logging

    from ..data.reading import OpenedRows
    from .arguments import as_dict
    from .loading import load_model, load_processor, load_rewards
    from .plan_evaluate import measure_plans
    from .plan_loading import is_plan_model
    from .progress import progress_bars
    from .rows import check_reward_columns, load_rows

    logging.set_verbosity_error()
    rows = load_rows(args.dataset, args.split, limit=args.limit, purpose="prompts")
    rewards = load_rewards(args.reward_funcs, as_dict("reward_kwargs", args.reward_kwargs)) if args.reward_funcs else []
    check_reward_columns(rewards, rows, args.dataset)
    rows = OpenedRows(rows, args.image_root)
    if is_plan_model(args.model):
        refuse_given("latent-trl evaluate", args, OF_ENGINES, f"is for codes a token, and {args.model!r} has plans.")
        measured = measure_plans(args, rows, rewards)
        report(args, len(rows), measured)
        return 0
    refuse_given("latent-trl evaluate", args, ("plan",), f"is for plans, and {args.model!r} has codes a token.")
    if args.perplexity and args.reference not in rows.column_names:
        raise ValueError(f"`--reference` must be one of {rows.column_names}, got {args.reference!r}.")
    # The engine first: it takes its memory at once. The model is for what is measured on texts.
    engine = load_engine_answers(args, max_num_seqs=args.batch_size) if with_engine else None
    model = load_model(args.model, args.backbone, dtype=args.dtype)
    with progress_bars() as bars:
        measured = Measurement(model, load_processor(model, args.backbone), rows, rewards, args, bars, engine).run()
    report(args, len(rows), measured)
    return 0


def report(args: argparse.Namespace, prompts: int, measured: Any) -> None:
    """Prints all figures, and writes them with the answers where that was asked for."""
    from rich.table import Table

    from .progress import console

    table = Table(title=f"{args.model} on {prompts} prompts of {args.dataset}, {args.split}")
    table.add_column("figure")
    table.add_column("value [95 %]", justify="right")
    for name, value in measured.figures.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    if args.output:
        from ..evaluation.json_files import write_json

        write_json(measured, args.output)
        console.print(f"All figures and answers: {args.output}", highlight=False)
