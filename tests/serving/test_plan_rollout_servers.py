"""RL over plans with answers from servers: the same runs as without, whatever becomes of a server. Without vLLM."""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from stand_in_engine import make_model, served
from stand_in_plans import LONGEST, SLOTS, ServedPlans
from tiny_models import make_tokenizer

sys.path[:0] = [str(Path(__file__).parents[1] / "plans")]

from test_plan_policy import GROWING, trainer  # noqa: E402
from test_plan_trainers import losses, plan_model, prompts, short_backbone, space_args  # noqa: E402

from latent_trl import PlanConfig, PlanModel  # noqa: E402
from latent_trl.commands.main import main  # noqa: E402
from latent_trl.data.prompts import PromptEncoder  # noqa: E402
from latent_trl.plans import plan_servers  # noqa: E402
from latent_trl.plans.engine_decoder import PlanEngine  # noqa: E402
from latent_trl.plans.plan_servers import (  # noqa: E402
    PlanServers,
    identity_of_plan_model,
    identity_of_plans,
    policy_of_plans,
)
from latent_trl.trainer.rollout.engine_options import server_urls  # noqa: E402
from latent_trl.vllm.client import RolloutServer, ServerFault, WrongRequest  # noqa: E402
from latent_trl.vllm.identity import differences  # noqa: E402
from latent_trl.vllm.rows import EngineText  # noqa: E402
from latent_trl.vllm.servers import RolloutServers, RolloutServersError  # noqa: E402
from latent_trl.vllm.wire import packed, rollout_body, unpacked, unpacked_texts  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(plan_servers, "PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("plans")
    plan_model(init_std=0.5).save_pretrained(found)
    return str(found)


def fresh():
    return plan_model(init_std=0.5)


@pytest.fixture(scope="module")
def started(folder):
    with served(fresh, folder, 2, ServedPlans) as both:
        yield both


@pytest.fixture
def two(started):
    """Two servers, both of them there, with the plans of their folder."""
    for server in started:
        if server.server is None:
            server.start()
        server.engine.before_step = lambda: None
    PlanServers(fresh(), urls(started), 20.0, None, 4).take(fresh().plans.tensors)
    for server in started:
        server.engine.answered.clear()
        server.engine.given.clear()
    return started


def urls(servers):
    return [server.url for server in servers]


def from_servers(servers):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_hosts": urls(servers), "vllm_server_timeout": 20.0}


def run(kind, folder, servers=(), segment="answer", change=None, **options):
    """A run, and what it ended with."""
    model = fresh()
    model.plan_config.segment = segment
    if segment != "answer":
        # Several segments, which differ.
        model.backbone.generation_config.eos_token_id = list(range(2, 20))
        options["max_completion_length"] = 6
    if servers:
        options |= from_servers(servers)
        model._decode = None
    found = trainer(kind, folder, model, **options)
    if change is not None:
        change(found)
    found.train()
    figures = [
        {name: value for name, value in row.items() if "reward" in name or "ceiling" in name}
        for row in found.state.log_history
    ]
    return found, (losses(found), figures, found.replay.plans, found.replay.rewards)


def same(one, other):
    return all(torch.equal(value, other.model.chooser.state_dict()[name]) for name, value in chooser(one).items())


def chooser(found):
    return found.model.chooser.state_dict()


@pytest.mark.parametrize("kind", ["bandit", "grpo", "ppo"])
@pytest.mark.parametrize("segment", ["answer", 2])
def test_a_run_over_servers_is_the_run_without(kind, segment, two, tmp_path):
    alone, expected = run(kind, tmp_path / "alone", segment=segment)
    over, found = run(kind, tmp_path / "over", two, segment)
    assert found == expected and same(alone, over) and not same(over, trainer(kind, tmp_path / "new", fresh()))
    assert any(said for said in over.replay.said) == (segment != "answer")
    # Both have their part; the plans are those that they started with, and never travel.
    assert all(len(server.engine.answered) > 10 for server in two)
    assert [server.engine.given for server in two] == [[], []]


def test_a_server_that_is_killed_and_comes_back_changes_nothing(two, tmp_path, warnings):
    alone, expected = run("bandit", tmp_path / "alone", max_steps=16)
    killer = threading.Thread(target=two[1].stop)

    def unlucky(found):
        step = found.training_step

        def die():
            if found.state.global_step == 4 and killer.ident is None:
                killer.start()
                killer.join(1)

        def watched(*args, **kwargs):
            if found.state.global_step == 12:
                killer.join(20)
                two[1].start()
            return step(*args, **kwargs)

        two[1].engine.before_step = die
        found.training_step = watched

    over, found = run("bandit", tmp_path / "over", two, change=unlucky, max_steps=16)
    assert killer.ident is not None and found == expected and same(alone, over)
    assert [two[1].url in warning for warning in warnings] == [True, True]
    assert "completions are made elsewhere" in warnings[0] and "is back" in warnings[1]
    assert sum(two[1].engine.answered) > 0


def test_plans_that_are_added_are_given_to_the_servers_once(two, tmp_path):
    own = {"max_steps": 8, **GROWING}
    grown = [
        run("bandit", tmp_path / name, servers, space_args=space_args(tmp_path / f"{name}-space"), **own)
        for name, servers in (("alone", ()), ("over", two))
    ]
    assert grown[0][1] == grown[1][1] and same(grown[0][0], grown[1][0])
    assert grown[1][0].model.plan_config.num_plans == 6
    assert [server.engine.given for server in two] == [[6], [6]]


def test_without_servers_the_run_ends_and_names_them(two, tmp_path):
    def stop(found):
        for server in two:
            server.stop()
        found.engine_source.engine.source.timeout = 0.5

    with pytest.raises(RolloutServersError, match="No rollout server is left") as raised:
        run("bandit", tmp_path, two, change=stop)
    assert all(server.url in str(raised.value) for server in two)


# Answers


def decoder(servers, model=None, slots=4, timeout=20.0, **options):
    model = model or fresh()
    source = PlanServers(model, urls(servers), timeout, None, slots, **options)
    return PlanEngine(model, PromptEncoder(make_tokenizer()), source)


def answers(engine, length=6):
    """Those of an engine to some prompts under all plans."""
    rows = [prompt for prompt in map(engine.encoder, prompts(6)) for _ in range(4)]
    return engine.model.answers(engine.encoder, rows, list(range(4)) * 6, length, [], engine=engine)


def test_answers_are_those_of_the_model_in_batches_of_any_size(two):
    model = fresh()
    engine = decoder(two, model)
    expected = answers(engine, length=9).token_ids
    rows = [engine.encoder(row) for row in prompts(6) for _ in range(4)]
    assert expected == model.answers(engine.encoder, rows, list(range(4)) * 6, 9, []).token_ids
    assert answers(decoder(two, batch_size=3), length=9).token_ids == expected
    assert len({tuple(ids) for ids in expected}) > 6


def test_a_prompt_travels_once_for_all_of_its_rows(two, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "latent_trl.vllm.servers.rollout_body",
        lambda version, part, *rest: sent.append(len(part)) or rollout_body(version, part, *rest),
    )
    answers(decoder(two[:1]))
    assert sent == [6]


def test_plans_that_change_are_given_and_those_of_before_are_not_answered_by(two):
    model = fresh()
    engine = decoder(two, model)
    before = answers(engine).token_ids
    with torch.no_grad():
        model.plans.lora_B[0].mul_(-3)
    after = answers(engine).token_ids
    assert after != before and answers(engine).token_ids == after
    assert [server.engine.given for server in two] == [[4], [4]]
    # Another run takes the server, whose trainer gives its own again.
    assert answers(decoder(two)).token_ids == before and answers(engine).token_ids == after


def test_a_server_that_stalls_is_left_out_and_not_asked_at_each_segment(two, warnings, monkeypatch):
    monkeypatch.setattr(plan_servers, "PAUSE_SECONDS", 60.0)
    expected = answers(decoder(two)).token_ids
    engine, go = decoder(two, timeout=0.5), threading.Event()
    two[1].engine.before_step = lambda: go.wait(30)
    try:
        assert answers(engine).token_ids == expected
        assert f"{two[1].url} failed: no answer in 0.5 s" in warnings[0]
        answers(engine)
        described = []
        monkeypatch.setattr(RolloutServer, "describe", lambda self: described.append(self.url))
        assert answers(engine).token_ids == expected and described == []
    finally:
        go.set()


def test_what_is_longer_than_the_context_is_named(two):
    engine = decoder(two)
    row = engine.encoder({"_row": 3, "prompt": "what"})
    message = f"Row 3: prompt and answer may take {LONGEST + 1} tokens.*context is of {LONGEST}.*`--max-model-len`"
    with pytest.raises(ValueError, match=message):
        engine([row], [[]], [0], LONGEST + 1 - len(row.ids), [])


# What a server and a trainer must have in common


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.backbone.lm_head.weight.data.mul_(2), "its backbone is another one, by its fingerprint"),
        (lambda model: setattr(model.plan_config, "rank", 3), "its plans are of rank 2, and the trainer's of 3"),
        (lambda model: model.plans.targets.pop(), "its plans change other linear maps than the trainer's"),
    ],
)
def test_another_model_is_refused_at_the_start(two, change, message):
    model = fresh()
    change(model)
    with pytest.raises(RolloutServersError, match=f"The rollout server .* is not of this model: {message}"):
        decoder(two, model)


