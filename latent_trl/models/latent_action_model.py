"""A backbone, the learned components around it, and what they do together: encode, choose, merge, read."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging

from ..checkpoint.configuration import LatentActionConfig, intermediate_size
from ..checkpoint.download import cached_commit
from ..generation.exclusive import exclusive
from ..generation.generate import LatentActionGenerationMixin
from .backbone import Backbone
from .checkpoint import LatentActionCheckpointMixin
from .codebook import Codebook
from .decoder_stack import can_stand_alone
from .inverse_dynamics import InverseDynamicsModel
from .policy import LatentActionPolicy, ValueHead
from .projector import CrossModalProjector
from .spoken import chunk_size
from .world_model import LanguageWorldModel

logger = logging.get_logger(__name__)


@dataclass
class LatentActionOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, *optional*): What the objective returned.
        logits (`torch.Tensor`, *optional*): `[B, L, V]` next-token logits through world model and head.
        action_logits (`torch.Tensor`, *optional*): `[B, L, K]` of the policy, float32.
        action_ids (`torch.Tensor`, *optional*): `[B, L]`, the codes that made `logits`.
        context_states (`torch.Tensor`, *optional*): `[B, L, d]`.
        state_values (`torch.Tensor`, *optional*): `[B, L]` of the value head, float32.
    """

    loss: Any = None
    logits: torch.Tensor | None = None
    action_logits: torch.Tensor | None = None
    action_ids: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    state_values: torch.Tensor | None = None


