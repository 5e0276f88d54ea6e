"""
The model inside an engine: a backbone of vLLM's, with the components of a checkpoint around it.

`LatentAction` before the name of any architecture that vLLM knows is an attribute of this module.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.utils import initialize_model

from ..checkpoint.configuration import PLAIN_DECODER
from ..models.codebook import Codebook
from ..models.cross_entropy import CHUNK_VALUES
from ..models.policy import LatentActionPolicy
from ..models.projector import CrossModalProjector
from ..models.world_model import LanguageWorldModel
from .names import DECODER, policy_weights, with_old_prefixes
from .plugin import FIRST_RUNNER, PREFIX
from .requests import REQUESTS, ActionRequests

# Under which the policy's decoder lies in the model of the engine.
TRUNK = "latent_action_policy"


def __getattr__(name: str) -> type[nn.Module]:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    made = type(name, (LatentActionEngineMixin, base), {"__module__": __name__})
    return globals().setdefault(name, made)


class LatentActionEngineMixin:
    """
    In front of a model class of vLLM: the policy reads the backbone's states in the same pass, with pages of its own in
    the same block tables; logits are those of codes, and [`token_logits`] reads tokens from chosen codes.

    Args:
        vllm_config (`VllmConfig`): Whose `hf_config.latent_action` names the checkpoint.
        prefix (`str`): Of the module's name.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        folder = Path(vllm_config.model_config.hf_config.latent_action["path"])
        record = vllm_config.model_config.hf_config.latent_action
        parts: dict[str, Any] = {
            "codebook": Codebook.from_pretrained(folder, subfolder="codebook"),
            "world_model": LanguageWorldModel.from_pretrained(folder, subfolder="world_model"),
        }
        if record["use_projector"]:
            parts["projector"] = CrossModalProjector.from_pretrained(folder, subfolder="projector")
        policy = LatentActionPolicy.from_pretrained(folder, subfolder="policy")
        parts |= {"policy_input": policy.decoder_stack.input, "policy_head": policy.head}
        self.latent_actions = nn.ModuleDict(parts).requires_grad_(False)
        self.latent_actions.to(next(self.parameters()).device)
        self.use_projector: bool = record["use_projector"]
        self.vision_token_ids: list[int] = record["vision_token_ids"]
        self.model_config = vllm_config.model_config
        config = policy.decoder_stack.decoder.config
        self.plain = policy.decoder_stack.plain
        trunk_class = self._trunk_class(config)
        named = None if trunk_class is None else [trunk_class.__name__]
        trunk = initialize_model(vllm_config.with_hf_config(config, named), prefix=TRUNK, model_class=trunk_class)
        setattr(self, TRUNK, trunk)
        self.policy_weights = policy_weights(policy)
        self.widths = [policy.hidden_size, policy.decoder_stack.hidden_size]
        known = vllm_config.compilation_config.static_forward_context
        if REQUESTS not in known:
            raise ValueError(FIRST_RUNNER)
        self.requests: ActionRequests = known[REQUESTS]
        self.requests.model = self
        # Of the positions whose codes are being chosen.
        self.sampled_states: torch.Tensor | None = None

    def _trunk_class(self, config: PreTrainedConfig) -> type[nn.Module] | None:
        """The class of the policy's decoder: that of the backbone's own text model, or of a plain decoder."""
        text = self.get_language_model() if self.vision_token_ids else self
        if config.model_type == PLAIN_DECODER:
            return None
        return type(text) if text is not self else type(self).__mro__[2]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Context states and features of the policy, side by side `[n, d + d_policy]`."""
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds, **kwargs)
        states = hidden
        flat = self.plain and positions.ndim == 2
        rows, places = self._places() if self.use_projector or flat else (None, None)
        if self.use_projector:
            projected = self.latent_actions["projector"](hidden).to(hidden.dtype)
            has_image = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
            if rows is not None:
                has_image[: len(rows)] = places >= self.requests.first_images()[rows]
            states = torch.where(has_image[:, None], hidden, projected)
        if flat:
            # A backbone with several coordinates a position, and a policy with one: the place in the text.
            positions = positions[0].clone()
            if rows is not None:
                positions[: len(rows)] = places
        # A copy: some models scale their input in place.
        entered = self.latent_actions["policy_input"](states.clone())
        features = getattr(self, TRUNK)(None, positions, None, inputs_embeds=entered)
        return torch.cat([states, features], dim=-1)

    def _places(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The row of the batch `[n]` that a position is of, and its place there, without padding; `None` in a pass that
        only measures memory."""
        metadata = get_forward_context().attn_metadata
        if not metadata or not self.requests.rows:
            return None, None
        layer = next(iter(metadata.values()))
        starts, lengths = layer.query_start_loc.long(), layer.seq_lens.long()
        new = starts.diff()
        rows = torch.arange(len(new), device=starts.device).repeat_interleave(new)
        return rows, torch.arange(len(rows), device=starts.device) + (lengths - new - starts[:-1])[rows]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[n, K]` of codes, float32."""
        self.sampled_states, features = hidden_states.split(self.widths, dim=-1)
        return self.latent_actions["policy_head"](features)

    def token_logits(self, action_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[n, V]` of tokens, float32, when `action_ids` `[n]` are taken where the last logits were from."""
        return self._read(self.sampled_states, action_ids)

    def said_tokens(self, rows: torch.Tensor, action_ids: torch.Tensor, never: list[list[int]]) -> torch.Tensor:
        """What codes `[r, n]` say `[r, n]` in some of the `rows` `[r]` that the last logits were of: none of the tokens
        `never` of each."""
        size = max(1, CHUNK_VALUES // (action_ids.shape[1] * self.model_config.hf_text_config.vocab_size))
        said = []
        for start in range(0, len(rows), size):
            codes = action_ids[start : start + size]
            states = self.sampled_states[rows[start : start + size]].repeat_interleave(codes.shape[1], dim=0)
            logits = self._read(states, codes.flatten()).unflatten(0, codes.shape)
            for of_row, tokens in zip(logits, never[start : start + size], strict=True):
                if tokens:
                    of_row[:, tokens] = -torch.inf
            said.append(logits.argmax(dim=-1))
        return torch.cat(said)

    def _read(self, states: torch.Tensor, action_ids: torch.Tensor) -> torch.Tensor:
        parts = self.latent_actions
        merged = parts["world_model"](states, parts["codebook"](action_ids)).to(states.dtype)
        logits = super().compute_logits(merged).float()
        logits[:, [token for token in self.vision_token_ids if token < logits.shape[-1]]] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The backbone's, and then those of the policy's decoder. Other components have theirs from the start."""
        if self.vision_token_ids:
            weights = with_old_prefixes(weights, self.model_config.hf_config)
        loaded = super().load_weights(weights)
        trunk = getattr(self, TRUNK)
        trunk.load_weights(self.policy_weights.items())
        self.policy_weights = {}
        own = {f"{TRUNK}.{name}" for name, _ in trunk.named_parameters()}
        own |= {f"latent_actions.{name}" for name, _ in self.latent_actions.named_parameters()}
        return own | (loaded or set())

    @torch.no_grad()
    def update_policy(self, tensors: dict[str, torch.Tensor]) -> None:
        """
        Puts other values into the policy, in place.

        Args:
            tensors (`dict[str, torch.Tensor]`): What [`policy_tensors`] gives.
        """
        inside = [name for name in tensors if name.startswith(DECODER)]
        trunk = getattr(self, TRUNK)
        initialize_layerwise_reload(trunk)
        trunk.load_weights((name.removeprefix(DECODER), tensors[name]) for name in inside)
        finalize_layerwise_reload(trunk, self.model_config)
        own = dict(self.latent_actions.named_parameters())
        for name in tensors.keys() - set(inside):
            own[name].copy_(tensors[name])
