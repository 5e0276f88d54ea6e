"""Runs that are killed at random moments, the writing of a checkpoint among them, end as if they had not been."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed_runs import PLACES, Moment, start


def moments(kind: str, whole: dict) -> Iterator[Moment]:
    """Random moments without end: in the saving, in each other place, and at any time at all, in turn."""
    generator = random.Random(kind)
    while True:
        for place in PLACES[kind]:
            lengths = whole["calls"][place]
            call = generator.choice([1, 2]) if len(lengths) > 4 else 1
            yield Moment(place, call, generator.uniform(0.0, 1.0) * sum(lengths) / len(lengths))
        yield Moment(None, 0, generator.uniform(0.0, 0.3) * whole["seconds"])


def check_same(folder: Path, whole: dict) -> None:
    got = torch.load(folder / "result.pt", weights_only=True)
    assert got["weights"].keys() == whole["weights"].keys()
    differing = [name for name, tensor in whole["weights"].items() if not torch.equal(got["weights"][name], tensor)]
    assert not differing
    # Floats as they are written: NaN is equal to NaN there.
    assert repr(got["logs"]) == repr(whole["logs"])


def kill_and_compare(kind: str, kills: int, root: Path) -> None:
    """One run after another, each killed and gone on with until it ends, until there were so many kills."""

    def go_on(name: str, moment: Moment | None = None) -> bool:
        code = start(kind, root / name, moment)
        assert code in (0, -signal.SIGKILL), (moment, (root / f"{name}.log").read_text()[-3000:])
        return code == 0

    assert go_on("whole")
    whole = torch.load(root / "whole" / "result.pt", weights_only=True)
    assert len(whole["logs"]) > 4
    killed = runs = 0
    for moment in moments(kind, whole):
        ended = go_on(f"run-{runs}", moment)
        killed += not ended
        if killed == kills:
            ended = go_on(f"run-{runs}")
        if ended:
            check_same(root / f"run-{runs}", whole)
            runs += 1
        if killed == kills:
            return


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ppo"])
def test_a_run_killed_while_saving_and_elsewhere(kind, tmp_path):
    kill_and_compare(kind, 3, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", PLACES)
def test_a_run_killed_at_twenty_moments(kind, tmp_path):
    kill_and_compare(kind, 20, tmp_path)
