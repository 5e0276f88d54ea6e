"""Confidence intervals by resampling, seeded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """
    An estimate and its confidence interval.

    Args:
        estimate (`float`): The statistic of the values as they are.
        low (`float`): Lower end.
        high (`float`): Upper end.
        confidence (`float`): Nominal coverage, such as 0.95.
        count (`int`): Number of values, or of pairs.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    count: int

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairedDifference(Interval):
    """
    The difference of two statistics over the same samples, with its interval.

    Args:
        p_value (`float`): Two-sided bootstrap p-value of no difference, 2 (1 + k) / (1 + R) for R resamples of which k
            lie on the rarer side of 0.
    """

    p_value: float


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.mean,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """
    Percentile bootstrap interval (Efron and Tibshirani, 1993). Below some twenty values it is too narrow.

    Args:
        values (`Sequence[float]`): One value for each independent sample; none missing.
        statistic (`Callable`, *optional*, defaults to `numpy.mean`): Called with an array and `axis=-1`.
        num_resamples (`int`, *optional*, defaults to `10000`): Resamples.
        confidence (`float`, *optional*, defaults to `0.95`): Nominal coverage.
        seed (`int`, *optional*, defaults to `0`): Seed. The same arguments give the same interval.

    Returns:
        [`Interval`]
    """
    array = _finite(values, "values")
    resampled = _resample(lambda rows: statistic(array[rows], axis=-1), len(array), num_resamples, seed)
    low, high = _ends(resampled, confidence)
    return Interval(float(statistic(array, axis=-1)), low, high, confidence, len(array))


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.mean,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """
    Interval of `statistic(first) - statistic(second)` over the same samples, which are drawn in pairs.

    Args:
        first (`Sequence[float]`): Values of one system.
        second (`Sequence[float]`): Values of the other, of the same samples in the same order.
        statistic (`Callable`, *optional*, defaults to `numpy.mean`): Called with an array and `axis=-1`.
        num_resamples (`int`, *optional*, defaults to `10000`): Resamples.
        confidence (`float`, *optional*, defaults to `0.95`): Nominal coverage.
        seed (`int`, *optional*, defaults to `0`): Seed. The same arguments give the same interval.

    Returns:
        [`PairedDifference`]
    """
    one, other = _finite(first, "first"), _finite(second, "second")
    if len(one) != len(other):
        raise ValueError(f"`first` and `second` must be of the same samples; got {len(one)} and {len(other)} values.")

    def difference(rows: np.ndarray) -> np.ndarray:
        return statistic(one[rows], axis=-1) - statistic(other[rows], axis=-1)

    resampled = _resample(difference, len(one), num_resamples, seed)
    low, high = _ends(resampled, confidence)
    rarer = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p_value = min(1.0, 2 * (1 + rarer) / (1 + num_resamples))
    estimate = float(statistic(one, axis=-1) - statistic(other, axis=-1))
    return PairedDifference(estimate, low, high, confidence, len(one), p_value)


def _finite(values: Sequence[float], argument: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"`{argument}` must be a list of at least one finite number, with samples that have none left out; "
            f"got shape {array.shape}, {int((~np.isfinite(array)).sum())} of them not finite."
        )
    return array


def _resample(statistic: Callable[[np.ndarray], np.ndarray], count: int, num_resamples: int, seed: int) -> np.ndarray:
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1; got {num_resamples}.")
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // count)
    sizes = [min(chunk, num_resamples - start) for start in range(0, num_resamples, chunk)]
    return np.concatenate([statistic(generator.integers(count, size=(size, count))) for size in sizes])


def _ends(resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1; got {confidence}.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)
