import math

import pytest
import torch
from torch import nn

from latent_trl import CrossModalProjector
from latent_trl.models.projector import gaussian_nll


def test_nll_by_hand():
    mean, rho, target = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5]), torch.tensor([0.0, 4.0])
    want = (1 * math.exp(-0.5) + 0.5) + (4 * math.exp(0.5) - 0.5)
    assert gaussian_nll(mean, rho, target).item() == pytest.approx(want, rel=1e-6)


def test_nll_is_the_gaussians_up_to_constants():
    torch.manual_seed(0)
    mean, rho, target = torch.randn(3, 5, 8), torch.rand(3, 5, 8) * 2 - 1, torch.randn(3, 5, 8)
    normal = torch.distributions.Normal(mean, (rho / 2).exp())
    want = (-2 * normal.log_prob(target) - math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(gaussian_nll(mean, rho, target), want)


def plain_map(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    first, _, last = layers[0], layers[1], layers[2]
    return torch.tanh(x @ first.weight.T + first.bias) @ last.weight.T + last.bias


@pytest.mark.parametrize("residual", [True, False])
def test_paired_and_cycle_losses_by_plain_formulas(residual):
    torch.manual_seed(0)
    projector = CrossModalProjector(6, residual)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.5)
    text, image = torch.randn(2, 3, 6), torch.randn(2, 3, 6)

    def apply(part, x):
        mean = plain_map(part.mean, x) + (x if residual else 0)
        return mean, torch.tanh(plain_map(part.log_variance, x))

    def nll(mean, rho, y):
        return ((y - mean).pow(2) / rho.exp() + rho).sum(-1)

    paired = nll(*apply(projector.to_image, text), image) + nll(*apply(projector.to_text, image), text)
    torch.testing.assert_close(projector.paired_nll(text, image), paired)
    projected, _ = apply(projector.to_image, text)
    torch.testing.assert_close(projector(text), projected)
    torch.testing.assert_close(projector.cycle_nll(text), nll(*apply(projector.to_text, projected), text))


def test_an_untrained_residual_projector_is_the_identity():
    states = torch.randn(2, 3, 8)
    assert torch.equal(CrossModalProjector(8)(states), states)
    assert not torch.allclose(CrossModalProjector(8, residual=False)(states), states)


def test_log_variance_is_bounded():
    projector = CrossModalProjector(8)
    _, rho = projector.to_image.distribution(torch.randn(100, 8) * 1e4)
    assert (rho.abs() <= 1).all()


def test_paired_loss_reaches_no_states_and_the_cycle_reaches_both_maps():
    projector = CrossModalProjector(8, residual=False)
    text, image = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    projector.paired_nll(text, image).sum().backward()
    assert text.grad is None and image.grad is None
    projector.zero_grad()
    projector.cycle_nll(text).sum().backward()
    assert text.grad is None
    assert projector.to_image.mean[0].weight.grad.abs().sum() > 0
    assert projector.to_text.mean[0].weight.grad.abs().sum() > 0
    assert projector.to_image.log_variance[0].weight.grad is None


def test_losses_are_float32_in_bfloat16():
    projector = CrossModalProjector(8).bfloat16()
    states = torch.randn(2, 3, 8).bfloat16()
    assert projector.paired_nll(states, states).dtype == torch.float32
    assert projector(states.float()).dtype == torch.bfloat16
