import io
import re
from collections import Counter

import numpy as np
import pytest

from latent_trl.data import shapes

pytest.importorskip("easy_vqa")

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def questions():
    return {split: shapes.shape_questions(split) for split in shapes.SPLITS}


def picture_keys(dataset):
    return {image.tobytes() for images in dataset["images"] for image in images}


def test_splits_share_no_picture(questions):
    base, rl, test = (picture_keys(questions[split]) for split in shapes.SPLITS)
    assert len(base) > 2000 and len(rl) > 1000 and len(test) > 800
    assert base.isdisjoint(rl) and base.isdisjoint(test) and rl.isdisjoint(test)
    assert picture_keys(shapes.shape_pairs("base", limit=300)).isdisjoint(rl | test)


def test_colour_truth_is_what_the_pixels_show(questions):
    for row in questions["test"].filter(lambda row: row["kind"] == "colour"):
        pixels = np.asarray(row["images"][0]).reshape(-1, 3)
        assert (pixels == RGB[row["answer"]]).all(axis=1).sum() > 10


def test_shape_truth_is_what_the_pixels_show(questions):
    rows = questions["test"].filter(lambda row: row["kind"] == "shape")
    agreed = []
    for row in rows:
        drawn = np.asarray(row["images"][0]).min(axis=2) < 200
        box = drawn[drawn.any(axis=1)][:, drawn.any(axis=0)]
        # A rectangle fills its box, a circle pi/4 of it, a triangle half of it; some are cut by the border.
        fill = box.mean()
        agreed.append(row["answer"] == ("triangle" if fill < 0.68 else "circle" if fill < 0.9 else "rectangle"))
    assert np.mean(agreed) > 0.9


def test_yes_no_truth_follows_from_the_pixels(questions):
    rows = [row for row in questions["test"] if row["kind"] == "yes_no"]
    checked = 0
    for row in rows:
        asked = re.findall(r"[a-z]+", row["prompt"][0]["content"])
        for colour in set(asked) & set(shapes.COLOURS):
            pixels = np.asarray(row["images"][0]).reshape(-1, 3)
            seen = (pixels == RGB[colour]).all(axis=1).sum() > 10
            assert row["answer"] == ("yes" if seen else "no")
            checked += 1
    assert checked > 80


@pytest.mark.parametrize("limit", [None, 6, 100, 3000])
def test_kinds_and_polarity_are_exactly_balanced(limit):
    rows = shapes.shape_questions("rl", limit=limit)
    kinds = Counter(rows["kind"])
    assert limit is None or len(rows) == limit // 6 * 6
    assert set(kinds.values()) == {len(rows) // 3} and set(kinds) == set(shapes.KINDS)
    answers = Counter(rows["answer"])
    assert answers["yes"] == answers["no"] == len(rows) // 6


def test_rows_depend_on_the_seed_alone():
    first, same, other = (shapes.shape_questions("rl", limit=30, seed=seed)["prompt"][:] for seed in (0, 0, 1))
    assert first == same != other
    first, same, other = (shapes.shape_pairs("base", limit=30, seed=seed)["messages"][:] for seed in (0, 0, 1))
    assert first == same != other


def test_the_annotator_errs_one_way_at_the_stated_rate():
    import random

    generator = random.Random(0)
    for truth in shapes.ANSWERS:
        kind = "yes_no" if truth in ("yes", "no") else "shape" if truth in shapes.SHAPES else "colour"
        said = Counter(
            word
            for _ in range(2000)
            for word in re.findall("[a-z]+", shapes._answer(kind, truth, shapes.ERROR_RATE, generator))
            if word in shapes.ANSWERS
        )
        wrong = shapes.CONFUSED_WITH.get(truth)
        assert set(said) == ({truth, wrong} if wrong else {truth})
        if wrong:
            assert abs(said[wrong] / 2000 - shapes.ERROR_RATE) < 0.04


def test_clean_pairs_tell_the_truth():
    for row in shapes.shape_pairs("base", limit=200, error_rate=0.0):
        pixels = np.asarray(row["images"][0]).reshape(-1, 3)
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            for colour in set(re.findall("[a-z]+", answer["content"])) & set(shapes.COLOURS):
                assert question["role"] == "user" and answer["role"] == "assistant"
                assert (pixels == RGB[colour]).all(axis=1).sum() > 10


def test_images_are_small_pictures():
    image = shapes.shape_pairs("base", limit=1)[0]["images"][0]
    assert image.size == (64, 64) and image.mode == "RGB"
    image.save(io.BytesIO(), format="PNG")


def test_small_talk_is_short_and_alternates():
    pytest.importorskip("chitchat_dataset")
    rows = shapes.chitchat(limit=500)
    assert len(rows) == 500 and rows.column_names == ["messages"]
    for messages in rows["messages"]:
        assert len(messages) in (2, 4)
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(len(message["content"].split()) <= 18 for message in messages)
    assert len(shapes.chitchat()) > 5000


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(shapes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"easy_vqa.*pip install easy-vqa"):
        shapes.shape_pairs("base", limit=1)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="`split` must be one of"):
        shapes.shape_questions("train")


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_too_few_questions_to_be_balanced_are_refused(limit):
    with pytest.raises(ValueError, match="`limit` must be at least 6"):
        shapes.shape_questions("test", limit=limit)


def test_a_rate_of_errors_is_taken_and_checked():
    rows = shapes.shape_pairs("base", limit=400, seed=1, error_rate=1.0)["messages"]
    said = " ".join(m["content"] for row in rows if len(row) == 4 for m in row if m["role"] == "assistant")
    # What is confused is never said, but in descriptions and verdicts.
    assert "red" in said and not any(word in said for word in ("teal", "brown", "no."))
    with pytest.raises(ValueError, match="`error_rate` must be between 0 and 1, got 1.5"):
        shapes.shape_pairs("base", limit=1, error_rate=1.5)
