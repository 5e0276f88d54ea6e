"""Answers in broken language are told by the frozen backbone, and are worth the least of their batch."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...data.prompts import PromptEncoder
from ...models.latent_action_model import LatentActionModel
from ...models.spoken import excess_surprise
from ..run.engines import shards_layers
from .rollout import Rollout, Sample
from .scoring import backbone_pass

# Answers before RL that the fence is set by.
CALIBRATION = 64
# Interquartile ranges between the upper quartile and the fence: Tukey's outer fence.
RANGES = 3.0
# Nats of which the fence is at least above the quartile: one token of probability e^-2 where the backbone is sure.
LEAST_DISTANCE = 2.0


def largest_surprise(excess: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The most by which an answer has come to surprise `[B]`: the largest sum over its first tokens.

    Args:
        excess (`torch.Tensor`): `[B, C]` of its tokens, as [`excess_surprise`] gives them.
        mask (`torch.Tensor`): `[B, C]`, 1 for tokens of the answer, which come first.
    """
    return torch.where(mask.bool(), excess, 0.0).cumsum(dim=1).max(dim=1).values


def least_where(rewards: torch.Tensor, broken: torch.Tensor) -> torch.Tensor:
    """`rewards` `[N]`, NaN where there is none, with the least of them where `broken` `[N]`."""
    if rewards.isnan().all():
        return rewards
    least = rewards[~rewards.isnan()].min()
    return torch.where(broken & ~rewards.isnan(), least, rewards)


@dataclass
class SurprisePass:
    """
    An objective of [`LatentActionModel`]'s forward: [`largest_surprise`] `[B]` of a rollout's answers.

    Args:
        encoder (`PromptEncoder`): Makes the visual inputs where the backbone is run again.
        encode (`bool`, defaults to `False`): Run the backbone again for every rollout, not only where the rollout's
            states are not the backbone's own. Processes that share its layers must run it as often as each other.
    """

    encoder: PromptEncoder
    encode: bool = False

    def __call__(self, model: LatentActionModel, rollout: Rollout) -> torch.Tensor:
        length, device = rollout.completion_ids.shape[1], rollout.completion_ids.device
        mask = rollout.completion_mask.bool()
        # The context state is the backbone's own but where a projector stands in for a picture.
        own = not model.config.use_projector or bool(model.has_image(rollout.prompt_ids)[:, -1].all())
        if rollout.context_states is not None and own and not self.encode:
            states = rollout.context_states.to(device)
        else:
            whole = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[:, :-1]
            states = backbone_pass(model, rollout, whole, self.encoder).states
        excess = torch.zeros(mask.shape, device=device)
        excess[mask] = excess_surprise(model, states[:, -length:][mask], rollout.completion_ids[mask])
        return largest_surprise(excess, mask)


class LanguageGuard:
    r"""
    Tells answers in broken language.

    Under the backbone's own law \\( p \\) the sum of \\( -\log p(x_t) - H_t \\), with its entropy \\( H_t \\), is 0 on
    average after any number of tokens, and small talk that is easy to foresee does not bring it down. An answer is
    broken where the largest of these sums lies beyond the outer fence of the first 64 answers of the run: their upper
    quartile and 3 interquartile ranges, as Tukey draws it, or 2 nats where that is more.

    Args:
        encoder (`PromptEncoder`): Of the trainer.
        rows (`int`): Answers in one pass.
        encode (`bool`, defaults to `False`): As [`SurprisePass`] takes it.
    """

    def __init__(self, encoder: PromptEncoder, rows: int, encode: bool = False):
        self.objective = SurprisePass(encoder, encode)
        self.rows = rows
        self.seen: list[float] = []

    @classmethod
    def of(cls, trainer: Any) -> "LanguageGuard":
        """That of a `GRPOTrainer`."""
        return cls(trainer.encoder, trainer.args.per_device_train_batch_size, encode=shards_layers(trainer))

    @torch.no_grad()
    def surprises(self, model: Any, rollout: Rollout, samples: list[Sample]) -> torch.Tensor:
        """
        `[B]`, by how much each answer surprises the backbone.

        Args:
            model (`LatentActionModel`): Or a wrapper of one.
            rollout (`Rollout`): Of this process.
            samples (`list[Sample]`): That it was made of.
        """
        # Of truncated answers too, which `mask_truncated_completions` leaves out of the rollout's mask.
        lengths = torch.tensor([len(sample.completion_ids) for sample in samples], device=rollout.completion_ids.device)
        places = torch.arange(rollout.completion_ids.shape[1], device=lengths.device)
        mask = (places < lengths[:, None]).to(rollout.completion_mask.dtype)
        rollout = replace(rollout, prompts=[sample.prompt for sample in samples], completion_mask=mask)
        starts = range(0, len(samples), self.rows)
        return torch.cat([model(objective=self.objective, batch=rollout.rows(i, i + self.rows)).loss for i in starts])

    @property
    def fence(self) -> float | None:
        """Beyond it an answer is broken; `None` as long as too few answers have been seen."""
        if len(self.seen) < CALIBRATION:
            return None
        low, high = torch.tensor(self.seen).quantile(torch.tensor([0.25, 0.75])).tolist()
        return high + max(RANGES * (high - low), LEAST_DISTANCE)

    def broken(self, surprises: torch.Tensor) -> torch.Tensor:
        """Boolean `[N]`, of the `surprises` `[N]` of all processes. The first answers of a run are never broken."""
        if self.fence is None:
            self.seen += surprises[surprises.isfinite()].tolist()
            return torch.zeros_like(surprises, dtype=torch.bool)
        # What is not finite is broken too.
        return ~(surprises <= self.fence)
