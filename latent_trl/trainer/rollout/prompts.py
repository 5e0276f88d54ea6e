"""From the rows of a rollout batch to encoded prompts, each processed once, and from tokens to completions."""

import math
from collections.abc import Callable
from typing import Any

from trl.data_utils import is_conversational, prepare_multimodal_messages

from ...data.prompts import EncodedPrompt, PromptEncoder
from ...rewards.conversation import IMAGE_COLUMNS
from .rollout import Sample
from .source import RolloutSource

Prepare = Callable[[dict[str, Any]], dict[str, Any]]


def groups_of(rows: list[dict[str, Any]], first: int, size: int) -> tuple[list[dict[str, Any]], int]:
    """
    One row for each call of the generator, where TRL repeats a row for every sample of its group.

    Args:
        rows (`list[dict]`): Of this process.
        first (`int`): The place of its first row in the batch of all processes.
        size (`int`): Samples of a group.

    Returns:
        The rows, and how often each is to be answered. A group that processes share is a part on each; parts of
        unlike sizes are cut to their common divisor, and then a row stands for several calls.
    """
    starts = [0, *(i for i in range(1, len(rows)) if (first + i) % size == 0), len(rows)]
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    copies = math.gcd(*lengths)
    parts = [rows[start] for start, length in zip(starts, lengths) for _ in range(length // copies)]
    return parts, copies


def answers(
    rows: list[dict[str, Any]], copies: int, prepare: Prepare, encoder: PromptEncoder, source: RolloutSource
) -> list[Sample]:
    """
    Answers rows, each processed once.

    Args:
        rows (`list[dict]`): As [`groups_of`] gives them; the same object for calls of one prompt.
        copies (`int`): Samples of each.
        prepare (`Callable`): Loads the pictures of a row.
        encoder (`PromptEncoder`): Of the prompts.
        source (`RolloutSource`): What generates.

    Returns:
        `list[Sample]`: Row by row.
    """
    prepared: dict[int, tuple[dict[str, Any], EncodedPrompt]] = {}
    for row in rows:
        if id(row) not in prepared:
            loaded = prepare(row)
            prepared[id(row)] = loaded, encoder(loaded)
    samples = source(*map(list, zip(*(prepared[id(row)] for row in rows), strict=True)), copies)
    texts = encoder.processing_class.batch_decode([s.completion_ids for s in samples], skip_special_tokens=True)
    for sample, text in zip(samples, texts, strict=True):
        conversation = is_conversational({"prompt": sample.row["prompt"]})
        sample.completion = [{"role": "assistant", "content": text}] if conversation else text
    return samples


def reward_prompts(rows: list[dict[str, Any]]) -> list[Any]:
    """Prompts as reward functions see them, with the pictures in their places, as TRL gives them."""
    prompts = []
    for row in rows:
        prompt = row["prompt"]
        if any(name in row for name in IMAGE_COLUMNS) and not isinstance(prompt, str):
            images = row.get("images")
            if images is None:
                images = [row["image"]] if row.get("image") is not None else []
            prompt = prepare_multimodal_messages(prompt, images=list(images) or None)
        prompts.append(prompt)
    return prompts
