"""Two processes of a trainer of plans, each of which asks servers for its own rows. No vLLM is needed."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate import debug_launcher
from served_launch import TESTS, ServerProcess

sys.path[:0] = [str(TESTS / "plans")]

import test_plan_policy as policy  # noqa: E402
import test_plan_trainers as plans  # noqa: E402

from latent_trl import PlanConfig, PlanModel  # noqa: E402

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("uvicorn") is None or find_spec("starlette") is None, reason="needs a server"),
]
# 5 prompts are not shared out evenly, and of a batch of one prompt the second process has no row.
KINDS = {"bandit": {"rollout_prompts": 5}, "ppo": {"rollout_prompts": 1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Saved plans for segments of any length, whose backbone lies beside them."""
    folder = tmp_path_factory.mktemp("plans")
    backbone = tiny_models.llama(num_hidden_layers=2).model
    backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    backbone = type(backbone).from_pretrained(folder / "backbone", dtype="float32")
    config = PlanConfig(num_plans=4, depth=1, rank=2, init_std=1.0, segment="sentence")
    config.segment_end_token_ids = list(range(140, 200))
    made = PlanModel(backbone, config)
    made.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def servers(model):
    started = [ServerProcess([str(TESTS / "serving" / "stand_in_plans.py"), model]) for _ in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


def train(model: str, urls: list[str], pids: list[int], folder: str) -> None:
    """Runs of each kind: without an engine, over servers, and over servers of which one is killed on the way."""
    torch.set_num_threads(1)
    found: dict = {}
    for kind, options in KINDS.items():
        for over in ("none", "servers", "killed") if kind == "bandit" else ("none", "servers"):
            own = {**options, "max_completion_length": 6, "num_iterations": 2, "max_steps": 6}
            if over != "none":
                own |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_hosts": urls}
            trainer = policy.trainer(kind, Path(folder) / kind / over, PlanModel.from_pretrained(model), **own)
            rank = trainer.accelerator.process_index
            if over == "killed":
                _kill_behind_the_second_answer(trainer, pids[1] if rank == 0 else None)
            trainer.train()
            segments = sum(len(row) > 0 for row in trainer.replay.said)
            weights = {name: value.clone() for name, value in trainer.model.chooser.state_dict().items()}
            found[kind, over] = (plans.losses(trainer), trainer.replay.plans, segments, weights)
        if kind == "bandit":
            # The servers that are left answer the other kind.
            urls = urls[:1]
    torch.save(found, Path(folder) / f"ended_{rank}.pt")


def _kill_behind_the_second_answer(trainer, pid: int | None) -> None:
    source = trainer.engine_source.engine.source
    generate, calls = source.generate, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 2 and pid is not None:
            os.kill(pid, signal.SIGKILL)
        return generate(*args)

    source.generate = counted


def test_two_processes_have_their_rows_answered_as_without_an_engine(model, servers, tmp_path):
    urls, pids = [server.url for server in servers], [server.process.pid for server in servers]
    debug_launcher(train, (model, urls, pids, str(tmp_path)), num_processes=2)
    assert [server.process.poll() for server in servers] == [None, -signal.SIGKILL]
    ranks = [torch.load(tmp_path / f"ended_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for ended in ranks:
        for (kind, over), (losses, drawn, segments, weights) in ended.items():
            own = ended[kind, "none"]
            assert (losses, drawn, segments) == own[:3] and losses and segments, (kind, over)
            assert all(torch.equal(value, own[3][name]) for name, value in weights.items()), (kind, over)
    for name, value in ranks[0]["bandit", "none"][3].items():
        assert torch.equal(value, ranks[1]["bandit", "none"][3][name])