def test_too_little_room_for_plans_is_named_at_the_start(two, tmp_path):
    options = {**GROWING, "max_plans": SLOTS + 1, **from_servers(two)}
    message = rf"room for {SLOTS} plans, and the run may come to {SLOTS + 1} .*'{{\"max_loras\": {SLOTS + 1}}}'"
    with pytest.raises(RolloutServersError, match=message):
        trainer("bandit", tmp_path, fresh(), space_args=space_args(tmp_path / "space"), **options)


def test_codes_and_plans_are_told_apart(two, rollout_model):
    with pytest.raises(RolloutServersError, match="it serves plans, and the trainer learns over codes"):
        RolloutServers(make_model(), urls(two), 5.0)
    with served(make_model, rollout_model) as codes:
        with pytest.raises(RolloutServersError, match="it serves codes, and the trainer learns over plans"):
            decoder(codes)


def test_the_identity_is_that_of_the_folder_in_any_precision(folder, tmp_path):
    own = identity_of_plans(Path(folder))
    model = fresh()
    model.backbone.to(torch.bfloat16)
    assert differences(identity_of_plan_model(model), own) == []
    for dtype in (torch.bfloat16, torch.float16):
        saved = short_backbone().to(dtype)
        PlanModel(saved, PlanConfig(num_plans=4, depth=1, rank=2)).save_pretrained(tmp_path / str(dtype))
        assert differences(identity_of_plan_model(fresh()), identity_of_plans(tmp_path / str(dtype))) == [], dtype
    # Plans that were learned since, more of them, and other segments are no difference.
    model = fresh()
    model.add_plans(2)
    model.plan_config.segment = 3
    assert differences(identity_of_plan_model(model), own) == []


