"""The protocol of rollout servers: what is taken, what is refused by name, and what a policy's version holds."""

import io
import pickle
import threading
import time

import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load, save
from stand_in_engine import Served, StandInEngine, make_model, served

from latent_trl.serving.rollout_app import rollout_request
from latent_trl.serving.server import make_rollout_server
from latent_trl.vllm.client import RolloutServer, ServerFault, WrongRequest
from latent_trl.vllm.rows import EngineAnswer, row_settings
from latent_trl.vllm.wire import PolicyFile, packed, rollout_body, unpacked

PROMPTS = [[20, 30, 40], [21, 31]]


@pytest.fixture(scope="module")
def shared(rollout_model):
    with served(make_model, rollout_model) as (server,):
        yield server


@pytest.fixture
def server(shared):
    """A server with the policy of `make_model()`."""
    client = RolloutServer(shared.url, 20.0)
    client.give(PolicyFile.of(make_model().policy))
    shared.engine.before_step = lambda: None
    return shared


@pytest.fixture
def client(server):
    return RolloutServer(server.url, 20.0)


def body(version, prompts=PROMPTS, n=2, seed=1, most=5, support=False, **settings):
    rows = [(i // n, own) for i, own in enumerate(row_settings(len(prompts), n, seed, **settings))]
    return rollout_body(version, prompts, rows, most, [2], support)


def wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_rows_are_answered_as_by_the_engine_itself(client, server):
    policy = PolicyFile.of(make_model().policy)
    assert client.describe()["policy"] == policy.version
    answers = client.answers(body(policy.version, support=True, action_top_k=3), 4)
    engine = StandInEngine(make_model())
    for i, settings in enumerate(row_settings(2, 2, 1, action_top_k=3)):
        engine.add(str(i), PROMPTS[i // 2], settings, 5, True, stop_token_ids=[2])
    expected = {}
    while len(expected) < 4:
        expected |= engine.step()
    for i, answer in enumerate(answers):
        own = expected[str(i)]
        assert (answer.prompt_ids, answer.token_ids, answer.action_ids) == (
            own.prompt_ids,
            own.token_ids,
            own.action_ids,
        )
        assert answer.log_probs == torch.tensor(own.log_probs).tolist()
        assert torch.equal(answer.support, own.support) and (answer.support.sum(dim=1) == 3).all()


def test_rows_of_several_requests_are_in_one_batch(client, server):
    version = PolicyFile.of(make_model().policy).version
    together, go = threading.Event(), threading.Event()
    server.engine.before_step = lambda: together.set() if len(server.engine.requests) == 8 else go.wait(10)
    found = []
    clients = [RolloutServer(server.url, 20.0) for _ in range(2)]
    threads = [threading.Thread(target=lambda c=c: found.append(c.answers(body(version), 4))) for c in clients]
    for thread in threads:
        thread.start()
    # The first step waits for the rows of the second request.
    wait_for(lambda: server.rollout_engine._tasks.qsize() or len(server.engine.requests) == 8)
    go.set()
    for thread in threads:
        thread.join(20)
    assert together.is_set() and found[0] == found[1]


def test_a_stale_policy_never_answers(client):
    other = PolicyFile.of(make_model(1).policy)
    first = PolicyFile.of(make_model().policy)
    with pytest.raises(ServerFault, match="The engine holds the policy .*; give it yours first"):
        client.answers(body(other.version), 4)
    before = client.answers(body(first.version), 4)
    client.give(other)
    assert client.describe()["policy"] == other.version
    after = client.answers(body(other.version), 4)
    assert [answer.log_probs for answer in after] != [answer.log_probs for answer in before]
    with pytest.raises(ServerFault, match="give it yours first"):
        client.answers(body(first.version), 4)
    # One version is one policy.
    client.give(first)
    assert client.answers(body(first.version), 4) == before


def test_an_update_ends_what_an_older_policy_is_answering(client, server):
    version = PolicyFile.of(make_model().policy).version
    begun, go = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go.wait(10)

    server.engine.before_step = wait
    outcome = []

    def ask():
        try:
            outcome.append(RolloutServer(server.url, 20.0).answers(body(version, most=50), 4))
        except ServerFault as fault:
            outcome.append(str(fault))

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(10)
    update = threading.Thread(target=lambda: client.give(PolicyFile.of(make_model(1).policy)))
    update.start()
    wait_for(lambda: not server.rollout_engine._tasks.empty())
    go.set()
    for each in (thread, update):
        each.join(20)
    assert outcome == ["The engine was given another policy; give it yours first."]
    assert not server.engine.requests


def bad_policies():
    tensors = load(PolicyFile.of(make_model().policy).data)
    name = "policy_head.weight"
    rest = {key: value for key, value in tensors.items() if key != name}
    whole = save(tensors)
    return {
        "missing": (save(rest), "'policy_head.weight' has no numbers, and that of the engine has shape"),
        "too many": (save({**tensors, "x": torch.zeros(2)}), r"'x' has shape \(2,\), and that of the engine has no"),
        "shape": (save({**rest, name: tensors[name][:-1].clone()}), "'policy_head.weight' has shape"),
        "integers": (save({**rest, name: tensors[name].long()}), "'policy_head.weight' has no numbers"),
        "cut off": (whole[:-1], "is no safetensors file"),
        "empty": (b"", "is no safetensors file"),
        "pickle": (pickle.dumps({"x": 1}), "is no safetensors file"),
        "torch.save": (_torch_saved(tensors), "is no safetensors file"),
    }


def _torch_saved(tensors):
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind", ["missing", "too many", "shape", "integers", "cut off", "empty", "pickle", "torch.save"]
)
def test_bad_bytes_are_refused_and_the_policy_stays(client, kind):
    from latent_trl.vllm.wire import version_of

    data, message = bad_policies()[kind]
    with pytest.raises(WrongRequest, match=message):
        client.give(PolicyFile(data, version_of(data), 0))
    version = PolicyFile.of(make_model().policy).version
    assert client.describe()["policy"] == version and len(client.answers(body(version), 4)) == 4


def test_bytes_that_changed_on_the_way_are_refused(client):
    policy = PolicyFile.of(make_model(1).policy)
    with pytest.raises(WrongRequest, match="not those that were sent"):
        client.give(PolicyFile(policy.data[:-1] + bytes([policy.data[-1] ^ 1]), policy.version, policy.size))


def test_a_policy_that_cannot_be_taken_leaves_none(client, server, monkeypatch):
    def fails(tensors):
        raise RuntimeError("no memory")

    monkeypatch.setattr(server.engine, "load_policy", fails)
    with pytest.raises(ServerFault, match="could not be taken: RuntimeError"):
        client.give(PolicyFile.of(make_model(1).policy))
    assert client.describe()["policy"] is None
    with pytest.raises(ServerFault, match="holds the policy None"):
        client.answers(body(PolicyFile.of(make_model().policy).version), 4)


def test_a_body_that_is_too_long_is_refused(server):
    headers = {"latent-trl-policy": "x", "Content-Type": "application/octet-stream"}
    reply = requests.put(f"{server.url}/policy", data=b"0" * (server.rollout_engine.most_bytes + 1), headers=headers)
    assert reply.status_code == 413


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 1}, "`temperature`: Extra inputs are not permitted"),
        ({"rows": [{"prompt": 2, "settings": {}}]}, "`rows` name prompt 2, and there are 2"),
        ({"rows": []}, "`rows`: List should have at least 1 item"),
        ({"rows": [{"prompt": 0}]}, "`rows.0.settings`: Field required"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"prompts": [{"token_ids": []}]}, "`prompts.0.token_ids`"),
        ({"prompts": [{"token_ids": [20], "images": ["/etc/passwd"]}] * 2}, "`images` must be data URLs"),
        (
            {"prompts": [{"token_ids": [20], "images": ["data:image/png;base64,AAAA"]}] * 2},
            "cannot be read as an image",
        ),
        ({"rows": [{"prompt": 0, "settings": {"action_top_p": 2}}]}, "`action_top_p` is too large"),
    ],
)
def test_what_a_request_may_not_have_is_named(client, server, change, message):
    import json

    own = json.loads(body(PolicyFile.of(make_model().policy).version))
    with pytest.raises(WrongRequest, match=message):
        client.answers(json.dumps({**own, **change}).encode(), 4)
    assert not server.engine.requests


