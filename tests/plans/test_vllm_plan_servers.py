"""Rollout servers over plans of the real engine, each in a process of its own: runs and answers are the model's."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm.lora", reason="vLLM is not installed")
for package in ("starlette", "uvicorn", "pydantic"):
    pytest.importorskip(package, reason="servers need it")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path[:0] = [str(Path(__file__).parents[1] / "distributed")]

import tiny_models  # noqa: E402
import torch  # noqa: E402
from served_launch import ServerProcess  # noqa: E402
from test_plan_policy import KINDS  # noqa: E402
from test_plan_trainers import QUIET, even_length, losses, prompts  # noqa: E402

from latent_trl import PlanConfig, PlanModel  # noqa: E402
from latent_trl.data.prompts import PromptEncoder  # noqa: E402
from latent_trl.plans.engine_decoder import PlanEngine  # noqa: E402
from latent_trl.plans.lora_engine import engine_of_folder, engine_of_model  # noqa: E402
from latent_trl.plans.plan_servers import PlanServers  # noqa: E402
from latent_trl.vllm.client import WrongRequest  # noqa: E402

PLANS, SLOTS, LONGEST = 4, 6, 128
# vLLM's attention on a CPU has kernels for heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
OPTIONS = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "enforce_eager": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved plans, whose backbone lies beside them and ends an answer now and then."""
    found = tmp_path_factory.mktemp("served")
    backbone = tiny_models.causal("Llama", **tiny_models.text_fields(**SIZES)).model
    backbone.generation_config.eos_token_id = list(range(2, 40))
    backbone.save_pretrained(found / "backbone")
    tiny_models.make_tokenizer().save_pretrained(found / "backbone")
    backbone = type(backbone).from_pretrained(found / "backbone", dtype="float32")
    model = PlanModel(backbone, PlanConfig(num_plans=PLANS, depth=1, rank=4, init_std=0.5))
    model.save_pretrained(found / "plans")
    return found / "plans"


def loaded(folder, segment="answer"):
    model = PlanModel.from_pretrained(folder, dtype=torch.float32)
    model.plan_config.segment = segment
    return model


@pytest.fixture(scope="module")
def two(folder):
    words = ["-m", "latent_trl", "vllm-serve", str(folder), "--dtype", "float32", "--max-model-len", str(LONGEST)]
    words += ["--engine-options", json.dumps({**OPTIONS, "max_loras": SLOTS})]
    servers = [ServerProcess(words) for _ in range(2)]
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.kill()


def run(kind, folder, output, change=None, **options):
    """A run, and what it ended with."""
    trainer_class, config_class = KINDS[kind]
    fields = {"max_steps": 8, "num_iterations": 2, "rollout_prompts": 5, "logging_steps": 1, "save_strategy": "no"}
    fields |= {"num_generations": 1 if kind == "ppo" else 2, "max_completion_length": 8}
    args = config_class(str(output), **QUIET, **fields, **options)
    model = loaded(folder, segment=3)
    trainer = trainer_class(model, even_length, args, prompts(), prompts(5), tiny_models.make_tokenizer())
    if args.use_vllm:
        model._decode = None
    if change is not None:
        change(trainer)
    trainer.train()
    rewards = {k: v for row in trainer.state.log_history for k, v in row.items() if "reward" in k or "ceil" in k}
    chooser = {name: value.tolist() for name, value in model.chooser.state_dict().items()}
    return losses(trainer), rewards, trainer.replay.plans, chooser


@pytest.mark.slow
def test_a_run_whose_server_is_killed_is_that_of_one_engine_and_that_of_none(two, folder, tmp_path, monkeypatch):
    from latent_trl.vllm import servers as module

    def with_own_engine(trainer):
        options = {"dtype": "float32", "max_model_len": LONGEST, **OPTIONS}
        source = engine_of_model(trainer.model, trainer.encoder, PLANS, **options)
        trainer.engine_source.engine = PlanEngine(trainer.model, trainer.encoder, source)

    def unlucky(trainer):
        step, source = trainer.training_step, trainer.engine_source.engine.source
        generate, segments = source.generate, []

        def killing(*args):
            # The second batch of rollouts, behind its first segments.
            segments.append(trainer.state.global_step)
            if segments.count(2) == 2 and segments[-1] == 2:
                two[1].kill()
                two[1].begin()
            return generate(*args)

        def watched(*args, **kwargs):
            if trainer.state.global_step == 6:
                assert segments.count(2) > 2
                two[1].wait()
            return step(*args, **kwargs)

        trainer.training_step, source.generate = watched, killing

    found = []
    monkeypatch.setattr(module.logger, "warning", found.append)
    monkeypatch.setattr("latent_trl.plans.plan_servers.PAUSE_SECONDS", 0.0)
    served = {"vllm_mode": "server", "vllm_server_hosts": [server.url for server in two], "vllm_server_timeout": 120.0}
    none = run("bandit", folder, tmp_path / "none")
    colocated = run("bandit", folder, tmp_path / "one", with_own_engine, use_vllm=True)
    over = run("bandit", folder, tmp_path / "two", unlucky, use_vllm=True, **served)
    assert none == colocated == over and "eval_ceiling" in none[1]
    assert len({plan for plan in none[2]}) > 1 and len(set(none[0])) > 1
    assert f"{two[1].url} failed" in found[0] and "is back, and has the policy" in found[-1]
    for kind in ("grpo", "ppo"):
        runs = [
            run(kind, folder, tmp_path / f"{kind}-{name}", **options)
            for name, options in (("none", {}), ("two", {"use_vllm": True, **served}))
        ]
        assert runs[0] == runs[1]
    gc.collect()


