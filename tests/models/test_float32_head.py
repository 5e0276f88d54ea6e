"""Logits of codes and values are multiplied in float32: what a small update changes is not rounded away."""

import copy

import pytest
import torch
from tiny_models import latent, latent_config
from torch.nn import functional as F

from latent_trl.models.float32_head import Float32Head

# Weights and autocast of the runs that there are: float32 under autocast, and models kept in half precision.
PRECISIONS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, None),
    (torch.float16, None),
]


def made(dtype):
    model, tiny = latent("llama", latent_config(use_projector=False))
    model.new_component("value_head")
    with torch.no_grad():
        model.value_head.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model.to(dtype), tiny


def scored(model, component, states, mask, autocast):
    """What the component says, the features that it read, and its head."""
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        if component == "inverse_dynamics":
            inverse = model.inverse_dynamics
            return inverse(states, mask), inverse.features(states, mask)[:, 1:], inverse.head
        logits, features = model.policy(states, mask, return_features=True)
        if component == "value_head":
            return model.value_head(features)[..., None], features, model.value_head.head
        return logits, features, model.policy.head


def exact(features, head):
    """The same in double precision, over the same features."""
    bias = None if head.bias is None else head.bias.double()
    return F.linear(features.double(), head.weight.double(), bias)


def in_half_precision(features, head, dtype):
    """What a plain linear map gives there."""
    bias = None if head.bias is None else head.bias.to(dtype)
    return F.linear(features.to(dtype), head.weight.to(dtype), bias)


def change(after, before, component):
    """Of the log-probabilities, or of the values."""
    if component == "value_head":
        return after.double() - before.double()
    return after.double().log_softmax(-1) - before.double().log_softmax(-1)


@pytest.mark.parametrize("component", ["policy", "inverse_dynamics", "value_head"])
@pytest.mark.parametrize("weights, autocast", PRECISIONS, ids=str)
def test_what_a_small_step_changes_is_exact_over_the_trunks_features(component, weights, autocast):
    model, tiny = made(weights)
    mask = tiny.text_inputs["attention_mask"]
    states, _ = model.encode(**tiny.text_inputs)
    trunk = model.inverse_dynamics if component == "inverse_dynamics" else model.policy
    before, features, head = scored(model, component, states, mask, autocast)
    head, generator = copy.deepcopy(head), torch.Generator().manual_seed(1)
    owner = getattr(model, component)
    with torch.no_grad():
        for weight in (owner.head.weight, trunk.decoder_stack.decoder.layers[0].mlp.down_proj.weight):
            step = 0.01 * weight.float().std() * torch.randn(weight.shape, generator=generator)
            weight.add_(step.to(weight))
    after, moved, head_after = scored(model, component, states, mask, autocast)
    assert before.dtype == after.dtype == torch.float32
    wanted = change(exact(moved, head_after), exact(features, head), component)
    size, error = wanted.pow(2).mean().sqrt(), (change(after, before, component) - wanted).pow(2).mean().sqrt()
    assert size > 1e-4 and error < 1e-3 * size
    half = autocast or weights
    plain = change(in_half_precision(moved, head_after, half), in_half_precision(features, head, half), component)
    assert (plain - wanted).pow(2).mean().sqrt() > 20 * error, "the case must be one where precision counts"


def test_the_estimate_of_the_divergence_is_of_the_step_and_not_of_its_rounding():
    """The mean of exp(r) - 1 - r, whose square root is what rounding adds to it."""
    head, generator = Float32Head(64, 128, bias=False), torch.Generator().manual_seed(0)
    features = torch.randn(500, 64, generator=generator).bfloat16()
    after = copy.deepcopy(head)
    with torch.no_grad():
        after.weight.add_(2e-4 * torch.randn(after.weight.shape, generator=generator))

    def estimate(first, second):
        ratio = second.double().log_softmax(-1) - first.double().log_softmax(-1)
        return (first.double().softmax(-1) * (ratio.exp() - 1 - ratio)).sum(-1).mean().item()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimate(head(features), after(features))
        rounded = estimate(F.linear(features, head.weight), F.linear(features, after.weight))
    wanted = estimate(exact(features, head), exact(features, after))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert rounded > 2 * wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtype_of_the_weights(dtype):
    head = Float32Head(8, 3).to(dtype)
    features = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(features)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert features.grad.dtype == head.weight.grad.dtype == head.bias.grad.dtype == dtype


def test_every_head_of_codes_and_values_is_one():
    model, _ = made(torch.float32)
    for name in ("policy", "inverse_dynamics", "value_head"):
        assert type(getattr(model, name).head) is Float32Head
