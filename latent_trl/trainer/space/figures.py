"""The figures of learning the space that tell a healthy codebook, and their means since the last log."""

from collections.abc import Callable
from typing import Any

import torch

from ...models.spoken import spoken_tokens

_ACTION_FIGURES = (
    *("world_model/ce_sampled", "world_model/ce", "world_model/ce_gap_no_action", "world_model/ce_gap_random_action"),
    *("codebook/marginal_entropy", "codebook/conditional_entropy", "codebook/mutual_information"),
    *("codebook/distinct_next_tokens", "codebook/coverage"),
)
# The same on every process, whatever its rows: the figures are summed over the processes.
STAGE_FIGURES = {
    "inverse_dynamics": _ACTION_FIGURES,
    "projector": ("projector/nll",),
    "joint": (*_ACTION_FIGURES, "projector/nll", "projector/cycle"),
    "policy": (
        *("policy/cloning_accuracy", "policy/cloning_loss", "policy/entropy"),
        *("policy/backbone_kl", "policy/reachable"),
    ),
}


class StageFigures:
    """
    Means of a stage's figures, and the usage of codes, since they were last drained.

    Args:
        stage (`str`): Whose figures.
        average (`Callable`): Averages a tensor over the processes.
    """

    def __init__(self, stage: str, average: Callable[[torch.Tensor], torch.Tensor]):
        self.names = STAGE_FIGURES[stage]
        self.average = average
        # Sum and number of each figure, and how often each code was taken.
        self.sums: torch.Tensor | None = None
        self.usage: torch.Tensor | None = None

    def start(self, num_codes: int, device: torch.device) -> None:
        """Makes the counters, unless they are there. Every process must, whatever it then counts."""
        if self.sums is None:
            self.sums = torch.zeros(len(self.names), 2, device=device)
            self.usage = torch.zeros(num_codes, device=device)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Counts `values` `[M]` into a figure's mean."""
        assert self.sums is not None, "`start` makes the counters"
        row = self.sums[self.names.index(name)]
        row += torch.stack([values.detach().float().sum(), row.new_tensor(float(len(values)))])

    def drain(self) -> dict[str, float]:
        """Means over all processes since the last call. A figure without any value is left out."""
        if self.sums is None:
            return {}
        sums, usage = self.average(self.sums), self.average(self.usage)
        figures = {
            name: (total / count).item() for name, (total, count) in zip(self.names, sums, strict=True) if count > 0
        }
        if usage.sum() > 0:
            figures["codebook/used"] = float((usage > 0).sum())
            figures["codebook/perplexity"] = entropy(usage / usage.sum()).exp().item()
        self.sums.zero_()
        self.usage.zero_()
        return figures

    def state(self) -> dict[str, Any]:
        """What has been counted since the last log, as plain JSON values."""
        return {name: None if t is None else t.tolist() for name, t in (("sums", self.sums), ("usage", self.usage))}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Puts back what [`state`] gave."""
        for name in ("sums", "usage"):
            setattr(self, name, None if state[name] is None else torch.tensor(state[name], device=device))


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """Entropies in nats `[...]` of the distributions `[..., K]`."""
    return -(probs * probs.clamp(min=1e-12).log()).sum(dim=-1)


def mutual_information(action_ids: torch.Tensor, token_ids: torch.Tensor, num_codes: int) -> torch.Tensor:
    """
    Mutual information in nats between codes `[M]` and next tokens `[M]`, by counting. With few positions such an
    estimate is too high: compare it only between runs of equal batch size.
    """
    tokens, token_ids = token_ids.unique(return_inverse=True)
    joint = torch.bincount(action_ids * len(tokens) + token_ids, minlength=num_codes * len(tokens)).float()
    joint = joint.view(num_codes, len(tokens)) / joint.sum()
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent.clamp(min=1e-30)).log(), 0.0).sum()


def distinct_next_tokens(model, states: torch.Tensor) -> torch.Tensor:
    """Numbers `[M]` of different most likely next tokens over all codes, for states `[M, d]`; 1 means blind codes."""
    tokens, _ = spoken_tokens(model, states)
    return states.new_tensor([row.unique().numel() for row in tokens], dtype=torch.float32)
