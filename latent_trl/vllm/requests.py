"""The requests in an engine's batch: how each one's codes are chosen."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ..generation.action_law import ActionLaw
from ..generation.arithmetic_sampling import ArithmeticSampler, random_orders
from ..generation.choice import draw, masked_law
from ..generation.likeliest_token import codes_of_likeliest_tokens, of_some
from .settings import ActionSettings, check_sampling_params

# A prime, so that seeds and parts do not meet.
STRIDE = 1_000_003
# Random numbers that are drawn at once for a seed: those of the next steps too.
AT_ONCE = 8192
# Intervals of arithmetic codes that are remembered, as a multiple of the rows of a batch. Of a request that has waited
# for longer than so many others took, what follows is drawn by itself, under the same law.
REMEMBERED = 64

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
        min_tokens (`int`, defaults to `0`), ends (`Iterable[int]`): So many tokens are none of those that end it.
    """

    def __init__(
        self,
        settings: ActionSettings,
        bias: torch.Tensor | None,
        first_image: int,
        output_ids: list[int],
        min_tokens: int = 0,
        ends: Iterable[int] = (),
    ):
        self.settings = settings
        self.bias = bias
        self.first_image = first_image
        self.output_ids = output_ids
        self.min_tokens, self.ends = min_tokens, sorted(ends)
        self.noise = None if settings.seed is None else Draws(settings.seed, _exponential)

    @property
    def forced(self) -> int:
        """The code of this step, -1 where it is free."""
        step, forced = len(self.output_ids), self.settings.forced
        return forced[step] if step < len(forced) else -1

    @property
    def forbidden(self) -> list[int]:
        """Tokens that no code says at this step."""
        return self.ends if len(self.output_ids) < self.min_tokens else []


