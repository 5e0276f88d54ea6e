"""A batch of prompts: what is read of typed lines, and answers and rewards as `latent-trl evaluate` has them."""

import math

import pytest
from PIL import Image

from latent_trl import LatentActionModel
from latent_trl.commands.loading import load_processor
from latent_trl.rewards.exact_match import ExactMatchReward
from latent_trl.studio.batch import MOST_PROMPTS, ScoredAnswers, answer_batch, typed_rows
from latent_trl.studio.explorer import Explorer

PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))


@pytest.fixture(scope="module")
def explorer():
    model = LatentActionModel.from_pretrained("model_cards/pocket-vlm-latent-actions-grpo")
    return Explorer(model, load_processor(model), max_new_tokens=12)


def test_lines_are_prompts_with_or_without_a_right_answer():
    rows = typed_rows(" what color is it? => red\n\nwhat is it?\n", PICTURE)
    assert [row["prompt"][0]["content"] for row in rows] == ["what color is it?", "what is it?"]
    assert [row["answer"] for row in rows] == ["red", ""] and all(row["images"] == [PICTURE] for row in rows)
    assert typed_rows("what is it?") == [{"prompt": [{"role": "user", "content": "what is it?"}]}]


@pytest.mark.parametrize(("text", "message"), [("", "Type a prompt"), (" \n", "Type a prompt"), ("a\n=> b", "Line 2")])
def test_lines_without_a_prompt_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        typed_rows(text)


def test_answers_are_those_that_are_asked_for_one_by_one(explorer):
    questions, told = ["what color is it?", "is it red?", "describe the picture."], []

    def length(completions, **columns):
        return [None if "picture" in prompt[-1]["content"] else 1.0 for prompt in columns["prompts"]]

    rows = typed_rows("\n".join(questions), PICTURE)
    found = answer_batch(explorer, rows, {"length": length}, progress=told.append)
    assert found.prompts == questions and told == [3]
    assert found.texts == [explorer.answer(question, PICTURE).text for question in questions]
    assert found.rewards["length"][:2] == [1.0, 1.0] and math.isnan(found.rewards["length"][2])
    assert found.means == {"length": 1.0}


def test_rewards_see_the_right_answers(explorer):
    right = explorer.answer("what color is it?", PICTURE).text.removeprefix("it is ").removesuffix(".")
    rows = typed_rows(f"what color is it? => {right}\nwhat color is it? => teal", PICTURE)
    assert answer_batch(explorer, rows, {"exact_match": ExactMatchReward()}).rewards == {"exact_match": [1.0, 0.0]}


def test_samples_are_those_of_their_seed(explorer):
    rows = typed_rows("\n".join(["describe the picture."] * 8), PICTURE)
    first, again, other = (answer_batch(explorer, rows, {}, 2.0, seed).texts for seed in (3, 3, 4))
    assert first == again != other and len(set(first)) > 1


@pytest.mark.parametrize(
    ("rows", "temperature", "message"),
    [(MOST_PROMPTS + 1, 0.0, "are more than"), (1, -1.0, "temperature"), (1, math.nan, "temperature")],
)
def test_what_is_wrong_is_named(explorer, rows, temperature, message):
    with pytest.raises(ValueError, match=message):
        answer_batch(explorer, typed_rows("\n".join("a" * rows)), {}, temperature)


def test_a_function_that_scores_nothing_has_no_mean():
    assert math.isnan(ScoredAnswers(["a"], ["b"], {"x": [math.nan]}).means["x"])
