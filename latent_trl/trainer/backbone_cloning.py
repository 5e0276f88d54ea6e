"""What the codes say, and the distribution over them that says what the backbone would."""

import torch

from .cross_entropy import CHUNK_VALUES

CPU_CHUNK_VALUES = 4_000_000
# Of expectation-maximisation: with what the surest codes say held, and with all free. The first keep the second from
# spreading over more codes than they need.
SPREADING_STEPS, MIXTURE_STEPS = 3, 10
# The share in which it stays held, this power of how much codes say: where that is nearly all, RL is to find each
# token on one code.
HOLDING_POWER = 4
# The backbone's likeliest, which the mixture is fitted to one by one, and to all others as if they were one.
MIXTURE_TOKENS = 512


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
    parts = [_laws(model, part)[:2] for part in states.split(chunk_size(model, model.config.num_codes, states.device))]
    tokens, log_probs = map(torch.cat, zip(*parts, strict=True))
    return tokens, log_probs


def _laws(model, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Most likely tokens `[M, K]` of the codes, their log-probabilities `[M, K]`, and the probabilities of all tokens
    `[M, K, V]` as multiples of theirs."""
    laws = model.backbone_view.logits(model.merge(states[:, None], model.codebook.weight)).float()
    best = laws.max(dim=-1)
    # In place, for time and memory: less the largest, that one's log-probability is minus the sum's logarithm.
    laws = laws.sub_(best.values[..., None]).exp_()
    return best.indices, -laws.sum(dim=-1).log(), laws


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
    model, states: torch.Tensor, backbone_states: torch.Tensor, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The distribution over codes that speaks as the backbone does.

    It starts with the probability of each token that some code says on the one code that says it the most surely. Some
    steps of expectation-maximisation then bring the mixture of what the codes think likely close to the backbone: first
    by spreading the probability of all other tokens, then all of it, the less so the more the codes say.

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
        tokens, log_probs, laws = _laws(model, part)
        wanted = model.backbone_view.logits(of_backbone[None])[0].float().softmax(dim=-1)
        surest = surest_codes(tokens, log_probs)
        said = wanted.gather(1, tokens) * (surest == torch.arange(tokens.shape[1], device=tokens.device))
        likely = wanted.topk(min(MIXTURE_TOKENS, wanted.shape[1]), dim=-1).indices
        of_likely = laws.gather(2, likely[:, None].expand(-1, tokens.shape[1], -1)) * log_probs.exp()[..., None]
        unsaid = wanted.scatter(1, tokens, 0.0)
        targets = (_with_others(of_all.gather(1, likely), of_all.sum(dim=-1)) for of_all in (unsaid, wanted))
        codes = _mixture_codes(_with_others(of_likely, torch.ones_like(said)), *targets, said)
        mixture = ((of_policy * log_probs.exp())[:, None] @ laws).squeeze(1)
        tiny = torch.finfo(torch.float32).tiny
        kl = (torch.special.xlogy(wanted, wanted) - wanted * mixture.clamp(min=tiny).log()).sum(dim=-1)
        found.append((codes, kl, said.sum(dim=-1)))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _with_others(probs: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Probabilities `[..., N]` of some tokens with, as the last, what is left of `total` `[...]` for all others."""
    return torch.cat([probs, (total - probs.sum(dim=-1)).clamp(min=0.0)[..., None]], dim=-1)


def _mixture_codes(laws: torch.Tensor, unsaid: torch.Tensor, wanted: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """The distribution `[M, K]` over codes by which the mixture of `laws` `[M, K, N]` comes close to `wanted` `[M, N]`:
    `said` `[M, K]` of it and the spread of `unsaid` `[M, N]` where codes say nearly all, else with all free."""
    held = _fitted(torch.full_like(said, 1 / said.shape[1]), laws, unsaid, said, SPREADING_STEPS)
    free = _fitted(held, laws, wanted, torch.zeros_like(said), MIXTURE_STEPS)
    return free.lerp(held, said.sum(dim=-1, keepdim=True) ** HOLDING_POWER)


def _fitted(
    codes: torch.Tensor, laws: torch.Tensor, wanted: torch.Tensor, held: torch.Tensor, steps: int
) -> torch.Tensor:
    """`codes` `[M, K]` after steps of expectation-maximisation towards `wanted`, `held` `[M, K]` of them fixed."""
    for _ in range(steps):
        mixture = (codes[:, None] @ laws).squeeze(1).clamp(min=torch.finfo(torch.float32).tiny)
        codes = held + codes * (laws @ (wanted / mixture)[..., None]).squeeze(-1)
    return codes


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