def test_what_a_web_page_may_send_is_refused(server):
    for method, path in (("PUT", "policy"), ("POST", "generate")):
        reply = requests.request(method, f"{server.url}/{path}", data="x", headers={"Content-Type": "text/plain"})
        assert reply.status_code == 415
    reply = requests.get(f"{server.url}/description", headers={"Host": "evil.example"})
    assert reply.status_code == 400


def test_probabilities_that_are_not_finite_are_told(client):
    model = make_model()
    with torch.no_grad():
        model.policy.head.weight.fill_(torch.nan)
    policy = PolicyFile.of(model.policy)
    client.give(policy)
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        client.answers(body(policy.version), 4)


def test_a_client_that_hangs_up_ends_its_rows(client, server):
    version = PolicyFile.of(make_model().policy).version
    server.engine.before_step = lambda: time.sleep(0.05)
    with pytest.raises(ServerFault, match="no answer in 0.3 s"):
        RolloutServer(server.url, 0.3).answers(body(version, most=200), 4)
    wait_for(lambda: not server.engine.requests, 5)


def test_an_engine_that_failed_answers_nothing(rollout_model):
    with served(make_model, rollout_model) as (server,):
        client = RolloutServer(server.url, 20.0)
        version = client.describe()["policy"]
        assert requests.get(f"{server.url}/health").json() == {"status": "ok"}

        def fails():
            raise RuntimeError("out of memory")

        server.engine.before_step = fails
        for _ in range(2):
            with pytest.raises(ServerFault, match="The engine failed: RuntimeError. Start the server again"):
                client.answers(body(version), 4)
        with pytest.raises(ServerFault, match="The engine failed"):
            client.describe()
        assert requests.get(f"{server.url}/health").status_code == 503


