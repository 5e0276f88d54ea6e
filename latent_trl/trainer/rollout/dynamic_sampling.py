"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, and give way to other prompts' groups."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from ...rewards.conversation import IMAGE_COLUMNS
from .advantages import weighted_rewards
from .metrics import Figure
from .prompts import stored
from .rollout import Sample


@dataclass
class DynamicSampling:
    """
    Replaces groups of equal rewards (DAPO, [Yu et al.](https://huggingface.co/papers/2503.14476), section 3.2).

    Args:
        dataset (`Dataset`): Map-style, that prompts are drawn from.
        rounds (`int`): At most so many times a batch.
        group_size (`int`): G.
        weights (`torch.Tensor`): `[functions]`, of the rewards.
        rank (`int`), processes (`int`): Of the run.
        prepare (`Callable`): Loads the pictures of a row.
    """

    dataset: Any
    rounds: int
    group_size: int
    weights: torch.Tensor
    rank: int
    processes: int
    prepare: Callable[[dict[str, Any]], dict[str, Any]]

    @classmethod
    def of(cls, trainer: Any) -> "DynamicSampling":
        """That of a `GRPOTrainer`."""
        accelerator = trainer.accelerator
        return cls(
            stored(trainer.train_dataset, "train_dataset"),
            trainer.args.dynamic_sampling_rounds,
            trainer.num_generations,
            trainer.reward_weights,
            accelerator.process_index,
            accelerator.num_processes,
            trainer.reader.load,
        )

    def replace(
        self,
        samples: list[Sample],
        rewards: torch.Tensor,
        draw: Callable[[list[dict[str, Any]]], tuple[list[Sample], torch.Tensor]],
        seed: int,
    ) -> dict[str, Figure]:
        """
        Puts fresh groups in the place of equal ones, in `samples` and in `rewards`.

        Args:
            samples (`list[Sample]`): Of this process.
            rewards (`torch.Tensor`): `[N, functions]` over all processes.
            draw (`Callable`): Samples of rows, and their rewards over all processes.
            seed (`int`): What is drawn is a function of it and the round.

        Returns:
            Figures for the logs.
        """
        size, rank, rows = self.group_size, self.rank, len(samples)
        total = weighted_rewards(rewards, self.weights)
        equal = equal_groups(total, size)
        figures = {"equal_groups_before": equal.float().mean().item(), "reward_before": total.nanmean().item()}
        seen, rounds, replaced = None, 0, 0
        while equal.any() and rounds < self.rounds:
            rounds += 1
            if seen is None:
                seen = all_keys([sample.row for sample in samples])
            fresh_rows = fresh_rows_needed(equal, rows, size)
            drawn = draw_prompts(self.dataset, fresh_rows * self.processes // size, seen, seed + rounds, self.prepare)
            seen |= {prompt_key(row) for row in drawn}
            own = [row for row in drawn for _ in range(size)][rank * fresh_rows : (rank + 1) * fresh_rows]
            fresh, fresh_rewards = draw(own)
            fresh_equal = equal_groups(weighted_rewards(fresh_rewards, self.weights), size)
            pairs = replacements_of(equal, fresh_equal, rows, fresh_rows, size)
            for old, new in pairs:
                equal[old] = False
                rewards[old * size : (old + 1) * size] = fresh_rewards[new * size : (new + 1) * size]
                for i in range(size):
                    place, source = old * size + i - rank * rows, new * size + i - rank * fresh_rows
                    if 0 <= place < rows:
                        samples[place] = fresh[source]
            replaced += len(pairs)
        figures |= {"equal_groups_left": equal.float().mean().item(), "rounds": rounds, "replaced_groups": replaced}
        return {f"dynamic_sampling/{name}": (value, 1.0) for name, value in figures.items()}


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


def draw_prompts(
    dataset: Any,
    count: int,
    seen: set[bytes],
    seed: int,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
) -> list[dict[str, Any]]:
    """
    `count` rows drawn at random, other than those whose [`prompt_key`] is in `seen` while there are others among the
    first rows drawn. At most as many rows are read as could be needed where all prompts differ; `prepare` loads their
    pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)[: count + len(seen)].tolist()
    drawn: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    for index in order:
        if len(drawn) == count:
            break
        row = prepare(dataset[index])
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
