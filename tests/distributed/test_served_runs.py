"""Two trainer processes and two rollout servers, one killed and brought back. No vLLM is needed: a model's own passes
stand in its place."""

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
from accelerate import PartialState, debug_launcher
from engines import has_deepspeed, launch
from served_launch import TESTS, ServerProcess, kill_and_bring_back, worst_difference

from latent_trl import LatentActionModel
from latent_trl.vllm.servers import RolloutServers

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("uvicorn") is None or find_spec("starlette") is None, reason="needs a server"),
]
needs_deepspeed = pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model, whose backbone lies beside it."""
    folder = tmp_path_factory.mktemp("served")
    backbone = tiny_models.llama().model
    backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    backbone = type(backbone).from_pretrained(folder / "backbone", dtype="float32")
    model = LatentActionModel.from_backbone(backbone, tiny_models.latent_config(use_projector=False))
    tiny_models.perturb(model)
    model.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def servers(model):
    started = [ServerProcess([str(TESTS / "serving" / "stand_in_engine.py"), model]) for _ in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


def test_two_trainers_and_two_servers_of_which_one_is_killed(model, servers, tmp_path):
    runs = kill_and_bring_back(model, tmp_path, servers, 300)
    whole, killed = runs["whole"][0], runs["killed"][0]
    assert worst_difference(whole, killed) == 0
    for ranks in runs.values():
        assert worst_difference(*ranks) == 0
    assert whole["servers"] == [2.0] * 4
    assert killed["servers"][0] == killed["servers"][-1] == 2.0
    start = LatentActionModel.from_pretrained(model)
    moved = {name: p.detach() for name, p in start.named_parameters()}
    assert worst_difference({"weights": moved}, whole) > 1e-3


def ask(model: str, urls: list[str], server_pids: list[int], folder: str) -> None:
    """A process that asks servers for rows: of one that is refused on the second process, and of servers that end."""
    torch.set_num_threads(1)
    # A fork has what an earlier test left: one process, in the place of two.
    PartialState._reset_state()
    rank, loaded = PartialState(cpu=True).process_index, LatentActionModel.from_pretrained(model, dtype=torch.float32)
    servers = RolloutServers(loaded, urls, 20.0)
    servers.update(loaded)
    servers.timeout = 1.0
    told = []
    for top_p, killed in ((1.0, False), (2.0 if rank == 1 else 1.0, False), (1.0, True)):
        if killed and rank == 0:
            for pid in server_pids:
                os.kill(pid, signal.SIGKILL)
        try:
            answers = servers.generate([[20 + rank, 30]], n=2, max_new_tokens=3, seed=1, action_top_p=top_p)
            told.append(f"{len(answers)} answers")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    (Path(folder) / f"told_{rank}.txt").write_text("\n".join(told))


def test_an_error_of_one_process_ends_the_batch_of_all(model, servers, tmp_path):
    begin = time.monotonic()
    urls, pids = [server.url for server in servers], [server.process.pid for server in servers]
    debug_launcher(ask, (model, urls, pids, str(tmp_path)), num_processes=2)
    first, second = ((tmp_path / f"told_{rank}.txt").read_text().split("\n") for rank in (0, 1))
    assert first[0] == second[0] == "2 answers"
    assert second[1].startswith("WrongRequest: http://127.0.0.1:") and "`action_top_p` is too large" in second[1]
    assert first[1] == f"RolloutServersError: On process 1: {second[1]}"
    assert first[2].startswith("RolloutServersError: No rollout server is left. None came back in 1 s: ")
    assert all(url in first[2] for url in urls)
    assert second[2] == f"RolloutServersError: On process 0: {first[2]}"
    assert time.monotonic() - begin < 120


def train_sharded(model: str, urls: list[str], folder: str, states: bool) -> None:
    """A run of a few rollout batches; the processes write what they logged, and the policy that servers were given."""
    from every_trainer import letters
    from rl_models import prompts

    from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer

    args = LatentActionGRPOConfig(
        folder,
        use_cpu=False,
        bf16=False,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_hosts=urls,
        reuse_context_states=states,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=5,
        learning_rate=1e-2,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    loaded = LatentActionModel.from_pretrained(model, dtype=torch.float32)
    data, tokenizer = prompts(20), tiny_models.make_tokenizer()
    trainer = LatentActionGRPOTrainer(loaded, letters, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    logged = [row for row in trainer.state.log_history if "sampling/log_prob_difference_max" in row]
    record = {
        "difference": [row["sampling/log_prob_difference_max"] for row in logged],
        "sent": [row["engine/sync_bytes"] for row in logged],
    }
    torch.save(record, Path(folder) / f"record_{trainer.accelerator.process_index}.pt")


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_sharded_policy_reaches_the_servers_whole(model, servers, tmp_path, engine):
    launch(engine, train_sharded, model, [server.url for server in servers], str(tmp_path), False)
    policy = LatentActionModel.from_pretrained(model).policy
    size = 4 * sum(p.numel() for p in policy.parameters())
    for rank in (0, 1):
        record = torch.load(tmp_path / f"record_{rank}.pt", weights_only=True)
        # The trainer scores what servers drew as they did, after updates too.
        assert len(record["difference"]) == 4 and max(record["difference"]) < 1e-3
        assert record["sent"] == [0.0, *[2.0 * size] * 3]


def test_states_of_a_sharded_backbone_are_refused(model, servers, tmp_path):
    with pytest.raises(Exception, match="`reuse_context_states=True` runs the backbone by itself"):
        launch("fsdp2", train_sharded, model, [server.url for server in servers], str(tmp_path), True)
