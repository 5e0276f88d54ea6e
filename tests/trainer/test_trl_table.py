"""The table of TRL's arguments in `docs/comparison.md` is complete, and says what happens."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import trl
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer, LatentActionPPOTrainer, LatentActionRLOOTrainer

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"
ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| (same|other default|refused) \| (.*) \|$", re.M)
# What TRL renames or computes from others, and cannot be given a value of the right kind here.
OTHERS = {
    "transformers_continuous_batching_config": {},
    "vllm_structured_outputs_regex": "a",
    "liger_kernel_config": {"rope": True},
}


def table(start: str, end: str) -> dict[str, str]:
    """Of each name in the rows between two lines: same, other default or refused."""
    text = PAGE.read_text(encoding="utf-8").split(start)[1].split(end)[0]
    rows = [(name, here) for names, here, _ in ROW.findall(text) for name in re.findall(r"\w+", names)]
    assert len(rows) == len(dict(rows)), "a name is in two rows"
    return dict(rows)


ARGUMENTS = table("Of TRL's `GRPOTrainer`", "Of TRL's `GRPOConfig`")
FIELDS = table("Of TRL's `GRPOConfig`", "## When not to use this")


def default(field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def other_value(field):
    """A value that asks for something else than the default."""
    if field.name in OTHERS:
        return OTHERS[field.name]
    value = default(field)
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else (value or 0) + 1


def test_every_field_of_trl_has_one_row():
    assert set(FIELDS) == {field.name for field in fields(trl.GRPOConfig)}


def test_every_argument_of_trl_has_one_row_and_its_place():
    theirs = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)[1:]
    own = list(inspect.signature(LatentActionGRPOTrainer.__init__).parameters)[1:]
    assert set(ARGUMENTS) == set(theirs)
    assert own == [*theirs, "anchor_dataset"]
    for ours, trls in ((LatentActionRLOOTrainer, trl.RLOOTrainer), (LatentActionPPOTrainer, trl.GRPOTrainer)):
        first = next(iter(list(inspect.signature(ours.__init__).parameters)[1:]))
        assert first == "model" and list(inspect.signature(trls.__init__).parameters)[1:11] == theirs[:10]


def test_defaults_differ_where_the_table_says_so():
    own = {field.name: default(field) for field in fields(LatentActionGRPOConfig)}
    differing = {field.name for field in fields(trl.GRPOConfig) if own[field.name] != default(field)}
    assert differing == {name for name, here in FIELDS.items() if here == "other default"}


@pytest.mark.parametrize("name", [name for name, here in FIELDS.items() if here == "refused"])
def test_what_the_table_calls_refused_is_refused_by_name(name, tmp_path):
    field = next(f for f in fields(trl.GRPOConfig) if f.name == name)
    value = other_value(field)
    with pytest.raises(ValueError, match=name):
        args = LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})
        model, tiny = latent("llama", latent_config(use_projector=False))
        LatentActionGRPOTrainer(model, len, args, prompts(8), processing_class=tiny.processor)


@pytest.mark.parametrize("name", [name for name, here in ARGUMENTS.items() if here == "refused"])
def test_arguments_that_the_table_calls_refused_are(name, tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"`{name}`"):
        LatentActionGRPOTrainer(model, len, args, prompts(8), processing_class=tiny.processor, **{name: [print]})
