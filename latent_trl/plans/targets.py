"""Where plans attach: the linear maps of a text model that write to its residual stream."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models.backbone import Backbone
from ..models.decoder_stack import decoder_layers


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that PEFT has put another around, or the layer itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT's LoRA takes the module for a linear map, one that it adapts already among them."""
    module = base_layer(module)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_maps(module: nn.Module) -> list[nn.Module]:
    """The linear maps of a module, itself among them; of one that carries a LoRA the whole, and not its parts."""
    if is_linear(module):
        return [module]
    return [found for child in module.children() for found in linear_maps(child)]


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear map."""
    module = base_layer(module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


def plan_targets(view: Backbone, depth: int, target_modules: list[str] | None = None) -> list[str]:
    """
    Names, in the whole model, of the linear maps that plans change: of the decoder layers from number `depth` on.

    Args:
        view (`Backbone`): The backbone.
        depth (`int`): The number of layers that carry no plan.
        target_modules (`list[str]`, *optional*): Ends of names, as in PEFT. By default the maps are found by a pass
            over a made-up text: in each part of a layer (its attention, its feed-forward network) the last linear map
            that is run and has the width of the residual stream.

    Raises:
        ValueError: When `depth` leaves no layer, or there is no such map.
    """
    layers = list(decoder_layers(view.decoder))
    if not 0 <= depth < len(layers):
        raise ValueError(
            f"`depth` must be in 0 ... {len(layers) - 1}, for a text model of {len(layers)} layers; got {depth}."
        )
    names = {module: name for name, module in view.model.named_modules()}
    if target_modules is None:
        found = _residual_writers(view, layers[depth:])
    else:
        found = [
            module
            for layer in layers[depth:]
            for module in linear_maps(layer)
            if any(f".{names[module]}".endswith(f".{end}") for end in target_modules)
        ]
    if not found:
        linear = sorted({names[m].rsplit(".", 1)[-1] for m in linear_maps(layers[depth])})
        raise ValueError(
            f"`target_modules={target_modules}` names no linear map of the layers from {depth} on. The first of them "
            f"has {linear}."
        )
    return [names[module] for module in found]


@torch.no_grad()
def _residual_writers(view: Backbone, layers: list[nn.Module]) -> list[nn.Module]:
    order: list[nn.Module] = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        # Rows must stand on the first axis, so that each can have a plan of its own.
        if args and args[0].ndim == 3 and len(args[0]) == 2 and features(module)[1] == view.hidden_size:
            order.append(module)

    handles = [module.register_forward_hook(keep) for layer in layers for module in linear_maps(layer)]
    try:
        ids = torch.tensor([[1, 2, 3], [1, 2, 3]], device=view.model.get_input_embeddings().weight.device)
        view.decoder(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for layer in layers:
        own = {id(module) for module in layer.children() if is_linear(module)}
        last = [m for m in order if id(m) in own][-1:]
        for part in layer.children():
            inside = {id(module) for module in linear_maps(part)} - own
            last += [m for m in order if id(m) in inside][-1:]
        found += last
    return found
