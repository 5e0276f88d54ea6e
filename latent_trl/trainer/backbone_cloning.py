"""What the codes say, and the distribution over them that says what the backbone would."""

import torch

from .cross_entropy import CHUNK_VALUES


@torch.no_grad()
def spoken_tokens(model, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each code says in each state.

    Args:
        model (`LatentActionModel`): With codebook and world model.
        states (`torch.Tensor`): `[M, d]` context states.

    Returns:
        The most likely next tokens `[M, K]` and their log-probabilities `[M, K]`, float32.
    """
    tokens, log_probs = [], []
    for part in states.split(_chunk_size(model, model.config.num_codes)):
        merged = model.merge(part[:, None], model.codebook.weight)
        logits = model.backbone_view.logits(merged).float()
        best = logits.max(dim=-1)
        tokens.append(best.indices)
        log_probs.append(best.values - logits.logsumexp(dim=-1))
    return torch.cat(tokens), torch.cat(log_probs)


@torch.no_grad()
def next_token_entropy(model, states: torch.Tensor) -> torch.Tensor:
    """Entropy in nats `[M]` of the backbone's next token at its own states `[M, d]`."""
    entropies = []
    for part in states.split(_chunk_size(model, 1)):
        log_probs = model.backbone_view.logits(part[None])[0].float().log_softmax(dim=-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
    return torch.cat(entropies)


@torch.no_grad()
def backbone_codes(
    model, states: torch.Tensor, backbone_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The distribution over codes whose tokens have the backbone's own probabilities: each token's on the one code that
    says it the most surely. What no code says is left out, and the rest scaled up.

    Args:
        model (`LatentActionModel`): With codebook and world model.
        states (`torch.Tensor`): `[M, d]` context states, which the world model reads.
        backbone_states (`torch.Tensor`): `[M, d]` states that the backbone's head reads; the same for rows with an
            image.

    Returns:
        The distribution `[M, K]`; which codes say the same token `[M, K, K]`, boolean; and the backbone's probability
        of all that some code says `[M]`.
    """
    tokens, sureness = spoken_tokens(model, states)
    same = tokens[:, :, None] == tokens[:, None, :]
    size = _chunk_size(model, 1)
    probs = torch.cat(
        [
            model.backbone_view.logits(part[None])[0].float().softmax(dim=-1).gather(1, said)
            for part, said in zip(backbone_states.split(size), tokens.split(size), strict=True)
        ]
    )
    surest = sureness[:, None, :].masked_fill(~same, -torch.inf).argmax(dim=-1)
    is_surest = surest == torch.arange(tokens.shape[1], device=tokens.device)
    reached = probs * is_surest
    total = reached.sum(dim=-1)
    return reached / total.clamp(min=torch.finfo(torch.float32).tiny)[:, None], same, total


def _chunk_size(model, codes: int) -> int:
    """States whose logits for so many codes fit in memory."""
    return max(1, CHUNK_VALUES // (codes * model.backbone_view.text_config.vocab_size))
