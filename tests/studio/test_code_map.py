"""The map of the codebook: places, words and marks, against what the model itself says."""

import re

import numpy as np
import pytest
from PIL import Image

from latent_trl import LatentActionModel
from latent_trl.commands.loading import load_processor
from latent_trl.studio.code_map import MOST_PLACES, OTHERS, drawn, map_codes, words_at
from latent_trl.studio.explorer import Explorer

PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))


@pytest.fixture(scope="module")
def explorer():
    model = LatentActionModel.from_pretrained("model_cards/pocket-vlm-latent-actions-grpo")
    return Explorer(model, load_processor(model), max_new_tokens=24)


@pytest.fixture(scope="module")
def answer(explorer):
    return explorer.answer("describe the picture.", PICTURE)


def test_a_code_says_on_the_map_what_the_answer_says_when_it_is_forced(explorer, answer):
    codes, _ = map_codes(explorer, answer)
    assert [code.code for code in codes] == list(range(128))
    step = 2
    for code in (0, 5, 77):
        forced = explorer.answer("describe the picture.", PICTURE, forced=[*answer.action_ids[:step], code])
        assert codes[code].at(step).word == forced.tokens[step].strip()


def test_tokens_and_probabilities_are_the_answers(explorer, answer):
    codes, _ = map_codes(explorer, answer)
    assert list(words_at(codes)) == list(range(len(answer.action_ids)))
    for step, (token, taken) in enumerate(zip(answer.tokens, answer.action_ids, strict=True)):
        said = {code.code: code.at(step) for code in codes}
        assert [code for code, saying in said.items() if saying.taken] == [taken]
        assert said[taken].word == token.strip()
        assert sum(saying.probability for saying in said.values()) == pytest.approx(1, abs=1e-4)
        for other in explorer.alternatives(answer, step):
            assert said[other.action_id].word == other.token.strip()
            assert said[other.action_id].probability == pytest.approx(other.probability)


def test_places_are_the_two_main_axes(explorer):
    codes, explained = map_codes(explorer)
    vectors = explorer.model.codebook.weight.detach().numpy()
    values, axes = np.linalg.eigh(np.cov(vectors.T))
    assert explained == pytest.approx(values[-2:].sum() / values.sum(), abs=1e-4)
    places = np.array([code.position for code in codes])
    for i, axis in enumerate((axes[:, -1], axes[:, -2])):
        assert abs(np.corrcoef(places[:, i], vectors @ axis)[0, 1]) == pytest.approx(1, abs=1e-4)


def test_of_a_long_answer_tokens_are_read_from_its_beginning_to_its_end(explorer, monkeypatch):
    monkeypatch.setattr("latent_trl.studio.code_map.MOST_PLACES", 3)
    answer = explorer.answer("describe the picture.", PICTURE)
    steps = list(words_at(map_codes(explorer, answer)[0]))
    assert len(steps) == 3 < MOST_PLACES and steps[0] == 0 and steps[-1] == len(answer.action_ids) - 1


def test_the_drawing_has_every_code_its_word_and_its_marks(explorer, answer):
    codes, _ = map_codes(explorer, answer)
    taken = answer.action_ids[1]
    picture = drawn(codes, 1, chosen=3)
    groups = dict(re.findall(r'<g class="([^"]*)" data-code="(\d+)">', picture)[i][::-1] for i in range(128))
    assert sorted(map(int, groups)) == list(range(128))
    assert groups["3"].split() == ["code", "chosen"] and groups[str(taken)].split()[:2] == ["code", "taken"]
    for code in codes:
        assert f"<title>code {code.code}: {code.at(1).word}</title>" in picture
    colour = dict(re.findall(r'data-code="(\d+)">.*?fill="([^"]*)"', picture))
    assert len({colour[str(code.code)] for code in codes if code.at(1).word == codes[0].at(1).word}) == 1


def test_without_an_answer_codes_are_grey(explorer):
    picture = drawn(map_codes(explorer)[0])
    assert set(re.findall(r'fill="([^"]*)"', picture)) == {OTHERS} and "legend" not in picture


def test_words_that_look_like_markup_are_text(explorer, answer):
    codes, _ = map_codes(explorer, answer)
    codes[0].at(0).word = "<script>"
    assert "<script>" not in drawn(codes, 0) and "&lt;script&gt;" in drawn(codes, 0)
