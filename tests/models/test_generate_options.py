"""What `generate` takes, and what it refuses."""

import pytest
import torch
from tiny_models import BOS, EOS, IMAGE, latent, latent_config
from transformers import DynamicCache, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

LENGTH = 6


@pytest.fixture(scope="module")
def perturbed():
    return latent("llava")


def run(model, inputs, **options):
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**settings, **options})


def row(inputs, i=1):
    """A row of text alone, without padding."""
    keep = inputs["attention_mask"][i].bool()
    return {"input_ids": inputs["input_ids"][i : i + 1, keep]}


def test_forced_codes_are_taken_and_make_the_text(perturbed):
    model, tiny = perturbed
    forced = torch.arange(3 * LENGTH).view(3, LENGTH) % 16
    out = run(model, tiny.inputs, forced_action_ids=forced)
    again = run(model, tiny.inputs, forced_action_ids=forced, action_do_sample=False)
    assert torch.equal(out.action_ids, forced)
    assert torch.equal(out.sequences, again.sequences)
    other = run(model, tiny.inputs, forced_action_ids=(forced + 5) % 16)
    assert not torch.equal(out.sequences, other.sequences)


def test_forcing_some_steps_leaves_the_others_free(perturbed):
    model, tiny = perturbed
    forced = torch.full((3, LENGTH), -1)
    forced[:, 2:4] = 7
    torch.manual_seed(0)
    out = run(model, tiny.inputs, forced_action_ids=forced)
    assert (out.action_ids[:, 2:4] == 7).all()
    assert not (out.action_ids[:, [0, 1, 4, 5]] == 7).all()
    short = run(model, tiny.inputs, forced_action_ids=torch.full((3, 2), 9))
    assert (short.action_ids[:, :2] == 9).all() and short.action_ids.shape == (3, LENGTH)


def test_replaying_recorded_codes_gives_the_text_again(perturbed):
    model, tiny = perturbed
    out = run(model, tiny.inputs)
    again = run(model, tiny.inputs, forced_action_ids=out.action_ids)
    assert torch.equal(out.sequences, again.sequences)
    torch.testing.assert_close(out.action_log_probs, again.action_log_probs)


def test_a_code_forced_from_outside_the_support_has_log_probability_zero(perturbed):
    model, tiny = perturbed
    best = run(model, tiny.inputs, action_do_sample=False).action_ids[:, :1]
    out = run(model, tiny.inputs, forced_action_ids=(best + 1) % 16, action_top_k=1)
    assert (out.action_log_probs[:, 0] == 0).all()
    assert torch.isfinite(out.action_log_probs).all()


def test_the_most_likely_codes_do_not_depend_on_the_seed(perturbed):
    model, tiny = perturbed
    outs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outs.append(run(model, tiny.inputs, action_do_sample=False))
    assert torch.equal(outs[0].action_ids, outs[1].action_ids)


