"""A stack of fresh decoder layers of the backbone's own kind that reads context states instead of tokens."""

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedConfig

from ..generation.cache_name import CACHE_NAME


class DecoderStack(nn.Module):
    """
    Decoder layers and final norm, built from a text configuration by transformers itself, over states `[B, L, d]`.

    Positions, padding and causality are the backbone's: pass its `position_ids` and the two-dimensional attention
    mask. When the stack's width differs from d, a linear map stands in front.

    Args:
        text_config (`PreTrainedConfig`): Configuration of the stack, of any text model that `AutoModel` knows.
        input_size (`int`): d, the width of the states.
    """

    def __init__(self, text_config: PreTrainedConfig, input_size: int):
        super().__init__()
        self.hidden_size = text_config.hidden_size
        self.input = nn.Identity()
        if self.hidden_size != input_size:
            self.input = nn.Linear(input_size, self.hidden_size, bias=False)
        self.decoder = AutoModel.from_config(text_config)
        # The states are its input: there is nothing to embed.
        self.decoder.set_input_embeddings(nn.Identity())

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[B, L, d]`.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`, with the length of the cache in front; or what
                transformers' `create_masks_for_generate` makes of it.
            position_ids (`torch.Tensor`, *optional*): As the backbone's text model takes them.
            past_key_values (`Cache`, *optional*): The stack's own layers.

        Returns:
            Normed features `[B, L, hidden_size]`.
        """
        weight = next(self.parameters())
        return self.decoder(
            inputs_embeds=self.input(states.to(weight.dtype)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **{CACHE_NAME: past_key_values},
        ).last_hidden_state

    @torch.no_grad()
    def copy_last_layers(self, decoder: nn.Module) -> None:
        """Copies the last layers of `decoder`, a text model of the same shapes, into the stack."""
        own, source = decoder_layers(self.decoder), decoder_layers(decoder)
        if len(own) > len(source):
            raise ValueError(f"The stack has {len(own)} layers, the backbone {len(source)}: nothing to copy for some.")
        for target, layer in zip(own, source[len(source) - len(own) :], strict=True):
            try:
                target.load_state_dict(layer.state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"`policy_init='last_layers'` needs decoder layers of the backbone's shapes: {error}"
                ) from error


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of layers of a text model: its module list of as many entries as the configuration has layers."""
    count = decoder.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(decoder).__name__} has no module list of its {count} layers.")
