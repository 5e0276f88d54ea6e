"""Next-token cross-entropy through the backbone's head, in chunks that fit in memory, and its mean."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_VALUES = 32_000_000


def token_cross_entropy(model, merged: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of each position, in float32.

    Args:
        model (`LatentActionModel`): Whose backbone's head is used.
        merged (`torch.Tensor`): `[M, d]`, what the head reads.
        targets (`torch.Tensor`): `[M]` token ids.

    Returns:
        `[M]`. Logits of a chunk are made again in the backward pass when there is more than one.
    """

    def chunk_loss(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = model.backbone_view.logits(part[None])[0].float()
        return F.cross_entropy(logits, wanted, reduction="none")

    size = max(1, CHUNK_VALUES // model.backbone_view.text_config.vocab_size)
    if len(targets) <= size:
        return chunk_loss(merged, targets)
    losses = [
        checkpoint(chunk_loss, part, wanted, use_reentrant=False)
        for part, wanted in zip(merged.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(losses)


def global_mean(
    values: torch.Tensor, mask: torch.Tensor, average: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """
    Mean of `values` `[M]` over the marked positions of all processes, such that the processes' average of it, and of
    its gradient, is that of one process with all their rows. Zero, but connected, when there is none.

    Args:
        values (`torch.Tensor`): `[M]`.
        mask (`torch.Tensor`): Boolean `[M]`.
        average (`Callable`, *optional*): Averages a tensor over the processes; left out for a single one.
    """
    count = mask.sum().float()
    if average is not None:
        count = average(count)
    # At least one position of a world of many processes gives a fraction here.
    return values.masked_fill(~mask, 0.0).sum() / torch.where(count > 0, count, 1.0)
