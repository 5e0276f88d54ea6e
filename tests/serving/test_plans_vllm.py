"""Plans behind the server by vLLM's multi-LoRA: the same answers as the model's own, over the same protocol."""

import concurrent.futures
import os

import pytest

# Small caches; no thread is bound to a core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import openai  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from loopback import serving  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from latent_trl import PlanConfig, PlanModel  # noqa: E402
from latent_trl.data.prompts import PromptEncoder  # noqa: E402

TEXT, PLANS, LONGEST = "what color is it?", 4, 40
# vLLM's attention on a CPU has kernels for heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    backbone = tiny_models.causal("Llama", **tiny_models.text_fields(**SIZES)).model
    backbone.save_pretrained(folder / "backbone")
    tiny_models.make_tokenizer().save_pretrained(folder / "backbone")
    backbone = type(backbone).from_pretrained(folder / "backbone", dtype="float32")
    model = PlanModel(backbone, PlanConfig(num_plans=PLANS, depth=1, init_std=0.5, segment=3))
    torch.nn.init.normal_(model.chooser.output.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    model.chooser_is_trained = True
    model.save_pretrained(folder / "plans")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    """The model, the address of a server, and its engine."""
    from latent_trl.serving.vllm_plan_engine import VLLMPlanEngine

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    engine = VLLMPlanEngine(str(folder / "plans"), max_completion_length=LONGEST, **options)
    with serving(engine) as address:
        yield PlanModel.from_pretrained(folder / "plans", dtype="float32"), address, engine
    assert engine.problem()


@pytest.fixture(params=["answer", 3])
def segment(served, request, monkeypatch):
    for config in (served[0].plan_config, served[2].config, served[2].chooser.plan_config):
        monkeypatch.setattr(config, "segment", request.param)
    return request.param


@pytest.fixture
def ask(served):
    client = openai.OpenAI(base_url=served[1], api_key="none", max_retries=0)

    def create(how=None, text=TEXT, ignore_eos=False, **options):
        messages = [{"role": "user", "content": text}]
        extra = {"plans": how, "ignore_eos": ignore_eos}
        return client.chat.completions.create(model="pocket", messages=messages, extra_body=extra, **options)

    return create


def alone(served, choose, text=TEXT, length=LONGEST):
    """The model's own answer, and logits where its segments start."""
    model, _, engine = served
    encoder = PromptEncoder(tiny_models.make_tokenizer())
    seen = []

    def choice(places, answers, inputs):
        seen.append(model.plan_logits(**inputs)[0])
        return torch.tensor([choose(seen[-1], len(seen) - 1)])

    prompt = encoder({"prompt": [{"role": "user", "content": text}]})
    (answer,) = model.speak(encoder, [prompt], choice, length, engine.ends)
    return answer, encoder.encoder.tokenizer.decode(answer.token_ids, skip_special_tokens=True), torch.stack(seen)


def test_an_answer_is_the_models_own(served, ask, segment):
    cases = [(None, lambda logits, _: int(logits.argmax()))]
    cases += [({"forced": plan}, lambda logits, _, plan=plan: plan) for plan in range(PLANS)]
    if segment != "answer":
        cases.append(({"forced": [1, -1, 3]}, lambda logits, i: (1, int(logits.argmax()), 3)[min(i, 2)]))
    texts = set()
    for how, choose in cases:
        own, text, logits = alone(served, choose)
        reply = ask(how)
        found = reply.choices[0].plans
        assert reply.choices[0].message.content == text and found["ids"] == own.plans and found["starts"] == own.starts
        of_plans = logits.log_softmax(1).gather(1, torch.tensor(own.plans)[:, None])[:, 0]
        assert found["log_probs"] == pytest.approx(of_plans.tolist(), abs=1e-4)
        assert reply.usage.completion_tokens == len(own.token_ids) == len(found["tokens"])
        assert reply.choices[0].finish_reason == ("stop" if own.ended else "length")
        texts.add(text)
    assert len(texts) > 2


def test_streams_samples_and_stops(served, ask, segment):
    options = {"how": {"temperature": 3}, "seed": 5, "n": 3, "max_completion_tokens": 12}
    whole = ask(**options)
    chunks = list(ask(stream=True, stream_options={"include_usage": True}, **options))
    for own in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == own.index]
        assert "".join(part.delta.content for part in parts) == own.message.content
        assert parts[-1].finish_reason == own.finish_reason
        for name in ("ids", "starts", "tokens"):
            assert sum((part.plans[name] for part in parts), []) == own.plans[name]
    assert chunks[-1].usage == whole.usage
    text = ask(ignore_eos=True).choices[0].message.content
    # It spans two segments of three tokens, each a byte or so.
    stop = text[4:8]
    found = ask(ignore_eos=True, stop=[stop]).choices[0]
    assert found.message.content == text[: text.index(stop)] and found.finish_reason == "stop"


def test_many_requests_at_once_get_their_own_answers(ask, segment):
    cases = [{"how": {"forced": i % PLANS}, "text": f"what {i}", "ignore_eos": True} for i in range(12)]
    alone = [ask(**case).choices[0] for case in cases]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda case: ask(**case).choices[0], cases))
    assert [one.message for one in alone] == [one.message for one in together]
    assert [one.plans["ids"] for one in alone] == [one.plans["ids"] for one in together]


def test_what_it_cannot_take_is_refused(ask):
    with pytest.raises(openai.BadRequestError, match=f"The longest answer has {LONGEST} tokens"):
        ask(max_completion_tokens=LONGEST + 1)
    with pytest.raises(openai.BadRequestError, match="plans are 0 to 3"):
        ask({"forced": [4]})
    with pytest.raises(openai.BadRequestError, match="the longest context is of 128"):
        ask(text="why " * 40)


def test_a_chooser_that_is_not_finite_is_an_error(served, ask):
    output = served[2].chooser.chooser.output
    before = output.bias.detach().clone()
    try:
        torch.nn.init.constant_(output.bias, float("nan"))
        with pytest.raises(openai.InternalServerError, match="the chooser's probabilities are not finite"):
            ask()
    finally:
        with torch.no_grad():
            output.bias.copy_(before)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--engine-options", '{"dtype": "float16"}', "--dtype", "float32"], "`dtype` is in `--engine-options`"),
        (["--engine-options", '{"max_loras": 2}'], "`max_loras` is 2, and there are 4 plans"),
        (["--engine-options", '{"max_lora_rank": 1}'], "`max_lora_rank` is 1, and plans are of rank 4"),
        (["--backbone", "elsewhere"], "`--backbone` is for `--engine transformers`"),
    ],
)
def test_the_command_names_what_leaves_no_room_for_plans(folder, words, said, capsys):
    from latent_trl.commands.main import main

    assert main(["serve", str(folder / "plans"), "--engine", "vllm", *words]) == 1
    assert said in capsys.readouterr().err


def test_the_command_refuses_a_learned_switch(folder, tmp_path, capsys):
    from latent_trl.commands.main import main

    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype="float32")
    PlanModel(backbone, PlanConfig(num_plans=PLANS, depth=1, segment="switch")).save_pretrained(tmp_path)
    assert main(["serve", str(tmp_path), "--engine", "vllm"]) == 1
    assert "held until a learned switch ends the segment (`segment='switch'`)" in capsys.readouterr().err
