"""The page on rewards: its code runs, from top to bottom, and it leaves no reward out."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from latent_trl import rewards

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_its_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    names = {"__name__": "rewards_page"}
    for block in blocks:
        exec(compile(block, "docs/rewards.md", "exec"), names)


def test_it_has_every_reward():
    modules = [importlib.import_module(f"latent_trl.rewards.{m.name}") for m in pkgutil.iter_modules(rewards.__path__)]
    found = {
        name
        for module in modules
        for name, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and name.endswith(("Reward", "Penalty", "Punishment"))
    }
    assert len(found) >= 9
    assert not [name for name in sorted(found) if f"`{name}" not in PAGE]


def test_it_has_every_option_of_the_judge():
    from latent_trl.rewards.judge import JudgeReward

    options = set(inspect.signature(JudgeReward).parameters) - {"model"}
    assert not [name for name in sorted(options) if not re.search(rf"`{name}\b|\b{name}=", PAGE)]
