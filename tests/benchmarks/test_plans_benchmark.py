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
    arms = ["bandit", "bandit, shared rewards"]
    options = ["--spaces", "3", "--seeds", "0", "1", "--arms", *arms, "--output_dir", str(tmp_path)]
    (found,) = plans.main([*options, *words])
    (written,) = (tmp_path / "pocket-3").glob("figures-*.json")
    assert json.loads(written.read_text()) == found
    assert found["space"] == 3 and set(found["runs"]) == set(arms)
    for runs in found["runs"].values():
        assert len(runs) == 2
        for run in runs:
            assert set(run["curve"]) == {"128"} and len(run["curve"]["128"]) == 5
            assert set(run["curve"]["128"]) <= {0.0, 1.0}
            assert min(run["rollout_seconds"], run["update_seconds"]) > 0
    rates = ("ceiling", "random_plan", "best_single_plan", "backbone", "fluent", "fluent_descriptions")
    assert all(0 <= found[name] <= 1 for name in rates)
    assert found["random_plan"] <= found["best_single_plan"] <= found["ceiling"]
    assert math.isfinite(found["space_seconds"])