class LatentActionModel(LatentActionCheckpointMixin, LatentActionGenerationMixin, PreTrainedModel, GenerationMixin):
    """
    Wraps any causal or image-text-to-text model with a codebook, a world model, an inverse dynamics model, a policy
    and a cross-modal projector. Make one with [`~LatentActionModel.from_backbone`] or
    [`~LatentActionModel.from_pretrained`].

    Args:
        config (`LatentActionConfig`): With its backbone part filled in.
        backbone (`PreTrainedModel`): The wrapped model; frozen here, and thawed by who trains it.
        components (`dict[str, nn.Module]`, *optional*): Components to use. Those that are left out are `None`, and
            what needs them says so.
    """

    config_class = LatentActionConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    component_classes = {
        "codebook": Codebook,
        "world_model": LanguageWorldModel,
        "inverse_dynamics": InverseDynamicsModel,
        "policy": LatentActionPolicy,
        "projector": CrossModalProjector,
        "value_head": ValueHead,
    }

    def __init__(
        self, config: LatentActionConfig, backbone: PreTrainedModel, components: dict[str, nn.Module] | None = None
    ):
        config._attn_implementation = backbone.config._attn_implementation
        super().__init__(config)
        self.backbone = backbone
        object.__setattr__(self, "backbone_view", Backbone(backbone))
        self.adapter = None
        self.tuned_backbone_tensors: list[str] = []
        # Where the checkpoint is that it was loaded from, if a processor lies there.
        self.processor_folder: Path | None = None
        # What is known of the runs that trained it: `latent_trl.hub.facts.TrainingReport` as plain data.
        self.training_report: dict[str, Any] = {}
        for name in self.component_classes:
            setattr(self, name, None)
        for name, component in (components or {}).items():
            setattr(self, name, component)
        self.generation_config = copy.deepcopy(backbone.generation_config)
        tied = getattr(backbone, "all_tied_weights_keys", None) or {}
        self.all_tied_weights_keys = {f"backbone.{k}": f"backbone.{v}" for k, v in tied.items()}
        backbone.requires_grad_(False)
        backbone.eval()

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, config: LatentActionConfig | None = None) -> "LatentActionModel":
        """
        Fresh components around `backbone`, in its dtype and on its device.

        Args:
            backbone (`PreTrainedModel`): Any causal or image-text-to-text model.
            config (`LatentActionConfig`, *optional*): Sizes and read-out; a copy is filled in with the backbone's part.
        """
        config = copy.deepcopy(config) if config is not None else LatentActionConfig()
        view = Backbone(backbone)
        config.text_config = view.text_config
        config.vision_token_ids = view.vision_token_ids
        if config.use_projector is None:
            config.use_projector = bool(view.vision_token_ids)
        config.base_model_name_or_path = backbone.config._name_or_path or None
        config.base_model_revision = config.base_model_revision or cached_commit(config.base_model_name_or_path)
        config.backbone_fingerprint = view.fingerprint()
        config.backbone_fingerprint_float16 = view.fingerprint(torch.float16)
        if config.codebook_std is None:
            config.codebook_std = view.state_rms
        if config.world_model_intermediate_size is None:
            config.world_model_intermediate_size = intermediate_size(view.text_config)
        if config.read_out != "residual":
            view.norm(torch.zeros(1, view.hidden_size, device=backbone.device, dtype=_float_dtype(backbone)))
        model = cls(config, backbone)
        for name in ("codebook", "world_model"):
            model.new_component(name)
        model._new_decoders()
        if config.use_projector:
            model.new_component("projector")
        if config.policy_init == "last_layers":
            model.policy.decoder_stack.copy_last_layers(view.decoder)
        return model

    def _new_decoders(self) -> None:
        """Inverse dynamics model and policy, with plain layers where the backbone's kind cannot be had by itself."""
        config, wanted = self.config, self.config.decoder_kind
        config.decoder_kind = wanted or "backbone"
        try:
            for name in ("inverse_dynamics", "policy"):
                self.new_component(name).decoder_stack.check()
        except Exception as error:
            changed = {*config.inverse_dynamics_decoder, *config.policy_decoder} != {"num_hidden_layers"}
            if wanted or (changed and can_stand_alone(config, self.backbone_view.hidden_size)):
                # It was asked for, or the fields that the user overrides are at fault.
                raise
            config.decoder_kind = "plain"
            for name in ("inverse_dynamics", "policy"):
                self.new_component(name)
            logger.warning(
                f"Layers of the kind of {type(self.backbone_view.decoder).__name__} cannot be had by themselves, so "
                "policy and inverse dynamics model have plain ones (`decoder_kind='plain'`): "
                f"{type(error).__name__}: {error}"
            )

    def new_component(self, name: str) -> nn.Module:
        """Puts a freshly initialised component in place, replacing any of that name, and returns it."""
        component = fresh_component(name, self.config, self.backbone_view.hidden_size)
        component = component.to(dtype=_float_dtype(self.backbone), device=self.backbone.device)
        setattr(self, name, component)
        return component

    @property
    def _no_split_modules(self) -> list[str]:
        """
        Classes of the layers that FSDP gathers one at a time: those of the text model, the policy and the inverse
        dynamics model. A backbone lists classes that it may not have, and FSDP refuses those. Its vision tower's are
        left out: that is gathered as a whole, so a process whose batch has no picture keeps nobody waiting.
        """
        stacks = [part.decoder_stack.decoder for part in (self.policy, self.inverse_dynamics) if part is not None]
        listed = {name for model in (self.backbone, *stacks) for name in model._no_split_modules or ()}
        return sorted(listed & {type(m).__name__ for part in (self.get_decoder(), *stacks) for m in part.modules()})

    def require(self, *names: str) -> None:
        """Raises `ValueError` unless every named component is there."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This model has no {', '.join(missing)}. Load a checkpoint that holds it, or make a fresh one with "
                f"`model.new_component({missing[0]!r})`."
            )

    def train(self, mode: bool = True) -> "LatentActionModel":
        """As `nn.Module.train`; a frozen backbone stays in evaluation mode: its states must not depend on dropout."""
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """
        The backbone's input embeddings, as they are.

        Raises:
            ValueError: For another size: the base model that a checkpoint names would not have it.
        """
        embeddings = self.get_input_embeddings()
        if new_num_tokens not in (None, len(embeddings.weight)):
            raise ValueError(
                f"`resize_token_embeddings({new_num_tokens})`: the backbone has {len(embeddings.weight)}, and a "
                "checkpoint of latent actions cannot hold more. Resize and save the backbone itself, and make latent "
                "actions on it with `LatentActionModel.from_backbone`."
            )
        return embeddings

    def get_decoder(self) -> nn.Module:
        return self.backbone_view.decoder

    def has_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Boolean `[B, L]`: whether a vision placeholder stands at or before a position of `input_ids` `[B, L]`."""
        ids = torch.tensor(self.config.vision_token_ids, device=input_ids.device, dtype=input_ids.dtype)
        return torch.isin(input_ids, ids).cumsum(dim=-1) > 0

    def context_states(self, states: torch.Tensor, has_image: torch.Tensor) -> torch.Tensor:
        """
        s `[B, L, d]`: the text model's state where it has seen an image, P_μ of it where it has not.

        Args:
            states (`torch.Tensor`): `[B, L, d]` of the text model.
            has_image (`torch.Tensor`): Boolean `[B, L]`, as [`LatentActionModel.has_image`] gives it.
        """
        if has_image.shape != states.shape[:-1]:
            raise ValueError(
                f"`has_image` must be {tuple(states.shape[:-1])}, one for each state, got {tuple(has_image.shape)}."
            )
        if not self.config.use_projector:
            return states
        self.require("projector")
        return torch.where(has_image[..., None], states, self.projector(states).to(states.dtype))

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Context states of whole sequences, one pass of the backbone without its vocabulary head.

        Returns:
            s `[B, L, d]`, and the position ids that the text model was given.
        """
        with exclusive(self.backbone):
            call = self.backbone_view.encode(input_ids, attention_mask, **inputs)
        return self.context_states(call.states, self.has_image(input_ids)), call.position_ids

    def infer(
        self,
        states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[B, L-1, K]` of the inverse dynamics model: which code explains each next token."""
        self.require("inverse_dynamics")
        embeddings = None
        if self.config.inverse_reads_tokens:
            embedding = self.backbone.get_input_embeddings()
            # A placeholder's id may lie outside of the embedding.
            known = input_ids.masked_fill(input_ids >= len(embedding.weight), 0)
            embeddings = embedding(known).detach()
        return self.inverse_dynamics(states, attention_mask, position_ids, embeddings)

    def merge(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """What the head reads `[..., d]`, from context states and code vectors, whose shapes broadcast."""
        return self.world_model(states, codes, norm=self.backbone_view.norm)

    def read(self, states: torch.Tensor, action_ids: torch.Tensor) -> torch.Tensor:
        """Next-token logits `[B, L, V]` when `action_ids` `[B, L]` are taken in `states` `[B, L, d]`."""
        return self.backbone_view.logits(self.merge(states, self.codebook(action_ids)))

    def said_tokens(
        self, states: torch.Tensor, action_ids: torch.Tensor, never: Sequence[int] = (), at_once: bool = False
    ) -> torch.Tensor:
        """The most likely tokens `[M, n]` of some codes `[M, n]` in each of `states` `[M, d]`, none of `never`; by one
        pass of the head where `at_once`."""
        said = []
        size = len(states) if at_once else chunk_size(self, action_ids.shape[1], states.device)
        for part, codes in zip(states.split(size), action_ids.split(size), strict=True):
            logits = self.read(part[:, None].expand(-1, codes.shape[1], -1), codes)
            logits[..., [token for token in never if token < logits.shape[-1]]] = -torch.inf
            said.append(logits.argmax(dim=-1))
        return torch.cat(said)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        context_states: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        action_ids: torch.Tensor | None = None,
        keep_last: int = 0,
        return_logits: bool = True,
        objective: Callable[..., Any] | None = None,
        batch: Any = None,
        **inputs,
    ) -> LatentActionOutput:
        """
        Args:
            input_ids (`torch.Tensor`, *optional*): `[B, L]`; not needed when `context_states` are given.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`.
            context_states (`torch.Tensor`, *optional*): `[B, L, d]` of an earlier pass; the backbone is not run.
            position_ids (`torch.Tensor`, *optional*): Of the context states, as the text model takes them.
            action_ids (`torch.Tensor`, *optional*): `[B, L]` codes to read through; the policy's arg-max by default.
            keep_last (`int`, defaults to `0`): Only this many last positions get logits; 0 for all.
            return_logits (`bool`, defaults to `True`): Whether to compute the vocabulary logits.
            objective (`Callable`, *optional*): A loss `objective(model, batch)` to compute instead, inside the forward
                so that wrappers (DDP, FSDP) see it.
            inputs: The backbone's further inputs (`pixel_values`, ...).
        """
        if objective is not None:
            return LatentActionOutput(loss=objective(self, batch))
        self.require("policy")
        if context_states is None:
            context_states, position_ids = self.encode(input_ids, attention_mask, position_ids=position_ids, **inputs)
        action_logits, features = self.policy(
            context_states, attention_mask, position_ids, keep_last=keep_last, return_features=True
        )
        output = LatentActionOutput(action_logits=action_logits, context_states=context_states)
        if self.value_head is not None:
            output.state_values = self.value_head(features)
        if return_logits:
            output.action_ids = action_logits.argmax(dim=-1) if action_ids is None else action_ids
            output.logits = self.read(context_states[:, -keep_last:], output.action_ids)
        return output


