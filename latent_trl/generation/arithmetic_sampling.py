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


def random_orders(
    groups: int, count: int, generator: torch.Generator | None, device: torch.device | str
) -> torch.Tensor:
    """Orders `[groups, count]` of so many codes, each as likely as any other, without a wait of the host."""
    return torch.rand(groups, count, generator=generator, device=device).argsort(dim=-1, stable=True)


class ArithmeticSampler:
    """
    Arithmetic sampling (Vilnis et al., 2023): a sample is the sequence in whose interval of an arithmetic code its
    point lies. With even points a code of probability p is drawn by p x `size` samples of a group, rounded up or down,
    where independent samples may all miss it or all take it. Each sample alone has the same law.

    Samples that have chosen the same so far share an interval; once it is narrower than the distance of the points
    only one is in it, and what follows can be drawn in any way.

    The codes of a step lie in an order that is drawn anew. In a fixed order the same codes, 1 / `size` apart, would
    always be drawn together, and a gradient that compares the samples of a group would miss what they have in common.

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

    def draw(
        self,
        probs: torch.Tensor,
        order: torch.Tensor,
        drawn_alone: torch.Tensor,
        free: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The next code of each sample, inside whose share the sample goes on.

        Args:
            probs (`torch.Tensor`): `[R, K]`.
            order (`torch.Tensor`): `[R, K]`, how the codes' shares follow each other; the same for all of a group.
            drawn_alone (`torch.Tensor`): `[R]`, what those take that are alone.
            free (`torch.Tensor`, *optional*): Boolean `[R]`; the others have no choice in this step, and stay.
        """
        shares = probs.gather(-1, order)
        ends = shares.cumsum(dim=-1)
        # A parallel sum can grow by its rounding where a code has no share: only codes with one are looked at.
        total = ends.masked_fill(shares <= 0, 0.0).amax(dim=-1)
        behind = (ends > (self.points * total)[:, None]) & (shares > 0)
        drawn = order.gather(-1, behind.byte().argmax(dim=-1, keepdim=True)).squeeze(-1)
        action_ids = torch.where(self.alone, drawn_alone, drawn)
        place = (order == action_ids[:, None]).byte().argmax(dim=-1, keepdim=True)
        share = shares.gather(-1, place).squeeze(-1)
        start = ends.gather(-1, place).squeeze(-1) - share
        points = ((self.points * total - start) / share).clamp(0, 1 - torch.finfo(share.dtype).eps)
        width = self.width * share / total
        if free is not None:
            points, width = torch.where(free, points, self.points), torch.where(free, width, self.width)
        self.points, self.width = points, width
        return action_ids
