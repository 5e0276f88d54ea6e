"""Losses of the stages that learn the latent action space, and the figures that tell a healthy codebook."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .cross_entropy import token_cross_entropy

# Logits are divided by it in the balance term.
BALANCE_TEMPERATURE = 0.25
STAGE_COMPONENTS = {
    "inverse_dynamics": ("inverse_dynamics", "codebook", "world_model"),
    "projector": ("projector",),
    "joint": ("inverse_dynamics", "codebook", "world_model", "projector"),
    "policy": ("policy",),
}
STAGE_NEEDS = {"inverse_dynamics": (), "projector": (), "joint": ("inverse_dynamics",), "policy": ("inverse_dynamics",)}


@dataclass
class Observation:
    """What the frozen backbone makes of a batch: states with and without images, positions, and who is who."""

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
        projection_coef (`float`), cycle_coef (`float`): Weights of the projector's two losses in `joint`.
        health_positions (`int`): Positions on which the gaps to no code and to random codes are measured.
        generator (`torch.Generator`, *optional*): Source of the Gumbel noise and of random codes.
    """

    def __init__(
        self,
        stage: str,
        entropy_coef: float = 1e-3,
        balance_coef: float = 0.1,
        projection_coef: float = 1e-5,
        cycle_coef: float = 1e-5,
        health_positions: int = 256,
        generator: torch.Generator | None = None,
    ):
        self.stage = stage
        self.entropy_coef = entropy_coef
        self.balance_coef = balance_coef
        self.projection_coef = projection_coef
        self.cycle_coef = cycle_coef
        self.health_positions = health_positions
        self.generator = generator
        self.metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.usage: torch.Tensor | None = None
        self.some_states: torch.Tensor | None = None

    def __call__(self, model, batch: dict[str, Any]) -> torch.Tensor:
        observation = self._observe(model, batch)
        if self.stage == "policy":
            return self._cloning_loss(model, batch, observation)
        loss = observation.states.new_zeros((), dtype=torch.float32)
        if self.stage in ("projector", "joint"):
            projection = self._projector_loss(model, batch, observation)
            loss = loss + projection
        if self.stage in ("inverse_dynamics", "joint"):
            loss = loss + self._action_loss(model, batch, observation)
        return loss

    @torch.no_grad()
    def _observe(self, model, batch: dict[str, Any]) -> Observation:
        call = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
        return Observation(call.states.detach(), call.position_ids, batch["attention_mask"], batch["has_image"])

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
        codes, action_ids = model.codebook.straight_through(logits, model.config.gumbel_temperature, self.generator)
        losses = token_cross_entropy(model, model.merge(inputs, codes), targets)
        image_rows = batch["has_image"][:, None].expand_as(mask)[mask]
        loss = _mean(losses, image_rows) + _mean(losses, ~image_rows)
        probs = logits.softmax(dim=-1)
        for rows in (image_rows, ~image_rows):
            loss = loss + self.entropy_coef * _mean((probs * probs.clamp(min=1e-12).log()).sum(-1), rows)
        # Sharpened, it speaks of the codes that are taken: the plain mean can be even while few are ever the arg-max.
        sharp = (logits / BALANCE_TEMPERATURE).softmax(dim=-1)
        marginal = sharp.sum(dim=0) / max(len(sharp), 1)
        loss = loss + self.balance_coef * (marginal * marginal.clamp(min=1e-12).log()).sum()
        self._add("world_model/ce_sampled", losses.mean())
        self._health(model, inputs, logits, targets)
        self.some_states = inputs[:1024]
        return loss

    def _projector_loss(self, model, batch, observation) -> torch.Tensor:
        """Both projectors on samples with and without their image, and the cycle on samples that have none."""
        projector, has_image = model.projector, batch["has_image"]
        text_states = observation.states
        if bool(has_image.any()):
            rows = has_image.nonzero().squeeze(-1)
            text_states = text_states.clone()
            text_states[rows] = self._without_image(model, batch, observation, rows)
        token_mask = batch["token_mask"]
        paired = (token_mask & has_image[:, None])[token_mask]
        kept_text, kept_image = text_states[token_mask], observation.states[token_mask]
        nll = _mean(projector.paired_nll(kept_text, kept_image), paired)
        self._add("projector/nll", nll, when=bool(has_image.any()))
        if self.stage == "projector":
            return nll
        cycle = _mean(projector.cycle_nll(kept_text), ~paired)
        self._add("projector/cycle", cycle, when=not bool(has_image.all()))
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
        with torch.no_grad():
            wanted = model.infer(states, batch["input_ids"], observation.attention_mask, observation.position_ids)
            wanted = wanted.argmax(dim=-1)[mask]
        logits = model.policy(states, observation.attention_mask, observation.position_ids)[:, :-1][mask]
        losses = F.cross_entropy(logits, wanted, reduction="none")
        image_rows = batch["has_image"][:, None].expand_as(mask)[mask]
        self._add("policy/cloning_accuracy", (logits.argmax(dim=-1) == wanted).float().mean())
        self._add("policy/cloning_loss", losses.mean())
        self._add("policy/entropy", torch.distributions.Categorical(logits=logits.detach()).entropy().mean())
        return _mean(losses, image_rows) + _mean(losses, ~image_rows)

    @torch.no_grad()
    def _health(self, model, states: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Figures on noise-free arg-max codes. Usage counts alone can look well while no code changes the output."""
        if not len(targets):
            return
        num_codes = logits.shape[-1]
        action_ids = logits.argmax(dim=-1)
        usage = torch.bincount(action_ids, minlength=num_codes).float()
        self.usage = usage if self.usage is None else self.usage + usage
        probs = logits.softmax(dim=-1)
        self._add("codebook/marginal_entropy", _entropy(probs.mean(dim=0)))
        self._add("codebook/conditional_entropy", _entropy(probs).mean())
        self._add("codebook/mutual_information", mutual_information(action_ids, targets, num_codes))
        sample = torch.randperm(len(targets), device=states.device)[: self.health_positions]
        states, targets, action_ids = states[sample], targets[sample], action_ids[sample]
        random_ids = torch.randint(num_codes, action_ids.shape, device=states.device)
        ce = self._ce(model, states, action_ids, targets)
        plain = F.cross_entropy(model.backbone_view.logits(states[None])[0].float(), targets)
        self._add("world_model/ce", ce)
        self._add("world_model/ce_gap_no_action", plain - ce)
        self._add("world_model/ce_gap_random_action", self._ce(model, states, random_ids, targets) - ce)
        self._add("codebook/distinct_next_tokens", distinct_next_tokens(model, states[:8]))

    def _ce(self, model, states, action_ids, targets) -> torch.Tensor:
        return token_cross_entropy(model, model.merge(states, model.codebook(action_ids)), targets).mean()

    def _add(self, name: str, value: torch.Tensor, when: bool = True) -> None:
        if when:
            self.metrics[name].append(value.detach().float())

    def drain(self) -> dict[str, torch.Tensor]:
        """Means of the figures since the last call, and the usage of codes over that time."""
        figures = {name: torch.stack(values).mean() for name, values in self.metrics.items()}
        self.metrics.clear()
        if self.usage is not None:
            share = self.usage / self.usage.sum()
            figures["codebook/used"] = (self.usage > 0).sum().float()
            figures["codebook/perplexity"] = _entropy(share).exp()
        return figures


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the marked positions; zero, but connected, when there is none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


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


@torch.no_grad()
def distinct_next_tokens(model, states: torch.Tensor) -> torch.Tensor:
    """Mean number of different most likely next tokens over all codes, for states `[M, d]`; 1 means blind codes."""
    codes = torch.arange(model.config.num_codes, device=states.device)
    merged = model.merge(
        states[:, None].expand(-1, len(codes), -1), model.codebook(codes)[None].expand(len(states), -1, -1)
    )
    tokens = model.backbone_view.logits(merged).argmax(dim=-1)
    return torch.stack([row.unique().numel() * row.new_ones(()) for row in tokens]).float().mean()
