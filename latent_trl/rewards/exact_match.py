"""A strict reward for short answers out of a known set."""

import re
from collections.abc import Sequence

from ..data.shapes import ANSWERS


class ExactMatchReward:
    """
    Scores 1 for a short answer that names the truth and no other candidate, else 0.

    An answer that lists candidates, volunteers attributes that were not asked for, or rambles on scores 0, so that
    nothing but the choice of the right word can raise the reward. Words are compared whole and in lower case: "not"
    does not mention "no".

    Args:
        candidates (`Sequence[str]`, *optional*):
            All single words that count as an answer. Defaults to the colours, the shapes, "yes" and "no" of
            [`~latent_trl.data.shapes.shape_questions`].
        max_words (`int`, *optional*, defaults to `6`):
            Longest answer that can score.

    Example:

    ```python
    >>> reward = ExactMatchReward()
    >>> reward(prompts=None, completions=["it is red.", "red or blue.", "it is blue."], answer=["red", "red", "red"])
    [1.0, 0.0, 0.0]
    ```
    """

    __name__ = "exact_match"

    def __init__(self, candidates: Sequence[str] = ANSWERS, max_words: int = 6):
        self.candidates = frozenset(candidate.lower() for candidate in candidates)
        self.max_words = max_words
        compound = sorted(candidate for candidate in self.candidates if _words(candidate) != [candidate])
        if compound:
            raise ValueError(f"`candidates` must be single words, got {compound}.")

    def __call__(self, prompts, completions, answer, kind=None, **kwargs) -> list[float]:
        """
        Args:
            prompts (`list`):
                Not used; part of the signature of reward functions.
            completions (`list[str]` or `list[list[dict]]`):
                Answers, as text or as conversations of which all assistant text counts.
            answer (`list[str]`):
                The true candidate of each completion.
            kind (`list[str]`, *optional*):
                Not used; a column of the data set.

        Returns:
            `list[float]`: 1.0 or 0.0 for each completion.

        Raises:
            `ValueError`: when an `answer` is not among the candidates, since nothing could ever score.
        """
        return [self._score(_text(completion), truth) for completion, truth in zip(completions, answer, strict=True)]

    def _score(self, text: str, truth: str) -> float:
        truth = truth.lower()
        if truth not in self.candidates:
            raise ValueError(f"`answer` must be one of {sorted(self.candidates)}, got {truth!r}.")
        words = _words(text)
        mentioned = self.candidates.intersection(words)
        return float(mentioned == {truth} and len(words) <= self.max_words)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _text(completion: str | list[dict]) -> str:
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        content = message["content"]
        if isinstance(content, str):
            parts.append(content)
        else:
            parts.extend(part["text"] for part in content if part["type"] == "text")
    return " ".join(parts)
