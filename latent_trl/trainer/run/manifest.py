"""Which checkpoints are whole: a list of their files, written last, with sizes and digests."""

import hashlib
import json
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST_FILE = "checkpoint_files.json"


def write_json(path: Path, value) -> None:
    """Writes JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def write_manifest(folder: str | Path) -> None:
    """Lists the files of a finished checkpoint in it."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    described = {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}
    write_json(folder / MANIFEST_FILE, {"files": described})


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


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
