"""Rollout servers of the real engine, each in a process of its own: they answer as one engine does."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import Dataset
from exact import LENGTH, prompts, tiny
from test_grpo_rollouts import letters, rows
from test_rollouts import ENGINE, build

sys.path[:0] = [str(Path(__file__).parents[1] / "distributed")]

from served_launch import ServerProcess, kill_and_bring_back, worst_difference  # noqa: E402

from latent_trl import LatentActionModel  # noqa: E402
from latent_trl.vllm.client import RolloutServer, WrongRequest  # noqa: E402
from latent_trl.vllm.servers import RolloutServers  # noqa: E402
from latent_trl.vllm.wire import PolicyFile, version_of  # noqa: E402

OPTIONS = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "enforce_eager": True}
# What a run with an engine in its own process has.
NO_SERVERS = {"vllm_mode": "colocate", "vllm_server_hosts": None, "vllm_server_timeout": 240.0}


def server_of(folder: str) -> ServerProcess:
    words = ["-m", "latent_trl", "vllm-serve", folder, "--dtype", "float32", "--max-model-len", "128"]
    return ServerProcess([*words, "--engine-options", json.dumps(OPTIONS)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, whose backbone lies beside it."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny("llama")
    model.backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    model.config.base_model_name_or_path = str(folder / "backbone")
    model.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def two(folder):
    servers = [server_of(folder) for _ in range(2)]
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.kill()


def load(folder: str) -> LatentActionModel:
    return LatentActionModel.from_pretrained(folder, dtype=torch.float32)


def plain(answers):
    return [(a.prompt_ids, a.token_ids, a.action_ids) for a in answers]


def test_rollouts_of_two_servers_are_those_of_one_engine(two, folder, engine):
    model = load(folder)
    one = engine(model)
    servers = RolloutServers(model, [server.url for server in two], 120.0)
    # They were started from the same checkpoint.
    assert servers.update(model)["bytes"] == 0
    laws = [{"action_sampling": "arithmetic"}, {"action_top_k": 5, "action_temperature": 1.3, "output_support": True}]
    shared = {"n": 3, "seed": 7, "max_new_tokens": LENGTH, "stop_token_ids": [tiny_models.EOS]}
    for changed in (False, True):
        if changed:
            with torch.no_grad():
                for parameter in model.policy.parameters():
                    parameter.mul_(1.1)
            size = one.update(model)["bytes"]
            assert (
                servers.update(model)["bytes"] == 2 * size == 2 * sum(p.numel() * 4 for p in model.policy.parameters())
            )
        for law in laws:
            alone = one.generate(prompts(15), **shared, **law)
            divided = servers.generate(prompts(15), **shared, **law)
            assert plain(divided) == plain(alone)
            worst = max(abs(a - b) for x, y in zip(divided, alone) for a, b in zip(x.log_probs, y.log_probs))
            assert worst < 1e-5
            if "output_support" in law:
                assert all(torch.equal(x.support, y.support) for x, y in zip(divided, alone))


def test_what_a_server_of_the_engine_refuses(two, folder):
    client = RolloutServer(two[0].url, 60.0)
    own = PolicyFile.of(load(folder).policy)
    client.give(own)
    for data, message in ((own.data[:-1], "is no safetensors file"), (b"", "is no safetensors file")):
        with pytest.raises(WrongRequest, match=message):
            client.give(PolicyFile(data, version_of(data), 0))
    servers = RolloutServers(load(folder), [two[0].url], 60.0)
    servers.update(load(folder))
    with pytest.raises(WrongRequest, match="128"):
        servers.generate([list(range(20, 149))], max_new_tokens=4)
    with pytest.raises(WrongRequest, match="`action_temperature` must be"):
        servers.generate([[20, 21]], action_temperature="warm")
    assert len(servers.generate([[20, 21]], max_new_tokens=4)) == 1


def served_run(path, model, servers, **options):
    own = {"use_vllm": True, "vllm_mode": "server", "vllm_server_hosts": [server.url for server in servers]}
    own |= {"vllm_server_timeout": 120.0, "steps_per_generation": 2, "num_iterations": 1, "max_steps": 8}
    own |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return build(path, model=model, data=Dataset.from_list(rows(())), reward=letters, **own | options)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}


def test_a_run_whose_server_is_killed_and_comes_back_is_that_of_one_engine(two, folder, tmp_path, monkeypatch):
    from latent_trl.vllm import servers as module

    colocated = served_run(tmp_path / "one", load(folder), two, **(NO_SERVERS | ENGINE))
    colocated.train()
    colocated.engine_source.engine.close()

    found = []
    monkeypatch.setattr(module.logger, "warning", found.append)
    run = served_run(tmp_path / "two", load(folder), two)
    step = run.training_step

    def watched(*args, **kwargs):
        if run.state.global_step == 2:
            two[1].kill()
            two[1].begin()
        if run.state.global_step == 6:
            two[1].wait()
        return step(*args, **kwargs)

    run.training_step = watched
    run.train()
    assert len(found) == 2 and f"{two[1].url} failed" in found[0] and "is back, and has the policy" in found[1]
    assert RolloutServer(two[1].url, 60.0).describe()["policy"] == run.engine_source.engine.version
    rows_of = [[row for row in t.state.log_history if "reward" in row] for t in (colocated, run)]
    for name in ("reward", "completions/mean_length", "entropy"):
        assert [row[name] for row in rows_of[0]] == pytest.approx([row[name] for row in rows_of[1]], abs=1e-5)
    for name, value in weights(colocated).items():
        torch.testing.assert_close(weights(run)[name], value, atol=1e-5, rtol=0)
    counts = [row["engine/sync_servers"] for row in rows_of[1]]
    assert len(counts) == 4 and counts[:2] == [2.0, 1.0] and counts[-1] == 2.0


def test_a_server_that_is_stopped_in_its_tracks_is_left_out(two, folder, monkeypatch):
    from latent_trl.vllm import servers as module

    found = []
    monkeypatch.setattr(module.logger, "warning", found.append)
    servers = RolloutServers(load(folder), [server.url for server in two], 60.0)
    servers.update(load(folder))
    law = {"n": 2, "seed": 1, "max_new_tokens": 8}
    expected = plain(servers.generate(prompts(6), **law))
    for server in servers.servers.values():
        server.timeout = 5.0
    two[0].process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        assert plain(servers.generate(prompts(6), **law)) == expected
        assert f"{two[0].url} failed: no answer in 5 s" in found[0] and time.monotonic() - begin < 60
    finally:
        two[0].process.send_signal(signal.SIGCONT)
    assert plain(servers.generate(prompts(6), **law)) == expected
    assert found[1:] == [f"The rollout server {two[0].url} is back, and has the policy."] and not servers.lost


@pytest.mark.slow
@pytest.mark.distributed
def test_two_trainer_processes_and_two_servers_of_which_one_is_killed(two, folder, tmp_path):
    runs = kill_and_bring_back(folder, tmp_path, two, 1200)
    for ranks in runs.values():
        assert worst_difference(*ranks) == 0
    whole, killed = runs["whole"][0], runs["killed"][0]
    assert worst_difference(whole, killed) < 1e-5
    assert whole["servers"] == [2.0] * 4 and killed["servers"][0] == killed["servers"][-1] == 2.0