def test_models_that_an_engine_would_not_answer_as_are_refused_before_a_server_is_asked(tmp_path):
    nowhere = {"use_vllm": True, "vllm_mode": "server", "vllm_server_hosts": ["127.0.0.1:9"]}
    model = fresh()
    model.plan_config.has_adapter = True
    with pytest.raises(ValueError, match="were learned beside a LoRA"):
        trainer("bandit", tmp_path, model, **nowhere)


# The protocol


@pytest.fixture
def client(two):
    return RolloutServer(two[0].url, 20.0)


def body(version, plan=0, **settings):
    return rollout_body(version, [[20, 30]], [(0, {"plan": plan, "max_tokens": 3, **settings})], 5, [2], False)


def test_plans_that_a_server_does_not_take(client, two):
    own = policy_of_plans(fresh().plans.tensors)
    tensors = load(own.data)
    name = next(iter(tensors))
    wider = {key: torch.cat([value] * 3) for key, value in tensors.items()}
    rest = {key: value for key, value in tensors.items() if key != name}
    bad = {
        f"There are 12 plans, and the engine has room for {SLOTS}": wider,
        "has no numbers, and that of the engine has shape": rest,
        "and that of the engine has shape": {**rest, name: tensors[name][:3].clone()},
        "has shape .*, and that of the engine has no numbers": {**tensors, "x": torch.ones(4, 2)},
    }
    for message, given in bad.items():
        with pytest.raises(WrongRequest, match=message):
            client.give(policy_of_plans(given))
    assert client.describe()["policy"] == own.version and two[0].engine.given == []
    with pytest.raises(WrongRequest, match="`plan` must be one, got 4"):
        client.answers(body(own.version, 4), 1, unpacked_texts)
    assert len(client.answers(body(own.version, 3), 1, unpacked_texts)[0].token_ids) == 3


def test_what_is_there_already_is_not_taken_again(client, two):
    """As of another process of the same run, whose rows go on."""
    own = policy_of_plans(fresh().plans.tensors)
    begun, go = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go.wait(10)

    two[0].engine.before_step = wait
    found = []
    asking = threading.Thread(
        target=lambda: found.append(RolloutServer(two[0].url, 20.0).answers(body(own.version), 1, unpacked_texts))
    )
    asking.start()
    assert begun.wait(10)
    giving = threading.Thread(target=client.give, args=(own,))
    giving.start()
    time.sleep(0.1)
    go.set()
    for thread in (asking, giving):
        thread.join(20)
    assert len(found[0]) == 1 and two[0].engine.given == []


