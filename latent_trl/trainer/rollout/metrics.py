"""What a rollout says of itself in the logs, under TRL's names."""

import torch

from .advantages import nan_std

# The value of a figure, and how many rows or codes it is a mean over.
Figure = tuple[float, float]


def length_figures(lengths: torch.Tensor, ended: torch.Tensor) -> dict[str, Figure]:
    """
    Lengths of completions in tokens.

    Args:
        lengths (`torch.Tensor`): `[N]` over all processes.
        ended (`torch.Tensor`): Boolean `[N]`, whether a completion ended by itself.
    """
    figures: dict[str, Figure] = {}
    finished = lengths[ended] if ended.any() else torch.zeros(1, device=lengths.device)
    for kind, some in (("length", lengths), ("terminated_length", finished)):
        some = some.float()
        for name, value in (("mean", some.mean()), ("min", some.min()), ("max", some.max())):
            figures[f"completions/{name}_{kind}"] = (value.item(), len(some))
    figures["completions/clipped_ratio"] = ((~ended).float().mean().item(), len(ended))
    return figures


def reward_figures(rewards: torch.Tensor, names: list[str], total: torch.Tensor, group_size: int) -> dict[str, Figure]:
    """
    Means and standard deviations of rewards.

    Args:
        rewards (`torch.Tensor`): `[N, F]` over all processes, NaN where a function could not score.
        names (`list[str]`): Of the functions.
        total (`torch.Tensor`): `[N]`, the weighted rewards.
        group_size (`int`): G.
    """
    figures: dict[str, Figure] = {}
    for name, column in [*((f"rewards/{n}", c) for n, c in zip(names, rewards.unbind(dim=1))), ("", total)]:
        mean, std = ("reward", "reward_std") if not name else (f"{name}/mean", f"{name}/std")
        count = int((~column.isnan()).sum())
        figures[mean] = (column.nanmean().item(), count)
        figures[std] = (nan_std(column).item(), count)
    if group_size == 1:
        return figures
    spread = nan_std(total.view(-1, group_size), dim=1)
    equal = torch.isclose(spread, torch.zeros_like(spread)).float().mean().item()
    figures["frac_reward_zero_std"] = (equal, len(spread))
    return figures


def usage_figures(counts: torch.Tensor) -> dict[str, Figure]:
    """How many codes were chosen, and the perplexity of their usage, from how often each `[K]` was."""
    perplexity = torch.special.entr(counts / counts.sum()).sum().exp().item()
    chosen = counts.sum().item()
    return {"codebook/used": ((counts > 0).sum().item(), chosen), "codebook/perplexity": (perplexity, chosen)}


class EvaluationMeans:
    """
    Means over all rows of an evaluation, in the lists whose plain average TRL logs: a last batch that is short counts
    by its rows.

    Args:
        metrics (`dict[str, list[float]]`): TRL's lists of evaluation. Each holds one value, the mean so far.
    """

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics = metrics
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float, count: float) -> None:
        """Counts a mean `value` over `count` rows; NaN and means over nothing are left out."""
        if value != value or not count:
            return
        held = self.sums.setdefault(name, [0.0, 0.0])
        held[0] += value * count
        held[1] += count
        self.metrics[name] = [held[0] / held[1]]

    def take_appended(self, count: float) -> None:
        """Counts what TRL has appended to the lists since the last call, as means over `count` codes."""
        for name, values in list(self.metrics.items()):
            appended = values[1:] if name in self.sums else values[:]
            for value in appended:
                self.add(name, value, count)
