"""The one way to call rewards, functions or models: all checked, and what one does wrong named with its sample."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from .conversation import completion_text, prompt_text
from .event_loop import run_together
from .guard import named_when_slow, own_copy, process_as_it_was
from .reward_model import RewardModelReward
from .time_limit import OverTime, call_within, check_timeout

logger = logging.get_logger(__name__)

FLOAT32_MAX = torch.finfo(torch.float32).max
# Columns of the data set that reward functions get as arguments of their own.
OWN_ARGUMENTS = ("prompt", "completion", "completion_ids")
LONGEST_TEXT = 200


class RewardError(ValueError):
    """A reward function raised, or returned what is not one number or `None` for each completion."""


class RewardCaller:
    """
    Calls reward functions for a batch of completions, and checks what they say. Trainers, evaluation, search and the
    command line all call rewards through it.

    A function that raises for a batch is called once more, with the first sample alone, to tell whether it fails on
    that sample or only on the batch.

    Args:
        functions (`Callable`, `nn.Module`, or list of them):
            Functions of TRL's signature `(prompts, completions, completion_ids, **columns)` that return a number or
            `None` for each completion. Async ones run side by side, also where an event loop runs already. A module is
            a reward model with one logit, scored as in TRL: chat template over prompt and completion, inference mode.
        names (`list[str]`, *optional*): Of the functions, for errors and metrics. Defaults to their own.
        processing_classes (tokenizer, or list of tokenizers and `None`, *optional*): Of the reward models.
        chat_template_kwargs (`dict`, *optional*): For the chat templates of the reward models.
        on_nonfinite (`str`, defaults to `"stop"`):
            What NaN, infinities and numbers beyond float32 are: `"stop"` for an error, `"skip"` for `None` and a
            warning.
        device (`str` or `torch.device`, defaults to `"cpu"`): Of the rewards, and of the reward models.
        timeout (`float`, *optional*):
            Seconds that a function may take for a batch, after which it is an error. An async function is cancelled; a
            plain one runs in a thread, which is left behind. Reward models are waited for.
        timeout_name (`str`, defaults to `"timeout"`): What errors call it.

    Raises:
        ValueError: For lists of unequal lengths, an unknown `on_nonfinite`, a `timeout` that is not above 0, or a
            model without a tokenizer.

    Example:

    ```python
    call = RewardCaller([JudgeReward("a-judge"), RepetitionPenalty()])
    rewards = call(rows, prompts, completions, completion_ids)  # [N, 2]
    call.raise_any(gather(rewards))
    ```
    """

    def __init__(
        self,
        functions: Any,
        names: list[str] | None = None,
        processing_classes: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        on_nonfinite: str = "stop",
        device: str | torch.device = "cpu",
        timeout: float | None = None,
        timeout_name: str = "timeout",
    ):
        check_timeout(timeout_name, timeout)
        self.timeout, self.timeout_name = timeout, timeout_name
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"`on_nonfinite` must be 'stop' or 'skip', got {on_nonfinite!r}.")
        functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        if not isinstance(processing_classes, (list, tuple)):
            processing_classes = [processing_classes] * len(functions)
        self.names = [reward_name(function) for function in functions] if names is None else list(names)
        for argument, given in (("names", self.names), ("processing_classes", processing_classes)):
            if len(given) != len(functions):
                raise ValueError(f"`{argument}` must be as many as `functions`, {len(functions)}; got {len(given)}.")
        self.skip_nonfinite = on_nonfinite == "skip"
        self.device = torch.device(device)
        self._are_models = [isinstance(function, nn.Module) for function in functions]
        self._functions = [
            self._model_reward(function, name, tokenizer, chat_template_kwargs)
            if isinstance(function, nn.Module)
            else function
            for function, name, tokenizer in zip(functions, self.names, processing_classes, strict=True)
        ]
        self._error: RewardError | None = None

    @classmethod
    def of(cls, reward: Any) -> "RewardCaller":
        """`reward`, if it is a caller, or one of that function."""
        return reward if isinstance(reward, cls) else cls(reward)

    def _model_reward(self, model: nn.Module, name: str, tokenizer: Any, chat_template_kwargs: Any) -> Callable:
        if tokenizer is None:
            raise ValueError(
                f"The reward model {name!r} needs its tokenizer in `processing_classes`, got None. "
                "Pass it, or make the model a `RewardModelReward`."
            )
        return RewardModelReward(
            model,
            tokenizer,
            max_length=None,
            device=self.device,
            name=name,
            add_special_tokens=False,
            chat_template_kwargs=chat_template_kwargs,
        )

    def __call__(
        self,
        rows: list[dict[str, Any]],
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        **context: Any,
    ) -> torch.Tensor:
        """
        Rewards of the samples of this process. It raises nothing for a reward that fails, since other processes would
        wait for this one: the error is kept, and its column is infinite. Call [`~RewardCaller.raise_any`] on the
        rewards of all processes.

        Args:
            rows (`list[dict]`): The data set's row of each sample. Every column but `prompt`, `completion` and
                `completion_ids` is passed to the functions as a list.
            prompts (`list`), completions (`list`): Plain texts or conversations.
            completion_ids (`list[list[int]]`): Tokens of the completions.
            context: Further arguments of the functions, such as `trainer_state`, `log_extra` and `log_metric`.

        Returns:
            `torch.Tensor` `[N, functions]`, float32: NaN where a function returned `None`.
        """
        rewards = self._rewards(rows, prompts, completions, completion_ids, context)
        return torch.tensor(rewards, dtype=torch.float32, device=self.device).T

    def score(
        self,
        rows: list[dict[str, Any]],
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        **context: Any,
    ) -> list[list[float | None]]:
        """
        As `__call__`, for a single process: it raises [`RewardError`] at once, and returns the numbers as they are, a
        list for each function, `None` where it said so.
        """
        rewards = self._rewards(rows, prompts, completions, completion_ids, context)
        if self._error is not None:
            raise self._error
        return [[None if math.isnan(reward) else reward for reward in own] for own in rewards]

    def _rewards(
        self, rows: list[dict], prompts: list, completions: list, completion_ids: list, context: dict[str, Any]
    ) -> list[list[float]]:
        """Checked rewards, a list for each function: NaN for `None`, all infinite where there is an error."""
        self._error = None
        if not prompts:
            return [[] for _ in self._functions]
        names = dict.fromkeys(name for row in rows for name in row if name not in OWN_ARGUMENTS and name[0] != "_")
        columns = {name: [row.get(name) for row in rows] for name in names}
        for name in ("prompts", "completions"):
            if name in columns:
                raise ValueError(f"The column {name!r} has the name of an argument of reward functions. Rename it.")
        batch = _Batch(prompts, completions, completion_ids, columns, context)
        outcomes = self._call(range(len(self._functions)), batch)
        rewards = [self._checked(i, outcome, batch) for i, outcome in enumerate(outcomes)]
        self._warn_of_unscored(rewards, batch)
        return rewards

    def raise_any(self, rewards: torch.Tensor) -> None:
        """Raises the [`RewardError`] of any process on all of them; `rewards` `[N, functions]` of all processes."""
        if rewards.isinf().any():
            own, self._error = self._error, None
            _raise_told(own)

    def _checked(self, index: int, outcome: Any, batch: "_Batch") -> list[float]:
        """The rewards of one function; infinities, which no checked function gives, where there is an error."""
        try:
            if isinstance(outcome, RewardError):  # of a reward that calls others
                raise outcome
            if isinstance(outcome, BaseException):
                raise self._failure(index, outcome, batch) from outcome
            return self._numbers(index, outcome, batch)
        except RewardError as error:
            self._error = self._error or error
            return [math.inf] * len(batch)

    def _title(self, index: int) -> str:
        return f"The reward {'model' if self._are_models[index] else 'function'} {self.names[index]!r}"

    def _said(self, index: int) -> str:
        return f"{self._title(index)} {'gave' if self._are_models[index] else 'returned'}"

    def _failure(self, index: int, error: BaseException, batch: "_Batch") -> RewardError:
        """The error of a function that raised, after one more call with the first sample alone."""
        if isinstance(error, OverTime):
            step = getattr(batch.context.get("trainer_state"), "global_step", None)
            where = "" if step is None else f" at step {step}"
            return RewardError(
                f"{self._title(index)} has not returned within {self.timeout:g} s (`{self.timeout_name}`){where} on a "
                f"batch of {len(batch)} samples, the first of which is {batch.sample(0)}. Nothing was learned from "
                "the batch. A training goes on from its last checkpoint."
            )
        what, alone = _words(error), ""
        # A model may be shared out over the processes, which then have to call it equally often.
        if len(batch) > 1 and not self._are_models[index]:
            again = self._call([index], batch.first())[0]
            failed = isinstance(again, BaseException)
            alone = f", and {_words(again)} on the first alone" if failed else ", though not on the first of them alone"
            if failed and _words(again) == what:
                return RewardError(f"{self._title(index)} raised {what} on {batch.sample(0)}.")
        if len(batch) == 1:
            return RewardError(f"{self._title(index)} raised {what} on {batch.sample(0)}.")
        return RewardError(
            f"{self._title(index)} raised {what} on a batch of {len(batch)} samples{alone}; the first is "
            f"{batch.sample(0)}."
        )

    def _call(self, places: Iterable[int], batch: "_Batch") -> list[Any]:
        """What functions return, or the exceptions that they raise. Plain ones run first, then all async together."""
        places = list(places)
        with process_as_it_was():
            outcomes = []
            for place in places:
                limit = None if self._are_models[place] else self.timeout
                with named_when_slow(self.names[place]):
                    outcomes.append(_start(self._functions[place], batch.arguments(), limit))
            waiting = [i for i, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
            if waiting:
                with named_when_slow(", ".join(self.names[places[i]] for i in waiting)):
                    results = run_together([outcomes[i] for i in waiting], self.timeout)
                for i, result in zip(waiting, results, strict=True):
                    outcomes[i] = result
        return outcomes

    def _numbers(self, index: int, answer: Any, batch: "_Batch") -> list[float]:
        count = len(batch)
        try:
            if isinstance(answer, torch.Tensor):
                answer = answer.tolist()
            rewards = None if isinstance(answer, (str, bytes, dict, set)) else list(answer)
        except Exception:
            # Among others a tensor without data.
            rewards = None
        if rewards is None:
            raise RewardError(f"{self._title(index)} must return a list of {count} numbers, got {_short(answer)}.")
        if len(rewards) != count:
            what = "first without a reward of its own" if len(rewards) < count else "last of which"
            raise RewardError(
                f"{self._said(index)} {len(rewards)} rewards for {count} completions, the {what} is "
                f"{batch.sample(min(len(rewards), count - 1))}."
            )
        return [self._number(index, reward, row, batch) for row, reward in enumerate(rewards)]

    def _number(self, index: int, reward: Any, row: int, batch: "_Batch") -> float:
        if reward is None:
            return math.nan
        if isinstance(reward, torch.Tensor) and reward.numel() == 1:
            reward = reward.item()
        # NumPy's scalars are numbers but for its booleans, which convert as Python's do.
        if not isinstance(reward, numbers.Real) and type(reward).__name__ not in ("bool", "bool_"):
            raise RewardError(
                f"{self._said(index)} {_short(reward)}, a {type(reward).__name__}, for {batch.sample(row)}. "
                "Return a number, or None where there is nothing to score."
            )
        try:
            value = float(reward)
        except OverflowError:  # an integer beyond float64
            value = math.inf if reward > 0 else -math.inf
        if abs(value) <= FLOAT32_MAX:
            return value
        beyond = isinstance(reward, int) or math.isfinite(value)
        number = f"{_short(reward)}, which is beyond float32," if beyond else value
        message = f"{self._said(index)} {number} for {batch.sample(row)}."
        if not self.skip_nonfinite:
            raise RewardError(f"{message} Return a finite number, or None where there is nothing to score.")
        logger.warning(f"{message} It counts as not scored.")
        return math.nan

    def _warn_of_unscored(self, rewards: list[list[float]], batch: "_Batch") -> None:
        unscored = [row for row, of_row in enumerate(zip(*rewards, strict=True)) if all(map(math.isnan, of_row))]
        if unscored:
            more = f" Nor could they score {len(unscored) - 1} more of this batch." if len(unscored) > 1 else ""
            logger.warning(
                f"All reward functions ({', '.join(self.names)}) returned None for {batch.sample(unscored[0])}: it is "
                f"not scored.{more}"
            )


class _Batch:
    """What the reward functions are called with."""

    def __init__(self, prompts: list, completions: list, completion_ids: list, columns: dict, context: dict):
        self.own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        self.columns, self.context = columns, context

    def __len__(self) -> int:
        return len(self.own["prompts"])

    def arguments(self) -> dict[str, Any]:
        """Lists that are the caller's own: one that changes them changes nothing for the others, or for the trainer."""
        return {**own_copy(self.columns), **own_copy(self.own), **self.context}

    def first(self) -> "_Batch":
        prompts, completions, completion_ids = (values[:1] for values in self.own.values())
        columns = {name: values[:1] for name, values in self.columns.items()}
        return _Batch(prompts, completions, completion_ids, columns, self.context)

    def sample(self, row: int) -> str:
        """Names a sample by its texts, which leave pictures out."""
        prompt, completion = prompt_text(self.own["prompts"][row]), completion_text(self.own["completions"][row])
        return f"sample {row} of {len(self)} (prompt {_short(prompt)}, completion {_short(completion)})"


def reward_name(function: Any) -> str:
    """The name of a reward function as TRL's trainers have it: a reward model's is that of its checkpoint."""
    if isinstance(function, nn.Module):
        return function.config._name_or_path.split("/")[-1] or type(function).__name__
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _start(function: Callable, arguments: dict[str, Any], seconds: float | None) -> Any:
    def call() -> Any:
        outcome = function(**arguments)
        return list(outcome) if isinstance(outcome, Iterator) else outcome

    try:
        return call_within(seconds, call)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # `sys.exit` too: the run would end as if it were done, and other processes would wait.
        return error


def _raise_told(own: RewardError | None) -> None:
    """Raises the own error, or else that of another process; all processes take part."""
    told = gather_object([own and str(own)])
    if own is not None:
        raise own
    for process, message in enumerate(told):
        if message is not None:
            raise RewardError(f"On process {process}: {message}")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."
