"""Full disks, and folders that cannot be written to, are of another run, or in use: refused, and nothing is lost."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from every_trainer import KINDS, build, first_folder
from tiny_models import latent_config
from transformers import TrainerCallback

from latent_trl.checkpoint.files import CheckpointError
from latent_trl.trainer.run import output_folder
from latent_trl.trainer.run.manifest import checkpoint_fault, newest_whole_checkpoint
from latent_trl.trainer.run.output_folder import CheckpointWriteError

SOME = [pytest.param(kind, marks=[] if kind in ("sft", "ppo") else pytest.mark.slow) for kind in KINDS]


def short(kind: str, folder: Path, callback: TrainerCallback | None = None, **options):
    length = {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": 4} if kind == "space" else {"steps": 4}
    trainer = build(kind, folder, save_total_limit=None, **length, **options)
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


class At(TrainerCallback):
    """Does something at the end of a step, before its checkpoint is written."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


@pytest.mark.parametrize("kind", SOME)
def test_a_write_that_meets_a_full_disk_leaves_the_checkpoint_before_it(kind, tmp_path):
    """`/dev/full` takes the optimizer's place: every write to it fails as on a full disk."""
    folder = first_folder(kind, tmp_path / "run")

    def fill():
        target = folder / "checkpoint-3" / "optimizer.pt"
        target.parent.mkdir(parents=True)
        target.symlink_to("/dev/full")

    message = "checkpoint-3 could not be written .*checkpoint-2', is whole. Make room, and go on with"
    with pytest.raises(CheckpointWriteError, match=message):
        short(kind, tmp_path / "run", At(3, fill)).train()
    assert not (folder / "checkpoint-3").exists()
    assert newest_whole_checkpoint(folder).endswith("checkpoint-2")
    again = short(kind, tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert checkpoint_fault(folder / "checkpoint-4") is None


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a file system of its own of that size."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("File systems cannot be mounted here.")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", SOME)
def test_a_mount_point_takes_the_model_at_the_end(kind, small_disk):
    """With nothing saved before it."""
    disk = small_disk(2**26)
    trainer = short(kind, disk, save_strategy="no")
    trainer.train()
    trainer.save_model(str(disk))
    for name in ("codebook", "policy"):
        assert (disk / name / "model.safetensors").is_file()
    assert {path.name for path in disk.iterdir() if path.name.startswith(".")} <= {".run.lock"}


def test_a_mount_point_in_the_place_of_a_part_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder.os.path, "ismount", lambda path: Path(path).name == "policy")
    with pytest.raises(ValueError, match="has the mount points .'policy'., whose place parts of the model take"):
        short("sft", tmp_path)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "grpo" else pytest.mark.slow) for k in KINDS])
def test_a_file_system_that_runs_full(kind, small_disk, tmp_path):
    short(kind, tmp_path / "measured").train()
    first = first_folder(kind, tmp_path / "measured") / "checkpoint-1"
    # What a file takes is whole blocks; two checkpoints and a half have room.
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in first.rglob("*") if path.is_file())
    disk = small_disk(int(2.5 * size))
    with pytest.raises(CheckpointWriteError, match="could not be written .*No space left|could not be written .*fail"):
        short(kind, disk / "run").train()
    last = newest_whole_checkpoint(first_folder(kind, disk / "run"))
    assert last is not None and checkpoint_fault(last) is None
    assert shutil.disk_usage(disk).free > 0.2 * size


