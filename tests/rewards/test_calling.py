"""One way to call rewards: what each kind of function is given, how often it is called, and what is named."""

import asyncio
import base64
import functools
import io
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from latent_trl.rewards.calling import RewardCaller, RewardError

PROMPTS = ["one", "two", "three", "four"]
COMPLETIONS = ["a", "bb", "ccc", "dddd"]
IDS = [[1], [2, 2], [3, 3, 3], [4]]
ROWS = [{"prompt": prompt, "level": i, "images": [f"picture {i}"]} for i, prompt in enumerate(PROMPTS)]


def call(functions, **options):
    caller = RewardCaller(functions, **options)
    rewards = caller(ROWS, PROMPTS, COMPLETIONS, IDS)
    caller.raise_any(rewards)
    return rewards


def constant(value):
    def reward(completions, **columns):
        return [value] * len(completions)

    return reward


def with_third(value):
    def bad(completions, **columns):
        return [0.0, 1.0, value, 0.5][: len(completions)]

    return bad


def test_a_function_gets_every_column_and_the_context():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * 4

    rows = [{**row, "completion": "of the data", "completion_ids": [9]} for row in ROWS]
    rows[2]["answer"] = "only here"
    RewardCaller(reward)(rows, PROMPTS, COMPLETIONS, IDS, trainer_state="state", log_metric=print)
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "level": [0, 1, 2, 3],
        "images": [["picture 0"], ["picture 1"], ["picture 2"], ["picture 3"]],
        "answer": [None, None, "only here", None],
        "trainer_state": "state",
        "log_metric": print,
    }


def test_every_kind_of_function_in_the_order_given():
    async def slow(completions, **columns):
        await asyncio.sleep(0.01)
        return [float(len(completion)) for completion in completions]

    def some(completions, **columns):
        return (None if i % 2 else i for i in range(len(completions)))

    class Async:
        async def __call__(self, completions, **columns):
            return torch.arange(4)

    def answers(completions, bonus, **columns):
        return [np.float64(0.5), np.bool_(True), Fraction(1, 4), torch.tensor(bonus)]

    caller = RewardCaller([slow, some, Async(), functools.partial(answers, bonus=7)])
    assert caller.names == ["slow", "some", "Async", "answers"]
    rewards = caller(ROWS, PROMPTS, COMPLETIONS, IDS)
    assert rewards.dtype == torch.float32 and rewards.shape == (4, 4)
    nan = math.nan
    expected = torch.tensor([[1, 2, 3, 4], [0, nan, 2, nan], [0, 1, 2, 3], [0.5, 1, 0.25, 7]]).T
    assert torch.equal(rewards.nan_to_num(-1), expected.nan_to_num(-1))


def test_async_functions_run_side_by_side_also_where_a_loop_runs():
    meeting = []

    def waits_for(other):
        async def reward(completions, **columns):
            meeting.append(other)
            while len(meeting) < 2:
                await asyncio.sleep(0.001)
            return [1.0] * len(completions)

        return reward

    async def inside_a_loop():
        return call([waits_for("b"), waits_for("a")])

    assert call([waits_for("b"), waits_for("a")]).tolist() == [[1.0, 1.0]] * 4
    meeting.clear()
    assert asyncio.run(inside_a_loop()).tolist() == [[1.0, 1.0]] * 4


def test_an_async_function_that_would_wait_for_itself_is_told_so():
    async def inner(completions, **columns):
        return [0.0] * len(completions)

    async def outer(completions, **columns):
        return RewardCaller(inner).score(ROWS, PROMPTS, COMPLETIONS, IDS)[0]

    with pytest.raises(RewardError, match="'outer' raised RuntimeError: An async reward cannot wait"):
        call(outer)


