"""The published data of MMRole, NLVR and COCO, where `LATENT_TRL_REAL_DATA` names their folder."""

import json
from collections import Counter

import numpy as np
import pytest
from task_folders import real_data, real_mmrole
from tiny_models import IMAGE, qwen2_5_vl

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.images import load_image
from latent_trl.data.mmrole import mmrole
from latent_trl.data.prompts import encode_prompts
from latent_trl.evaluation.judge_protocol import summarize_judgements
from latent_trl.rewards.judge_template import Judgement

OFFICIAL = "official_comment_test_answers_and_rm_scores.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real_mmrole(tmp_path_factory.mktemp("mmrole"))


@pytest.fixture(scope="module")
def official():
    return json.loads((real_data("mmrole") / OFFICIAL).read_text(encoding="utf-8"))


def test_the_official_test_is_in_no_other_split(folder, official):
    """By key and by text."""
    inside = [row for row in official if row["part"] == "in"]
    splits = {s: mmrole(s, folder, skip_unusable=True).with_format(None) for s in ("sft", "rl", "test", "official")}
    assert {name: len(rows) for name, rows in splits.items()} == {"sft": 2401, "rl": 1918, "test": 476, "official": 72}
    said = {
        name: {row["completion"][0]["content"] if name == "sft" else row["reference"] for row in rows}
        for name, rows in splits.items()
    }
    references = {row["reference"].strip() for row in inside}
    assert said["official"] == references and len(references) == 72
    keys = {name: set(rows["key"][:]) for name, rows in splits.items()}
    for name in ("sft", "rl", "test"):
        assert not said[name] & references
        assert not keys[name] & keys["official"]
        assert not any(keys[name] & keys[other] for other in ("sft", "rl", "test") if other != name)
    assert {row["reference"].strip() for row in official if row["part"] == "out"} == set(
        mmrole("ood", folder, skip_unusable=True)["reference"][:]
    )


@pytest.mark.parametrize("profile, most", [("detailed", 14_000), ("condensed", 5_000)])
def test_every_kind_of_dialogue_is_read_with_either_profile(folder, profile, most):
    for dialogues in ("comment", "human-role", "inter-role"):
        rows = mmrole("ood", folder, dialogues, profile, skip_unusable=True).with_format(None)
        assert len(rows) >= 26 and len(set(rows["key"][:])) == len(rows)
        assert max(len(prompt[0]["content"].encode()) for prompt in rows["prompt"]) < most
        speakers = Counter(key.rsplit("/", 1)[1] for key in rows["key"])
        assert ("0" in speakers) == (dialogues == "inter-role")


def test_chinese_characters_get_chinese_instructions(folder):
    rows = mmrole("official", folder, skip_unusable=True).with_format(None)
    chinese = {row["character"] for row in rows if "请始终扮演" in row["prompt"][0]["content"]}
    assert "孙悟空" in chinese and all(any("\u4e00" <= c <= "\u9fff" for c in name) for name in chinese)
    assert not any("Stay in character" in row["prompt"][0]["content"] for row in rows if row["character"] in chinese)


def test_real_rows_become_batches(folder):
    processor = qwen2_5_vl().processor
    rows = mmrole("sft", folder, profile="condensed", skip_unusable=True, limit=3)
    batch = LatentActionDataCollator(processor, vision_token_ids=[IMAGE])([rows[i] for i in range(3)])
    assert batch["has_image"].all() and batch["loss_mask"].any(dim=1).all()
    said = processor.tokenizer.decode(batch["input_ids"][0][batch["loss_mask"][0]], skip_special_tokens=True)
    assert said == rows[0]["completion"][0]["content"]
    prompts = encode_prompts(
        processor, [mmrole("ood", folder, d, skip_unusable=True)[0] for d in ("comment", "inter-role")]
    )
    assert len(prompts["image_grid_thw"]) == 2


def test_the_authors_scores_give_their_ratios(official):
    """Our aggregation of judged answers against the mean over prompts of mean ratios of aspects, by hand."""
    for part, count in (("in", 72), ("out", 26)):
        rows = [row for row in official if row["part"] == part]
        assert len(rows) == count
        for name in rows[0]["scores"]:
            pairs = [row["scores"].get(name) for row in rows]
            judged = [
                Judgement({a: v[0] for a, v in p.items()}, {a: v[1] for a, v in p.items()}) if p else None
                for p in pairs
            ]
            report = summarize_judgements([row["id"] for row in rows], [judged])
            by_hand = [np.mean([v[0] / v[1] for v in p.values()]) for p in pairs if p]
            assert report.mean == pytest.approx(np.mean(by_hand)) and len(report.aspects) == 8
            assert report.num_unscored == sum(not p for p in pairs)


def test_photographs_and_drawings_are_read():
    for name, count in (("coco", 51), ("nlvr", 150)):
        paths = sorted((real_data(name) / "images").iterdir())
        assert len(paths) == count
        for path in paths:
            picture = load_image(path.name, path.parent)
            assert picture.mode == "RGB" and min(picture.size) > 50
