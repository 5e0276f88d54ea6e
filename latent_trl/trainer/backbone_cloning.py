"""What the codes say, and the distribution over them that says what the backbone would."""

import torch

from .cross_entropy import CHUNK_VALUES

CPU_CHUNK_VALUES = 4_000_000


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
    for part in states.split(chunk_size(model, model.config.num_codes, states.device)):
        merged = model.merge(part[:, None], model.codebook.weight)
        logits = model.backbone_view.logits(merged).float()
        best = logits.max(dim=-1)
        tokens.append(best.indices)
        # In place, for time and memory: less the largest, that one's log-probability is minus the sum's logarithm.
        log_probs.append(-logits.sub_(best.values[..., None]).exp_().sum(dim=-1).log())
    return torch.cat(tokens), torch.cat(log_probs)


@torch.no_grad()
def spoken_log_probs(model, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[M, K, N]` of `tokens` `[M, N]` under each code in `states` `[M, d]`, float32, and the most
    likely token `[M, K]` of each code."""
    logits = model.backbone_view.logits(model.merge(states[:, None], model.codebook.weight)).float()
    of_tokens = logits.gather(2, tokens[:, None].expand(-1, logits.shape[1], -1))
    return of_tokens - logits.logsumexp(dim=-1, keepdim=True), logits.argmax(dim=-1)


@torch.no_grad()
def next_token_entropy(model, states: torch.Tensor) -> torch.Tensor:
    """Entropy in nats `[M]` of the backbone's next token at its own states `[M, d]`."""
    entropies = []
    for part in states.split(chunk_size(model, 1, states.device)):
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
        The distribution `[M, K]`; the code `[M, K]` that says each code's token the most surely; and the backbone's
        probability of all that some code says `[M]`.
    """
    tokens, sureness = spoken_tokens(model, states)
    size = chunk_size(model, 1, states.device)
    probs = torch.cat(
        [
            model.backbone_view.logits(part[None])[0].float().softmax(dim=-1).gather(1, said)
            for part, said in zip(backbone_states.split(size), tokens.split(size), strict=True)
        ]
    )
    surest = surest_codes(tokens, sureness)
    reached = probs * (surest == torch.arange(tokens.shape[1], device=tokens.device))
    total = reached.sum(dim=-1)
    return reached / total.clamp(min=torch.finfo(torch.float32).tiny)[:, None], surest, total


def surest_codes(tokens: torch.Tensor, sureness: torch.Tensor) -> torch.Tensor:
    """For each of the codes `[M, K]`, the one among those with the same token whose `sureness` is highest; of equals
    the first."""
    by_sureness = sureness.argsort(dim=1, descending=True, stable=True)
    order = by_sureness.gather(1, tokens.gather(1, by_sureness).argsort(dim=1, stable=True))
    # Codes of one token now stand side by side, the surest in front.
    ordered = tokens.gather(1, order)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    in_front = torch.ones_like(tokens, dtype=torch.bool)
    in_front[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    leaders = order.gather(1, places.where(in_front, 0).cummax(dim=1).values)
    return torch.empty_like(tokens).scatter_(1, order, leaders)


def chunk_size(model, codes: int, device: torch.device) -> int:
    """States whose logits for so many codes fit in memory; on a CPU, in its cache."""
    values = min(CHUNK_VALUES, CPU_CHUNK_VALUES) if device.type == "cpu" else CHUNK_VALUES
    return max(1, values // (codes * model.backbone_view.text_config.vocab_size))
