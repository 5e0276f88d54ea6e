"""The arithmetic of memory against models that are there, and the command that prints it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_configs import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from latent_trl import LatentActionConfig, LatentActionModel
from latent_trl.commands import plan
from latent_trl.commands.arguments import UsageError
from latent_trl.commands.main import main
from latent_trl.sizing.hours import H100, rl_step_seconds
from latent_trl.sizing.layout import AUTOCAST, COMPONENTS, Layout
from latent_trl.sizing.memory import TRAINED, Batch, phases

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "olmo2", "mixtral"]
POCKET = "model_cards/pocket-vlm"


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family):
    config = tiny_config(family)
    model = LatentActionModel.from_backbone(AutoModelForCausalLM.from_config(config), LatentActionConfig(num_codes=16))
    model.new_component("value_head")
    layout = Layout.of_config(config, num_codes=16)
    assert layout.parameters("backbone") == sum(p.numel() for p in model.backbone.parameters())
    for name in COMPONENTS:
        part = getattr(model, name)
        assert (part is None) == (name not in layout.components)
        if part is not None:
            assert layout.parameters(name) == sum(p.numel() for p in part.parameters()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_and_activations_are_those_of_the_real_model(family):
    """Counted on the meta device at one length, and on the CPU at another."""
    config = tiny_config(family)
    layout = Layout.of_config(config)
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).get_decoder()
    length, kept, alive = 96, {}, []

    def keep(tensor):
        scores = tensor.ndim >= 2 and tensor.shape[-2:] == (length, length)
        if length in tensor.shape and not scores and not (tensor.is_leaf and tensor.requires_grad):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    states = torch.randn(1, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(inputs_embeds=states, use_cache=False)
    counted = layout.activation_bytes(layout.backbone.get_decoder()) / AUTOCAST
    # On the meta device attention is taken apart: some copies more than of a fused kernel, no statistics.
    assert 0.9 < counted / (sum(kept.values()) / length) < 1.3

    cache = DynamicCache(config=config)
    with torch.no_grad():
        decoder(inputs_embeds=states, past_key_values=cache, use_cache=True)
    windows = [layer for layer in cache.layers if layer.keys.shape[-2] < length]
    if not windows:
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / length
        assert layout.cache_bytes(layout.backbone.get_decoder()) == real


def three_billion() -> Layout:
    from presets import PRESETS
    from transformers import Qwen2_5_VLConfig

    preset = PRESETS["3b"]
    vision = {**preset.vision, "out_hidden_size": preset.text["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=preset.text, vision_config=vision, tie_word_embeddings=True)
    # As in the run that hours are calibrated on.
    return Layout.of_config(config, policy_decoder={"num_hidden_layers": preset.policy_layers})


def test_the_layout_of_3b():
    layout = three_billion()
    found = {name: round(layout.parameters(name) / 1e6) for name in ("backbone", "world_model", "policy")}
    assert found == {"backbone": 3755, "world_model": 225, "policy": 617}
    # 36 layers of 2 heads of 128, keys and values, 2 bytes.
    assert layout.cache_bytes(layout.backbone.get_decoder()) == 36 * 2 * 2 * 128 * 2
    by_name = {phase.name: phase for phase in phases(layout)}
    assert by_name["rl: update"].training == layout.parameters("policy") * TRAINED
    # The decoder's linear maps, and no vision tower.
    assert layout.quantizable() == 36 * (2048 * (2048 + 2 * 256 + 2048) + 3 * 2048 * 11_008)


def test_what_weights_and_training_take():
    """Of Qwen2.5-VL-3B's layout, by numbers of parameters that are known."""
    backbone, world_model, inverse, policy = 3_754_622_976, 225_443_840, 308_572_160, 616_880_128
    codebook, projector, linear = 262_144, 16_789_504, 2_774_532_096
    by_name = {phase.name: phase for phase in phases(three_billion())}
    used = codebook + world_model + projector
    assert by_name["learn: inverse_dynamics"].training == 16 * (inverse + codebook + world_model)
    assert by_name["learn: inverse_dynamics"].weights == 2 * backbone + 4 * (policy + projector)
    assert by_name["learn: policy"].training == 16 * policy
    for name, bytes_each in (("rl: rollout", 12), ("rl: update", 16)):
        assert by_name[name].training == bytes_each * policy
        assert by_name[name].weights == 2 * backbone + 4 * used
    assert by_name["serve"].training == 0 and by_name["serve"].weights == 2 * (backbone + used + policy)
    packed = {phase.name: phase for phase in phases(three_billion(), four_bit=True, reference=True)}
    assert packed["rl: update"].weights == pytest.approx(2 * backbone - 1.48 * linear + 4 * (used + policy))


