"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, and give way to other prompts' groups."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from .scoring import Rollout


@dataclass
class Sample:
    """
    One completion with all that is needed to score it again in another batch.

    Args:
        completion_ids (`list[int]`): Its tokens.
        rollout (`Rollout`): Its codes and states, a batch of one without padding.
        row (`dict`): The data set's row.
        rewards (`torch.Tensor`, *optional*): `[functions]`, NaN for `None`.
        extra (`dict`): What reward functions logged of it, by column.
    """

    completion_ids: list[int]
    rollout: Rollout
    row: dict[str, Any] = field(default_factory=dict)
    rewards: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def equal_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    Which groups have no two different rewards, boolean `[N / group_size]`.

    Args:
        rewards (`torch.Tensor`): `[N]` over all processes; NaN for completions that could not be scored.
    """
    groups = rewards.view(-1, group_size)
    low = groups.nan_to_num(nan=torch.inf).amin(dim=1)
    high = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    return ~(high - low > 1e-6 * high.abs().clamp(min=1.0))


def replacements_of(
    equal: torch.Tensor, fresh_equal: torch.Tensor, rows: int, fresh_rows: int, group_size: int
) -> list[tuple[int, int]]:
    """
    Which group gives way to which of a fresh batch: pairs of indices over all processes.

    A group stays on the processes that it lies on: where processes hold whole groups, each takes from its own fresh
    ones; else group i takes the place of group i.

    Args:
        equal, fresh_equal (`torch.Tensor`): Of [`equal_groups`], for the batch and for the fresh one.
        rows (`int`), fresh_rows (`int`): Samples of one process in each.
    """
    if rows % group_size:
        both = (equal & ~fresh_equal).nonzero().flatten().tolist()
        return [(i, i) for i in both]
    pairs = []
    own, fresh = rows // group_size, fresh_rows // group_size
    for process in range(len(equal) // own):
        old = equal[process * own : (process + 1) * own].nonzero().flatten() + process * own
        new = (~fresh_equal[process * fresh : (process + 1) * fresh]).nonzero().flatten() + process * fresh
        pairs += list(zip(old.tolist(), new.tolist()))
    return pairs


def fresh_rows_needed(equal: torch.Tensor, rows: int, group_size: int) -> int:
    """Samples that each process must draw so that every equal group could be replaced; the same for all."""
    if rows % group_size:
        return rows
    return int(equal.view(-1, rows // group_size).sum(dim=1).max()) * group_size


def draw_prompts(dataset, count: int, seen: list[Any], seed: int) -> list[dict[str, Any]]:
    """`count` rows drawn at random, other than those whose prompt is in `seen` while there are others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    seen_prompts = {repr(prompt) for prompt in seen}
    drawn: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    for index in order:
        if len(drawn) == count:
            break
        row = dataset[index]
        (again if repr(row["prompt"]) in seen_prompts else drawn).append(row)
    rest = [*again, *drawn]
    while len(drawn) < count:
        drawn.append(rest[len(drawn) % len(rest)])
    return drawn


def all_prompts(rows: list[dict[str, Any]]) -> list[Any]:
    """The prompts of `rows` on all processes."""
    return gather_object([row["prompt"] for row in rows])
