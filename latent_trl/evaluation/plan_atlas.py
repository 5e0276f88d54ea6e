"""One HTML page of a codebook of plans: what each plan says, how often it is chosen, and what it is worth."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .atlas import render_page
from .report import image_url

TEMPLATE = "plan_atlas.html.j2"


@dataclass
class PlanEntry:
    """
    A plan.

    Args:
        plan (`int`): Its number.
        answers (`list[tuple[str, int]]`): What it says most often, and how often.
        chosen (`float`, *optional*): Share of the prompts for which it is the choice.
        reward (`float`, *optional*): Mean reward of its answers.
    """

    plan: int
    answers: list[tuple[str, int]]
    chosen: float | None = None
    reward: float | None = None


@dataclass
class PlanExample:
    """
    A prompt, and what all plans answer.

    Args:
        question (`str`): The last message of the user.
        image (`str`, *optional*): Its first picture, as a data URL.
        backbone (`str`): What the backbone answers without a plan.
        answers (`list[tuple[str, list[int]]]`): Different answers, and the plans that give them, the most common first.
        chosen (`int`, *optional*): The plan that is the choice.
    """

    question: str
    image: str | None
    backbone: str
    answers: list[tuple[str, list[int]]] = field(default_factory=list)
    chosen: int | None = None


@dataclass
class PlanAtlas:
    """
    Args:
        model (`str`), data (`str`): Names, for the page.
        prompts (`int`): How many were answered.
        distinct (`float`): Different answers of the plans to a prompt, on average.
        entries (`list[PlanEntry]`), examples (`list[PlanExample]`): What is shown.
        figures (`dict[str, float]`): Further ones for the top of the page, by name.
        held (`str`): For what a plan is held.
    """

    model: str
    data: str
    prompts: int
    distinct: float
    entries: list[PlanEntry]
    examples: list[PlanExample]
    figures: dict[str, float] = field(default_factory=dict)
    held: str = "the whole answer"


def plan_example(row: dict[str, Any], texts: list[str], backbone: str, chosen: int | None) -> PlanExample:
    """
    Args:
        row (`dict`): With `prompt`, and `images` where it has some.
        texts (`list[str]`): `[K]`, the answers of the plans.
        backbone (`str`): The backbone's own answer.
        chosen (`int`, *optional*): The plan that is the choice.
    """
    prompt, images = row["prompt"], row.get("images") or []
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not isinstance(content, str):
        content = " ".join(part.get("text") or "" for part in content).strip()
    groups = [(text, [k for k, other in enumerate(texts) if other == text]) for text, _ in Counter(texts).most_common()]
    return PlanExample(content, image_url(images[0]) if images else None, backbone, groups, chosen)


def write_plan_atlas(atlas: PlanAtlas, path: str | Path) -> Path:
    """Writes the page, which needs no other file and no network. Returns `path`."""
    return render_page(TEMPLATE, atlas, Path(path))