def test_seconds_are_near_the_run_that_they_were_calibrated_on():
    batch = Batch(prompt_length=336, completion_length=256)
    rollout, update = rl_step_seconds(three_billion(), H100, batch)
    assert rollout == pytest.approx(2.94, rel=0.35)
    assert update == pytest.approx(0.129, rel=0.35)


def test_rows_that_fit_are_the_most_that_fit():
    memory = 24 * 2**30
    for phase in phases(three_billion(), gradient_checkpointing=True):
        rows = phase.rows_that_fit(memory)
        assert phase.needed(rows + 1) > memory
        assert rows == 0 or phase.needed(rows) <= memory


def test_each_choice_takes_what_it_should():
    layout = three_billion()

    def total(**choices):
        return {phase.name: phase.total for phase in phases(layout, **choices)}

    plain = total()
    assert all(total(four_bit=True)[name] < plain[name] for name in plain)
    checkpointed = total(gradient_checkpointing=True)
    assert {name for name in plain if checkpointed[name] < plain[name]} == {
        "learn: inverse_dynamics",
        "learn: joint",
        "learn: policy",
        "sft",
        "rl: update",
    }
    more = {name for name in plain if total(reference=True)[name] > plain[name]}
    assert more == {"rl: rollout", "rl: update"}
    assert total(value_head=True)["rl: update"] > plain["rl: update"]
    assert total(batch=Batch(rows=8))["learn: policy"] > plain["learn: policy"]


def test_the_command_says_what_fits_and_what_helps(capsys, tmp_path):
    AutoConfig.from_pretrained(POCKET).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--gpu", "24GB", "--policy_layers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(phase["fits"] and phase["rows_that_fit"] > phase["rows"] for phase in found["phases"])
    assert main(["plan", str(tmp_path), "--gpu", "1.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    short = [phase for phase in found["phases"] if not phase["fits"]]
    assert short and all(phase["what_helps"] for phase in short)
    assert main(["plan", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "rl: update" in shown and "Arithmetic" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("text", ["24", "24GB", "24 GiB", "24g", "24gb"])
def test_sizes_of_a_gpu(text):
    assert plan.gpu_memory(text) == 24


@pytest.mark.parametrize("text", ["", "a100", "-3", "0", "24MB", "24 GB x"])
def test_other_sizes_are_refused(text, capsys):
    with pytest.raises(UsageError):
        plan.gpu_memory(text)
    assert "--gpu" in capsys.readouterr().err


def test_what_is_wrong_is_named(capsys, tmp_path):
    AutoConfig.from_pretrained(POCKET).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--policy-width", "33"])
    assert "--policy-width" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--rows", "0"]) == 1
    assert "`rows`" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    assert main(["plan", "model_cards/pocket-vlm-latent-actions"]) == 1
    assert "holds codes a token, and a backbone is asked for" in capsys.readouterr().err
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "plan_config.json").write_text("{}")
    for command in (["plan"], ["learn", "--dataset_name", "shapes", "--model_name_or_path"]):
        assert main([*command, str(tmp_path / "plans")]) == 1
        assert "holds plans, and a backbone is asked for" in capsys.readouterr().err
    for words in (["--learning-tokens", "nan"], ["--rl-steps", "0"]):
        with pytest.raises(SystemExit):
            main(["plan", POCKET, *words])
        assert words[0] in capsys.readouterr().err
