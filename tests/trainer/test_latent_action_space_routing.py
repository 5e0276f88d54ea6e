"""Exactly the parameters of METHOD's table change in each stage; every other tensor keeps its bytes."""

import pytest
from learning_runs import STAGES, build_sft, build_space, changed, tensors, text_rows
from peft import LoraConfig
from tiny_models import latent, latent_config, llava

from latent_trl import LatentActionModel
from latent_trl.trainer.run.component_training import train_only
from latent_trl.trainer.space.stages import STAGE_COMPONENTS

MODELS = {
    "VLM, own head": ("llava", {}),
    "VLM, tied head": ("llava", {"tie_word_embeddings": True}),
    "VLM, token types": ("gemma3", {}),
    "text, own head": ("llama", {}),
    "text, tied head": ("llama", {"tie_word_embeddings": True}),
}


def rows_for(family: str) -> dict:
    return {"paired": text_rows()} if family == "llama" else {}


def trained_names(model, components) -> set[str]:
    return {f"{c}.{name}" for c in components for name, _ in getattr(model, c).named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_stage_changes_its_components_and_nothing_else(kind, stage, tmp_path):
    family, backbone = MODELS[kind]
    if family == "llama" and stage == "projector":
        pytest.skip("a text model has no projector")
    config = latent_config(stage="none" if stage == "inverse_dynamics" else "inverse_dynamics")
    trainer = build_space(tmp_path, family, config, backbone=backbone, stages=[stage], **rows_for(family))
    before = tensors(trainer.model)
    trainer.train()
    names = changed(before, tensors(trainer.model))
    components = [name for name in STAGE_COMPONENTS[stage] if getattr(trainer.model, name) is not None]
    assert names == trained_names(trainer.model, components)


@pytest.mark.parametrize("read_out", ["subtract", "last_block"])
def test_the_other_read_outs_change_the_same(read_out, tmp_path):
    trainer = build_space(
        tmp_path, config=latent_config(read_out=read_out), stages=["inverse_dynamics"], inverse_dynamics_max_steps=2
    )
    before = tensors(trainer.model)
    trainer.train()
    names = changed(before, tensors(trainer.model))
    assert names == trained_names(trainer.model, STAGE_COMPONENTS["inverse_dynamics"])


@pytest.mark.parametrize("kind", MODELS)
def test_sft_changes_the_adapter_and_nothing_else(kind, tmp_path):
    family, backbone = MODELS[kind]
    trainer = build_sft(tmp_path, family, backbone=backbone, **({"rows": text_rows()} if family == "llama" else {}))
    before = tensors(trainer.model)
    trainer.train()
    names = changed(before, tensors(trainer.model))
    adapter = {name for name in before if ".lora_" in name}
    assert names == adapter and all("backbone." in name and "vision" not in name for name in adapter)
    assert trainer.model.config.stage == "sft"


def test_sft_trains_the_adapter_that_is_asked_for(tmp_path):
    trainer = build_sft(tmp_path, peft_config=LoraConfig(r=2, target_modules=["v_proj"], exclude_modules=".*vision.*"))
    before = tensors(trainer.model)
    trainer.train()
    adapter = {name for name in before if ".lora_" in name}
    assert changed(before, tensors(trainer.model)) == adapter
    assert adapter and all("v_proj" in name for name in adapter)
    with pytest.raises(ValueError, match="has an adapter already"):
        build_sft(tmp_path, model=trainer.model, peft_config=LoraConfig())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [["model.language_model.layers.2", "model.language_model.norm"], ["lm_head"]])
def test_sft_changes_the_named_layers_and_nothing_else(tied, layers, tmp_path):
    trainer = build_sft(tmp_path / "run", backbone={"tie_word_embeddings": tied}, trained_layers=layers)
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    wanted = {name for name in before if name.startswith(tuple(f"backbone.{layer}" for layer in layers))}
    if tied and layers == ["lm_head"]:
        wanted |= {"backbone.model.language_model.embed_tokens.weight"}
    assert wanted and changed(before, after) == wanted
    trainer.save_model(tmp_path / "saved")
    again = LatentActionModel.from_pretrained(tmp_path / "saved", llava(tie_word_embeddings=tied).model)
    assert changed(after, tensors(again)) == set()


def test_nothing_to_train_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="names no tensor of the backbone. Names begin with"):
        build_sft(tmp_path, trained_layers=["model.layers.99"])
    with pytest.raises(ValueError, match="Choose one"):
        build_sft(tmp_path, trained_layers=["lm_head"], peft_config=LoraConfig())

    model, _ = latent("llava")
    with pytest.raises(ValueError, match="No parameter is left to train"):
        train_only(model, ())
