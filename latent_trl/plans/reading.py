"""What the chooser reads of prompts: the backbone's states, and those that each plan gives the last position."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.backbone import Backbone
from ..models.decoder_stack import decoder_layers
from .prompt_cache import PromptCache

# Rows that are read under plans at once, where there are fewer prompts.
FEWEST_ROWS = 8
# In norm, between a prompt that is read in one pass and in two: far above rounding, in float32 and in shorter types.
MOST_DIFFERENCE, MOST_IN_SHORT_TYPES = 0.001, 0.1


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
        ValueError: Where the chooser reads plans, for prompts of one token, or that end with a picture, and for
            backbones whose prompts attend in both directions.
    """
    layers, view = model.chooser_layers, model.view
    if not model.plan_config.chooser_reads_plans:
        return prompt_states(view, layers, inputs), None
    ids, plans = inputs["input_ids"], model.plan_config.num_plans
    _check_ends(view, ids, inputs["attention_mask"])
    before = {name: _without_last(value, ids.shape) for name, value in inputs.items()}
    with recorded_states(view, layers) as found:
        cache = PromptCache.encode(view, before)
        states = [torch.cat(found, dim=-1)]
    # Behind a picture the last token need not stand one further on each axis.
    cache.position_ids = view.positions(**inputs)[..., -1:] - 1
    planned = torch.empty(len(ids) * plans, states[0].shape[-1], device=ids.device)
    rows, under = torch.arange(len(ids)).repeat_interleave(plans), torch.arange(plans).repeat(len(ids))
    # Each row has a copy of its prompt's cache.
    at_once = max(len(ids), FEWEST_ROWS)
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        # What stands before the last position is read without a plan, once for all of them.
        copies = cache.rows(rows[some])
        with model.plans.active(under[some]), recorded_states(view, layers) as found:
            copies.extend(ids[rows[some].to(ids.device), -1:])
            planned[some] = torch.cat(found, dim=-1)[:, -1]
    with recorded_states(view, layers) as found:
        cache.extend(ids[:, -1:])
        states.append(torch.cat(found, dim=-1))
    whole = torch.cat(states, dim=1)
    if not model.chooser.under_plans.is_checked:
        _check_split(view, layers, inputs, whole)
        model.chooser.under_plans.is_checked = True
    return whole, planned.view(len(ids), plans, -1)


def _without_last(value: Any, shape: torch.Size) -> Any:
    """What is said of each token, without the last one."""
    return value[:, :-1] if isinstance(value, torch.Tensor) and value.shape == shape else value


def _check_split(view: Backbone, layers: list[int], inputs: dict[str, Any], found: torch.Tensor) -> None:
    """Raises `ValueError` for a backbone that reads what stands before the last token otherwise without that."""
    mask = inputs["attention_mask"].bool()
    whole = prompt_states(view, layers, inputs)[mask]
    most = MOST_DIFFERENCE if view.model.dtype == torch.float32 else MOST_IN_SHORT_TYPES
    if (found[mask] - whole).norm() > most * whole.norm():
        raise ValueError(
            f"`chooser_reads_plans`: the backbone ({type(view.model).__name__}) reads a prompt otherwise without its "
            "last token, as models do whose prompts attend in both directions. Leave it out."
        )


def _check_ends(view: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> None:
    short = mask.sum(dim=1) < 2
    if short.any():
        raise ValueError(
            f"Prompt {int(short.nonzero()[0])} of the batch has one token, and the chooser reads plans at the last of "
            "several (`chooser_reads_plans`)."
        )
    pictures = torch.isin(ids[:, -1].cpu(), torch.tensor(view.vision_token_ids, dtype=torch.long))
    if pictures.any():
        raise ValueError(
            f"Prompt {int(pictures.nonzero()[0])} of the batch ends with a picture, and the chooser reads plans at a "
            "last token of text (`chooser_reads_plans`). Let text follow, as chat templates do."
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
