"""The pages on GRPO, PPO and RLOO: their code runs, and they leave out no option."""

import dataclasses
import re
from pathlib import Path

import pytest
from tiny_models import latent
from trl import GRPOConfig

from latent_trl import LatentActionGRPOConfig, LatentActionModel, LatentActionPPOConfig, LatentActionRLOOConfig
from latent_trl.trainer.grpo import trainer as latent_action_grpo_trainer

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}_trainer.md").read_text() for name in ("grpo", "ppo", "rloo")}


@pytest.mark.parametrize("name", PAGES)
def test_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tiny = latent("llava")
    monkeypatch.setattr(LatentActionModel, "from_pretrained", classmethod(lambda cls, *args, **kwargs: model))
    monkeypatch.setattr(latent_action_grpo_trainer, "load_processing_class", lambda *args: tiny.processor)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGES[name], re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": f"{name}_page"}
    exec(compile(block, f"docs/{name}_trainer.md", "exec"), names)
    assert "reward" in names["trainer"].state.log_history[0]


def own_fields(config: type, base: type) -> set[str]:
    inherited = {field.name: field.default for field in dataclasses.fields(base)}
    fields = dataclasses.fields(config)
    return {f.name for f in fields if f.name not in inherited or f.default != inherited[f.name]}


@pytest.mark.parametrize(
    "name, config, base",
    [
        ("grpo", LatentActionGRPOConfig, GRPOConfig),
        ("ppo", LatentActionPPOConfig, LatentActionGRPOConfig),
        ("rloo", LatentActionRLOOConfig, LatentActionGRPOConfig),
    ],
)
def test_every_option_is_explained(name, config, base):
    missing = [field for field in sorted(own_fields(config, base)) if f"`{field}`" not in PAGES[name]]
    assert not missing
