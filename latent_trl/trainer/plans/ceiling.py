"""What the best plan is worth on some prompts: no choice among the plans can be worth more."""

from dataclasses import dataclass
from typing import Any

import torch

from ...data.prompts import EncodedPrompt, PromptEncoder
from ...plans.model import PlanModel, SegmentEngine
from ...plans.segments import PlannedAnswer, Switch
from ...rewards.calling import RewardCaller
from .processes import shared
from .report import summed_rewards


@dataclass
class Ceiling:
    """
    Rewards of plans on some prompts.

    Args:
        rewards (`torch.Tensor`): `[n, R]`, NaN where no function could score: each plan held for the whole answer, and
            behind those, where plans are held for segments, as many sequences drawn at random.
        plans (`int`): K.
    """

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
        return {"rewards": rewards, "plans": self.plans}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Ceiling":
        rewards = [[torch.nan if one is None else one for one in own] for own in record["rewards"]]
        return cls(torch.tensor(rewards), record["plans"])


@dataclass
class Judge:
    """
    Answers of a model to rows of a data set, and their rewards.

    Args:
        model (`PlanModel`), encoder (`PromptEncoder`): The model, and what encodes its prompts.
        caller (`RewardCaller`): Rewards are the sum of its functions.
        max_new_tokens (`int`), ends (`list[int]`), batch_size (`int`): Of decoding.
        engine (`Callable`, *optional*): What decodes in the place of the model.
    """

    model: PlanModel
    encoder: PromptEncoder
    caller: RewardCaller
    max_new_tokens: int
    ends: list[int]
    batch_size: int
    engine: SegmentEngine | None = None

    def spoken(self, prompts: list[EncodedPrompt], choose: Any, switch: Switch | None = None) -> list[PlannedAnswer]:
        """Greedy answers under the plans that `choose` gives, with `switch`, as [`PlanModel.speak`] takes both."""
        size, engine = self.batch_size, self.engine
        return self.model.speak(
            self.encoder, prompts, choose, self.max_new_tokens, self.ends, size, engine, switch=switch
        )

    def rewards(self, rows: list[dict[str, Any]], answers: list[PlannedAnswer], **context: Any) -> torch.Tensor:
        """Rewards `[N]` of answers, NaN where no function could score."""
        ids = [answer.token_ids for answer in answers]
        texts = [self.encoder.encoder.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
        return summed_rewards(self.caller, rows, texts, ids, **context)

    def ceiling(self, rows: list[dict[str, Any]], seed: int, before: Ceiling | None = None) -> Ceiling:
        """
        The ceiling on some rows.

        Args:
            rows (`list[dict]`): n of them.
            seed (`int`): Of the sequences that are drawn where plans are held for segments.
            before (`Ceiling`, *optional*): Of the same rows with fewer plans, whose rewards are not asked for again.
        """
        plans, first = self.model.plan_config.num_plans, 0 if before is None else before.plans
        parts = [] if before is None else [before.rewards[:, :first]]
        parts.append(self._of_sequences(rows, [[plan] for _ in rows for plan in range(first, plans)]))
        if self.model.plan_config.segment != "answer":
            generator = torch.Generator().manual_seed(seed)
            shape = (len(rows) * plans, self.max_new_tokens)
            parts.append(self._of_sequences(rows, torch.randint(plans, shape, generator=generator).tolist()))
        return Ceiling(torch.cat(parts, dim=1), plans)

    def _of_sequences(self, rows: list[dict[str, Any]], sequences: list[list[int]]) -> torch.Tensor:
        """Rewards `[n, R]` under R sequences of plans a row, the last of each for all later segments."""
        each = len(sequences) // len(rows)

        def answered(places: range) -> list[torch.Tensor]:
            some = [rows[place] for place in places for _ in range(each)]
            prompts = [prompt for place in places for prompt in [self.encoder(rows[place])] * each]

            def choose(numbers: list[int], answers: list[PlannedAnswer], inputs: dict[str, Any]) -> torch.Tensor:
                own = [sequences[places.start * each + number] for number in numbers]
                return torch.tensor([one[min(len(a.plans), len(one) - 1)] for one, a in zip(own, answers, strict=True)])

            return list(self.rewards(some, self.spoken(prompts, choose)).view(len(places), each))

        return torch.stack(shared(len(rows), answered))
