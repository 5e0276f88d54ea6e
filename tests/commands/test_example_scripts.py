"""The example scripts run one after the other with their configuration files, and stay short."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "scripts"
CHAIN = ("learn_space", "sft", "grpo", "ppo")
FEWER = {
    "learn_space": [f"--{s}_max_steps=1" for s in ("inverse_dynamics", "projector", "joint", "policy")]
    + ["--num_codes=8", "--policy_layers=1", "--inverse_dynamics_layers=1", "--per_device_train_batch_size=4"],
    "sft": ["--max_steps=1", "--per_device_train_batch_size=4"],
    "grpo": ["--max_steps=1", "--per_device_train_batch_size=8"],
    "ppo": ["--max_steps=1", "--per_device_train_batch_size=8"],
}
STARTS_FROM = {"sft": "learn_space", "grpo": "sft", "ppo": "sft"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output folders of the scripts, each run once in the order of the chain."""
    pytest.importorskip("easy_vqa")
    pytest.importorskip("chitchat_dataset")
    root = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in CHAIN:
            config = ROOT / "examples" / "configs" / f"pocket_{name.removesuffix('_space')}.yaml"
            words = ["--config", str(config), f"--output_dir={root / name}", "--use_cpu=true", "--disable_tqdm=true"]
            if name in STARTS_FROM:
                words.append(f"--model_name_or_path={root / STARTS_FROM[name]}")
            patch.setattr(sys, "argv", [name, *words, *FEWER[name]])
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return root


@pytest.mark.parametrize("name, stage", list(zip(CHAIN, ("policy", "sft", "rl", "rl"))))
def test_a_script_leaves_a_model_at_its_stage(folders, name, stage):
    record = json.loads((folders / name / "latent_action_config.json").read_text())
    assert record["stage"] == stage and record["num_codes"] == 8
    assert ("value_head" in record["components"]) == (name == "ppo")
    assert (folders / name / "adapter").is_dir() == (name != "learn_space")


@pytest.mark.parametrize("name", CHAIN)
def test_a_script_is_short_and_says_how_it_is_launched(name):
    text = (SCRIPTS / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 160
    docstring = text.split('"""')[1]
    assert f"accelerate launch examples/scripts/{name}.py" in docstring
    assert f"python examples/scripts/{name}.py --config examples/configs/" in docstring
