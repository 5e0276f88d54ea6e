"""What learned components share: a folder of their own, the arguments in JSON and the tensors in safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .atomic_folder import atomic_folder
from .download import fetch_snapshot

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_JSON_BYTES = 32 * 2**20
# What is downloaded of a repository: the top folder's record, report and card, and the folders of the parts.
_PARTS = "codebook projector policy world_model inverse_dynamics value_head backbone adapter".split()
CHECKPOINT_PATTERNS = (
    *("latent_action_config.json", "training_report.json", "README.md"),
    *(f"{part}/*.{kind}" for part in _PARTS for kind in ("json", "safetensors")),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is: missing, damaged, or made for something else."""


def check_inside(path: Path, root: Path) -> None:
    """Raises [`CheckpointError`] when links lead from `path` out of the folder `root`, or of the Hub cache it is in."""
    root = root.resolve()
    caches = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(path.resolve().is_relative_to(allowed) for allowed in (root, *caches)):
        raise CheckpointError(f"{path} is a link that leads outside {root}. Put the file itself there.")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing from {path.parent}.")
    check_inside(path, path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises [`CheckpointError`] when `path` is missing or holds anything else."""
    _check_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; no JSON of a checkpoint is that large.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file. Raises [`CheckpointError`] when it is missing, truncated or another format."""
    _check_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). Pickled weights are never read."
        ) from error


def check_state(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raises [`CheckpointError`] unless `tensors` are those of `module` by name and shape."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"The tensors of {source} do not fit: missing {missing[:5]}, unexpected {extra[:5]}.")
    wrong = {
        name: (tuple(t.shape), tuple(own[name].shape)) for name, t in tensors.items() if t.shape != own[name].shape
    }
    if wrong:
        name, (got, want) = next(iter(wrong.items()))
        raise CheckpointError(f"{source}: tensor {name!r} has shape {got}, expected {want} ({len(wrong)} differ).")


def load_state(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copies `tensors` into `module`, all or nothing. Raises [`CheckpointError`] where names or shapes differ."""
    check_state(module, tensors, source)
    module.load_state_dict(tensors)


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
    if not folder.is_dir():
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
    if subfolder is None:
        return folder
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise CheckpointError(f"`subfolder` must stay inside the repository, got {subfolder!r}.")
    check_inside(folder / subfolder, folder)
    return folder / subfolder


class LatentActionComponent(nn.Module):
    """
    Base of the learned components. A subclass names its constructor's arguments in `config_keys`, its folder in
    `folder_name`, and keeps each argument as an attribute.
    """

    config_keys: tuple[str, ...] = ()
    folder_name: str = ""

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain JSON values."""
        return {name: getattr(self, name) for name in self.config_keys}

    def save_pretrained(self, save_directory: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """
        Writes `config.json` and `model.safetensors` into `save_directory`, both in one step; `state_dict` replaces the
        own tensors. Other files there stay.
        """
        config = {"component": type(self).__name__, **self.to_config()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in (state_dict or self.state_dict()).items()}
        with atomic_folder(Path(save_directory)) as folder:
            (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    def push_to_hub(self, repo_id: str, **kwargs: Any):
        """
        Uploads the component into its own folder of a repository, in one commit; other folders stay.

        Args:
            repo_id (`str`): `"user/name"`.
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `token`.
        """
        from ..hub.push import push_component

        return push_component(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None, **hub_kwargs
    ) -> "LatentActionComponent":
        """
        Loads the component alone.

        Args:
            repo_or_folder (`str` or `Path`): A checkpoint, or the component's own folder.
            subfolder (`str`, *optional*): Folder inside it. Defaults to the component's own when that exists.
            dtype (`torch.dtype`, *optional*): Defaults to the dtype on disk.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            CheckpointError: When a file is missing or damaged, or a tensor does not fit. Nothing is initialised anew.
        """
        own = (CONFIG_NAME, WEIGHTS_NAME, *(f"{cls.folder_name}/{name}" for name in (CONFIG_NAME, WEIGHTS_NAME)))
        wanted = own if subfolder is None else tuple(f"{subfolder}/{name}" for name in own)
        folder = resolve_folder(repo_or_folder, patterns=wanted, **hub_kwargs)
        if subfolder is None and (folder / cls.folder_name / CONFIG_NAME).is_file():
            subfolder = cls.folder_name
        folder = resolve_folder(folder, subfolder=subfolder)
        config = read_json(folder / CONFIG_NAME)
        kind = config.pop("component", None)
        if kind != cls.__name__:
            raise CheckpointError(f"{folder} holds a {kind!r}, not a {cls.__name__!r}.")
        if set(config) != set(cls.config_keys):
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: expected the keys {sorted(cls.config_keys)}, got {sorted(config)}."
            )
        tensors = read_tensors(folder / WEIGHTS_NAME)
        try:
            # Shapes are compared before memory is taken for them.
            with torch.device("meta"):
                check_state(cls(**config), tensors, str(folder))
            component = cls(**config)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder / CONFIG_NAME} has a value that cannot be used: {error}.") from error
        dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
        if dtype is not None or len(dtypes) == 1:
            component.to(dtype if dtype is not None else dtypes.pop())
        load_state(component, tensors, str(folder))
        return component


def tensor_metadata(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of a safetensors file, without reading its data."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
