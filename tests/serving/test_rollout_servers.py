"""Several rollout servers: the same rows from any number of them, and what becomes of one that is lost."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in_engine import make_model
from test_rollout_server import PROMPTS, wait_for

from latent_trl import LatentActionGRPOConfig, LatentActionModel, LatentActionPPOConfig, LatentActionRLOOConfig
from latent_trl.trainer.rollout.engine_options import server_urls
from latent_trl.vllm.client import WrongRequest
from latent_trl.vllm.identity import differences, identity_of_checkpoint, identity_of_model
from latent_trl.vllm.servers import RolloutServers, RolloutServersError, divided

pytestmark = pytest.mark.usefixtures("no_waiting")
LAW = {"n": 3, "seed": 5, "max_new_tokens": 6, "stop_token_ids": [2], "action_sampling": "arithmetic"}


def pool(started, timeout=20.0, model=None):
    servers = RolloutServers(model or make_model(), [server.url for server in started], timeout)
    servers.update(model or make_model())
    return servers


def plain(answers):
    return [(a.prompt_ids, a.token_ids, a.action_ids, a.log_probs) for a in answers]


@pytest.fixture(scope="module")
def expected(three):
    return plain(pool(three[:1]).generate(PROMPTS, **LAW))


@pytest.mark.parametrize("count", [2, 3])
def test_rows_do_not_depend_on_the_number_of_servers(running, expected, count):
    assert plain(pool(running[:count]).generate(PROMPTS, **LAW)) == expected
    assert [sum(server.engine.answered) for server in running[:count]] == [6 // count] * count
    assert len({tuple(row[2]) for row in expected}) > 2


def test_more_servers_than_rows(running):
    alone = {**LAW, "n": 1}
    one, three = (plain(pool(part).generate(PROMPTS, **alone)) for part in (running[:1], running))
    assert one == three and len(one) == 2


def test_a_policy_is_sent_to_those_that_do_not_hold_it(running):
    servers = pool(running)
    size = sum(4 * p.numel() for p in make_model().policy.parameters())
    assert servers.update(make_model())["bytes"] == 0
    cost = servers.update(make_model(1))
    assert cost["bytes"] == 3 * size and cost["servers"] == 3 and cost["seconds"] > 0
    changed = plain(servers.generate(PROMPTS, **LAW))
    assert servers.update(make_model())["bytes"] == 3 * size
    assert plain(servers.generate(PROMPTS, **LAW)) != changed


def test_a_server_that_dies_amid_a_batch_loses_nothing(running, expected, warnings):
    servers = pool(running)
    begun = threading.Event()

    def hang():
        begun.set()
        time.sleep(0.3)

    running[1].engine.before_step = hang
    killer = threading.Thread(target=lambda: begun.wait(10) and running[1].stop())
    killer.start()
    assert plain(servers.generate(PROMPTS, **LAW)) == expected
    killer.join(20)
    (warning,) = warnings
    assert f"The rollout server {running[1].url} failed: " in warning and "Its 2 completions are made else" in warning
    # Without it the others have all of the work, and it is tried before each batch.
    servers.update(make_model(1))
    assert len(warnings) == 1 and set(servers.lost) == {running[1].url}
    later = plain(servers.generate(PROMPTS, **LAW))
    running[1].start()
    assert running[1].rollout_engine.version != servers.version
    assert plain(servers.generate(PROMPTS, **LAW)) == later
    assert running[1].rollout_engine.version == servers.version and sum(running[1].engine.answered) == 2
    assert warnings[1:] == [f"The rollout server {running[1].url} is back, and has the policy."]


def test_a_server_that_stalls_is_named_and_left_out(running, expected, warnings):
    servers = pool(running, timeout=1.0)
    go = threading.Event()
    running[2].engine.before_step = lambda: go.wait(30)
    assert plain(servers.generate(PROMPTS, **LAW)) == expected
    assert f"{running[2].url} failed: no answer in 1 s" in warnings[0]
    # It does not say what it is either, and so has no work.
    assert plain(servers.generate(PROMPTS, **LAW)) == expected and len(warnings) == 1
    running[2].engine.before_step = lambda: None
    go.set()
    wait_for(lambda: not running[2].engine.requests)
    assert plain(servers.generate(PROMPTS, **LAW)) == expected and not servers.lost
    assert warnings[1] == f"The rollout server {running[2].url} is back, and has the policy."


def test_a_server_that_was_given_another_policy_does_not_answer(running, expected, warnings):
    servers = pool(running)
    from latent_trl.vllm.client import RolloutServer
    from latent_trl.vllm.wire import PolicyFile

    RolloutServer(running[0].url, 20.0).give(PolicyFile.of(make_model(1).policy))
    assert plain(servers.generate(PROMPTS, **LAW)) == expected
    assert "The engine holds the policy" in warnings[0] and "give it yours first" in warnings[0]
    assert running[0].engine.answered == []
    assert plain(servers.generate(PROMPTS, **LAW)) == expected and sum(running[0].engine.answered) == 2


def test_the_only_server_may_come_back(running, expected, warnings):
    servers = pool(running[:1])
    running[0].stop()
    later = threading.Timer(1.0, running[0].start)
    later.start()
    assert plain(servers.generate(PROMPTS, **LAW)) == expected
    later.join()
    assert [("failed" in warning, "is back" in warning) for warning in warnings] == [(True, False), (False, True)]


def test_without_any_server_the_error_names_all(running):
    servers = pool(running, timeout=1.0)
    for server in running:
        server.stop()
    message = "No rollout server is left. None came back in 1 s: .*resume_from_checkpoint=True"
    with pytest.raises(RolloutServersError, match=message) as raised:
        servers.generate(PROMPTS, **LAW)
    assert all(server.url in str(raised.value) for server in running)
    with pytest.raises(RolloutServersError, match=message):
        servers.update(make_model(1))


def test_servers_that_are_there_and_always_fail_end_the_run(running, monkeypatch):
    servers = pool(running[:2])

    def fails(*args, **options):
        raise RuntimeError("no room")

    for server in running[:2]:
        monkeypatch.setattr(server.engine, "add", fails)
    with pytest.raises(RolloutServersError, match="Each has failed 4 times: .*no room.*no room"):
        servers.generate(PROMPTS, **LAW)


def test_what_all_would_refuse_is_asked_once(running):
    servers = pool(running)
    with pytest.raises(WrongRequest, match="`action_top_p` is too large"):
        servers.generate(PROMPTS, **LAW, action_top_p=2.0)
    assert not servers.lost


def test_probabilities_that_are_not_finite_end_the_batch(running):
    model = make_model()
    with torch.no_grad():
        model.policy.head.weight.fill_(torch.nan)
    servers = pool(running, model=model)
    with pytest.raises(FloatingPointError, match="not finite"):
        servers.generate(PROMPTS, **LAW)


def test_all_servers_must_be_there_at_the_start(running):
    urls = [running[0].url, "http://127.0.0.1:9"]
    with pytest.raises(RolloutServersError, match="No answer in 0.5 s from http://127.0.0.1:9 .*ConnectionError"):
        RolloutServers(make_model(), urls, 0.5)


def test_a_server_that_starts_later_is_waited_for(running):
    running[0].stop()
    later = threading.Timer(0.5, running[0].start)
    later.start()
    RolloutServers(make_model(), [running[0].url], 20.0)
    later.join()


@pytest.mark.parametrize("name, part", [("world_model", "codebook, world"), ("codebook", "codebook, world")])
def test_another_model_is_refused_at_the_start(running, name, part):
    other = make_model()
    with torch.no_grad():
        next(getattr(other, name).parameters()).mul_(1.5)
    with pytest.raises(RolloutServersError, match=f"{running[0].url} is not of this model: its {part}"):
        RolloutServers(other, [running[0].url], 5.0)


def test_another_backbone_or_package_is_refused_at_the_start(running, monkeypatch):
    other = make_model()
    other.config.backbone_fingerprint = "0" * 64
    with pytest.raises(RolloutServersError, match="its backbone is another one, by its fingerprint"):
        RolloutServers(other, [running[0].url], 5.0)
    monkeypatch.setattr("latent_trl.vllm.identity.__version__", "0.0.1")
    with pytest.raises(RolloutServersError, match="it runs latent_trl '.*', and the trainer '0.0.1'"):
        RolloutServers(make_model(), [running[0].url], 5.0)


def test_a_server_that_comes_back_with_another_model_has_no_work(running, rollout_model, warnings, tmp_path, expected):
    servers = pool(running[:2])
    other = make_model()
    with torch.no_grad():
        other.world_model.blocks[0].up.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    running[1].stop()
    running[1].folder = str(tmp_path)
    try:
        running[1].start()
        servers.lost = {running[1].url: "it was away"}
        assert plain(servers.generate(PROMPTS, **LAW)) == expected
        assert running[1].engine.answered == [] and "with another model" in servers.lost[running[1].url]
    finally:
        running[1].stop()
        running[1].folder = rollout_model


def test_the_identity_is_that_of_the_checkpoint(rollout_model, tmp_path):
    own = identity_of_checkpoint(rollout_model)
    loaded = LatentActionModel.from_pretrained(rollout_model, backbone=make_model().backbone)
    assert differences(identity_of_model(loaded), own) == []
    # RL changes the policy and the value head.
    changed = make_model(1)
    assert identity_of_model(changed) == own
    for dtype in (torch.bfloat16, torch.float16):
        model = make_model()
        for part in (model.codebook, model.world_model):
            part.to(dtype)
        assert differences(identity_of_model(model), own) == [], dtype
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "world_model" / "model.safetensors"
    tensors = load_file(path)
    save_file({f"x{name}": tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    assert differences(identity_of_checkpoint(tmp_path), own)


def test_what_was_tuned_of_the_backbone_is_a_part_of_the_identity(tmp_path):
    from peft import LoraConfig

    model = make_model()
    model.add_adapter(LoraConfig(r=2))
    assert differences(identity_of_model(model), identity_of_model(make_model()))
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path)
    own = identity_of_model(model)
    assert own == identity_of_checkpoint(tmp_path)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)
    assert differences(identity_of_model(model), own)


def test_neighbours_stay_together():
    assert divided(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert divided([4, 9], 3) == [[4], [9]]


# The options


def grpo(tmp_path, **options):
    server = {"use_vllm": True, "vllm_mode": "server"}
    return LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{**server, **options})


@pytest.mark.parametrize(
    "options, urls",
    [
        ({}, ["http://127.0.0.1:8000"]),
        ({"vllm_server_host": "node1", "vllm_server_port": 9000}, ["http://node1:9000"]),
        ({"vllm_server_base_url": "https://node1:9000/"}, ["https://node1:9000"]),
        ({"vllm_server_base_url": "https://node1"}, ["https://node1"]),
        (
            {"vllm_server_hosts": ["a", "b:81", "http://c:82", "[::1]:83"], "vllm_server_port": 80},
            ["http://a:80", "http://b:81", "http://c:82", "http://[::1]:83"],
        ),
    ],
)
def test_addresses_of_servers(tmp_path, options, urls):
    assert server_urls(grpo(tmp_path, **options)) == urls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vllm_server_hosts": []}, "`vllm_server_hosts` must be a list of addresses"),
        ({"vllm_server_hosts": "a:80"}, "`vllm_server_hosts` must be a list of addresses, got 'a:80'"),
        ({"vllm_server_hosts": ["a", "a:8000"]}, "`vllm_server_hosts` names http://a:8000 twice"),
        ({"vllm_server_hosts": ["a:b"]}, "`vllm_server_hosts`: 'a:b' is no address"),
        ({"vllm_server_hosts": ["ftp://a"]}, "`vllm_server_hosts`: 'ftp://a' is no address"),
        ({"vllm_server_hosts": ["a/b"]}, "`vllm_server_hosts`: 'a/b' is no address"),
        ({"vllm_server_hosts": ["http://me:secret@a"]}, "`vllm_server_hosts`: .* is no address"),
        ({"vllm_server_hosts": [3]}, "`vllm_server_hosts`"),
        ({"vllm_server_hosts": ["a"], "vllm_server_host": "b"}, "`vllm_server_hosts` and `vllm_server_host` both say"),
        (
            {"vllm_server_base_url": "http://a", "vllm_server_host": "b"},
            "`vllm_server_base_url` and `vllm_server_host`",
        ),
        ({"vllm_server_base_url": "http://a", "vllm_server_port": 1}, "write the port into the address"),
        ({"vllm_server_timeout": 0.0}, "`vllm_server_timeout` must be positive"),
        ({"vllm_mode": "colocated"}, "`vllm_mode` must be one of"),
        ({"vllm_mode": "colocate", "vllm_server_hosts": ["a"]}, "`vllm_server_hosts` is about servers"),
        ({"vllm_mode": "colocate", "vllm_server_timeout": 3.0}, "`vllm_server_timeout` is about servers"),
        ({"vllm_max_model_length": 64}, "`vllm_max_model_length=64` is about an engine in the trainer's process"),
        ({"vllm_enable_sleep_mode": True}, "`vllm_enable_sleep_mode=True` is about an engine in the trainer's process"),
        ({"vllm_gpu_memory_utilization": 0.5}, "`vllm_gpu_memory_utilization=0.5` is about an engine"),
        ({"vllm_group_port": 1}, "`vllm_group_port=1`"),
        ({"vllm_tensor_parallel_size": 2}, "`vllm_tensor_parallel_size=2`"),
        ({"use_vllm": False, "vllm_mode": "colocate", "vllm_server_hosts": ["a"]}, "`vllm_server_hosts` is about vLLM"),
    ],
)
@pytest.mark.parametrize("config_class", [LatentActionGRPOConfig, LatentActionRLOOConfig, LatentActionPPOConfig])
def test_options_that_contradict_are_named(tmp_path, config_class, options, message):
    server = {"use_vllm": True, "vllm_mode": "server"}
    if config_class is LatentActionRLOOConfig:
        server["vllm_importance_sampling_mode"] = "sequence_mask"
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), use_cpu=True, bf16=False, **{**server, **options})


@pytest.mark.parametrize("from_file", [False, True])
def test_servers_are_named_on_the_command_line_and_in_files(from_file, tmp_path):
    from latent_trl.commands.arguments import RewardArguments, parse_training

    (tmp_path / "config.yaml").write_text("vllm_server_hosts: ['a:80', 'b:81']\n")
    words = ["--config", str(tmp_path / "config.yaml")] if from_file else ["--vllm_server_hosts", "a:80", "b:81"]
    words += ["--model_name_or_path", "x", "--dataset_name", "y", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    words += ["--use_vllm", "true", "--vllm_mode", "server", "--bf16", "false"]
    _, args, _ = parse_training(words, "latent-trl grpo", RewardArguments, "LatentActionGRPOConfig")
    assert server_urls(args) == ["http://a:80", "http://b:81"]
