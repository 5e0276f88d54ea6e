"""RL over plans with answers from vLLM's own multi-LoRA: the same answers, and so the same runs."""

import gc
import os

import pytest
import tiny_models
import torch
from test_plan_policy import KINDS
from test_plan_trainers import QUIET, even_length, losses, prompts

from latent_trl import PlanConfig, PlanModel
from latent_trl.data.prompts import PromptEncoder

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm.lora", reason="vLLM is not installed")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PLANS, LONGEST = 4, 128
# vLLM's attention on a CPU has kernels for heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model():
    """Plans of a backbone that is in no folder, and ends an answer now and then."""
    backbone = tiny_models.causal("Llama", **tiny_models.text_fields(**SIZES)).model
    backbone.generation_config.eos_token_id = list(range(2, 40))
    model = PlanModel(backbone, PlanConfig(num_plans=PLANS, depth=1, rank=4, init_std=0.5))
    # As many as let a sentence end within a few random tokens.
    model.plan_config.segment_end_token_ids = list(range(140, 190))
    return model


@pytest.fixture(scope="module")
def engine(model):
    """An engine of this model, which is taken for those of the trainers."""
    from latent_trl.plans.engine_decoder import PlanEngine
    from latent_trl.plans.lora_engine import engine_of_model

    encoder = PromptEncoder(tiny_models.make_tokenizer())
    options = {"dtype": "float32", "max_model_len": LONGEST, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    made = PlanEngine(model, encoder, engine_of_model(model, encoder, slots=2 * PLANS, **options))
    yield made
    made.close()
    gc.collect()


def answers(model, engine, ends=(), length=12):
    """Answers to some prompts with a sequence of plans each, by the model and by the engine."""
    encoded = [engine.encoder(row) for row in prompts(8)]
    generator = torch.Generator().manual_seed(0)
    count = model.plan_config.num_plans
    sequences = torch.randint(count, (len(encoded), length), generator=generator)

    def choose(places, spoken, inputs):
        return torch.stack([sequences[i, len(one.plans)] for i, one in zip(places, spoken, strict=True)])

    return [
        model.speak(engine.encoder, encoded, choose, length, list(ends), engine=decodes) for decodes in (None, engine)
    ]


@pytest.mark.parametrize("segment", ["answer", "sentence", 3])
def test_segments_are_those_of_the_model(model, engine, segment, monkeypatch):
    monkeypatch.setattr(model.plan_config, "segment", segment)
    own, found = answers(model, engine)
    assert own == found
    many = sum(len(one.plans) > 1 for one in found)
    assert many == 0 if segment == "answer" else many > 0
    with_ends, again = answers(model, engine, ends=range(2, 140))
    assert with_ends == again and {len(one.token_ids) for one in again} != {12}


def test_answers_without_a_plan_and_too_long_ones(model, engine):
    encoded = [engine.encoder(row) for row in prompts(8)]
    for plans in (None, [0, 1, 2, 3] * 2):
        own, found = (model.answers(engine.encoder, encoded, plans, 8, [], engine=one) for one in (None, engine))
        assert own.token_ids == found.token_ids and own.ended == found.ended
    with pytest.raises(ValueError, match=f"take {LONGEST + 1} tokens.*context is of {LONGEST}"):
        model.answers(engine.encoder, encoded[:1], None, LONGEST + 1 - len(encoded[0].ids), [], engine=engine)


def test_plans_that_change_or_are_added_reach_the_engine(model, engine, monkeypatch):
    before, _ = answers(model, engine)
    kept = [parameter.detach().clone() for parameter in model.plans.parameters()]
    with torch.no_grad():
        model.plans.lora_B[0].mul_(-2)
    own, found = answers(model, engine)
    assert own == found != before
    with torch.no_grad():
        for parameter, value in zip(model.plans.parameters(), kept, strict=True):
            parameter.copy_(value)
    assert answers(model, engine)[1] == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segment", ["answer", 3])
def test_a_run_is_the_same_run(kind, segment, model, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(model.plan_config, "segment", segment)
    trainer_class, config_class = KINDS[kind]
    start = {name: value.clone() for name, value in model.chooser.state_dict().items()}
    runs = []
    for use_vllm in (False, True):
        model.chooser.load_state_dict(start)
        fields = {"max_steps": 4, "num_iterations": 2, "rollout_prompts": 5, "logging_steps": 1, "use_vllm": use_vllm}
        fields |= {"num_generations": 1 if kind == "ppo" else 2, "max_completion_length": 8, "save_strategy": "no"}
        args = config_class(str(tmp_path / str(use_vllm)), **QUIET, **fields)
        trainer = trainer_class(model, even_length, args, prompts(), prompts(5), tiny_models.make_tokenizer())
        if use_vllm:
            trainer.engine_source.engine = engine
            monkeypatch.setattr(PlanModel, "_decode", None)
        trainer.train()
        rewards = {k: v for row in trainer.state.log_history for k, v in row.items() if "reward" in k or "ceil" in k}
        runs.append((losses(trainer), rewards, trainer.replay.plans))
    model.chooser.load_state_dict(start)
    assert runs[0] == runs[1] and "eval_ceiling" in runs[0][1]


def test_an_architecture_without_adapters_is_named(tmp_path):
    config = {"max_steps": 2, "use_vllm": True}
    trainer_class, config_class = KINDS["bandit"]
    model = PlanModel(tiny_models.gpt2().model, PlanConfig(num_plans=PLANS))
    args = config_class(str(tmp_path), **QUIET, **config)
    with pytest.raises(ValueError, match="vLLM's 'GPT2LMHeadModel' takes no LoRA"):
        trainer_class(model, even_length, args, prompts(), None, tiny_models.make_tokenizer())


def test_added_plans_reach_the_engine(model, engine):
    model.add_plans(2)
    own, found = answers(model, engine)
    assert own == found and {plan for one in found for plan in one.plans} > set(range(PLANS))
