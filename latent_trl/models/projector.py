"""The cross-modal projector: from the state of text alone to what it would be with the image, and back."""

import torch
from torch import nn

from .component import LatentActionComponent


def gaussian_nll(mean: torch.Tensor, log_variance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`(mean - target)² exp(-log_variance) + log_variance`, summed over the last dimension, in float32 `[...]`."""
    mean, log_variance, target = mean.float(), log_variance.float(), target.float()
    return ((mean - target) ** 2 * (-log_variance).exp() + log_variance).sum(dim=-1)


class _GaussianMap(nn.Module):
    """Mean and log-variance of a diagonal Gaussian: two maps d → d/2 → d; log σ² is bounded by a final tanh."""

    def __init__(self, hidden_size: int, residual: bool):
        super().__init__()
        self.residual = residual
        half = hidden_size // 2
        self.mean = nn.Sequential(nn.Linear(hidden_size, half), nn.Tanh(), nn.Linear(half, hidden_size))
        self.log_variance = nn.Sequential(
            nn.Linear(hidden_size, half), nn.Tanh(), nn.Linear(half, hidden_size), nn.Tanh()
        )
        if residual:
            nn.init.zeros_(self.mean[-1].weight)
            nn.init.zeros_(self.mean[-1].bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states.to(self.mean[0].weight.dtype)
        mean = self.mean(states)
        return states + mean if self.residual else mean

    def distribution(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(states), self.log_variance(states.to(self.mean[0].weight.dtype))


class CrossModalProjector(LatentActionComponent):
    """
    P maps text-only states to image–text states and P' maps back, each a diagonal Gaussian (paper, cross-modal
    projector with cycle consistency). Generation and scoring use the mean of P alone, and never sample.

    Args:
        hidden_size (`int`): d.
        residual (`bool`, defaults to `True`): Predict the change of the state, zero at the start.
    """

    config_keys = ("hidden_size", "residual")
    folder_name = "projector"

    def __init__(self, hidden_size: int, residual: bool = True):
        super().__init__()
        self.hidden_size = hidden_size
        self.residual = residual
        self.to_image = _GaussianMap(hidden_size, residual)
        self.to_text = _GaussianMap(hidden_size, residual)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """P_μ: what the states `[..., d]` of text alone would be with an image."""
        return self.to_image(states)

    def paired_nll(self, text_states: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
        """`nll(P(h^T); h^VT) + nll(P'(h^VT); h^T)` `[...]`, for states of the same tokens without and with image."""
        text_states, image_states = text_states.detach(), image_states.detach()
        return gaussian_nll(*self.to_image.distribution(text_states), image_states) + gaussian_nll(
            *self.to_text.distribution(image_states), text_states
        )

    def cycle_nll(self, text_states: torch.Tensor) -> torch.Tensor:
        """`nll(P'(P_μ(h^T)); h^T)` `[...]`, through the mean, for states of text that has no image."""
        text_states = text_states.detach()
        return gaussian_nll(*self.to_text.distribution(self.to_image(text_states)), text_states)
