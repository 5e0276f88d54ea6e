"""Plans under vLLM's own multi-LoRA: without a plugin, the answers are those of `PlanModel`."""

import gc
import os

import pytest
import tiny_models
import torch

from latent_trl.plans.configuration import PlanConfig
from latent_trl.plans.engine import engine_arguments, plan_requests
from latent_trl.plans.model import PlanModel

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm.lora", reason="vLLM is not installed")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PLANS, LENGTH, ROWS = 16, 16, 8
# vLLM's attention on a CPU has kernels for heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
HEADS = {**SIZES, "head_dim": 32}
FAMILIES = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Gemma2": {**HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    "Qwen3": HEADS,
    "Phi3": SIZES,
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    first, vocabulary = len(tiny_models.SPECIAL), tiny_models.VOCAB_SIZE
    lengths = torch.randint(3, 20, (ROWS,), generator=generator).tolist()
    return [torch.randint(first, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def saved_plans(backbone, folder) -> PlanModel:
    backbone.save_pretrained(folder / "backbone")
    backbone.config._name_or_path = str(folder / "backbone")
    model = PlanModel(backbone, PlanConfig(num_plans=PLANS, rank=4, depth=1, init_std=0.5))
    model.save_pretrained(folder / "plans")
    return model


@pytest.fixture
def engine():
    """Makes engines, and takes their memory back."""
    from vllm import LLM

    made = []

    def make(folder, **options):
        shared = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 64 << 20}
        made.append(LLM(**engine_arguments(folder, **{"skip_tokenizer_init": True, **shared, **options})))
        return made[-1]

    yield make
    for one in made:
        one.llm_engine.engine_core.shutdown()
    made.clear()
    gc.collect()


def answered(llm, folder, asked: list[dict]) -> list[list[list[int]]]:
    """`[rows][plans]` answers, all in one batch, each a request of its own adapter; the last are without one."""
    from vllm import SamplingParams

    requests = [*plan_requests(folder), None]
    whole = [prompt for prompt in asked for _ in requests]
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    found = llm.generate(whole, params, lora_request=requests * len(asked), use_tqdm=False)
    ids = [list(one.outputs[0].token_ids) for one in found]
    return [ids[i : i + len(requests)] for i in range(0, len(ids), len(requests))]


def share_of_same(model: PlanModel, found, inputs: list[dict]) -> tuple[float, float]:
    """The share of answers under plans that are token for token the model's, and of plans that say other than none."""
    same, other = 0, 0
    for one, of_row in zip(inputs, found, strict=True):
        length = one["input_ids"].shape[1]
        for plan in range(PLANS):
            own = model.generate(**one, plan_ids=plan, max_new_tokens=LENGTH, eos_token_id=[])[0, length:].tolist()
            same += own == of_row[plan]
            other += own != of_row[-1]
    return same / (len(found) * PLANS), other / (len(found) * PLANS)


@pytest.mark.parametrize("family", [f if f == "Llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_mixed_batch_of_plans_answers_as_the_model_does(family, engine, tmp_path):
    backbone = tiny_models.causal(family, **tiny_models.text_fields(**FAMILIES[family])).model
    model = saved_plans(backbone, tmp_path)
    found = answered(engine(tmp_path / "plans"), tmp_path / "plans", [{"prompt_token_ids": ids} for ids in prompts()])
    same, other = share_of_same(model, found, [{"input_ids": torch.tensor([ids])} for ids in prompts()])
    print(f"{family}: {same:.3f} of the answers are the same, {other:.3f} other than without a plan")
    # Where answers differ, it is by a near-tie.
    assert same >= 0.97 and other >= 0.4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_loras": 8}, "`max_loras` is 8, and there are 16 plans: it must be at least 16"),
        ({"max_cpu_loras": 4}, "`max_cpu_loras` is 4, and there are 16 plans"),
        ({"max_lora_rank": 1}, "`max_lora_rank` is 1, and plans are of rank 4: it must be at least 8"),
        ({"enable_lora": False}, "`enable_lora` is off, and plans are LoRAs"),
    ],
)
def test_an_engine_that_cannot_hold_the_plans_is_refused(options, message, tmp_path):
    saved_plans(tiny_models.llama().model, tmp_path)
    with pytest.raises(ValueError, match=message):
        engine_arguments(tmp_path / "plans", **options)
    assert engine_arguments(tmp_path / "plans", max_loras=20)["max_loras"] == 20
