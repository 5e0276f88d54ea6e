"""What learned components share: a folder of their own, the arguments in JSON and the tensors in safetensors."""

import inspect
import json
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from ..checkpoint.atomic_folder import atomic_folder
from ..checkpoint.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    check_range,
    check_weights,
    read_json,
    read_weights,
    resolve_folder,
)
from ..hub.push import push_component

MAX_BUFFER_ELEMENTS = 2**30


def whole_tensors(tensors: dict[str, torch.Tensor | None], what: str) -> dict[str, torch.Tensor]:
    """
    The tensors as they are written to a file.

    Raises:
        ValueError: When one is missing, empty or sharded, as DeepSpeed and FSDP leave those of a single process.
    """
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0 or isinstance(tensor, DTensor):
            state = "missing" if tensor is None else "sharded" if isinstance(tensor, DTensor) else "empty"
            raise ValueError(
                f"The tensor {name!r} of {what} is {state}. Pass `state_dict` with whole tensors, such as "
                "`accelerator.get_state_dict(model)` gives."
            )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}


def check_shapes(module: nn.Module, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raises [`CheckpointError`] unless `shapes` are those of the tensors of `module`, by their names."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing, extra = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"The tensors of {source} do not fit: missing {missing[:5]}, unexpected {extra[:5]}.")
    wrong = {name: (shape, own[name]) for name, shape in shapes.items() if shape != own[name]}
    if wrong:
        name, (got, want) = next(iter(wrong.items()))
        raise CheckpointError(f"{source}: tensor {name!r} has shape {got}, expected {want} ({len(wrong)} differ).")


def check_state(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raises [`CheckpointError`] unless `tensors` are those of `module` by name and shape."""
    check_shapes(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)


def load_state(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """
    Copies `tensors` into `module`, all or nothing.

    Raises:
        CheckpointError: Where names or shapes differ, or the module's dtype cannot hold a value.
    """
    check_state(module, tensors, source)
    check_range(tensors, {name: tensor.dtype for name, tensor in module.state_dict().items()}, source)
    module.load_state_dict(tensors)


def _check_buffers(module: nn.Module) -> None:
    """Raises `ValueError` for tables that are in no file, such as masks, of more than `MAX_BUFFER_ELEMENTS`."""
    size = sum(buffer.numel() for buffer in module.buffers())
    if size > MAX_BUFFER_ELEMENTS:
        raise ValueError(f"it makes tables of {size:,} numbers, at most {MAX_BUFFER_ELEMENTS:,} are made")


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

        Raises:
            ValueError: When a tensor is sharded, empty or missing. Nothing is written then.
        """
        config = {"component": type(self).__name__, **self.to_config()}
        with torch.device("meta"):
            planned = type(self)(**self.to_config()).state_dict()
        own = self.state_dict() if state_dict is None else state_dict
        tensors = whole_tensors({name: own.get(name) for name in planned}, f"the {self.folder_name}")
        wrong = [name for name, tensor in tensors.items() if tensor.shape != planned[name].shape]
        if wrong:
            got, want = tuple(tensors[wrong[0]].shape), tuple(planned[wrong[0]].shape)
            raise ValueError(
                f"The tensor {wrong[0]!r} of the {self.folder_name} has shape {got} in place of {want}. Pass "
                "`state_dict` with whole tensors."
            )
        with atomic_folder(Path(save_directory)) as folder:
            (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def check_sizes(cls, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        """
        Raises `ValueError` when `config` asks for more than a file of tensors of these `shapes` has, where merely to
        lay it out would take time or memory.
        """

    def push_to_hub(self, repo_id: str, **kwargs: Any):
        """
        Uploads the component into its own folder of a repository, in one commit; other folders stay.

        Args:
            repo_id (`str`): `"user/name"`.
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `token`.
        """
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
        parameters = inspect.signature(cls.__init__).parameters
        needed = {name for name in cls.config_keys if parameters[name].default is inspect.Parameter.empty}
        if not needed <= set(config) <= set(cls.config_keys):
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: expected the keys {sorted(cls.config_keys)}, got {sorted(config)}."
            )
        for name, hint in get_type_hints(cls.__init__).items():
            if name in config and hint in (int, bool, str) and type(config[name]) is not hint:
                raise CheckpointError(
                    f"{folder / CONFIG_NAME}: `{name}` must be of type {hint.__name__}, got {config[name]!r:.100}."
                )
        # Shapes are compared before memory is taken for them.
        shapes = check_weights(folder / WEIGHTS_NAME)
        try:
            cls.check_sizes(config, shapes)
            with torch.device("meta"):
                planned = cls(**config)
            check_shapes(planned, shapes, str(folder))
            _check_buffers(planned)
            component = cls(**config)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder / CONFIG_NAME} has a value that cannot be used: {error}.") from error
        tensors = read_weights(folder / WEIGHTS_NAME)
        dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
        if dtype is not None or len(dtypes) == 1:
            component.to(dtype if dtype is not None else dtypes.pop())
        load_state(component, tensors, str(folder))
        return component
