"""Held-out figures of the space: every position of a data set is read, and nothing is drawn that depends on a batch."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...models.cross_entropy import token_cross_entropy
from ..run.learning import row_sums
from .backbone_cloning import backbone_codes
from .objective import cross_entropy_under
from .observation import Observation, context, observe, text_states

_WORLD_MODEL = ("world_model/ce", "world_model/ce_no_action", "world_model/ce_random_action")
_POLICY = ("policy/cloning_loss", "policy/backbone_kl", "policy/reachable")
# What a stage changes, and can be told by; the first is its `eval_loss`.
HELD_OUT_FIGURES = {
    "inverse_dynamics": _WORLD_MODEL,
    "projector": ("projector/nll",),
    "joint": (*_WORLD_MODEL, "projector/nll", "projector/cycle"),
    "policy": _POLICY,
}
# The policy's stage also measures the space that it chooses in.
MEASURED = {**HELD_OUT_FIGURES, "policy": (*_POLICY, *_WORLD_MODEL)}
HIGHER_IS_BETTER = ("policy/reachable",)


class HeldOutFigures:
    """
    Called with the model and a batch: `[B, F, 2]`, for each row and each of the stage's figures the sum over the row's
    positions, and their number.

    Args:
        stage (`str`): Whose figures.
        cloning_target (`str`): What the policy imitates.
        seed (`int`): The random codes of a row are a function of it and of the row's tokens.
        processes (`int`): Of the run.
    """

    def __init__(self, stage: str, cloning_target: str = "backbone", seed: int = 0, processes: int = 1):
        self.names = MEASURED[stage]
        self.cloning_target = cloning_target
        self.seed = seed
        self.processes = processes

    @torch.no_grad()
    def __call__(self, model, batch: dict[str, Any]) -> torch.Tensor:
        observation = observe(model, batch)
        found: dict[str, torch.Tensor] = {}
        if "world_model/ce" in self.names:
            found |= self._world_model(model, batch, observation)
        if "projector/nll" in self.names and model.projector is not None:
            found |= self._projector(model, batch, observation)
        if "policy/cloning_loss" in self.names:
            found |= self._policy(model, batch, observation)
        nothing = observation.states.new_zeros(len(observation.states), 2, dtype=torch.float32)
        return torch.stack([found.get(name, nothing) for name in self.names], dim=1)

    def _world_model(self, model, batch, observation: Observation) -> dict[str, torch.Tensor]:
        ids, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        states, targets = context(model, observation), ids[:, 1:][mask]
        inputs = states[:, :-1][mask]
        random_ids = self._random_codes(batch, model.config.num_codes)[:, :-1][mask]
        losses = {
            "world_model/ce_no_action": token_cross_entropy(model, observation.states[:, :-1][mask], targets),
            "world_model/ce_random_action": cross_entropy_under(model, inputs, random_ids, targets),
        }
        if model.inverse_dynamics is not None:
            logits = model.infer(states, ids, observation.attention_mask, observation.position_ids)[mask]
            losses["world_model/ce"] = cross_entropy_under(model, inputs, logits.argmax(dim=-1), targets)
        return {name: row_sums(values, mask) for name, values in losses.items()}

    def _random_codes(self, batch: dict[str, Any], num_codes: int) -> torch.Tensor:
        codes = torch.zeros_like(batch["input_ids"])
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
            generator = np.random.default_rng([self.seed, *ids[mask].tolist()])
            codes[row, mask] = torch.from_numpy(generator.integers(num_codes, size=int(mask.sum()))).to(codes)
        return codes

    def _projector(self, model, batch, observation: Observation) -> dict[str, torch.Tensor]:
        mask, has_image = batch["token_mask"], batch["has_image"][:, None]
        kept_text = text_states(model, batch, observation, self.processes)[mask]
        nll = model.projector.paired_nll(kept_text, observation.states[mask])
        found = {"projector/nll": row_sums(nll, mask) * has_image}
        if "projector/cycle" in self.names:
            found["projector/cycle"] = row_sums(model.projector.cycle_nll(kept_text), mask) * ~has_image
        return found

    def _policy(self, model, batch, observation: Observation) -> dict[str, torch.Tensor]:
        mask, states = batch["loss_mask"][:, 1:], context(model, observation)
        attention_mask, position_ids = observation.attention_mask, observation.position_ids
        logits = model.policy(states, attention_mask, position_ids)[:, :-1][mask]
        inputs, of_backbone = states[:, :-1][mask], observation.states[:, :-1][mask]
        wanted, kl, reachable = backbone_codes(model, inputs, of_backbone, logits.softmax(dim=-1))
        if self.cloning_target == "inferred":
            wanted = model.infer(states, batch["input_ids"], attention_mask, position_ids).argmax(dim=-1)[mask]
        cloning = F.cross_entropy(logits, wanted, reduction="none")
        return {name: row_sums(values, mask) for name, values in zip(_POLICY, (cloning, kl, reachable), strict=True)}


def check_best_metric(metric: str | None, stages: list[str], sets: tuple[str, ...]) -> None:
    """
    Raises `ValueError` when the best model cannot be told by `metric` in each of the `stages`.

    Args:
        metric (`str`, *optional*): `metric_for_best_model`.
        stages (`list[str]`): To be run.
        sets (`tuple[str]`): Names of the evaluation sets; none for a single one.
    """
    if metric is None:
        return
    for stage in stages:
        names = [
            f"{name}_{figure}" if name else figure for figure in ("loss", *HELD_OUT_FIGURES[stage]) for name in sets
        ]
        if metric.removeprefix("eval_") not in names:
            raise ValueError(
                f"`metric_for_best_model={metric!r}` is not a figure that stage {stage!r} changes; those are {names}. "
                "'loss' is one of each stage."
            )
