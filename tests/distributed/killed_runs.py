"""Small runs of every trainer in processes of their own, which kill themselves, or are killed, at given moments."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "trainer")]

from every_trainer import build, logs  # noqa: E402

from latent_trl.trainer.run.manifest import newest_whole_checkpoint  # noqa: E402

# Where a run is killed: within calls of these methods.
SAVING, ROLLOUT, STEP = "_save_checkpoint", "_generate_and_score_completions", "training_step"
PLACES = {
    "space": (SAVING, STEP, "_end"),
    "sft": (SAVING, STEP),
    "grpo": (SAVING, ROLLOUT),
    "rloo": (SAVING, ROLLOUT),
    "ppo": (SAVING, ROLLOUT),
}


class Moment(NamedTuple):
    """So many seconds into the so-manieth call of `method`; without one, after the beginning."""

    method: str | None
    call: int
    after: float


def watch(trainer: Any, method: str, calls: list[float], moment: Moment | None) -> None:
    """Notes the seconds of each call of `method`; the process is killed so many seconds into the call of the moment."""
    original = getattr(trainer, method)

    def watched(*args, **kwargs):
        begin, own, killer = time.monotonic(), os.getpid(), None
        if moment is not None and len(calls) + 1 == moment.call:
            killer = os.fork()
            if killer == 0:
                time.sleep(moment.after)
                os.kill(own, signal.SIGKILL)
                os._exit(0)
        try:
            return original(*args, **kwargs)
        finally:
            calls.append(time.monotonic() - begin)
            if killer is not None:
                # It came too late.
                os.kill(killer, signal.SIGKILL)
                os.waitpid(killer, 0)

    setattr(trainer, method, watched)


def run(kind: str, folder: Path, moment: Moment | None, begun) -> None:
    """The run, from where an earlier one in the folder was killed; what it ended with goes to `result.pt`."""
    sys.stdout = sys.stderr = open(folder.parent / f"{folder.name}.log", "a", buffering=1)
    torch.set_num_threads(1)
    trainer = build(kind, folder)
    calls: dict[str, list[float]] = {method: [] for method in PLACES[kind]}
    for method in calls:
        watch(trainer, method, calls[method], moment if moment is not None and moment.method == method else None)
    begun.set()
    begin = time.monotonic()
    resume = folder.is_dir() and (kind == "space" or newest_whole_checkpoint(folder) is not None)
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "logs": logs(trainer),
        "calls": calls,
        "seconds": time.monotonic() - begin,
    }
    torch.save(result, folder / "result.pt")


def start(kind: str, folder: Path, moment: Moment | None) -> int:
    """Runs until the end or the moment, and returns the exit code: -9 when it was killed."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=run, args=(kind, folder, moment, begun))
    process.start()
    if moment is not None and moment.method is None:
        begun.wait(60)
        process.join(moment.after)
        process.kill()
    process.join(120)
    assert process.exitcode is not None, "The run hangs."
    return process.exitcode
