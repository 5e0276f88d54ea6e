"""Prompts that are answered together, and what reward functions make of the answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..data.reading import OpenedRows
from ..evaluation.answers import answer, score_answers
from ..trainer.run.completions_table import prompt_text
from .explorer import Explorer

# Between a typed prompt and its right answer.
ARROW = "=>"
# Prompts of one click, so that a page answers in seconds or minutes.
MOST_PROMPTS = 256


@dataclass
class ScoredAnswers:
    """
    Args:
        prompts (`list[str]`): Their texts.
        texts (`list[str]`): The answers.
        rewards (`dict[str, list[float]]`): Of each function; NaN where it could not say.
    """

    prompts: list[str]
    texts: list[str]
    rewards: dict[str, list[float]]

    @property
    def means(self) -> dict[str, float]:
        """Mean reward of each function over the prompts that it scored; NaN where it scored none."""
        scored = {name: [value for value in values if value == value] for name, values in self.rewards.items()}
        return {name: sum(values) / len(values) if values else math.nan for name, values in scored.items()}


def typed_rows(text: str, image: Any = None) -> list[dict[str, Any]]:
    """
    Prompts of typed lines.

    Args:
        text (`str`): One prompt a line; after `=>` its right answer, which becomes the column `answer`.
        image (`PIL.Image.Image`, *optional*): The picture of all of them.

    Raises:
        ValueError: For no prompt, or a line with an answer and no prompt.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        prompt, arrow, right = (part.strip() for part in line.partition(ARROW))
        if not prompt and arrow:
            raise ValueError(f"Line {number} has an answer and no prompt before `{ARROW}`.")
        if prompt:
            rows.append({"prompt": [{"role": "user", "content": prompt}], "answer": right})
    if not rows:
        raise ValueError("Type a prompt, one a line, or drop a JSONL file.")
    if not any(row["answer"] for row in rows):
        rows = [{"prompt": row["prompt"]} for row in rows]
    return [row if image is None else {**row, "images": [image]} for row in rows]


def answer_batch(
    explorer: Explorer,
    rows: Any,
    rewards: dict[str, Callable[..., Any]],
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ScoredAnswers:
    """
    Answers prompts and scores the answers.

    Args:
        explorer (`Explorer`): Of the model.
        rows (`OpenedRows`, `Dataset` or list): With `prompt`, and the columns that the rewards read.
        rewards (`dict[str, Callable]`): Reward functions by name, called as in training.
        temperature (`float`, defaults to `0.0`): Of the codes; 0 takes the most likely tokens.
        seed (`int`, defaults to `0`): Of the sampling.
        progress (`Callable[[int], None]`, *optional*): Told the number of prompts answered.

    Raises:
        ValueError: For more than `MOST_PROMPTS` prompts, or a negative temperature.
        RewardError: When a reward function raises, or lacks a column.
    """
    rows = OpenedRows.of(rows)
    if len(rows) > MOST_PROMPTS:
        raise ValueError(f"{len(rows)} prompts are more than the {MOST_PROMPTS} of one batch. `latent-trl evaluate`.")
    if not temperature >= 0:
        raise ValueError(f"`temperature` must be 0 or more, got {temperature}.")
    options: dict[str, Any] = {}
    if temperature > 0:
        generator = torch.Generator(device=explorer.model.device).manual_seed(seed)
        options = {"action_do_sample": True, "action_temperature": temperature, "action_generator": generator}
    found = answer(
        explorer.model,
        explorer.processing_class,
        rows,
        batch_size=16,
        max_new_tokens=explorer.max_new_tokens,
        progress=progress,
        **options,
    )
    scores = {name: score_answers(reward, rows, found.texts, found.token_ids) for name, reward in rewards.items()}
    return ScoredAnswers([prompt_text(row["prompt"]) for row in rows], found.texts, scores)
