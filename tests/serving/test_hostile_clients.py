"""Clients that mean harm: small bodies of millions of values, answers that are not read, headers without an end."""

import json
import resource
import socket
import time

import httpx
import pytest
from loopback import serving

from latent_trl.generation.action_law import ActionLaw
from latent_trl.serving import app
from latent_trl.serving.chat_request import MAX_VALUES, parse_request
from latent_trl.serving.engine import CODES, Piece, RequestError

MESSAGE = {"role": "user", "content": "hi"}
BODY = {"model": "pocket", "messages": [MESSAGE]}


class Engine:
    """Answers `answer` pieces at once."""

    kind, num_actions, special_tokens, default_law, max_batch_size = CODES, 128, [], (True, ActionLaw()), 32

    def __init__(self, pieces=1, length=1):
        self.pieces, self.length = pieces, length

    async def generate(self, request):
        for i in range(self.pieces):
            ended = "stop" if i == self.pieces - 1 else None
            yield Piece(0, "x" * self.length, [1], [0.0], [0], ["x"], finish_reason=ended, prompt_tokens=3)

    async def start(self): ...

    async def close(self): ...

    def problem(self): ...

    def about(self):
        return {}

    def load(self):
        return {}


def repeated(part, count, before='{"model":"pocket","messages":[', after="]}"):
    return f"{before}{','.join([part] * count)}{after}".encode()


FORCED = '{"model":"pocket","messages":[{"role":"user","content":"a"}],"latent_actions":{"forced":['
BODIES = {
    "empty lists": lambda: repeated("[]", 3_000_000),
    "empty objects": lambda: repeated("{}", 3_000_000),
    "numbers": lambda: repeated("1.5", 3_000_000),
    "texts": lambda: repeated('""', 3_000_000),
    "messages": lambda: repeated(json.dumps(MESSAGE), 300_000),
    "fields": lambda: repeated('"k":1', 2_000_000, "{", "}"),
    "codes": lambda: repeated("0", 5_000_000, FORCED, "]}}"),
    "one in another": lambda: b"[" * 5_000_000,
    "an object in another": lambda: b'{"a":' * 2_000_000,
    "ends that are none": lambda: b'{"a":"' + b'\\"' * 5_000_000 + b"\\",
    "somewhat too many": lambda: repeated("0", MAX_VALUES + 10, FORCED, "]}}"),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_body_of_millions_of_values_costs_next_to_nothing(body):
    content = BODIES[body]()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(RequestError, match="no JSON|more than 20,000 values"):
        parse_request(content)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_texts_may_hold_as_many_marks_as_they_like():
    text = '[{",\\' * 80_000
    assert parse_request(json.dumps({**BODY, "messages": [{"role": "user", "content": text}]}).encode())


def test_what_is_refused_is_not_repeated_at_length():
    with serving(Engine()) as url:
        for wrong in ({"model": "a" * 10**6}, {"stop": ["b" * 1_001]}, {"seed": "c" * 10**6}):
            reply = httpx.post(f"{url}/chat/completions", json={**BODY, **wrong}, timeout=60)
            assert reply.status_code in (400, 404) and len(reply.content) < 1_000
        assert len(httpx.get(f"{url}/models/{'d' * 20_000}").content) < 1_000


def test_an_answer_that_nobody_reads_leaves_its_place(monkeypatch):
    monkeypatch.setattr(app, "READ_SECONDS", 0.2)
    with serving(Engine(pieces=400, length=100_000), timeout=0.5, max_requests=1) as url:
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as client:
            content = json.dumps({**BODY, "stream": True}).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            time.sleep(0.2)
            short = {**BODY, "stop": "y"}
            assert httpx.post(f"{url}/chat/completions", json=short).status_code == 429
            end = time.monotonic() + 20
            while time.monotonic() < end and 'latent_trl_requests_total{status="499"} 1.0' not in metrics(url):
                time.sleep(0.05)
            assert 'latent_trl_requests_total{status="499"} 1.0' in metrics(url)


def metrics(url):
    return httpx.get(url.replace("/v1", "/metrics")).text


@pytest.mark.parametrize("part", [b"X: " + b"a" * 10**5, b"X: a\r\n" * 10**4])
def test_headers_without_an_end_are_refused(part):
    with serving(Engine()) as url:
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            answer = b""
            for _ in range(100):
                try:
                    client.sendall(part)
                except OSError:
                    break
            client.settimeout(10)
            try:
                answer = client.recv(100)
            except ConnectionError:
                pass
        assert answer.startswith((b"HTTP/1.1 400", b"")) and b"200 OK" not in answer
        assert httpx.get(url.replace("/v1", "/health")).status_code == 200
