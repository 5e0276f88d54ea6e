"""Hard links and names that differ in their case alone: the files of a checkpoint are those of its own names."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import latent

from latent_trl import CheckpointError, Codebook, LatentActionModel
from latent_trl.hub.pull import inspect


@pytest.fixture(scope="module")
def model():
    return latent("llava")[0]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def doubled(path):
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)


def test_hard_links_are_read_and_saving_leaves_the_other_name_as_it_was(model, saved, tmp_path):
    """As hard-linked backups have them: each save is of new files, so that a backup keeps what it had."""
    backup = tmp_path / "backup"
    shutil.copytree(saved, backup, copy_function=os.link)
    before = {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    assert torch.equal(Codebook.from_pretrained(backup).weight, model.codebook.weight)
    with torch.no_grad():
        model.codebook.weight.mul_(2)
    try:
        model.save_pretrained(saved)
        assert torch.equal(Codebook.from_pretrained(saved).weight, model.codebook.weight)
    finally:
        with torch.no_grad():
            model.codebook.weight.div_(2)
    assert {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()} == before
    assert torch.equal(Codebook.from_pretrained(backup).weight, model.codebook.weight)


def test_two_names_of_one_file_are_two_files_after_saving(model, saved, tmp_path):
    weights = saved / "codebook" / "model.safetensors"
    os.link(weights, saved / "codebook" / "copy.safetensors")
    os.link(weights, tmp_path / "outside.safetensors")
    assert torch.equal(Codebook.from_pretrained(saved).weight, model.codebook.weight)
    doubled(tmp_path / "outside.safetensors")
    assert torch.equal(Codebook.from_pretrained(saved).weight, model.codebook.weight)


@pytest.mark.parametrize("other", ["Codebook", "CODEBOOK", "codeboo\u212a", "codebook "])
def test_a_folder_whose_name_collides_is_another(model, saved, other):
    """On a disk that tells cases apart; a name that Unicode folds to the component's is no more the component's."""
    shutil.copytree(saved / "codebook", saved / other)
    doubled(saved / other / "model.safetensors")
    whole = LatentActionModel.from_pretrained(saved, backbone=model.backbone)
    for codebook in (Codebook.from_pretrained(saved), whole.codebook):
        assert torch.equal(codebook.weight, model.codebook.weight)
    assert inspect(str(saved)) is not None
    model.save_pretrained(saved)
    assert (saved / other / "model.safetensors").is_file()
    shutil.rmtree(saved / "codebook")
    with pytest.raises(CheckpointError, match="is missing"):
        Codebook.from_pretrained(saved)


@pytest.mark.parametrize("name", ["Codebook", "latent_action_config.JSON"])
def test_a_record_of_another_case_is_refused(model, saved, name):
    record = saved / "latent_action_config.json"
    if name == "Codebook":
        config = json.loads(record.read_text())
        config["components"] = [name if part == "codebook" else part for part in config["components"]]
        record.write_text(json.dumps(config))
    else:
        record.rename(saved / name)
    with pytest.raises(CheckpointError, match="Codebook" if name == "Codebook" else "latent_action_config.json"):
        LatentActionModel.from_pretrained(saved, backbone=model.backbone)
