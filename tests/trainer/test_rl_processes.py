"""RL on two processes: all decide together, and end with the same weights."""

import json
from pathlib import Path

import pytest
from accelerate import debug_launcher
from learning_runs import text_rows
from rl_models import prompts
from tiny_models import latent, latent_config


def reward(prompts, completions, **columns):
    """Equal within every other prompt's group, whichever process it lies on."""
    return [0.5 if prompt.endswith(tuple("02468")) else float(len(set(c))) for prompt, c in zip(prompts, completions)]


def train(kind: str, folder: str, rows: int, generations: int, steps: int, resume: str | None = None):
    import torch

    torch.set_num_threads(1)
    from latent_trl import (
        LatentActionGRPOConfig,
        LatentActionGRPOTrainer,
        LatentActionPPOConfig,
        LatentActionPPOTrainer,
    )

    model, tiny = latent("llama", latent_config(use_projector=False))
    options = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": rows,
        "num_generations": generations,
        "max_completion_length": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": steps,
        "disable_tqdm": True,
        "anchor_coef": 0.5,
    }
    if kind == "ppo":
        trainer_class, args = LatentActionPPOTrainer, LatentActionPPOConfig(folder, **options)
    else:
        trainer_class = LatentActionGRPOTrainer
        args = LatentActionGRPOConfig(folder, dynamic_sampling_rounds=3, **options)
    trainer = trainer_class(
        model, reward, args, train_dataset=prompts(24), processing_class=tiny.processor, anchor_dataset=text_rows()
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = [p.detach().double().sum().item() for p in model.parameters() if p.requires_grad]
    logs = [{k: v for k, v in log.items() if "time" not in k} for log in trainer.state.log_history if "loss" in log]
    record = {"weights": weights, "logs": logs}
    (Path(folder) / f"result_{steps}_{trainer.accelerator.process_index}.json").write_text(json.dumps(record))


def results(folder: Path, steps: int) -> list[dict]:
    return [json.loads((folder / f"result_{steps}_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind, rows, generations",
    [("grpo", 4, 2), ("grpo", 2, 4), ("ppo", 3, 1)],
    ids=["whole groups", "groups across processes", "ppo"],
)
def test_two_processes_agree_and_resume(kind, rows, generations, tmp_path):
    debug_launcher(train, (kind, str(tmp_path), rows, generations, 5), num_processes=2)
    first, second = results(tmp_path, 5)
    assert first["weights"] == second["weights"]
    if kind == "grpo":
        assert any(log.get("dynamic_sampling/replaced_groups", 0) > 0 for log in first["logs"])
    # Step 3 lies in the middle of the second rollout batch.
    checkpoint = str(tmp_path / "checkpoint-3")
    assert (Path(checkpoint) / "rollout_buffer_1.safetensors").is_file()
    other = tmp_path / "other"
    other.mkdir()
    debug_launcher(train, (kind, str(other), rows, generations, 5, checkpoint), num_processes=2)
    again = results(other, 5)
    assert [r["weights"] for r in again] == [first["weights"]] * 2
    assert again[0]["logs"] == first["logs"]
