"""Reward functions that fail say which function, which sample, and why; nothing that is not a number gets through."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.utils import logging
from trl.trainer.utils import is_async_callable

logger = logging.get_logger(__name__)

Rewards = list[float | None]


class RewardError(ValueError):
    """A reward function raised, or returned what is not one number or `None` for each completion."""


class RewardErrors:
    """
    Errors of reward functions, kept until all processes know of them. The functions run before the processes exchange
    their rewards: one that raised there would leave the others waiting.

    Args:
        skip_nonfinite (`bool`): Whether NaN and infinities count as `None`, with a warning, and are no error.
    """

    def __init__(self, skip_nonfinite: bool = False):
        self.skip_nonfinite = skip_nonfinite
        self.first: RewardError | None = None

    def keep(self, error: RewardError, count: int) -> list[float]:
        """Keeps the first error; infinite rewards, which no checked function gives, tell the others of it."""
        self.first = self.first or error
        return [math.inf] * count

    def raise_any(self, rewards: torch.Tensor) -> None:
        """Raises the error of any process on all of them; `rewards` `[N, functions]` of all processes."""
        if not rewards.isinf().any():
            return
        own, self.first = self.first, None
        told = gather_object([own and str(own)])
        if own is not None:
            raise own
        for process, message in enumerate(told):
            if message is not None:
                raise RewardError(f"On process {process}: {message}")


def checked_reward(function: Callable[..., Any], name: str, errors: RewardErrors) -> Callable[..., Any]:
    """
    `function` with its answers checked, sync or async as it is. When it raises, or returns the wrong number of rewards,
    NaN, an infinity or what is no number, a [`RewardError`] is kept in `errors`.

    Args:
        function (`Callable`): A reward function with TRL's signature.
        name (`str`): How errors call it.
        errors (`RewardErrors`): Of this process.
    """
    if is_async_callable(function):

        @functools.wraps(function, updated=())
        async def call(prompts, completions, **columns):
            try:
                try:
                    answer = await function(prompts=prompts, completions=completions, **columns)
                except Exception as error:
                    where = await _first_failing_async(function, prompts, completions, columns)
                    raise _failure(name, error, where, prompts, completions) from error
                return _numbers(answer, name, prompts, completions, errors.skip_nonfinite)
            except RewardError as error:
                return errors.keep(error, len(prompts))

    else:

        @functools.wraps(function, updated=())
        def call(prompts, completions, **columns):
            try:
                try:
                    answer = function(prompts=prompts, completions=completions, **columns)
                except Exception as error:
                    where = _first_failing(function, prompts, completions, columns)
                    raise _failure(name, error, where, prompts, completions) from error
                return _numbers(answer, name, prompts, completions, errors.skip_nonfinite)
            except RewardError as error:
                return errors.keep(error, len(prompts))

    return call


def check_model_rewards(
    rewards: torch.Tensor, names: list[str], is_model: list[bool], skip_nonfinite: bool = False
) -> None:
    """
    Raises [`RewardError`] where a reward model gave NaN or an infinity; `rewards` `[N, functions]` of all processes.
    With `skip_nonfinite` such rewards become NaN, as those of functions that returned `None`, with a warning.
    """
    for column, name in enumerate(names):
        wrong = ~rewards[:, column].isfinite()
        if not is_model[column] or not wrong.any():
            continue
        row = int(wrong.nonzero()[0, 0])
        message = (
            f"The reward model {name!r} gave {rewards[row, column].item()} for sample {row} of {len(rewards)}, "
            "counted over all processes."
        )
        if not skip_nonfinite:
            raise RewardError(message)
        logger.warning(f"{message} It counts as not scored.")
        rewards[wrong, column] = torch.nan


def _one(columns: dict[str, Any], row: int, count: int) -> dict[str, Any]:
    return {k: [v[row]] if isinstance(v, list) and len(v) == count else v for k, v in columns.items()}


def _first_failing(function, prompts, completions, columns) -> int | None:
    """The first sample on which the function raises when it is given that one alone."""
    for row in range(len(prompts)):
        try:
            function(prompts=[prompts[row]], completions=[completions[row]], **_one(columns, row, len(prompts)))
        except Exception:
            return row
    return None


async def _first_failing_async(function, prompts, completions, columns) -> int | None:
    for row in range(len(prompts)):
        try:
            await function(prompts=[prompts[row]], completions=[completions[row]], **_one(columns, row, len(prompts)))
        except Exception:
            return row
    return None


def _failure(name: str, error: Exception, row: int | None, prompts: list, completions: list) -> RewardError:
    if row is None:
        where = f"on a batch of {len(prompts)} samples, though on none of them alone; the first is "
    else:
        where = "on "
    where += _sample(row or 0, prompts, completions)
    return RewardError(f"The reward function {name!r} raised {type(error).__name__}: {error} {where}.")


def _sample(row: int, prompts: list, completions: list) -> str:
    return f"sample {row} of {len(prompts)} (prompt {_short(prompts[row])}, completion {_short(completions[row])})"


def _short(value: Any, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _numbers(answer: Any, name: str, prompts: list, completions: list, skip_nonfinite: bool) -> Rewards:
    if isinstance(answer, torch.Tensor):
        answer = answer.tolist()
    try:
        rewards = list(answer)
    except TypeError:
        rewards = None
    if rewards is None or isinstance(answer, (str, bytes, dict)):
        raise RewardError(
            f"The reward function {name!r} must return a list of {len(prompts)} numbers, got {_short(answer)}."
        )
    if len(rewards) != len(prompts):
        row = min(len(rewards), len(prompts) - 1)
        raise RewardError(
            f"The reward function {name!r} returned {len(rewards)} rewards for {len(prompts)} completions; the first "
            f"without a reward of its own is {_sample(row, prompts, completions)}."
            if len(rewards) < len(prompts)
            else f"The reward function {name!r} returned {len(rewards)} rewards for {len(prompts)} completions, the "
            f"last of which is {_sample(row, prompts, completions)}."
        )
    return [_number(reward, row, name, prompts, completions, skip_nonfinite) for row, reward in enumerate(rewards)]


def _number(reward: Any, row: int, name: str, prompts: list, completions: list, skip_nonfinite: bool) -> float | None:
    if reward is None:
        return None
    if isinstance(reward, torch.Tensor) and reward.numel() == 1:
        reward = reward.item()
    # NumPy's scalars are numbers but for its booleans, which convert as Python's do.
    if not isinstance(reward, numbers.Real) and type(reward).__name__ not in ("bool", "bool_"):
        raise RewardError(
            f"The reward function {name!r} returned {_short(reward)}, a {type(reward).__name__}, for "
            f"{_sample(row, prompts, completions)}. Return a number, or None where there is nothing to score."
        )
    value = float(reward)
    if not math.isfinite(value):
        message = f"The reward function {name!r} returned {value} for {_sample(row, prompts, completions)}."
        if not skip_nonfinite:
            raise RewardError(f"{message} Return a finite number, or None where there is nothing to score.")
        logger.warning(f"{message} It counts as not scored.")
        return None
    return value
