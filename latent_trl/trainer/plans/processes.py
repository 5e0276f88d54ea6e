"""Work that processes share: each does its own rows, and all know what came of every row."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object

from ...data.rows import RowError
from ...rewards.calling import RewardError
from ..run.engines import check_engine

Found = TypeVar("Found")
# What is raised again on the other processes; anything else is a RuntimeError there.
KINDS = (RewardError, RowError, ValueError)


def process() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def own_rows(count: int) -> range:
    """The rows of this process, of `count` that are shared out in order."""
    rank, processes = process()
    return range(count * rank // processes, count * (rank + 1) // processes)


def everywhere(value: Found) -> list[Found]:
    """The values that the processes give, in their order."""
    return [value] if process()[1] == 1 else gather_object([value])


def shared(count: int, work: Callable[[range], list[Found]]) -> list[Found]:
    """
    What comes of `count` rows, of which every process does its own.

    Args:
        count (`int`): How many rows.
        work (`Callable`): Given the numbers of some rows, what comes of each of them, on the CPU.

    Returns:
        `list`: Of all rows, in their order, on every process.

    Raises:
        Exception: That of `work`. The other processes end with the same message, and the number of the process.
    """
    return [one for own in worked(lambda: work(own_rows(count))) for one in own]


def worked(work: Callable[[], Found]) -> list[Found]:
    """What comes of the processes' own `work`, in their order. Raises as [`shared`] does."""
    if process()[1] == 1:
        return [work()]
    found: Any = None
    error: Exception | None = None
    try:
        found = work()
    except Exception as caught:
        error = caught
    told = everywhere((_told(error), found))
    if error is not None:
        raise error
    for number, (failure, _) in enumerate(told):
        if failure is not None:
            place, message = failure
            raise (*KINDS, RuntimeError)[place](f"On process {number}: {message}")
    return [own for _, own in told]


def _told(error: Exception | None) -> tuple[int, str] | None:
    if error is None:
        return None
    place = next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), None)
    return (len(KINDS), f"{type(error).__name__}: {error}") if place is None else (place, str(error))


def check_processes(trainer: Any) -> None:
    """Raises `ValueError` for a trainer of plans under an engine that shards the model, or another than was asked."""
    check_engine(trainer.accelerator)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        name = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"Plans are trained by DDP alone, and this run is under {name}: the backbone is frozen, and rows read it "
            "under plans that are parameters of their own. Launch with `multi_gpu.yaml`. A backbone that is too large "
            "for one device can be loaded in 4 bits."
        )
