"""PPO over latent actions: the GRPO trainer with a value head and advantages by GAE."""

from typing import Any

import torch
from accelerate.utils import gather
from torch import nn

from ...models.latent_action_model import LatentActionModel
from ..grpo.trainer import LatentActionGRPOTrainer
from ..rollout.advantages import (
    AdaptiveKLController,
    clipped_value_errors,
    explained_variance,
    generalized_advantages,
    k3_divergence,
    masked_mean,
    masked_variance,
    rewards_of_codes,
    whiten,
)
from ..rollout.dynamic_sampling import equal_groups
from ..rollout.rollout import Rollout
from ..rollout.scoring import CodeScores, score
from .config import LatentActionPPOConfig

# The value head's rate beside the policy's: CoLA's ratio.
VALUE_RATE = 1.8


class LatentActionPPOTrainer(LatentActionGRPOTrainer):
    """
    Proximal policy optimisation over codes, with the data sets, reward functions, logging and checkpoints of
    [`LatentActionGRPOTrainer`]. A value head on the policy's trunk takes the place of the group's mean reward, so one
    sample per prompt is enough.

    Args:
        model (`LatentActionModel` or `str`): As in [`LatentActionGRPOTrainer`]; a value head is added when absent.
        reward_funcs: As in `GRPOTrainer`.
        args (`LatentActionPPOConfig`, *optional*): The configuration.
        positional, named: Further arguments of [`LatentActionGRPOTrainer`], in its order.
    """

    _tag_names = ["trl", "latent-trl", "ppo"]
    _name = "Latent-action PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": "@article{schulman2017proximal,\n"
        "    title  = {{Proximal Policy Optimization Algorithms}},\n"
        "    author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},\n"
        "    year   = 2017,\n"
        "    eprint = {arXiv:1707.06347},\n"
        "}",
    }
    trained_components = ("policy", "value_head")
    config_class = LatentActionPPOConfig
    large_rate = 5e-6

    def __init__(self, model: LatentActionModel | str, *positional: Any, **named: Any):
        super().__init__(model, *positional, **named)
        self.kl_controller = None
        if self.args.kl_target is not None:
            self.kl_controller = AdaptiveKLController(self.args.kl_target, self.args.kl_horizon)
        if self.is_deepspeed_enabled and (self.args.value_warmup_steps or self.args.target_kl is not None):
            raise ValueError(
                "`value_warmup_steps` and `target_kl` leave parameters out of an update, and DeepSpeed makes it before "
                "that can be done. Leave them out."
            )
        # Whether the policy's divergence from the one that made the rollout has passed `target_kl`.
        self.rollout_is_done = False
        self._divergences: list[float] = []

    @property
    def policy_waits(self) -> bool:
        """Whether only the value head is trained in this update."""
        return self.state.global_step < self.args.value_warmup_steps

    def create_optimizer(self, *args: Any, **kwargs: Any):
        """The optimizer of Trainer, with the value head's tensors in groups of their own."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if given:
            return optimizer
        rate = self.args.value_learning_rate
        rate = VALUE_RATE * self.args.learning_rate if rate is None else rate
        own = {id(p) for p in self._latent_model().value_head.parameters()}
        for group in list(optimizer.param_groups):
            value_head = [p for p in group["params"] if id(p) in own]
            if value_head:
                group["params"] = [p for p in group["params"] if id(p) not in own]
                optimizer.add_param_group({**group, "params": value_head, "lr": rate})
        return optimizer

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "sum")

    # Every rollout is scored: its values and returns are needed.
    needs_old_scores = True

    def set_advantages(self, rollout: Rollout, rewards: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        own = self.local(total, len(rollout.action_ids))
        # A completion that no reward function could score teaches nothing.
        mask = rollout.completion_mask.float() * (~own.isnan()).float().unsqueeze(1)
        kl = rollout.old_per_token_logps - rollout.ref_per_token_logps if self.beta != 0.0 else None
        in_reward = kl if self.args.kl_in == "reward" else None
        per_code = rewards_of_codes(own.nan_to_num(0.0), mask, in_reward, self.beta)
        gamma, gae_lambda = self.args.gamma, self.args.gae_lambda
        advantages, returns = generalized_advantages(per_code, rollout.old_values, mask, gamma, gae_lambda)
        self._log_values(rollout, advantages, returns, mask, kl)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, self._sum)
        rollout.advantages, rollout.returns, rollout.value_mask = advantages, returns, mask
        # In the table of completions: the mean advantage of a completion's codes.
        return gather((advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0))

    def _log_values(self, rollout: Rollout, advantages, returns, mask, kl) -> None:
        training, values = self.model.training, rollout.old_values
        codes = self._sum(mask.sum()).item()
        figures = {
            "value_mean": masked_mean(values, mask, self._sum),
            "return_mean": masked_mean(returns, mask, self._sum),
            "advantage_std": masked_variance(advantages, mask, self._sum).sqrt(),
            "explained_variance": explained_variance(values, returns, mask, self._sum),
        }
        self.rollout_log.figures(training, {f"ppo/{name}": (x.item(), codes) for name, x in figures.items()})
        if kl is None:
            return
        counted = mask.any(dim=1).float()
        total, rows = self._sum(torch.stack([torch.where(mask.bool(), kl, 0.0).sum(), counted.sum()])).tolist()
        per_completion = total / max(rows, 1.0)
        self.rollout_log.figures(
            training, {"ppo/kl_coef": (self.beta, 1.0), "ppo/kl_per_completion": (per_completion, rows)}
        )
        if self.args.kl_in == "reward":
            k3 = k3_divergence(rollout.old_per_token_logps, rollout.ref_per_token_logps)
            self.rollout_log.figures(training, {"kl": (masked_mean(k3, mask, self._sum).item(), codes)})
        if self.kl_controller is not None and training and rows:
            # For the rollout after this one: this one's rewards have the divergence in them at the old weight.
            self.next_beta = self.kl_controller.next(self.beta, per_completion, int(rows))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.next_beta = self.beta
        batch = super()._generate_and_score_completions(inputs)
        self.beta = self.next_beta
        return batch

    def watch_rewards(self, total: torch.Tensor) -> None:
        # Here every completion is compared with every other, through the value.
        equal = bool(equal_groups(total, len(total)).all())
        self.health.count_rewards(total, equal, "the batch", self.state.global_step)

    def run_state(self) -> dict[str, Any]:
        return {**super().run_state(), "kl_coef": self.beta, "rollout_is_done": self.rollout_is_done}

    def load_run_state(self, state: dict[str, Any]) -> None:
        super().load_run_state(state)
        self.beta, self.rollout_is_done = state["kl_coef"], state["rollout_is_done"]

    def score(self, model: nn.Module, rollout: Rollout) -> CodeScores:
        detached = self.policy_waits or not self.args.value_trains_policy_trunk
        aux_loss = self.aux_loss_enabled
        return score(model, rollout, self.law, self.encoder, detach_values=detached, aux_loss=aux_loss)

    def rollout_loss(self, scores: CodeScores, rollout: Rollout, inputs: dict[str, Any]) -> torch.Tensor:
        beta = self.beta
        if self.args.kl_in == "reward":
            self.beta = 0.0
        try:
            policy_loss = super().rollout_loss(scores, rollout, inputs)
        finally:
            self.beta = beta
        value_loss = self._value_loss(scores, rollout)
        if self.policy_waits and self.model.training:
            policy_loss = policy_loss * 0.0
        return policy_loss + self.args.value_coef * value_loss

    def _value_loss(self, scores: CodeScores, rollout: Rollout) -> torch.Tensor:
        """The mean over all codes of an update, in this micro-batch's part; logs what the update did."""
        training, mask, old = self.model.training, rollout.value_mask, rollout.old_per_token_logps
        log_probs = scores.log_probs.detach()
        errors, clipped = clipped_value_errors(
            scores.values, rollout.old_values, rollout.returns, self.args.value_clip_range
        )
        items = rollout.num_items_in_batch.clamp(min=1.0) / self.accelerator.num_processes
        if training:
            items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        ratio = torch.exp(log_probs - old)
        moved = (ratio < 1 - self.epsilon_low) | (ratio > 1 + self.epsilon_high)
        divergence = masked_mean(k3_divergence(old, log_probs), mask, self._sum).item()
        figures = {
            "value_loss": masked_mean(errors.detach(), mask, self._sum).item(),
            "value_clip_fraction": masked_mean(clipped, mask, self._sum).item(),
            "approx_kl": divergence,
            "clip_fraction": masked_mean(moved, mask, self._sum).item(),
        }
        codes = self._sum(mask.sum()).item()
        self.rollout_log.figures(training, {f"ppo/{name}": (value, codes) for name, value in figures.items()})
        if training:
            self._divergences.append(divergence)
        return (errors * mask).sum() / items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._skips_step():
            # As Trainer's step does; TRL logs by it.
            model.train()
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            divergences, self._divergences = self._divergences, []
            target = self.args.target_kl
            self.rollout_is_done = target is not None and sum(divergences) / len(divergences) > target
        if self.policy_waits:
            # Without a gradient the optimizer skips a tensor and keeps no moments of it.
            own = {id(p) for p in self._latent_model().value_head.parameters()}
            for parameter in self._latent_model().parameters():
                if id(parameter) not in own:
                    parameter.grad = None
        return loss

    def _skips_step(self) -> bool:
        """Whether the rollout in use has passed `target_kl`: then its other micro-batches are left out, and counted."""
        if self.args.target_kl is None:
            return False
        begins = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        skips = self.rollout_is_done and not begins
        self._metrics["train"]["ppo/skipped"].append(float(skips))
        if skips:
            self._step += 1
        return skips
