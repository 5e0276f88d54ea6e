"""Every law of sampling, a request at a time, in one engine; updates; and what an engine does when memory is short."""

import copy
import json

import pytest
import torch
from exact import CODES, LENGTH, measured, prompts, same_rows, tiny
from tiny_models import EOS
from transformers import BitsAndBytesConfig

from latent_trl.generation.action_law import ActionLaw

LAWS = {
    "plain": {},
    "cool": {"action_temperature": 0.8},
    "truncated": {"action_temperature": 1.3, "action_top_k": 10, "action_top_p": 0.9},
}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", policy_decoder={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1})


@pytest.fixture(scope="module")
def shared(model):
    """One engine for the tests of a module, with a policy that is narrower and shallower than the backbone."""
    from exact import start

    made = start(model)
    yield made
    made.close()


@pytest.mark.parametrize("sampling", ["independent", "arithmetic"])
@pytest.mark.parametrize("name", LAWS)
def test_log_probs_are_those_of_the_law(shared, model, name, sampling):
    settings = {"max_new_tokens": LENGTH, "action_sampling": sampling, "ignore_eos": True}
    answers = shared.generate(prompts(8), n=8, seed=3, output_support=True, **settings, **LAWS[name])
    law = ActionLaw(
        *(LAWS[name].get(f"action_{key}", d) for key, d in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)))
    )
    found = measured(model, answers, law)
    assert found.log_prob < 1e-3 and found.token < 1e-3 and found.outside == 0, found
    sizes = torch.stack([answer.support.sum(dim=-1) for answer in answers])
    assert int(sizes.max()) <= (10 if law.top_k else CODES) and int(sizes.min()) >= 1
    assert len({tuple(answer.action_ids) for answer in answers[:8]}) > 4


def test_bias_bans_and_forced_codes(shared, model):
    bias = torch.zeros(CODES)
    bias[:4], bias[5] = -torch.inf, 3.0
    answers = shared.generate(prompts(8), max_new_tokens=LENGTH, action_bias=bias, ignore_eos=True, seed=1)
    found = measured(model, answers, bias=bias)
    assert found.log_prob < 1e-3 and found.outside == 0
    assert min(min(answer.action_ids) for answer in answers) >= 4
    forced = [[1, -1, 2]] * 8
    answers = shared.generate(
        prompts(8), max_new_tokens=4, action_bias=bias, forced_action_ids=forced, ignore_eos=True, seed=1
    )
    for answer in answers:
        assert answer.action_ids[0] == 1 and answer.action_ids[2] == 2 and answer.action_ids[1] >= 4
        assert answer.log_probs[0] == answer.log_probs[2] == 0.0


def test_a_seed_gives_the_same_answers_and_another_one_others(shared):
    first, again, other = (shared.generate(prompts(4), n=2, seed=s, ignore_eos=True) for s in (5, 5, 6))
    assert [a.action_ids for a in first] == [a.action_ids for a in again] != [a.action_ids for a in other]


@pytest.mark.parametrize("sampling", ["independent", "arithmetic"])
def test_first_codes_follow_the_law(shared, model, sampling):
    prompt, groups, size = prompts(1)[0], 64, 16
    states, positions = model.encode(torch.tensor([prompt]))
    probs = model.policy(states, position_ids=positions, keep_last=1)[0, -1].softmax(dim=-1)
    answers = shared.generate([prompt] * groups, n=size, seed=2, max_new_tokens=1, action_sampling=sampling)
    drawn = torch.tensor([answer.action_ids[0] for answer in answers])
    counts = torch.bincount(drawn, minlength=CODES)
    rows = groups * size
    assert ((counts - rows * probs).abs() < 5 * (rows * probs * (1 - probs)).sqrt() + 1).all()
    if sampling == "arithmetic":
        for group in drawn.view(groups, size):
            expected = size * probs
            held = torch.bincount(group, minlength=CODES)
            assert ((held >= expected.floor() - 1e-3) & (held <= expected.ceil() + 1e-3)).all()


def test_ten_updates_in_place(model, shared):
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(10):
            with torch.no_grad():
                for parameter in changed.policy.parameters():
                    parameter.add_(
                        torch.randn(parameter.shape, generator=generator) * 0.05 * parameter.std().nan_to_num(1)
                    )
            cost = shared.update(changed)
        answers = shared.generate(prompts(), max_new_tokens=LENGTH, action_do_sample=False, stop_token_ids=[EOS])
        found = measured(changed, answers)
        assert found.log_prob < 1e-3 and found.code < 1e-3 and found.token < 1e-3, found
        assert same_rows(changed, answers) >= 0.99
        assert same_rows(model, answers) < 0.5
        assert cost["bytes"] == sum(p.numel() * 4 for p in changed.policy.parameters()) and cost["seconds"] < 60
    finally:
        shared.update(model)


