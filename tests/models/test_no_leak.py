"""Who may look at which token."""

import pytest
import torch
from tiny_models import IMAGE, latent


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "llama"])
def perturbed(request):
    return latent(request.param)


def changed(inputs, position):
    """Inputs with another token at `position`."""
    ids = inputs["input_ids"].clone()
    assert not (ids[:, position] == IMAGE).any()
    ids[:, position] = 16 + (ids[:, position] + 5) % 200
    return {**inputs, "input_ids": ids}


@torch.no_grad()
def logits_of(model, inputs):
    states, position_ids = model.encode(**inputs)
    policy = model.policy(states, inputs["attention_mask"], position_ids)
    inverse = model.inverse_dynamics(states, inputs["attention_mask"], position_ids)
    return policy, inverse


@pytest.mark.parametrize("kind", ["inputs", "text_inputs"])
def test_policy_sees_nothing_later_and_the_inverse_model_one_token(perturbed, kind):
    model, tiny = perturbed
    inputs = getattr(tiny, kind)
    length = inputs["input_ids"].shape[1]
    policy, inverse = logits_of(model, inputs)
    assert inverse.shape[1] == length - 1 and policy.shape[1] == length
    for position in (length - 1, length - 2):
        other_policy, other_inverse = logits_of(model, changed(inputs, position))
        t = position - 1
        torch.testing.assert_close(policy[:, : t + 1], other_policy[:, : t + 1], atol=1e-6, rtol=0)
        assert (policy[:, t + 1] - other_policy[:, t + 1]).abs().amax(-1).min() > 1e-3
        # The inverse model's code at t explains the token at t + 1, so it sees it, and the code before does not.
        assert (inverse[:, t] - other_inverse[:, t]).abs().amax(-1).min() > 1e-3
        torch.testing.assert_close(inverse[:, :t], other_inverse[:, :t], atol=1e-6, rtol=0)


def test_padding_is_not_seen(perturbed):
    model, tiny = perturbed
    inputs = tiny.text_inputs
    hidden = inputs["attention_mask"] == 0
    noise = torch.where(hidden, torch.full_like(inputs["input_ids"], 99), inputs["input_ids"])
    policy, inverse = logits_of(model, inputs)
    other_policy, other_inverse = logits_of(model, {**inputs, "input_ids": noise})
    torch.testing.assert_close(policy[~hidden], other_policy[~hidden], atol=1e-5, rtol=0)
    both = ~(hidden[:, 1:] | hidden[:, :-1])
    torch.testing.assert_close(inverse[both], other_inverse[both], atol=1e-5, rtol=0)


def test_codes_do_not_reach_the_backbones_cache(perturbed):
    model, tiny = perturbed
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True, "output_context_states": True}
    first = torch.zeros(3, 1, dtype=torch.long)
    out = model.generate(**tiny.inputs, forced_action_ids=first, **options)
    states, _ = model.encode(**tiny.extended(tiny.inputs, out.sequences))
    shown = tiny.extended(tiny.inputs, out.sequences)["attention_mask"][:, :-1].bool()
    torch.testing.assert_close(out.context_states[shown], states[:, :-1][shown], atol=1e-4, rtol=1e-4)
