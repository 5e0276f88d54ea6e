"""Several samples of one prompt that differ as much as the law allows, each of them as likely as it would be alone."""

import torch

ACTION_SAMPLING = ("independent", "arithmetic")


def even_points(groups: int, size: int, generator: torch.Generator | None, device: torch.device | str) -> torch.Tensor:
    """
    Points `[size, groups]` in [0, 1): in each group 1 / `size` apart on a circle that is turned at random, so that each
    point by itself is uniform.
    """
    turned = torch.rand(groups, generator=generator, device=device)
    steps = torch.arange(size, device=device, dtype=turned.dtype) / size
    return (steps[:, None] + turned) % 1


class ArithmeticSampler:
    """
    Arithmetic sampling (Vilnis et al., 2023): a sample is the sequence in whose interval of an arithmetic code its
    point lies. With even points a code of probability p is drawn by p x `size` samples of a group, rounded up or down,
    where independent samples may all miss it or all take it. Each sample alone has the same law.

    Samples that have chosen the same so far share an interval; once it is narrower than the distance of the points
    only one is in it, and what follows can be drawn in any way.

    Args:
        points (`torch.Tensor`): `[R]` in [0, 1), one a sample.
        size (`int`): Samples of a group, whose points are 1 / `size` apart.
    """

    def __init__(self, points: torch.Tensor, size: int):
        self.points = points
        self.size = size
        self.width = torch.ones_like(points)

    @property
    def alone(self) -> torch.Tensor:
        """Boolean `[R]`: samples in whose interval no other of their group can be."""
        return self.width * self.size < 1

    def draw(self, probs: torch.Tensor) -> torch.Tensor:
        """Codes `[R]`, in whose share of `probs` `[R, K]` the points lie."""
        ends = probs.cumsum(dim=-1)
        # Sums of rounded numbers: the last code with a share ends where they end.
        total = ends[:, -1:]
        return ((ends <= self.points[:, None] * total) & (ends < total)).sum(dim=-1)

    def narrow(self, probs: torch.Tensor, action_ids: torch.Tensor, chosen: torch.Tensor | None = None) -> None:
        """Goes on inside the share of `action_ids` `[R]`; rows that are not `chosen` `[R]` had no choice and stay."""
        ends = probs.cumsum(dim=-1)
        total = ends[:, -1]
        share = probs.gather(-1, action_ids[:, None]).squeeze(-1)
        start = ends.gather(-1, action_ids[:, None]).squeeze(-1) - share
        points = ((self.points * total - start) / share).clamp(0, 1 - torch.finfo(share.dtype).eps)
        width = self.width * share / total
        if chosen is not None:
            points, width = torch.where(chosen, points, self.points), torch.where(chosen, width, self.width)
        self.points, self.width = points, width
