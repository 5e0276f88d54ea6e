"""What happens inside the backbone's own `generate` between the states and the head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_masks_for_generate

from .cache_name import CACHE_NAME
from .choice import ActionChoice
from .cuda_graphs import GraphedCall, static_cache
from .ended_rows import EndedRows
from .likeliest_token import Says
from .row_choices import RowChoices
from .shared_prefill import SharedPrefill

POLICY_LAYERS = "latent_action_policy_layers"


class RolloutHook:
    """
    Forward hook of the text model during one `generate` call.

    At each call it turns the new states into context states, runs the policy over them, chooses a code for the last
    position and puts the merged vector where the head will read. Everything stays on the device.

    Args:
        model (`LatentActionModel`): Whose components are run.
        choice (`ActionChoice` or `RowChoices`): How codes are chosen.
        attention_mask (`torch.Tensor`): `[B, P]` of the prompts, one row per generated sequence.
        has_image (`torch.Tensor`): Boolean `[B, P]`, whether the prompt has an image at or before a position.
        keep_states (`bool`): Whether context states are kept.
        shared (`SharedPrefill`): How several samples of a prompt share its encoding.
        ended (`EndedRows`): Which rows are in the forward.
        forbidden (`Callable`): From a step to the tokens that no code says there.
        synced (`bool`): Whether processes share the layers, so that each has to run them as often as the others.
        cuda_graphs (`bool`, defaults to `False`): Replay the steps of text model and policy; needs a static cache.
    """

    def __init__(
        self,
        model,
        choice: ActionChoice | RowChoices,
        attention_mask: torch.Tensor,
        has_image: torch.Tensor,
        keep_states: bool,
        shared: SharedPrefill,
        ended: EndedRows,
        forbidden: Callable[[int], list[int]],
        synced: bool,
        cuda_graphs: bool = False,
    ):
        self.model = model
        self.choice = choice
        self.attention_mask = attention_mask
        self.padded = not bool(attention_mask.all())
        self.has_image = has_image
        self.keep_states = keep_states
        self.shared = shared
        self.ended = ended
        self.forbidden = forbidden
        self.synced = synced
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
        if self.ended.paused:
            return output
        step = len(self.action_ids)
        cache = output.get(CACHE_NAME)
        cache = kwargs.get(CACHE_NAME) if cache is None else cache
        if cache is None:
            self.states.clear()
            self.position_ids.clear()
        else:
            self._add_policy_layers(cache)
        hidden, position_ids = output.last_hidden_state, kwargs.get("position_ids")
        rows = len(hidden)
        mask = self._mask(step, rows, hidden.shape[1], kwargs.get("attention_mask"))
        states, logits = self.choose_from(hidden, self._seen(step, rows, hidden.shape[1]), mask, position_ids)
        last = states[:, -1:]
        if self.shared.pending:
            self.shared.copy_cache(cache)
            hidden, last, logits = hidden[:, -1:], self.shared.tiled(last), self.shared.tiled(logits)
            if self.keep_states:
                states = self.shared.tiled(states)
                if position_ids is not None and position_ids.shape[-2] == rows:
                    position_ids = self.shared.tiled(position_ids, dim=-2)
        says = self._says(last[:, 0], step) if self.choice.greedy else None
        action_ids, log_probs, support = self.choice.choose(self.ended.of_all(logits), step, says)
        self.action_ids.append(action_ids)
        self.log_probs.append(log_probs)
        if support is not None:
            self.supports.append(support)
        if self.keep_states:
            self.states.append(self.ended.of_all(states))
            if position_ids is not None:
                one_for_all = bool(self.position_ids) and self.position_ids[0].shape[-2] == 1
                self.position_ids.append(position_ids if one_for_all else self.ended.of_all(position_ids, dim=-2))
        codes = self.model.codebook(self.ended.of_present(action_ids))
        merged = self.model.merge(last, codes[:, None]).to(hidden.dtype)
        if hidden.shape[1] > 1:
            merged = torch.cat([hidden[:, :-1], merged], dim=1)
        output["last_hidden_state"] = merged
        return output

    def _says(self, states: torch.Tensor, step: int) -> Says:
        """What codes say in the last `states` `[A, d]` of the rows that are present; nothing is read for the others."""
        never, device = self.forbidden(step), states.device
        # Of each row its place among those that are present, -1 where it is not.
        all_places = self.ended.of_all(torch.arange(1, len(states) + 1, device=device)) - 1
        table = self._said_by_all(states, never) if self.synced else None

        def says(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
            tokens, places = torch.zeros_like(codes), all_places[rows]
            here = (places >= 0).nonzero().squeeze(-1)
            if table is not None:
                tokens[here] = table[places[here]].gather(-1, codes[here])
            elif len(here):
                # The head may be read through the backbone's own forward.
                with self.ended.pause():
                    tokens[here] = self.model.said_tokens(states[places[here]], codes[here], never)
            return tokens

        return says

    def _said_by_all(self, states: torch.Tensor, never: list[int]) -> torch.Tensor:
        """What all codes say `[A, K]`, by one pass of the head for each, whatever the rows are."""
        codes = torch.arange(self.model.config.num_codes, device=states.device).expand(len(states), -1)
        with self.ended.pause():
            said = [self.model.said_tokens(states, code, never, at_once=True) for code in codes.split(1, dim=1)]
        return torch.cat(said, dim=1)

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

    def _seen(self, step: int, rows: int, length: int) -> torch.Tensor:
        """`has_image` `[rows, length]` of the new states: no placeholder is generated, so it stays what it came to."""
        last = self.ended.of_present(self.has_image[:, -1:])[:rows]
        if length == 1:
            return last
        return torch.cat([self.has_image[:rows], last.expand(-1, step)], dim=1)[:, -length:]

    def _mask(self, step: int, rows: int, length: int, of_text_model) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """What the policy attends to: of the prompt's length and the steps since, or of the whole static cache."""
        prepared = of_text_model.values() if isinstance(of_text_model, dict) else [of_text_model]
        if self.cuda_graphs and length == 1 and all(m is not None and m.dtype == torch.bool for m in prepared):
            # The text model's own, made for a cache of the same length and layers of the same kind.
            return of_text_model
        mask = None
        if self.padded:
            mask = self.ended.of_present(self.attention_mask)[:rows]
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
            # A state-space model has none, whatever its cache is called.
            lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
            if isinstance(cache, StaticCache) and lengths:
                make = static_cache if self.cuda_graphs else StaticCache
                layers = make(config, max(lengths)).layers
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
