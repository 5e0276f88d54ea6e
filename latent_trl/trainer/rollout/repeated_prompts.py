"""Prompts that stand several times beside each other, as GRPO repeats each for its group."""

import math
from typing import Any

from PIL import Image

COMPARED = (str, bytes, bool, int, float, type(None), Image.Image)


def copies_of_each(prompts: list[Any]) -> int:
    """The largest n for which `prompts` is a list of prompts that each stand n times in a row."""
    runs = [1]
    for before, prompt in zip(prompts, prompts[1:]):
        if same_prompt(before, prompt):
            runs[-1] += 1
        else:
            runs.append(1)
    return math.gcd(*runs)


def same_prompt(one: Any, other: Any) -> bool:
    """Whether two prompts, with their images, are equal; what cannot be compared counts as different."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_prompt(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_prompt, one, other))
    return isinstance(one, COMPARED) and one == other
