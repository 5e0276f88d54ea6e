"""Answers to the prompts of a data set: what their reward function is given, and what is averaged."""

import asyncio
import math

import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Picture
from tiny_models import latent
from transformers import GenerationConfig

from latent_trl.commands.evaluate import score
from latent_trl.evaluation.answers import Answers, answer
from latent_trl.rewards.calling import RewardError

OPTIONS = {"max_new_tokens": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def tiny():
    model, tiny = latent("llava")
    return model, tiny.processor


@pytest.fixture(scope="module")
def rows():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    found = [
        {
            "prompt": [{"role": "user", "content": parts}],
            "images": [Picture.new("RGB", (32, 32), (60 * i, 0, 0))],
            "level": i,
        }
        for i in range(5)
    ]
    blocks = [{"type": Value("string"), "text": Value("string")}]
    prompt = [{"role": Value("string"), "content": blocks}]
    return Dataset.from_list(found, features=Features(prompt=prompt, images=Sequence(Image()), level=Value("int64")))


def red(images, **columns):
    """An image reward: how red the picture is."""
    return [pictures[0].getpixel((0, 0))[0] / 60 for pictures in images]


async def ids_seen(prompts, completions, completion_ids, level, **columns):
    """An async reward, which counts the tokens of an answer."""
    await asyncio.sleep(0)
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    return [None if number == 3 else float(len(ids)) for ids, number in zip(completion_ids, level, strict=True)]


def test_image_and_async_rewards_get_what_trainers_give_them(tiny, rows):
    found = answer(*tiny, rows, red, **OPTIONS)
    assert found.rewards == [0.0, 1.0, 2.0, 3.0, 4.0] and found.mean_reward == 2.0
    found = answer(*tiny, rows, ids_seen, **OPTIONS)
    lengths = [len(ids) for ids in found.token_ids]
    assert [reward if not math.isnan(reward) else None for reward in found.rewards] == [
        *map(float, lengths[:3]),
        None,
        float(lengths[4]),
    ]
    assert [len(codes) for codes in found.action_ids] == lengths == [len(tokens) for tokens in found.tokens]


def test_the_command_line_scores_answers_in_the_same_way(tiny, rows):
    found = answer(*tiny, rows, **OPTIONS)
    assert score(red, rows, found) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert math.isnan(score(ids_seen, rows, found)[3])


def test_plain_prompts_have_plain_completions(tiny):
    def plain(prompts, completions, **columns):
        assert prompts == ["abc", "b"]
        return [len(completion) + 0.25 if isinstance(completion, str) else None for completion in completions]

    found = answer(*tiny, [{"prompt": "abc"}, {"prompt": "b"}], plain, **OPTIONS)
    assert found.rewards == [len(text) + 0.25 for text in found.texts]


def test_means_are_over_rows_and_leave_out_what_was_not_scored():
    found = Answers(rewards=[1.0, 2.0, 3.0, 4.0, math.nan, 5.0])
    assert found.mean_reward == 3.0
    assert found.mean_by(list("aabbab")) == {"a": 1.5, "b": 4.0}
    assert math.isnan(Answers(rewards=[math.nan]).mean_reward)


def test_a_reward_that_fails_is_named_and_the_model_keeps_its_mode(tiny, rows):
    def judge(**columns):
        raise TimeoutError("gone")

    model, _ = tiny
    model.train()
    with pytest.raises(RewardError, match="'judge' raised TimeoutError: gone on sample 0 of 2"):
        answer(*tiny, rows, judge, **OPTIONS)
    assert model.training
    model.eval()


def test_each_answer_is_decoded_once(tiny, rows, monkeypatch):
    model, processor = tiny
    decoded = []
    generate = type(model).generate

    def counted(self, **options):
        output = generate(self, **options)
        decoded.append(len(output.sequences))
        return output

    monkeypatch.setattr(type(model), "generate", counted)
    answer(model, processor, rows, red, **OPTIONS)
    assert decoded == [2, 2, 1]


@pytest.mark.parametrize("in_config", [False, True])
def test_answers_end_where_generate_ends_them(tiny, rows, in_config):
    model, processor = tiny
    (free, *_) = answer(model, processor, rows, **OPTIONS).token_ids
    end = free[1]
    options = {"generation_config": GenerationConfig(eos_token_id=[end])} if in_config else {"eos_token_id": end}
    found = answer(model, processor, rows, **OPTIONS, **options)
    assert found.token_ids[0] == free[: free.index(end) + 1]
    assert all(end not in ids[:-1] for ids in found.token_ids)
