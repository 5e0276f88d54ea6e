"""Generation over codes: what happens inside the backbone's own `generate` between the states and the head."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import ModelOutput

from .action_law import ActionLaw


@dataclass
class LatentActionGenerateOutput(ModelOutput):
    """
    What [`LatentActionModel.generate`] returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.Tensor`): `[B, P+C]` prompt and completion ids.
        action_ids (`torch.Tensor`): `[B, C]`; entry i, chosen from the state of position P-1+i, emitted completion
            token i.
        action_log_probs (`torch.Tensor`): `[B, C]` in float32, under the law that was sampled from. Zero where the
            code was forced from outside that law's support.
        action_support (`torch.Tensor`, *optional*): `[B, C, K]`, the codes that could be sampled, when top-k, top-p or
            a bias left some out.
        context_states (`torch.Tensor`, *optional*): `[B, P+C-1, d]`, what the policy and the world model read.
        position_ids (`torch.Tensor`, *optional*): Position ids of the context states, batch first.
        scores, logits: Of the token choice, as transformers returns them.
        past_key_values (`Cache`, *optional*): Backbone's and policy's layers in one cache.
    """

    sequences: torch.Tensor | None = None
    action_ids: torch.Tensor | None = None
    action_log_probs: torch.Tensor | None = None
    action_support: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None


@dataclass
class ActionChoice:
    """
    How codes are chosen while generating.

    Args:
        law (`ActionLaw`): The law to sample from.
        do_sample (`bool`): Sample, or take the most likely code.
        forced (`torch.Tensor`, *optional*): `[B, n]` codes of the first n steps; -1 leaves a step free.
        bias (`torch.Tensor`, *optional*): `[K]`, added to the logits; `-inf` bans a code.
        generator (`torch.Generator`, *optional*): Source of the sampling.
    """

    law: ActionLaw = field(default_factory=ActionLaw)
    do_sample: bool = True
    forced: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    generator: torch.Generator | None = None

    def choose(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes `[B]`, their log-probabilities `[B]` and the support `[B, K]` for logits `[B, K]` of step `step`."""
        support = None
        if self.bias is not None:
            logits = logits + self.bias.to(logits)
        support = self.law.support(logits)
        if self.bias is not None and torch.isneginf(self.bias).any():
            allowed = ~torch.isneginf(logits)
            support = allowed if support is None else support & allowed
        log_probs = self.law.log_probs(logits, support)
        if self.do_sample:
            action_ids = torch.multinomial(log_probs.exp(), 1, generator=self.generator).squeeze(-1)
        else:
            action_ids = log_probs.argmax(dim=-1)
        if self.forced is not None and step < self.forced.shape[1]:
            wanted = self.forced[:, step].to(action_ids.device)
            action_ids = torch.where(wanted >= 0, wanted, action_ids)
        chosen = log_probs.gather(-1, action_ids.unsqueeze(-1)).squeeze(-1)
        return action_ids, chosen.masked_fill(torch.isneginf(chosen), 0.0), support


class RolloutHook:
    """
    Forward hook of the text model during one `generate` call.

    At each call it turns the new states into context states, runs the policy over them, chooses a code for the last
    position and puts the merged vector where the head will read. Everything stays on the device.

    Args:
        model (`LatentActionModel`): Whose components are run.
        choice (`ActionChoice`): How codes are chosen.
        attention_mask (`torch.Tensor`): `[B, P]` of the prompts, one row per generated sequence.
        has_image (`torch.Tensor`): Boolean `[B]`, whether a row's prompt has an image.
        keep_states (`bool`): Whether context states are kept.
    """

    def __init__(
        self,
        model,
        choice: ActionChoice,
        attention_mask: torch.Tensor,
        has_image: torch.Tensor,
        keep_states: bool,
    ):
        self.model = model
        self.choice = choice
        self.attention_mask = attention_mask
        self.padded = not bool(attention_mask.all())
        self.has_image = has_image
        self.keep_states = keep_states
        self.action_ids: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []
        self.supports: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []
        self.position_ids: list[torch.Tensor] = []
        self.cache_layers: slice | None = None

    def __call__(self, decoder: nn.Module, args, kwargs, output):
        step = len(self.action_ids)
        cache = output.past_key_values if output.past_key_values is not None else kwargs.get("past_key_values")
        if cache is None:
            self.states.clear()
            self.position_ids.clear()
        states = self.model.context_states(output.last_hidden_state, self.has_image)
        position_ids = kwargs.get("position_ids")
        logits = self.model.policy(
            states,
            attention_mask=self._mask(step) if self.padded else None,
            position_ids=position_ids,
            past_key_values=None if cache is None else self._policy_cache(cache),
            keep_last=1,
        )[:, -1]
        action_ids, log_probs, support = self.choice.choose(logits, step)
        self.action_ids.append(action_ids)
        self.log_probs.append(log_probs)
        if support is not None:
            self.supports.append(support)
        if self.keep_states:
            self.states.append(states)
            if position_ids is not None:
                self.position_ids.append(position_ids)
        merged = self.model.merge(states[:, -1:], self.model.codebook(action_ids)[:, None])
        if output.last_hidden_state.shape[1] > 1:
            merged = torch.cat([output.last_hidden_state[:, :-1], merged.to(output.last_hidden_state.dtype)], dim=1)
        output["last_hidden_state"] = merged.to(output.last_hidden_state.dtype)
        return output

    def _mask(self, step: int) -> torch.Tensor:
        return torch.cat([self.attention_mask, self.attention_mask.new_ones(len(self.attention_mask), step)], dim=1)

    def _policy_cache(self, cache: Cache) -> Cache:
        """The policy's own layers, kept behind the backbone's in the one cache that `generate` moves about."""
        config: PreTrainedConfig = self.model.policy.decoder_stack.decoder.config
        if self.cache_layers is None:
            if isinstance(cache, StaticCache):
                length = max(layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer))
                layers = StaticCache(config=config, max_cache_len=length).layers
            else:
                layers = DynamicCache(config=config).layers
            self.cache_layers = slice(len(cache.layers), len(cache.layers) + len(layers))
            cache.layers.extend(layers)
        return Cache(layers=cache.layers[self.cache_layers])

    def result(self, sequences: torch.Tensor, prompt_length: int) -> dict[str, torch.Tensor | None]:
        """What was recorded, cut to the completion's length."""
        length = sequences.shape[1] - prompt_length
        fields = {
            "action_ids": torch.stack(self.action_ids, dim=1)[:, :length],
            "action_log_probs": torch.stack(self.log_probs, dim=1)[:, :length],
            "action_support": torch.stack(self.supports, dim=1)[:, :length] if self.supports else None,
        }
        if self.keep_states:
            end = prompt_length + length - 1
            fields["context_states"] = torch.cat(self.states, dim=1)[:, :end]
            if self.position_ids:
                positions = torch.cat(self.position_ids, dim=-1)[..., :end]
                rows = len(sequences)
                if positions.ndim == 2:
                    positions = positions.expand(rows, -1)
                else:
                    positions = positions.expand(-1, rows, -1).transpose(0, 1)
                fields["position_ids"] = positions.contiguous()
        return fields
