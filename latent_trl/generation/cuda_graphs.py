"""Calls of one layout, recorded once as a CUDA graph and replayed: the device no longer waits for the host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

# Recording costs about two steps; a shorter text would not earn it back.
LEAST_TOKENS = 16
# Those whose kernels are the same at every step of a static cache.
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


class MixedStaticLayer(StaticLayer):
    """A static layer of a cache whose values may have another type than its keys, as under autocast."""

    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = self.values.to(value_states.dtype)


def static_cache(text_config: PreTrainedConfig, length: int) -> StaticCache:
    """An empty static cache of `length` tokens for a text model whose layers all attend to the whole text."""
    cache = StaticCache(config=text_config, max_cache_len=length)
    cache.layers = [MixedStaticLayer(length) for _ in cache.layers]
    return cache


class CUDAGraphRecording:
    """
    The kernels of one call. Recording does not run them.

    Args:
        function (`Callable`): Without arguments; reads and writes tensors that stay where they are.
    """

    def __init__(self, function: Callable[[], Any]):
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may go on calling the device.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> Any:
        self.graph.replay()
        return self.output


class GraphedCall:
    """
    `function`, run as it is until two successive calls have inputs of one layout: shapes, types and devices of
    tensors, and the same other values. The second of these is recorded, and it and all that follow are replayed.

    Inputs are copied to where the recording reads them, and outputs from where it writes them. What the function
    changes in place, such as a static cache, must be the same object at every call.

    Args:
        function (`Callable`): Launches the same kernels for inputs of one layout, and never waits for the device.
        record (`Callable`, defaults to [`CUDAGraphRecording`]): Makes a recording, with `replay()`, of a function.
    """

    def __init__(self, function: Callable[..., Any], record: Callable[[Callable[[], Any]], Any] = CUDAGraphRecording):
        self.function = function
        self.record = record
        self.layout: tuple | None = None
        self.recording: Any = None
        self.replays = 0

    def __call__(self, *args, **kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        layout = (structure, tuple(_layout_of(leaf) for leaf in leaves))
        if layout != self.layout:
            self.layout, self.recording = layout, None
            return self.function(*args, **kwargs)
        if self.recording is None:
            self.buffers = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = tree_unflatten(self.buffers, structure)
            self.recording = self.record(lambda: self.function(*own_args, **own_kwargs))
        for buffer, leaf in zip(self.buffers, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                buffer.copy_(leaf)
        self.replays += 1
        return tree_map(_copied, self.recording.replay())

    @contextmanager
    def instead_of_forward(self, module: nn.Module) -> Iterator[None]:
        """Takes the place of `module.forward` inside the block; hooks of the module itself still run."""
        own = module.__dict__.get("forward")
        module.forward = self
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _layout_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def obstacle(
    backbone,
    text_configs: list[PreTrainedConfig],
    cache: Cache | None,
    cache_implementation: str | None,
    use_cache: bool,
) -> str | None:
    """
    Why decoding with `backbone` cannot be recorded, or `None` where it can.

    Args:
        backbone (`PreTrainedModel`): The model.
        text_configs (`list[PreTrainedConfig]`): Of its text model and of the policy's layers.
        cache (`Cache`, *optional*): One that was passed to `generate`.
        cache_implementation (`str`, *optional*), use_cache (`bool`): Of the generation config.
    """
    if backbone.device.type != "cuda":
        return f"the model is on {backbone.device.type!r}; move it to a CUDA device"
    if cache is not None or not use_cache or cache_implementation not in (None, "static"):
        return "it needs a static cache of its own: leave out `past_key_values`, `use_cache` and `cache_implementation`"
    if not backbone._can_compile_fullgraph:
        return f"the forward of {type(backbone).__name__} depends on values (its `_can_compile_fullgraph` is false)"
    layers = [layer for config in text_configs for layer in StaticCache(config=config, max_cache_len=1).layers]
    if any(type(layer) is not StaticLayer for layer in layers):
        return "not all layers of text model and policy attend to the whole text"
    attention = backbone.get_decoder().config._attn_implementation
    if attention not in ATTENTION_IMPLEMENTATIONS:
        return f"attention {attention!r} is not one of {ATTENTION_IMPLEMENTATIONS}"
    if len(set(getattr(backbone, "hf_device_map", {}).values())) > 1:
        return "the backbone is spread over several devices (`hf_device_map`)"
    if any(isinstance(p, torch.distributed.tensor.DTensor) for p in backbone.parameters()):
        return "the backbone's weights are sharded"
    return None
