import pytest
import torch

from latent_trl import Codebook
from latent_trl.models.codebook import gumbel_noise


def test_forward_looks_codes_up():
    codebook = Codebook(5, 4)
    ids = torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(codebook(ids), codebook.weight[ids])


def test_initial_codes_have_the_asked_scale():
    torch.manual_seed(0)
    assert Codebook(128, 512, std=3.0).weight.std().item() == pytest.approx(3.0, rel=0.02)


def test_straight_through_is_one_hot_forward():
    torch.manual_seed(0)
    codebook = Codebook(6, 4)
    logits = torch.randn(2, 7, 6)
    vectors, ids = codebook.straight_through(logits, temperature=2.0)
    assert ids.shape == (2, 7) and vectors.shape == (2, 7, 4)
    torch.testing.assert_close(vectors, codebook.weight[ids])


def test_straight_through_gradient_is_the_soft_samples():
    torch.manual_seed(0)
    codebook = Codebook(6, 4)
    target = torch.randn(3, 4)
    logits = torch.randn(3, 6, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    vectors, ids = codebook.straight_through(logits, 2.0, generator)
    (vectors * target).sum().backward()
    hard, logits.grad = logits.grad.clone(), None
    noise = gumbel_noise(logits, torch.Generator().manual_seed(1))
    soft = ((logits + noise) / 2.0).softmax(-1)
    assert torch.equal(soft.argmax(-1), ids)
    (soft @ codebook.weight.detach() * target).sum().backward()
    torch.testing.assert_close(hard, logits.grad)
    # The codebook itself learns from the code that was taken.
    expected = torch.zeros(6, 4).index_add_(0, ids, target)
    torch.testing.assert_close(codebook.weight.grad, expected)


def test_straight_through_samples_the_softmax_of_the_logits():
    torch.manual_seed(0)
    codebook = Codebook(4, 2)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    _, ids = codebook.straight_through(logits.expand(40000, 4), temperature=2.0)
    # The arg-max of logits and noise does not depend on the temperature that both are divided by.
    torch.testing.assert_close(ids.bincount(minlength=4) / 40000, logits.softmax(-1), atol=0.01, rtol=0)


def test_noise_is_reproducible_standard_gumbel_in_float32():
    like = torch.zeros(200, 1000, dtype=torch.bfloat16)
    noise = gumbel_noise(like, torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32 and torch.isfinite(noise).all()
    assert torch.equal(noise, gumbel_noise(like, torch.Generator().manual_seed(0)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.03)


def test_bfloat16_logits_are_chosen_in_float32():
    codebook = Codebook(6, 4).to(torch.bfloat16)
    vectors, ids = codebook.straight_through(torch.randn(50, 6, dtype=torch.bfloat16), 2.0)
    assert vectors.dtype == torch.bfloat16
    torch.testing.assert_close(vectors, codebook.weight[ids], atol=1e-2, rtol=1e-2)
