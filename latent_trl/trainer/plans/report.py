"""What the plans of a model say to held-out prompts, and what that is worth."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...data.prompts import EncodedPrompt, PromptEncoder
from ...hub.facts import PlansReport
from ...plans.model import PlanModel, SegmentEngine
from ...rewards.calling import RewardCaller
from ...rewards.conversation import as_completion
from .processes import shared

LONGEST_CELL = 60
LONGEST_ANSWER = 200


@dataclass
class PlanReport:
    """
    Answers of B prompts under K plans, and the backbone's own.

    Args:
        prompts (`list[str]`): The prompts' texts.
        texts (`list[list[str]]`): `[B, K]`.
        own (`list[str]`): `[B]`, the backbone's greedy answers.
        rewards (`torch.Tensor`, *optional*): `[B, K]`, NaN where a reward function could not say.
        own_rewards (`torch.Tensor`, *optional*): `[B]`.
        alternatives (`list[list[str]]`, *optional*): What the backbone could say, by branching.
        beginnings (`list[list[str]]`, *optional*): `[B, K]`, the first segments, of which `alternatives` then are.
        is_fluent (`Callable`, *optional*): Whether a text is a whole sentence.
    """

    prompts: list[str]
    texts: list[list[str]]
    own: list[str]
    rewards: torch.Tensor | None = None
    own_rewards: torch.Tensor | None = None
    alternatives: list[list[str]] | None = None
    is_fluent: Callable[[str], bool] | None = None
    beginnings: list[list[str]] | None = None

    def metrics(self) -> dict[str, float]:
        """The figures that [`PlanSpaceTrainer`]'s page explains."""
        figures = {"distinct": sum(len(set(texts)) for texts in self.texts) / len(self.texts)}
        if self.alternatives is not None:
            shares = [
                len(set(some) & set(texts)) / len(set(some))
                for some, texts in zip(self.alternatives, self.beginnings or self.texts, strict=True)
                if some
            ]
            figures["coverage"] = sum(shares) / max(1, len(shares))
        if self.rewards is not None and self.own_rewards is not None:
            best = self.rewards.nan_to_num(nan=-torch.inf).amax(dim=1)
            figures |= {
                "ceiling": best[best.isfinite()].mean().item(),
                "random_plan": self.rewards.nanmean().item(),
                "best_single_plan": self.rewards.nanmean(dim=0).nan_to_num(nan=-torch.inf).max().item(),
                "backbone": self.own_rewards.nanmean().item(),
            }
        if self.is_fluent is not None:
            whole = [self.is_fluent(text) for texts in self.texts for text in texts]
            figures["fluent"] = sum(whole) / len(whole)
            figures["fluent_backbone"] = sum(map(self.is_fluent, self.own)) / len(self.own)
        return figures

    def summary(self, chosen: list[int] | None = None, per_plan: int = 5) -> PlansReport:
        """What a checkpoint keeps; `chosen` is the plan of each prompt, where there is a choice."""
        plans = []
        for plan in range(len(self.texts[0])):
            reward = None if self.rewards is None else self.rewards[:, plan].nanmean().item()
            counted = Counter(texts[plan] for texts in self.texts).most_common(per_plan)
            plans.append(
                {
                    "plan": plan,
                    "reward": None if reward is None or math.isnan(reward) else reward,
                    "chosen": None if chosen is None else chosen.count(plan) / len(chosen),
                    "answers": [[text[:LONGEST_ANSWER], count] for text, count in counted],
                }
            )
        return PlansReport(over=f"{len(self.prompts)} held-out prompts", plans=plans)

    def table(self, prompts: int = 4) -> str:
        """Markdown: a row a plan, what it says most often, its mean reward, and its answers to the first prompts."""
        asked = [_cell(prompt) for prompt in self.prompts[:prompts]]
        lines = [f"| plan | reward | most often | {' | '.join(asked)} |", "|---" * (3 + len(asked)) + "|"]
        own = "-" if self.own_rewards is None else f"{self.own_rewards.nanmean():.3f}"
        rows = [("backbone", own, self.own)]
        for plan in range(len(self.texts[0])):
            reward = "-" if self.rewards is None else f"{self.rewards[:, plan].nanmean():.3f}"
            rows.append((str(plan), reward, [texts[plan] for texts in self.texts]))
        for name, reward, texts in rows:
            (often, count), *_ = Counter(texts).most_common(1)
            said = " | ".join(_cell(text) for text in texts[:prompts])
            lines.append(f"| {name} | {reward} | {_cell(often)} ({count}) | {said} |")
        return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 3] + "..."


