"""Teaches the codes to say, between them, what the backbone thinks likely: also where the data say one thing only."""

import torch

from ...models.cross_entropy import token_cross_entropy
from ...models.spoken import chunk_size, spoken_log_probs

# Positions of each row that are read in one step.
COVERAGE_POSITIONS = 2
# At most so many tokens of a position, and none of less probability, but for the likeliest: as measured.
COVERAGE_TOKENS = 8
COVERAGE_MIN_PROB = 0.01


@torch.no_grad()
def likely_tokens(
    model, backbone_states: torch.Tensor, num_tokens: int = COVERAGE_TOKENS, min_prob: float = COVERAGE_MIN_PROB
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backbone's likeliest next tokens `[M, N]` at its own states `[M, d]`, and which of them count `[M, N]`."""
    num_tokens = min(num_tokens, model.config.num_codes)
    tokens, counted = [], []
    for part in backbone_states.split(chunk_size(model, 1, backbone_states.device)):
        likely = model.backbone_view.logits(part[None])[0].float().softmax(dim=-1).topk(num_tokens, dim=-1)
        tokens.append(likely.indices)
        counted.append(likely.values >= min_prob)
        counted[-1][:, 0] = True
    return torch.cat(tokens), torch.cat(counted)


def coverage_losses(
    model,
    states: torch.Tensor,
    backbone_states: torch.Tensor,
    num_tokens: int = COVERAGE_TOKENS,
    min_prob: float = COVERAGE_MIN_PROB,
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
        num_tokens (`int`, defaults to 8): N, at most so many tokens of each state; also at most K.
        min_prob (`float`, defaults to 0.01): Tokens of less probability under the backbone are left out, but for the
            likeliest.

    Returns:
        Cross-entropies of all the tokens that count, one after another; and for each whether its code said it already,
        before the update.
    """
    wanted, counts = likely_tokens(model, backbone_states, num_tokens, min_prob)
    codes, said = [], []
    size = chunk_size(model, model.config.num_codes, states.device)
    for part, tokens in zip(states.split(size), wanted.split(size), strict=True):
        log_probs, best = spoken_log_probs(model, part, tokens)
        codes.append(own_codes(log_probs))
        said.append(best.gather(1, codes[-1]) == tokens)
    codes, said = torch.cat(codes), torch.cat(said)
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
