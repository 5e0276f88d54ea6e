"""The inverse dynamics model: which code explains the next token."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .component import LatentActionComponent
from .configuration import read_text_config
from .decoder_stack import DecoderStack


class InverseDynamicsModel(LatentActionComponent):
    """
    Decoder layers over the states, then a linear map to K logits, shifted left by one: the code at t sees the states
    up to t + 1, the token that it must explain among them, and nothing later. Needed for learning only.

    Args:
        text_config (`PreTrainedConfig` or `dict`): Configuration of its decoder layers.
        hidden_size (`int`): d, the width of the states.
        num_codes (`int`): K.
    """

    config_keys = ("text_config", "hidden_size", "num_codes")
    folder_name = "inverse_dynamics"

    def __init__(self, text_config: PreTrainedConfig | dict[str, Any], hidden_size: int, num_codes: int):
        super().__init__()
        config = read_text_config(text_config)
        self.hidden_size = hidden_size
        self.num_codes = num_codes
        self.decoder_stack = DecoderStack(config, hidden_size)
        self.head = nn.Linear(self.decoder_stack.hidden_size, num_codes, bias=False)

    def to_config(self) -> dict[str, Any]:
        return {**super_config(self), "text_config": self.decoder_stack.decoder.config.to_dict()}

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[B, L, d]`.
            attention_mask, position_ids (`torch.Tensor`, *optional*): As [`DecoderStack`] takes them.
            token_embeddings (`torch.Tensor`, *optional*): `[B, L, d]` of the tokens themselves, added to the states at
                their scale. A last state speaks of what comes next, and hardly of the token that was read.

        Returns:
            Logits `[B, L-1, K]` in float32; entry t is for the step from token t to t + 1.
        """
        if token_embeddings is not None:
            scale = rms(states) / rms(token_embeddings).clamp(min=1e-6)
            states = states + token_embeddings.to(states.dtype) * scale.to(states.dtype)
        features = self.decoder_stack(states, attention_mask, position_ids)
        return self.head(features[:, 1:]).float()


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last dimension, which is kept, in float32."""
    return x.float().pow(2).mean(dim=-1, keepdim=True).sqrt()


def super_config(component: LatentActionComponent) -> dict[str, Any]:
    """The plain arguments of a component whose text configuration is kept by its decoder."""
    return {name: getattr(component, name) for name in component.config_keys if name != "text_config"}