def report_plans(
    model: PlanModel,
    encoder: PromptEncoder,
    rows: list[dict[str, Any]],
    max_new_tokens: int,
    ends: list[int],
    reward: RewardCaller | None = None,
    alternatives: list[list[str]] | None = None,
    is_fluent: Callable[[str], bool] | None = None,
    batch_size: int = 512,
    engine: SegmentEngine | None = None,
) -> PlanReport:
    """
    Lets every plan answer every prompt greedily, and the backbone without one. Processes share the prompts.

    Args:
        model (`PlanModel`), encoder (`PromptEncoder`): The model, and what encodes its prompts.
        rows (`list[dict]`): With `prompt`, `images` and the columns that the reward reads.
        max_new_tokens (`int`), ends (`list[int]`), batch_size (`int`), engine (`Callable`, *optional*): Of decoding, as
            in [`~PlanModel.answers`].
        reward (`RewardCaller`, *optional*): Rewards are the sum of its functions.
        alternatives (`list[list[str]]`, *optional*), is_fluent (`Callable`, *optional*): As [`PlanReport`] has them.
    """
    tokenizer, plans = encoder.encoder.tokenizer, model.plan_config.num_plans

    def answers(of: list[EncodedPrompt], plan_ids: list[int] | None) -> tuple[list[list[int]], list[str]]:
        ids = model.answers(encoder, of, plan_ids, max_new_tokens, ends, batch_size, engine).token_ids
        return ids, [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]

    def told(places: range) -> list[dict[str, Any]]:
        some = [rows[place] for place in places]
        prompts = [encoder(row) for row in some]
        ids, texts = answers([p for p in prompts for _ in range(plans)], list(range(plans)) * len(prompts))
        own_ids, own = answers(prompts, None)
        first = [tokenizer.decode(model.first_segment(one), skip_special_tokens=True).strip() for one in ids]
        rewards = own_rewards = torch.full((0,), torch.nan)
        if reward is not None:
            rewards = summed_rewards(reward, [row for row in some for _ in range(plans)], texts, ids)
            own_rewards = summed_rewards(reward, some, own, own_ids)
        found = []
        for i, prompt in enumerate(prompts):
            under = slice(i * plans, (i + 1) * plans)
            said = {"texts": texts[under], "first": first[under], "own": own[i], "prompt": prompt.rendering.text}
            found.append({**said, "rewards": rewards[under], "own_reward": own_rewards[i : i + 1]})
        return found

    every = shared(len(rows), told)
    return PlanReport(
        prompts=[one["prompt"] for one in every],
        texts=[one["texts"] for one in every],
        own=[one["own"] for one in every],
        rewards=None if reward is None else torch.stack([one["rewards"] for one in every]),
        own_rewards=None if reward is None else torch.cat([one["own_reward"] for one in every]),
        alternatives=alternatives,
        is_fluent=is_fluent,
        beginnings=None if model.plan_config.segment == "answer" else [one["first"] for one in every],
    )


def summed_rewards(
    caller: RewardCaller, rows: list[dict[str, Any]], texts: list[str], ids: list[list[int]], **context: Any
) -> torch.Tensor:
    """The sum `[N]` of the reward functions for an answer to each row; NaN where none of them could say."""
    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    rewards = torch.tensor(
        [
            [torch.nan if one is None else one for one in own]
            for own in caller.score(rows, prompts, completions, ids, **context)
        ]
    ).T
    return rewards.nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)
