"""A backbone and its components without weights: what a configuration alone says of their sizes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..checkpoint.configuration import LatentActionConfig
from ..generation.cache_name import CACHE_NAME
from ..models.backbone import vision_token_ids
from ..models.latent_action_model import fresh_component

META = torch.device("meta")
COMPONENTS = ("codebook", "world_model", "inverse_dynamics", "policy", "projector", "value_head")
# A row is measured at this length, and is linear in it: fused attention keeps no scores.
MEASURED_LENGTH = 64
# Kept under autocast over kept in bfloat16: 1.07 to 1.17 in three families at a width of 256.
AUTOCAST = 1.2


@dataclass
class Layout:
    """
    Sizes of a backbone with latent actions, made on the meta device: no weight is allocated.

    Args:
        backbone (`PreTrainedModel`): On the meta device.
        components (`dict[str, nn.Module]`): On the meta device, by name.
        config (`LatentActionConfig`): Of the components.
    """

    backbone: PreTrainedModel
    components: dict[str, nn.Module]
    config: LatentActionConfig

    @classmethod
    def of(cls, name_or_path: str, revision: str | None = None, **options: Any) -> "Layout":
        """
        Reads the configuration of a backbone, and no weights.

        Args:
            name_or_path (`str`): A folder or a repository of the Hub with a `config.json`.
            revision (`str`, *optional*): Branch, tag or commit.
            options: Fields of [`LatentActionConfig`], such as `policy_decoder={"num_hidden_layers": 2}`.
        """
        return cls.of_config(AutoConfig.from_pretrained(name_or_path, revision=revision), **options)

    @classmethod
    def of_config(cls, backbone_config: PreTrainedConfig, **options: Any) -> "Layout":
        """The same, of a configuration that is at hand."""
        is_vision = type(backbone_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if is_vision else AutoModelForCausalLM
        config = LatentActionConfig(codebook_std=1.0, **options)
        config.text_config = backbone_config.get_text_config(decoder=True)
        config.vision_token_ids = vision_token_ids(backbone_config)
        config.use_projector = bool(config.vision_token_ids) if config.use_projector is None else config.use_projector
        config.decoder_kind = config.decoder_kind or "backbone"
        names = [name for name in COMPONENTS if name != "projector" or config.use_projector]
        with META:
            backbone = auto.from_config(backbone_config, dtype=torch.bfloat16)
            components = cls._components(names, config)
        return cls(backbone.eval(), components, config)

    @staticmethod
    def _components(names: Iterable[str], config: LatentActionConfig) -> dict[str, nn.Module]:
        width = config.text_config.hidden_size
        try:
            return {name: fresh_component(name, config, width).to(torch.bfloat16) for name in names}
        except Exception:
            if config.decoder_kind == "plain":
                raise
            # As `LatentActionModel.from_backbone` does where a family's layers cannot be had by themselves.
            config.decoder_kind = "plain"
            return {name: fresh_component(name, config, width).to(torch.bfloat16) for name in names}

    @property
    def width(self) -> int:
        """d, of the states."""
        return self.config.text_config.hidden_size

    @property
    def vocabulary(self) -> int:
        """V, rows of the output embedding."""
        return self.backbone.get_output_embeddings().weight.shape[0]

    def parameters(self, *names: str) -> int:
        """Parameters of components, or of `"backbone"`."""
        parts = [self.backbone if name == "backbone" else self.components[name] for name in names]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    def _linear(self) -> list[nn.Linear]:
        """The linear maps of the text model; the head is none of them."""
        head = self.backbone.get_output_embeddings()
        return [m for m in self.backbone.get_decoder().modules() if isinstance(m, nn.Linear) and m is not head]

    def quantizable(self) -> int:
        """Weights of the text model's linear maps, which 4-bit loading packs."""
        return sum(m.weight.numel() for m in self._linear())

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA of `rank` on the text model's linear maps."""
        return sum(rank * (m.in_features + m.out_features) for m in self._linear())

    def cache_bytes(self, decoder: nn.Module) -> float:
        """Bytes of a token in the cache of a text model, in bfloat16. What does not grow with the text is left out."""
        cache = DynamicCache(config=decoder.config)
        with torch.no_grad():
            _run(decoder, decoder.config.hidden_size, use_cache=True, **{CACHE_NAME: cache})
        kept = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in kept if MEASURED_LENGTH in tensor.shape) / MEASURED_LENGTH

    def activation_bytes(self, decoder: nn.Module) -> float:
        """Bytes that autograd keeps of one token, counted from what a text model saves in a forward pass."""
        kept: dict[Any, int] = {}
        alive: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            scores = tensor.ndim >= 2 and tensor.shape[-2:] == (MEASURED_LENGTH, MEASURED_LENGTH)
            if MEASURED_LENGTH in tensor.shape and not scores and not (tensor.is_leaf and tensor.requires_grad):
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
                # So that no other tensor comes to lie at the same place.
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _run(decoder, decoder.config.hidden_size, use_cache=False)
        return AUTOCAST * sum(kept.values()) / MEASURED_LENGTH


def _run(decoder: nn.Module, width: int, **options: Any) -> None:
    """A forward pass over states on the meta device, whose values no code can ask for."""
    states = torch.empty(1, MEASURED_LENGTH, width, device=META, dtype=torch.bfloat16, requires_grad=True) * 1
    # A mask of four dimensions is taken as it is by most families. Others take none.
    whole = torch.zeros(1, 1, MEASURED_LENGTH, MEASURED_LENGTH, device=META, dtype=torch.bfloat16)
    try:
        decoder(inputs_embeds=states, attention_mask=whole, **options)
    except Exception:
        try:
            decoder(inputs_embeds=states, **options)
        except Exception as error:
            raise ValueError(
                f"{type(decoder).__name__} cannot be run without weights, so what it keeps cannot be counted: "
                f"{type(error).__name__}: {error}"
            ) from error
