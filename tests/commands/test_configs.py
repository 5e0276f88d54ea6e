"""The configuration files of the pocket VLM run as they are with `latent-trl`, one after the other."""

import json
from pathlib import Path

import pytest

from latent_trl.commands.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
STAGES = {"learn": "policy", "sft": "sft", "grpo": "rl", "rloo": "rl", "ppo": "rl"}
FEWER = {
    "learn": [f"--{stage}_max_steps=1" for stage in ("inverse_dynamics", "projector", "joint", "policy")],
    **{name: ["--max-steps=1"] for name in STAGES if name != "learn"},
}


def test_every_file_of_the_pocket_vlm_is_tried():
    assert {path.stem.removeprefix("pocket_") for path in CONFIGS.glob("pocket_*.yaml")} == set(STAGES)


def test_the_files_run_in_the_order_that_they_say(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    pytest.importorskip("chitchat_dataset")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for command, stage in STAGES.items():
        config = f"examples/configs/pocket_{command}.yaml"
        assert f"latent-trl {command} --config {config}" in Path(config).read_text().splitlines()[0]
        fewer = [*FEWER[command], "--per_device_train_batch_size=8", "--dataset_limit=24", "--use_cpu=true"]
        assert main([command, "--config", config, *fewer, "--disable_tqdm=true"]) == 0
        record = json.loads(
            (tmp_path / "outputs" / "pocket" / _folder(command) / "latent_action_config.json").read_text()
        )
        assert record["stage"] == stage


def _folder(command: str) -> str:
    return "space" if command == "learn" else command
