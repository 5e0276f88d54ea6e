"""The distribution over codes that says what the backbone would."""

import torch

from ...models.spoken import chunk_size, mixture_law, spoken_laws

# Of expectation-maximisation. One comes as close, but spreads over more codes.
MIXTURE_STEPS = 3


@torch.no_grad()
def backbone_codes(
    model, states: torch.Tensor, backbone_states: torch.Tensor, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The distribution over codes that speaks as the backbone does.

    The probability of a token that some code says is on the one code that says it the most surely. That of all other
    tokens is spread so that the mixture of what the codes think likely comes close to it, by expectation-maximisation.

    Args:
        model (`LatentActionModel`): With codebook and world model.
        states (`torch.Tensor`): `[M, d]` context states, which the world model reads.
        backbone_states (`torch.Tensor`): `[M, d]` states that the backbone's head reads; the same for rows with an
            image.
        probs (`torch.Tensor`): `[M, K]`, the policy's distribution, which is measured.

    Returns:
        The distribution `[M, K]`; KL(backbone ‖ mixture of the codes under `probs`) in nats `[M]`; and the backbone's
        probability of all that some code says `[M]`.
    """
    found = []
    size = chunk_size(model, model.config.num_codes, states.device)
    parts = (tensor.split(size) for tensor in (states, backbone_states, probs))
    for part, of_backbone, of_policy in zip(*parts, strict=True):
        tokens, log_probs, laws = spoken_laws(model, part)
        wanted = model.backbone_view.logits(of_backbone[None])[0].float().softmax(dim=-1)
        surest = surest_codes(tokens, log_probs)
        said = wanted.gather(1, tokens) * (surest == torch.arange(tokens.shape[1], device=tokens.device))
        codes = said + _mixture_codes(laws, log_probs.exp(), wanted.scatter(1, tokens, 0.0), said)
        mixture = mixture_law(laws, log_probs, of_policy)
        tiny = torch.finfo(torch.float32).tiny
        kl = (torch.special.xlogy(wanted, wanted) - wanted * mixture.clamp(min=tiny).log()).sum(dim=-1)
        found.append((codes, kl, said.sum(dim=-1)))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _mixture_codes(laws: torch.Tensor, scales: torch.Tensor, rest: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """What to add to `said` `[M, K]`, so that the mixture of the laws, `laws` `[M, K, V]` times `scales` `[M, K]`,
    comes close to `rest` `[M, V]` too."""
    tiny = torch.finfo(torch.float32).tiny
    spread, codes = torch.zeros_like(said), torch.full_like(said, 1 / said.shape[1])
    for _ in range(MIXTURE_STEPS):
        scaled = codes * scales
        mixture = (scaled[:, None] @ laws).squeeze(1)
        spread = scaled * (laws @ (rest / mixture.clamp(min=tiny))[..., None]).squeeze(-1)
        codes = said + spread
    return spread


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
