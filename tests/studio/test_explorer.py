"""Answers that are looked into, against the model's own forward pass."""

import math

import pytest
from PIL import Image

from latent_trl import LatentActionModel
from latent_trl.commands.loading import load_processor
from latent_trl.studio.explorer import Explorer

MODEL = "model_cards/pocket-vlm-latent-actions-grpo"
PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))


@pytest.fixture(scope="module")
def explorer():
    model = LatentActionModel.from_pretrained(MODEL)
    return Explorer(model, load_processor(model), max_new_tokens=12)


@pytest.mark.parametrize("image", [None, PICTURE])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_what_was_taken_is_as_likely_as_generate_says(explorer, image, temperature):
    answer = explorer.answer("what color is it?", image, temperature, banned=[5, 9], seed=3)
    assert answer.tokens and len(answer.tokens) == len(answer.action_ids)
    assert not {5, 9} & set(answer.action_ids)
    for step, (token, code, log_prob) in enumerate(zip(answer.tokens, answer.action_ids, answer.log_probs)):
        found = explorer.alternatives(answer, step)
        (taken,) = [a for a in found if a.taken]
        assert (taken.action_id, taken.token.strip()) == (code, token.strip())
        assert math.isclose(taken.probability, math.exp(log_prob), rel_tol=1e-3, abs_tol=1e-5)
        assert not {5, 9} & {a.action_id for a in found}
        assert len({a.action_id for a in found}) == len(found) == 8


def test_the_likeliest_codes_come_first_and_sum_to_one(explorer):
    answer = explorer.answer("describe the picture.", PICTURE, 1.0)
    found = explorer.alternatives(answer, 0, count=explorer.model.config.num_codes)
    probabilities = [a.probability for a in found]
    assert probabilities == sorted(probabilities, reverse=True)
    assert math.isclose(sum(probabilities), 1, rel_tol=1e-4)


def test_an_answer_goes_on_from_another_code(explorer):
    answer = explorer.answer("describe the picture.", PICTURE)
    step = 2
    other = next(a for a in explorer.alternatives(answer, step) if not a.taken)
    again = explorer.answer("describe the picture.", PICTURE, forced=[*answer.action_ids[:step], other.action_id])
    assert again.action_ids[: step + 1] == [*answer.action_ids[:step], other.action_id]
    assert again.tokens[:step] == answer.tokens[:step]
    assert again.tokens[step].strip() == other.token.strip()


def test_tokens_are_told_as_they_come(explorer):
    told = []
    answer = explorer.answer("what color is it?", PICTURE, on_token=lambda *found: told.append(found))
    assert "".join(token for token, _ in told) == "".join(answer.tokens)
    assert [code for _, code in told][: len(answer.action_ids)] == answer.action_ids


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"question": " "}, "question"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"banned": [128]}, "0 to 127"),
        ({"forced": [-1]}, "0 to 127"),
        ({"banned": range(128)}, "leave at least one"),
    ],
)
def test_what_is_wrong_is_named(explorer, options, text):
    with pytest.raises(ValueError, match=text):
        explorer.answer(**{"question": "what color is it?", **options})


def test_a_step_that_is_not_there(explorer):
    with pytest.raises(IndexError, match="`step` must be 0 to"):
        explorer.alternatives(explorer.answer("what color is it?"), 99)
