"""Which plan learns to say which of a prompt's answers: balanced optimal transport between answers and plans."""

import torch


def sinkhorn(scores: torch.Tensor, temperature: float = 0.3, iterations: int = 100) -> torch.Tensor:
    r"""
    The transport plan \\(Q\\) that maximises \\(\sum_{mk} Q_{mk} s_{mk} + \tau H(Q)\\), where each column sums to 1 and
    each row to K / M: every plan has the same share of the answers, and every answer of the plans
    ([Cuturi, 2013](https://huggingface.co/papers/1306.0895)).

    Args:
        scores (`torch.Tensor`): `[M, K]`, log-likelihoods of answers under plans, in nats.
        temperature (`float`, defaults to `0.3`): \\(\tau\\), in nats.
        iterations (`int`, defaults to `100`): Rounds of scaling rows and columns.

    Returns:
        `[M, K]` in float32. Columns sum to 1 exactly, rows to K / M as far as the rounds have come.

    Raises:
        ValueError: For scores that are not finite or no matrix.
    """
    if scores.ndim != 2 or not torch.isfinite(scores).all():
        raise ValueError(f"`scores` must be a finite matrix [answers, plans], got {tuple(scores.shape)}: {scores}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    answers, plans = scores.shape
    logs = scores.double() / temperature
    share = torch.tensor(plans / answers, dtype=logs.dtype).log()
    for _ in range(iterations):
        logs = logs - logs.logsumexp(dim=1, keepdim=True) + share
        logs = logs - logs.logsumexp(dim=0, keepdim=True)
    return logs.exp().float()


def assign(scores: torch.Tensor, temperature: float = 0.3) -> torch.Tensor:
    """The answer `[K]` of each plan: the one with most of its mass in [`sinkhorn`]'s transport plan."""
    return sinkhorn(scores, temperature).argmax(dim=0)