def test_greedy_answers_are_the_same_whatever_the_law(model, shared):
    settings = {"max_new_tokens": LENGTH, "action_do_sample": False, "stop_token_ids": [EOS]}
    plain = shared.generate(prompts(), **settings)
    other = shared.generate(prompts(), action_temperature=2.0, action_top_k=2, action_top_p=0.5, **settings)
    assert [(a.token_ids, a.action_ids) for a in other] == [(a.token_ids, a.action_ids) for a in plain]
    assert [a.log_probs for a in other] == [pytest.approx(a.log_probs, abs=1e-5) for a in plain]


def test_a_greedy_answer_that_must_go_on_counts_no_end(model, shared):
    """Of some prompts the most likely first token ends the answer, for the first six tokens in vain."""
    ids = [prompt for prompt in prompts() if len(prompt) > 8][:8]
    free = shared.generate(ids, max_new_tokens=1, action_do_sample=False, ignore_eos=True)
    end = free[0].token_ids[0]
    answers = shared.generate(
        ids, max_new_tokens=12, action_do_sample=False, min_tokens=6, stop_token_ids=[end], ignore_eos=True
    )
    same = 0
    for prompt, answer in zip(ids, answers, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            min_new_tokens=6,
            eos_token_id=[end],
            action_do_sample=False,
            return_dict_in_generate=True,
        )
        same += out.sequences[0, len(prompt) :].tolist() == answer.token_ids
        same += out.action_ids[0].tolist() == answer.action_ids
        assert end not in answer.token_ids[:6]
    assert same == 2 * len(ids)


def test_short_memory_changes_nothing(model):
    """Requests that lose their place go on where they were: the draws, and the interval of an arithmetic code."""
    from exact import start

    engine = start(model, block_size=32, num_gpu_blocks_override=24, max_num_batched_tokens=32, max_num_seqs=16)
    try:
        preempted = count_preemptions(engine)
        settings = {"n": 8, "seed": 3, "max_new_tokens": 40, "ignore_eos": True}
        drawn = engine.generate(prompts(8), action_sampling="arithmetic", **settings)
        assert preempted() > 0
        found = measured(model, drawn)
        assert found.log_prob < 1e-3 and found.token < 1e-3, found
        answers = engine.generate(prompts(), max_new_tokens=LENGTH, action_do_sample=False, stop_token_ids=[EOS])
    finally:
        engine.close()
    assert same_rows(model, answers) >= 0.99
    plenty = start(model)
    try:
        assert [a.action_ids for a in plenty.generate(prompts(8), action_sampling="arithmetic", **settings)] == [
            a.action_ids for a in drawn
        ]
    finally:
        plenty.close()


def count_preemptions(engine):
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    seen, preempt = [], scheduler._preempt_request

    def counted(*args, **kwargs):
        seen.append(1)
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    return lambda: len(seen)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"action_bias": [0.0]}, "action_bias"),
        ({"action_temperature": 0.0}, "action_temperature"),
        ({"forced_action_ids": [[CODES]]}, "forced_action_ids"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(shared, options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        shared.generate([[20, 21]], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"speculative_config": {"method": "ngram"}},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"decode_context_parallel_size": 2},
        {"data_parallel_size": 2},
        {"quantization": "fp8"},
        {"hf_overrides": {}},
    ],
)
def test_engines_that_cannot_be_had_are_refused_by_name(model, options):
    from latent_trl.vllm.engine import LatentActionEngine

    with pytest.raises(ValueError, match=next(iter(options))):
        LatentActionEngine(model, **options)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_quantised_backbone_is_refused_by_name(where, tmp_path):
    """vLLM 0.30 has no bitsandbytes, and a trainer's 4 bits beside an engine's whole backbone would be two models."""
    from latent_trl.vllm.engine import LatentActionEngine

    other = tiny("llama")
    other.backbone.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    if where == "folder":
        record = other.backbone.config.to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps(record))
        del other.backbone.config.quantization_config
        other.config.base_model_name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="quantised .(bitsandbytes|gptq)"):
        LatentActionEngine(other)


def test_the_second_runner_is_refused_by_name(model, monkeypatch):
    from latent_trl.vllm.engine import LatentActionEngine

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER"):
        LatentActionEngine(model)
