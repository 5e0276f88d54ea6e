"""A stack of fresh decoder layers that reads context states instead of tokens."""

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, PreTrainedConfig, StaticCache

from ..checkpoint.configuration import PLAIN_DECODER, LatentActionConfig
from ..generation.cache_name import CACHE_NAME
from .whole_loading import loaded_whole


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
        self.input_size = input_size
        self.hidden_size = text_config.hidden_size
        self.plain = text_config.model_type == PLAIN_DECODER
        self.input = nn.Identity()
        if self.hidden_size != input_size:
            self.input = nn.Linear(input_size, self.hidden_size, bias=False)
        with loaded_whole():
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
        if self.plain and position_ids is not None and position_ids.ndim == 3:
            # A backbone with several coordinates a position: in text they are all the same.
            position_ids = position_ids.amax(dim=0)
        weight = next(self.parameters())
        return self.decoder(
            inputs_embeds=self.input(states.to(weight.dtype)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None,
            **{CACHE_NAME: past_key_values},
        ).last_hidden_state

    def check(self) -> None:
        """
        Runs the stack over made-up states.

        Raises:
            ValueError: When a cache changes what it says, a state is seen before its place, or a parameter gets no
                gradient. What the decoder itself raises passes through.
        """
        weight = next(self.parameters())
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(2, 6, self.input_size, generator=generator).to(weight)
        mask = torch.ones(2, 6, dtype=torch.long, device=weight.device)
        mask[0, :2] = 0
        whole = self(states, mask)
        gradients = torch.autograd.grad(whole.float().square().sum(), list(self.parameters()), allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError("no gradient reaches some of its parameters")
        # Far more than what sums in another order make, far less than what a wrong mask or position does.
        tolerance = 2 * torch.finfo(weight.dtype).eps ** 0.5 * whole.abs().max().clamp(min=1)
        config = self.decoder.config
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=6)):
            with torch.no_grad():
                parts = [
                    self(states[:, start:end], mask[:, :end], past_key_values=cache)
                    for start, end in ((0, 4), (4, 5), (5, 6))
                ]
            difference = ((torch.cat(parts, dim=1) - whole) * mask[..., None]).abs().max()
            if not difference <= tolerance:
                raise ValueError(f"a {type(cache).__name__} changes its features by {difference:.2g}")

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


def can_stand_alone(config: LatentActionConfig, input_size: int) -> bool:
    """Whether the decoder layers of `config` run by themselves with no field overridden but their number."""
    try:
        for overrides in (config.inverse_dynamics_decoder, config.policy_decoder):
            layers = {"num_hidden_layers": overrides["num_hidden_layers"]}
            DecoderStack(config.decoder_config(layers), input_size).check()
    except Exception:
        return False
    return True


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of layers of a text model: its module list of as many entries as the configuration has layers."""
    count = decoder.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(decoder).__name__} has no module list of its {count} layers.")