def test_answers_of_two_servers_are_those_of_the_model_and_follow_its_plans(two, folder):
    model = loaded(folder)
    encoder = PromptEncoder(tiny_models.make_tokenizer())
    engine = PlanEngine(model, encoder, PlanServers(model, [server.url for server in two], 120.0, None, SLOTS))

    def both(plans):
        rows = [encoder(row) for row in prompts(8)]
        rows = [row for row in rows for _ in plans]
        own, found = (model.answers(encoder, rows, [*plans] * 8, 12, [], engine=one) for one in (None, engine))
        assert own.token_ids == found.token_ids and own.ended == found.ended
        return own.token_ids

    before = both(range(PLANS))
    with torch.no_grad():
        model.plans.lora_B[0].mul_(-2)
    assert both(range(PLANS)) != before
    model.add_plans(SLOTS - PLANS)
    both(range(SLOTS))
    rows = [encoder(row) for row in prompts(8)]
    without, own = (model.answers(encoder, rows, None, 12, [], engine=one) for one in (engine, None))
    assert without.token_ids == own.token_ids
    with pytest.raises(ValueError, match=f"take {LONGEST + 1} tokens.*context is of {LONGEST}.*`--max-model-len`"):
        model.answers(encoder, rows[:1], None, LONGEST + 1 - len(rows[0].ids), [], engine=engine)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"plan": 99}, r"`plan` must be in 0 ... \d+, or None; got 99"),
        ({"plan": True}, r"`plan` must be in 0 ... \d+, or None; got True"),
        ({"plan": 0, "max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"plan": 0, "temperature": 2}, r"have the settings \['max_tokens', 'plan'\], got \['plan', 'temperature'\]"),
    ],
)
def test_what_a_server_refuses_of_a_row(two, folder, settings, message):
    model = loaded(folder)
    servers = PlanServers(model, [server.url for server in two], 120.0, None, PLANS)
    servers.take(model.plans.tensors)
    with pytest.raises(WrongRequest, match=message):
        servers.answers([[20, 21]], [(0, settings)], 4, [])
    with pytest.raises(WrongRequest, match="`output_support` is of codes"):
        servers.answers([[20, 21]], [(0, {"plan": 0})], 4, [], output_support=True)
    assert len(servers.generate([[20, 21]], [(0, {"plan": 0})], 4, [])[0].token_ids) == 4


def quantised(folder, config):
    record = json.loads((folder / "backbone" / "config.json").read_text())
    record["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "backbone" / "config.json").write_text(json.dumps(record))


def of_gpt2(folder, config):
    tiny_models.gpt2().model.save_pretrained(folder / "backbone")


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda folder, config: config.update(segment="switch"), {}, "held until a learned switch ends the segment"),
        (lambda folder, config: config.update(has_adapter=True), {}, "were learned beside a LoRA of the backbone"),
        (lambda folder, config: config.update(rank=1024), {}, "are of rank 1024, and an engine takes at most 512"),
        (lambda folder, config: config.update(base_model_name_or_path=None), {}, "on a backbone that has no name"),
        (quantised, {}, "The backbone is quantised .bitsandbytes., and plans are learned"),
        (of_gpt2, {}, "vLLM's 'GPT2LMHeadModel' takes no LoRA"),
        (lambda folder, config: None, {"max_loras": 2}, "`max_loras` is 2, and there are 4 plans"),
        (lambda folder, config: None, {"model": "other"}, "`model` is settled by the folder of plans"),
    ],
)
def test_what_an_engine_cannot_have_is_refused_before_the_server_starts(folder, tmp_path, change, options, message):
    backbone = type(loaded(folder).backbone).from_pretrained(folder.parent / "backbone", dtype="float32")
    backbone.save_pretrained(tmp_path / "backbone")
    backbone = type(backbone).from_pretrained(tmp_path / "backbone", dtype="float32")
    PlanModel(backbone, PlanConfig(num_plans=PLANS, depth=1)).save_pretrained(tmp_path / "plans")
    path = tmp_path / "plans" / "plan_config.json"
    config = json.loads(path.read_text())
    change(tmp_path, config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        engine_of_folder(str(tmp_path / "plans"), **options)
