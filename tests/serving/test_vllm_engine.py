"""vLLM behind the server: the same answers as the model's own `generate`, over the same protocol."""

import os
import time

import pytest

# Small caches; no thread is bound to a core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import httpx  # noqa: E402
import openai  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from loopback import serving  # noqa: E402

TEXT = "what color is it?"
# vLLM's attention on a CPU has kernels for heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from latent_trl import LatentActionModel

    folder = tmp_path_factory.mktemp("tiny")
    backbone = tiny_models.causal("Llama", **tiny_models.text_fields(**SIZES)).model
    backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    backbone = type(backbone).from_pretrained(folder / "backbone", dtype="float32")
    model = LatentActionModel.from_backbone(backbone, tiny_models.latent_config())
    tiny_models.perturb(model, std=0.3)
    model.config.stage = "policy"
    model.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def url(folder):
    from latent_trl.serving.vllm_engine import VLLMEngine

    engine = VLLMEngine(folder, max_completion_length=200, dtype="float32", enforce_eager=True)
    with serving(engine) as address:
        yield address
    assert engine.problem()


@pytest.fixture
def ask(url):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def create(codes=None, **options):
        messages = [{"role": "user", "content": TEXT}]
        return client.chat.completions.create(
            model="pocket", messages=messages, extra_body={"latent_actions": codes or {}}, **options
        )

    return create


def test_the_engine_answers_as_the_model(folder, ask):
    from latent_trl.commands.loading import load_model, load_processor
    from latent_trl.data.prompts import encode_prompts

    model = load_model(folder).to("cpu")
    inputs = encode_prompts(load_processor(model), [{"prompt": [{"role": "user", "content": TEXT}]}])
    bias = torch.zeros(16)
    bias[3], bias[[0, 1]] = 1.5, -torch.inf
    for codes, law in (({}, {}), ({"forced": [4, -1, 5], "bias": {"3": 1.5}, "banned": [0, 1]}, {"action_bias": bias})):
        if "forced" in codes:
            law["forced_action_ids"] = torch.tensor([codes["forced"]])
        own = model.generate(**inputs, max_new_tokens=24, action_do_sample=False, return_dict_in_generate=True, **law)
        reply = ask(codes, temperature=0, max_completion_tokens=24)
        found = reply.choices[0].latent_actions
        length = len(found["ids"])
        assert found["ids"] == own.action_ids[0, :length].tolist() and length == own.action_ids.shape[1]
        assert found["log_probs"] == pytest.approx(own.action_log_probs[0].tolist(), abs=1e-3)
        assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]
        assert reply.usage.completion_tokens == length == len(found["tokens"])


def test_a_stream_joined_is_the_answer(ask):
    options = {"temperature": 1.2, "seed": 5, "n": 2, "max_completion_tokens": 12, "codes": {"top_k": 9}}
    whole, again = ask(**options), ask(**options)
    for first, second in zip(whole.choices, again.choices, strict=True):
        for name in ("ids", "tokens"):
            assert first.latent_actions[name] == second.latent_actions[name]
        # Which rows share a batch changes the order of sums.
        assert first.latent_actions["log_probs"] == pytest.approx(second.latent_actions["log_probs"], abs=1e-4)
    assert whole.choices[0].latent_actions != whole.choices[1].latent_actions
    chunks = list(ask(stream=True, stream_options={"include_usage": True}, **options))
    for own in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == own.index]
        assert "".join(part.delta.content for part in parts) == own.message.content
        assert sum((part.latent_actions["ids"] for part in parts), []) == own.latent_actions["ids"]
        assert "".join(sum((part.latent_actions["tokens"] for part in parts), [])) == "".join(
            own.latent_actions["tokens"]
        )
        assert parts[-1].finish_reason == own.finish_reason
    assert chunks[-1].usage == whole.usage


def test_many_requests_at_once_get_their_own_answers(url, ask):
    import concurrent.futures

    forced = [[code, 15 - code, code] for code in range(16)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        alone = [ask({"forced": each}, temperature=0, max_completion_tokens=10) for each in forced]
        together = list(pool.map(lambda each: ask({"forced": each}, temperature=0, max_completion_tokens=10), forced))
    for each, own, found in zip(forced, alone, together, strict=True):
        assert found.choices[0].latent_actions["ids"] == own.choices[0].latent_actions["ids"]
        assert found.choices[0].latent_actions["ids"][:3] == each


def test_what_it_cannot_take_is_refused(ask):
    with pytest.raises(openai.BadRequestError, match="The longest answer has 200 tokens"):
        ask(max_completion_tokens=201)
    with pytest.raises(openai.BadRequestError, match="codes are 0 to 15"):
        ask({"forced": [16]})


def test_a_client_that_hangs_up_ends_the_work(url):
    metrics = url.replace("/v1", "/metrics")
    body = {"model": "pocket", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    body |= {"ignore_eos": True, "n": 32, "max_completion_tokens": 200}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as reply:
        parts = reply.iter_bytes()
        next(parts)
        assert "\nlatent_trl_running 32.0" in httpx.get(metrics).text
    until = time.monotonic() + 20
    while "\nlatent_trl_running 0.0" not in (text := httpx.get(metrics).text):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert 'latent_trl_requests_total{status="499"} 1.0' in text
    assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok"}
