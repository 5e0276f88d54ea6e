"""The layers below the depth, whose states are the same under every plan: computed once, and given to the others."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..generation.cache_name import CACHE_NAME
from ..models.backbone import Backbone
from ..models.decoder_stack import decoder_layers


@dataclass
class LowerCall:
    """
    One call of the text model, up to the layer at the depth.

    Args:
        states (`torch.Tensor`): `[B, L, d]`, what that layer was given.
        arguments (`dict`): Of the text model.
        in_tuples (`bool`): Whether layers return tuples.
    """

    states: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: dict[str, Any] = field(default_factory=dict)
    in_tuples: bool = False


@contextmanager
def record_lower(view: Backbone, depth: int) -> Iterator[LowerCall]:
    """Records what the layer number `depth` is given in the last call of the text model inside the block."""
    found, layer = LowerCall(), decoder_layers(view.decoder)[depth]
    signature = inspect.signature(view.decoder.forward)

    def keep_call(module, args, kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        found.arguments = {**bound, **bound.pop("kwargs", {})}

    def keep_states(module, args, kwargs):
        found.states = args[0] if args else kwargs["hidden_states"]

    def keep_kind(module, args, output):
        found.in_tuples = isinstance(output, tuple)

    handles = [
        view.decoder.register_forward_pre_hook(keep_call, with_kwargs=True),
        layer.register_forward_pre_hook(keep_states, with_kwargs=True),
        layer.register_forward_hook(keep_kind),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def given_lower(view: Backbone, depth: int, states: torch.Tensor, in_tuples: bool) -> Iterator[None]:
    """Inside the block the layers below `depth` are not run; the one at it is given `states` `[N, L, d]`."""
    layers = decoder_layers(view.decoder)

    def passed_on(*args, **kwargs):
        own = args[0] if args else kwargs["hidden_states"]
        return (own,) if in_tuples else own

    def give(module, args, kwargs):
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    for layer in layers[:depth]:
        layer.forward = passed_on
    handle = layers[depth].register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for layer in layers[:depth]:
            del layer.forward


def repeated_call(call: LowerCall, rows: int, cache: Any) -> dict[str, Any]:
    """
    Arguments of the text model for `rows` rows that all are the one row of `call`, and a cache of their own. What the
    model packs by its visual tokens, a row after another, is repeated with them.
    """
    arguments = {name: _repeated(value, rows, -2 if name == "position_ids" else 0) for name, value in _plain(call)}
    return {**arguments, CACHE_NAME: cache}


def _plain(call: LowerCall):
    return [(name, value) for name, value in call.arguments.items() if name != CACHE_NAME]


def _repeated(value: Any, rows: int, dim: int) -> Any:
    if isinstance(value, dict):
        return {name: _repeated(one, rows, dim) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(one, rows, dim) for one in value)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return (
        value.repeat_interleave(rows, dim=dim) if value.shape[dim] == 1 else value.repeat(rows, *[1] * (value.ndim - 1))
    )
