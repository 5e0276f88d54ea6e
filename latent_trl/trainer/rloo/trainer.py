"""RLOO over latent actions: a completion is one action, and the others of its group are its baseline."""

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather

from ..grpo.trainer import LatentActionGRPOTrainer
from ..rollout.rollout import Rollout
from ..rollout.scoring import CodeScores
from .config import LatentActionRLOOConfig


class LatentActionRLOOTrainer(LatentActionGRPOTrainer):
    """
    REINFORCE leave-one-out ([Ahmadian et al.](https://huggingface.co/papers/2402.14740)) over codes, as TRL's
    `RLOOTrainer`: the clipped ratio is that of whole completions, and the divergence from the policy before RL is taken
    off the reward. Arguments are those of [`LatentActionGRPOTrainer`], with a [`LatentActionRLOOConfig`].
    """

    _tag_names = ["trl", "latent-trl", "rloo"]
    _name = "Latent-action RLOO"
    _paper = {
        "title": "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
        "id": "2402.14740",
        "citation": "@inproceedings{ahmadian2024back,\n"
        "    title     = {{Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in "
        "LLMs}},\n"
        "    author    = {Arash Ahmadian and others},\n"
        "    year      = 2024,\n"
        "    booktitle = {ACL},\n"
        "}",
    }
    config_class = LatentActionRLOOConfig

    @property
    def needs_old_scores(self) -> bool:
        return self.beta != 0.0 or super().needs_old_scores

    def set_advantages(self, rollout: Rollout, rewards: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        if self.args.reward_clip_range is not None:
            total = total.clamp(*self.args.reward_clip_range)
        if self.beta != 0.0:
            mask = rollout.completion_mask
            kl = (rollout.old_per_token_logps - rollout.ref_per_token_logps) * mask
            total = total - self.beta * gather(kl.sum(dim=1))
            codes = self.accelerator.reduce(torch.stack([kl.sum(), mask.sum().float()]), "sum")
            self.rollout_log.figures(self.model.training, {"kl": ((codes[0] / codes[1]).item(), codes[1].item())})
        return super().set_advantages(rollout, rewards, total)

    def rollout_loss(self, scores: CodeScores, rollout: Rollout, inputs: dict[str, Any]) -> torch.Tensor:
        mask = rollout.completion_mask

        def summed(values: torch.Tensor | None) -> torch.Tensor | None:
            """One value a completion, `[B, 1]`, of one a code."""
            return None if values is None else (values * mask).sum(dim=1, keepdim=True)

        whole = replace(
            scores,
            log_probs=summed(scores.log_probs),
            entropies=summed(scores.entropies) / mask.sum(dim=1, keepdim=True).clamp(min=1),
        )
        inputs = {
            **inputs,
            "completion_ids": inputs["completion_ids"][:, :1],
            "completion_mask": mask.any(dim=1, keepdim=True),
            "old_per_token_logps": summed(rollout.old_per_token_logps),
        }
        # The divergence is in the reward already.
        beta, self.beta = self.beta, 0.0
        try:
            return super().rollout_loss(whole, rollout, inputs)
        finally:
            self.beta = beta
