"""The small linear maps at the end of the policy, the inverse dynamics model and the value head, in float32."""

import torch
import torch.nn.functional as F
from torch import nn


class Float32Head(nn.Linear):
    """
    A linear map that multiplies in float32, whatever the dtype of its weight and input, and under autocast too. Ratios
    and divergences are differences of its outputs: bfloat16 would round away what an update changes.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., out_features]` in float32."""
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(features.float(), self.weight.float(), bias)
