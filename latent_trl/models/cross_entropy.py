"""Next-token cross-entropy through the backbone's head, in chunks that fit in memory, and its part in a mean."""

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


def mean_part(values: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """
    The part that `values` `[M]` have in a mean over `count` positions: their sum divided by it.

    Args:
        values (`torch.Tensor`): `[M]`.
        count (`torch.Tensor`, *optional*): Positions of the whole update, averaged over the processes, so that the
            processes' average of the parts, and of their gradients, is the mean; M by default. With none at all the
            result is zero, and connected.
    """
    if count is None:
        count = values.new_tensor(float(len(values)))
    # A single position of an update of many processes is a fraction here.
    return values.sum() / torch.where(count > 0, count, 1.0)
