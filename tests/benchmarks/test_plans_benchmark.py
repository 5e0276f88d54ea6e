"""The benchmark of plans runs at a tiny size and gives every figure; none of this size means anything."""

import json
import math

import plans
import pytest

pytest.importorskip("easy_vqa")


@pytest.mark.slow
def test_every_figure_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "ROLLOUTS", (128,))
    sizes = {"plans": 5, "prompts": 12, "space_steps": 2, "rl_questions": 12, "questions": 5, "validation": 4}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    (found,) = plans.main(["--seeds", "3", "--output_dir", str(tmp_path), *words])
    assert json.loads((tmp_path / "pocket-3" / "figures.json").read_text()) == found
    assert set(found["rewards"]) == {"128"} and found["seed"] == 3 and found["space_steps"] == 2
    rates = ("ceiling", "random_plan", "best_single_plan", "backbone", "fluent", "fluent_descriptions")
    assert all(0 <= value <= 1 for value in [*(found[name] for name in rates), *found["rewards"].values()])
    assert found["random_plan"] <= found["best_single_plan"] <= found["ceiling"]
    assert math.isfinite(found["space_seconds"])
    assert (tmp_path / "pocket-3" / "plans.md").read_text().startswith("| plan | reward |")
