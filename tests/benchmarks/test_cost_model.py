"""The arithmetic of large runs: sizes of real models, what engines share, and a fit that finds known constants."""

import re
from pathlib import Path

import cost_model
import pytest
import scaling
from cost_model import ENGINES, QWEN, Step, fit_seconds, memory, predicted, rollout_machines, wire

PAGE = Path(__file__).parents[2] / "docs" / "scaling_out.md"


@pytest.mark.parametrize("name, millions", [("3B", 3_755), ("7B", 8_292), ("32B", 33_450), ("72B", 73_410)])
def test_backbones_have_their_real_sizes(name, millions):
    assert QWEN[name].backbone / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_layer_is_counted_as_transformers_makes_it():
    import torch
    from presets import PRESETS
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    with torch.device("meta"):
        text = {**PRESETS["3b"].text, "num_hidden_layers": 2, "pad_token_id": 0}
        model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(text_config=text))
    layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    assert QWEN["3B"].layer == layer


@pytest.mark.parametrize("layout", QWEN.values(), ids=QWEN)
def test_engines_share_what_they_say(layout):
    step = Step()
    assert memory(layout, "DDP", 1, step) == memory(layout, "DDP", 8, step)
    for engine in ENGINES[2:]:
        assert memory(layout, engine, 8, step) < memory(layout, engine, 2, step)
    assert memory(layout, "ZeRO-3", 8, step) > 2 * layout.backbone
    assert wire(layout, "DDP", 1, step) == {"gradient": 0.0, "passes": 0.0, "rollout": 0.0}
    # A ring: each GPU sends nearly the gradient twice.
    assert wire(layout, "DDP", 8, step)["gradient"] == 2 * 7 / 8 * 4 * layout.policy
    assert rollout_machines(layout, Step(updates=4)) <= rollout_machines(layout, step)


def test_known_constants_are_found():
    points = [{"calls": c, "operations": o} for c in (8.0, 16.0, 32.0) for o in (1e9, 4e9)]
    for point in points:
        point["rollout"] = 0.5 + 0.01 * point["calls"] + 2e-10 * point["operations"]
    constants = fit_seconds(points, "rollout")
    assert predicted(constants, 100.0, 2e10) == pytest.approx(0.5 + 1.0 + 4.0)


def test_a_size_is_held_out(tmp_path):
    quick = ["--preset", "mini", "--quick", "--repeats", "1", "--warmup", "1", "--device", "cpu"]
    sizes = [
        "--only",
        "completion_length",
        "policy_layers",
        "--completion-length",
        "2",
        "4",
        "--policy-layers",
        "1",
        "2",
    ]
    result = scaling.main([*quick, *sizes, "--held-out", "completion_length=6", "policy_layers=3"])
    for figure in ("rollout", "update"):
        found = result["cost"][figure]
        assert found["points"] == 4 and found["measured"] > 0 and found["predicted"] > 0


def test_the_page_has_the_tables_that_are_printed():
    page = PAGE.read_text()
    rows = [line for line in cost_model.report().splitlines() if re.match(r"\| (3B|7B|32B|72B)", line)]
    assert len(rows) == 4 + 24 + 16 + 8
    assert [row for row in rows if row not in page] == []
