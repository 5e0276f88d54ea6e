"""Several samples of each prompt from one encoding of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache

from .cache_rows import has_rows, pick_rows, rows_of_input
from .output import LatentActionGenerateOutput


class SharedPrefill:
    """
    Several samples of each prompt from one encoding of it.

    Rows are laid out in tiles, the whole batch `copies` times, so that what is counted by image and not by row stays
    in order. Where the cache can be copied, images are given once, the first call of the base model is cut to the
    first tile, and its cache is copied for the others.

    Args:
        rows (`int`): B, the number of prompts.
        copies (`int`): Samples a prompt.
        cache (`Cache`, *optional*): A fresh cache of the kind that will be used; `None` without one.
    """

    def __init__(self, rows: int, copies: int, cache: Cache | None):
        self.rows = rows
        self.copies = copies
        self.once = copies > 1 and cache is not None and has_rows(cache)
        self.names = {"input_ids", "attention_mask", "position_ids"}
        self.pending = False

    def tiled(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor if self.copies == 1 else torch.cat([tensor] * self.copies, dim=dim)

    def tiled_inputs(self, inputs: dict, prompt_shape: torch.Size) -> dict:
        """`inputs` of B prompts for all tiles; where prompts are encoded once, images stay as they are."""
        out = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                if name == "position_ids":
                    out[name] = self.tiled(value, dim=-2) if value.shape[-2] == self.rows else value
                elif not self.once or value.shape == prompt_shape:
                    out[name] = self.tiled(value)
                    self.names.add(name)
        return out

    def in_tiles(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Rows that are given prompt by prompt, in the order of the tiles."""
        if tensor is None or self.copies == 1:
            return tensor
        return tensor.unflatten(0, (self.rows, self.copies)).transpose(0, 1).flatten(0, 1)

    def restore_order(self, output: LatentActionGenerateOutput) -> None:
        """Puts the samples of a prompt beside each other."""
        if self.copies == 1:
            return
        order = torch.arange(self.rows * self.copies, device=output.sequences.device)
        order = order.unflatten(0, (self.copies, self.rows)).transpose(0, 1).flatten()
        for name, value in list(output.items()):
            if isinstance(value, torch.Tensor):
                output[name] = value[order]
            elif isinstance(value, tuple):
                output[name] = tuple(part[order] for part in value)
            elif isinstance(value, Cache):
                value.reorder_cache(order)

    @contextmanager
    def attached(self, base: nn.Module) -> Iterator[None]:
        """Cuts the first call of `base` inside the block to the first tile, where prompts are encoded once."""
        if not self.once:
            yield
            return

        def cut(module, args, kwargs):
            handle.remove()
            self.pending = True
            first = slice(self.rows)
            by_row = {k: rows_of_input(v, first) for k, v in kwargs.items() if k in self.names}
            return tuple(ids[first] for ids in args), {**kwargs, **by_row}

        handle = base.register_forward_pre_hook(cut, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def copy_cache(self, cache: Cache | None) -> None:
        """Copies the first tile's cache for the others, once. A model without one reads all tiles at its next step."""
        if cache is not None:
            pick_rows(cache, torch.arange(self.rows).repeat(self.copies))
        self.pending = False
