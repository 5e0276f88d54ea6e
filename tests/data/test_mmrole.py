"""MMRole on a small folder of the published layout."""

import json
import logging

import pytest
from task_folders import mmrole_folder, write_json

from latent_trl.data.mmrole import mmrole
from latent_trl.data.task_files import LayoutError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mmrole_folder(tmp_path_factory.mktemp("mmrole"))


@pytest.fixture
def own_folder(tmp_path):
    return mmrole_folder(tmp_path, each=2)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


COMMENTS = "dialogues/in-distribution/comment/Ada_Stone_COCO.json"
PROFILE = "profiles/in-distribution/detailed_profiles/Ada_Stone.json"


def test_the_splits_are_half_four_tenths_and_a_tenth_of_the_dialogues_and_a_file_of_other_characters(folder):
    rows = {split: mmrole(split, folder) for split in ("sft", "rl", "test", "ood")}
    assert {split: len(some) for split, some in rows.items()} == {"sft": 10, "rl": 8, "test": 2, "ood": 10}
    keys = [key for some in rows.values() for key in some["key"]]
    assert len(set(keys)) == 30
    assert {c for split in ("sft", "rl", "test") for c in rows[split]["character"]} == {"Ada Stone", '老 "Lou"'}
    assert set(rows["ood"]["character"]) == {"Bo"}
    assert mmrole("rl", folder)["key"][:] == rows["rl"]["key"][:]
    assert mmrole("rl", folder, seed=1)["key"][:] != rows["rl"]["key"][:]
    assert mmrole("rl", folder, limit=3)["key"][:] == rows["rl"]["key"][:3]


def test_a_row_holds_the_profile_the_picture_and_the_reply(folder):
    row = mmrole("ood", folder)[0]
    system, user = row["prompt"]
    assert system["role"] == "system" and system["content"].count("Bo") > 2
    assert all(f"{name} of Bo" in system["content"] for name in ("personality", "catchphrase"))
    assert user == {"role": "user", "content": "what is in number 0?"}
    assert row["reference"] == "good 0 of COCO/train2017" and row["key"] == "out-of-distribution/comment/0/1"
    assert [image.size for image in row["images"]] == [(48, 32)]
    assert row["images"][0].getpixel((0, 0)) == (0, 90, 20)
    fine = mmrole("sft", folder)
    assert "reference" not in fine.column_names
    assert fine[0]["completion"][0]["role"] == "assistant" and fine[0]["completion"][0]["content"].startswith("good")


def test_every_reply_of_a_longer_dialogue_is_a_row_with_the_turns_before_it(folder):
    first, second = mmrole("ood", folder, dialogues="human-role")
    assert [m["role"] for m in first["prompt"]] == ["system", "user"] and first["reference"] == "hi"
    assert [m["role"] for m in second["prompt"]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in second["prompt"][1:]] == ["hello", "hi", "and now?"]
    assert second["reference"] == "reference words" and second["key"] == "out-of-distribution/human-role/0/3"


def test_two_characters_talk_and_the_second_one_answers(own_folder):
    turns = [("Ada Stone", "look"), ("Bo", "yes"), ("Ada Stone", "so?"), ("Bo", "no")]
    said = [{"role": who, "value": words} for who, words in turns]
    talk = {"id": "x", "image": "a_film/Bo0.png", "conversations": said}
    write_json(own_folder / "dialogues/out-of-distribution/inter-role.json", [talk])
    rows = mmrole("ood", own_folder, dialogues="inter-role")
    assert rows["reference"][:] == ["yes", "no"] and set(rows["character"]) == {"Bo"}


def test_between_two_characters_every_turn_is_a_row_with_its_speakers_profile_and_the_others_name(own_folder):
    profile = json.loads((own_folder / "profiles/out-of-distribution/detailed_profiles/Bo.json").read_text())
    write_json(
        own_folder / "profiles/out-of-distribution/detailed_profiles/Al.json", {k: f"{k} of Al" for k in profile}
    )
    said = [{"role": ("Al", "Bo")[i % 2], "value": words} for i, words in enumerate(("look", "yes", "so?"))]
    write_json(
        own_folder / "dialogues/out-of-distribution/inter-role.json",
        [{"id": "x", "image": "a_film/Bo0.png", "conversations": said}],
    )
    opening, reply, second = mmrole("ood", own_folder, dialogues="inter-role")
    assert [row["character"] for row in (opening, reply, second)] == ["Al", "Bo", "Al"]
    assert [row["key"][-2:] for row in (opening, reply, second)] == ["/0", "/1", "/2"]
    assert [m["role"] for m in opening["prompt"]] == ["system", "user"] and opening["reference"] == "look"
    assert "personality of Al" in opening["prompt"][0]["content"] and "Bo" in opening["prompt"][1]["content"]
    assert [m["content"] for m in reply["prompt"][1:]] == ["look"]
    assert "personality of Bo" in reply["prompt"][0]["content"] and "Al" in reply["prompt"][0]["content"]
    assert [(m["role"], m["content"]) for m in second["prompt"][2:]] == [("assistant", "look"), ("user", "yes")]


