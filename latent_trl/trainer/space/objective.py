"""Losses of the stages that learn the latent action space, and the figures that tell a healthy codebook."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...models.cross_entropy import global_mean, token_cross_entropy
from ...models.spoken import next_token_entropy, spoken_tokens
from .backbone_cloning import backbone_codes
from .coverage import coverage_losses

# Logits are divided by it in the balance term.
BALANCE_TEMPERATURE = 0.25
CLONING_TARGETS = ("backbone", "inferred")
# Nats: positions at which the backbone is sure are cloned too, now and then.
LEAST_UNCERTAINTY = 0.05
STAGE_COMPONENTS = {
    "inverse_dynamics": ("inverse_dynamics", "codebook", "world_model"),
    "projector": ("projector",),
    "joint": ("inverse_dynamics", "codebook", "world_model", "projector"),
    "policy": ("policy",),
}
STAGE_NEEDS = {"inverse_dynamics": (), "projector": (), "joint": ("inverse_dynamics",), "policy": ("inverse_dynamics",)}
_ACTION_FIGURES = (
    *("world_model/ce_sampled", "world_model/ce", "world_model/ce_gap_no_action", "world_model/ce_gap_random_action"),
    *("codebook/marginal_entropy", "codebook/conditional_entropy", "codebook/mutual_information"),
    *("codebook/distinct_next_tokens", "codebook/coverage"),
)
# The same on every process, whatever its rows: the figures are summed over the processes.
STAGE_FIGURES = {
    "inverse_dynamics": _ACTION_FIGURES,
    "projector": ("projector/nll",),
    "joint": (*_ACTION_FIGURES, "projector/nll", "projector/cycle"),
    "policy": (
        *("policy/cloning_accuracy", "policy/cloning_loss", "policy/entropy"),
        *("policy/backbone_kl", "policy/reachable"),
    ),
}


@dataclass
class Observation:
    """What the frozen backbone makes of a batch: states, positions, and which states have seen an image `[B, L]`."""

    states: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor
    has_image: torch.Tensor


class LatentActionSpaceObjective:
    """
    The loss of one stage, called with the model and a batch of [`LatentActionDataCollator`].

    Args:
        stage (`str`): `inverse_dynamics`, `projector`, `joint` or `policy`.
        entropy_coef (`float`): Weight of Σ p log p of each position's code distribution.
        balance_coef (`float`): Weight of Σ p̄ log p̄ of the batch's mean sharpened distribution.
        coverage_coef (`float`): Weight of the cross-entropies of the backbone's likely tokens, each under its own code.
        coverage_positions (`int`), coverage_tokens (`int`), coverage_min_prob (`float`): Positions of each row that it
            reads, tokens of each at most, and the least probability of a token.
        projection_coef (`float`), cycle_coef (`float`): Weights of the projector's two losses in `joint`.
        cloning_target (`str`): What `policy` imitates: the `"backbone"`, or the codes `"inferred"` by the inverse
            dynamics model.
        cloning_positions (`int`): Positions of each row that are cloned from the backbone.
        health_positions (`int`): Positions on which the gaps to no code and to random codes are measured, where
            `measure_gaps` is set.
        seed (`int`): Gumbel noise and random codes are a function of it, `step` and a row's place in the batch of all
            processes: neither their number nor an interruption changes them.
        kinds (`int`): 2 when the second half of a batch are text-only rows beside the paired ones, else 1.
        processes (`int`), process_index (`int`): Of the run.
        average (`Callable`, *optional*): Averages a tensor over the processes.
    """

    def __init__(
        self,
        stage: str,
        entropy_coef: float = 1e-3,
        balance_coef: float = 0.1,
        projection_coef: float = 1e-5,
        cycle_coef: float = 1e-5,
        coverage_coef: float = 0.0,
        coverage_positions: int = 2,
        coverage_tokens: int = 8,
        coverage_min_prob: float = 0.005,
        cloning_target: str = "backbone",
        cloning_positions: int = 4,
        health_positions: int = 512,
        seed: int = 0,
        kinds: int = 1,
        processes: int = 1,
        process_index: int = 0,
        average: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.stage = stage
        self.entropy_coef = entropy_coef
        self.balance_coef = balance_coef
        self.projection_coef = projection_coef
        self.cycle_coef = cycle_coef
        self.coverage_coef = coverage_coef
        self.coverage_positions = coverage_positions
        self.coverage_tokens = coverage_tokens
        self.coverage_min_prob = coverage_min_prob
        self.cloning_target = cloning_target
        self.cloning_positions = cloning_positions
        self.health_positions = health_positions
        self.seed = seed
        self.kinds = kinds
        self.processes = processes
        self.process_index = process_index
        self.average = average if processes > 1 else None
        # The optimizer step, and the batch within it, that the next call is for.
        self.step = (0, 0)
        # Whether the next call also reads other codes than the chosen ones: as dear as the loss, so not at every step.
        self.measure_gaps = True
        # Sum and number of the figures since they were last logged; usage of codes since then, and since a revival.
        self.sums: torch.Tensor | None = None
        self.usage: torch.Tensor | None = None
        self.revival_usage: torch.Tensor | None = None
        self.some_states: torch.Tensor | None = None

    def __call__(self, model, batch: dict[str, Any]) -> torch.Tensor:
        if self.sums is None:
            self._clear(model.config.num_codes, batch["input_ids"].device)
        observation = self._observe(model, batch)
        if self.stage == "policy":
            return self._cloning_loss(model, batch, observation)
        loss = observation.states.new_zeros((), dtype=torch.float32)
        if self.stage == "projector" or (self.stage == "joint" and model.config.use_projector):
            loss = loss + self._projector_loss(model, batch, observation)
        if self.stage in ("inverse_dynamics", "joint"):
            loss = loss + self._action_loss(model, batch, observation)
        return loss

    def _clear(self, num_codes: int, device: torch.device) -> None:
        self.sums = torch.zeros(len(STAGE_FIGURES[self.stage]), 2, device=device)
        self.usage = torch.zeros(num_codes, device=device)
        if self.revival_usage is None:
            self.revival_usage = self.usage.clone()

    def _random(self, device: torch.device, *place: int) -> torch.Generator:
        """A generator of its own for a place: kind of row and index in the batch of all processes."""
        seed = np.random.SeedSequence([self.seed, *self.step, *place]).generate_state(1, np.uint64)[0]
        # Half the range is what every device's generator takes.
        return torch.Generator(device=device).manual_seed(int(seed >> np.uint64(1)))

    def _choose(self, model, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Code vectors `[M, d]` of the noisy choice at the marked positions, each row with its own noise."""
        codes = []
        for row, part in enumerate(logits.split(mask.sum(dim=1).tolist())):
            generator = self._random_of_row(logits.device, row, len(mask))
            codes.append(model.codebook.straight_through(part, model.config.gumbel_temperature, generator)[0])
        return torch.cat(codes)

    def _random_of_row(self, device: torch.device, row: int, rows: int, *more: int) -> torch.Generator:
        items = rows // self.kinds
        return self._random(device, row // items, self.process_index * items + row % items, *more)

    def _mean(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return global_mean(values, mask, self.average)

    @torch.no_grad()
    def _observe(self, model, batch: dict[str, Any]) -> Observation:
        call = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
        has_image = model.has_image(batch["input_ids"])
        return Observation(call.states.detach(), call.position_ids, batch["attention_mask"], has_image)

    def _context(self, model, observation: Observation) -> torch.Tensor:
        """s without gradient: cross-entropy never trains the projector."""
        with torch.no_grad():
            return model.context_states(observation.states, observation.has_image).detach()

    def _action_loss(self, model, batch, observation) -> torch.Tensor:
        states = self._context(model, observation)
        logits = model.infer(states, batch["input_ids"], observation.attention_mask, observation.position_ids)
        mask = batch["loss_mask"][:, 1:]
        targets = batch["input_ids"][:, 1:][mask]
        logits, inputs = logits[mask], states[:, :-1][mask]
        codes = self._choose(model, logits, mask)
        losses = token_cross_entropy(model, model.merge(inputs, codes), targets)
        image_rows = batch["has_image"][:, None].expand_as(mask)[mask]
        probs = logits.softmax(dim=-1)
        penalised = losses + self.entropy_coef * (probs * probs.clamp(min=1e-12).log()).sum(-1)
        loss = self._mean(penalised, image_rows) + self._mean(penalised, ~image_rows)
        # Sharpened, it speaks of the codes that are taken: the plain mean can be even while few are ever the arg-max.
        sharp = (logits / BALANCE_TEMPERATURE).softmax(dim=-1)
        marginal = self._marginal(sharp)
        loss = loss + self.balance_coef * (marginal * marginal.clamp(min=1e-12).log()).sum()
        if self.coverage_coef:
            loss = loss + self.coverage_coef * self._coverage_loss(model, batch, states, observation)
        self._add("world_model/ce_sampled", losses)
        self._health(model, inputs, logits, targets)
        self.some_states = inputs[:1024]
        return loss

    def _coverage_loss(self, model, batch, states, observation) -> torch.Tensor:
        # Not by the numbers that the choice of codes is made with.
        mask = self._draw_uncertain(model, observation, batch["loss_mask"][:, 1:], self.coverage_positions, 1)
        losses, said = coverage_losses(
            model,
            states[:, :-1][mask],
            observation.states[:, :-1][mask],
            self.coverage_tokens,
            self.coverage_min_prob,
        )
        self._add("codebook/coverage", said)
        return self._mean(losses, torch.ones_like(said))

    def _marginal(self, probs: torch.Tensor) -> torch.Tensor:
        """Mean distribution `[K]` over the positions of all processes; the gradient goes through the own ones."""
        total, count = probs.sum(dim=0), probs.new_tensor(float(len(probs)))
        if self.average is not None:
            own, count = total, self.average(count)
            # The processes' gradients are averaged, so that of the own positions counts in full.
            total = self.average(own.detach()) + (own - own.detach())
        return total / torch.where(count > 0, count, 1.0)

    def _projector_loss(self, model, batch, observation) -> torch.Tensor:
        """Both projectors on samples with and without their image, and the cycle on samples that have none."""
        projector, has_image = model.projector, batch["has_image"]
        text_states = observation.states
        rows = has_image.nonzero().squeeze(-1)
        if len(rows):
            text_states = text_states.clone()
            text_states[rows] = self._without_image(model, batch, observation, rows)
        elif self.processes > 1:
            # A sharded backbone gathers its tensors on all processes together: each makes as many passes.
            self._without_image(model, batch, observation, rows.new_zeros(1))
        token_mask = batch["token_mask"]
        paired = (token_mask & has_image[:, None])[token_mask]
        kept_text, kept_image = text_states[token_mask], observation.states[token_mask]
        nlls = projector.paired_nll(kept_text, kept_image)
        self._add("projector/nll", nlls[paired])
        nll = self._mean(nlls, paired)
        if self.stage == "projector":
            return nll
        cycles = projector.cycle_nll(kept_text)
        self._add("projector/cycle", cycles[~paired])
        cycle = self._mean(cycles, ~paired)
        return self.projection_coef * nll + self.cycle_coef * cycle

    @torch.no_grad()
    def _without_image(self, model, batch, observation, rows: torch.Tensor) -> torch.Tensor:
        """h^T of paired rows: the same ids at the same positions, without pixels."""
        position_ids = observation.position_ids
        if position_ids is not None:
            axis = position_ids.ndim - 2
            if position_ids.shape[axis] != 1:
                position_ids = position_ids.index_select(axis, rows)
        # Token types stay: some backbones lay out their attention by them.
        shape = batch["input_ids"].shape
        fields = {k: v[rows] for k, v in batch["vision"].items() if v.shape == shape}
        call = model.backbone_view.encode(
            batch["input_ids"][rows], batch["attention_mask"][rows], position_ids=position_ids, **fields
        )
        return call.states

    def _cloning_loss(self, model, batch, observation) -> torch.Tensor:
        states = self._context(model, observation)
        mask = batch["loss_mask"][:, 1:]
        logits = model.policy(states, observation.attention_mask, observation.position_ids)[:, :-1]
        if self.cloning_target == "backbone":
            mask = self._draw_uncertain(model, observation, mask, self.cloning_positions)
            inputs, of_backbone = states[:, :-1][mask], observation.states[:, :-1][mask]
            wanted, kl, reachable = backbone_codes(model, inputs, of_backbone, logits[mask].softmax(dim=-1))
            best = wanted.argmax(dim=-1)
        else:
            with torch.no_grad():
                wanted = model.infer(states, batch["input_ids"], observation.attention_mask, observation.position_ids)
                wanted = best = wanted.argmax(dim=-1)[mask]
        logits = logits[mask]
        losses = F.cross_entropy(logits, wanted, reduction="none")
        image_rows = batch["has_image"][:, None].expand_as(mask)[mask]
        self._add("policy/cloning_accuracy", logits.argmax(dim=-1) == best)
        self._add("policy/cloning_loss", losses)
        self._add("policy/entropy", _entropy(logits.detach().softmax(dim=-1)))
        if self.cloning_target == "backbone":
            self._add("policy/backbone_kl", kl)
            self._add("policy/reachable", reachable)
        return self._mean(losses, image_rows) + self._mean(losses, ~image_rows)

    @torch.no_grad()
    def _draw_uncertain(self, model, observation, mask: torch.Tensor, positions: int, *more: int) -> torch.Tensor:
        """`mask` `[B, L-1]` thinned to so many `positions` of each row, likelier where the backbone is less sure."""
        weights = mask.float()
        weights[mask] = next_token_entropy(model, observation.states[:, :-1][mask]) + LEAST_UNCERTAINTY
        drawn = torch.zeros_like(mask)
        for row, count in enumerate(mask.sum(dim=1).clamp(max=positions).tolist()):
            if count:
                generator = self._random_of_row(mask.device, row, len(mask), *more)
                drawn[row, torch.multinomial(weights[row], count, generator=generator)] = True
        return drawn

    @torch.no_grad()
    def _health(self, model, states: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Figures on noise-free arg-max codes. Usage counts alone can look well while no code changes the output."""
        if not len(targets):
            return
        num_codes = logits.shape[-1]
        action_ids = logits.argmax(dim=-1)
        usage = torch.bincount(action_ids, minlength=num_codes).float()
        self.usage += usage
        self.revival_usage += usage
        probs = logits.softmax(dim=-1)
        self._add("codebook/marginal_entropy", _entropy(probs.mean(dim=0, keepdim=True)))
        self._add("codebook/conditional_entropy", _entropy(probs))
        self._add("codebook/mutual_information", mutual_information(action_ids, targets, num_codes)[None])
        if not self.measure_gaps:
            return
        generator = self._random(states.device, self.kinds, self.process_index)
        sample = torch.randperm(len(targets), generator=generator, device=states.device)[: self.health_positions]
        states, targets, action_ids = states[sample], targets[sample], action_ids[sample]
        random_ids = torch.randint(num_codes, action_ids.shape, generator=generator, device=states.device)
        ce = self._ce(model, states, action_ids, targets)
        plain = token_cross_entropy(model, states, targets)
        self._add("world_model/ce", ce)
        self._add("world_model/ce_gap_no_action", plain - ce)
        self._add("world_model/ce_gap_random_action", self._ce(model, states, random_ids, targets) - ce)
        self._add("codebook/distinct_next_tokens", distinct_next_tokens(model, states[:8]))

    def _ce(self, model, states, action_ids, targets) -> torch.Tensor:
        return token_cross_entropy(model, model.merge(states, model.codebook(action_ids)), targets)

    @torch.no_grad()
    def revive(self, model) -> None:
        """Moves codes that no position has chosen since the last call to where states of this process are."""
        if self.some_states is None:
            return
        usage = self.revival_usage if self.average is None else self.average(self.revival_usage)
        # A batch whose update was skipped may have left others.
        states = self.some_states[self.some_states.isfinite().all(dim=-1)]
        model.codebook.revive(usage == 0, states, self._random(usage.device, self.kinds + 1, 0))
        self.revival_usage.zero_()

    def _add(self, name: str, values: torch.Tensor) -> None:
        """Counts `values` `[M]` into a figure's mean."""
        row = self.sums[STAGE_FIGURES[self.stage].index(name)]
        row += torch.stack([values.detach().float().sum(), row.new_tensor(float(len(values)))])

    def drain(self) -> dict[str, float]:
        """Means of the figures, and the usage of codes, over all processes since the last call."""
        if self.sums is None:
            return {}
        sums, usage = self.sums, self.usage
        if self.average is not None:
            sums, usage = self.average(sums), self.average(usage)
        figures = {
            name: (total / count).item()
            for name, (total, count) in zip(STAGE_FIGURES[self.stage], sums, strict=True)
            if count > 0
        }
        if usage.sum() > 0:
            figures["codebook/used"] = float((usage > 0).sum())
            figures["codebook/perplexity"] = _entropy(usage / usage.sum()).exp().item()
        self._clear(len(usage), usage.device)
        return figures

    def state(self) -> dict[str, Any]:
        """What has been counted since the last log, as plain JSON values."""
        tensors = {"sums": self.sums, "usage": self.usage, "revival_usage": self.revival_usage}
        return {name: None if tensor is None else tensor.tolist() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Puts back what [`state`] gave."""
        for name, values in state.items():
            setattr(self, name, None if values is None else torch.tensor(values, device=device))


def _entropy(probs: torch.Tensor) -> torch.Tensor:
    return -(probs * probs.clamp(min=1e-12).log()).sum(dim=-1)


def mutual_information(action_ids: torch.Tensor, token_ids: torch.Tensor, num_codes: int) -> torch.Tensor:
    """
    Mutual information in nats between codes `[M]` and next tokens `[M]`, by counting. With few positions such an
    estimate is too high: compare it only between runs of equal batch size.
    """
    tokens, token_ids = token_ids.unique(return_inverse=True)
    joint = torch.bincount(action_ids * len(tokens) + token_ids, minlength=num_codes * len(tokens)).float()
    joint = joint.view(num_codes, len(tokens)) / joint.sum()
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent.clamp(min=1e-30)).log(), 0.0).sum()


def distinct_next_tokens(model, states: torch.Tensor) -> torch.Tensor:
    """Numbers `[M]` of different most likely next tokens over all codes, for states `[M, d]`; 1 means blind codes."""
    tokens, _ = spoken_tokens(model, states)
    return states.new_tensor([row.unique().numel() for row in tokens], dtype=torch.float32)
