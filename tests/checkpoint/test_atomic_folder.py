"""Files take their places in a folder all together, whatever the folder is and whenever the process is killed."""

import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from latent_trl.checkpoint import atomic_folder as module
from latent_trl.checkpoint.atomic_folder import atomic_folder, clear_leftovers, finish_saving

OWNED = {"latent_action_config.json", "codebook", "policy", "adapter"}


def write(folder: Path, version: str, names=("codebook", "policy")) -> None:
    with atomic_folder(folder, OWNED) as staging:
        for name in names:
            (staging / name).mkdir()
            (staging / name / "model.safetensors").write_text(version)
        (staging / "latent_action_config.json").write_text(version)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def whole(version: str, names=("codebook", "policy")) -> dict[str, str]:
    return {"latent_action_config.json": version, **{f"{name}/model.safetensors": version for name in names}}


def test_other_files_stay_and_owned_ones_go(tmp_path):
    write(tmp_path / "model", "1", ("codebook", "adapter"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    write(tmp_path / "model", "2")
    assert content(tmp_path / "model") == {**whole("2"), "notes.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_block_that_raises_changes_nothing(tmp_path):
    write(tmp_path / "model", "1")
    for folder in (tmp_path / "model", tmp_path / "new"):
        with pytest.raises(RuntimeError), atomic_folder(folder, OWNED) as staging:
            (staging / "codebook").mkdir()
            raise RuntimeError
    assert content(tmp_path) == {f"model/{name}": "1" for name in whole("1")} and not (tmp_path / "new").exists()


def calls_of(monkeypatch, stop_at: int) -> list:
    """Counts the calls that change the disk; the process dies at the one of this number."""
    calls: list = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(module.os, "rename", counted(os.rename))
    monkeypatch.setattr(module.shutil, "rmtree", counted(module.shutil.rmtree))
    for name in ("rename", "unlink", "touch", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    return calls


def test_killed_at_each_change_of_the_disk_what_is_read_is_the_old_or_the_new(tmp_path, monkeypatch):
    write(tmp_path / "counted", "1", ("codebook", "adapter"))
    with monkeypatch.context() as patch:
        calls = calls_of(patch, -1)
        write(tmp_path / "counted", "2")
    seen = []
    for number in range(1, len(calls) + 1):
        folder = tmp_path / str(number)
        write(folder, "1", ("codebook", "adapter"))

        def killed(number=number, folder=folder):
            with pytest.MonkeyPatch.context() as patch:
                calls_of(patch, number)
                write(folder, "2")

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        finish_saving(folder)
        found = {name: text for name, text in content(folder).items() if not name.startswith(".")}
        assert found in (whole("1", ("codebook", "adapter")), whole("2")), number
        seen.append(found["latent_action_config.json"])
        clear_leftovers(folder)
        assert not list(folder.glob(".*"))
    assert seen == sorted(seen) and {"1", "2"} == set(seen)


def test_what_another_process_is_writing_is_left_to_it(tmp_path):
    with atomic_folder(tmp_path) as first:
        (first / "codebook").write_text("1")
        clear_leftovers(tmp_path)
        with atomic_folder(tmp_path) as second:
            (second / "policy").write_text("2")
        assert (first / "codebook").read_text() == "1"
    assert content(tmp_path) == {"codebook": "1", "policy": "2"}


def test_a_link_is_not_taken_for_a_save(tmp_path):
    """A folder that somebody else has made cannot have files from elsewhere moved."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".saved-x").symlink_to(tmp_path / "outside")
    finish_saving(tmp_path / "model")
    clear_leftovers(tmp_path / "model")
    assert (tmp_path / "outside" / "secret").read_text() == "mine"


def test_modes_and_groups_are_kept(tmp_path):
    folder = tmp_path / "private"
    write(folder, "1")
    folder.chmod(0o700)
    (folder / "codebook").chmod(0o750)
    (folder / "latent_action_config.json").chmod(0o600)
    group = 12345 if os.geteuid() == 0 else os.getegid()
    for path in (folder, folder / "codebook"):
        os.chown(path, -1, group)
    write(folder, "2")
    modes = [stat.S_IMODE((folder / name).stat().st_mode) for name in ("", "codebook", "latent_action_config.json")]
    assert modes == [0o700, 0o750, 0o600]
    assert {folder.stat().st_gid, (folder / "codebook").stat().st_gid} == {group}


def test_the_working_directory_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat(".").st_ino
    write(Path("."), "1")
    write(Path("."), "2")
    assert os.stat(".").st_ino == os.stat(tmp_path).st_ino == before and content(Path(".")) == whole("2")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_new_files_have_the_mode_that_the_mask_gives(tmp_path, mask, mode):
    """Whatever library has written them."""
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "model") as staging:
            (staging / "codebook").mkdir()
            for name in ("codebook/model.safetensors", "latent_action_config.json"):
                (staging / name).touch()
                (staging / name).chmod(0o600)
    finally:
        os.umask(before)
    for name in ("codebook/model.safetensors", "latent_action_config.json"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == mode
    assert not list((tmp_path / "model").glob(".*"))
