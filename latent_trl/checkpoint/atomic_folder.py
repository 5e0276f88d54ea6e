"""Writing a folder in one step: whoever is killed leaves the old one or the new one."""

import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

STALE_AFTER = 24 * 3600
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step of the file system. Returns whether the system could."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


@contextmanager
def atomic_folder(folder: Path, owned: Set[str] = frozenset()) -> Iterator[Path]:
    """
    A new folder to write in, which takes the place of `folder` at the end of the block in one step; files that the
    block does not write are carried over, but for the names in `owned`, which go. A process that is killed leaves the
    old folder or the new one.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):
        # What a killed process left. A younger one may belong to a process that is at work.
        if left.is_dir() and time.time() - left.stat().st_mtime > STALE_AFTER:
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.chmod(staging, 0o755)
        if not folder.exists():
            try:
                os.rename(staging, folder)
                return
            except OSError:
                # Another process has made the folder meanwhile, for files of its own.
                if not folder.is_dir():
                    raise
        owned = {path.name for path in staging.iterdir()} | owned
        _carry_over(folder, staging, owned)
        if not _exchange(staging, folder):
            # No atomic swap here: the old folder is complete until the new one has its name.
            aside = staging.with_name(staging.name + ".old")
            os.rename(folder, aside)
            os.rename(staging, folder)
            staging = aside
        # What another process wrote into the old folder at the last moment.
        _carry_over(staging, folder, owned)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _carry_over(source: Path, target: Path, owned: Set[str]) -> None:
    """Links what `target` has not, and nobody here owns, from `source`."""
    for path in source.iterdir():
        if path.name in owned or (target / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, target / path.name)


def _link(source, target) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
