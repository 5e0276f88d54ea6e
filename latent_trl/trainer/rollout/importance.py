"""Importance weights, truncated as TRL's, where an engine's log-probabilities differ from the trainer's."""

import torch

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_ratio(
    old: torch.Tensor,
    sampled: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    low: float | None = None,
    high: float | None = None,
) -> torch.Tensor:
    """
    Args:
        old, sampled (`torch.Tensor`): `[B, C]` log-probabilities of codes by the trainer, and by the engine.
        mask (`torch.Tensor`): `[B, C]`, the codes that count.
        mode (`str`): One of `MODES`: a ratio a code or a completion, which is clamped to the bounds, or 0 outside.
        low, high (`float`, *optional*): The bounds; `None` is none.

    Returns:
        `[B, C]`, or `[B, 1]` for completions.
    """
    if mode not in MODES:
        raise ValueError(f"`vllm_importance_sampling_mode` must be one of {list(MODES)}, got {mode!r}.")
    difference = torch.where(mask.bool(), old - sampled, 0.0)
    level, action = mode.split("_")
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    ratio = difference.exp()
    if low is None and high is None:
        return ratio
    if action == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, 0.0)


def difference_figures(
    old: torch.Tensor, sampled: torch.Tensor, ratio: torch.Tensor, mask: torch.Tensor
) -> dict[str, tuple[float, float]]:
    """Figures of a rollout for the log, each with its weight."""
    counted = mask.bool()
    difference = (old - sampled).abs()[counted]
    if not len(difference):
        return {}
    ratios = ratio.flatten() if ratio.shape != mask.shape else ratio[counted]
    codes = float(len(difference))
    return {
        "sampling/log_prob_difference": (difference.mean().item(), codes),
        "sampling/log_prob_difference_max": (difference.max().item(), 1.0),
        "sampling/importance_sampling_ratio/min": (ratios.min().item(), 1.0),
        "sampling/importance_sampling_ratio/mean": (ratios.mean().item(), codes),
        "sampling/importance_sampling_ratio/max": (ratios.max().item(), 1.0),
    }