def fresh_component(name: str, config: LatentActionConfig, hidden_size: int) -> nn.Module:
    """
    One component with fresh weights.

    Args:
        name (`str`): `"codebook"`, `"world_model"`, `"inverse_dynamics"`, `"policy"`, `"projector"` or `"value_head"`.
        config (`LatentActionConfig`): With the backbone's part filled in.
        hidden_size (`int`): d, the width of the states.

    Raises:
        ValueError: For another name.
    """
    make: dict[str, Callable[[], nn.Module]] = {
        "codebook": lambda: Codebook(config.num_codes, hidden_size, std=config.codebook_std or 1.0),
        "world_model": lambda: LanguageWorldModel(
            hidden_size,
            config.world_model_intermediate_size or intermediate_size(config.text_config),
            config.read_out,
        ),
        "inverse_dynamics": lambda: InverseDynamicsModel(
            config.decoder_config(config.inverse_dynamics_decoder), hidden_size, config.num_codes
        ),
        "policy": lambda: LatentActionPolicy(
            config.decoder_config(config.policy_decoder), hidden_size, config.num_codes
        ),
        "projector": lambda: CrossModalProjector(hidden_size, config.projector_residual),
        "value_head": lambda: ValueHead(config.decoder_config(config.policy_decoder).hidden_size),
    }
    if name not in make:
        raise ValueError(f"`name` must be one of {sorted(make)}, got {name!r}.")
    return make[name]()


def _float_dtype(model: PreTrainedModel) -> torch.dtype:
    return model.dtype if model.dtype.is_floating_point else torch.float32
