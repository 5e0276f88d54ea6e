"""Every benchmark runs at tiny sizes and writes the figures that it promises; no figure of this size means anything."""

import json
import math
import re
from pathlib import Path

import engine_step
import four_bit_step
import learn_step
import measuring
import pytest
import rl_step
import rollout
import scaling
import torch
import trl
from packaging.version import Version
from presets import PRESETS, build_backbone

DOCS = Path(__file__).parents[2] / "docs" / "speed.md"
KEYS = {
    *("rollout_ratio", "update_ratio", "update_ratio_plain", "step_ratio", "update_memory_ratio"),
    *("rollout_over_backbone_decode", "update_over_policy_only"),
}


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("preset", ["small", "smollm", "3b", "7b"])
def test_rl_step(preset, tmp_path):
    if Version(trl.__version__) < Version("1.16") and not torch.cuda.is_available():
        pytest.skip("This TRL scores tokens with Triton kernels alone, which need a GPU.")
    path = tmp_path / "rl.json"
    result = rl_step.main(["--preset", preset, "--quick", "--repeats", "1", "--device", "cpu", "--json", str(path)])
    assert json.loads(path.read_text()) == result
    assert KEYS <= set(result) and set(result["targets"]) == KEYS
    assert all(result[key] > 0 for key in KEYS) and all(math.isfinite(n) for n in numbers(result))
    assert result["sizes"]["completion_length"] == 4 and "torch" in result["versions"]


def test_rl_step_reports_what_it_has_when_interrupted(tmp_path, monkeypatch):
    if Version(trl.__version__) < Version("1.16") and not torch.cuda.is_available():
        pytest.skip("This TRL scores tokens with Triton kernels alone, which need a GPU.")
    measure_once, calls = rl_step.measure_once, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_once(*arguments)

    monkeypatch.setattr(rl_step, "measure_once", interrupted)
    options = ["--preset", "3b", "--quick", "--repeats", "5", "--device", "cpu", "--no-lora"]
    result = rl_step.main(options)
    assert result["repeats"] == 1 and result["against_lora"] == {}
    assert all(result[key] > 0 for key in KEYS)
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        rl_step.main(options)


def test_learn_step(tmp_path):
    path = tmp_path / "learn.json"
    result = learn_step.main(["--quick", "--repeats", "1", "--rows", "2", "--device", "cpu", "--json", str(path)])
    assert json.loads(path.read_text()) == result
    assert set(result["stages"]) == {"inverse_dynamics", "projector", "joint", "policy"}
    assert all(row["tokens_per_second"] > 0 and row["over_states"] > 0 for row in result["stages"].values())
    assert all(math.isfinite(n) for n in numbers(result))


def test_rollout(tmp_path):
    path = tmp_path / "rollout.json"
    sizes = ["--prompts", "2", "--generations", "4", "--completion-length", "6", "--shortest", "2"]
    result = rollout.main(["--quick", "--repeats", "1", "--device", "cpu", *sizes, "--json", str(path)])
    assert json.loads(path.read_text()) == result
    for kind in ("equal", "mixed"):
        assert {"own loop", "own loop, rows stay", "TRL's generate"} <= set(result["tokens_per_second"][kind])
    assert "own loop over own loop, rows stay, mixed" in result["ratios"]
    assert all(math.isfinite(n) for n in numbers(result))


def test_scaling(tmp_path):
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    small = ["--num-codes", "16", "32", "--completion-length", "3", "4", "--generations", "2", "4"]
    options = ["--quick", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--policy-layers", "1", "2", *small]
    result = scaling.main([*options, "--json", str(path), "--plot", str(picture)])
    assert set(result["curves"]) == set(scaling.SIZES) and picture.stat().st_size > 0
    for curve in result["curves"].values():
        assert set(curve["fits"]) == set(scaling.FIGURES) and len(curve["sizes"]) == 2
    assert all(math.isfinite(n) for n in numbers(result))


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_learning_and_curves_of_the_large_presets_scaled_down(preset):
    quick = ["--preset", preset, "--quick", "--repeats", "1", "--warmup", "0", "--device", "cpu"]
    stages = learn_step.main([*quick, "--rows", "1"])["stages"]
    assert set(stages) == {"inverse_dynamics", "projector", "joint", "policy"}
    curves = scaling.main([*quick, "--only", "policy_layers", "--policy-layers", "1", "2"])["curves"]
    assert curves["policy_layers"]["step"][0] > 0


def test_a_step_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "four.json"
    quick = ["--preset", "7b", "--quick", "--repeats", "1", "--device", "cpu"]
    result = four_bit_step.main([*quick, "--json", str(path)])
    assert json.loads(path.read_text()) == result
    assert set(result["seconds"]) == {"rollout", "scoring", "update", "step"}
    assert 0 < result["four_bit_mib"] < result["weight_mib"] < result["peak_mib"]
    assert all(math.isfinite(n) for n in numbers(result))


def test_line_through_points():
    line = scaling.fit([1, 2, 4], [3.0, 5.0, 9.0])
    assert line["slope"] == pytest.approx(2) and line["intercept"] == pytest.approx(1)
    assert line["r2"] == pytest.approx(1)


def test_peak_memory_sees_what_is_freed_again():
    with measuring.peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(32 * measuring.MIB)
        torch.ones(8).sum()
        measuring.threading.Event().wait(0.05)
        del held
    assert 100 * measuring.MIB < peak.growth < 200 * measuring.MIB


@pytest.mark.parametrize(
    "name, billions", [("mini", 0.0137), ("small", 0.12), ("smollm", 0.135), ("3b", 3.75), ("7b", 8.29)]
)
def test_presets_have_the_size_of_their_models(name, billions):
    preset = PRESETS[name]
    model = build_backbone(preset, "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


def test_page_names_what_the_benchmarks_take():
    """Each command of docs/speed.md is one that the scripts parse, and each key has its row."""
    page = DOCS.read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in KEYS)
    scripts = (rl_step, learn_step, scaling, four_bit_step, rollout, engine_step)
    parsers = {script.__name__: script.parse for script in scripts}
    commands = re.findall(r"python benchmarks/(\w+)\.py([^\n#`]*)", page)
    assert {name for name, _ in commands} == set(parsers)
    for name, arguments in commands:
        parsers[name](arguments.split())
