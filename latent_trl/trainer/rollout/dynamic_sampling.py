"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, and give way to other prompts' groups."""

import hashlib
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from ...rewards.conversation import IMAGE_COLUMNS


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


def draw_prompts(dataset, count: int, seen: set[bytes], seed: int) -> list[dict[str, Any]]:
    """
    `count` rows drawn at random, other than those whose [`prompt_key`] is in `seen` while there are others among the
    first rows drawn. At most as many rows are read as could be needed where all prompts differ.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)[: count + len(seen)].tolist()
    drawn: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    for index in order:
        if len(drawn) == count:
            break
        row = dataset[index]
        (again if prompt_key(row) in seen else drawn).append(row)
    rest = [*again, *drawn]
    while len(drawn) < count:
        drawn.append(rest[len(drawn) % len(rest)])
    return drawn


def prompt_key(row: dict[str, Any]) -> bytes:
    """A digest of a row's prompt and its pictures, which tells two prompts apart."""
    digest = hashlib.sha256()
    for name in ("prompt", *IMAGE_COLUMNS):
        _update(digest, row.get(name))
    return digest.digest()


def _update(digest, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value):
            digest.update(repr(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(repr(value).encode())


def all_keys(rows: list[dict[str, Any]]) -> set[bytes]:
    """[`prompt_key`] of the rows of all processes."""
    return set(gather_object([prompt_key(row) for row in rows]))
