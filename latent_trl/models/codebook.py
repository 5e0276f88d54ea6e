"""The codebook: K vectors of the backbone's width, and the straight-through choice of one of them."""

import torch
import torch.nn.functional as F
from torch import nn

from .component import LatentActionComponent


def gumbel_noise(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard Gumbel noise in float32, of the shape and on the device of `like`."""
    uniform = torch.empty(like.shape, dtype=torch.float32, device=like.device).uniform_(generator=generator)
    exponential = (-torch.log(uniform.clamp(min=torch.finfo(torch.float32).tiny))).clamp(min=1e-20)
    return -torch.log(exponential)


class Codebook(LatentActionComponent):
    """
    K code vectors, the latent actions.

    Args:
        num_codes (`int`): K.
        hidden_size (`int`): Width d of a code, the backbone's hidden size.
        std (`float`, defaults to `1.0`): Standard deviation of the initial codes; the scale of the context states.
    """

    config_keys = ("num_codes", "hidden_size")
    folder_name = "codebook"

    def __init__(self, num_codes: int, hidden_size: int, std: float = 1.0):
        super().__init__()
        self.num_codes = num_codes
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(num_codes, hidden_size).normal_(std=std))

    def forward(self, action_ids: torch.Tensor) -> torch.Tensor:
        """Code vectors `[..., d]` of `action_ids` `[...]`."""
        return F.embedding(action_ids, self.weight)

    def straight_through(
        self, logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Gumbel-softmax choice: forward the one-hot arg-max of the noisy logits, gradient through the soft sample.

        Args:
            logits (`torch.Tensor`): `[..., K]`.
            temperature (`float`): τ, positive.
            generator (`torch.Generator`, *optional*): Source of the noise.

        Returns:
            Code vectors `[..., d]` and the chosen ids `[...]`.
        """
        noisy = (logits.float() + gumbel_noise(logits, generator)) / temperature
        soft = noisy.softmax(dim=-1)
        action_ids = soft.argmax(dim=-1)
        one_hot = F.one_hot(action_ids, self.num_codes).to(soft.dtype)
        weights = one_hot + soft - soft.detach()
        return weights.to(self.weight.dtype) @ self.weight, action_ids
