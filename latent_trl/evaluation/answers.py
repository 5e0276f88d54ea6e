"""Answers of a model to the prompts of a data set, with the codes that made them and their rewards."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.pieces import text_pieces
from ..data.reading import OpenedRows
from ..rewards.calling import RewardCaller
from ..rewards.conversation import as_completion
from ..search.sources import source_of


@dataclass
class Answers:
    """
    Args:
        texts (`list[str]`): One answer a prompt, special tokens left out.
        tokens (`list[list[str]]`): The same token by token, up to and including the end.
        token_ids (`list[list[int]]`): The ids of those tokens.
        action_ids (`list[list[int]]`): The codes that emitted them.
        rewards (`list[float]`): NaN where the reward function could not say. Empty when none was given.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    action_ids: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def mean_reward(self) -> float:
        """Mean over the rows that were scored; NaN where none was."""
        return _mean(self.rewards)

    def mean_by(self, keys: list[str]) -> dict[str, float]:
        """Mean reward of the prompts of each key."""
        groups: dict[str, list[float]] = {}
        for key, reward in zip(keys, self.rewards, strict=True):
            groups.setdefault(key, []).append(reward)
        return {key: _mean(values) for key, values in sorted(groups.items())}


def _mean(rewards: list[float]) -> float:
    scored = [reward for reward in rewards if not math.isnan(reward)]
    return sum(scored) / len(scored) if scored else math.nan


def answer(
    model,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    reward: Callable[..., Any] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> Answers:
    """
    Lets `model` answer every prompt, each once.

    Args:
        model (`LatentActionModel` or `AnswerSource`): In any mode; it answers in evaluation mode. Or an engine in its
            place, [`~latent_trl.vllm.answers.EngineAnswers`].
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, plain or conversational, `images` where there are some, and the
            columns that the reward reads.
        reward (`Callable` or `RewardCaller`, *optional*): A reward function of TRL's signature, sync or async. It gets
            what trainers give it: every column, `images` among them, `completion_ids`, and completions of the prompts'
            kind. A [`RewardCaller`] of one function may have a time limit.
        batch_size (`int`, defaults to `64`), max_new_tokens (`int`, defaults to `32`): Of generation.
        progress (`Callable`, *optional*): Told the number of prompts answered after each batch.
        generate_kwargs: Passed on, such as `action_do_sample` (by default `False`: greedy answers).

    Raises:
        RewardError: When the reward function raises, or returns what is not a finite number or `None` for each answer.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    source, settings = source_of(model, processing_class), {"action_do_sample": False, **generate_kwargs}
    copies = settings.pop("num_return_sequences", 1)
    caller = None if reward is None else RewardCaller.of(reward)
    rows = OpenedRows.of(rows)
    result = Answers()
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        for found in source(batch, max_new_tokens, copies, **settings):
            result.texts.append(found.text)
            result.tokens.append(text_pieces(tokenizer, found.token_ids))
            result.token_ids.append(found.token_ids)
            result.action_ids.append(found.action_ids)
        if caller is not None:
            result.rewards += _scored(caller, batch, result.texts[start:], result.token_ids[start:])
        if progress is not None:
            progress(len(result.texts))
    return result


def score_answers(
    reward: Callable[..., Any], rows: Any, texts: list[str], token_ids: list[list[int]], batch_size: int = 64
) -> list[float]:
    """
    Rewards of one answer to each row.

    Args:
        reward (`Callable` or `RewardCaller`): As in [`answer`].
        rows (`Dataset` or list): As in [`answer`].
        texts (`list[str]`), token_ids (`list[list[int]]`): The answers and their tokens.
        batch_size (`int`, defaults to `64`): Answers of one call of the reward function.

    Returns:
        `list[float]`: NaN where the function cannot say.
    """
    caller, rows = RewardCaller.of(reward), OpenedRows.of(rows)
    rewards: list[float] = []
    for start in range(0, len(rows), batch_size):
        places = slice(start, start + batch_size)
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        rewards += _scored(caller, batch, texts[places], token_ids[places])
    return rewards


def _scored(
    caller: RewardCaller, rows: list[dict[str, Any]], texts: list[str], token_ids: list[list[int]]
) -> list[float]:
    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    (rewards,) = caller.score(rows, prompts, completions, token_ids)
    return [math.nan if reward is None else reward for reward in rewards]
