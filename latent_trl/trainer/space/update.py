"""The whole update that a batch is a part of."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .observation import Observation


@dataclass
class WholeUpdate:
    """
    All batches of one accumulation window, on all processes: what each batch's sums are divided by.

    Numbers of positions are averages over the processes. Each process divides the sums of its own rows by them; as the
    gradients of the processes are averaged, and those of its batches added up, the result is the mean over the whole
    update.

    Args:
        batches (`list[dict]`): Those of this process, in order.
        image_positions, text_positions (`torch.Tensor`): Positions of the loss in rows with an image, and in others.
        image_tokens, text_tokens (`torch.Tensor`): Positions of the projector's losses, likewise.
    """

    batches: list[dict[str, Any]]
    image_positions: torch.Tensor
    text_positions: torch.Tensor
    image_tokens: torch.Tensor
    text_tokens: torch.Tensor
    # Batches whose loss has been computed.
    done: int = 0
    # Sum `[K]` of the sharpened distributions, and the number of tokens covered: only known from the states.
    usage: torch.Tensor | None = None
    covered: torch.Tensor | None = None
    # What was seen in looking ahead: states of the batches to come, and the positions of each that are covered.
    observations: list[Observation | None] = field(default_factory=list)
    covered_masks: list[torch.Tensor] = field(default_factory=list)