def test_a_generator_decides_the_sampling(perturbed):
    model, tiny = perturbed
    outs = [run(model, tiny.inputs, action_generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(outs[0].action_ids, outs[1].action_ids)
    other = run(model, tiny.inputs, action_generator=torch.Generator().manual_seed(6))
    assert not torch.equal(outs[0].action_ids, other.action_ids)


@pytest.mark.parametrize("law", [{}, {"action_top_k": 4}, {"action_top_p": 0.5}, {"action_do_sample": False}], ids=str)
def test_banned_codes_are_never_chosen(perturbed, law):
    model, tiny = perturbed
    bias = torch.zeros(16)
    bias[::2] = -torch.inf
    out = run(model, tiny.inputs, action_bias=bias, num_return_sequences=4, action_temperature=3.0, **law)
    assert (out.action_ids % 2 == 1).all()
    assert torch.isfinite(out.action_log_probs).all()


def test_a_bias_towards_a_code_makes_it_certain(perturbed):
    model, tiny = perturbed
    bias = torch.zeros(16)
    bias[11] = 100.0
    out = run(model, tiny.inputs, action_bias=bias)
    assert (out.action_ids == 11).all()
    torch.testing.assert_close(out.action_log_probs, torch.zeros(3, LENGTH))


def test_sampling_follows_the_law(perturbed):
    model, tiny = perturbed
    inputs = row(tiny.text_inputs)
    with torch.no_grad():
        law = model(**inputs, keep_last=1, return_logits=False).action_logits[0, -1].div(2.0).softmax(-1)
    torch.manual_seed(0)
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "num_return_sequences": 4000, "action_temperature": 2.0}
    counts = run(model, inputs, **options).action_ids.flatten().bincount(minlength=16)
    expected = law * 4000
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 15 degrees of freedom, p = .001


def test_a_row_that_has_ended_is_padded_and_the_others_go_on(perturbed):
    model, tiny = perturbed
    out = run(model, tiny.inputs, action_do_sample=False)
    stop = int(out.sequences[0, -LENGTH + 1])
    options = {"min_new_tokens": None, "eos_token_id": stop, "action_do_sample": False}
    ended = run(model, tiny.inputs, **options)
    completion = ended.sequences[:, tiny.inputs["input_ids"].shape[1] :]
    first = completion[0].tolist().index(stop)
    assert (completion[0, first + 1 :] == model.generation_config.pad_token_id).all()
    assert ended.action_ids.shape == ended.action_log_probs.shape == completion.shape


def test_stopping_criteria_stop(perturbed):
    model, tiny = perturbed
    width = tiny.inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([MaxLengthCriteria(width + 2)])
    out = run(model, tiny.inputs, min_new_tokens=None, stopping_criteria=criteria)
    assert out.sequences.shape[1] == width + 2 and out.action_ids.shape == (3, 2)


def test_stop_strings_stop(perturbed):
    model, tiny = perturbed
    inputs = row(tiny.text_inputs)
    out = run(model, inputs, action_do_sample=False, max_new_tokens=12, min_new_tokens=None)
    text = tiny.processor.tokenizer.decode(out.sequences[0, -1:])
    stopped = run(
        model,
        inputs,
        action_do_sample=False,
        max_new_tokens=12,
        min_new_tokens=None,
        stop_strings=[text],
        tokenizer=tiny.processor.tokenizer,
    )
    assert stopped.action_ids.shape[1] == stopped.sequences.shape[1] - inputs["input_ids"].shape[1] <= 12


class Collector(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token(perturbed):
    model, tiny = perturbed
    streamer = Collector()
    out = run(model, row(tiny.text_inputs), streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.parts), out.sequences[0])
    run(model, row(tiny.text_inputs), streamer=TextStreamer(tiny.processor.tokenizer))


def test_bad_words_are_not_said(perturbed):
    model, tiny = perturbed
    out = run(model, tiny.inputs, action_do_sample=False)
    said = out.sequences[:, -LENGTH:].unique().tolist()
    other = run(model, tiny.inputs, action_do_sample=False, bad_words_ids=[[token] for token in said])
    assert not set(other.sequences[:, -LENGTH:].unique().tolist()) & set(said)


def test_a_repetition_penalty_makes_text_vary(perturbed):
    model, tiny = perturbed
    out = run(model, tiny.inputs, repetition_penalty=100.0, max_new_tokens=20, min_new_tokens=20, eos_token_id=None)
    completion = out.sequences[:, -20:]
    assert all(len(set(ids.tolist())) == 20 for ids in completion)


@pytest.mark.parametrize("given", [None, [50, 51]])
def test_vision_placeholders_are_never_generated(given):
    model, tiny = latent("llava")
    with torch.no_grad():
        # A head that would say the placeholder always, had it the choice.
        model.get_output_embeddings().weight[IMAGE] = model.get_output_embeddings().weight.mean(0) * 50
        model.get_output_embeddings().weight[IMAGE + 1 :] *= 0.01
    stock = tiny.model.generate(**tiny.inputs, max_new_tokens=8, do_sample=False)
    options = {} if given is None else {"suppress_tokens": given}
    out = run(model, tiny.inputs, max_new_tokens=8, **options)
    assert (stock[:, -8:] == IMAGE).any(), "the backbone must want to"
    assert not torch.isin(out.sequences[:, -8:], torch.tensor([IMAGE, *(given or [])])).any()


def test_a_generation_config_counts_and_is_not_changed(perturbed):
    model, tiny = perturbed
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, repetition_penalty=2.0, action_do_sample=False)
    before = config.to_dict()
    ids = model.generate(**tiny.inputs, generation_config=config, num_return_sequences=2)
    assert isinstance(ids, torch.Tensor) and ids.shape[0] == 6
    assert config.to_dict() == before
    options = {"max_new_tokens": 3, "repetition_penalty": 2.0, "action_do_sample": False}
    assert torch.equal(ids[::2], model.generate(**tiny.inputs, **options))


