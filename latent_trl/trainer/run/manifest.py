"""Which checkpoints are whole: a list of their files, written last, with sizes and digests."""

import hashlib
import json
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST_FILE = "checkpoint_files.json"
PARTIAL = ".partial"
# transformers' mark of a checkpoint that is being written (`enable_jit_checkpoint`). It goes after the manifest.
SENTINEL_FILE = "checkpoint-is-incomplete.txt"


def write_json(path: Path, value) -> None:
    """Writes JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_suffix(path.suffix + PARTIAL)
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def write_manifest(folder: str | Path) -> None:
    """Lists the files of a finished checkpoint in it."""
    folder = Path(folder)
    described = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _stays(path.relative_to(folder))
    }
    write_json(folder / MANIFEST_FILE, {"files": described})


def _stays(path: Path) -> bool:
    """Whether a file is the checkpoint's: not the manifest, and nothing that is there while files are written."""
    passing = path.suffix == PARTIAL or any(part.startswith(".") for part in path.parts)
    return not passing and path.name not in (MANIFEST_FILE, SENTINEL_FILE)


def checkpoint_fault(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, or `None` when it is whole."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        listed = [(name, size, digest) for name, (size, digest) in files.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST_FILE} cannot be read"
    if not listed:
        return f"its {MANIFEST_FILE} lists nothing"
    for name, size, digest in listed:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
        if _digest(path) != digest:
            return f"the content of {name} has changed"
    return None


def newest_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a run that is whole; a warning for each newer one that is not. `None` without one."""
    if not Path(folder).is_dir():
        return None
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        fault = checkpoint_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning(f"Checkpoint {checkpoint} is damaged ({fault}); the one before it is used.")
    return None


def rotate(folder: str | Path, limit: int | None, newest: str | Path, best: str | None) -> None:
    """
    Removes checkpoints until there are `limit`, by their steps: clocks go back, and copies have the times of their
    copying. `newest`, the one just written, and `best` stay. Later steps than the newest's, of a run that was not gone
    on with, go first.
    """
    found = [Path(path) for path in sort_checkpoints(str(folder))]
    kept = {Path(newest), *([Path(best)] if best else [])}
    if not limit or limit <= 0 or Path(newest) not in found:
        return
    place = found.index(Path(newest))
    for checkpoint in [path for path in found[place:] + found[:place] if path not in kept][
        : max(0, len(found) - limit)
    ]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
