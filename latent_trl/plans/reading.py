"""What the chooser reads of prompts: the backbone's states, and those that each plan gives the last position."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.backbone import Backbone
from ..models.decoder_stack import decoder_layers
from .prompt_cache import PromptCache


@torch.no_grad()
def read_prompts(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    What the chooser of a [`PlanModel`] reads.

    Args:
        model (`PlanModel`): The model.
        inputs (`dict`): `input_ids`, `attention_mask` `[B, P]`, and what else the backbone takes, on its device.

    Returns:
        States `[B, P, F]` of the prompts without a plan, and `[B, K, F]` of their last position under each plan, where
        the chooser reads plans; float32.

    Raises:
        ValueError: Where the chooser reads plans, for prompts of one token, or that end with a picture.
    """
    layers = model.chooser_layers
    if not model.plan_config.chooser_reads_plans:
        return prompt_states(model.view, layers, inputs), None
    ids, plans = inputs["input_ids"], model.plan_config.num_plans
    _check_ends(model.view, ids, inputs["attention_mask"])
    before = {name: value[:, :-1] if value.shape[:2] == ids.shape else value for name, value in inputs.items()}
    with recorded_states(model.view, layers) as found:
        cache = PromptCache.encode(model.view, before)
        states = [torch.cat(found, dim=-1)]
    planned = []
    # Not more rows at once than there are prompts, or plans: each has a copy of its prompt's cache.
    at_once = max(1, len(ids) // plans)
    for start in range(0, len(ids), at_once):
        rows = torch.arange(start, min(start + at_once, len(ids)))
        # What stands before the last position is read without a plan, once for all of them.
        copies = cache.rows(rows.repeat_interleave(plans))
        under = torch.arange(plans).repeat(len(rows))
        with model.plans.active(under), recorded_states(model.view, layers) as found:
            copies.extend(ids[rows.repeat_interleave(plans), -1:])
            planned.append(torch.cat(found, dim=-1).view(len(rows), plans, -1))
    with recorded_states(model.view, layers) as found:
        cache.extend(ids[:, -1:])
        states.append(torch.cat(found, dim=-1))
    return torch.cat(states, dim=1), torch.cat(planned)


def _check_ends(view: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> None:
    short = mask.sum(dim=1) < 2
    if short.any():
        raise ValueError(
            f"Prompt {int(short.nonzero()[0])} has one token, and the chooser reads plans at the last of several "
            "(`chooser_reads_plans`)."
        )
    pictures = torch.isin(ids[:, -1].cpu(), torch.tensor(view.vision_token_ids, dtype=torch.long))
    if pictures.any():
        raise ValueError(
            f"Prompt {int(pictures.nonzero()[0])} ends with a picture, and the chooser reads plans at a last token of "
            "text (`chooser_reads_plans`). Let text follow, as chat templates do."
        )


@torch.no_grad()
def prompt_states(view: Backbone, layers: list[int], inputs: dict[str, Any]) -> torch.Tensor:
    """
    States of prompts behind some decoder layers without a plan, each divided by its root mean square.

    Args:
        view (`Backbone`): The backbone.
        layers (`list[int]`): Numbers of the layers.
        inputs (`dict`): `input_ids`, `attention_mask` `[B, P]`, and what else the backbone takes, on its device.

    Returns:
        `[B, P, len(layers) * d]` in float32.
    """
    with recorded_states(view, layers) as found:
        view.encode(**inputs)
        return torch.cat(found, dim=-1)


@contextmanager
def recorded_states(view: Backbone, layers: list[int]) -> Iterator[list[torch.Tensor]]:
    """
    Inside the block, the states `[B, P, d]` behind each of the layers in the last call of the text model, in float32,
    each divided by its root mean square.
    """
    found = [torch.empty(0)] * len(layers)
    stack = decoder_layers(view.decoder)

    def keep(place: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            states = (output[0] if isinstance(output, tuple) else output).float()
            found[place] = states * states.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()

        return hook

    handles = [stack[number].register_forward_hook(keep(place)) for place, number in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
