"""The files of a checkpoint: their names, and reading them without trusting them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .atomic_folder import finish_saving
from .configuration import SCHEMA_VERSION, LatentActionConfig, check_counts
from .download import fetch_snapshot

CONFIG_FILE = "latent_action_config.json"
REPORT_FILE = "training_report.json"
TUNED_FOLDER = "backbone"
ADAPTER_FOLDER = "adapter"
COMPONENTS = ("codebook", "world_model", "inverse_dynamics", "policy", "projector", "value_head")
OWNED_NAMES = {CONFIG_FILE, REPORT_FILE, TUNED_FOLDER, ADAPTER_FOLDER, *COMPONENTS}
# Facts of the record that are read by people and by the Hub, and follow from the rest.
FACTS = ("package_versions", "code_width", "hidden_size", "layer_shapes")
# By these transformers tells that a processor or tokenizer is there.
PROCESSOR_RECORDS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
PROCESSOR_PATTERNS = (
    *(*PROCESSOR_RECORDS, "video_preprocessor_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_JSON_BYTES = 32 * 2**20
# Of a safetensors file's list of tensors: some 100,000 of them.
MAX_HEADER_BYTES = 16 * 2**20
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# What is downloaded of a repository: the top folder's record, report, card and processor, and the parts' folders.
CHECKPOINT_PATTERNS = (
    *(CONFIG_FILE, REPORT_FILE, "README.md", *PROCESSOR_PATTERNS),
    *(f"{part}/*.{kind}" for part in (*COMPONENTS, TUNED_FOLDER, ADAPTER_FOLDER) for kind in ("json", "safetensors")),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is: missing, damaged, or made for something else."""


def check_inside(path: Path, root: Path) -> None:
    """Raises [`CheckpointError`] when links lead from `path` out of the folder `root`, or of the Hub cache it is in."""
    root = root.resolve()
    caches = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(path.resolve().is_relative_to(allowed) for allowed in (root, *caches)):
        raise CheckpointError(f"{path} is a link that leads outside {root}. Put the file itself there.")


def check_file(path: Path) -> None:
    """Raises [`CheckpointError`] unless `path` is a file: no pipe, no device, and no link out of its folder."""
    if not path.is_file():
        raise CheckpointError(
            f"{path.name} is missing from {path.parent}" + (", or no file." if path.exists() else ".")
        )
    check_inside(path, path.parent)


def has_folder(folder: Path, name: str) -> bool:
    """Whether a checkpoint has a folder of this name. Raises [`CheckpointError`] when it is a link out of it."""
    if not (folder / name).is_dir():
        return False
    check_inside(folder / name, folder)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises [`CheckpointError`] when `path` is missing or holds anything else."""
    check_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; no JSON of a checkpoint is that large.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are different: which of two counts, readers do not agree on."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r:.200} is there twice")
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file. Raises [`CheckpointError`] when it is missing, truncated or another format."""
    tensor_metadata(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_whole(path, error) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """As [`read_tensors`]. Raises [`CheckpointError`] also for what no weights are: see [`check_weights`], and NaN."""
    check_weights(path)
    tensors = read_tensors(path)
    endless = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if endless:
        raise CheckpointError(f"{path}: tensors {endless[:5]} have values that are infinite or NaN.")
    return tensors


def check_range(tensors: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype], source: Path | str) -> None:
    """Raises [`CheckpointError`] for finite values that are beyond the range of the dtype that they are taken into."""
    for name, dtype in dtypes.items():
        tensor = tensors[name]
        if tensor.dtype != dtype and dtype.is_floating_point and not tensor.to(dtype).isfinite().all():
            raise CheckpointError(f"{source}: tensor {name!r:.200} has values that {dtype} cannot hold.")


def check_weights(path: Path) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of a file of weights, without reading them.

    Raises:
        CheckpointError: When a tensor is of none of the dtypes `FLOAT_DTYPES`, or has no elements.
    """
    metadata = tensor_metadata(path)
    for name, (dtype, shape) in metadata.items():
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r:.200} is of dtype {dtype}, weights are of {FLOAT_DTYPES}.")
        if 0 in shape:
            raise CheckpointError(f"{path}: tensor {name!r:.200} has no elements, its shape is {shape}.")
    return {name: shape for name, (_, shape) in metadata.items()}


def tensor_metadata(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """
    Names, dtypes and shapes of a safetensors file, without reading its data.

    Raises:
        CheckpointError: When it is missing, truncated, another format, or its list is over `MAX_HEADER_BYTES`.
    """
    check_file(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if MAX_HEADER_BYTES < size <= path.stat().st_size:
        raise CheckpointError(f"{path} lists tensors in {size:,} bytes, at most {MAX_HEADER_BYTES:,} are read.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file ({error}). Pickled weights are never read.")


def read_config(folder: Path) -> tuple[LatentActionConfig, list[str]]:
    """The configuration of a checkpoint, and the names of the components that it holds."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no latent actions: {CONFIG_FILE} is missing. On a backbone they are made with "
            "`LatentActionModel.from_backbone` and `LatentActionSpaceTrainer`, or with `latent-trl learn`."
        )
    record = read_json(folder / CONFIG_FILE)
    version = record.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has schema version {version!r}; this version reads 1 to {SCHEMA_VERSION}. Upgrade latent_trl."
        )
    if record.get("model_type") != LatentActionConfig.model_type:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is of a {record.get('model_type')!r}, not of a {LatentActionConfig.model_type!r}."
        )
    names = record.pop("components", None)
    for name in FACTS:
        record.pop(name, None)
    if not isinstance(names, list) or not all(isinstance(name, str) and name in COMPONENTS for name in names):
        raise CheckpointError(f"{folder / CONFIG_FILE}: `components` must be among {COMPONENTS}, got {names!r}.")
    try:
        check_counts(record)
        config = LatentActionConfig.from_dict(record)
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} has a value that cannot be used: {error}") from error
    if config.text_config is None:
        raise CheckpointError(f"{folder / CONFIG_FILE} has no `text_config`, so it belongs to no backbone.")
    return config, names


def check_token(token: str | bool | None) -> None:
    """Raises `ValueError` for a token that HTTP cannot carry: the error of the HTTP client would quote it."""
    if isinstance(token, str) and (not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError("`token` has characters that no token has, such as a line break. Pass the bare token.")
    if token is not None and not isinstance(token, (str, bool)):
        raise TypeError(f"`token` must be a str, a bool or None, got {type(token).__name__}.")


def resolve_folder(
    repo_or_folder: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    patterns: tuple[str, ...] = CHECKPOINT_PATTERNS,
) -> Path:
    """
    The local folder of a checkpoint: `repo_or_folder` itself when it is one, else a snapshot of that Hub repository.

    Only the files of a checkpoint that match `patterns` are downloaded: JSON, safetensors and the card.
    """
    folder = Path(repo_or_folder)
    if not os.path.isdir(folder):
        if folder.is_absolute() or str(repo_or_folder).startswith((".", "~")):
            raise CheckpointError(f"{str(repo_or_folder)!r} is not a folder.")
        check_token(token)
        folder = fetch_snapshot(
            str(repo_or_folder),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[pattern if subfolder is None else f"{subfolder}/{pattern}" for pattern in patterns],
        )
    else:
        finish_saving(folder)
    if subfolder is None:
        return folder
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise CheckpointError(f"`subfolder` must stay inside the repository, got {subfolder!r}.")
    check_inside(folder / subfolder, folder)
    return folder / subfolder
