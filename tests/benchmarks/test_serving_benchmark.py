"""Many clients at once, with broken requests and clients that hang up: every answer is the model's own."""

import asyncio
import re
import threading
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "openai", "easy_vqa"):
    pytest.importorskip(package)
httpx, serving = pytest.importorskip("httpx"), pytest.importorskip("serving")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("clients, seconds", [(12, 6), pytest.param(64, 180, marks=pytest.mark.slow)])
def test_no_answer_is_lost_or_mixed_up(clients, seconds, monkeypatch):
    from latent_trl.commands.loading import load_model, load_processor
    from latent_trl.serving.server import make_server
    from latent_trl.serving.transformers_engine import TransformersEngine

    monkeypatch.chdir(ROOT)
    model = load_model(serving.MODEL).to("cpu").eval()
    processor = load_processor(model)
    cases = serving.make_cases(model, processor, 30, "model")
    assert len({tuple(map(tuple, case.action_ids)) for case in cases}) > 18
    ready, addresses = threading.Event(), []
    engine = TransformersEngine(model, processor)
    server = make_server(engine, "model", port=0, ready=lambda url: (addresses.append(url), ready.set()))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        load = asyncio.run(serving.Clients(addresses[0], cases).run(clients, seconds))
        metrics = httpx.get(addresses[0].replace("/v1", "/metrics")).text
    finally:
        server.should_exit = True
        thread.join(20)
    assert load.wrong == []
    assert load.answers > 20 and load.hung_up > 2 and set(load.refused) <= {400, 404} and load.refused[400] > 2
    counted = dict(re.findall(r'requests_total\{status="(\d+)"\} (\S+)', metrics))
    assert float(counted["200"]) >= load.answers and "500" not in counted and "429" not in counted
    assert "\nlatent_trl_waiting 0.0" in metrics and "\nlatent_trl_running 0.0" in metrics


def test_the_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = tmp_path / "serving.json"
    result = serving.main(["--clients", "6", "--seconds", "3", "--cases", "12", "--json", str(path)])
    figures = result["figures"]
    assert figures["answers that differ, or failed"] == 0 and figures["answers"] > 3
    assert 0 < figures["latency, 50 % (s)"] <= figures["latency, 99 % (s)"] and path.exists()
