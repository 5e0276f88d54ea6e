"""What a rollout records is what a fresh pass over its text gives, to 1e-4 in float32."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import latent, latent_config

from latent_trl import ActionLaw

TOLERANCE = 1e-4
PER_ROW = ("sequences", "action_ids", "action_log_probs", "action_support", "context_states")
LAWS = {
    "plain": {},
    "hot": {"action_temperature": 2.0},
    "cold": {"action_temperature": 0.3},
    "top_k": {"action_top_k": 5},
    "top_p": {"action_top_p": 0.7},
    "all": {"action_temperature": 1.3, "action_top_k": 8, "action_top_p": 0.9},
}


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "llama"])
def perturbed(request):
    return latent(request.param)


def roll_out(model, inputs, **options):
    torch.manual_seed(7)
    return model.generate(
        **inputs,
        max_new_tokens=9,
        min_new_tokens=9,
        return_dict_in_generate=True,
        output_context_states=True,
        **options,
    )


def law_of(options) -> ActionLaw:
    return ActionLaw(**{name.removeprefix("action_"): value for name, value in options.items()})


def rescored(model, tiny, inputs, out, law, bias=0.0):
    """Log-probabilities and entropies of the recorded codes, from a fresh pass of backbone and policy."""
    length = out.action_ids.shape[1]
    with torch.no_grad():
        passed = model(**tiny.extended(inputs, out.sequences), return_logits=False)
    logits = passed.action_logits[:, -length - 1 : -1] + bias
    return law.score(logits, out.action_ids, out.action_support)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["inputs", "text_inputs"])
def test_recorded_log_probs_equal_a_fresh_pass(perturbed, kind, law):
    model, tiny = perturbed
    inputs, options = getattr(tiny, kind), LAWS[law]
    out = roll_out(model, inputs, **options)
    log_probs, entropy = rescored(model, tiny, inputs, out, law_of(options))
    assert (log_probs - out.action_log_probs).abs().max() < TOLERANCE
    assert torch.isfinite(log_probs).all() and torch.isfinite(entropy).all() and (entropy >= -1e-6).all()
    assert len(out.action_ids.unique()) > 1
    assert (out.action_support is None) == (not law_of(options).truncates)


def test_perturbed_text_is_not_the_backbones(perturbed):
    model, tiny = perturbed
    out = roll_out(model, tiny.inputs)
    stock = tiny.model.generate(**tiny.inputs, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert not torch.equal(out.sequences, stock)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_caches_give_the_same_rollout(perturbed, options):
    model, tiny = perturbed
    out, other = roll_out(model, tiny.inputs), roll_out(model, tiny.inputs, **options)
    assert torch.equal(out.sequences, other.sequences)
    assert torch.equal(out.action_ids, other.action_ids)
    assert (out.action_log_probs - other.action_log_probs).abs().max() < TOLERANCE
    shown = tiny.extended(tiny.inputs, out.sequences)["attention_mask"][:, :-1].bool()
    torch.testing.assert_close(out.context_states[shown], other.context_states[shown], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"action_sampling": "arithmetic"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["inputs", "text_inputs"])
def test_several_samples_a_prompt_are_scored_as_they_were_taken(perturbed, kind, options):
    model, tiny = perturbed
    inputs = getattr(tiny, kind)
    out = roll_out(model, inputs, num_return_sequences=3, action_top_k=12, **options)
    assert out.action_ids.shape == (9, 9)
    assert torch.equal(out.sequences[::3, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for i in range(3):
        part = SimpleNamespace(**{name: getattr(out, name)[i::3] for name in PER_ROW})
        log_probs, _ = rescored(model, tiny, inputs, part, ActionLaw(top_k=12))
        assert (log_probs - part.action_log_probs).abs().max() < TOLERANCE
        states, _ = model.encode(**tiny.extended(inputs, part.sequences))
        shown = tiny.extended(inputs, part.sequences)["attention_mask"][:, :-1].bool()
        torch.testing.assert_close(part.context_states[shown], states[:, :-1][shown], atol=1e-4, rtol=1e-4)
    assert len({tuple(ids) for ids in out.action_ids.tolist()}) > 6


def test_several_samples_share_one_encoding_of_the_prompt(perturbed):
    model, tiny = perturbed
    seen = []
    handle = model.get_decoder().register_forward_hook(
        lambda m, args, output: seen.append(output.last_hidden_state.shape[:2])
    )
    roll_out(model, tiny.inputs, num_return_sequences=4)
    handle.remove()
    assert seen[0] == (3, tiny.inputs["input_ids"].shape[1])
    assert set(seen[1:]) == {(12, 1)}


def test_forced_codes_of_several_samples_go_prompt_by_prompt(perturbed):
    model, tiny = perturbed
    forced = torch.arange(54).view(6, 9) % 16
    out = roll_out(model, tiny.inputs, num_return_sequences=2, forced_action_ids=forced)
    assert torch.equal(out.action_ids, forced)


def test_recorded_states_and_positions_score_without_the_backbone(perturbed):
    model, tiny = perturbed
    out = roll_out(model, tiny.inputs)
    mask = tiny.extended(tiny.inputs, out.sequences)["attention_mask"][:, :-1]
    with torch.no_grad():
        passed = model(
            context_states=out.context_states,
            attention_mask=mask,
            position_ids=as_decoder_takes(out.position_ids),
            keep_last=9,
            action_ids=out.action_ids,
        )
    log_probs, _ = ActionLaw().score(passed.action_logits, out.action_ids)
    assert (log_probs - out.action_log_probs).abs().max() < TOLERANCE
    banned = [*model.config.vision_token_ids, model.generation_config.eos_token_id]
    passed.logits[..., banned] = -torch.inf
    assert torch.equal(passed.logits.argmax(-1), out.sequences[:, -9:])


def as_decoder_takes(position_ids):
    return position_ids if position_ids.ndim == 2 else position_ids.transpose(0, 1)


def test_a_batch_gives_each_row_what_it_gets_alone(perturbed):
    model, tiny = perturbed
    out = roll_out(model, tiny.text_inputs, action_do_sample=False)
    for i, keep in enumerate(tiny.text_inputs["attention_mask"].bool()):
        alone = roll_out(model, {"input_ids": tiny.text_inputs["input_ids"][i : i + 1, keep]}, action_do_sample=False)
        assert torch.equal(alone.action_ids[0], out.action_ids[i])
        assert (alone.action_log_probs - out.action_log_probs[i : i + 1]).abs().max() < TOLERANCE


def test_a_biased_law_is_scored_with_its_bias(perturbed):
    model, tiny = perturbed
    bias = torch.linspace(-2, 2, 16)
    bias[3] = -torch.inf
    out = roll_out(model, tiny.inputs, action_bias=bias, action_top_k=6)
    log_probs, _ = rescored(model, tiny, tiny.inputs, out, ActionLaw(top_k=6), bias)
    assert (log_probs - out.action_log_probs).abs().max() < TOLERANCE
    assert not out.action_support[..., 3].any()


def test_tuned_projector_changes_states_that_have_seen_no_image_alone():
    model, tiny = latent("llava")
    torch.manual_seed(0)
    before, _ = model.encode(**tiny.inputs)
    model.new_component("projector")
    after, _ = model.encode(**tiny.inputs)
    changed = (before != after).any(dim=-1)
    assert torch.equal(changed, ~model.has_image(tiny.inputs["input_ids"]))
    assert changed[1].all() and not changed[::2].all(dim=1).any()


def test_a_model_without_projector_takes_states_as_they_are():
    model, tiny = latent("llava", latent_config(use_projector=False))
    assert model.projector is None
    out = roll_out(model, tiny.inputs)
    log_probs, _ = rescored(model, tiny, tiny.inputs, out, ActionLaw())
    assert (log_probs - out.action_log_probs).abs().max() < TOLERANCE
