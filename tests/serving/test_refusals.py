"""What a request cannot have is refused by name in OpenAI's form, and nothing that it names is opened."""

import builtins
import json
import socket

import httpx
import openai
import pytest
from conversations import asked, data_url, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import serving

from latent_trl.generation.action_law import ActionLaw
from latent_trl.serving.engine import CODES

BODY = {"model": "pocket", "messages": asked("what color is it?"), "temperature": 0, "max_completion_tokens": 3}


def with_parts(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


def with_url(url, **more):
    return with_parts({"type": "image_url", "image_url": {"url": url, **more}})


HALF = data_url(picture())[: 22 + 4 * 40]
CASES = [
    ({"foo": 1}, 400, "foo", "There is no field `foo` here."),
    ({"top_k": 5}, 400, "top_k", "Did you mean `latent_actions.top_k`?"),
    ({"max_completion_length": 5}, 400, "max_completion_length", "Did you mean `max_completion_tokens`?"),
    ({"tempreature": 1}, 400, "tempreature", "Did you mean `temperature`?"),
    ({"latent_actions": {"ban": [1]}}, 400, "latent_actions.ban", "Did you mean `banned`?"),
    ({"logprobs": True}, 400, "logprobs", "`latent_actions.log_probs`"),
    ({"logprobs": False, "top_logprobs": 3}, 400, "top_logprobs", "of tokens"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "is about the choice of tokens"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "is about the choice of tokens"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "is not supported"),
    ({"model": "gpt"}, 404, "model", "There is no model 'gpt' here, only 'pocket'."),
    ({"messages": []}, 400, "messages", "at least 1 item"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role", "got 'tool'"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages.0.name", "no field"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "messages", "holds the visual token '<image>'"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "Field required"),
    (with_parts({"type": "video_url", "video_url": {"url": "a"}}), 400, "messages.0.content.0", "'video_url'"),
    (with_parts({"type": "text", "text": 5}), 400, "messages.0.content.0.text", "got 5"),
    (with_url("http://127.0.0.1:9/a.png"), 400, "messages.0.content.0.image_url", "no path or address is opened"),
    (with_url("/etc/passwd"), 400, "messages.0.content.0.image_url", "no path or address is opened"),
    (with_url("file:///etc/passwd"), 400, "messages.0.content.0.image_url", "no path or address is opened"),
    (with_url("data:image/png;base64,?"), 400, "messages.0.content.0.image_url", "is no base64"),
    (with_url("data:image/png,abc"), 400, "messages.0.content.0.image_url", "is not in base64"),
    (with_url(HALF), 400, "messages.0.content.0.image_url", "cannot be read as an image"),
    (with_url(data_url(picture()), detail="high"), 400, "messages.0.content.0.image_url.detail", "'auto'"),
    (with_url(data_url(picture(size=500))), 400, "messages.0.content.0.image_url", "more than `max_pixels`"),
    ({"messages": asked("a", *[picture()] * 5)}, 400, "messages", "At most 4 pictures can be sent, got 5."),
    ({"messages": asked("a" * 3000)}, 400, "messages", "more than 2500 characters"),
    ({"messages": asked("why " * 600)}, 400, "messages", "the longest context is of 512"),
    ({"max_completion_tokens": 65}, 400, "max_completion_tokens", "The longest answer has 64 tokens here, not 65."),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "greater than or equal to 1"),
    ({"max_tokens": 4}, 400, "max_tokens", "differ"),
    ({"n": 33}, 400, "n", "`n` is at most 32 here, got 33."),
    ({"n": True}, 400, "n", "valid integer"),
    ({"stop": [""]}, 400, "stop.0", "at least 1 character"),
    ({"stop": list("abcde")}, 400, "stop", "at most 4"),
    ({"seed": 2**63}, 400, "seed", "less than"),
    ({"temperature": -1}, 400, "temperature", "`temperature` must be positive"),
    ({"temperature": "1"}, 400, "temperature", "valid number"),
    ({"top_p": 0}, 400, "top_p", "must be in (0, 1]"),
    ({"latent_actions": {"top_k": -1}}, 400, "latent_actions.top_k", "must be 0 (keep all codes) or positive"),
    ({"latent_actions": {"temperature": 1}}, 400, "temperature", "Both are about codes"),
    ({"latent_actions": {"forced": [128]}}, 400, "latent_actions.forced", "codes are 0 to 127, or -1"),
    ({"latent_actions": {"forced": [-2]}}, 400, "latent_actions.forced", "got -2"),
    ({"latent_actions": {"banned": [-1]}}, 400, "latent_actions.banned", "codes are 0 to 127, got -1"),
    ({"latent_actions": {"banned": list(range(128))}}, 400, "latent_actions.banned", "at least one code"),
    ({"latent_actions": {"bias": {"200": 1}}}, 400, "latent_actions.bias", "got 200"),
    ({"latent_actions": {"bias": {"2": -1e300}}}, 400, "latent_actions.bias", "`banned` leaves a code out"),
    ({"latent_actions": {"bias": {"a": 1}}}, 400, "latent_actions.bias.a", "valid integer"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs `stream: true`"),
]


@pytest.fixture(scope="module")
def strict(pocket):
    from latent_trl.serving.chat_request import RequestLimits
    from latent_trl.serving.transformers_engine import TransformersEngine

    limits = RequestLimits(max_body_bytes=100_000, max_characters=2500, max_images=4, max_pixels=200_000)
    with serving(TransformersEngine(*pocket, max_completion_length=64), limits=limits) as url:
        yield url


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change, status, param, said", CASES, ids=[str(i) for i in range(len(CASES))])
def test_what_is_wrong_is_named(strict, change, status, param, said, stream, monkeypatch):
    if "stream_options" in change and stream:
        return
    opened, connected = [], []
    real_open, real_connect, own = builtins.open, socket.socket.connect, httpx.URL(strict).port
    monkeypatch.setattr(builtins, "open", lambda name, *a, **k: opened.append(name) or real_open(name, *a, **k))

    def connect(self, address):
        connected.append(address)
        return real_connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    reply = httpx.post(f"{strict}/chat/completions", json={**BODY, **change, "stream": stream}, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param) and said in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 400 and HALF[30:100] not in error["message"]
    assert opened == [] and {address[1] for address in connected} <= {own}


@pytest.mark.parametrize(
    "content, status, said",
    [
        (b"{", 400, "The body is no JSON"),
        (b"", 400, "The body is no JSON"),
        (b"[1]", 400, "Input should be an object"),
        (b"[" * 50_000, 400, "recursion limit"),
        (b'{"model": "pocket", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "no JSON"),
        (json.dumps({**BODY, "temperature": float("nan")}).encode(), 400, "finite number"),
        (json.dumps(BODY).encode()[:-1] + b', "seed": 1' + b"0" * 5000 + b"}", 400, ""),
        (b"\xff\xfe", 400, "no JSON"),
        (b" " * 100_001, 413, "more than 100000 bytes"),
    ],
)
def test_a_body_that_cannot_be_read(strict, content, status, said):
    reply = httpx.post(f"{strict}/chat/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status and said in reply.json()["error"]["message"]


def test_a_web_page_cannot_send_what_needs_no_leave(strict):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = httpx.post(f"{strict}/chat/completions", content=json.dumps(BODY), headers={"content-type": kind})
        assert reply.status_code == 415 and "application/json" in reply.json()["error"]["message"]
    reply = httpx.post(f"{strict}/chat/completions", json=BODY, headers={"host": "evil.example"})
    assert reply.status_code == 400
    assert "access-control-allow-origin" not in httpx.post(f"{strict}/chat/completions", json=BODY).headers


def test_what_asks_for_nothing_is_taken(strict):
    nothing = {"logprobs": False, "tools": [], "presence_penalty": 0.0, "frequency_penalty": 0, "stop": None, "n": None}
    nothing |= {"response_format": {"type": "text"}, "user": None, "latent_actions": None, "logit_bias": {}}
    reply = httpx.post(f"{strict}/chat/completions", json={**BODY, **nothing}, timeout=60)
    assert reply.status_code == 200


def test_the_client_raises_its_own_errors(url):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="`logprobs`") as refused:
        client.chat.completions.create(**BODY, logprobs=True)
    assert refused.value.param == "logprobs" and refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/completions here"):
        client.completions.create(model="pocket", prompt="a")


class Codes:
    """What a request is checked against, without a model."""

    kind, num_actions, max_batch_size, special_tokens = CODES, 128, 32, []
    default_law = (True, ActionLaw())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["model", "messages", "n", "stop", "seed", "temperature", "top_p", "stream", "stream_options", "logprobs"]
NAMES += ["latent_actions", "max_tokens", "tools", "logit_bias", "foo"]


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), VALUES, st.sampled_from(NAMES[:1] + ["forced"]))
def test_nothing_else_than_a_refusal_comes_of_any_body(changes, inner, name):
    from latent_trl.serving.chat_request import RequestLimits, generation_request, parse_request
    from latent_trl.serving.engine import RequestError

    for body in ({**BODY, **changes}, {**BODY, "latent_actions": {name: inner}}, {**BODY, "messages": inner}, inner):
        try:
            wanted = generation_request(parse_request(json.dumps(body).encode()), Codes, RequestLimits())
        except RequestError as error:
            assert error.status == 400 and str(error)
        else:
            assert wanted.n >= 1 and wanted.messages
