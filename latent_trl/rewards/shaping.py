"""Rewards that look at the form of a completion only: its length, and how much it repeats itself."""

from collections.abc import Sequence
from typing import Any

from .conversation import completion_text

UNITS = ("tokens", "words")


class SoftOverlongPunishment:
    r"""
    DAPO's soft overlong punishment (equation 13 of [DAPO](https://huggingface.co/papers/2503.14476)).

    $$
    R(y) = \begin{cases}
    0, & |y| \le L_{\max} - L_{\text{cache}} \\
    \frac{(L_{\max} - L_{\text{cache}}) - |y|}{L_{\text{cache}}}, & L_{\max} - L_{\text{cache}} < |y| \le L_{\max} \\
    -1, & L_{\max} < |y|
    \end{cases}
    $$

    Args:
        max_completion_length (`int`):
            \\( L_{\max} \\), the length from which on the punishment is complete.
        soft_punish_cache (`int`):
            \\( L_{\text{cache}} \\), the length of the slope before it; 0 for a step.
        unit (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` of `completion_ids`, or whitespace-separated `"words"`.

    Example:

    ```python
    >>> reward = SoftOverlongPunishment(max_completion_length=100, soft_punish_cache=20)
    >>> reward(prompts=[""], completions=[""], completion_ids=[[1] * 90])
    [-0.5]
    ```
    """

    __name__ = "soft_overlong_punishment"

    def __init__(self, max_completion_length: int, soft_punish_cache: int, unit: str = "tokens"):
        if not 0 <= soft_punish_cache <= max_completion_length:
            raise ValueError(
                f"`soft_punish_cache` must be between 0 and `max_completion_length={max_completion_length}`; "
                f"got {soft_punish_cache}."
            )
        self.max_completion_length = max_completion_length
        self.soft_punish_cache = soft_punish_cache
        self.unit = _known_unit(unit)

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]] | None = None, **columns
    ) -> list[float]:
        """Punishments in [-1, 0], one for each completion."""
        return [self._reward(len(units)) for units in _units(self.unit, completions, completion_ids)]

    def _reward(self, length: int) -> float:
        if length > self.max_completion_length:
            return -1.0
        over = length - (self.max_completion_length - self.soft_punish_cache)
        return -over / self.soft_punish_cache if over > 0 else 0.0


class LengthReward:
    r"""
    Draws completions towards a length, in [-1, 0].

    $$ R(y) = -\min\left(1, \frac{\max(0, \left||y| - L\right| - t)}{L}\right) $$

    Args:
        target (`int`):
            \\( L \\), the wanted length; at least 1.
        tolerance (`int`, *optional*, defaults to `0`):
            \\( t \\), by how much a length may differ for free.
        unit (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` of `completion_ids`, or whitespace-separated `"words"`.

    Example:

    ```python
    >>> reward = LengthReward(target=4, tolerance=1, unit="words")
    >>> reward(prompts=["", ""], completions=["one two three", "one"])
    [0.0, -0.5]
    ```
    """

    __name__ = "length"

    def __init__(self, target: int, tolerance: int = 0, unit: str = "tokens"):
        if target < 1:
            raise ValueError(f"`target` must be at least 1; got {target}.")
        if tolerance < 0:
            raise ValueError(f"`tolerance` must be at least 0; got {tolerance}.")
        self.target = target
        self.tolerance = tolerance
        self.unit = _known_unit(unit)

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]] | None = None, **columns
    ) -> list[float]:
        """Rewards in [-1, 0], one for each completion."""
        lengths = [len(units) for units in _units(self.unit, completions, completion_ids)]
        distances = [max(0, abs(length - self.target) - self.tolerance) for length in lengths]
        return [-min(1.0, distance / self.target) if distance else 0.0 for distance in distances]


class RepetitionPenalty:
    r"""
    Punishes repeated n-grams (appendix C.2 of [Yeo et al.](https://huggingface.co/papers/2502.03373)).

    $$ R(y) = \left(1 - \frac{\text{distinct } n\text{-grams}}{\text{all } n\text{-grams}}\right) \times p $$

    A completion shorter than `ngram_size` gets 0.

    Args:
        ngram_size (`int`, *optional*, defaults to `3`):
            \\( n \\).
        max_penalty (`float`, *optional*, defaults to `-1.0`):
            \\( p \\), which a completion that only repeats itself comes near to; at most 0.
        unit (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` of `completion_ids`, or whitespace-separated `"words"`.

    Example:

    ```python
    >>> reward = RepetitionPenalty(ngram_size=2)
    >>> reward(prompts=["", ""], completions=["", ""], completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    ```
    """

    __name__ = "repetition_penalty"

    def __init__(self, ngram_size: int = 3, max_penalty: float = -1.0, unit: str = "tokens"):
        if ngram_size < 1:
            raise ValueError(f"`ngram_size` must be at least 1; got {ngram_size}.")
        if max_penalty > 0:
            raise ValueError(f"`max_penalty` must be at most 0; got {max_penalty}.")
        self.ngram_size = ngram_size
        self.max_penalty = max_penalty
        self.unit = _known_unit(unit)

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]] | None = None, **columns
    ) -> list[float]:
        """Penalties in [`max_penalty`, 0], one for each completion."""
        return [self._reward(units) for units in _units(self.unit, completions, completion_ids)]

    def _reward(self, units: Sequence[Any]) -> float:
        count = len(units) - self.ngram_size + 1
        distinct = len({tuple(units[i : i + self.ngram_size]) for i in range(count)})
        return (1 - distinct / count) * self.max_penalty if distinct < count else 0.0


def _known_unit(unit: str) -> str:
    if unit not in UNITS:
        raise ValueError(f"`unit` must be one of {list(UNITS)}; got {unit!r}.")
    return unit


def _units(unit: str, completions: list, completion_ids: list[list[int]] | None) -> list[Sequence[Any]]:
    if unit == "words":
        return [completion_text(completion).split() for completion in completions]
    if completion_ids is None:
        raise ValueError("`unit='tokens'` needs `completion_ids`, as trainers hand over; without them use 'words'.")
    return list(completion_ids)
