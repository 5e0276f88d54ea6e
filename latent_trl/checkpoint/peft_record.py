"""The record of an adapter that is not LoRA: plain values alone are taken from a file."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from .files import CheckpointError

# Beside LoRA, those all of whose tensors are floating point.
METHODS = ("IA3", "LOHA", "LOKR", "VERA", "LN_TUNING", "TRAINABLE_TOKENS")
# Numbers above it are those of tokens and seeds; a rank or block of that size is no adapter.
MAX_SIZE = 4096
UNBOUNDED = ("token_indices", "projection_prng_key")
MAX_ENTRIES = 100_000
# Of other programs, or of who made the adapter.
OF_OTHERS = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
)
NAME = re.compile(r"[\w.-]{1,256}")


def plain_fields(record: dict[str, Any], config_class: type, source: Path | str) -> dict[str, Any]:
    """
    The arguments of a PEFT configuration from `adapter_config.json`.

    Args:
        record (`dict`): The file's content.
        config_class (`type`): The configuration of its method.
        source (`Path`): The file, for errors.

    Raises:
        CheckpointError: For a field that the method does not have, or a value that is not plain: names of modules are
            letters, digits, dots and lines, never patterns, and sizes are at most 4096.
    """
    known = {field.name for field in fields(config_class)}
    unknown = sorted(name for name, value in record.items() if value and name not in known and name not in OF_OTHERS)
    if unknown:
        raise CheckpointError(f"{source}: {unknown} are no fields of {config_class.__name__}.")
    taken = {name: value for name, value in record.items() if name in known and name not in OF_OTHERS}
    for name, value in taken.items():
        if not _is_plain(value, name in UNBOUNDED):
            raise CheckpointError(f"{source}: `{name}` has {value!r:.200}, a value that cannot be used.")
    targets = taken.get("target_modules")
    if targets is not None and not isinstance(targets, list):
        raise CheckpointError(f"{source}: `target_modules` must be a list of names, got {targets!r:.200}.")
    return taken


def _is_plain(value: Any, unbounded: bool) -> bool:
    if isinstance(value, (list, dict)) and len(value) > MAX_ENTRIES:
        return False
    if isinstance(value, list):
        return all(not isinstance(item, (list, dict)) and _is_plain(item, unbounded) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and NAME.fullmatch(k) for k in value) and _is_plain([*value.values()], unbounded)
    if isinstance(value, str):
        return NAME.fullmatch(value) is not None
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= (2**31 if unbounded else MAX_SIZE)
    return value is None or isinstance(value, (bool, float))
