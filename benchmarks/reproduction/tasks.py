"""The task of the reproduction: questions about drawn shapes, in the style of training and in another one."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from latent_trl.data.shapes import (
    COLOURS,
    DESCRIPTION_REQUESTS,
    DESCRIPTIONS,
    PHRASINGS,
    SHAPES,
    chitchat,
    shape_questions,
)

# The background is pale in all three channels, no shape is.
BACKGROUND = 200
OUTLINE_PIXELS = 3
SAMPLES = 8
SAMPLED_QUESTIONS, SAMPLED_DESCRIPTIONS = 48, 24


def outlined(image: Image.Image) -> Image.Image:
    """The same drawing in another style: the shape's outline alone. The pocket VLM was trained on filled shapes."""
    pixels = np.asarray(image.convert("RGB")).copy()
    inside = pixels.min(axis=2) < BACKGROUND
    background = np.median(pixels[~inside], axis=0)
    for _ in range(OUTLINE_PIXELS):
        neighbours = (np.roll(inside, step, axis) for step in (-1, 1) for axis in (0, 1))
        inside = inside & np.logical_and.reduce(list(neighbours))
    pixels[inside] = background
    return Image.fromarray(pixels)


def _patterns() -> re.Pattern:
    """Every sentence that the training data answer with: questions and descriptions."""
    words = {"colour": "|".join(COLOURS), "shape": "|".join(SHAPES), "size": "small|medium|big"}
    forms = []
    for kind, phrasings in PHRASINGS.items():
        for phrasing in phrasings:
            forms.append(re.escape(phrasing).replace(r"\{\}", f"({words.get(kind, '')})"))
    for description in DESCRIPTIONS:
        form = re.escape(description)
        for name, choice in words.items():
            form = form.replace(rf"\{{{name}\}}", f"({choice})")
        forms.append(form)
    return re.compile("|".join(f"(?:{form})" for form in forms))


FLUENT = _patterns()


def is_fluent(text: str) -> bool:
    """Whether a text is, word for word, a sentence of the training data's forms, right or wrong."""
    return FLUENT.fullmatch(text.strip()) is not None


@cache
def _conversations() -> Dataset:
    return chitchat(None, seed=1)


def small_talk(count: int, seed: int, others: int) -> Dataset:
    """`count` conversations to learn from; none is among the first `others`, whose answers are measured."""
    rows = _conversations()
    return rows.select(range(others, len(rows))).shuffle(seed).select(range(count))


def described(pairs: Dataset) -> list[dict[str, Any]]:
    """The conversations that ask to describe the picture."""
    return [row for row in pairs if row["messages"][0]["content"] in DESCRIPTION_REQUESTS]


@dataclass
class Tasks:
    """
    Everything that is asked after training, the same for every run.

    Args:
        held_out (`list[dict]`): Questions about pictures that no training saw.
        other_style (`list[dict]`): The same with outlined pictures.
        blind (`list[dict]`): The same questions with the next question's picture.
        validation (`list[dict]`): Other pictures; learning rates are chosen on them, and curves drawn.
        sampled (`list[dict]`): Questions and requests to describe, for the diversity of samples.
        references (`list[dict]`): Small talk and descriptions with the column `reference`: what RL does not reward.
    """

    held_out: list[dict[str, Any]]
    other_style: list[dict[str, Any]]
    blind: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    sampled: list[dict[str, Any]]
    references: list[dict[str, Any]]

    @classmethod
    @cache
    def load(cls, questions: int, others: int) -> "Tasks":
        rows = list(shape_questions("test", 870, seed=0))
        held_out, validation = rows[:questions], rows[600 : 600 + others]
        pictures = [row["images"] for row in held_out]
        described = [
            {"prompt": [{"role": "user", "content": DESCRIPTION_REQUESTS[i % 5]}], "images": row["images"]}
            for i, row in enumerate(validation)
        ]
        talk = [
            {"prompt": row["messages"][:-1], "reference": row["messages"][-1]["content"]}
            for row in _conversations().select(range(others))
        ]
        return cls(
            held_out=held_out,
            other_style=[{**row, "images": [outlined(row["images"][0])]} for row in held_out],
            blind=[{**row, "images": images} for row, images in zip(held_out, pictures[1:] + pictures[:1])],
            validation=validation,
            sampled=validation[:SAMPLED_QUESTIONS] + described[:SAMPLED_DESCRIPTIONS],
            references=talk,
        )
