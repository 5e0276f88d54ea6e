"""What the best plan is worth on a sample of prompts: no choice among the plans can be worth more."""

from dataclasses import dataclass
from typing import Any

import torch

from ...data.prompts import EncodedPrompt


@dataclass
class Ceiling:
    """
    Rewards of plans on some prompts.

    Args:
        numbers (`list[int]`): Of the prompts.
        rewards (`torch.Tensor`): `[n, R]`, NaN where no function could score: each plan held for the whole answer, and
            behind those, where plans are held for segments, as many sequences drawn at random.
        plans (`int`): K.
    """

    numbers: list[int]
    rewards: torch.Tensor
    plans: int

    @property
    def best(self) -> float:
        """The mean over prompts of the best reward. A lower bound where plans are held for segments."""
        best = self.rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
        return best[best.isfinite()].mean().item()

    def of(self, plans: torch.Tensor) -> float:
        """The mean reward of one plan `[n]` a prompt, held for the whole answer."""
        return self.rewards.gather(1, plans[:, None]).nanmean().item()

    def record(self) -> dict[str, Any]:
        rewards = [[None if one != one else one for one in own] for own in self.rewards.tolist()]
        return {"numbers": self.numbers, "rewards": rewards, "plans": self.plans}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Ceiling":
        rewards = [[torch.nan if one is None else one for one in own] for own in record["rewards"]]
        return cls(record["numbers"], torch.tensor(rewards), record["plans"])


def measured(trainer: Any, numbers: list[int], before: Ceiling | None = None) -> Ceiling:
    """
    The ceiling of a `PlanRLTrainer` on training prompts of these numbers.

    Args:
        trainer (`PlanRLTrainer`): Whose model and rewards they are.
        numbers (`list[int]`): Of the prompts.
        before (`Ceiling`, *optional*): Of the same prompts with fewer plans, whose rewards are not asked for again.
    """
    model, plans = trainer.model, trainer.model.plan_config.num_plans
    first = 0 if before is None else before.plans
    rows = [trainer.rows[number] for number in numbers]
    prompts = [trainer.encoder(row) for row in rows]
    held = [[plan] for _ in numbers for plan in range(first, plans)]
    rewards = _rewards(trainer, rows, prompts, held, plans - first)
    parts = [rewards] if before is None else [before.rewards[:, :first], rewards]
    if model.plan_config.segment != "answer":
        generator = torch.Generator().manual_seed(trainer.args.seed)
        longest = trainer.args.max_completion_length
        drawn = torch.randint(plans, (len(numbers) * plans, longest), generator=generator).tolist()
        parts.append(_rewards(trainer, rows, prompts, drawn, plans))
    return Ceiling(numbers, torch.cat(parts, dim=1), plans)


def _rewards(
    trainer: Any, rows: list[dict[str, Any]], prompts: list[EncodedPrompt], sequences: list[list[int]], each: int
) -> torch.Tensor:
    """Rewards `[n, each]` of answers under sequences of plans, the last of each for all later segments."""

    def choose(places: list[int], answers: list[Any], inputs: dict[str, Any]) -> torch.Tensor:
        found = [sequences[p][min(len(a.plans), len(sequences[p]) - 1)] for p, a in zip(places, answers, strict=True)]
        return torch.tensor(found)

    copies = [i for i in range(len(rows)) for _ in range(each)]
    spoken = trainer.spoken([prompts[i] for i in copies], choose)
    return trainer.rewards_of([rows[i] for i in copies], spoken).view(len(rows), each)
