"""The folder of a run: it can be written to, has room, and belongs to one run at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...checkpoint.atomic_folder import atomic_folder, clear_leftovers
from ...checkpoint.files import OWNED_NAMES, REPORT_FILE, CheckpointError, read_json
from .health import what_is_kept
from .manifest import MANIFEST_FILE, newest_whole_checkpoint

LOCK_FILE = ".run.lock"
TRIAL_FILE = ".trial"
# Of the copies of checkpoints that are on their way to the Hub.
PUSH_PREFIX = "_push-"


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written. The one before it is whole."""


def check_writable(args: TrainingArguments) -> None:
    """
    Makes `output_dir`, and tries there what saving a model does. Raises `ValueError` when that fails, before anything
    is loaded.
    """
    if not args.should_save:
        return
    folder = Path(args.output_dir)
    try:
        with atomic_folder(folder) as staging:
            (staging / TRIAL_FILE).write_bytes(bytes(4096))
        (folder / TRIAL_FILE).unlink()
        mounted = [name for name in OWNED_NAMES if os.path.ismount(folder / name)]
    except OSError as error:
        raise ValueError(
            f"`output_dir` {args.output_dir!r} cannot be written to: {error.strerror}. Choose another folder."
        ) from error
    if mounted:
        raise ValueError(
            f"`output_dir` {args.output_dir!r} has the mount points {mounted}, whose place parts of the model take. "
            "Choose another folder, or mount that one."
        )


def raise_together(fault: str | None) -> None:
    """Raises `ValueError` with the main process's `fault`, if it has one, on all processes."""
    fault = broadcast_object_list([fault])[0]
    if fault is not None:
        raise ValueError(fault)


@contextmanager
def only_run(accelerator: Accelerator, folder: str | Path) -> Iterator[None]:
    """
    Keeps other runs out of `folder` while the block runs. The lock goes with the process, however it ends.

    Raises:
        ValueError: When another run is at work there.
    """
    lock, fault = FileLock(Path(folder) / LOCK_FILE), None
    if accelerator.is_main_process:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            fault = (
                f"`output_dir` {str(folder)!r} is in use by another run. Wait for it to end, or choose another folder."
            )
        except OSError as error:
            fault = f"`output_dir` {str(folder)!r} cannot be written to: {error.strerror}."
    try:
        raise_together(fault)
        yield
    finally:
        lock.release()


def clear_run_folder(folder: str | Path) -> None:
    """Removes what killed runs left in `folder`, of which this run has the lock: half-written files, copies to push."""
    for path in Path(folder).glob(f"{PUSH_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    clear_leftovers(folder)


def earlier_run(folder: str | Path) -> str | None:
    """Why a new run must not begin in `folder`: it holds checkpoints that it could be mixed up with."""
    last = newest_whole_checkpoint(folder)
    if last is None:
        return None
    return (
        f"`output_dir` {str(folder)!r} holds checkpoints of an earlier run, {Path(last).name!r} the last. Pass "
        "`resume_from_checkpoint=True` to go on with it, or choose another folder."
    )


def set_aside(folder: str | Path) -> None:
    """Makes the checkpoints of a run none to go on from. Their models stay, and can be loaded."""
    for checkpoint in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)


def check_same_method(checkpoint: str | Path, method: str) -> None:
    """Raises [`CheckpointError`] when a checkpoint was written by another trainer than that called `method`."""
    path = Path(checkpoint) / REPORT_FILE
    runs = read_json(path).get("runs") if path.is_file() else None
    if runs and runs[-1].get("method") != method:
        raise CheckpointError(
            f"{checkpoint} is of another run: {runs[-1].get('method')!r}, not {method!r}. To start from its model, "
            "load it with `LatentActionModel.from_pretrained`; to start anew, choose another `output_dir`."
        )


def no_room(folder: str | Path, needed: int) -> str | None:
    """What is wrong when the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"The disk of `output_dir` {str(folder)!r} has {free / 2**20:,.1f} MiB free, and one checkpoint takes "
        f"{needed / 2**20:,.1f} MiB. Make room, choose another folder, or set `save_strategy='no'`."
    )


@contextmanager
def written_whole(target: str | Path, run_folder: str, remove: bool = False) -> Iterator[None]:
    """
    Says of a write that fails, on a full disk say, what was being written and what is still whole.

    Args:
        target (`str` or `Path`): What the block writes.
        run_folder (`str`): Where the checkpoints are.
        remove (`bool`, defaults to `False`): Whether the half-written target is removed.
    """
    try:
        yield
    except Exception as error:
        # PyTorch reports a full disk as a RuntimeError, and tokenizers as an Exception.
        if not isinstance(error, (OSError, SafetensorError, RuntimeError)) and "os error" not in str(error):
            raise
        free = shutil.disk_usage(run_folder).free
        if remove:
            shutil.rmtree(target, ignore_errors=True)
        raise CheckpointWriteError(
            f"{target} could not be written ({type(error).__name__}: {error}); {free / 2**20:,.1f} MiB are free there. "
            f"{what_is_kept(run_folder)} Make room, and go on with `resume_from_checkpoint=True`."
        ) from error
