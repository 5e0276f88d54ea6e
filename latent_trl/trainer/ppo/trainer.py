"""PPO over latent actions: the GRPO trainer with a value head and advantages by GAE."""

from typing import Any

import torch

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
from ..run.loading import load_model
from .config import LatentActionPPOConfig


class LatentActionPPOTrainer(LatentActionGRPOTrainer):
    """
    Proximal policy optimisation over codes, with the data sets, reward functions, logging and checkpoints of
    [`LatentActionGRPOTrainer`]. A value head on the policy's trunk takes the place of the group's mean reward, so one
    sample per prompt is enough.

    Args:
        model (`LatentActionModel` or `str`): As in [`LatentActionGRPOTrainer`]; a value head is added when absent.
        reward_funcs: As in `GRPOTrainer`.
        args (`LatentActionPPOConfig`, *optional*): The configuration.
        kwargs: As in [`LatentActionGRPOTrainer`].
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

    def __init__(
        self,
        model: LatentActionModel | str,
        reward_funcs: Any = None,
        args: LatentActionPPOConfig | None = None,
        **kwargs,
    ):
        args = args or LatentActionPPOConfig("latent-action-ppo")
        model = load_model(model)
        if model.value_head is None:
            model.require("policy")
            model.new_component("value_head")
        super().__init__(model, reward_funcs, args, **kwargs)
        self.kl_controller = None
        if args.kl_target is not None:
            self.kl_controller = AdaptiveKLController(args.kl_target, args.kl_horizon)
        model.value_head.register_forward_pre_hook(self._stop_at_trunk)

    @property
    def _policy_waits(self) -> bool:
        """Whether only the value head is trained in this update."""
        return self.state.global_step < self.args.value_warmup_steps

    def _stop_at_trunk(self, value_head, features):
        if self._policy_waits or not self.args.value_trains_policy_trunk:
            return (features[0].detach(),)
        return features

    def create_optimizer(self, *args, **kwargs):
        """The optimizer of Trainer, with the value head's tensors in groups of their own."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.value_learning_rate
        if given or rate is None:
            return optimizer
        own = {id(p) for p in self._latent_model().value_head.parameters()}
        for group in list(optimizer.param_groups):
            value_head = [p for p in group["params"] if id(p) in own]
            if value_head:
                group["params"] = [p for p in group["params"] if id(p) not in own]
                optimizer.add_param_group({**group, "params": value_head, "lr": rate})
        return optimizer

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _finish_rollout(self, output: dict[str, Any]) -> None:
        super()._finish_rollout(output)
        rewards = self._local_rewards(len(output["completion_ids"]))
        # A completion that no reward function could score teaches nothing.
        mask = output["completion_mask"].float() * (~rewards.isnan()).float().unsqueeze(1)
        log_probs, values = self._score_rollout(output)
        if values is None:
            raise RuntimeError("The model gave no values; the trainer needs its `value_head`.")
        kl = log_probs - output["ref_per_token_logps"] if self.beta != 0.0 else None
        in_reward = kl if self.args.kl_in == "reward" else None
        per_code = rewards_of_codes(rewards.nan_to_num(0.0), mask, in_reward, self.beta)
        advantages, returns = generalized_advantages(per_code, values, mask, self.args.gamma, self.args.gae_lambda)
        self._log_rollout(output, advantages, returns, values, mask, kl)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, self._sum)
        self._log_advantages(advantages, mask)
        output.update(
            old_per_token_logps=log_probs, old_values=values, returns=returns, value_mask=mask, advantages=advantages
        )

    def _watch_rewards(self) -> None:
        # Here every completion is compared with every other, through the value.
        equal = bool(equal_groups(self._rewards, len(self._rewards)).all())
        self.health.count_rewards(self._rewards, equal, "the batch", self.state.global_step)

    def _run_state(self) -> dict[str, Any]:
        return {**super()._run_state(), "kl_coef": self.beta}

    def _restore_run_state(self, state: dict[str, Any]) -> None:
        super()._restore_run_state(state)
        self.beta = state["kl_coef"]

    def _score_rollout(self, output: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and values of the rollout under the policy that made it, `[B, C]`."""
        if self._scored is None:
            train = self.model.training
            rows = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
            with torch.no_grad():
                self._score_rows(self.model, output, batch_size=rows)
        return self._scored.log_probs, self._scored.state_values

    def _log_rollout(self, output, advantages, returns, values, mask, kl) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        metrics["ppo/value_mean"].append(masked_mean(values, mask, self._sum).item())
        metrics["ppo/return_mean"].append(masked_mean(returns, mask, self._sum).item())
        metrics["ppo/advantage_std"].append(masked_variance(advantages, mask, self._sum).sqrt().item())
        metrics["ppo/explained_variance"].append(explained_variance(values, returns, mask, self._sum).item())
        if self.args.num_generations == 1:
            # Of groups of one.
            metrics.pop("frac_reward_zero_std", None)
        if kl is None:
            return
        counted = mask.any(dim=1).float()
        total, rows = self._sum(torch.stack([torch.where(mask.bool(), kl, 0.0).sum(), counted.sum()])).tolist()
        per_completion = total / max(rows, 1.0)
        metrics["ppo/kl_coef"].append(self.beta)
        metrics["ppo/kl_per_completion"].append(per_completion)
        if self.args.kl_in == "reward":
            k3 = k3_divergence(output["ref_per_token_logps"] + kl, output["ref_per_token_logps"])
            metrics["kl"].append(masked_mean(k3, mask, self._sum).item())
        if self.kl_controller is not None and mode == "train" and rows:
            self._next_beta = self.kl_controller.next(self.beta, per_completion, int(rows))

    def _log_advantages(self, advantages: torch.Tensor, mask: torch.Tensor) -> None:
        """In the table of completions: the mean advantage of a completion's codes, in place of the group's."""
        means = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        means = self.accelerator.gather(means).tolist()
        logged = list(self._logs["advantages"])
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(logged[: len(logged) - len(means)] + means)

    def _generate_and_score_completions(self, inputs):
        self._next_beta = self.beta
        output = super()._generate_and_score_completions(inputs)
        self.beta = self._next_beta
        return output

    def _compute_loss(self, model, inputs):
        beta = self.beta
        if self.args.kl_in == "reward":
            self.beta = 0.0
        try:
            policy_loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        value_loss = self._value_loss(inputs)
        if self._policy_waits and self.model.training:
            policy_loss = policy_loss * 0.0
        loss = policy_loss + self.args.value_coef * value_loss
        self._check_loss(loss, inputs)
        return loss

    def _value_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The mean over all codes of an update, in this micro-batch's part; logs what the update did."""
        mode = "train" if self.model.training else "eval"
        metrics, mask = self._metrics[mode], inputs["value_mask"]
        log_probs, values = self._scored.log_probs.detach(), self._scored.state_values
        errors, clipped = clipped_value_errors(
            values, inputs["old_values"], inputs["returns"], self.args.value_clip_range
        )
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            items = items * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        old = inputs["old_per_token_logps"]
        ratio = torch.exp(log_probs - old)
        moved = (ratio < 1 - self.epsilon_low) | (ratio > 1 + self.epsilon_high)
        for name, x in (
            ("value_loss", errors.detach()),
            ("value_clip_fraction", clipped),
            ("approx_kl", k3_divergence(old, log_probs)),
            ("clip_fraction", moved),
        ):
            metrics[f"ppo/{name}"].append(masked_mean(x, mask, self._sum).item())
        return (errors * mask).sum() / items

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self._policy_waits:
            # Without a gradient the optimizer skips a tensor and keeps no moments of it.
            own = {id(p) for p in self._latent_model().value_head.parameters()}
            for parameter in self._latent_model().parameters():
                if id(parameter) not in own:
                    parameter.grad = None
        return loss
