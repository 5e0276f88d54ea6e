"""Writing into a folder as if in one step: whoever is killed leaves what was there or all of the new."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

# Inside the folder itself, which may be a mount point or the working directory, or have a parent that is read-only.
# `.saving-*` is being written; `.saved-*` is complete, and takes its place whoever finds it.
SAVING, SAVED = ".saving-", ".saved-"
# Beside the new files: a lock that goes with its process, and a mark for each name that is to go.
LOCK_FILE, GONE = ".lock", ".gone-"
TRIAL = ".mode"
# Seconds that a reader waits for whoever puts files in their place.
PATIENCE = 10.0


@contextmanager
def atomic_folder(folder: Path, owned: Set[str] = frozenset()) -> Iterator[Path]:
    """
    A new folder to write in, inside `folder`. What is in it at the end of the block takes its place in `folder`; other
    files there stay, but for the names in `owned`, which go. `folder` itself, its mode and its group are left alone.

    A process that is killed leaves what was there, or all of the new: [`finish_saving`] does what it had left to do.
    """
    folder = Path(os.path.realpath(folder))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    staging = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
    lock = FileLock(staging / LOCK_FILE)
    # Some network file systems have no locks. What is left there stays.
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield staging
        for name in owned - {path.name for path in staging.iterdir()}:
            (staging / f"{GONE}{name}").touch()
        mode = _mode_of_new_files(staging)
        for path in staging.rglob("*"):
            if path.is_file():
                # Some libraries write files that nobody else may read.
                if stat.S_IMODE(path.stat().st_mode) != mode:
                    os.chmod(path, mode)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        saved = staging.with_name(staging.name.replace(SAVING, SAVED, 1))
        staging.rename(saved)
        _put_in_place(saved, folder)
    finally:
        # Where something complete could not be put in its place, it is kept.
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()


def finish_saving(folder: Path) -> None:
    """Puts into its place what a process had written in full, and was killed before it could."""
    for saved in _folders(folder, SAVED):
        with suppress(OSError, NotImplementedError), FileLock(saved / LOCK_FILE, timeout=PATIENCE):
            _put_in_place(saved, folder)


def clear_leftovers(folder: str | Path) -> None:
    """Removes from a folder, and from those in it, what killed processes left half-written."""
    for path in [Path(folder), *(path for path in Path(folder).iterdir() if path.is_dir() and not path.is_symlink())]:
        _clear(path)


def _clear(folder: Path) -> None:
    finish_saving(folder)
    for left in _folders(folder, SAVING):
        with suppress(OSError, NotImplementedError), FileLock(left / LOCK_FILE, blocking=False):
            shutil.rmtree(left)


def _folders(folder: Path, prefix: str) -> list[Path]:
    return [path for path in folder.glob(f"{prefix}*") if path.is_dir() and not path.is_symlink()]


def _put_in_place(saved: Path, folder: Path) -> None:
    """Moves what is left in `saved`. Begun anew, it goes on where it was."""
    names = {path.name for path in saved.iterdir()} - {LOCK_FILE}
    gone = {name for name in names if name.startswith(GONE)}
    # Without its configuration a folder is not taken for whole: it goes first, and comes last.
    records = {name for name in names - gone if name.endswith("config.json")}
    for name in names - gone:
        _like(saved / name, folder / name)
    for name in [*records, *(name.removeprefix(GONE) for name in gone)]:
        _remove(folder / name)
    for name in [*sorted(names - gone - records), *sorted(records)]:
        _remove(folder / name)
        os.rename(saved / name, folder / name)
    shutil.rmtree(saved)


def _mode_of_new_files(folder: Path) -> int:
    """The mode that the process' mask gives to a new file."""
    trial = folder / TRIAL
    trial.touch()
    mode = stat.S_IMODE(trial.stat().st_mode)
    trial.unlink()
    return mode


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _like(new: Path, old: Path) -> None:
    """Gives new files and folders the modes and groups of those whose place they take."""
    for path in (new, *new.rglob("*")):
        before = old / path.relative_to(new)
        if not before.exists():
            continue
        wanted, own = before.stat(), path.stat()
        if wanted.st_gid != own.st_gid:
            with suppress(OSError):
                os.chown(path, -1, wanted.st_gid)
        # A folder that cannot be written to could not be moved.
        os.chmod(path, stat.S_IMODE(wanted.st_mode) | (0o700 if path.is_dir() else 0))
