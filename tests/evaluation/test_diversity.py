"""Diversity measures against cases worked out by hand and against the definitions, written out in full."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_trl.evaluation.diversity import (
    distinct_n,
    mean_pairwise_cosine,
    self_bleu,
    semantic_diversity,
    vendi_score,
)

SEEDS = st.integers(0, 10_000)
TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=8), min_size=2, max_size=5)


def random_embeddings(seed, shift=0.0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(generator.integers(2, 8), generator.integers(1, 6))) + shift


def cosines_of_pairs(rows):
    return [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in itertools.combinations(rows, 2)]


@settings(deadline=None)
@given(SEEDS)
def test_the_mean_cosine_is_that_of_all_pairs(seed):
    rows = random_embeddings(seed)
    assert mean_pairwise_cosine(rows) == pytest.approx(np.mean(cosines_of_pairs(rows)), abs=1e-9)


def test_diversity_of_three_directions_by_hand():
    rows = [[1.0, 0.0], [2.0, 0.0], [1.0, 1.0]]  # cosines 1, 1/sqrt 2, 1/sqrt 2
    assert semantic_diversity(rows) == pytest.approx(3 / (1 + math.sqrt(2)))
    assert semantic_diversity(torch.tensor(rows, dtype=torch.bfloat16)) == pytest.approx(3 / (1 + math.sqrt(2)))


def test_diversity_is_one_for_equal_samples_and_infinite_for_orthogonal_ones():
    assert semantic_diversity([[1.0, 2.0]] * 4) == pytest.approx(1.0)
    assert semantic_diversity(np.eye(3)) == math.inf


def test_prompts_are_averaged_before_the_inverse_and_may_differ_in_samples():
    same, orthogonal = np.ones((3, 2)), np.eye(2)
    assert semantic_diversity([same, orthogonal]) == pytest.approx(2.0)
    assert semantic_diversity(np.stack([orthogonal, np.ones((2, 2))])) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "samples, n, expected",
    [
        (["a b c", "a b d"], 1, 4 / 6),
        (["a b c", "a b d"], 2, 3 / 4),
        ([[1, 1, 1], [1, 1]], 2, 1 / 3),
        (["a"], 1, 1.0),
    ],
)
def test_distinct_n_by_hand(samples, n, expected):
    assert distinct_n(samples, n) == pytest.approx(expected)


def test_distinct_n_is_undefined_without_an_n_gram():
    assert math.isnan(distinct_n(["a", ""], 2))


def bleu_written_out(sample, references, max_n):
    precisions = []
    for n in range(1, max_n + 1):
        grams = ["".join(sample[i : i + n]) for i in range(len(sample) - n + 1)]
        matches = 0
        for gram in set(grams):
            most = max(
                sum("".join(reference[i : i + n]) == gram for i in range(len(reference) - n + 1))
                for reference in references
            )
            matches += min(grams.count(gram), most)
        if n == 1 and matches == 0:
            return 0.0
        precisions.append((matches if matches else 0.1) / max(len(grams), 1))
    lengths = sorted(len(reference) for reference in references)
    nearest = min(lengths, key=lambda length: abs(length - len(sample)))
    brevity = 1.0 if len(sample) >= nearest else math.exp(1 - nearest / len(sample))
    return brevity * math.prod(precisions) ** (1 / max_n)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_self_bleu_is_the_mean_bleu_against_the_others(samples, max_n):
    expected = [bleu_written_out(s, samples[:i] + samples[i + 1 :], max_n) for i, s in enumerate(samples)]
    assert self_bleu(samples, max_n) == pytest.approx(np.mean(expected))


def test_self_bleu_by_hand():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b", "c d"]) == 0.0
    assert self_bleu(["a b c", "a b d"], max_n=2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))


@settings(deadline=None)
@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0, math.inf]))
def test_vendi_score_is_the_exponential_entropy_of_the_kernel(seed, order):
    rows = random_embeddings(seed)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    eigenvalues = [value for value in np.linalg.eigvalsh(unit @ unit.T / len(rows)) if value > 1e-10]
    expected = {
        1.0: lambda: math.exp(-sum(value * math.log(value) for value in eigenvalues)),
        math.inf: lambda: 1 / max(eigenvalues),
    }.get(order, lambda: sum(value**order for value in eigenvalues) ** (1 / (1 - order)))()
    assert vendi_score(rows, order) == pytest.approx(expected, rel=1e-4)


def test_vendi_score_counts_what_is_different():
    assert vendi_score(np.eye(4)) == pytest.approx(4.0)
    assert vendi_score(np.ones((4, 3))) == pytest.approx(1.0)
    assert vendi_score([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]) == pytest.approx(2.0)
    assert vendi_score([[1.0, 0.0]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mean_pairwise_cosine([[1.0, 2.0]]), "at least 2 samples.*got 1"),
        (lambda: mean_pairwise_cosine([[1.0, 2.0], [0.0, 0.0]]), r"rows \[1\]"),
        (lambda: vendi_score([[math.nan]]), r"rows \[0\]"),
        (lambda: vendi_score([1.0, 2.0]), r"\[samples, hidden\]"),
        (lambda: vendi_score([[1.0]], order=0), "`order` must be above 0; got 0"),
        (lambda: distinct_n("one text"), "list of samples; got one string, 'one text'"),
        (lambda: distinct_n(["a"], 0), "`n` must be at least 1; got 0"),
        (lambda: self_bleu(["a"]), "at least 2 samples to compare; got 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
