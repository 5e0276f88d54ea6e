"""The policy: the distribution over codes given what has been said, and the value of the state."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from .code_predictor import CodePredictor
from .component import LatentActionComponent
from .float32_head import Float32Head


class LatentActionPolicy(CodePredictor):
    """
    π(a | s): decoder layers over the states, then K logits. No shift: the code at t sees states up to t only.

    Args:
        text_config (`PreTrainedConfig` or `dict`): Configuration of its decoder layers.
        hidden_size (`int`): d, the width of the states.
        num_codes (`int`): K.
    """

    folder_name = "policy"

    def __init__(self, text_config: PreTrainedConfig | dict[str, Any], hidden_size: int, num_codes: int):
        super().__init__(text_config, hidden_size, num_codes)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        keep_last: int = 0,
        return_features: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states (`torch.Tensor`): `[B, L, d]`.
            attention_mask, position_ids, past_key_values: As [`DecoderStack`] takes them.
            keep_last (`int`, defaults to `0`): Compute the head for this many last positions only; 0 for all.
            return_features (`bool`, defaults to `False`): Also return the trunk's features, which a value head reads.

        Returns:
            Logits `[B, L or keep_last, K]` in float32, and the features if asked for.
        """
        features = self.features(states, attention_mask, position_ids, past_key_values)[:, -keep_last:]
        logits = self.head(features)
        return (logits, features) if return_features else logits


class ValueHead(LatentActionComponent):
    """
    The value of a state, read from the policy's trunk: one linear map, zero at the start.

    Args:
        input_size (`int`): Width of the policy's features.
    """

    config_keys = ("input_size",)
    folder_name = "value_head"

    def __init__(self, input_size: int):
        super().__init__()
        self.input_size = input_size
        self.head = Float32Head(input_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Values `[B, L]` in float32 of features `[B, L, input_size]`."""
        return self.head(features).squeeze(-1)
