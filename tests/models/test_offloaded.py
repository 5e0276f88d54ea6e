"""Backbones whose tensors are elsewhere: offloaded layers work, and what cannot work is named."""

import pytest
import torch
from tiny_models import latent, latent_config
from transformers import AutoModelForCausalLM

from latent_trl import LatentActionModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A backbone's folder, the model made on it before it was saved, and example inputs."""
    folder = tmp_path_factory.mktemp("backbone")
    model, tiny = latent("llama", latent_config(use_projector=False))
    model.backbone.save_pretrained(folder)
    model.save_pretrained(folder / "actions")
    return folder, model, {name: tiny.inputs[name] for name in ("input_ids", "attention_mask")}


def offloaded(folder, *parts: str):
    """The backbone with these parts on the disk."""
    parts = [f"model.{part}" for part in parts]
    layers = [f"model.layers.{i}" for i in range(3)]
    named = ["model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head"]
    device_map = {name: "disk" if name in parts else "cpu" for name in named}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=folder / "offload")


def test_an_offloaded_layer_is_read_from_where_it_is(saved):
    folder, model, inputs = saved
    backbone = offloaded(folder, "layers.1", "layers.2", "norm")
    assert any(p.is_meta for p in backbone.parameters())
    # It is compared with the fingerprint that the checkpoint has of the whole backbone.
    loaded = LatentActionModel.from_pretrained(folder / "actions", backbone=backbone)
    assert loaded.backbone_view.fingerprint() == model.backbone_view.fingerprint()
    options = {"max_new_tokens": 4, "action_do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))


def test_another_backbone_is_told_though_its_layers_are_offloaded(saved, tmp_path):
    folder, _, _ = saved
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1.0)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are not those that the checkpoint was trained on"):
        LatentActionModel.from_pretrained(folder / "actions", backbone=offloaded(tmp_path, "layers.1"))


def test_an_offloaded_embedding_is_refused_by_name(saved):
    with pytest.raises(ValueError, match="The first tensors of `backbone` are offloaded"):
        LatentActionModel.from_pretrained(saved[0] / "actions", backbone=offloaded(saved[0], "embed_tokens"))
