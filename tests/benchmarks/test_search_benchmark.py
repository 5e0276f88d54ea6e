"""The benchmark of search runs at a tiny size; its selector that does not see the answer reads answers rightly."""

import json
import math
import re
from pathlib import Path

import pytest
import search

DOCS = Path(__file__).parents[2] / "docs" / "search.md"


@pytest.fixture
def at_root(monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.chdir(DOCS.parents[1])


def test_search(at_root, tmp_path):
    path = tmp_path / "search.json"
    options = ["--questions", "6", "--n", "1", "2", "--tokens", "8", "--temperatures", "1", "--device", "cpu"]
    result = search.main([*options, "--models", search.MODELS[0], "--json", str(path)])
    assert json.loads(path.read_text())["at_answers"] == result["at_answers"]
    names = {"tokens, sampled, T = 1", "tokens, beams", "codes, sampled, T = 1", "codes, tree"}
    for selector in ("oracle", "verdict"):
        assert set(result["at_answers"][selector]) == set(result["at_tokens"][selector]) == names
        for figures in result["at_answers"][selector].values():
            assert all(0 <= one["low"] <= one["estimate"] <= one["high"] <= 1 for one in figures.values())
    for name in names:
        for n in ("1", "2"):
            figures = (result["at_answers"][selector][name][n]["estimate"] for selector in ("oracle", "verdict"))
            assert next(figures) >= next(figures)
    tree = result["budgets"]["codes, tree"]
    assert tree[2]["different_texts"] == 2 and math.isfinite(tree[2]["decoded_tokens"])


@pytest.mark.parametrize(
    "question, answer, claim",
    [
        ("what color is it?", "it is red.", ("red", False)),
        ("what color is it?", "it is a circle.", None),
        ("what color is it?", "red or blue.", None),
        ("which shape is this?", "a circle.", ("a circle", False)),
        ("is it a circle?", "yes, it is.", ("a circle", False)),
        ("would you say it is red?", "no.", ("red", True)),
        ("is the shape red?", "it is red.", None),
        ("is it red?", "i do not think so no no no no no.", None),
    ],
)
def test_what_an_answer_claims(question, answer, claim):
    assert search.VerdictReward.claim(question, answer) == claim


def test_page_names_what_the_benchmark_takes():
    commands = re.findall(r"python benchmarks/search\.py([^\n#`]*)", DOCS.read_text(encoding="utf-8"))
    assert commands
    for arguments in commands:
        search.parse(arguments.split())
