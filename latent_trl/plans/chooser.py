"""The chooser: from the states of a prompt to what each plan is worth there."""

from dataclasses import dataclass

import torch
from torch import nn

from ..models.backbone import Backbone
from ..models.decoder_stack import decoder_layers
from .configuration import PlanConfig
from .switch import PlanSwitch

HEADS = 4


@dataclass
class PromptStates:
    """
    What the chooser reads where a segment begins.

    Args:
        states (`torch.Tensor`): `[P, F]`, of the prompt and of what was said.
        planned (`torch.Tensor`, *optional*): `[K, F]`, of the last position under each plan, where it reads plans.
    """

    states: torch.Tensor
    planned: torch.Tensor | None = None


class UnderPlans(nn.Module):
    """
    Reads the state that a plan gives the last position of a prompt, by the same weights for all plans.

    Args:
        input_size (`int`): Width of the states.
        size (`int`): Width of the chooser's hidden layer.
    """

    def __init__(self, input_size: int, size: int):
        super().__init__()
        self.of_plan = nn.Linear(input_size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)
        # Whether the backbone is known to read prompts in two passes as in one.
        self.is_checked = False

    def forward(self, hidden: torch.Tensor, planned: torch.Tensor | None) -> torch.Tensor:
        """`[B, K, size]`, given what the chooser makes of the prompts `[B, size]` and states `[B, K, input_size]`."""
        if planned is None:
            raise ValueError("`planned` must be given: this chooser reads the states under each plan.")
        return nn.functional.gelu(hidden[:, None] + self.of_plan(planned.float()))


class PlanChooser(nn.Module):
    """
    K sigmoids on the states of a prompt: a layer on its last position, beside attention with learned queries over all
    positions, pictures' among them, which starts at nothing and comes in where it helps. Where it reads plans, what is
    learned of one is known of the others: a second term reads the state that each gives the last position, by the same
    weights for all. Float32.

    Args:
        input_size (`int`): Width of the states that [`~latent_trl.plans.reading.read_prompts`] gives.
        num_plans (`int`): K.
        size (`int`): Width of the hidden layer.
        switch_size (`int`, *optional*): Width of the states that a switch of segments reads; by default there is none.
        reads_plans (`bool`, defaults to `False`): Whether it reads the states of the last position under each plan.
    """

    def __init__(
        self,
        input_size: int,
        num_plans: int,
        size: int,
        switch_size: int | None = None,
        reads_plans: bool = False,
    ):
        super().__init__()
        self.last = nn.Linear(input_size, size)
        self.queries = nn.Linear(input_size, HEADS, bias=False)
        self.values = nn.Linear(input_size, size // HEADS, bias=False)
        self.attended = nn.Linear(HEADS * (size // HEADS), size, bias=False)
        nn.init.zeros_(self.attended.weight)
        self.output = nn.Linear(size, num_plans)
        self.switch = None if switch_size is None else PlanSwitch(switch_size)
        self.under_plans = UnderPlans(input_size, size) if reads_plans else None

    @classmethod
    def of(cls, view: Backbone, config: PlanConfig) -> "PlanChooser":
        """A fresh one that reads the states of a backbone, with a switch where the plans have one."""
        width = len(chosen_layers(view, config.chooser_layers)) * view.hidden_size
        switch_size = view.hidden_size if config.segment == "switch" else None
        return cls(width, config.num_plans, config.chooser_size, switch_size, config.chooser_reads_plans)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, planned: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[B, P, input_size]`, of prompts that are padded on the left.
            mask (`torch.Tensor`): `[B, P]`, 1 where there is a token.
            planned (`torch.Tensor`, *optional*): `[B, K, input_size]`, of the last position under each plan, where it
                reads plans.

        Returns:
            Logits `[B, K]` of the plans' rewards.
        """
        hidden = self._hidden(states, mask)
        logits = self.output(nn.functional.gelu(hidden))
        if self.under_plans is None:
            return logits
        return logits + self.under_plans.score(self.under_plans(hidden, planned))[..., 0]

    @property
    def features_size(self) -> int:
        """Width of the features of a plan."""
        return self.output.in_features * (1 if self.under_plans is None else 2)

    def features(self, states: torch.Tensor, mask: torch.Tensor, planned: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layers read of each plan, `[B, K, size]`, or `[B, K, 2 * size]` where plans are read."""
        hidden = self._hidden(states, mask)
        of_prompt = nn.functional.gelu(hidden)[:, None].expand(-1, self.output.out_features, -1)
        if self.under_plans is None:
            return of_prompt
        return torch.cat([of_prompt, self.under_plans(hidden, planned)], dim=-1)

    def _hidden(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = states.float()
        scores = self.queries(states).masked_fill(~mask.bool()[..., None], -torch.inf)
        # A linear map of the pooled states is the pooled linear map, for a head's cost in place of a position's.
        pooled = self.values(torch.einsum("bph,bpf->bhf", scores.softmax(dim=1), states)).flatten(1)
        return self.last(states[:, -1]) + self.attended(pooled)

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