def test_answers_without_codes_arrive_as_they_were():
    answers = [EngineText([1, 2], [3, 4, 5]), EngineText([6], [7])]
    assert unpacked_texts(packed(answers), 2) == answers
    for data, rows in ((packed(answers), 3), (packed(answers)[:-1], 2), (save({"x": torch.zeros(1)}), 2)):
        with pytest.raises(ValueError, match="The answers cannot be read"):
            unpacked_texts(data, rows)
    with pytest.raises(ValueError, match="The answers cannot be read .*action_ids"):
        unpacked(packed(answers), 2)


def test_a_trainer_of_codes_never_reads_answers_without_codes(client):
    own = policy_of_plans(fresh().plans.tensors)
    with pytest.raises(ServerFault, match="action_ids"):
        client.answers(body(own.version), 1)


# The commands


@pytest.mark.parametrize("command, name", [("bandit", "PlanBanditConfig"), ("grpo", "PlanGRPOConfig")])
@pytest.mark.parametrize("from_file", [False, True])
def test_servers_are_named_on_the_command_line_and_in_files(command, name, from_file, tmp_path):
    from latent_trl.commands.arguments import RewardArguments, parse_training

    (tmp_path / "config.yaml").write_text("vllm_server_hosts: ['a:80', 'b:81']\n")
    words = ["--config", str(tmp_path / "config.yaml")] if from_file else ["--vllm_server_hosts", "a:80", "b:81"]
    words += ["--model_name_or_path", "x", "--dataset_name", "y", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    words += ["--use_vllm", "true", "--vllm_mode", "server"]
    _, args, _ = parse_training(words, f"latent-trl {command}", RewardArguments, name)
    assert server_urls(args) == ["http://a:80", "http://b:81"]


@pytest.mark.parametrize("command", ["bandit", "rloo"])
def test_commands_learn_over_servers_what_they_learn_without(two, folder, command, tmp_path):
    backbone = short_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    shutil.copytree(folder, tmp_path / "plans")
    record = json.loads((tmp_path / "plans" / "plan_config.json").read_text())
    record["base_model_name_or_path"] = str(tmp_path / "backbone")
    (tmp_path / "plans" / "plan_config.json").write_text(json.dumps(record))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"what {i}"}) + "\n" for i in range(8)))
    words = ["--model_name_or_path", str(tmp_path / "plans"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    words += ["--reward_funcs", "length", "--reward_kwargs", '{"length": {"target": 1}}', "--use_cpu", "true"]
    words += ["--max_steps", "4", "--num_iterations", "2", "--rollout_prompts", "4", "--max_completion_length", "6"]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"]
    served = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_hosts", *urls(two)]
    for name, more in (("alone", []), ("over", served)):
        assert main([command, *words, "--output_dir", str(tmp_path / name), *more]) == 0
    alone, over = (load_file(tmp_path / name / "chooser.safetensors") for name in ("alone", "over"))
    assert alone.keys() == over.keys() and all(torch.equal(value, over[name]) for name, value in alone.items())
    assert sum(len(server.engine.answered) for server in two) > 4


def test_the_server_says_what_is_wrong_with_a_folder(folder, tmp_path, monkeypatch, capsys):
    from latent_trl.commands import vllm_serve

    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: name)
    shutil.copytree(folder, tmp_path / "plans")
    record = json.loads((tmp_path / "plans" / "plan_config.json").read_text())
    record["base_model_name_or_path"] = "not/there/any/more"
    (tmp_path / "plans" / "plan_config.json").write_text(json.dumps(record))
    assert main(["vllm-serve", str(tmp_path / "plans")]) == 1
    assert "There is no backbone 'not/there/any/more'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["vllm-serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "latent actions, or of plans" in shown and '{"max_loras": 64}' in shown


def test_a_server_that_is_left_is_not_asked_for_the_share_of_others():
    """At most `batch_size` rows of each server that answers, also when one is lost on the way."""
    pool = PlanServers.__new__(PlanServers)
    pool.batch_size, pool.servers, pool.lost, asked = 4, dict.fromkeys("abc"), {"a": "gone"}, []

    def answers(prompts, rows, *limits):
        asked.append(len(rows))
        pool.lost["b"] = "gone"
        return list(rows)

    pool.answers = answers
    assert pool.generate(["prompt"], list(range(17)), 3, [1]) == list(range(17))
    assert asked == [8, 4, 4, 1]
