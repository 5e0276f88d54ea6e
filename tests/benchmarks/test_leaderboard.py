"""The leaderboard's verdicts, and what it reads."""

import json

import leaderboard
import pytest

UP = {"value": 0.9, "tolerance": 0.02, "better": "higher"}
DOWN = {"value": 0.3, "tolerance": 0.1, "better": "lower"}


@pytest.mark.parametrize(
    "value, known, word",
    [
        (0.88, UP, "same"),
        (0.92, UP, "same"),
        (0.879, UP, "worse"),
        (0.921, UP, "better"),
        (0.4, DOWN, "same"),
        (0.41, DOWN, "worse"),
        (0.19, DOWN, "better"),
        (0.5, None, "new"),
    ],
)
def test_a_figure_is_worse_beyond_its_tolerance_on_the_wrong_side(value, known, word):
    assert leaderboard.verdict(value, known) == word


def test_only_what_is_better_is_a_new_reference():
    reference = {"up": UP, "down": DOWN, "other": UP}
    found = leaderboard.updated({"up": 0.95, "down": 0.5, "new": 1.0}, reference)
    assert found == {"up": {**UP, "value": 0.95}, "down": DOWN, "other": UP}


LEFT = {
    "demo": {"result.json": {"reward": {"before RL": 0.6, "after RL": 0.98}}},
    "gamed": {
        "summary.json": {
            "arms": {leaderboard.GAMED: {"best_gold": 0.6, "last_gold_sampled": 0.5, "rollouts_to_fall": [None, 128]}}
        }
    },
    "plans": {
        "reduced/pocket-0/figures-bandit.json": {"ceiling": 0.98, "runs": {"bandit": [{"curve": {"512": [1.0, 0.5]}}]}}
    },
    "step": {"step.json": {"step_ratio": 0.2, "update_ratio": 0.04}},
    "exactness": {},
}


@pytest.fixture
def commands(monkeypatch):
    """Commands that leave a benchmark's files and print as pytest does, in the place of the real ones."""
    script = (
        "import json, pathlib, sys\n"
        "for name, text in json.loads(sys.argv[2]).items():\n"
        "    path = pathlib.Path(sys.argv[1], name)\n"
        "    path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    path.write_text(json.dumps(text))\n"
        "print('1 failed, 12 passed, 2 errors in 3.20s')\n"
    )
    for name, check in leaderboard.CHECKS.items():
        left = json.dumps(LEFT[name]).replace("{", "{{").replace("}", "}}")
        monkeypatch.setitem(
            leaderboard.CHECKS, name, leaderboard.Check(("-c", script.replace("{", "{{"), "{folder}", left), check.read)
        )


def test_every_check_gives_its_figures_and_every_reference_is_of_one(commands, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert leaderboard.main(["--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert written["figures"] == {
        "demo, before RL": 0.6,
        "demo, after RL": 0.98,
        "gamed reward, codes: gold": 0.6,
        "gamed reward, codes: gold of samples": 0.5,
        "gamed reward, codes: falls": 1.0,
        "plans, ceiling": 0.98,
        "plans, after 512 rollouts": 0.75,
        "step over TRL's": 0.2,
        "update over TRL's": 0.04,
        "exactness: passed": 12.0,
        "exactness: failed": 3.0,
    }
    assert written["verdicts"]["exactness: failed"] == written["verdicts"]["gamed reward, codes: falls"] == "worse"
    assert "| exactness: failed | 3 | 0 | 0 | worse |" in capsys.readouterr().out
    reference = json.loads(leaderboard.REFERENCE.read_text())
    assert reference.keys() == written["figures"].keys()
    assert written["verdicts"]["plans, ceiling"] == "same"
    for known in reference.values():
        assert known.keys() == {"value", "tolerance", "better"} and known["better"] in ("higher", "lower")


def test_a_command_that_leaves_nothing_is_an_error_with_what_it_said(monkeypatch, tmp_path):
    words = ("-c", "import sys; sys.exit('no picture')")
    monkeypatch.setitem(leaderboard.CHECKS, "demo", leaderboard.Check(words, leaderboard.read_demo))
    with pytest.raises(RuntimeError, match="no picture"):
        leaderboard.measure("demo", tmp_path)
