"""The chooser: from the states of a prompt to what each plan is worth there."""

from typing import Any

import torch
from torch import nn

from ..models.backbone import Backbone
from ..models.decoder_stack import decoder_layers
from .configuration import PlanConfig
from .switch import PlanSwitch

HEADS = 4


class PlanChooser(nn.Module):
    """
    K sigmoids on the states of a prompt: a layer on its last position, beside attention with learned queries over all
    positions, pictures' among them, which starts at nothing and comes in where it helps. Float32.

    Args:
        input_size (`int`): Width of the states that [`prompt_states`] gives.
        num_plans (`int`): K.
        size (`int`): Width of the hidden layer.
        switch_size (`int`, *optional*): Width of the states that a switch of segments reads; by default there is none.
    """

    def __init__(self, input_size: int, num_plans: int, size: int, switch_size: int | None = None):
        super().__init__()
        self.last = nn.Linear(input_size, size)
        self.queries = nn.Linear(input_size, HEADS, bias=False)
        self.values = nn.Linear(input_size, size // HEADS, bias=False)
        self.attended = nn.Linear(HEADS * (size // HEADS), size, bias=False)
        nn.init.zeros_(self.attended.weight)
        self.output = nn.Linear(size, num_plans)
        self.switch = None if switch_size is None else PlanSwitch(switch_size)

    @classmethod
    def of(cls, view: Backbone, config: PlanConfig) -> "PlanChooser":
        """A fresh one that reads the states of a backbone, with a switch where the plans have one."""
        width = len(chosen_layers(view, config.chooser_layers)) * view.hidden_size
        switch_size = view.hidden_size if config.segment == "switch" else None
        return cls(width, config.num_plans, config.chooser_size, switch_size)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[B, P, input_size]`, of prompts that are padded on the left.
            mask (`torch.Tensor`): `[B, P]`, 1 where there is a token.

        Returns:
            Logits `[B, K]` of the plans' rewards.
        """
        return self.output(self.features(states, mask))

    def features(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the last layer reads, `[B, size]`."""
        states = states.float()
        scores = self.queries(states).masked_fill(~mask.bool()[..., None], -torch.inf)
        # A linear map of the pooled states is the pooled linear map, for a head's cost in place of a position's.
        pooled = self.values(torch.einsum("bph,bpf->bhf", scores.softmax(dim=1), states)).flatten(1)
        return nn.functional.gelu(self.last(states[:, -1]) + self.attended(pooled))

    def add(self, count: int) -> None:
        """
        Adds plans, each with the mean logit of the plans that there are. Logits of the others stay as they are.
        """
        old = self.output
        self.output = nn.Linear(old.in_features, old.out_features + count, device=old.weight.device)
        with torch.no_grad():
            mean_weight, mean_bias = old.weight.mean(dim=0), old.bias.mean()
            self.output.weight.copy_(torch.cat([old.weight, mean_weight.expand(count, -1)]))
            self.output.bias.copy_(torch.cat([old.bias, mean_bias.expand(count)]))
        self.output.requires_grad_(old.weight.requires_grad)


def chosen_layers(view: Backbone, count: int) -> list[int]:
    """Numbers of at most `count` decoder layers, evenly spaced, the last among them."""
    total = len(decoder_layers(view.decoder))
    count = min(count, total)
    return [round((i + 1) * total / count) - 1 for i in range(count)]


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
    found: dict[int, torch.Tensor] = {}
    stack = decoder_layers(view.decoder)

    def keep(number: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            states = (output[0] if isinstance(output, tuple) else output).float()
            found[number] = states * states.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()

        return hook

    handles = [stack[number].register_forward_hook(keep(number)) for number in layers]
    try:
        view.encode(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([found[number] for number in layers], dim=-1)