def test_a_key_is_asked_for(rollout_model):
    with served(make_model, rollout_model, key="right") as (server,):
        assert RolloutServer(server.url, 20.0, "right").describe()["policy"]
        for wrong in (None, "wrong"):
            with pytest.raises(WrongRequest, match=r"refuses this \(401\): The API key is missing or wrong"):
                RolloutServer(server.url, 20.0, wrong).describe()
        assert requests.get(f"{server.url}/health").json() == {"status": "ok"}
    with pytest.raises(ValueError, match="At '0.0.0.0' other machines are served, so there must be an API key"):
        Served(make_model, rollout_model, host="0.0.0.0").start()


def test_something_else_at_the_address_is_no_server():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args):
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=other.serve_forever, daemon=True)
    thread.start()
    with pytest.raises(ServerFault, match="no rollout server"):
        RolloutServer(f"http://127.0.0.1:{other.server_port}", 5.0).describe()
    other.shutdown()
    other.server_close()


def test_pictures_arrive_as_they_were():
    pixels = torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    prompt = {"prompt_token_ids": [5, 6], "multi_modal_data": {"image": [image]}}
    request = rollout_request(body("v", [prompt, [1]]))
    seen, plain = request.prompts
    assert seen["prompt_token_ids"] == [5, 6] and plain == [1]
    (arrived,) = seen["multi_modal_data"]["image"]
    assert arrived.mode == "RGB" and arrived.tobytes() == image.tobytes()
    assert request.rows == [(i // 2, own) for i, own in enumerate(row_settings(2, 2, 1))]


@pytest.mark.parametrize("support", [False, True])
def test_answers_arrive_as_they_were(support):
    def answer(prompt, length):
        mask = torch.rand(length, 6) < 0.5 if support else None
        return EngineAnswer(list(range(prompt)), list(range(length)), [3] * length, [-0.25] * length, mask)

    answers = [answer(2, 3), answer(4, 1), answer(2, 5)]
    found = unpacked(packed(answers), 3)
    for one, own in zip(found, answers, strict=True):
        assert vars(one) | {"support": None} == vars(own) | {"support": None}
        assert one.support is own.support is None or torch.equal(one.support, own.support)
    for data, rows in ((packed(answers), 2), (packed(answers)[:-1], 3), (b"", 3), (save({"x": torch.zeros(1)}), 3)):
        with pytest.raises(ValueError, match="The answers cannot be read"):
            unpacked(data, rows)


def test_the_servers_address_needs_no_engine_to_be_refused():
    with pytest.raises(ValueError, match="LATENT_TRL_API_KEY"):
        make_rollout_server(None, {}, "192.168.0.5")


# The command and its page


def test_the_command_says_what_is_missing_before_it_loads_anything(rollout_model, monkeypatch, capsys):
    from latent_trl.commands import vllm_serve
    from latent_trl.commands.main import main

    monkeypatch.delenv("LATENT_TRL_API_KEY", raising=False)
    for missing, said in (("uvicorn", "A server needs uvicorn: pip install uvicorn"), ("vllm", "needs vLLM: see docs")):
        monkeypatch.setattr(vllm_serve, "find_spec", lambda name, missing=missing: None if name == missing else name)
        assert main(["vllm-serve", rollout_model]) == 1 and said in capsys.readouterr().err
    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: name)
    assert main(["vllm-serve", rollout_model, "--host", "0.0.0.0"]) == 1
    assert "there must be an API key: set LATENT_TRL_API_KEY" in capsys.readouterr().err
    assert main(["vllm-serve", "nowhere/at/all"]) == 1 and "nowhere/at/all" in capsys.readouterr().err


def test_the_page_names_options_routes_and_fields_that_there_are(rollout_model, server, capsys):
    import re
    from dataclasses import fields
    from pathlib import Path

    from latent_trl import LatentActionGRPOConfig
    from latent_trl.commands.main import main

    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
    section = page.split("## Rollout servers")[1].split("\n## ")[0]
    with pytest.raises(SystemExit):
        main(["vllm-serve", "--help"])
    shown = capsys.readouterr().out
    options = set(re.findall(r"(--[a-z][a-z-]+)", section))
    assert len(options) > 5 and [option for option in options if option not in shown] == []
    routes = re.findall(r"\| `([A-Z]+) (/\w+)`", section)
    assert len(routes) == 4
    for method, path in routes:
        assert requests.request(method, server.url + path).status_code not in (404, 405)
    named = set(re.findall(r"`(vllm_\w+)", section))
    assert named == {f.name for f in fields(LatentActionGRPOConfig) if f.name.startswith("vllm_server")}
