"""Generation over codes: what happens inside the backbone's own `generate` between the states and the head."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .action_law import ActionLaw
from .arithmetic_sampling import ArithmeticSampler, even_points
from .cuda_graphs import GraphedCall, MixedStaticLayer, static_cache

POLICY_LAYERS = "latent_action_policy_layers"


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
        copies (`int`, defaults to `1`): Samples a prompt; rows are the whole batch so many times.
        arithmetic (`bool`, defaults to `False`): Draw the samples of a prompt together, see [`ArithmeticSampler`].
    """

    law: ActionLaw = field(default_factory=ActionLaw)
    do_sample: bool = True
    forced: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    generator: torch.Generator | None = None
    copies: int = 1
    arithmetic: bool = False
    allowed: torch.Tensor | None = field(init=False, default=None)
    sampler: ArithmeticSampler | None = field(init=False, default=None)

    def __post_init__(self):
        # Looked at once: to read a tensor's value at each token would make the device wait for the host.
        if self.bias is not None and torch.isneginf(self.bias).any():
            self.allowed = ~torch.isneginf(self.bias)

    def choose(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes `[B]`, their log-probabilities `[B]` and the support `[B, K]` for logits `[B, K]` of step `step`."""
        support = None
        if self.bias is not None:
            logits = logits + self.bias.to(logits)
        support = self.law.support(logits)
        if self.allowed is not None:
            allowed = self.allowed.to(logits.device).expand_as(logits)
            support = allowed if support is None else support & allowed
        log_probs = self.law.log_probs(logits, support)
        wanted = None
        if self.forced is not None and step < self.forced.shape[1]:
            wanted = self.forced[:, step].to(log_probs.device)
        if not self.do_sample:
            action_ids = log_probs.argmax(dim=-1)
        elif self.arithmetic and self.copies > 1:
            action_ids = self._draw_together(log_probs.exp(), wanted)
        else:
            action_ids = self._draw(log_probs.exp())
        if wanted is not None:
            action_ids = torch.where(wanted >= 0, wanted, action_ids)
        chosen = log_probs.gather(-1, action_ids.unsqueeze(-1)).squeeze(-1)
        return action_ids, chosen.masked_fill(torch.isneginf(chosen), 0.0), support

    def _draw(self, probs: torch.Tensor) -> torch.Tensor:
        """Codes `[B]`, drawn prompt by prompt though rows come in tiles: a seed gives the same samples either way."""
        by_prompt = probs.unflatten(0, (self.copies, -1)).transpose(0, 1).flatten(0, 1)
        # What `torch.multinomial` draws, without its look at the values, for which the host would wait.
        drawn = (by_prompt / torch.empty_like(by_prompt).exponential_(generator=self.generator)).argmax(dim=-1)
        return drawn.unflatten(0, (-1, self.copies)).transpose(0, 1).flatten()

    def _draw_together(self, probs: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        """Codes `[B]` of an arithmetic code, as long as samples of a prompt can still say the same."""
        if self.sampler is None:
            points = even_points(len(probs) // self.copies, self.copies, self.generator, probs.device)
            self.sampler = ArithmeticSampler(points.flatten(), self.copies)
        return self.sampler.draw(probs, self._draw(probs), None if wanted is None else wanted < 0)


class SharedPrefill:
    """
    Several samples of each prompt from one encoding of it.

    Rows are laid out in tiles, the whole batch `copies` times, so that what is counted by image and not by row stays
    in order. Where the cache can be copied, images are given once, the first call of the base model is cut to the
    first tile, and its cache is copied for the others.

    Args:
        rows (`int`): B, the number of prompts.
        copies (`int`): Samples a prompt.
        cache (`Cache`, *optional*): A fresh cache of the kind that will be used; `None` without one.
    """

    def __init__(self, rows: int, copies: int, cache: Cache | None):
        self.rows = rows
        self.copies = copies
        plain = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, MixedStaticLayer)
        self.once = copies > 1 and cache is not None and all(type(layer) in plain for layer in cache.layers)
        self.names = {"input_ids", "attention_mask", "position_ids"}
        self.pending = False

    def tiled(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor if self.copies == 1 else torch.cat([tensor] * self.copies, dim=dim)

    def tiled_inputs(self, inputs: dict, prompt_shape: torch.Size) -> dict:
        """`inputs` of B prompts for all tiles; where prompts are encoded once, images stay as they are."""
        out = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                if name == "position_ids":
                    out[name] = self.tiled(value, dim=-2) if value.shape[-2] == self.rows else value
                elif not self.once or value.shape == prompt_shape:
                    out[name] = self.tiled(value)
                    self.names.add(name)
        return out

    def in_tiles(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Rows that are given prompt by prompt, in the order of the tiles."""
        if tensor is None or self.copies == 1:
            return tensor
        return tensor.unflatten(0, (self.rows, self.copies)).transpose(0, 1).flatten(0, 1)

    def restore_order(self, output: LatentActionGenerateOutput) -> None:
        """Puts the samples of a prompt beside each other."""
        if self.copies == 1:
            return
        order = torch.arange(self.rows * self.copies, device=output.sequences.device)
        order = order.unflatten(0, (self.copies, self.rows)).transpose(0, 1).flatten()
        for name, value in list(output.items()):
            if isinstance(value, torch.Tensor):
                output[name] = value[order]
            elif isinstance(value, tuple):
                output[name] = tuple(part[order] for part in value)
            elif isinstance(value, Cache):
                value.reorder_cache(order)

    @contextmanager
    def attached(self, base: nn.Module) -> Iterator[None]:
        """Cuts the first call of `base` inside the block to the first tile, where prompts are encoded once."""
        if not self.once:
            yield
            return

        def cut(module, args, kwargs):
            handle.remove()
            self.pending = True
            by_row = {k: self._first_tile(v) for k, v in kwargs.items() if k in self.names}
            return tuple(ids[: self.rows] for ids in args), {**kwargs, **by_row}

        handle = base.register_forward_pre_hook(cut, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _first_tile(self, value: torch.Tensor | dict | None) -> torch.Tensor | dict | None:
        """Rows lie on the last axis but one, and on the first in the masks `[B, 1, P, L]` of a static cache."""
        if value is None:
            return None
        if isinstance(value, dict):
            return {name: self._first_tile(mask) for name, mask in value.items()}
        return value[: self.rows] if value.ndim == 4 else value[..., : self.rows, :]

    def copy_cache(self, cache: Cache) -> None:
        """Copies the first tile's cache for the others, once."""
        rows = torch.arange(self.rows).repeat(self.copies)
        for layer in cache.layers:
            layer.reorder_cache(rows)
            if isinstance(layer, StaticLayer):
                layer.batch_size = len(rows)
        self.pending = False


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
        shared (`SharedPrefill`): How several samples of a prompt share its encoding.
        cuda_graphs (`bool`, defaults to `False`): Replay the steps of text model and policy; needs a static cache.
    """

    def __init__(
        self,
        model,
        choice: ActionChoice,
        attention_mask: torch.Tensor,
        has_image: torch.Tensor,
        keep_states: bool,
        shared: SharedPrefill,
        cuda_graphs: bool = False,
    ):
        self.model = model
        self.choice = choice
        self.attention_mask = attention_mask
        self.padded = not bool(attention_mask.all())
        self.has_image = has_image
        self.keep_states = keep_states
        self.shared = shared
        self.cuda_graphs = cuda_graphs
        self.choose_from = GraphedCall(self._policy_step) if cuda_graphs else self._policy_step
        self.policy_cache: Cache | None = None
        self.action_ids: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []
        self.supports: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []
        self.position_ids: list[torch.Tensor] = []

    @contextmanager
    def attached(self, decoder: nn.Module) -> Iterator[None]:
        """Listens to `decoder` inside the block."""
        handle = decoder.register_forward_hook(self, with_kwargs=True)
        try:
            with GraphedCall(decoder.forward).instead_of_forward(decoder) if self.cuda_graphs else nullcontext():
                yield
        finally:
            handle.remove()

    def __call__(self, decoder: nn.Module, args, kwargs, output):
        step = len(self.action_ids)
        cache = output.past_key_values if output.past_key_values is not None else kwargs.get("past_key_values")
        if cache is None:
            self.states.clear()
            self.position_ids.clear()
        else:
            self._add_policy_layers(cache)
        hidden, position_ids = output.last_hidden_state, kwargs.get("position_ids")
        rows = len(hidden)
        mask = self._mask(step, rows, hidden.shape[1], kwargs.get("attention_mask"))
        states, logits = self.choose_from(hidden, self.has_image[:rows], mask, position_ids)
        last = states[:, -1:]
        if self.shared.pending:
            self.shared.copy_cache(cache)
            hidden, last, logits = hidden[:, -1:], self.shared.tiled(last), self.shared.tiled(logits)
            if self.keep_states:
                states = self.shared.tiled(states)
                if position_ids is not None and position_ids.shape[-2] == rows:
                    position_ids = self.shared.tiled(position_ids, dim=-2)
        action_ids, log_probs, support = self.choice.choose(logits, step)
        self.action_ids.append(action_ids)
        self.log_probs.append(log_probs)
        if support is not None:
            self.supports.append(support)
        if self.keep_states:
            self.states.append(states)
            if position_ids is not None:
                self.position_ids.append(position_ids)
        merged = self.model.merge(last, self.model.codebook(action_ids)[:, None]).to(hidden.dtype)
        if hidden.shape[1] > 1:
            merged = torch.cat([hidden[:, :-1], merged], dim=1)
        output["last_hidden_state"] = merged
        return output

    def _policy_step(self, hidden, has_image, mask, position_ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Context states `[B, n, d]` of the text model's states, and the policy's logits `[B, K]` of the last."""
        states = self.model.context_states(hidden, has_image)
        logits = self.model.policy(
            states,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.policy_cache,
            keep_last=1,
        )
        return states, logits[:, -1]

    def _mask(self, step: int, rows: int, length: int, of_text_model) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """What the policy attends to: of the prompt's length and the steps since, or of the whole static cache."""
        prepared = of_text_model.values() if isinstance(of_text_model, dict) else [of_text_model]
        if self.cuda_graphs and length == 1 and all(m is not None and m.dtype == torch.bool for m in prepared):
            # The text model's own, made for a cache of the same length and layers of the same kind.
            return of_text_model
        mask = None
        if self.padded:
            mask = self.attention_mask[:rows]
            mask = torch.cat([mask, mask.new_ones(rows, step)], dim=1)
        if not self.cuda_graphs or length > 1:
            return mask
        stack = self.model.policy.decoder_stack.decoder
        like = torch.empty(rows, 1, 0, dtype=stack.dtype, device=self.attention_mask.device)
        return create_masks_for_generate(stack.config, like, mask, self.policy_cache)

    def _add_policy_layers(self, cache: Cache) -> None:
        """Puts the policy's own layers behind the backbone's, in the one cache that `generate` moves about."""
        if self.policy_cache is not None:
            return
        config = self.model.policy.decoder_stack.decoder.config
        if POLICY_LAYERS not in vars(cache):
            if isinstance(cache, StaticCache):
                length = max(layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer))
                make = static_cache if self.cuda_graphs else StaticCache
                layers = make(config, length).layers
            else:
                layers = DynamicCache(config=config).layers
            setattr(cache, POLICY_LAYERS, slice(len(cache.layers), len(cache.layers) + len(layers)))
            cache.layers.extend(layers)
        self.policy_cache = Cache(layers=cache.layers[vars(cache)[POLICY_LAYERS]])

    def result(self, sequences: torch.Tensor, prompt_length: int) -> dict[str, torch.Tensor | None]:
        """What was recorded, cut to the completion's length; `FloatingPointError` where no code could be drawn."""
        length = sequences.shape[1] - prompt_length
        # Looked at once: to look at each step would make the device wait for the host.
        if torch.stack(self.log_probs).isnan().any():
            raise FloatingPointError("No code could be drawn: the policy's probabilities are not finite.")
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
