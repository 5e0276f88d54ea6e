"""The configuration files of the pocket VLM run as they are with `latent-trl`, one after the other."""

import json
from pathlib import Path

import pytest
from PIL import Image

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


def test_the_files_of_3b_run_on_a_tiny_model_of_its_layout(tmp_path, monkeypatch, tiny_qwen2_5_vl):
    """As they are but for the model, the number of steps, and precision: a CPU has no bfloat16 worth waiting for."""
    tiny = tiny_qwen2_5_vl
    tiny.model.save_pretrained(tmp_path / "backbone")
    # The family's own processor wants torchvision for videos.
    monkeypatch.setattr("latent_trl.trainer.run.loading.AutoProcessor.from_pretrained", lambda *a, **k: tiny.processor)
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / "images" / "red.png")
    question, answer = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
    conversation = {"messages": [question, answer]}
    rows = {
        "pairs": {**conversation, "images": ["red.png"]},
        "text": conversation,
        "task": {**conversation, "images": ["red.png"]},
        "prompts": {"prompt": [question], "images": ["red.png"], "answer": "red"},
    }
    for name, row in rows.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
    monkeypatch.chdir(tmp_path)
    fewer = {
        "learn": [f"--{stage}_max_steps=1" for stage in ("inverse_dynamics", "projector", "joint", "policy")],
        "sft": ["--max_steps=1"],
        "grpo": ["--max_steps=1", "--max_completion_length=4"],
    }
    for command, folder, stage in (("learn", "space", "policy"), ("sft", "sft", "sft"), ("grpo", "grpo", "rl")):
        config = CONFIGS / f"3b_{command}.yaml"
        assert f"latent-trl {command} --config examples/configs/3b_{command}.yaml" in config.read_text().splitlines()[0]
        words = ["--config", str(config), *fewer[command], "--use_cpu=true", "--dtype=float32", "--bf16=false"]
        words += ["--model_name_or_path=backbone"] if command == "learn" else []
        assert main([command, *words, "--disable_tqdm=true"]) == 0
        record = json.loads((tmp_path / "outputs" / "3b" / folder / "latent_action_config.json").read_text())
        assert record["stage"] == stage


def _folder(command: str) -> str:
    return "space" if command == "learn" else command