def test_a_connection_of_an_async_function_outlives_the_call():
    """Clients belong to the event loop in which they were made."""
    loops = []

    async def reward(completions, **columns):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    call(reward)
    call(reward)
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize(
    "value, words",
    [
        (math.nan, "returned nan for sample 2 of 4"),
        (-math.inf, "returned -inf for sample 2 of 4"),
        (np.float16(math.inf), "returned inf for sample 2 of 4"),
        (1e39, r"returned 1e\+39, which is beyond float32, for sample 2 of 4"),
        (-1e40, r"returned -1e\+40, which is beyond float32, for sample 2 of 4"),
        (10**400, "returned 1000.*, which is beyond float32, for sample 2 of 4"),
        (torch.tensor(1e300, dtype=torch.float64), r"returned 1e\+300, which is beyond float32"),
        ("0.7", r"returned '0.7', a str, for sample 2 of 4 \(prompt 'three', completion 'ccc'\)"),
        ([1.0], r"returned \[1.0\], a list"),
        (1 + 2j, r"returned \(1\+2j\), a complex"),
    ],
)
def test_what_is_no_finite_float32_is_named(value, words):
    with pytest.raises(RewardError, match=f"'bad' {words}"):
        call(with_third(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, -1e40, 10**400])
def test_with_skip_it_counts_as_not_scored(value, caplog):
    rewards = call([with_third(value), constant(1.0)], on_nonfinite="skip")
    assert rewards[:, 0].isnan().tolist() == [False, False, True, False] and rewards[:, 1].tolist() == [1.0] * 4
    assert "for sample 2 of 4" in caplog.text and "It counts as not scored." in caplog.text


def test_the_largest_float32_is_a_reward():
    largest = torch.finfo(torch.float32).max
    assert call(constant(largest)).tolist() == [[largest]] * 4


@pytest.mark.parametrize("answer", [[0.0] * 3, [0.0] * 5, [], 0.5, "abcd", None, {1, 2, 3, 4}, np.array(0.5)])
def test_wrong_lengths_and_kinds_are_named(answer):
    with pytest.raises(RewardError, match="'reward' (returned . rewards for 4 completions|must return a list of 4)"):
        call(lambda_named(answer))


def lambda_named(answer):
    def reward(**columns):
        return answer

    return reward


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "fails, words",
    [
        (lambda completions: True, "'judge' raised KeyError: 'gone' on sample 0 of 4 .prompt 'one', completion 'a'"),
        (
            lambda completions: len(completions) > 1,
            "'judge' raised KeyError: 'gone' on a batch of 4 samples, though not on the first of them alone",
        ),
    ],
)
def test_a_function_that_raises_is_called_once_more(asynchronous, fails, words):
    calls = []

    def judge(prompts, completions, completion_ids, level, **columns):
        calls.append((prompts, completions, completion_ids, level, columns))
        if fails(completions):
            raise KeyError("gone")
        return [0.0]

    async def judge_asynchronously(**columns):
        return judge(**columns)

    judge_asynchronously.__name__ = "judge"
    with pytest.raises(RewardError, match=words) as error:
        call(judge_asynchronously if asynchronous else judge)
    assert isinstance(error.value.__cause__, KeyError)
    assert calls[1:] == [(["one"], ["a"], [[1]], [0], {"images": [["picture 0"]]})]


def test_a_batch_of_one_is_not_called_again():
    calls = []

    def judge(**columns):
        calls.append(columns)
        raise RuntimeError("gone")

    with pytest.raises(RewardError, match="raised RuntimeError: gone on sample 0 of 1"):
        RewardCaller(judge).score(ROWS[:1], PROMPTS[:1], COMPLETIONS[:1], IDS[:1])
    assert len(calls) == 1


def test_another_error_on_the_first_sample_is_told():
    def judge(completions, **columns):
        raise ValueError(f"{len(completions)} samples")

    with pytest.raises(RewardError, match="4 samples on a batch of 4 samples, and ValueError: 1 samples on the first"):
        call(judge)


def test_a_generator_that_raises_half_way_is_named():
    def reward(completions, **columns):
        yield 1.0
        raise OSError("broken pipe")

    with pytest.raises(RewardError, match="'reward' raised OSError: broken pipe"):
        call(reward)