def test_the_models_own_generation_config_counts():
    model, tiny = latent("llava")
    model.generation_config.max_new_tokens = 2
    model.generation_config.action_do_sample = False
    out = model.generate(**tiny.inputs, return_dict_in_generate=True)
    assert out.action_ids.shape[1] <= 2
    assert torch.equal(out.action_ids, model.generate(**tiny.inputs, return_dict_in_generate=True).action_ids)
    longer = model.generate(**tiny.inputs, max_new_tokens=4, min_new_tokens=4)
    assert longer.shape[1] - tiny.inputs["input_ids"].shape[1] == 4


def test_prompts_without_a_mask_are_masked_where_they_are_padding(perturbed):
    model, tiny = perturbed
    want = run(model, tiny.text_inputs, action_do_sample=False)
    got = run(model, {"input_ids": tiny.text_inputs["input_ids"]}, action_do_sample=False)
    positional = model.generate(
        tiny.text_inputs["input_ids"], max_new_tokens=LENGTH, min_new_tokens=LENGTH, action_do_sample=False
    )
    assert torch.equal(got.sequences, want.sequences) and torch.equal(positional, want.sequences)


def test_scores_and_logits_are_the_token_choices(perturbed):
    model, tiny = perturbed
    out = run(model, tiny.inputs, output_scores=True, output_logits=True, num_return_sequences=2)
    assert len(out.scores) == len(out.logits) == LENGTH
    chosen = torch.stack(out.scores, dim=1).argmax(-1)
    assert torch.equal(chosen, out.sequences[:, -LENGTH:])


def test_going_on_from_a_cache_gives_the_same_text(perturbed):
    model, tiny = perturbed
    whole = run(model, tiny.inputs, action_do_sample=False, max_new_tokens=10, min_new_tokens=10)
    first = run(model, tiny.inputs, action_do_sample=False)
    inputs = {**tiny.inputs, "input_ids": first.sequences}
    inputs["attention_mask"] = torch.cat([tiny.inputs["attention_mask"], torch.ones(3, LENGTH, dtype=torch.long)], 1)
    inputs.pop("pixel_values")
    second = run(
        model,
        inputs,
        action_do_sample=False,
        max_new_tokens=4,
        min_new_tokens=4,
        past_key_values=first.past_key_values,
    )
    assert torch.equal(second.sequences, whole.sequences)
    assert torch.equal(second.action_ids, whole.action_ids[:, LENGTH:])
    torch.testing.assert_close(second.action_log_probs, whole.action_log_probs[:, LENGTH:], atol=1e-4, rtol=0)


def test_an_empty_cache_is_filled(perturbed):
    model, tiny = perturbed
    cache = DynamicCache(config=tiny.model.config.get_text_config())
    out = run(model, tiny.inputs, past_key_values=cache, action_do_sample=False)
    assert out.past_key_values is cache
    assert torch.equal(out.sequences, run(model, tiny.inputs, action_do_sample=False).sequences)


