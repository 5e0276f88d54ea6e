"""What the policy and the inverse dynamics model share: decoder layers over states, and a distribution over codes."""

from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from ..checkpoint.configuration import read_text_config
from .component import LatentActionComponent
from .decoder_stack import DecoderStack
from .float32_head import Float32Head


class CodePredictor(LatentActionComponent):
    """
    Decoder layers over the states, then a linear map to K logits in float32.

    Args:
        text_config (`PreTrainedConfig` or `dict`): Configuration of its decoder layers.
        hidden_size (`int`): d, the width of the states.
        num_codes (`int`): K.
    """

    config_keys = ("text_config", "hidden_size", "num_codes")

    def __init__(self, text_config: PreTrainedConfig | dict[str, Any], hidden_size: int, num_codes: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_codes = num_codes
        self.decoder_stack = DecoderStack(read_text_config(text_config), hidden_size)
        self.head = Float32Head(self.decoder_stack.hidden_size, num_codes, bias=False)

    def to_config(self) -> dict[str, Any]:
        return {
            "text_config": self.decoder_stack.decoder.config.to_dict(),
            "hidden_size": self.hidden_size,
            "num_codes": self.num_codes,
        }

    @classmethod
    def check_sizes(cls, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        stack = read_text_config(config["text_config"])
        # One that is no text model's may have neither, or have them of its parts.
        parts = [stack, *(part for part in vars(stack).values() if isinstance(part, PreTrainedConfig))]
        for part in parts:
            layers, vocabulary = getattr(part, "num_hidden_layers", 0), getattr(part, "vocab_size", 1)
            if layers > len(shapes):
                raise ValueError(f"{layers:,} layers cannot have {len(shapes):,} tensors")
            if vocabulary != 1:
                raise ValueError(f"`vocab_size` must be 1, for there is nothing to embed; got {vocabulary:,}")

    def features(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Features `[B, L, hidden_size]` of states `[B, L, d]`; arguments as [`DecoderStack`] takes them."""
        return self.decoder_stack(states, attention_mask, position_ids, past_key_values)