class Draws:
    """
    What a seed draws, step by step: a function of seed and step, so that no state is lost where a request leaves the
    batch. Steps are drawn many at a time.

    Args:
        seed (`int`): The seed.
        draw (`Callable`): From steps, codes and a generator to a tensor `[steps, codes]`.
    """

    def __init__(self, seed: int, draw: Callable[[int, int, torch.Generator], torch.Tensor]):
        self.seed, self.draw = seed, draw
        self.part, self.drawn = -1, torch.empty(0)

    def __call__(self, step: int, codes: int) -> torch.Tensor:
        """`[codes]`"""
        size = max(1, AT_ONCE // codes)
        part = step // size
        if part != self.part:
            generator = torch.Generator().manual_seed((self.seed * STRIDE + part) % 2**63)
            self.part, self.drawn = part, self.draw(size, codes, generator)
        return self.drawn[step % size]


def _exponential(steps: int, codes: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(steps, codes).exponential_(generator=generator)


def _orders(steps: int, codes: int, generator: torch.Generator) -> torch.Tensor:
    return random_orders(steps, codes, generator, "cpu")


class Batch:
    """
    What the rows of a batch want, sorted out once, as long as they are the same.

    Args:
        rows (`list[ActionRow]`): All of them.
        orders (`dict[int, Draws]`): Of the groups of the batch before, by their seeds.
    """

    def __init__(self, rows: list[ActionRow], orders: dict[int, Draws]):
        self.rows = rows
        self.greedy = [i for i, row in enumerate(rows) if not row.settings.do_sample]
        self.sampled = [i for i, row in enumerate(rows) if row.settings.do_sample]
        # Places among those, and what is drawn there.
        self.seeded: dict[int, Draws] = {}
        for place, i in enumerate(self.sampled):
            noise = rows[i].noise
            if noise is not None:
                self.seeded[place] = noise
        self.biased = [i for i, row in enumerate(rows) if row.bias is not None]
        self.forces = any(row.settings.forced for row in rows)
        self.laws: dict[ActionLaw, list[int]] = {}
        # Members of arithmetic codes, by the size of their groups, and in which order the codes of a step lie.
        self.groups: dict[int, list[int]] = {}
        self.orders: dict[int, Draws] = {}
        for i, row in enumerate(rows):
            self.laws.setdefault(row.settings.law, []).append(i)
            if row.settings.group is not None:
                seed = row.settings.group.seed
                self.groups.setdefault(row.settings.group.size, []).append(i)
                # Not the numbers that the group's first sample draws once it is alone.
                self.orders[seed] = self.orders.get(seed) or orders.get(seed) or Draws(seed + 1, _orders)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[R, K]`, each row's of its own law."""
        allowed = None
        if self.biased:
            bias = torch.zeros_like(logits)
            bias[self.biased] = torch.stack([self.rows[i].bias for i in self.biased])
            logits, allowed = logits + bias, ~bias.isneginf()
        if len(self.laws) == 1:
            return masked_law(self.rows[0].settings.law, logits, allowed)[0]
        log_probs = torch.empty_like(logits)
        for law, members in self.laws.items():
            log_probs[members] = masked_law(law, logits[members], None if allowed is None else allowed[members])[0]
        return log_probs

    def noise(self, probs: torch.Tensor) -> torch.Tensor:
        """Exponential noise for the rows that are sampled, of their seeds where they have one."""
        whole = len(self.seeded) == len(self.sampled)
        noise = torch.empty_like(probs) if whole else torch.empty_like(probs).exponential_()
        if self.seeded:
            steps = [len(self.rows[self.sampled[place]].output_ids) for place in self.seeded]
            drawn = [draws(step, probs.shape[-1]) for draws, step in zip(self.seeded.values(), steps, strict=True)]
            noise[list(self.seeded)] = torch.stack(drawn).to(probs.device)
        return noise


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
        # Point and width of an arithmetic code at a step, by the group's seed, the row's point and the step. A request
        # may leave the batch for a while, and what is drawn for a prompt that was read in part is thrown away: so a
        # step's interval stays until the next step's is made, and then it is of no more use.
        self.intervals: OrderedDict[tuple[int, float, int], tuple[float, float]] = OrderedDict()
        self.remembered = REMEMBERED * vllm_config.scheduler_config.max_num_seqs
        self.batch: Batch | None = None
        self.orders: dict[int, Draws] = {}
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
        if batch_update:
            self.batch = None

    def _row(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> ActionRow:
        settings = ActionSettings.of(params.extra_args)
        prompt_ids = prompt_ids or []
        first = next((i for i, token in enumerate(prompt_ids) if token in self.vision_token_ids), len(prompt_ids))
        if first == len(prompt_ids):
            # No position of it has seen an image.
            first = 2**31 - 1
        bias = settings.bias_tensor(self.num_codes)
        bias = None if bias is None else bias.to(self.device)
        return ActionRow(settings, bias, first, output_ids, params.min_tokens, params.all_stop_token_ids)

    def first_images(self) -> torch.Tensor:
        """`[R]`, the first position of each row that has seen an image."""
        return torch.tensor([self.rows[i].first_image for i in range(len(self.rows))], device=self.device)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            logits (`torch.Tensor`): `[R, K]` of the policy.

        Returns:
            Codes `[R]` and the log-probabilities of all codes `[R, K]`, float32. That of a code which was forced from
            outside of its law's support is 0.
        """
        if self.batch is None or len(self.batch.rows) != len(logits):
            self.batch = Batch([self.rows[i] for i in range(len(logits))], self.orders)
            self.orders = self.batch.orders
        batch = self.batch
        log_probs = batch.log_probs(logits.float())
        forced = torch.tensor([row.forced for row in batch.rows], device=logits.device) if batch.forces else None
        action_ids = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        greedy = [i for i in batch.greedy if batch.rows[i].forced < 0] if batch.forces else batch.greedy
        if greedy:
            rows = torch.tensor(greedy, device=logits.device)
            action_ids[rows] = codes_of_likeliest_tokens(log_probs[rows], of_some(self._says, rows))
        if batch.sampled:
            probs = log_probs if len(batch.sampled) == len(logits) else log_probs[batch.sampled]
            action_ids[batch.sampled] = draw(probs.exp(), batch.noise(probs))
        self._draw_together(batch, log_probs, action_ids, None if forced is None else forced < 0)
        if forced is not None:
            action_ids = torch.where(forced >= 0, forced, action_ids)
        chosen = log_probs.gather(-1, action_ids[:, None])
        return action_ids, log_probs.scatter(-1, action_ids[:, None], chosen.masked_fill(chosen.isneginf(), 0.0))

    def _says(self, rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        never = [self.rows[i].forbidden for i in rows.tolist()]
        return self.model.said_tokens(rows, codes, never)

    def _draw_together(
        self, batch: "Batch", log_probs: torch.Tensor, action_ids: torch.Tensor, free: torch.Tensor | None
    ) -> None:
        """Puts the codes of an arithmetic code in place in `action_ids`, which holds what samples that are alone take.
        Samples of a group may be at different steps, or in different engines: the order of a step's codes is drawn from
        the group's seed and the step."""
        codes, device = log_probs.shape[-1], log_probs.device
        for size, members in batch.groups.items():
            rows = [batch.rows[i] for i in members]
            intervals = log_probs.new_tensor([self._interval(row) for row in rows])
            sampler = ArithmeticSampler(intervals[:, 0], size)
            sampler.width = intervals[:, 1]
            orders = [batch.orders[row.settings.group.seed](len(row.output_ids), codes) for row in rows]
            probs, own = log_probs[members].exp(), None if free is None else free[members]
            action_ids[members] = sampler.draw(probs, torch.stack(orders).to(device), action_ids[members], own)
            for row, *interval in zip(rows, sampler.points.tolist(), sampler.width.tolist(), strict=True):
                self._remember(row, tuple(interval))

    def _interval(self, row: ActionRow) -> tuple[float, float]:
        group, step = row.settings.group, len(row.output_ids)
        if step == 0:
            return group.point, 1.0
        self.intervals.pop((group.seed, group.point, step - 1), None)
        # Of width 0 it has nobody beside it.
        return self.intervals.get((group.seed, group.point, step), (group.point, 0.0))

    def _remember(self, row: ActionRow, interval: tuple[float, float]) -> None:
        key = (row.settings.group.seed, row.settings.group.point, len(row.output_ids) + 1)
        self.intervals[key] = interval
        self.intervals.move_to_end(key)
        while len(self.intervals) > self.remembered:
            self.intervals.popitem(last=False)
