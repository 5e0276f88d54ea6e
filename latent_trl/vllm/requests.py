"""The requests in an engine's batch: how each one's codes are chosen."""

import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ..generation.arithmetic_sampling import ArithmeticSampler, random_orders
from ..generation.choice import draw, masked_law
from .settings import ActionSettings, check_sampling_params

# Under which the processor of an engine is found by its model.
REQUESTS = "latent_action_requests"


class ActionRow:
    """
    One request in the batch.

    Args:
        settings (`ActionSettings`): How its codes are chosen.
        bias (`torch.Tensor`, *optional*): `[K]`, added to its logits.
        first_image (`int`): Place of the first vision placeholder in its prompt; the prompt's length where none is.
        output_ids (`list[int]`): Its tokens so far; vLLM appends to this list.
    """

    def __init__(self, settings: ActionSettings, bias: torch.Tensor | None, first_image: int, output_ids: list[int]):
        self.settings = settings
        self.bias = bias
        self.first_image = first_image
        self.output_ids = output_ids

    @property
    def forced(self) -> int:
        """The code of this step, -1 where it is free."""
        step, forced = len(self.output_ids), self.settings.forced
        return forced[step] if step < len(forced) else -1


def __getattr__(name: str) -> type["ActionRequests"]:
    if not re.fullmatch(r"ActionRequests[0-9]+", name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (ActionRequests,), {"num_codes": int(name.removeprefix("ActionRequests"))})
    return globals().setdefault(name, made)


class ActionRequests(LogitsProcessor):
    """
    vLLM tells a logits processor which request is in which row of the batch. This one changes no logits: model and
    sampler ask it. `ActionRequests128` of this module is the one for 128 codes: requests are checked where no model is.

    Args:
        vllm_config (`VllmConfig`): Of an engine whose model has latent actions.
        device (`torch.device`), is_pin_memory (`bool`): As vLLM gives them.
    """

    num_codes: int

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.device = device
        self.vision_token_ids = set(vllm_config.model_config.hf_config.latent_action["vision_token_ids"])
        self.rows: dict[int, ActionRow] = {}
        # An arithmetic code's point and width. A request's own generator lives as long as the request, also where that
        # leaves the batch for a while.
        self.intervals: WeakKeyDictionary[torch.Generator, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()
        # Set by the model, which is made later.
        self.model: Any = None
        vllm_config.compilation_config.static_forward_context[REQUESTS] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_sampling_params(sampling_params, cls.num_codes)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._row)

    def _row(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> ActionRow:
        settings = ActionSettings.of(params.extra_args)
        prompt_ids = prompt_ids or []
        first = next((i for i, token in enumerate(prompt_ids) if token in self.vision_token_ids), len(prompt_ids))
        if first == len(prompt_ids):
            # No position of it has seen an image.
            first = 2**31 - 1
        bias = settings.bias_tensor(self.num_codes)
        return ActionRow(settings, None if bias is None else bias.to(self.device), first, output_ids)

    def first_images(self) -> torch.Tensor:
        """`[R]`, the first position of each row that has seen an image."""
        return torch.tensor([self.rows[i].first_image for i in range(len(self.rows))], device=self.device)

    def choose(
        self, logits: torch.Tensor, generators: Mapping[int, torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            logits (`torch.Tensor`): `[R, K]` of the policy.
            generators (`Mapping[int, torch.Generator]`): Of the rows that have a seed.

        Returns:
            Codes `[R]` and the log-probabilities of all codes `[R, K]`, float32. That of a code which was forced from
            outside of its law's support is 0.
        """
        rows = [self.rows[i] for i in range(len(logits))]
        log_probs = self._laws(rows, logits.float())
        action_ids = log_probs.argmax(dim=-1)
        sampled = [i for i, row in enumerate(rows) if row.settings.do_sample]
        if sampled:
            probs = log_probs[sampled].exp()
            noise = torch.empty_like(probs).exponential_()
            for place, i in enumerate(sampled):
                if i in generators:
                    noise[place].exponential_(generator=generators[i])
            action_ids[sampled] = draw(probs, noise)
        forced = torch.tensor([row.forced for row in rows], device=logits.device)
        self._draw_together(rows, log_probs, action_ids, forced < 0, generators)
        action_ids = torch.where(forced >= 0, forced, action_ids)
        chosen = log_probs.gather(-1, action_ids[:, None])
        return action_ids, log_probs.scatter(-1, action_ids[:, None], chosen.masked_fill(chosen.isneginf(), 0.0))

    def _laws(self, rows: list[ActionRow], logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[R, K]`, each row's of its own law."""
        biased = [i for i, row in enumerate(rows) if row.bias is not None]
        allowed = None
        if biased:
            bias = torch.zeros_like(logits)
            bias[biased] = torch.stack([rows[i].bias for i in biased])
            logits, allowed = logits + bias, ~bias.isneginf()
        laws: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            laws.setdefault(row.settings.law, []).append(i)
        log_probs = torch.empty_like(logits)
        for law, members in laws.items():
            log_probs[members] = masked_law(law, logits[members], None if allowed is None else allowed[members])[0]
        return log_probs

    def _draw_together(
        self,
        rows: list[ActionRow],
        log_probs: torch.Tensor,
        action_ids: torch.Tensor,
        free: torch.Tensor,
        generators: Mapping[int, torch.Generator],
    ) -> None:
        """Puts the codes of an arithmetic code in place in `action_ids`, which holds what samples that are alone take.
        Samples of a group may be at different steps, or in different engines: the order of a step's codes is drawn from
        the group's seed and the step."""
        sizes: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if row.settings.group is not None:
                sizes.setdefault(row.settings.group.size, []).append(i)
        for size, members in sizes.items():
            intervals = [self._interval(rows[i], generators[i], log_probs) for i in members]
            sampler = ArithmeticSampler(torch.stack([point for point, _ in intervals]), size)
            sampler.width = torch.stack([width for _, width in intervals])
            orders = torch.stack([self._order(rows[i], log_probs.shape[-1]) for i in members]).to(log_probs.device)
            action_ids[members] = sampler.draw(log_probs[members].exp(), orders, action_ids[members], free[members])
            for place, i in enumerate(members):
                self.intervals[generators[i]] = (sampler.points[place], sampler.width[place])

    def _interval(
        self, row: ActionRow, generator: torch.Generator, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if generator not in self.intervals:
            return like.new_tensor(row.settings.group.point), like.new_tensor(1.0)
        return self.intervals[generator]

    @staticmethod
    def _order(row: ActionRow, codes: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((row.settings.group.seed * 1_000_003 + len(row.output_ids)) % 2**63)
        return random_orders(1, codes, generator, "cpu")[0]
