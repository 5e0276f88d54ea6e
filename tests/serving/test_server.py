"""The server's own duties: key, names, limits, time-outs, hang-ups, counters, and the command that starts it."""

import concurrent.futures
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import httpx
import openai
import pytest
from conversations import asked, picture
from loopback import CARDS

from latent_trl.api_key import read_key
from latent_trl.serving.server import is_local, make_server

BODY = {"model": "pocket", "messages": asked("what color is it?"), "temperature": 0, "max_completion_tokens": 400}
# A token that the model does not say: answers go on to their longest.
NEVER = [1999]


def endless(engine):
    engine.ends = NEVER


def count(url, name, **headers):
    text = httpx.get(f"{url.removesuffix('/v1')}/metrics", headers=headers).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_key_is_asked_for(serve):
    with serve(key="right key") as url:
        for header in (None, "Bearer wrong", "Bearer right", "Basic right key", "Bearer right kéy", "Bearer"):
            headers = {} if header is None else {"authorization": header.encode()}
            for path in ("/v1/models", "/metrics", "/nowhere"):
                reply = httpx.get(url.removesuffix("/v1") + path, headers=headers)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(url.removesuffix("/v1") + "/health").json() == {"status": "ok"}
        client = openai.OpenAI(base_url=url, api_key="right key", max_retries=0)
        assert client.chat.completions.create(**{**BODY, "max_completion_tokens": 2}).usage.completion_tokens == 2
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENT_TRL_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("LATENT_TRL_API_KEY", "one")
    (tmp_path / "key").write_text("two\n")
    assert read_key(None) == "one" and read_key(str(tmp_path / "key")) == "two"
    for wrong in ("", "\n", "kéy", "a\nb"):
        (tmp_path / "key").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="The API key of .*key is empty"):
            read_key(str(tmp_path / "key"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.5", "example.org"])
def test_other_machines_are_not_served_without_a_key(host):
    with pytest.raises(ValueError, match=f"At '{host}' other machines are served.*LATENT_TRL_API_KEY"):
        make_server(None, "pocket", host)
    assert not is_local(host)


def test_what_is_local():
    assert all(map(is_local, ("127.0.0.1", "127.5.5.5", "::1", "localhost")))


def test_too_many_requests_get_429(serve):
    body = {**BODY, "max_completion_tokens": 100}
    with serve(endless, max_requests=2) as url, concurrent.futures.ThreadPoolExecutor(5) as pool:
        replies = [pool.submit(httpx.post, f"{url}/chat/completions", json=body, timeout=60) for _ in range(5)]
        statuses = sorted(reply.result().status_code for reply in replies)
        assert statuses[0] == 200 and statuses[-1] == 429 and set(statuses) == {200, 429}
        refused = next(r.result() for r in replies if r.result().status_code == 429)
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "rate_limit_exceeded"
        # A place that was left is free again.
        assert httpx.post(f"{url}/chat/completions", json=body, timeout=60).status_code == 200


def test_pictures_that_wait_take_bounded_memory(serve):
    from latent_trl.serving.chat_request import RequestLimits

    limits = RequestLimits(max_waiting_pixels=2 * 64 * 64 + 1)
    seen = {**BODY, "messages": asked("what?", picture())}
    with serve(endless, limits=limits) as url, concurrent.futures.ThreadPoolExecutor(5) as pool:
        post = partial(httpx.post, f"{url}/chat/completions", timeout=60)
        replies = [pool.submit(post, json=seen) for _ in range(4)]
        assert post(json={**BODY, "max_completion_tokens": 2}).status_code == 200
        statuses = sorted(reply.result().status_code for reply in replies)
        assert statuses[:2] == [200, 200] and statuses[-1] == 429
        # One that stands alone is answered.
        large = {**BODY, "max_completion_tokens": 2, "messages": asked("what?", picture(size=200))}
        assert post(json=large).status_code == 200


def test_a_body_that_does_not_come_is_given_up(serve, monkeypatch):
    from latent_trl.serving import app

    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with serve() as url, socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as sent:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sent.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        assert sent.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_an_answer_that_takes_too_long_is_given_up(serve):
    with serve(endless, timeout=0.3) as url:
        reply = httpx.post(f"{url}/chat/completions", json=BODY, timeout=60)
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="longer than 0.3 s"):
            list(client.chat.completions.create(**BODY, stream=True))
        wait_for(lambda: count(url, "latent_trl_running") == 0)
        assert count(url, 'latent_trl_requests_total{status="504"}') == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_the_work(serve, stream):
    with serve(endless, {"max_completion_length": 480}) as url:
        with pytest.raises(httpx.ReadTimeout):
            with httpx.stream("POST", f"{url}/chat/completions", json={**BODY, "stream": stream}, timeout=0.25) as r:
                wait_for(lambda: count(url, "latent_trl_running") == 1)
                if stream:
                    next(r.iter_bytes())
                    raise httpx.ReadTimeout("gone")
                r.read()
        wait_for(lambda: count(url, 'latent_trl_requests_total{status="499"}') == 1)
        wait_for(lambda: count(url, "latent_trl_running") == count(url, "latent_trl_waiting") == 0)
        assert count(url, 'latent_trl_requests_total{status="200"}') == 0


def test_a_client_that_leaves_amid_its_body_leaves_nothing(serve):
    with serve(max_requests=1) as url:
        address = (httpx.URL(url).host, httpx.URL(url).port)
        for times in (1, 2, 3):
            with socket.create_connection(address) as sent:
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                sent.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            wait_for(lambda number=times: count(url, 'latent_trl_requests_total{status="499"}') == number)
        reply = httpx.post(f"{url}/chat/completions", json={**BODY, "max_completion_tokens": 2})
        assert reply.status_code == 200


def test_what_is_counted(serve):
    with serve() as url:
        body = {**BODY, "max_completion_tokens": 3}
        usage = httpx.post(f"{url}/chat/completions", json=body).json()["usage"]
        httpx.post(f"{url}/chat/completions", json={**body, "foo": 1})
        assert count(url, 'latent_trl_requests_total{status="200"}') == 1
        assert count(url, 'latent_trl_requests_total{status="400"}') == 1
        assert count(url, "latent_trl_prompt_tokens_total") == usage["prompt_tokens"]
        assert count(url, "latent_trl_completion_tokens_total") == usage["completion_tokens"] == 3
        assert count(url, "latent_trl_first_piece_seconds_count") == 1
        assert count(url, "latent_trl_request_seconds_count") == 2


def test_a_dead_engine_is_not_healthy(serve):
    engines = []
    with serve(engines.append) as url:
        health = f"{url.removesuffix('/v1')}/health"
        assert httpx.get(health).status_code == 200
        engines[0].problem = lambda: "it is gone"
        reply = httpx.get(health)
        assert reply.status_code == 503 and reply.json() == {"status": "it is gone"}


def test_the_command_serves_until_it_is_stopped(tmp_path):
    words = [sys.executable, "-m", "latent_trl", "serve", str(CARDS / "pocket-vlm-latent-actions-grpo")]
    words += ["--backbone", str(CARDS / "pocket-vlm"), "--engine", "transformers", "--port", "0"]
    (tmp_path / "key").write_text("secret")
    process = subprocess.Popen([*words, "--api-key-file", str(tmp_path / "key")], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        name, url = re.fullmatch(r"(\S+) is served at (http://127\.0\.0\.1:\d+/v1)\n", line).groups()
        assert name == "pocket-vlm-latent-actions-grpo"
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert client.chat.completions.create(**{**BODY, "model": name}).choices[0].message.content
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    from latent_trl.commands import serve
    from latent_trl.commands.main import main

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", str(CARDS / "pocket-vlm-latent-actions-grpo")]) == 1
    assert (
        "starlette, uvicorn, pydantic, prometheus_client: pip install starlette uvicorn pydantic prometheus_client"
        in capsys.readouterr().err
    )
