"""What the frozen backbone makes of a batch: states with the images, and the same without them."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Observation:
    """
    A batch as the backbone sees it.

    Args:
        states (`torch.Tensor`): `[B, L, d]`, the backbone's own.
        position_ids (`torch.Tensor`, *optional*): That it was given.
        attention_mask (`torch.Tensor`): `[B, L]`.
        has_image (`torch.Tensor`): Boolean `[B, L]`, whether an image stands at or before a position.
    """

    states: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor
    has_image: torch.Tensor


@torch.no_grad()
def observe(model, batch: dict[str, Any]) -> Observation:
    """One pass of the backbone over a batch of [`LatentActionDataCollator`]."""
    call = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    has_image = model.has_image(batch["input_ids"])
    return Observation(call.states.detach(), call.position_ids, batch["attention_mask"], has_image)


@torch.no_grad()
def context(model, observation: Observation) -> torch.Tensor:
    """s `[B, L, d]` without gradient: cross-entropy never trains the projector."""
    return model.context_states(observation.states, observation.has_image).detach()


@torch.no_grad()
def text_states(model, batch: dict[str, Any], observation: Observation, processes: int) -> torch.Tensor:
    """h^T `[B, L, d]`: the states of all rows without their images."""
    states, rows = observation.states, batch["has_image"].nonzero().squeeze(-1)
    if len(rows):
        states = states.clone()
        states[rows] = _without_image(model, batch, observation, rows)
    elif processes > 1:
        # A sharded backbone gathers its tensors on all processes together: each makes as many passes.
        _without_image(model, batch, observation, rows.new_zeros(1))
    return states


def _without_image(model, batch: dict[str, Any], observation: Observation, rows: torch.Tensor) -> torch.Tensor:
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
