"""The page on learning the space leaves out no option and no held-out figure; its defaults are the configuration's."""

import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments

from latent_trl import LatentActionSpaceConfig
from latent_trl.trainer.space.evaluation import MEASURED
from latent_trl.trainer.space.trainer import MIN_PERPLEXITY, MIN_RANDOM_GAP

PAGE = (Path(__file__).parents[2] / "docs" / "space_trainer.md").read_text(encoding="utf-8")
OPTIONS = PAGE[PAGE.index("## Options") : PAGE.index("## Metrics")]
HELD_OUT = PAGE[PAGE.index("## Held-out figures") : PAGE.index("## Options")]


def test_every_option_is_explained_with_its_default():
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    defaults_of = {field.name: field.default for field in dataclasses.fields(LatentActionSpaceConfig)}
    own = {name for name, default in defaults_of.items() if name not in inherited or default != inherited[name]}
    rows = {}
    for names, defaults in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", OPTIONS, re.MULTILINE):
        names, defaults = re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", ")
        rows |= dict(zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=True))
    assert own <= set(rows) <= set(defaults_of)
    assert rows.pop("stages") == "all four"
    for name, shown in rows.items():
        assert eval(shown) == defaults_of[name], name


def test_every_held_out_figure_is_explained():
    for names in MEASURED.values():
        assert not [name for name in (*names, "loss") if f"`{name}`" not in HELD_OUT]


def test_thresholds_of_the_alarms_are_the_page_s():
    assert f"below a gap of {MIN_RANDOM_GAP} nats or a perplexity of {MIN_PERPLEXITY:g}" in PAGE
