"""The metrics of `evaluate` that lie in the package, loaded from their folders without a network."""

import math
from pathlib import Path

import pytest

import latent_trl.evaluation

evaluate = pytest.importorskip("evaluate")
FOLDER = Path(latent_trl.evaluation.__path__[0]) / "metrics"
NAMES = ["distinct_n", "self_bleu", "semantic_diversity", "vendi_score"]
SAMPLES = [["a b c", "a b d"], ["x y z", "x y z"]]


def load(name):
    return evaluate.load(str(FOLDER / name))


def letters(texts):
    """Counts of letters, as embeddings."""
    return [[float(text.count(letter)) for letter in "abcdxyz"] for text in texts]


def test_every_folder_is_known():
    assert sorted(path.name for path in FOLDER.iterdir() if (path / f"{path.name}.py").is_file()) == NAMES


def test_distinct_n_by_hand():
    metric = load("distinct_n")
    # Bigrams: ab bc ab bd, then xy yz xy yz.
    assert metric.compute(predictions=SAMPLES)["distinct_n"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert metric.compute(predictions=SAMPLES, n=1)["distinct_n"] == pytest.approx((4 / 6 + 3 / 6) / 2)
    assert metric.compute(predictions=[["a b"], ["a"]])["distinct_n"] == 1.0


def test_self_bleu_by_hand():
    found = load("self_bleu").compute(predictions=SAMPLES, max_n=2)["self_bleu"]
    assert found == pytest.approx((math.sqrt(2 / 3 * 1 / 2) + 1) / 2)


def test_semantic_diversity_by_hand():
    found = load("semantic_diversity").compute(predictions=SAMPLES, embedder=letters)["semantic_diversity"]
    assert found == pytest.approx(1 / ((2 / 3 + 1) / 2))


def test_vendi_score_by_hand():
    metric = load("vendi_score")
    # Two unit vectors of cosine c: the eigenvalues of K/2 are (1 + c)/2 and (1 - c)/2.
    high, low = (1 + 2 / 3) / 2, (1 - 2 / 3) / 2
    first = math.exp(-high * math.log(high) - low * math.log(low))
    found = metric.compute(predictions=SAMPLES, embedder=letters)["vendi_score"]
    assert found == pytest.approx((first + 1) / 2)
    found = metric.compute(predictions=SAMPLES, embedder=letters, order=2.0)["vendi_score"]
    assert found == pytest.approx((1 / (high**2 + low**2) + 1) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_tells_what_it_takes(name):
    metric = load(name)
    assert metric.name == name and "huggingface.co/papers/" in metric.citation
    assert "predictions (`list[list[str]]`)" in metric.inputs_description and metric.description
    with pytest.raises(ValueError, match="one string"):
        metric.compute(predictions=["one string", "another"])
