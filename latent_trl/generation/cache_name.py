"""The name under which transformers passes a cache of keys and values, which is not the same in all its releases."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
# Of arguments and outputs of models: `past_key_values` up to transformers 5.23, `cache` since.
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


def rename_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of a model with the cache, given under either name, under the one that transformers reads."""
    given = [name for name in CACHE_NAMES if inputs.get(name) is not None]
    if len(given) > 1:
        raise ValueError("`cache` and `past_key_values` are two names of one argument. Pass one of them.")
    renamed = {name: value for name, value in inputs.items() if name not in CACHE_NAMES}
    return {**renamed, CACHE_NAME: inputs[given[0]]} if given else renamed
