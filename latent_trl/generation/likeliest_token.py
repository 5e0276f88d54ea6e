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
    rows = (probs[:, 0] < probs[:, 1:].sum(dim=-1)).nonzero().squeeze(-1)
    probs, codes = probs[rows], codes[rows]
    tokens, sums = codes[:, :0], probs[:, :0]
    for start in range(0, log_probs.shape[1], BLOCK):
        if not len(rows):
            break
        new = says(rows, codes[:, start : start + BLOCK])
        tokens = torch.cat([tokens, new], dim=1)
        end = tokens.shape[1]
        # Each code has the sum of those in this block and before it that say the same: the last of a token has it all.
        same = tokens[:, :, None] == new[:, None, :]
        sums = torch.cat([sums, (same * probs[:, :end, None]).sum(dim=1)], dim=1)
        best, place = sums.max(dim=-1, keepdim=True)
        says_best = tokens == tokens.gather(-1, place)
        # The first of them is the most likely.
        found[rows] = codes.gather(-1, says_best.byte().argmax(dim=-1, keepdim=True)).squeeze(-1)
        second = sums.masked_fill(says_best, 0.0).amax(dim=-1)
        still = (best.squeeze(-1) < second + probs[:, end:].sum(dim=-1)).nonzero().squeeze(-1)
        rows, probs, codes, tokens, sums = (each[still] for each in (rows, probs, codes, tokens, sums))
    return found