@pytest.mark.parametrize("kind", SOME)
def test_no_room_for_one_checkpoint_is_found_before_the_first_step(kind, tmp_path, monkeypatch):
    trainer = short(kind, tmp_path)
    needed = trainer._checkpoint_bytes()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda folder: usage._replace(free=needed // 2))
    with pytest.raises(ValueError, match="has 0.. MiB free, and one checkpoint takes 0.. MiB"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.undo()
    trainer.train()
    files = (first_folder(kind, tmp_path) / "checkpoint-4").rglob("*")
    # The estimate is of tensors alone.
    assert 0.4 * needed < sum(path.stat().st_size for path in files if path.is_file()) < 6 * needed + 2**20


def unprivileged(function) -> str:
    """What `function` raises in a process that permissions hold for, root's too."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def call():
        # Without capabilities root keeps its own files, and what their modes say of the owner holds.
        version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(version, none) == 0
        try:
            function()
            answers.put("nothing was raised")
        except Exception as error:
            answers.put(f"{type(error).__name__}: {error}")

    process = context.Process(target=call)
    process.start()
    answer = answers.get()
    process.join()
    return answer


@pytest.fixture
def open_folder():
    """A folder that can be removed again, whatever became of its permissions."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    for path in (folder, folder / "run"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", SOME)
def test_a_folder_without_permission_is_refused_before_the_model_is_loaded(kind, open_folder):
    open_folder.chmod(0o555)
    # No name of a model: it would be an error of its own.
    answer = unprivileged(lambda: short(kind, open_folder / "run"))
    assert answer.startswith("ValueError: `output_dir`") and "cannot be written to: Permission denied" in answer


@pytest.mark.parametrize("kind", SOME)
def test_a_folder_in_one_that_cannot_be_written_to(kind, open_folder):
    (open_folder / "run").mkdir(mode=0o700)
    open_folder.chmod(0o555)

    def train():
        trainer = short(kind, open_folder / "run", save_strategy="no")
        trainer.train()
        trainer.save_model(str(open_folder / "run"))

    assert unprivileged(train) == "nothing was raised"
    assert (open_folder / "run" / "policy" / "model.safetensors").is_file()
    assert (open_folder / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", SOME)
def test_a_file_in_the_place_of_the_folder(kind, tmp_path):
    (tmp_path / "run").write_text("")
    for folder in (tmp_path / "run", tmp_path / "run" / "inner"):
        with pytest.raises(ValueError, match="`output_dir` .* cannot be written to: (File exists|Not a directory)"):
            short(kind, folder)


def test_a_permission_that_is_withdrawn_during_the_run(open_folder):
    run = open_folder / "run"

    def train():
        short("sft", run, At(3, lambda: run.chmod(0o555))).train()

    answer = unprivileged(train)
    assert answer.startswith("CheckpointWriteError: ") and "Permission denied" in answer
    assert "checkpoint-2', is whole" in answer and checkpoint_fault(run / "checkpoint-2") is None


@pytest.mark.parametrize("kind", SOME)
def test_a_new_run_in_the_folder_of_another(kind, tmp_path):
    short(kind, tmp_path).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint-*/*")}
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run, 'checkpoint-4' the last. Pass"):
        short(kind, tmp_path).train()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint-*/*")} == before


@pytest.mark.parametrize("kind", [pytest.param("space", marks=pytest.mark.slow), "ppo"])
def test_going_on_with_a_model_of_other_codes(kind, tmp_path):
    short(kind, tmp_path).train()
    config = latent_config(num_codes=5, use_projector=kind == "space")
    with pytest.raises(CheckpointError, match="shape"):
        short(kind, tmp_path, config=config).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("first, second", [("grpo", "ppo"), pytest.param("ppo", "sft", marks=pytest.mark.slow)])
def test_going_on_with_another_trainer(first, second, tmp_path):
    short(first, tmp_path).train()
    with pytest.raises(CheckpointError, match="is of another run: '.*', not '.*'. To start from its model, load it"):
        short(second, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", [pytest.param("space", marks=pytest.mark.slow), "ppo"])
def test_two_runs_in_one_folder(kind, tmp_path):
    """The second is refused, until the first is killed; its workers do not keep the folder."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def wait():
        begun.set()
        signal.pause()

    def train():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)
        short(kind, tmp_path, At(2, wait), dataloader_num_workers=1).train()

    process = context.Process(target=train)
    process.start()
    assert begun.wait(60)
    second = short(kind, tmp_path)
    with pytest.raises(ValueError, match="is in use by another run. Wait for it to end, or choose another folder"):
        second.train()
    assert second.state.global_step == 0
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    second.train(resume_from_checkpoint=True)
    assert checkpoint_fault(first_folder(kind, tmp_path) / "checkpoint-4") is None
