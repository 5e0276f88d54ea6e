"""The losses of the stages that learn the latent action space."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...models.cross_entropy import mean_part, token_cross_entropy
from ...models.spoken import next_token_entropy
from .backbone_cloning import backbone_codes
from .coverage import COVERAGE_POSITIONS, coverage_losses, likely_tokens
from .figures import StageFigures, distinct_next_tokens, entropy, mutual_information
from .observation import Observation, context, observe, text_states
from .update import WholeUpdate

# Logits are divided by it in the balance term.
BALANCE_TEMPERATURE = 0.25
# Weight of the projector's nll in the joint stage: the paper's.
PROJECTION_COEF = 1e-5
CLONING_TARGETS = ("backbone", "inferred")
# Positions of each row that are cloned from the backbone in one step: all codes are read at each.
CLONING_POSITIONS = 4
# Nats: positions at which the backbone is sure are cloned too, now and then.
LEAST_UNCERTAINTY = 0.05


class LatentActionSpaceObjective:
    """
    The loss of one stage, called with the model and a batch of [`LatentActionDataCollator`].

    Args:
        stage (`str`): `inverse_dynamics`, `projector`, `joint` or `policy`.
        entropy_coef (`float`): Weight of Σ p log p of each position's code distribution.
        balance_coef (`float`): Weight of Σ p̄ log p̄ of the update's mean sharpened distribution.
        coverage_coef (`float`): Weight of the cross-entropies of the backbone's likely tokens, each under its own code.
        cycle_coef (`float`): Weight of the cycle loss in `joint`.
        cloning_target (`str`): What `policy` imitates: the `"backbone"`, or the codes `"inferred"` by the inverse
            dynamics model.
        health_positions (`int`): Positions of a batch on which the gaps to no code and to random codes are measured,
            where `measure_gaps` is set.
        seed (`int`): Gumbel noise and random codes are a function of it, `step` and a row's place in the whole update:
            neither the number of processes, nor how a process splits its rows, nor an interruption changes them.
        kinds (`int`): 2 when the second half of a batch are text-only rows beside the paired ones, else 1.
        processes (`int`), process_index (`int`): Of the run.
        average (`Callable`, *optional*): Averages a tensor over the processes.
    """

    def __init__(
        self,
        stage: str,
        entropy_coef: float = 1e-3,
        balance_coef: float = 0.1,
        coverage_coef: float = 0.0,
        cycle_coef: float = 1e-5,
        cloning_target: str = "backbone",
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
        self.coverage_coef = coverage_coef
        self.cycle_coef = cycle_coef
        self.cloning_target = cloning_target
        self.health_positions = health_positions
        self.seed = seed
        self.kinds = kinds
        self.processes = processes
        self.process_index = process_index
        self.average = average if processes > 1 else lambda tensor: tensor
        self.figures = StageFigures(stage, self.average)
        # The optimizer step that the next call is for.
        self.step = 0
        # Whether the next call also reads other codes than the chosen ones: as dear as the loss, so not at every step.
        self.measure_gaps = True

    def whole_update(self, batches: list[dict[str, Any]]) -> WholeUpdate:
        """The update that `batches` of this process and as many of each other one make together."""
        return WholeUpdate(batches, *self.average(sum(self._positions(batch) for batch in batches)))

    def _positions(self, batch: dict[str, Any]) -> torch.Tensor:
        """Numbers `[4]` of positions of the loss, and of the projector's, in rows with an image and in others."""
        has_image = batch["has_image"]
        positions, tokens = batch["loss_mask"][:, 1:].sum(dim=1), batch["token_mask"].sum(dim=1)
        if self.stage == "policy" and self.cloning_target == "backbone":
            positions = positions.clamp(max=CLONING_POSITIONS)
        parts = [count * kind for count in (positions, tokens) for kind in (has_image, ~has_image)]
        return torch.stack(parts).sum(dim=1).float()

    def __call__(self, model, batch: dict[str, Any], update: WholeUpdate | None = None) -> torch.Tensor:
        """
        The batch's part of the update's loss: the parts of all batches of a process add up, and the processes average.

        Args:
            update (`WholeUpdate`, *optional*): What the batch is the next one of; the batch alone by default.
        """
        self.figures.start(model.config.num_codes, batch["input_ids"].device)
        update = update or self.whole_update([batch])
        place = update.done
        update.done += 1
        observation = None
        if update.observations:
            observation, update.observations[place] = update.observations[place], None
        observation = observation or observe(model, batch)
        if self.stage == "policy":
            return self._cloning_loss(model, batch, observation, update, place)
        loss = observation.states.new_zeros((), dtype=torch.float32)
        if self.stage == "projector" or (self.stage == "joint" and model.config.use_projector):
            loss = loss + self._projector_loss(model, batch, observation, update)
        if self.stage in ("inverse_dynamics", "joint"):
            loss = loss + self._action_loss(model, batch, observation, update, place)
        return loss

    def looks_ahead(self, update: WholeUpdate) -> bool:
        """Whether [`look_ahead`] must be called before the first batch of `update`."""
        terms = self.balance_coef or self.coverage_coef
        return self.stage in ("inverse_dynamics", "joint") and bool(terms) and len(update.batches) > 1

    @torch.no_grad()
    def look_ahead(self, model, batches: list[dict[str, Any]], update: WholeUpdate) -> torch.Tensor:
        """
        Sees to what a batch must know of the others, and no mask tells: the mean distribution over codes, and how many
        tokens are covered. The backbone's states are kept for the batches' own turns, so that it runs no more often.
        """
        usage, covered = torch.zeros((), device=batches[0]["input_ids"].device), 0
        for place, batch in enumerate(batches):
            observation, mask = observe(model, batch), batch["loss_mask"][:, 1:]
            update.observations.append(observation)
            usage = usage + self._sharp_usage(self._infer(model, batch, context(model, observation), observation)[mask])
            if self.coverage_coef:
                drawn = self._draw_uncertain(model, observation, mask, COVERAGE_POSITIONS, self._first(mask, place), 1)
                update.covered_masks.append(drawn)
                covered = covered + likely_tokens(model, observation.states[:, :-1][drawn])[1].sum()
        update.usage = self.average(usage)
        update.covered = self.average(usage.new_zeros(()) + covered)
        return usage.sum()

    def _first(self, mask: torch.Tensor, place: int) -> int:
        """Number, in the whole update, of the first item of this process's batch at `place`."""
        return (place * self.processes + self.process_index) * (len(mask) // self.kinds)

    def _random(self, device: torch.device, *place: int) -> torch.Generator:
        """A generator of its own for a place: kind of row and number in the whole update."""
        seed = np.random.SeedSequence([self.seed, self.step, *place]).generate_state(1, np.uint64)[0]
        # Half the range is what every device's generator takes.
        return torch.Generator(device=device).manual_seed(int(seed >> np.uint64(1)))

    def _random_of_row(self, device: torch.device, row: int, rows: int, first: int, *more: int) -> torch.Generator:
        items = rows // self.kinds
        return self._random(device, row // items, first + row % items, *more)

    def _choose(self, model, logits: torch.Tensor, mask: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Code vectors `[M, d]` of the noisy choice at the marked positions, each row with its own noise."""
        codes = []
        for row, part in enumerate(logits.split(mask.sum(dim=1).tolist())):
            generator = self._random_of_row(logits.device, row, len(mask), first)
            codes.append(model.codebook.straight_through(part, model.config.gumbel_temperature, generator)[0])
        return torch.cat(codes)

    def _infer(self, model, batch, states: torch.Tensor, observation: Observation) -> torch.Tensor:
        return model.infer(states, batch["input_ids"], observation.attention_mask, observation.position_ids)

    def _action_loss(self, model, batch, observation: Observation, update: WholeUpdate, place: int) -> torch.Tensor:
        states, mask = context(model, observation), batch["loss_mask"][:, 1:]
        logits = self._infer(model, batch, states, observation)[mask]
        targets, inputs = batch["input_ids"][:, 1:][mask], states[:, :-1][mask]
        first = self._first(mask, place)
        losses = token_cross_entropy(model, model.merge(inputs, self._choose(model, logits, mask, first)), targets)
        image_rows = batch["has_image"][:, None].expand_as(mask)[mask]
        probs = logits.softmax(dim=-1)
        penalised = losses + self.entropy_coef * (probs * probs.clamp(min=1e-12).log()).sum(-1)
        loss = _both_kinds(penalised, image_rows, update)
        if self.balance_coef:
            loss = loss + self.balance_coef * self._balance_loss(logits, update)
        if self.coverage_coef:
            loss = loss + self.coverage_coef * self._coverage_loss(model, batch, states, observation, update, place)
        self.figures.add("world_model/ce_sampled", losses)
        self._health(model, inputs, observation.states[:, :-1][mask], logits, targets, first)
        return loss

    def _sharp_usage(self, logits: torch.Tensor) -> torch.Tensor:
        """Sum `[K]` of sharpened distributions. It speaks of the codes that are taken: the plain mean can be even
        while few are ever the arg-max."""
        return (logits / BALANCE_TEMPERATURE).softmax(dim=-1).sum(dim=0)

    def _balance_loss(self, logits: torch.Tensor, update: WholeUpdate) -> torch.Tensor:
        """This batch's part of Σ p̄ log p̄. As distributions sum to one, the gradient of the whole is that of the parts
        with the logarithm held."""
        usage = self._sharp_usage(logits)
        if update.usage is None:
            update.usage = self.average(usage.detach())
        count = update.image_positions + update.text_positions
        marginal = update.usage / count.clamp(min=1e-12)
        return mean_part(usage * marginal.clamp(min=1e-12).log(), count)

    def _coverage_loss(self, model, batch, states, observation: Observation, update, place: int) -> torch.Tensor:
        if update.covered_masks:
            mask = update.covered_masks[place]
        else:
            mask = batch["loss_mask"][:, 1:]
            # Not by the numbers that the choice of codes is made with.
            mask = self._draw_uncertain(model, observation, mask, COVERAGE_POSITIONS, self._first(mask, place), 1)
        losses, said = coverage_losses(model, states[:, :-1][mask], observation.states[:, :-1][mask])
        if update.covered is None:
            update.covered = self.average(losses.new_tensor(float(len(losses))))
        self.figures.add("codebook/coverage", said)
        return mean_part(losses, update.covered)

    def _projector_loss(self, model, batch, observation: Observation, update: WholeUpdate) -> torch.Tensor:
        """Both projectors on samples with and without their image, and the cycle on samples that have none."""
        projector, token_mask = model.projector, batch["token_mask"]
        paired = batch["has_image"][:, None].expand_as(token_mask)[token_mask]
        kept_text = text_states(model, batch, observation, self.processes)[token_mask]
        nlls = projector.paired_nll(kept_text, observation.states[token_mask])
        self.figures.add("projector/nll", nlls[paired])
        nll = mean_part(nlls[paired], update.image_tokens)
        if self.stage == "projector":
            return nll
        cycles = projector.cycle_nll(kept_text)
        self.figures.add("projector/cycle", cycles[~paired])
        return PROJECTION_COEF * nll + self.cycle_coef * mean_part(cycles[~paired], update.text_tokens)

    def _cloning_loss(self, model, batch, observation: Observation, update: WholeUpdate, place: int) -> torch.Tensor:
        states, mask = context(model, observation), batch["loss_mask"][:, 1:]
        logits = model.policy(states, observation.attention_mask, observation.position_ids)[:, :-1]
        if self.cloning_target == "backbone":
            mask = self._draw_uncertain(model, observation, mask, CLONING_POSITIONS, self._first(mask, place))
            inputs, of_backbone = states[:, :-1][mask], observation.states[:, :-1][mask]
            wanted, kl, reachable = backbone_codes(model, inputs, of_backbone, logits[mask].softmax(dim=-1))
            best = wanted.argmax(dim=-1)
            self.figures.add("policy/backbone_kl", kl)
            self.figures.add("policy/reachable", reachable)
        else:
            with torch.no_grad():
                wanted = best = self._infer(model, batch, states, observation).argmax(dim=-1)[mask]
        logits = logits[mask]
        losses = F.cross_entropy(logits, wanted, reduction="none")
        self.figures.add("policy/cloning_accuracy", logits.argmax(dim=-1) == best)
        self.figures.add("policy/cloning_loss", losses)
        self.figures.add("policy/entropy", entropy(logits.detach().softmax(dim=-1)))
        return _both_kinds(losses, batch["has_image"][:, None].expand_as(mask)[mask], update)

    @torch.no_grad()
    def _draw_uncertain(
        self, model, observation: Observation, mask: torch.Tensor, positions: int, first: int = 0, *more: int
    ) -> torch.Tensor:
        """`mask` `[B, L-1]` thinned to so many `positions` of each row, likelier where the backbone is less sure."""
        weights = mask.float()
        weights[mask] = next_token_entropy(model, observation.states[:, :-1][mask]) + LEAST_UNCERTAINTY
        drawn = torch.zeros_like(mask)
        for row, count in enumerate(mask.sum(dim=1).clamp(max=positions).tolist()):
            if count:
                generator = self._random_of_row(mask.device, row, len(mask), first, *more)
                drawn[row, torch.multinomial(weights[row], count, generator=generator)] = True
        return drawn

    @torch.no_grad()
    def _health(self, model, states, backbone_states, logits, targets, first: int) -> None:
        """Figures on noise-free arg-max codes. Usage counts alone can look well while no code changes the output."""
        if not len(targets):
            return
        figures, num_codes, action_ids = self.figures, logits.shape[-1], logits.argmax(dim=-1)
        figures.usage += torch.bincount(action_ids, minlength=num_codes).float()
        probs = logits.softmax(dim=-1)
        figures.add("codebook/marginal_entropy", entropy(probs.mean(dim=0, keepdim=True)))
        figures.add("codebook/conditional_entropy", entropy(probs))
        figures.add("codebook/mutual_information", mutual_information(action_ids, targets, num_codes)[None])
        if not self.measure_gaps:
            return
        generator = self._random(states.device, self.kinds, first)
        sample = torch.randperm(len(targets), generator=generator, device=states.device)[: self.health_positions]
        states, targets, action_ids = states[sample], targets[sample], action_ids[sample]
        random_ids = torch.randint(num_codes, action_ids.shape, generator=generator, device=states.device)
        ce = cross_entropy_under(model, states, action_ids, targets)
        plain = token_cross_entropy(model, backbone_states[sample], targets)
        figures.add("world_model/ce", ce)
        figures.add("world_model/ce_gap_no_action", plain - ce)
        figures.add("world_model/ce_gap_random_action", cross_entropy_under(model, states, random_ids, targets) - ce)
        figures.add("codebook/distinct_next_tokens", distinct_next_tokens(model, states[:8]))


def cross_entropy_under(model, states: torch.Tensor, action_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropies `[M]` of `targets` `[M]` when `action_ids` `[M]` are taken in `states` `[M, d]`."""
    return token_cross_entropy(model, model.merge(states, model.codebook(action_ids)), targets)


def _both_kinds(losses: torch.Tensor, image_rows: torch.Tensor, update: WholeUpdate) -> torch.Tensor:
    """The sum of two means: over the positions of rows with an image, and of others."""
    with_image = mean_part(losses[image_rows], update.image_positions)
    return with_image + mean_part(losses[~image_rows], update.text_positions)
