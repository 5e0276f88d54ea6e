"""Plans behind the server: each answer is the model's own under the plan that the request gets."""

import concurrent.futures
import io
import re

import httpx
import openai
import pytest
import torch
from conversations import asked, picture
from loopback import CARDS, serving
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from latent_trl import PlanConfig, PlanModel
from latent_trl.commands.chat import parse
from latent_trl.commands.plan_chat import PlanChat
from latent_trl.commands.plan_replies import PlanAnswerer
from latent_trl.commands.remote import remote_answerer
from latent_trl.data.prompts import PromptEncoder
from latent_trl.generation.action_law import ActionLaw
from latent_trl.generation.answers import end_tokens
from latent_trl.generation.choice import ActionChoice
from latent_trl.serving.plan_engine import TransformersPlanEngine

QUESTION, PLANS, LONGEST = "what color is it?", 4, 48


def plan_model(segment="answer"):
    """Plans that say different things, and a chooser whose logits differ by some."""
    backbone = AutoModelForImageTextToText.from_pretrained(CARDS / "pocket-vlm", dtype="float32")
    ends = list(range(0, 1000, 3)) if segment == "switch" else None
    model = PlanModel(backbone, PlanConfig(num_plans=PLANS, init_std=0.5, segment=segment, segment_end_token_ids=ends))
    torch.nn.init.normal_(model.chooser.output.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    if model.has_switch:
        torch.nn.init.normal_(model.chooser.switch.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model.chooser_is_trained = True
    return model


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CARDS / "pocket-vlm", padding_side="left")


@pytest.fixture(scope="module", params=["answer", 3, "switch"])
def served(processor, request):
    """A model of plans, and the address of a server of another one that is the same."""
    engine = TransformersPlanEngine(plan_model(request.param), processor, max_completion_length=LONGEST)
    with serving(engine) as url:
        yield plan_model(request.param), url, engine


@pytest.fixture
def ask(served):
    client = openai.OpenAI(base_url=served[1], api_key="none", max_retries=0)

    def create(how=None, text=QUESTION, image=None, ignore_eos=False, **options):
        messages = asked(text, *[image] * (image is not None))
        extra = {"plans": how, "ignore_eos": ignore_eos}
        return client.chat.completions.create(model="pocket", messages=messages, extra_body=extra, **options)

    return create


def alone(model, processor, choose, text=QUESTION, image=None, length=LONGEST):
    """The model's own answer, its text, and logits where its segments start."""
    encoder = PromptEncoder(processor)
    row = {"prompt": [{"role": "user", "content": text}], "images": [] if image is None else [image]}
    seen = []

    def choice(places, answers, inputs):
        seen.append(model.plan_logits(**inputs)[0])
        return torch.tensor([choose(seen[-1], len(seen) - 1)])

    ends = end_tokens(model.backbone, processor.tokenizer, {})
    (answer,) = model.speak(encoder, [encoder(row)], choice, length, ends)
    return answer, processor.tokenizer.decode(answer.token_ids, skip_special_tokens=True), torch.stack(seen)


def best(logits, segment):
    return int(logits.argmax())


@pytest.mark.parametrize("image", [None, picture("blue")])
def test_an_answer_is_that_of_the_best_plan(served, ask, processor, image):
    model = served[0]
    own, text, logits = alone(model, processor, best, image=image)
    reply = ask(image=image)
    (choice,) = reply.choices
    found = choice.plans
    assert choice.message.content == text and found["ids"] == own.plans and found["starts"] == own.starts
    assert found["log_probs"] == pytest.approx(logits.log_softmax(1).amax(1).tolist(), abs=1e-4)
    assert len(found["tokens"]) == reply.usage.completion_tokens == len(own.token_ids)
    assert choice.finish_reason == ("stop" if own.ended else "length")
    # As long as the answers differ, the test can fail.
    others = {alone(model, processor, lambda logits, _, k=k: k, image=image)[1] for k in range(PLANS)}
    assert len(others) > 1


def test_plans_are_forced_banned_and_biased(served, ask, processor):
    model = served[0]
    held = model.plan_config.segment == "answer"
    for plan in range(PLANS):
        own, text, logits = alone(model, processor, lambda logits, _, plan=plan: plan)
        found = ask({"forced": plan}).choices[0]
        assert found.message.content == text and found.plans["ids"] == own.plans == [plan] * len(own.plans)
        assert found.plans["log_probs"] == pytest.approx(logits.log_softmax(1)[:, plan].tolist(), abs=1e-4)
    free, _, _ = alone(model, processor, best)
    banned = free.plans[0]

    def others(logits, segment):
        return int(logits.index_fill(0, torch.tensor([banned]), -torch.inf).argmax())

    assert ask({"banned": [banned]}).choices[0].plans["ids"] == alone(model, processor, others)[0].plans
    assert set(ask({"bias": {"2": 1e4}}).choices[0].plans["ids"]) == {2}
    if not held:
        own, text, _ = alone(model, processor, lambda logits, i: (1, best(logits, i), 3)[min(i, 2)])
        found = ask({"forced": [1, -1, 3]}).choices[0]
        assert found.message.content == text and found.plans["ids"] == own.plans and len(own.plans) >= 3


def test_a_seed_draws_from_the_law(served, ask, processor):
    model = served[0]
    law = ActionLaw(temperature=2.0, top_k=3)
    choice = ActionChoice(law, generator=torch.Generator().manual_seed(7))
    own, text, _ = alone(model, processor, lambda logits, i: int(choice.choose(logits[None], i)[0]), length=12)
    options = {"temperature": 2, "max_completion_tokens": 12, "seed": 7}
    found = ask({"top_k": 3}, **options).choices[0]
    assert found.plans["ids"] == own.plans and found.message.content == text
    many = ask({"temperature": 50}, seed=1, n=24).choices
    assert {one.plans["ids"][0] for one in many} == set(range(PLANS))
    assert [one.plans for one in ask({"temperature": 50}, seed=1, n=24).choices] == [one.plans for one in many]


def test_a_stream_joined_is_the_answer(ask):
    options = {"seed": 3, "n": 3, "image": picture("green"), "how": {"temperature": 3}}
    whole = ask(**options)
    chunks = list(ask(stream=True, stream_options={"include_usage": True}, **options))
    for own in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == own.index]
        assert "".join(part.delta.content for part in parts) == own.message.content
        assert parts[-1].finish_reason == own.finish_reason and len(parts) == len(own.plans["tokens"])
        for name, values in own.plans.items():
            assert sum((part.plans[name] for part in parts), []) == values
    assert chunks[-1].usage == whole.usage


