"""Advantages and returns: pure functions of rewards and groups, and of values over codes, in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]

# Added to a standard deviation that is divided by, as in TRL.
STD_EPS = 1e-4


def weighted_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    One reward a completion `[N]`: the weighted sum of those that are numbers; NaN where none is.

    Args:
        rewards (`torch.Tensor`): `[N, F]`, NaN where a function could not score.
        weights (`torch.Tensor`): `[F]`.
    """
    total = (rewards * weights.to(rewards)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def nan_std(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Sample standard deviation of what is a number; 0 for a single number, NaN where there is none."""
    counted = ~x.isnan()
    mean = x.nanmean(dim=dim, keepdim=True) if dim is not None else x.nanmean()
    squares = torch.where(counted, (x - mean) ** 2, 0.0)
    total, count = (t.sum(dim=dim, keepdim=keepdim) if dim is not None else t.sum() for t in (squares, counted))
    return (total / (count - 1).clamp(min=1)).sqrt().masked_fill(count == 0, torch.nan)


def grpo_advantages(rewards: torch.Tensor, group_size: int, scale: str = "group") -> torch.Tensor:
    """
    GRPO ([Shao et al.](https://huggingface.co/papers/2402.03300), section 4.1): the reward less its group's mean, over
    the standard deviation.

    Args:
        rewards (`torch.Tensor`): `[N]` over all processes, groups one after another; NaN is left out of its group.
        group_size (`int`): G.
        scale (`str`, defaults to `"group"`): What it is divided by: the standard deviation of the `"group"`, of the
            `"batch"`, or `"none"` ([Dr. GRPO](https://huggingface.co/papers/2503.20783)).
    """
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (nan_std(groups, dim=1, keepdim=True) + STD_EPS)
    elif scale == "batch":
        advantages = advantages / (nan_std(rewards) + STD_EPS)
    return advantages.flatten()


def rloo_advantages(rewards: torch.Tensor, group_size: int, scale: str = "none") -> torch.Tensor:
    """
    RLOO ([Ahmadian et al.](https://huggingface.co/papers/2402.14740), equation 8): the reward less the mean of the
    others of its group; NaN where there are none. Arguments as of [`grpo_advantages`]; `scale="batch"` whitens over the
    batch.
    """
    groups = rewards.view(-1, group_size)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    # A completion without siblings has nothing to be compared with: 0 / 0.
    advantages = (groups - (groups.nansum(dim=1, keepdim=True) - groups) / others).flatten()
    if scale == "batch":
        advantages = (advantages - advantages.nanmean()) / (nan_std(advantages) + STD_EPS)
    return advantages


def reinforce_advantages(rewards: torch.Tensor, group_size: int, scale: str = "batch") -> torch.Tensor:
    """
    REINFORCE++ ([Hu et al.](https://huggingface.co/papers/2501.03262)): the reward less the batch's mean, over the
    batch's standard deviation unless `scale` is `"none"`. Groups play no part, so a single sample a prompt will do.
    """
    advantages = rewards - rewards.nanmean()
    return advantages if scale == "none" else advantages / (nan_std(rewards) + STD_EPS)


GROUP_ADVANTAGES: dict[str, Callable[..., torch.Tensor]] = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce++": reinforce_advantages,
}


def normalize_then_sum(rewards: torch.Tensor, weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    GDPO ([Liu et al.](https://huggingface.co/papers/2601.05242)): each reward's group advantages, summed by weight and
    whitened over the batch.

    Args:
        rewards (`torch.Tensor`): `[N, F]`.
        weights (`torch.Tensor`): `[F]`.
        group_size (`int`): G.
    """
    each = torch.stack([grpo_advantages(column, group_size) for column in rewards.unbind(dim=1)], dim=1)
    total = weighted_rewards(each, weights)
    return (total - total.nanmean()) / (nan_std(total) + STD_EPS)


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
        """
        The coefficient after `completions` completions of mean divergence `kl`. One rollout changes it by a factor of
        2 at most, so that it stays positive where a rollout has more completions than the horizon.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * min(max(1 + error * completions / self.horizon, 0.5), 2.0)
