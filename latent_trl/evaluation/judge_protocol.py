"""The evaluation of MMRole and PCogAlignBench: ratio of the judge's scores over several generations a sample."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .intervals import Interval, PairedDifference, bootstrap_interval, paired_bootstrap

if TYPE_CHECKING:
    from ..rewards.judge import JudgeReward
    from ..rewards.judge_template import Judgement


@dataclass(frozen=True)
class JudgeReport:
    """
    Result of [`summarize_judgements`].

    Args:
        mean (`float`): Mean over the generations of the mean ratio over samples and aspects.
        std (`float`): Standard deviation of that mean from generation to generation (n - 1); `nan` for one generation.
        interval ([`Interval`]): Bootstrap interval over samples, each with the mean over its generations.
        aspects (`dict[str, float]`): Mean ratio by aspect.
        aspect_intervals (`dict[str, Interval]`): Bootstrap interval over samples by aspect.
        generations (`list[float]`): Mean ratio by generation.
        samples (`dict[str, float]`): Mean ratio by sample key, for the samples graded at least once.
        num_samples (`int`): Samples given.
        num_judged (`int`): Graded pairs of a sample and a generation.
        num_unscored (`int`): Pairs that could not be graded. They are left out of all means.
    """

    mean: float
    std: float
    interval: Interval
    aspects: dict[str, float]
    aspect_intervals: dict[str, Interval]
    generations: list[float]
    samples: dict[str, float]
    num_samples: int
    num_judged: int
    num_unscored: int

    def __str__(self) -> str:
        unscored = f", {self.num_unscored} not scored" if self.num_unscored else ""
        spread = f" ± {self.std:.3f}" if np.isfinite(self.std) else ""
        return f"{self.mean:.3f}{spread} ({self.interval}, {self.num_samples} samples{unscored})"


@dataclass(frozen=True)
class JudgedModel:
    """
    Result of [`judge_model`].

    Args:
        report ([`JudgeReport`]): The sums.
        generations (`list[list[str]]`): N lists with an answer for each row.
        keys (`list[str]`): Key of each row.
    """

    report: JudgeReport
    generations: list[list[str]]
    keys: list[str]


def judge_model(
    model: Any,
    processing_class: Any,
    rows: Any,
    judge: "JudgeReward",
    num_generations: int = 3,
    action_temperature: float = 0.1,
    action_top_k: int = 64,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
    key_column: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> JudgedModel:
    """
    Lets a model answer every prompt N times and a judge grade the answers; the defaults are the paper's.

    Args:
        model (`LatentActionModel`), processing_class: The model and its backbone's processor.
        rows (`Dataset`): With `prompt`, `images` where there are some, and the judge's `reference_column`.
        judge ([`~latent_trl.rewards.judge.JudgeReward`]): The judge.
        num_generations (`int`, defaults to `3`): N.
        action_temperature (`float`, defaults to `0.1`), action_top_k (`int`, defaults to `64`): Law of the codes.
        max_new_tokens (`int`, defaults to `1024`), batch_size (`int`, defaults to `16`): Of generation.
        seed (`int`, defaults to `0`): Of the codes, and of the bootstrap.
        key_column (`str`, *optional*): As [`sample_keys`] takes it.
        progress (`Callable`, *optional*): Told the number of answers made after each batch.
    """
    import torch

    from ..data.reading import OpenedRows
    from .answers import answer

    if num_generations < 1:
        raise ValueError(f"`num_generations` must be at least 1, got {num_generations}.")
    rows = OpenedRows.of(rows)
    keys, column = sample_keys(rows, key_column), judge.reference_column
    if column not in rows.column_names:
        raise ValueError(f"The judge reads the column {column!r}; `rows` has {rows.column_names}.")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    generations: list[list[str]] = []

    def told(n: int) -> None:
        if progress is not None:
            progress(len(generations) * len(rows) + n)

    for _ in range(num_generations):
        found = answer(
            model,
            processing_class,
            rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=told,
            action_do_sample=True,
            action_temperature=action_temperature,
            action_top_k=min(action_top_k, model.config.num_codes),
            action_generator=generator,
        )
        generations.append(found.texts)
    images = rows["images"][:] if "images" in rows.column_names else None
    references = rows[column][:]
    report = run_judge_protocol(judge, keys, rows["prompt"][:], generations, references, images, seed=seed)
    return JudgedModel(report, generations, keys)


def sample_keys(rows: Any, column: str | None = None) -> list[str]:
    """
    A unique key for each row.

    Args:
        rows (`Dataset`): The rows.
        column (`str`, *optional*): Their column of keys. Defaults to `key` or `id`, where there is one, else to the
            row's number.
    """
    if column is None:
        column = next((name for name in ("key", "id") if name in rows.column_names), None)
    elif column not in rows.column_names:
        raise ValueError(f"`column` must be one of {rows.column_names}, got {column!r}.")
    keys = [str(key) for key in (range(len(rows)) if column is None else rows[column][:])]
    check_keys(keys)
    return keys


def run_judge_protocol(
    judge: "JudgeReward",
    keys: Sequence[str],
    prompts: Sequence,
    generations: Sequence[Sequence],
    references: Sequence,
    images: Sequence[list] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> JudgeReport:
    """
    Has a judge grade N generations for every sample, and sums up.

    Args:
        judge ([`~latent_trl.rewards.judge.JudgeReward`]): The judge; its `score` is awaited once for each generation.
        keys (`Sequence[str]`): A key for each sample. They must be unique.
        prompts (`Sequence`): Prompt of each sample, plain or conversational.
        generations (`Sequence[Sequence]`): N lists, each with one completion for each sample (3 in the paper).
        references (`Sequence`): Reference answer of each sample.
        images (`Sequence[list]`, *optional*): Images of each sample. Defaults to those in the prompts.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Returns:
        [`JudgeReport`]
    """
    from ..rewards.event_loop import run_async

    check_keys(keys)
    columns = {"prompts": prompts, "references": references, "images": images}
    columns.update({f"generations[{i}]": generation for i, generation in enumerate(generations)})
    for name, column in columns.items():
        if column is not None and len(column) != len(keys):
            raise ValueError(f"`{name}` must have an entry for each of the {len(keys)} `keys`; got {len(column)}.")

    async def grade() -> list[list["Judgement | None"]]:
        rows = None if images is None else list(images)
        return [await judge.score(list(prompts), list(answers), list(references), rows) for answers in generations]

    return summarize_judgements(keys, run_async(grade()), confidence, seed)


def summarize_judgements(
    keys: Sequence[str],
    judgements: Sequence[Sequence["Judgement | None"]],
    confidence: float = 0.95,
    seed: int = 0,
) -> JudgeReport:
    """
    Sums up the judgements of N generations.

    The value of an answer is the mean over aspects of score(answer) / score(reference). What could not be graded is
    left out and counted, never filled in.

    Args:
        keys (`Sequence[str]`): A key for each sample. They must be unique.
        judgements (`Sequence[Sequence[Judgement | None]]`): N lists, each with one judgement for each sample.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Returns:
        [`JudgeReport`]
    """
    check_keys(keys)
    wrong = [len(row) for row in judgements if len(row) != len(keys)]
    if wrong or not judgements:
        raise ValueError(
            f"`judgements` must hold for each generation one entry for each of the {len(keys)} `keys`; "
            f"got {[len(row) for row in judgements]}."
        )
    graded = [judgement for row in judgements for judgement in row if judgement is not None]
    if not graded:
        raise ValueError(f"None of the {len(keys) * len(judgements)} `judgements` was scored, so there is no result.")
    aspects = list(graded[0].aspect_ratios)
    ratios = np.full((len(judgements), len(keys), len(aspects)), np.nan)
    for g, row in enumerate(judgements):
        for s, judgement in enumerate(row):
            if judgement is not None:
                ratios[g, s] = [judgement.aspect_ratios[aspect] for aspect in aspects]
    values = ratios.mean(axis=2)
    generations = [_mean(row) for row in values]
    judged = [key for key, column in zip(keys, values.T, strict=True) if not np.isnan(column).all()]
    samples = dict(zip(judged, _scored_means(values), strict=True))
    scored = [mean for mean in generations if not np.isnan(mean)]
    return JudgeReport(
        mean=float(np.mean(scored)),
        std=float(np.std(scored, ddof=1)) if len(scored) > 1 else float("nan"),
        interval=bootstrap_interval(list(samples.values()), confidence=confidence, seed=seed),
        aspects={aspect: _mean(ratios[:, :, a].ravel()) for a, aspect in enumerate(aspects)},
        aspect_intervals={
            aspect: bootstrap_interval(_scored_means(ratios[:, :, a]), confidence=confidence, seed=seed)
            for a, aspect in enumerate(aspects)
        },
        generations=generations,
        samples=samples,
        num_samples=len(keys),
        num_judged=len(graded),
        num_unscored=values.size - len(graded),
    )


def compare_judge_reports(
    first: JudgeReport, second: JudgeReport, confidence: float = 0.95, seed: int = 0
) -> PairedDifference:
    """
    Difference of two systems over the same samples, `first` less `second`, by the paired bootstrap.

    Args:
        first ([`JudgeReport`]): Report of one system.
        second ([`JudgeReport`]): Report of the other. Samples that only one of them could have graded are left out.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Returns:
        [`PairedDifference`]: Its `count` is the number of samples compared.
    """
    common = [key for key in first.samples if key in second.samples]
    if not common:
        raise ValueError("`first` and `second` have no sample key in common, so there is nothing to compare.")
    one, other = ([report.samples[key] for key in common] for report in (first, second))
    return paired_bootstrap(one, other, confidence=confidence, seed=seed)


def check_keys(keys: Sequence[str]) -> None:
    """Raises `ValueError` unless there are keys and no two are equal."""
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated or len(keys) == 0:
        raise ValueError(f"`keys` must be unique, one for each sample; got {len(keys)}, repeated: {repeated[:5]}.")


def _scored_means(values: np.ndarray) -> list[float]:
    """Mean over the generations `[N, samples]` of each sample that was scored at least once."""
    return [_mean(column) for column in values.T if not np.isnan(column).all()]


def _mean(values: np.ndarray) -> float:
    """Mean of what was scored; `nan` where nothing was."""
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if len(scored) else float("nan")