def test_requests_in_one_batch_get_what_they_get_alone(ask):
    cases = [{"how": {"forced": plan}, "max_completion_tokens": 3 + plan} for plan in range(PLANS)]
    cases += [{"how": {"temperature": 5}, "seed": seed, "text": "what shape is it?"} for seed in range(4)]
    whole = ask().choices[0].message.content
    cases += [{"stop": whole[2:5]}, {"ignore_eos": True, "max_completion_tokens": 20}, {"image": picture()}]
    alone = [ask(**case).choices[0] for case in cases]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(**case).choices[0], cases))
    for one, other in zip(alone, together, strict=True):
        assert one.message == other.message and one.finish_reason == other.finish_reason
        assert one.plans["ids"] == other.plans["ids"] and one.plans["tokens"] == other.plans["tokens"]
    assert alone[-3].message.content == whole[: whole.index(whole[2:5])] and alone[-3].finish_reason == "stop"
    assert len(alone[0].plans["tokens"]) == 3 and len(alone[-2].plans["tokens"]) == 20


@pytest.mark.parametrize(
    "body, param, said",
    [
        (
            {"latent_actions": {"forced": [1]}},
            "latent_actions",
            "no field `latent_actions` here. Did you mean `plans`?",
        ),
        ({"plan": 3}, "plan", "Did you mean `plans.forced`?"),
        ({"top_k": 3}, "top_k", "Did you mean `plans.top_k`?"),
        ({"plans": {"ban": [1]}}, "plans.ban", "Did you mean `banned`?"),
        ({"plans": {"forced": PLANS}}, "plans.forced", "plans are 0 to 3, or -1 for a free segment, got 4"),
        ({"plans": {"forced": [True]}}, "plans.forced.0", "valid integer"),
        ({"plans": {"forced": "1"}}, "plans.forced", "valid array"),
        ({"plans": {"banned": [4]}}, "plans.banned", "plans are 0 to 3, got 4"),
        ({"plans": {"banned": [0, 1, 2, 3]}}, "plans.banned", "must leave at least one plan"),
        ({"plans": {"bias": {"1": 1e9}}}, "plans.bias", "`banned` leaves a plan out"),
        ({"plans": {"temperature": -1}}, "plans.temperature", "For what is the most likely pass 0"),
        ({"temperature": 1, "plans": {"temperature": 2}}, "temperature", "Both are about plans"),
        ({"logprobs": True}, "logprobs", "Those of the plans are in each choice's `plans.log_probs`"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "given their plans. `plans` has `bias`, `banned` and `forced`"),
    ],
)
def test_what_is_wrong_is_named(served, body, param, said):
    message = {"model": "pocket", "messages": asked(QUESTION), **body}
    reply = httpx.post(f"{served[1]}/chat/completions", json=message, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and said in error["message"], error


def test_several_plans_need_segments_and_a_free_one_a_chooser(served, ask):
    model = served[2].model
    if model.plan_config.segment == "answer":
        with pytest.raises(openai.BadRequestError, match="has 2 plans, and a plan is held for the whole answer"):
            ask({"forced": [1, 2]})
    model.chooser_is_trained = False
    try:
        for how in (None, {"forced": -1}):
            with pytest.raises(openai.BadRequestError, match="No chooser has been trained here"):
                ask(how)
        found = ask({"forced": 2}).choices[0].plans
        assert set(found["ids"]) == {2} and set(found["log_probs"]) == {0.0}
    finally:
        model.chooser_is_trained = True


def test_the_plans_are_listed(served):
    model, url, _ = served
    (listed,) = httpx.get(f"{url}/models").json()["data"]
    assert "latent_actions" not in listed and "<|end|>" in listed["plans"].pop("special_tokens")
    assert listed["plans"] == {"num_plans": PLANS, "segment": model.plan_config.segment, "has_chooser": True}


def test_chat_with_a_server_is_chat_with_the_model(served, processor, tmp_path):
    model, url, _ = served
    picture("blue").save(tmp_path / "blue.png")
    said = []
    for answerer in (
        PlanAnswerer(model, processor, 12),
        remote_answerer(url, None, parse(["--url", url, "--max-new-tokens", "12"])),
    ):
        out = io.StringIO()
        chat = PlanChat(answerer, Console(file=out, width=200), "be brief")
        for line in (f"/image {tmp_path / 'blue.png'}", QUESTION, "/plans", "/plan 2", "what shape is it?", "/plan"):
            chat.hear(line)
        # What the chooser takes a plan to be worth is not in the protocol.
        said.append(re.sub(r" \(value [\d.]+\)", "", out.getvalue()))
    assert said[0] == said[1] and said[0].count("plan 2") >= 3


def test_the_command_takes_folders_of_plans(tmp_path, capsys):
    from latent_trl.commands.main import main
    from latent_trl.commands.serve import make_engine
    from latent_trl.commands.serve import parse as parse_serve

    model = plan_model()
    model.save_pretrained(tmp_path / "plans")
    words = [str(tmp_path / "plans"), "--engine", "transformers", "--backbone", str(CARDS / "pocket-vlm")]
    engine = make_engine(parse_serve(words))
    assert isinstance(engine, TransformersPlanEngine) and engine.num_actions == PLANS
    assert main(["serve", str(tmp_path / "plans"), "--engine", "transformers", "--engine-options", '{"a": 1}']) == 1
    assert "`--engine-options` are vLLM's" in capsys.readouterr().err


def test_chat_refuses_options_of_codes(served, capsys):
    from latent_trl.commands.main import main

    with pytest.raises(SystemExit):
        main(["chat", "--url", served[1], "--greedy"])
    assert "`--greedy` is for codes a token, and the server answers under plans" in capsys.readouterr().err
