"""The record of a LoRA adapter: plain fields alone are taken from a file, and sizes are compared with its tensors."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from .files import CheckpointError
from .peft_record import METHODS, NAME, OF_OTHERS

MAX_RANK = 4096
# What may be taken, and of what type. Which layers are adapted follows from the names of the tensors.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "bias": str,
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "fan_in_fan_out": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "modules_to_save": list,
    "target_parameters": list,
    "trainable_token_indices": (list, dict),
}
# Of other programs, or of who made the adapter; and what follows from the tensors.
NOT_TAKEN = {
    *OF_OTHERS,
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Ways to begin that leave the backbone as it is; PEFT makes others change it.
HARMLESS_BEGINNINGS = (True, False, None, "gaussian", "orthogonal")
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight|\.bias)?")


def lora_fields(record: dict[str, Any], shapes: dict[str, tuple[int, ...]], source: Path) -> dict[str, Any]:
    """
    The arguments of a `LoraConfig` from `adapter_config.json`.

    Args:
        record (`dict`): The file's content.
        shapes (`dict`): Shapes of the adapter's tensors, by their names in the file.
        source (`Path`): The file, for errors.

    Raises:
        CheckpointError: For another method than LoRA, a field that is not a plain one, a value of another type, or a
            rank that no tensor has.
    """
    if record.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{source}: `peft_type` must be 'LORA' or one of {list(METHODS)}, got {record.get('peft_type')!r:.200}."
        )
    taken = plain_lora_fields(record, source)
    held = {shape[0] for name, shape in shapes.items() if name.endswith(("lora_A.weight", "embedding_A")) and shape}
    for rank in ranks_of(taken):
        if not (rank in held or taken.get("target_parameters")):
            raise CheckpointError(
                f"{source}: the rank {rank!r:.200} is that of no tensor; tensors have {sorted(held)[:5]}."
            )
    return taken


def plain_lora_fields(record: dict[str, Any], source: Path | str) -> dict[str, Any]:
    """What [`lora_fields`] takes, without a comparison with tensors."""
    if record.get("init_lora_weights", True) not in HARMLESS_BEGINNINGS:
        raise CheckpointError(
            f"{source}: `init_lora_weights={record['init_lora_weights']!r}` belongs to a backbone whose weights were "
            "changed. Convert the adapter with PEFT (`path_initial_model_for_weight_conversion`)."
        )
    unknown = sorted(k for k, v in record.items() if v and k not in FIELDS.keys() | NOT_TAKEN | {"init_lora_weights"})
    if unknown:
        raise CheckpointError(f"{source}: {unknown} are no plain fields of LoRA, {sorted(FIELDS)}.")
    taken = {name: record[name] for name in FIELDS if record.get(name) is not None}
    for name, value in taken.items():
        wanted = FIELDS[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise CheckpointError(f"{source}: `{name}` has {value!r:.200}, a value that cannot be used.")
    indices = taken.get("trainable_token_indices", [])
    parts = list(indices.values()) if isinstance(indices, dict) else [indices]
    if not all(isinstance(part, list) and all(type(i) is int and 0 <= i < 2**31 for i in part) for part in parts):
        raise CheckpointError(f"{source}: `trainable_token_indices` must hold token ids, got {indices!r:.200}.")
    names = [
        *(indices if isinstance(indices, dict) else ()),
        *taken.get("modules_to_save", []),
        *taken.get("target_parameters", []),
    ]
    patterns = {**taken.get("rank_pattern", {}), **taken.get("alpha_pattern", {})}
    # PEFT takes the keys of patterns for regular expressions.
    wrong = [name for name in [*names, *patterns] if not isinstance(name, str) or not NAME.fullmatch(name)]
    if wrong:
        raise CheckpointError(f"{source}: {wrong[0]!r:.200} is not a plain name of a module.")
    if not all(isinstance(value, (int, float)) for value in patterns.values()):
        raise CheckpointError(f"{source}: `rank_pattern` and `alpha_pattern` must hold numbers.")
    for rank in ranks_of(taken):
        if not 0 < rank <= MAX_RANK:
            raise CheckpointError(f"{source}: the rank {rank!r:.200} is not from 1 to {MAX_RANK}.")
    return taken


def ranks_of(fields: dict[str, Any]) -> list[Any]:
    return [fields.get("r", 8), *fields.get("rank_pattern", {}).values()]


def lora_targets(
    record: dict[str, Any], shapes: dict[str, tuple[int, ...]], backbone: nn.Module, source: Path
) -> list[str]:
    """
    The layers that an adapter is on, from the names of its tensors, which are compared with the backbone before
    anything is made for them.

    Returns:
        `target_modules` of the file where they mean these layers and no others, else the layers' full names.

    Raises:
        CheckpointError: When a tensor has no layer in the backbone, or another shape.
    """
    modules = dict(backbone.named_modules())
    given: Any = record.get("target_modules")
    plain = isinstance(given, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in given)
    if record.get("target_parameters"):
        if given and not plain:
            raise CheckpointError(f"{source}: `target_modules` must be a list of names beside `target_parameters`.")
        return given or []
    adapted = set()
    for name, shape in shapes.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            continue
        layer, kind = modules.get(match[1]), match[2]
        if layer is None:
            raise CheckpointError(f"The adapter's tensors do not fit the backbone: it has no layer {match[1]!r:.200}.")
        adapted.add(match[1])
        if not isinstance(layer, nn.Linear) or kind not in ("A", "B"):
            continue
        size, axis = (layer.in_features, 1) if kind == "A" else (layer.out_features, 0)
        if not name.endswith(".bias") and (len(shape) != 2 or shape[axis] != size):
            raise CheckpointError(
                f"The adapter's tensors do not fit the backbone: {name!r:.200} has shape {shape}, where the layer has "
                f"size {size}."
            )
    narrowed = any(record.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if plain and not narrowed and adapted == {name for name in modules if _ends(name) & set(given)}:
        return given
    return sorted(adapted)


def _ends(name: str) -> set[str]:
    """The names that PEFT takes for that of a module: its own, and its last parts."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