def test_errors_are_kept_until_all_processes_know_of_them():
    called = []

    def after(completions, **columns):
        called.append(len(completions))
        return [1.0] * len(completions)

    caller = RewardCaller([with_third(math.nan), after])
    rewards = caller(ROWS, PROMPTS, COMPLETIONS, IDS)
    assert rewards[:, 0].isinf().all() and called == [4]
    with pytest.raises(RewardError, match="'bad' returned nan"):
        caller.raise_any(rewards)
    good = RewardCaller(after)
    good.raise_any(good(ROWS, PROMPTS, COMPLETIONS, IDS))


def test_a_row_that_nothing_scores_is_warned_of_once_without_its_picture(caplog):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    blocks = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    rows = [{"prompt": [{"role": "user", "content": blocks}], "images": [url]}] * 4
    completions = [[{"role": "assistant", "content": "a cat " * 200}]] * 4

    def silent(completions, **columns):
        return [0.0, None, None, None]

    RewardCaller([silent, with_third(None)])(rows, [row["prompt"] for row in rows], completions, IDS)
    assert len(caplog.records) == 1 and len(caplog.text) < 1000
    assert "returned None for sample 2 of 4 (prompt 'user: What is it?', completion 'a cat a cat" in caplog.text
    assert "base64" not in caplog.text


def test_no_samples_call_nothing():
    def reward(**columns):
        raise AssertionError

    caller = RewardCaller([reward, reward])
    assert caller([], [], [], []).shape == (0, 2) and caller.score([], [], [], []) == [[], []]


def test_on_a_single_process_numbers_come_back_as_they_are():
    caller = RewardCaller([constant(0.1), with_third(None)])
    assert caller.score(ROWS, PROMPTS, COMPLETIONS, IDS) == [[0.1] * 4, [0.0, 1.0, None, 0.5]]
    with pytest.raises(RewardError, match="'bad' returned inf"):
        RewardCaller(with_third(math.inf)).score(ROWS, PROMPTS, COMPLETIONS, IDS)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`names` must be as many as `functions`, 1; got 2"):
        RewardCaller(constant(1), names=["a", "b"])
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'stop' or 'skip', got 'warn'"):
        RewardCaller(constant(1), on_nonfinite="warn")
    with pytest.raises(ValueError, match="column 'prompts' has the name of an argument"):
        RewardCaller(constant(1))([{"prompts": 1}], ["?"], ["a"], [[1]])


@pytest.fixture(scope="module")
def scorer():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForSequenceClassification(config).eval(), tokenizer


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_model_is_scored_as_trl_scores_it(scorer, conversational, monkeypatch):
    model, tokenizer = scorer
    template = "{% for m in messages %}{{ shout }}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompts, completions = PROMPTS, COMPLETIONS
    texts = [p + c for p, c in zip(prompts, completions)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
        messages = [p + c for p, c in zip(prompts, completions)]
        texts = tokenizer.apply_chat_template(messages, tokenize=False, shout="!!")
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        expected = model(**inputs).logits[:, 0]
    caller = RewardCaller(
        [constant(1.0), model], processing_classes=[None, tokenizer], chat_template_kwargs={"shout": "!!"}
    )
    rewards = caller(ROWS, prompts, completions, IDS)
    torch.testing.assert_close(rewards[:, 1], expected, atol=1e-6, rtol=1e-5)
    assert not rewards.requires_grad


def test_a_reward_models_nan_is_named(scorer, monkeypatch):
    model, tokenizer = scorer
    monkeypatch.setattr(model.score.weight, "data", torch.full_like(model.score.weight, math.nan))
    with pytest.raises(RewardError, match="The reward model .* gave nan for sample 0 of 4"):
        call(model, processing_classes=tokenizer)
    with pytest.raises(ValueError, match="The reward model .* needs its tokenizer in `processing_classes`"):
        RewardCaller(model)
