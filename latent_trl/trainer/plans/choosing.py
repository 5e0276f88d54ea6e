"""The plans of a batch of rollouts: drawn where segments begin, and every choice kept."""

from typing import Any

import torch

from ...plans.segments import PlannedAnswer
from .processes import process
from .replay import said_key


class RolloutChoices:
    """
    Chooses the plans of the rollouts of some prompts of a batch. What is drawn for a rollout depends on its place in
    the batch of all processes alone.

    Args:
        trainer (`PlanRLTrainer`): Whose chooser it is, and whose `replay` keeps the states where segments begin.
        batch (`int`): Number of the batch of rollouts.
        numbers (`list[int]`): Of the prompts of the batch.
        places (`range`): Which of them are meant; G rollouts of each stand side by side.
        plans (`torch.Tensor`), log_probs (`torch.Tensor`), weights (`torch.Tensor`): `[B, G]`, of the first segments.
    """

    def __init__(
        self,
        trainer: Any,
        batch: int,
        numbers: list[int],
        places: range,
        plans: torch.Tensor,
        log_probs: torch.Tensor,
        weights: torch.Tensor,
    ):
        self.trainer, self.batch, self.numbers = trainer, batch, numbers
        self.size = plans.shape[1]
        self.first = places.start * self.size
        self.count = plans.numel()
        self.plans, self.log_probs, self.weights = plans.flatten(), log_probs.flatten(), weights.flatten()
        # Every choice: what `Replay.add` takes, and `rollout`, `segment`, `log_prob` and `weight`.
        self.made: list[dict[str, Any]] = []

    def __call__(self, rows: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any]) -> torch.Tensor:
        rollouts = [self.first + row for row in rows]
        if not answers[0].plans:
            chosen, log_probs, keys = self.plans[rollouts], self.log_probs[rollouts], [""] * len(rows)
        else:
            chosen, log_probs, keys = self._later(rollouts, answers, inputs)
        owner = process()[0]
        for rollout, answer, plan, log_prob, key in zip(rollouts, answers, chosen, log_probs, keys, strict=True):
            self.made.append(
                {
                    "rollout": rollout,
                    "segment": len(answer.plans),
                    "prompt": self.numbers[rollout // self.size],
                    "said": key,
                    "plan": int(plan),
                    "log_prob": float(log_prob),
                    "weight": float(self.weights[rollout]),
                    "owner": owner,
                }
            )
        return chosen

    def _later(
        self, rollouts: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Plans of segments that begin behind a prompt, independent of each other, and where they begin."""
        trainer = self.trainer
        states = trainer.states_of(inputs)
        logits = trainer.logits(states) / trainer.args.exploration_temperature
        # Rows that are answered at once are at the same segment.
        generator = trainer.generator(self.batch + 500_000 * len(answers[0].plans), 0)
        noise = gumbel((self.count, logits.shape[1]), generator)[rollouts]
        chosen = (logits + noise).argmax(dim=1)
        log_probs = logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        keys = []
        for rollout, answer, own in zip(rollouts, answers, states, strict=True):
            number = self.numbers[rollout // self.size]
            key = said_key(number, answer.token_ids)
            trainer.replay.keep(number, own, key, len(answer.token_ids))
            keys.append(key)
        return chosen, log_probs, keys

    def sorted(self) -> list[dict[str, Any]]:
        """The choices, rollout by rollout."""
        return sorted(self.made, key=lambda one: (one["rollout"], one["segment"]))


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Gumbel noise: with it, the greatest of some logits is drawn from their softmax."""
    return -(-torch.rand(shape, generator=generator).clamp(min=1e-20).log()).log()


def perturbed(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """
    Logits `[B, K]` over `temperature` with Gumbel noise. The plans with the greatest are drawn one after the other
    without replacement from the softmax of the logits over `temperature` (the Gumbel-top-k trick, [Kool et al.,
    2019](https://huggingface.co/papers/1903.06059)).
    """
    return logits / temperature + gumbel(tuple(logits.shape), generator)
