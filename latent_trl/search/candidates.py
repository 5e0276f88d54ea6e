"""What a search finds, how it is scored, and what the ways to search share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.prompts import encode_prompts
from ..data.reading import OpenedRows
from ..generation.answers import GeneratedAnswer, generated_answers
from ..generation.output import LatentActionGenerateOutput
from ..models.latent_action_model import LatentActionModel
from ..rewards.calling import RewardCaller
from ..rewards.conversation import as_completion


@dataclass
class Candidate:
    """
    One answer that a search decoded.

    Args:
        text (`str`): The answer, special tokens left out.
        token_ids (`list[int]`): Its tokens, up to and including the end.
        action_ids (`list[int]`): The codes that emitted them; `forced_action_ids` of them gives the answer again.
        log_prob (`float`): Of all codes together, in nats, under the law that they were chosen by.
        reward (`float`, *optional*): What the reward function said; `None` where it could not say.
    """

    text: str
    token_ids: list[int]
    action_ids: list[int]
    log_prob: float
    reward: float | None = None

    @classmethod
    def of(cls, answer: GeneratedAnswer) -> "Candidate":
        return cls(answer.text, answer.token_ids, answer.action_ids, sum(answer.log_probs))


@dataclass
class SearchResult:
    """
    What was found for one prompt.

    Args:
        candidates (`list[Candidate]`): In the order in which they were decoded; at least one.
    """

    candidates: list[Candidate] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        """The candidate of the highest reward, and of those the most probable; one without a reward comes last."""
        return max(self.candidates, key=lambda c: (c.reward is not None, c.reward or 0.0, c.log_prob))

    @property
    def num_scored(self) -> int:
        """How many different texts the reward function saw."""
        return len({candidate.text for candidate in self.candidates})

    @property
    def decoded_tokens(self) -> int:
        """How many tokens were decoded, those that repeat a forced beginning included."""
        return sum(len(candidate.token_ids) for candidate in self.candidates)


class Scorer:
    """Calls the reward function for a batch, each text of a prompt once, and fills in the rewards."""

    def __init__(self, reward: Callable[..., Any]):
        self.caller = RewardCaller.of(reward)
        self.waiting: list[tuple[dict[str, Any], list[Candidate], dict[str, float | None]]] = []

    def add(self, row: dict[str, Any], candidates: list[Candidate], known: dict[str, float | None]) -> None:
        """Answers to a prompt, to be scored; `known` are the rewards of its texts, and is filled in."""
        self.waiting.append((row, candidates, known))

    def score(self) -> None:
        """Scores what was added."""
        new: list[tuple[dict[str, Any], Candidate, dict[str, float | None]]] = []
        for row, candidates, known in self.waiting:
            first = {candidate.text: candidate for candidate in reversed(candidates) if candidate.text not in known}
            new += [(row, candidate, known) for candidate in reversed(first.values())]
        rows = [row for row, _, _ in new]
        prompts = [row["prompt"] for row in rows]
        completions = [as_completion(row["prompt"], candidate.text) for row, candidate, _ in new]
        (rewards,) = self.caller.score(rows, prompts, completions, [candidate.token_ids for _, candidate, _ in new])
        for (_, candidate, known), reward in zip(new, rewards, strict=True):
            known[candidate.text] = reward
        for _, candidates, known in self.waiting:
            for candidate in candidates:
                candidate.reward = known[candidate.text]
        self.waiting.clear()


def candidates_of(
    output: LatentActionGenerateOutput, prompt_length: int, tokenizer: Any, ends: list[int] | None
) -> list[Candidate]:
    return [Candidate.of(one) for one in generated_answers(output, prompt_length, tokenizer, ends)]


def encoded(model: LatentActionModel, processing_class: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in encode_prompts(processing_class, rows).items()}


def batches(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    rows = OpenedRows.of(rows)
    for start in range(0, len(rows), size):
        yield [rows[i] for i in range(start, min(start + size, len(rows)))]


def check_budget(n: int, batch_size: int) -> None:
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def refuse(given: dict[str, Any], *names: str) -> None:
    wrong = [name for name in names if given.get(name) is not None]
    if wrong:
        raise ValueError(f"`{wrong[0]}` is what the search itself decides. Leave it out.")
