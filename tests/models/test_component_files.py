"""A component is a folder of its own: saved and loaded alone, and refused whenever it is not what it says."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import latent

from latent_trl import (
    CheckpointError,
    Codebook,
    CrossModalProjector,
    InverseDynamicsModel,
    LanguageWorldModel,
    LatentActionPolicy,
    ValueHead,
)

CLASSES = {
    "codebook": Codebook,
    "world_model": LanguageWorldModel,
    "inverse_dynamics": InverseDynamicsModel,
    "policy": LatentActionPolicy,
    "projector": CrossModalProjector,
    "value_head": ValueHead,
}


@pytest.fixture(scope="module")
def whole():
    model, _ = latent("qwen2_5_vl")
    model.new_component("value_head")
    return model


@pytest.fixture
def saved(whole, tmp_path):
    whole.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", CLASSES)
def test_a_component_saves_and_loads_alone(whole, tmp_path, name):
    component = getattr(whole, name)
    component.save_pretrained(tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["config.json", "model.safetensors"]
    loaded = CLASSES[name].from_pretrained(tmp_path / "alone")
    assert loaded.state_dict().keys() == component.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in component.state_dict().items())
    assert loaded.to_config() == component.to_config()


@pytest.mark.parametrize("name", CLASSES)
def test_a_component_loads_from_a_whole_checkpoint(whole, saved, name):
    component = getattr(whole, name)
    for loaded in (CLASSES[name].from_pretrained(saved), CLASSES[name].from_pretrained(saved, subfolder=name)):
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in component.state_dict().items())


def test_a_loaded_policy_computes_the_same(whole, saved):
    policy = LatentActionPolicy.from_pretrained(saved).eval()
    states = torch.randn(2, 5, 32)
    positions = torch.arange(5)[None].expand(3, 2, -1)
    with torch.no_grad():
        torch.testing.assert_close(policy(states, None, positions), whole.policy(states, None, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_on_disk_is_kept_unless_another_is_asked_for(tmp_path, dtype):
    Codebook(4, 3).to(dtype).save_pretrained(tmp_path)
    assert Codebook.from_pretrained(tmp_path).weight.dtype == dtype
    assert Codebook.from_pretrained(tmp_path, dtype=torch.float32).weight.dtype == torch.float32


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "a missing tensor": lambda f: edit_tensors(f, lambda t: t.pop("head.weight")),
    "an extra tensor": lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
    "a wrong shape": lambda f: edit_tensors(f, lambda t: t.update({"head.weight": torch.zeros(16, 31)})),
    "another K": lambda f: edit_config(f, num_codes=17),
    "K of text": lambda f: edit_config(f, num_codes="16"),
    "a negative K": lambda f: edit_config(f, num_codes=-1),
    "a null K": lambda f: edit_config(f, num_codes=None),
    "a list for K": lambda f: edit_config(f, num_codes=[16]),
    "another width": lambda f: edit_config(f, hidden_size=16),
    "a width of zero": lambda f: edit_config(f, hidden_size=0),
    "a missing key": lambda f: edit_config(f, num_codes="DROP"),
    "an extra key": lambda f: edit_config(f, colour="red"),
    "another component": lambda f: edit_config(f, component="Codebook"),
    "no component": lambda f: edit_config(f, component="DROP"),
    "an unknown text model": lambda f: edit_config(f, text_config={"model_type": "nonsense"}),
    "no text model": lambda f: edit_config(f, text_config={}),
    "text for a text model": lambda f: edit_config(f, text_config="llama"),
    "a broken text model": lambda f: edit_config(f, text_config={"model_type": "llama", "hidden_size": "many"}),
    "a text model of no heads": lambda f: edit_config(f, text_config={"model_type": "llama", "num_attention_heads": 0}),
    "a model that is not text": lambda f: edit_config(f, text_config={"model_type": "clip_vision_model"}),
    "no JSON": lambda f: (f / "config.json").write_text("{not json"),
    "bytes": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "a JSON list": lambda f: (f / "config.json").write_text("[1]"),
    "deep JSON": lambda f: (f / "config.json").write_text("[" * 100000),
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "half of the weights": lambda f: cut(f / "model.safetensors", 0.5),
    "all but a byte": lambda f: cut(f / "model.safetensors", 0.9999),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "a lying header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
    "a pickle": lambda f: torch.save({"head.weight": torch.zeros(16, 32)}, f / "model.safetensors"),
    "a folder for weights": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
}


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_component_is_refused(saved, damage):
    DAMAGE[damage](saved / "policy")
    with pytest.raises(CheckpointError) as error:
        LatentActionPolicy.from_pretrained(saved, subfolder="policy")
    assert str(error.value)


def test_nothing_is_unpickled(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"head.weight": Trap()}, saved / "policy" / "model.safetensors")
    torch.save({"head.weight": Trap()}, saved / "policy" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        LatentActionPolicy.from_pretrained(saved)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("subfolder", ["../model", "..", "policy/../../other", "/etc", "policy/../.."])
def test_a_subfolder_stays_inside(saved, subfolder):
    with pytest.raises(CheckpointError, match="inside"):
        LatentActionPolicy.from_pretrained(saved, subfolder=subfolder)


def test_links_do_not_lead_outside(saved, tmp_path):
    outside = tmp_path / "outside"
    (saved / "policy").rename(outside)
    (saved / "policy").symlink_to(outside)
    for options in ({}, {"subfolder": "policy"}):
        with pytest.raises(CheckpointError, match="outside"):
            LatentActionPolicy.from_pretrained(saved, **options)
    (saved / "policy").unlink()
    (saved / "policy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (saved / "policy" / name).symlink_to(outside / name)
    with pytest.raises(CheckpointError, match="outside"):
        LatentActionPolicy.from_pretrained(saved)


def test_links_inside_and_into_the_blobs_of_a_hub_cache_are_followed(whole, saved, tmp_path):
    (saved / "policy").rename(saved / "policy_v1")
    (saved / "policy").symlink_to("policy_v1")
    LatentActionPolicy.from_pretrained(saved)
    cache = tmp_path / "models--user--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc" / "policy"
    snapshot.mkdir(parents=True)
    for path in (saved / "policy_v1").iterdir():
        path.rename(cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(cache / "blobs" / path.name)
    for folder in (snapshot, snapshot.parent):
        loaded = LatentActionPolicy.from_pretrained(folder)
        assert torch.equal(loaded.head.weight, whole.policy.head.weight)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        Codebook.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="missing"):
        Codebook.from_pretrained(tmp_path)


def test_a_checkpoint_cannot_choose_attention_code(saved):
    config = json.loads((saved / "policy" / "config.json").read_text())
    config["text_config"] |= {"attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel"}
    (saved / "policy" / "config.json").write_text(json.dumps(config))
    policy = LatentActionPolicy.from_pretrained(saved)
    assert policy.decoder_stack.decoder.config._attn_implementation in ("sdpa", "eager")


def test_a_component_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    first, second = Codebook(4, 8), Codebook(6, 8)
    (tmp_path / "codebook").mkdir()
    (tmp_path / "codebook" / "notes.txt").write_text("mine")
    (tmp_path / "codebook" / "policy").mkdir()
    first.save_pretrained(tmp_path / "codebook")

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("latent_trl.models.component.save_file", fail)
        with pytest.raises(OSError, match="No space"):
            second.save_pretrained(tmp_path / "codebook")
    assert torch.equal(Codebook.from_pretrained(tmp_path).weight, first.weight)
    second.save_pretrained(tmp_path / "codebook")
    assert torch.equal(Codebook.from_pretrained(tmp_path).weight, second.weight)
    assert (tmp_path / "codebook" / "notes.txt").read_text() == "mine" and (tmp_path / "codebook" / "policy").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebook"]
