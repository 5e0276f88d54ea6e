"""Rows of a cache and of a model's inputs: which can be picked, repeated or left out, and how."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .cuda_graphs import MixedStaticLayer

# All that these hold of a text is keys and values, one row of them a text. Of other kinds (quantised, offloaded, with
# recurrent states) it is not known what else goes with a row.
ROW_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, MixedStaticLayer)


def has_rows(cache: Cache) -> bool:
    """Whether [`pick_rows`] can be had of `cache`: the exact types of its layers are known."""
    return all(type(layer) in ROW_LAYERS for layer in cache.layers)


def pick_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Leaves `cache` with the rows at `rows` `[N]`, in their order, each as often as it is named."""
    cache.reorder_cache(rows)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.batch_size = len(rows)


def rows_of_input(value, rows: slice | torch.Tensor):
    """
    Some rows of an input of a model: of token ids, types and masks `[B, L]`, of position ids `[..., B, L]`, which some
    models have one row of for all, and of prepared masks `[B, 1, L, S]`, also by the kind of layer that they are for.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: rows_of_input(mask, rows) for name, mask in value.items()}
    if value.ndim == 4:
        return value[rows]
    return value if value.shape[-2] == 1 else value[..., rows, :]
