"""Teaches the codes to say, between them, what the backbone thinks likely: also where the data say one thing only."""

import torch

from ...models.cross_entropy import token_cross_entropy
from ...models.spoken import chunk_size, spoken_log_probs


def coverage_losses(
    model, states: torch.Tensor, backbone_states: torch.Tensor, num_tokens: int, min_prob: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropies of the backbone's likely next tokens, each under a code of its own.

    The tokens of a state choose among the codes in the order of their probability: each takes the code, not taken yet,
    under which it is the likeliest already.

    Args:
        model (`LatentActionModel`): With codebook and world model, which get the gradient.
        states (`torch.Tensor`): `[M, d]` context states, which the world model reads.
        backbone_states (`torch.Tensor`): `[M, d]` states that the backbone's head reads; the same for rows with an
            image.
        num_tokens (`int`): N, at most so many tokens of each state; also at most K.
        min_prob (`float`): Tokens of less probability under the backbone are left out, but for the likeliest.

    Returns:
        Cross-entropies of all the tokens that count, one after another; and for each whether its code said it already,
        before the update.
    """
    num_tokens = min(num_tokens, model.config.num_codes)
    wanted, codes, counts, said = [], [], [], []
    with torch.no_grad():
        size = chunk_size(model, model.config.num_codes, states.device)
        for part, of_backbone in zip(states.split(size), backbone_states.split(size), strict=True):
            probs = model.backbone_view.logits(of_backbone[None])[0].float().softmax(dim=-1)
            likely = probs.topk(num_tokens, dim=-1)
            counted = likely.values >= min_prob
            counted[:, 0] = True
            log_probs, best = spoken_log_probs(model, part, likely.indices)
            chosen = own_codes(log_probs)
            wanted.append(likely.indices)
            codes.append(chosen)
            counts.append(counted)
            said.append(best.gather(1, chosen) == likely.indices)
    wanted, codes, counts, said = (torch.cat(parts) for parts in (wanted, codes, counts, said))
    merged = model.merge(states[counts.nonzero()[:, 0]], model.codebook(codes[counts]))
    return token_cross_entropy(model, merged, wanted[counts]), said[counts]


def own_codes(log_probs: torch.Tensor) -> torch.Tensor:
    """A code for each token, no code twice: `[M, N]` for log-probabilities `[M, K, N]` of N tokens under K codes. The
    first token chooses first."""
    taken = torch.zeros(log_probs.shape[:2], dtype=torch.bool, device=log_probs.device)
    chosen = []
    for of_token in log_probs.unbind(dim=-1):
        best = of_token.masked_fill(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        chosen.append(best)
    return torch.cat(chosen, dim=1)
