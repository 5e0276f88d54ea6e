"""Small runs of every trainer with the same steps and saving, and what is compared of them."""

from pathlib import Path
from typing import Any

import learning_runs
from learning_runs import build_sft, build_space
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
)

KINDS = ("space", "sft", "grpo", "ppo")
STEPS = 16
STAGE_STEPS = {f"{stage}_max_steps": 5 for stage in learning_runs.STAGES}
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


def letters(completions, **columns):
    return [float(len(set(completion))) for completion in completions]


def build(kind: str, folder: Path, steps: int = STEPS, reward=letters, config=None, **options):
    """A trainer that saves after every step; RL's rollout batches serve four steps each."""
    options = {**SAVES, "logging_steps": 2, **options}
    if kind == "space":
        options = {**STAGE_STEPS, **options}
        return build_space(folder, config=config, **options)
    if kind == "sft":
        return build_sft(folder, max_steps=steps, **options)
    model, tiny = latent("llama", config or latent_config(use_projector=False))
    options = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "beta": 0.05,
        "disable_tqdm": True,
        "max_steps": steps,
        **options,
    }
    if kind == "ppo":
        options = {"kl_target": 0.02, "kl_horizon": 20, "value_warmup_steps": 2, **options}
        trainer_class, args = LatentActionPPOTrainer, LatentActionPPOConfig(str(folder), **options)
    elif kind == "rloo":
        trainer_class, args = LatentActionRLOOTrainer, LatentActionRLOOConfig(str(folder), num_generations=2, **options)
    else:
        trainer_class, args = LatentActionGRPOTrainer, LatentActionGRPOConfig(str(folder), num_generations=2, **options)
    return trainer_class(model, reward, args, train_dataset=prompts(20), processing_class=tiny.processor)


def logs(trainer: Any) -> list[dict[str, Any]]:
    """What a run logged, but for what tells the time, in one order of names."""
    kept = getattr(trainer, "history", None) or trainer.state.log_history
    rows = [{k: v for k, v in sorted(row.items()) if k != "step_time"} for row in learning_runs.logs(kept)]
    return [row for row in rows if len(row) > 3]


def first_folder(kind: str, folder: Path) -> Path:
    """Where the first checkpoints of a run lie."""
    return folder / "1-inverse_dynamics" if kind == "space" else folder
