"""PCogAlignBench on a small folder of the published layout."""

import json

import pytest
from task_folders import pcogalign_folder, write_json

from latent_trl.data.pcogalign import pcogalign, reference_request, unanswered, write_references
from latent_trl.data.task_files import LayoutError


@pytest.fixture
def folder(tmp_path):
    return pcogalign_folder(tmp_path)


def test_the_splits_come_from_one_location_set_and_out_of_distribution_is_the_other(folder):
    rows = {split: pcogalign(split, folder) for split in ("sft", "rl", "test", "ood")}
    assert {split: len(some) for split, some in rows.items()} == {"sft": 8, "rl": 3, "test": 4, "ood": 4}
    keys = [key for some in rows.values() for key in some["key"]]
    assert len(set(keys)) == 19
    assert {key.split("-")[0] for split in ("sft", "rl", "test") for key in rows[split]["key"]} == {"HCMAS"}
    assert {key.split("/")[0] for key in rows["ood"]["key"]} == {"HCSHR-golden-test"}
    other = pcogalign("ood", folder, location_set="LS2")
    assert other["prompt"][:] == rows["test"]["prompt"][:]


def test_a_row_holds_the_roles_the_question_the_picture_and_the_reference(folder):
    row = pcogalign("test", folder)[0]
    system, user = row["prompt"]
    assert "Parent at Home; Guard 16 at Park" in system["content"]
    assert user == {"role": "user", "content": "what do I do about HCMAS 16?"}
    assert row["reference"] == "reference 16" and row["key"] == "HCMAS-golden-test/0"
    assert row["images"][0].getpixel((0, 0)) == (160, 60, 200)
    fine = pcogalign("sft", folder, limit=2)
    assert len(fine) == 2 and fine[0]["completion"][0]["content"].startswith("reference")


def test_references_are_written_and_read_back(tmp_path):
    folder = pcogalign_folder(tmp_path / "data", references=False)
    with pytest.raises(LayoutError, match="HCMAS-golden-train.json is missing.*pcogalign_references.py"):
        pcogalign("sft", folder)
    for name in ("LS1", "LS2"):
        images, instances = unanswered(folder, name)
        assert images == folder / "version_v4" and len(instances) == 20
        answers = [None if i == 3 else f"answer {i}" for i in range(20)]
        paths = write_references(tmp_path / "own", name, instances, answers)
        assert [len(json.loads(path.read_text())) for path in paths] == [15, 4]
    rows = pcogalign("test", folder, references=tmp_path / "own")
    assert len(rows) == 4
    for row in rows:
        assert row["prompt"][1]["content"].split()[-1].strip("?") == row["reference"].split()[-1]
    with pytest.raises(ValueError, match="`answers` has 1 that are not `None`"):
        write_references(tmp_path / "own", "LS1", instances[:2], ["a", None])


def test_the_request_for_a_reference_shows_all_that_is_known(folder):
    _, instances = unanswered(folder, "LS2")
    said = reference_request(instances[5], "x")
    for part in ("Guard 5 at Park", "a scene 5", "calm words 5", "what do I do about HCSHR 5?"):
        assert part in said
    instances[5]["eval_info"].pop("EvalHelp")
    with pytest.raises(LayoutError, match=r"x: eval_info has no key 'EvalHelp'; it has \['ImageDesc'\]"):
        reference_request(instances[5], "x")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda i: i.pop("golden_response"), "HCMAS-golden-test.json: instance 1 has no key 'golden_response'"),
        (lambda i: i.pop("query"), "instance 1 has no key 'query'"),
        (lambda i: i.update(individual_RoleSet=["a"]), "instance 1: 'individual_RoleSet' must be a dict"),
        (lambda i: i.update(individual_RoleSet={"Home": 3}), "instance 1: individual_RoleSet: 'Home' must be a str"),
        (lambda i: i.update(image="a.png"), "instance 1: 'image' must be a dict .* got 'a.png'"),
        (lambda i: i["image"].pop("file_path"), "instance 1: image has no key 'file_path'"),
        (lambda i: i["image"].update(file_path="none.png"), "instance 1: its picture .*none.png is missing"),
        (lambda i: i["image"].update(file_path="/etc/x.png"), "'/etc/x.png' lies outside of"),
    ],
)
def test_what_is_laid_out_otherwise_is_named_by_file_and_key(folder, change, said):
    path = folder / "version_v4" / "HCMAS-golden-test.json"
    instances = json.loads(path.read_text())
    change(instances[1])
    write_json(path, instances)
    with pytest.raises(LayoutError, match=said):
        pcogalign("test", folder)


def test_wrong_arguments_are_named(folder):
    with pytest.raises(ValueError, match="`split` must be one of"):
        pcogalign("train", folder)
    with pytest.raises(ValueError, match=r"`location_set` must be one of \['LS1', 'LS2'\], got 'HCMAS'"):
        pcogalign("sft", folder, location_set="HCMAS")
    write_json(folder / "version_v4" / "HCMAS-golden-train.json", [])
    with pytest.raises(LayoutError, match="too few instances for the split 'rl'"):
        pcogalign("rl", folder)
