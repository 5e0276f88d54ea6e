"""SIGTERM and SIGINT, clocks that go back, and what killed runs leave: nothing is lost, and nothing is left over."""

import os
import signal
import threading

import pytest
import torch
from every_trainer import build, first_folder, logs
from transformers import TrainerCallback

from latent_trl.trainer.run.manifest import checkpoint_fault, newest_whole_checkpoint, rotate, write_manifest

STEPS = 5
SOME = [
    pytest.param(kind, marks=[] if kind in ("sft", "ppo") else pytest.mark.slow)
    for kind in ("sft", "ppo", "grpo", "space")
]


class Send(TrainerCallback):
    """Sends this process a signal in the midst of a step."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def short(kind, folder, callback=None, **options):
    trainer = build(kind, folder, steps=STEPS, **options)
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_the_run_goes_on_exactly(kind, number, tmp_path):
    """With a strategy that would save nothing."""
    whole = short(kind, tmp_path / "whole", save_strategy="no")
    whole.train()
    before = signal.getsignal(number)
    stopped = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(stopped) as error:
        short(kind, tmp_path / "run", Send(2, number), save_strategy="no").train()
    if number == signal.SIGTERM:
        assert error.value.code == 143
    assert signal.getsignal(number) == before
    assert newest_whole_checkpoint(first_folder(kind, tmp_path / "run")).endswith("checkpoint-3")
    again = short(kind, tmp_path / "run", save_strategy="no")
    again.train(resume_from_checkpoint=True)
    wanted = dict(whole.model.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in again.model.named_parameters())
    assert repr(logs(again)) == repr(logs(whole))


def test_the_checkpoint_on_sigterm_of_transformers_is_whole(tmp_path):
    trainer = short("sft", tmp_path, save_strategy="no", enable_jit_checkpoint=True)
    before = signal.getsignal(signal.SIGTERM)
    trainer.add_callback(Send(2, signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.train()
    assert newest_whole_checkpoint(tmp_path).endswith("checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) != before
    assert not list(tmp_path.rglob("checkpoint-is-incomplete.txt"))


def test_files_that_only_stand_there_while_others_are_written_are_not_listed(tmp_path):
    (tmp_path / "optimizer.pt").write_text("1")
    passing = ("checkpoint-is-incomplete.txt", "checkpoint_files.json.partial", "training_args.json.partial")
    for name in passing:
        (tmp_path / name).write_text("on its way")
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".saving-1" / "model.safetensors").write_text("half")
    write_manifest(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.name in passing or ".saving-1" in path.parts and path.is_file():
            path.unlink()
    assert checkpoint_fault(tmp_path) is None
    (tmp_path / "optimizer.pt").unlink()
    assert checkpoint_fault(tmp_path) == "optimizer.pt is missing"


def test_signals_are_left_to_other_threads_programs(tmp_path):
    """Outside of the main thread Python allows no handler: the run is as it would be without."""
    done = []

    def train():
        short("sft", tmp_path).train()
        done.append(True)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(120)
    assert done


class TurnBack(TrainerCallback):
    """Makes each checkpoint look older than those before it."""

    def on_save(self, args, state, control, **kwargs):
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        os.utime(folder, (10_000_000 - 1000 * state.global_step,) * 2)


def test_a_clock_that_goes_back_loses_no_checkpoint(tmp_path):
    short("sft", tmp_path, TurnBack(), save_total_limit=1).train()
    assert newest_whole_checkpoint(tmp_path).endswith(f"checkpoint-{STEPS}")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize(
    "found, limit, newest, best, left",
    [
        ([1, 2, 3], 2, 3, None, [2, 3]),
        ([1, 2, 3], None, 3, None, [1, 2, 3]),
        ([1, 2, 3], 1, 3, 1, [1, 3]),
        # Of a run that was gone on with from 5: what lies beyond it goes first.
        ([4, 5, 6, 9], 2, 6, None, [5, 6]),
        ([5, 6, 90], 1, 6, 5, [5, 6]),
        ([9, 10, 11], 2, 11, None, [10, 11]),
    ],
)
def test_rotation_is_by_steps(found, limit, newest, best, left, tmp_path):
    for step in found:
        (tmp_path / f"checkpoint-{step}").mkdir()
    best = best and str(tmp_path / f"checkpoint-{best}")
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{newest}", best)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left


def test_what_killed_runs_left_is_cleared_when_a_run_begins(tmp_path):
    for name in ("_push-abc", ".saving-abc", "checkpoint-1/.saving-abc"):
        (tmp_path / name / "codebook").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    trainer = short("sft", tmp_path, save_total_limit=None)
    trainer.train()
    trainer.save_model()
    assert not [
        path for path in tmp_path.rglob("*") if path.name.startswith(("_push-", ".saving-", ".saved-", ".trial"))
    ]
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
