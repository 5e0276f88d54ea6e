"""The page on SFT: its code runs, and it leaves out no option."""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from latent_trl import LatentActionSFTConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sft_trainer.md").read_text(encoding="utf-8")


def test_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "sft_page"}
    exec(compile(block, "docs/sft_trainer.md", "exec"), names)
    logged = {metric for log in names["trainer"].state.log_history for metric in log} - {"step"}
    assert {"loss", "eval_loss", "grad_norm", "train_loss"} <= logged


def test_every_option_is_explained():
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    fields = dataclasses.fields(LatentActionSFTConfig)
    own = [f.name for f in fields if f.name not in inherited or f.default != inherited[f.name]]
    assert len(own) > 10
    assert not [name for name in own if f"`{name}`" not in PAGE]


def test_every_default_is_the_page_s():
    config = {field.name: field.default for field in dataclasses.fields(LatentActionSFTConfig)}
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", PAGE, re.MULTILINE))
    assert {"max_length", "learning_rate", "on_nonfinite", "num_train_epochs"} <= set(rows)
    for name, shown in rows.items():
        if name in config:
            assert eval(shown) == config[name], name
