"""What each code says in a state, and how sure the backbone is there: passes of its head for many codes at once."""

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
    parts = [
        spoken_laws(model, part)[:2] for part in states.split(chunk_size(model, model.config.num_codes, states.device))
    ]
    tokens, log_probs = map(torch.cat, zip(*parts, strict=True))
    return tokens, log_probs


def spoken_laws(model, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Most likely tokens `[M, K]` of the codes, their log-probabilities `[M, K]`, and the probabilities of all tokens
    `[M, K, V]` as multiples of theirs."""
    laws = _logits(model, states)
    said, _, total = _exponentials(laws)
    # Less the largest, that one's log-probability is minus the sum's logarithm.
    return said, -total.log(), laws


def mixture_law(laws: torch.Tensor, sureness: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    r"""Probabilities `[M, V]` of the next token, \\( \sum_a \pi(a \mid s) \, p(x \mid s, a) \\), when codes are drawn
    by `probs` `[M, K]`; `laws` and `sureness`, the log-probabilities, are those of [`spoken_laws`]."""
    return ((probs * sureness.exp())[:, None] @ laws).squeeze(1)


@torch.no_grad()
def spoken_log_probs(model, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[M, K, N]` of `tokens` `[M, N]` under each code in `states` `[M, d]`, float32, and the most
    likely token `[M, K]` of each code."""
    logits = _logits(model, states)
    of_tokens = logits.gather(2, tokens[:, None].expand(-1, logits.shape[1], -1))
    said, highest, total = _exponentials(logits)
    return of_tokens - (highest + total.log())[..., None], said


def _logits(model, states: torch.Tensor) -> torch.Tensor:
    """`[M, K, V]` of all codes in `states` `[M, d]`, float32."""
    return model.backbone_view.logits(model.merge(states[:, None], model.codebook.weight)).float()


def _exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Most likely tokens `[M, K]`, their logits `[M, K]`, and the sums `[M, K]` of what `logits` `[M, K, V]` becomes:
    its exponentials as multiples of the largest. In place, for time and memory."""
    best = logits.max(dim=-1)
    return best.indices, best.values, logits.sub_(best.values[..., None]).exp_().sum(dim=-1)


@torch.no_grad()
def next_token_entropy(model, states: torch.Tensor) -> torch.Tensor:
    """Entropy in nats `[M]` of the backbone's next token at its own states `[M, d]`."""
    entropies = []
    for part in states.split(chunk_size(model, 1, states.device)):
        log_probs = model.backbone_view.logits(part[None])[0].float().log_softmax(dim=-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
    return torch.cat(entropies)


@torch.no_grad()
def excess_surprise(model, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """By how many nats `[M]` the `tokens` `[M]` surprise the backbone at its own states `[M, d]` more than it expects:
    -log p(x) less the entropy of p, float32."""
    found = []
    size = chunk_size(model, 1, states.device)
    for part, wanted in zip(states.split(size), tokens.split(size), strict=True):
        log_probs = model.backbone_view.logits(part[None])[0].float().log_softmax(dim=-1)
        entropies = torch.special.entr(log_probs.exp()).sum(dim=-1)
        found.append(-log_probs.gather(1, wanted[:, None]).squeeze(1) - entropies)
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)


def chunk_size(model, codes: int, device: torch.device) -> int:
    """States whose logits for so many codes fit in memory; on a CPU, in its cache."""
    values = min(CHUNK_VALUES, CPU_CHUNK_VALUES) if device.type == "cpu" else CHUNK_VALUES
    return max(1, values // (codes * model.backbone_view.text_config.vocab_size))
