"""The `openai` client, unchanged, and curl get from the server what the model's own `generate` answers."""

import json
import shutil
import subprocess

import pytest
import torch
from conversations import asked, picture

QUESTION = "what color is it?"


def create(client, messages, codes=None, **options):
    extra = {} if codes is None else {"extra_body": {"latent_actions": codes}}
    return client.chat.completions.create(model="pocket", messages=messages, **extra, **options)


@pytest.mark.parametrize("image", [None, picture("blue")])
def test_an_answer_is_the_models_own(client, alone, image):
    (own,) = alone(QUESTION, image, action_do_sample=False, max_new_tokens=16)
    reply = create(client, asked(QUESTION, *[image] * (image is not None)), temperature=0, max_completion_tokens=16)
    (choice,) = reply.choices
    assert choice.message.content == own.text and choice.message.role == "assistant"
    assert choice.latent_actions["ids"] == own.action_ids
    assert choice.latent_actions["log_probs"] == pytest.approx(own.log_probs, abs=1e-5)
    assert "".join(choice.latent_actions["tokens"]) == own.text + "<|end|>"
    assert choice.finish_reason == "stop" and choice.logprobs is None and reply.model == "pocket"
    assert reply.usage.completion_tokens == len(own.token_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_joined_is_the_answer(client):
    options = {"messages": asked(QUESTION, picture("green")), "temperature": 1, "seed": 5, "n": 2}
    whole = create(client, codes={"top_k": 20}, **options)
    chunks = list(create(client, codes={"top_k": 20}, stream=True, stream_options={"include_usage": True}, **options))
    for index in (0, 1):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        (own,) = (choice for choice in whole.choices if choice.index == index)
        assert "".join(part.delta.content for part in parts) == own.message.content
        assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
        reasons = [part.finish_reason for part in parts]
        assert reasons == [*[None] * (len(parts) - 1), own.finish_reason]
        for name in ("ids", "tokens", "log_probs"):
            assert sum((part.latent_actions[name] for part in parts), []) == own.latent_actions[name]
        assert len(parts) == len(own.latent_actions["ids"])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    plain = create(client, stream=True, **options)
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_a_seed_gives_what_it_gives_alone(client, alone):
    law = {"action_temperature": 1.4, "action_top_p": 0.9, "action_top_k": 30}
    drawn = {}
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        own = alone(QUESTION, None, num_return_sequences=3, action_generator=generator, max_new_tokens=12, **law)
        reply = create(
            client, asked(QUESTION), {"top_k": 30}, temperature=1.4, top_p=0.9, seed=seed, n=3, max_tokens=12
        )
        drawn[seed] = [choice.latent_actions["ids"] for choice in reply.choices]
        assert drawn[seed] == [answer.action_ids for answer in own]
        for choice, answer in zip(reply.choices, own, strict=True):
            assert choice.latent_actions["log_probs"] == pytest.approx(answer.log_probs, abs=1e-5)
    assert drawn[1] != drawn[2]


def test_codes_are_forced_banned_and_biased(client, alone):
    free = alone(QUESTION, action_do_sample=False, max_new_tokens=8)[0].action_ids
    options = {"messages": asked(QUESTION), "temperature": 0, "max_completion_tokens": 8}
    for codes in ({"forced": [7, -1, 9]}, {"banned": [free[0]]}, {"bias": {free[0]: -50.0, 11: 60.5}}):
        bias = torch.zeros(128)
        for code, value in codes.get("bias", {}).items():
            bias[code] = value
        bias[codes.get("banned", [])] = -torch.inf
        forced = torch.tensor([codes["forced"]]) if "forced" in codes else None
        own = alone(QUESTION, action_do_sample=False, max_new_tokens=8, action_bias=bias, forced_action_ids=forced)
        found = create(client, codes=codes, **options).choices[0].latent_actions["ids"]
        assert found == own[0].action_ids != free


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_ends_before_a_stop_text(client, alone, stream, n):
    whole = alone(QUESTION, picture("blue"), action_do_sample=False, max_new_tokens=16)[0]
    # It begins and ends within tokens.
    stop = whole.text[4:8]
    options = {"temperature": 0, "stop": ["nowhere", stop], "n": n, "stream": stream}
    reply = create(client, asked(QUESTION, picture("blue")), **options)
    texts, reasons, codes = [""] * n, [None] * n, [[] for _ in range(n)]
    for chunk in reply if stream else [reply]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content if stream else choice.message.content
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            codes[choice.index] += choice.latent_actions["ids"]
    assert texts == [whole.text[: whole.text.index(stop)]] * n and reasons == ["stop"] * n
    assert all(ids == whole.action_ids[: len(ids)] and len(ids) < len(whole.action_ids) for ids in codes)


def test_an_answer_that_is_too_long_is_cut(client):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = create(client, asked(QUESTION), temperature=0, **{name: 2})
        assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 2


def test_a_conversation_goes_on_with_the_clients_own_message(client):
    messages = asked(QUESTION, picture("red"))
    reply = create(client, messages, temperature=0)
    messages += [reply.choices[0].message, {"role": "user", "content": "what shape is it?"}]
    again = create(client, messages, temperature=0)
    assert again.choices[0].message.content and again.usage.prompt_tokens > reply.usage.total_tokens
    system, developer = (
        create(client, [{"role": role, "content": "be brief"}, *asked(QUESTION)], temperature=0)
        for role in ("system", "developer")
    )
    assert system.choices[0].latent_actions == developer.choices[0].latent_actions


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "pocket" and model.latent_actions["num_codes"] == 128
    assert client.models.retrieve("pocket") == model


def test_curl_is_answered_too(url):
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    body = json.dumps({"model": "pocket", "messages": asked(QUESTION), "temperature": 0, "max_tokens": 4})
    words = ["curl", "-s", "--fail", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    reply = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    assert reply["object"] == "chat.completion" and len(reply["choices"][0]["latent_actions"]["ids"]) == 4
    streamed = json.dumps({**json.loads(body), "stream": True})
    said = subprocess.run([*words[:-1], streamed], check=True, capture_output=True, text=True).stdout
    events = said.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
