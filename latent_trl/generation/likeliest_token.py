"""The greedy choice: the token that the codes find the most likely between them, and a code that says it."""

from collections.abc import Callable

import torch

# What codes `[R, n]` say in the rows `[R]` of a batch: tokens `[R, n]`.
Says = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Codes that are read at once. After each block the host looks which rows are still open.
BLOCK = 16


def of_some(says: Says, members: torch.Tensor) -> Says:
    """`says` for a batch that are the rows `members` `[R]` of another."""
    return lambda rows, codes: says(members[rows], codes)


def codes_of_likeliest_tokens(log_probs: torch.Tensor, says: Says) -> torch.Tensor:
    r"""
    Of each row the most likely code among those that say the most likely token.

    A token is as likely as the codes that say it are together, \\( \sum_{a:\, x(s, a) = x} \pi(a \mid s) \\). Where
    many codes say the right token and one says another, the most likely code alone may be the latter. Codes are read
    from the most likely on, until those that are left cannot change the token.

    Args:
        log_probs (`torch.Tensor`): `[R, K]` of the codes, `-inf` for those that cannot be taken.
        says (`Says`): What codes say.

    Returns:
        `torch.Tensor`: Codes `[R]`.
    """
    probs, codes = log_probs.exp().sort(dim=-1, descending=True, stable=True)
    found = codes[:, 0].clone()
    # A code that is as likely as all others together needs no reading. Of probabilities that are not finite nothing is
    # the most likely; who called finds it.
    open_rows = (probs[:, 0] < probs[:, 1:].sum(dim=-1)).nonzero().squeeze(-1)
    tokens = torch.empty_like(codes)
    for start in range(0, codes.shape[1], BLOCK):
        if not len(open_rows):
            break
        end = min(start + BLOCK, codes.shape[1])
        tokens[open_rows, start:end] = says(open_rows, codes[open_rows, start:end])
        of_codes, said = probs[open_rows, :end], tokens[open_rows, :end]
        masses = ((said[:, :, None] == said[:, None, :]) * of_codes[:, None, :]).sum(dim=-1)
        best = masses.max(dim=-1, keepdim=True)
        says_best = said == said.gather(-1, best.indices)
        # The first of them is the most likely.
        first = says_best.byte().argmax(dim=-1, keepdim=True)
        found[open_rows] = codes[open_rows].gather(-1, first).squeeze(-1)
        second = masses.masked_fill(says_best, 0.0).amax(dim=-1)
        left = probs[open_rows, end:].sum(dim=-1)
        open_rows = open_rows[best.values.squeeze(-1) < second + left]
    return found
