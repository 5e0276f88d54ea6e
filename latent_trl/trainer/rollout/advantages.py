"""Advantages, returns and value losses over codes: pure functions of `[B, C]` tensors in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def _here(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def masked_mean(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _here) -> torch.Tensor:
    """
    Mean of `x` where `mask` is 1; 0 where it is nowhere.

    Args:
        x (`torch.Tensor`): `[B, C]`.
        mask (`torch.Tensor`): `[B, C]` of 0 and 1.
        reduce (`Callable`, *optional*): Sums a tensor over processes.
    """
    x = torch.where(mask.bool(), x.float(), 0.0)
    total, count = reduce(torch.stack([x.sum(), mask.float().sum()]))
    return total / count.clamp(min=1.0)


def masked_variance(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _here) -> torch.Tensor:
    """Population variance of `x` `[B, C]` where `mask` is 1, over all processes."""
    return masked_mean((x.float() - masked_mean(x, mask, reduce)) ** 2, mask, reduce)


def whiten(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _here, eps: float = 1e-8) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) where `mask` is 1, and 0 elsewhere; moments over all processes."""
    mean, variance = masked_mean(x, mask, reduce), masked_variance(x, mask, reduce)
    return torch.where(mask.bool(), (x.float() - mean) * torch.rsqrt(variance + eps), 0.0)


def rewards_of_codes(
    rewards: torch.Tensor, mask: torch.Tensor, log_ratio: torch.Tensor | None = None, kl_coef: float = 0.0
) -> torch.Tensor:
    """
    Reward of each code: the completion's reward at its last code, less the KL estimate of every code.

    Args:
        rewards (`torch.Tensor`): `[B]`.
        mask (`torch.Tensor`): `[B, C]`, 1 for the codes of a completion, which come first.
        log_ratio (`torch.Tensor`, *optional*): `[B, C]`, log π(a|s) - log π_ref(a|s).
        kl_coef (`float`, defaults to `0.0`): β, the weight of `log_ratio`.

    Returns:
        `[B, C]`.
    """
    mask = mask.float()
    last = (mask.sum(dim=1, keepdim=True) - 1).long()
    at_end = (torch.arange(mask.shape[1], device=mask.device) == last).float()
    per_code = rewards.float().unsqueeze(1) * at_end
    if log_ratio is not None and kl_coef != 0.0:
        per_code = per_code - kl_coef * torch.where(mask.bool(), log_ratio.float(), 0.0)
    return per_code


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    GAE(λ) ([Schulman et al.](https://huggingface.co/papers/1506.02438)) over codes:
    \\( A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l} \\) with
    \\( \delta_t = r_t + \gamma V_{t+1} - V_t \\). The value after a completion's last code is 0, also where the
    completion was cut at its maximum length.

    Args:
        rewards (`torch.Tensor`), values (`torch.Tensor`), mask (`torch.Tensor`): `[B, C]`; a completion's codes come
            first in its row.
        gamma (`float`, defaults to `1.0`), gae_lambda (`float`, defaults to `0.95`): γ and λ.

    Returns:
        Advantages and returns (advantage + value), `[B, C]`, 0 outside `mask`.
    """
    keep = mask.bool()
    rewards = torch.where(keep, rewards.float(), 0.0)
    values = torch.where(keep, values.float(), 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    later = torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        later = deltas[:, t] + gamma * gae_lambda * later
        advantages[:, t] = later
    return advantages, advantages + values


def clipped_value_errors(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Squared errors of the value, the larger of the plain one and of the one whose value stays within `clip_range` of
    the old value.

    Args:
        values, old_values, returns (`torch.Tensor`): `[B, C]`.
        clip_range (`float`, *optional*): How far the value may move in one rollout; `None` does not clip.

    Returns:
        Errors `[B, C]`, and where the clipped one was the larger, boolean `[B, C]`.
    """
    values, old_values, returns = values.float(), old_values.float(), returns.float()
    errors = (values - returns) ** 2
    if clip_range is None:
        return errors, torch.zeros_like(errors, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped = (near - returns) ** 2
    return torch.maximum(errors, clipped), clipped > errors


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _here
) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value, 0 a constant one; NaN where returns are equal."""
    variance = masked_variance(returns, mask, reduce)
    unexplained = masked_variance(returns.float() - values.float(), mask, reduce)
    return torch.where(variance > 0, 1 - unexplained / variance.clamp(min=1e-30), torch.nan)


def k3_divergence(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """Schulman's estimate of KL(π ‖ other), `[B, C]`, from codes drawn from π; never negative."""
    log_ratio = other_log_probs.float() - log_probs.float()
    return torch.exp(log_ratio) - log_ratio - 1


@dataclass
class AdaptiveKLController:
    r"""
    Moves the KL coefficient towards a target ([Ziegler et al.](https://huggingface.co/papers/1909.08593), section
    2.2): \\( \beta \leftarrow \beta (1 + n\,\mathrm{clip}(\mathrm{KL}/\mathrm{target} - 1, \pm 0.2) / horizon) \\).

    Args:
        target (`float`): KL of a completion, summed over its codes, in nats.
        horizon (`int`): Completions over which the coefficient may move by a fifth.
    """

    target: float
    horizon: int

    def next(self, coefficient: float, kl: float, completions: int) -> float:
        """The coefficient after `completions` completions of mean divergence `kl`."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * (1 + error * completions / self.horizon)