def test_a_condensed_profile_takes_the_place_of_the_detailed_one(own_folder):
    for part in ("in-distribution", "out-of-distribution"):
        write_json(own_folder / "profiles" / part / "profiles.json", {"Bo": "in short: Bo", "Ada Stone": "in short"})
    assert "in short: Bo" in mmrole("ood", own_folder, profile="condensed")[0]["prompt"][0]["content"]
    assert "personality of" not in mmrole("ood", own_folder, profile="condensed")[0]["prompt"][0]["content"]
    with pytest.raises(LayoutError, match="the profile .*profiles.json is missing"):
        mmrole("sft", own_folder, profile="condensed")
    with pytest.raises(ValueError, match="`profile` must be one of"):
        mmrole("ood", own_folder, profile="long")
    with pytest.raises(ValueError, match="`split='official'` has comments alone"):
        mmrole("official", own_folder, dialogues="human-role")


def test_chinese_dialogues_get_chinese_instructions(own_folder):
    def translate(dialogues):
        dialogues[0]["conversations"][0]["value"] = "这张图让你想到了什么？"

    edit(own_folder / "dialogues/out-of-distribution/comment.json", translate)
    chinese, english = mmrole("ood", own_folder)["prompt"][:2]
    assert "请始终扮演Bo" in chinese[0]["content"] and "Stay in character" not in chinese[0]["content"]
    assert "Stay in character as Bo" in english[0]["content"]


def test_cocos_pictures_may_lie_elsewhere(own_folder):
    from PIL import Image

    coco = own_folder / "images" / "COCO"
    coco.rename(own_folder / "elsewhere")
    with pytest.raises(LayoutError, match=r"COCO/train2017/Bo0.png is missing. COCO's train2017 .* `coco_folder`"):
        mmrole("ood", own_folder)
    row = mmrole("ood", own_folder, coco_folder=own_folder / "elsewhere" / "train2017")[0]
    assert isinstance(row["images"][0], Image.Image)


def test_dialogues_that_cannot_be_used_are_errors_or_left_out_and_counted(own_folder, caplog):
    def damage(dialogues):
        dialogues[0]["conversations"] = []
        dialogues[1]["image"] = "a_film/none.png"
        dialogues[2]["conversations"][1]["value"] = ""
        dialogues[3]["conversations"].append({"role": "Bo", "value": "again"})

    edit(own_folder / "dialogues/out-of-distribution/comment.json", damage)
    with pytest.raises(LayoutError, match=r"comment/0: 'conversations' has 0 turns.*`skip_unusable=True`"):
        mmrole("ood", own_folder)
    with pytest.raises(LayoutError, match="no dialogue of the split 'ood' can be used"):
        mmrole("ood", own_folder, skip_unusable=True)
    (own_folder / "profiles/in-distribution/detailed_profiles/Ada_Stone.json").unlink()
    with caplog.at_level(logging.WARNING):
        rows = mmrole("sft", own_folder, skip_unusable=True, seed=0)
    assert 0 < len(rows) < 4 and set(rows["character"]) == {'老 "Lou"'}
    assert f"left out of 4 dialogues: {{'no profile': {4 - len(rows)}}}" in caplog.text


@pytest.mark.parametrize(
    "path, change, said",
    [
        (COMMENTS, lambda d: d[1].pop("image"), r"comment/Ada_Stone_COCO/1 has no key 'image'; it has \['conv"),
        (COMMENTS, lambda d: d[0].update(conversations="hi"), r"COCO/0: 'conversations' must be a list .* got 'hi'"),
        (COMMENTS, lambda d: d[0]["conversations"][0].pop("from"), r"conversations\[0\] has no key 'role'"),
        (COMMENTS, lambda d: d[0]["conversations"][1].pop("value"), r"conversations\[1\] has no key 'value'"),
        (COMMENTS, lambda d: d[0].update(image="../../x.png"), r"the picture '../../x.png' lies outside of .*images"),
        (COMMENTS, lambda d: d.insert(0, 3), r"COCO/0 must be a dict with the key 'image', got a int"),
        (PROFILE, lambda d: d.pop("experience"), r"Ada_Stone.json has no key 'experience'"),
        (PROFILE, lambda d: d.update(personality=" "), r"'personality' must be a str that is not empty"),
    ],
)
def test_what_is_laid_out_otherwise_is_named_by_file_and_key(own_folder, path, change, said):
    edit(own_folder / path, change)
    with pytest.raises(LayoutError, match=said):
        for split in ("sft", "rl", "test"):
            mmrole(split, own_folder)


def test_what_is_missing_is_named(tmp_path, own_folder):
    with pytest.raises(LayoutError, match="no folder './nowhere'"):
        mmrole("sft", "./nowhere")
    (own_folder / COMMENTS).write_text("{")
    with pytest.raises(LayoutError, match="Ada_Stone_COCO.json is not JSON"):
        mmrole("sft", own_folder)
    write_json(own_folder / COMMENTS, {"a": 1})
    with pytest.raises(LayoutError, match="Ada_Stone_COCO.json must hold a list, got a dict"):
        mmrole("sft", own_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayoutError, match=r"comment has no .json files.*YanqiDai/MMRole_dataset"):
        mmrole("sft", tmp_path / "empty")
    with pytest.raises(LayoutError, match=r"comment.json is missing"):
        mmrole("ood", tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"`split` must be one of \['sft', 'rl', 'test', 'official', 'ood'\], got 'train'"
    ):
        mmrole("train", own_folder)
    with pytest.raises(ValueError, match="`dialogues` must be one of"):
        mmrole("sft", own_folder, dialogues="chat")


def test_a_hub_id_is_downloaded_once_with_what_is_needed(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert len(mmrole("test", revision="v1")) == 2
    ((name, options),) = asked
    assert name == "YanqiDai/MMRole_dataset" and options["repo_type"] == "dataset" and options["revision"] == "v1"
    assert options["allow_patterns"] == ["dialogues/*", "profiles/*", "images/*"]
