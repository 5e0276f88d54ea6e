"""The benchmark of rewards that can be gamed: its figures by hand, its proxies, and a run of a tiny size."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "overoptimisation"))

from report import best, fall, fell, plot, show, summary  # noqa: E402

pytest.importorskip("easy_vqa")


def point(rollouts, greedy, sampled, proxy=0.5, kl=0.0):
    """Gold of two validation questions and two others; of samples, one value for all."""
    return {
        "rollouts": rollouts,
        "kl": kl,
        "greedy": {"gold": greedy, "proxy": [proxy] * 4, "whole": [1.0] * 4},
        "sampled": {"gold": [sampled] * 4, "proxy": [proxy] * 4, "whole": [sampled] * 4},
    }


HELD = [point(0, [0, 0, 1, 1], 0.4), point(128, [1, 1, 0, 1], 0.3), point(256, [0, 1, 1, 1], 0.5)]
FALLEN = [point(0, [1, 0, 0, 0], 0.4), point(128, [0, 0, 1, 1], 0.39), point(256, [0, 0, 1, 1], 0.0)]


def test_a_fall_is_the_first_point_below_the_start_that_nothing_makes_good():
    assert fall(HELD) is None and fall(FALLEN) == 128
    assert fall([*FALLEN, point(384, [0] * 4, 0.4)]) is None
    assert fall([*HELD, point(384, [0] * 4, 0.1)]) == 384


def test_an_end_below_the_start_is_told_from_the_error_of_the_questions():
    """Of 80 questions one less is right, or 20."""
    runs = []
    for wrong in (1, 20):
        points = [point(0, [0] * 80, 0.0), point(128, [0] * 80, 0.0)]
        points[0]["sampled"]["gold"] = [1.0] * 40 + [0.0] * 40
        points[1]["sampled"]["gold"] = [1.0] * (40 - wrong) + [0.0] * (40 + wrong)
        runs.append(points)
    assert [fall(points) for points in runs] == [128, 128] and [fell(points) for points in runs] == [False, True]


def test_the_best_point_is_chosen_on_validation_and_reported_on_others():
    assert best(HELD, 2)["rollouts"] == 128 and best(FALLEN, 2)["rollouts"] == 0
    runs = {("codes", "a", 0): HELD, ("codes", "b", 0): HELD, ("tokens", "a", 0): FALLEN}
    found = summary(runs, {"codes": "codes", "tokens": "tokens"}, 2)
    assert (found["best_gold_codes"], found["best_gold_tokens"]) == (0.5, 0.0)
    assert found["difference"] == 0.5 and found["interval"] == [0.0, 1.0]
    assert (found["rollouts_to_fall_codes"], found["rollouts_to_fall_tokens"]) == ([None, None], [128])
    assert found["arms"]["codes"]["last_gold_greedy"] == 0.75
    assert [p["sampled_gold"] for p in found["frontier"]["codes | b | 0"]] == [0.4, 0.3, 0.5]
    assert "| codes | 0.500 | 0.750 | 0.500 | 0.400 | 0.500 | never, never | 0 of 2 | 256 |" in show(found)


def test_one_kind_alone_has_no_comparison(tmp_path):
    found = summary({("codes", "a", 0): HELD}, {"codes": "codes"}, 2)
    assert found["best_gold_tokens"] is None and found["interval"] is None and "difference" not in show(found)
    plot(found, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_any_reward_function_is_a_proxy():
    from proxies import length, proxy

    assert proxy("proxies:length", None) is length
    assert proxy("length", None)(None, ["one two", [{"role": "assistant", "content": "word " * 30}]]) == [0.1, 1.0]
    with pytest.raises(ValueError, match="`module:function`; got 'lenght'"):
        proxy("lenght", None)


def test_other_pictures_are_other_pictures():
    from proxies import gold, requests

    first, other = requests("test"), requests("test", 7)
    assert [row["images"][0].tobytes() for row in first[:20]] != [row["images"][0].tobytes() for row in other[:20]]
    columns = {name: [row[name] for row in other] for name in ("colour", "shape", "size")}
    assert gold([row["reference"] for row in other], **columns) == [1.0] * len(other)


@pytest.mark.slow
def test_a_run_of_a_tiny_size_gives_every_figure(tmp_path):
    import run

    options = ["--size", "quick", "--jobs", "1", "--output_dir", str(tmp_path), "--data_seed", "3"]
    found = run.main([*options, "--proxies", "proxies:length", "--plot", str(tmp_path / "frontier.png")])
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    assert 0 <= found["best_gold_codes"] <= 1 and found["chosen"]["codes"] == "codes, guard"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "proxies.length codes, guard 0 data 3.json",
        "proxies.length tokens, 3e-4, no KL 0 data 3.json",
    ]
    assert run.main([*options, "--proxies", "proxies:length"]) == found