def test_a_cache_without_the_policy_is_refused(perturbed):
    model, tiny = perturbed
    inputs = row(tiny.text_inputs)
    stock = tiny.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="no layers of the policy"):
        model.generate(stock.sequences, past_key_values=stock.past_key_values, max_new_tokens=2)
    ours = run(model, inputs)
    with pytest.raises(ValueError, match="leaves out the states"):
        run(model, {"input_ids": ours.sequences}, past_key_values=ours.past_key_values, output_context_states=True)


def test_hooks_are_gone_after_an_error(perturbed):
    model, tiny = perturbed

    class Broken(BaseStreamer):
        def put(self, value):
            raise RuntimeError("broken")

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="broken"):
        run(model, row(tiny.text_inputs), streamer=Broken())
    with pytest.raises(RuntimeError, match="broken"):
        run(model, row(tiny.text_inputs), num_return_sequences=2, streamer=Broken())
    assert not model.get_decoder()._forward_hooks
    assert not model.backbone.base_model._forward_pre_hooks


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"do_sample": True}, "do_sample=True.*action_do_sample"),
        ({"temperature": 0.5}, "temperature=0.5.*action_temperature"),
        ({"top_k": 3}, "top_k=3.*action_top_k"),
        ({"generation_config": GenerationConfig(do_sample=True, top_p=0.5)}, "do_sample=True.*action_do_sample"),
        ({"length_penalty": 0.5}, "length_penalty=0.5"),
        ({"negative_prompt_ids": torch.zeros(3, 2)}, "negative_prompt_ids"),
        ({"inputs_embeds": torch.zeros(3, 2, 32)}, "inputs_embeds"),
        ({"custom_generate": "somebody/something"}, "custom_generate"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"token_healing": True}, "token_healing"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3"),
        ({"action_temperature": 0.0}, "action_do_sample=False"),
        ({"action_temperature": -1.0}, "action_temperature"),
        ({"action_top_k": -1}, "action_top_k"),
        ({"action_top_p": 0.0}, "action_top_p"),
        ({"action_top_p": 1.5}, "action_top_p"),
        ({"action_bias": torch.zeros(15)}, "action_bias"),
        ({"action_bias": torch.full((16,), -torch.inf)}, "at least one code"),
        ({"action_bias": torch.full((16,), torch.nan)}, "action_bias"),
        ({"forced_action_ids": torch.zeros(2, 3, dtype=torch.long)}, "forced_action_ids"),
        ({"forced_action_ids": torch.full((3, 3), 16)}, "-1 ... 15"),
        ({"forced_action_ids": torch.full((3, 3), -2)}, "-1 ... 15"),
        ({"forced_action_ids": torch.zeros(3, 3)}, "integers"),
        ({"attention_mask": torch.ones(3, 2, dtype=torch.long)}, "attention_mask"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_give_a_code_a_token_is_refused(perturbed, options, match):
    model, tiny = perturbed
    with pytest.raises(ValueError, match=match):
        model.generate(**{**tiny.inputs, "max_new_tokens": 2, **options})


def test_padding_on_the_right_is_refused(perturbed):
    model, _ = perturbed
    ids = torch.tensor([[BOS, 50, 51, 52], [BOS, 50, 0, 0]])
    with pytest.raises(ValueError, match="on the left"):
        model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=2)


def test_a_missing_prompt_or_component_is_said(perturbed):
    model, tiny = perturbed
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(max_new_tokens=2)
    policy, model.policy = model.policy, None
    try:
        with pytest.raises(ValueError, match=r"no policy.*new_component\('policy'\)"):
            model.generate(**tiny.inputs)
        with pytest.raises(ValueError, match="policy"):
            model(**tiny.inputs)
    finally:
        model.policy = policy


def test_one_code_generates():
    model, tiny = latent("llava", latent_config(num_codes=1, allow_single_code=True))
    out = run(model, tiny.inputs)
    assert (out.action_ids == 0).all() and (out.action_log_probs == 0).all()
    assert EOS not in out.sequences[:, -LENGTH:]
