"""Folders of JSON files and pictures, as the tasks of the paper are published: found, read and checked."""

import json
import os
from pathlib import Path
from typing import Any

from .images import open_image


class LayoutError(ValueError):
    """A file of a task that is missing or not laid out as published. Names the file, and the key where there is one."""


def task_folder(source: str | Path, patterns: list[str], revision: str | None = None) -> Path:
    """
    The folder that holds a task's files.

    Args:
        source (`str` or `Path`): A folder, or the id of a data set of the Hub, of which a snapshot is downloaded.
        patterns (`list[str]`): Files of the snapshot to download.
        revision (`str`, *optional*): Of the data set of the Hub.

    Raises:
        LayoutError: `source` looks like a path and is no folder.
    """
    if Path(source).is_dir():
        return Path(source)
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LayoutError(f"`source` must be a folder or the id of a data set of the Hub; there is no folder {name!r}.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))


def read_json(path: Path, kind: type, hint: str = "") -> Any:
    """Content of a JSON file that must hold a `kind`; `hint` is what to do when it is not there."""
    if not path.is_file():
        raise LayoutError(f"{path} is missing. {hint}".strip())
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LayoutError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, kind):
        raise LayoutError(f"{path} must hold a {kind.__name__}, got a {type(value).__name__}.")
    return value


def entry(record: Any, key: str, kind: type, where: str) -> Any:
    """
    `record[key]`, checked.

    Args:
        record (`dict`): Part of a file.
        key (`str`): The wanted key.
        kind (`type`): What its value must be; a `str` must hold more than white space.
        where (`str`): The file and the place in it, for the error.
    """
    if not isinstance(record, dict):
        raise LayoutError(f"{where} must be a dict with the key {key!r}, got a {type(record).__name__}.")
    if key not in record:
        raise LayoutError(f"{where} has no key {key!r}; it has {sorted(record)}.")
    value = record[key]
    if not isinstance(value, kind) or (kind is str and not value.strip()):
        raise LayoutError(f"{where}: {key!r} must be a {kind.__name__} that is not empty, got {value!r:.80}.")
    return value


def inside(folder: Path, name: str, where: str) -> Path:
    """`folder / name`, which must not lead out of the folder."""
    # By its letters: the files of a Hub snapshot are links to elsewhere.
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        raise LayoutError(f"{where}: the picture {name!r} lies outside of {folder}.")
    return folder / name


def to_dataset(rows: list[dict[str, Any]]):
    """A `Dataset` of rows whose `images` are paths that the task's loader has found; they are opened when a row is."""
    from datasets import Dataset

    return Dataset.from_list(rows).with_transform(_open_images)


def _open_images(batch: dict[str, list]) -> dict[str, list]:
    if "images" not in batch:
        return batch
    return {**batch, "images": [[open_image(path) for path in paths] for paths in batch["images"]]}
