"""How different the samples of a prompt are, in meaning and in words."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

SELF_BLEU_EPSILON = 0.1


def mean_pairwise_cosine(embeddings: Any) -> float:
    r"""
    Mean cosine over the pairs of different samples: \\( \frac{2}{M(M-1)} \sum_{i<j} \cos(e_i, e_j) \\).

    Args:
        embeddings (`array` of shape `[M, d]`): One embedding for each of at least two samples; any length but 0.

    Returns:
        `float`: Between -1 and 1.
    """
    unit = _unit_vectors(embeddings)
    count = len(unit)
    if count < 2:
        raise ValueError(f"`embeddings` must hold at least 2 samples to make a pair; got {count}.")
    # the sum over all pairs, those of a sample with itself included, is the squared length of the sum of the vectors
    return float(((unit.sum(axis=0) ** 2).sum() - (unit**2).sum()) / (count * (count - 1)))


def semantic_diversity(embeddings: Any) -> float:
    """
    Semantic diversity as [CoLA](https://huggingface.co/papers/2503.21383) defines it: 1 over the mean pairwise cosine.

    It is 1 for samples that all mean the same. Over several prompts the cosines are averaged first and inverted after:
    a prompt whose samples are all but orthogonal would otherwise outweigh all others.

    Args:
        embeddings (`array` of shape `[M, d]` or `[prompts, M, d]`, or a sequence of `[M, d]`):
            Embeddings of the samples of a prompt, or of several prompts, which may have different numbers of samples.

    Returns:
        `float`: At least 1; `inf` where the mean cosine is not above 0.
    """
    first = embeddings[0]
    groups = [embeddings] if np.ndim(_array(first)) == 1 else embeddings
    return float(inverse_mean([mean_pairwise_cosine(group) for group in groups]))


def inverse_mean(values: Any, axis: int = -1) -> np.ndarray:
    """1 over the mean, and `inf` where that is not above 0: semantic diversity from the mean cosine of each prompt."""
    mean = np.mean(values, axis=axis)
    return np.divide(1.0, mean, out=np.full_like(mean, math.inf), where=mean > 0)


def distinct_n(samples: Sequence[str | Sequence[Hashable]], n: int = 2) -> float:
    """
    Distinct n-grams over all n-grams, counted over all samples together
    ([Li et al., 2016](https://huggingface.co/papers/1510.03055)).

    Args:
        samples (`Sequence[str | Sequence[Hashable]]`): Texts, which are split at white space, or lists of tokens.
        n (`int`, *optional*, defaults to `2`): Size of the n-grams.

    Returns:
        `float`: Between 0 and 1; `nan` where no sample is long enough for an n-gram.
    """
    counts: Counter = Counter()
    for tokens in _tokens(samples):
        counts.update(_ngrams(tokens, n))
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(samples: Sequence[str | Sequence[Hashable]], max_n: int = 4) -> float:
    r"""
    Mean BLEU of each sample against all others as references
    ([Zhu et al., 2018](https://huggingface.co/papers/1802.01886)): high where samples repeat each other.

    BLEU of a sentence, with clipped precisions of 1 to `max_n` equally weighted, the brevity penalty of the nearest
    reference length (the shorter of two), and 0.1 for a numerator of zero (method 1 of Chen and Cherry, 2014). A sample
    without any word in common with the others, and one without words, has BLEU 0.

    Args:
        samples (`Sequence[str | Sequence[Hashable]]`): At least two texts, split at white space, or lists of tokens.
        max_n (`int`, *optional*, defaults to `4`): Largest n-gram.

    Returns:
        `float`: Between 0 and 1.
    """
    tokens = _tokens(samples)
    if len(tokens) < 2:
        raise ValueError(f"`samples` must hold at least 2 samples to compare; got {len(tokens)}.")
    counts = [[Counter(_ngrams(sample, n)) for n in range(1, max_n + 1)] for sample in tokens]
    lengths = [len(sample) for sample in tokens]
    scores = []
    for i, sample_counts in enumerate(counts):
        others = counts[:i] + counts[i + 1 :]
        scores.append(_bleu(sample_counts, others, lengths[i], lengths[:i] + lengths[i + 1 :]))
    return sum(scores) / len(scores)


def vendi_score(embeddings: Any, order: float = 1.0) -> float:
    r"""
    Effective number of different samples ([Friedman and Dieng, 2023](https://huggingface.co/papers/2210.02410)).

    The exponential of the entropy of the eigenvalues of K/M, with K the cosines of all pairs; for `order` q other than
    1 the Rényi entropy of that order: \\( \left( \sum_i \lambda_i^q \right)^{1 / (1 - q)} \\).

    Args:
        embeddings (`array` of shape `[M, d]`): One embedding for each sample; any length but 0.
        order (`float`, *optional*, defaults to `1.0`): q, above 0, or `inf`; small values count rare samples for more.

    Returns:
        `float`: From 1 (all the same) to M (all orthogonal).
    """
    if order <= 0:
        raise ValueError(f"`order` must be above 0; got {order}.")
    unit = _unit_vectors(embeddings)
    singular = np.linalg.svd(unit / math.sqrt(len(unit)), compute_uv=False)
    eigenvalues = singular**2
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    if order == 1:
        return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    if math.isinf(order):
        return float(1 / eigenvalues.max())
    return float((eigenvalues**order).sum() ** (1 / (1 - order)))


def _bleu(sample: list[Counter], references: list[list[Counter]], length: int, reference_lengths: list[int]) -> float:
    log_precision = 0.0
    for n, counts in enumerate(sample, start=1):
        bounds: Counter = Counter()
        for reference in references:
            bounds |= reference[n - 1]
        matches, total = (counts & bounds).total(), max(counts.total(), 1)
        if matches == 0 and n == 1:
            return 0.0
        log_precision += math.log(max(matches, SELF_BLEU_EPSILON) / total)
    nearest = min(reference_lengths, key=lambda other: (abs(other - length), other))
    log_brevity = min(0.0, 1 - nearest / length)
    return math.exp(log_brevity + log_precision / len(sample))


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple]:
    if n < 1:
        raise ValueError(f"`n` must be at least 1; got {n}.")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _tokens(samples: Sequence[str | Sequence[Hashable]]) -> list[Sequence[Hashable]]:
    if isinstance(samples, str):
        raise ValueError(f"`samples` must be a list of samples; got one string, {samples[:40]!r}.")
    return [sample.split() if isinstance(sample, str) else sample for sample in samples]


def _array(values: Any) -> np.ndarray:
    """Numpy in float64, from lists, arrays, and tensors of any type and device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _unit_vectors(embeddings: Any) -> np.ndarray:
    vectors = _array(embeddings)
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(f"`embeddings` must have shape [samples, hidden] with at least 1 sample; got {vectors.shape}.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)).tolist()
        raise ValueError(f"`embeddings` must be finite and not zero; rows {bad} are not.")
    return vectors / norms
