"""Small runs of the trainers that learn from data sets: rows with 0, 1 and 2 images, and what is compared of a run."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import latent, latent_config
from transformers import TrainerCallback

from latent_trl import (
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
    LatentActionSpaceConfig,
    LatentActionSpaceTrainer,
)

STAGES = ("inverse_dynamics", "projector", "joint", "policy")
# What tells the time, not the run.
CLOCKS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")
COMMON = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "logging_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
}
STEPS = {f"{stage}_max_steps": 4 for stage in STAGES}
RATES = {f"{stage}_learning_rate": 1e-2 for stage in STAGES}


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def paired_rows(count: int = 7, images=(1, 2, 1)) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                turn("user", "what " * (1 + i % 3) + f"is {i}?"),
                turn("assistant", "it is " + "abcdefg"[i % 7]),
            ],
            "images": [picture(10 * i + k) for k in range(images[i % len(images)])],
        }
        for i in range(count)
    ]


def text_rows(count: int = 5) -> list[dict[str, Any]]:
    return [
        {"prompt": [turn("user", f"say {i} " * (1 + i % 2))], "completion": [turn("assistant", f"{i} it is, {i}.")]}
        for i in range(count)
    ]


def build_space(folder, family: str = "llava", config=None, callback=None, model=None, backbone=None, **options):
    """A space trainer on a tiny model of its own."""
    own, tiny = latent(family, config, perturbed=False, **(backbone or {}))
    paired, text = options.pop("paired", paired_rows()), options.pop("text", text_rows())
    held_out = options.pop("eval_dataset", None)
    args = LatentActionSpaceConfig(str(folder), **{**COMMON, **STEPS, **RATES, **options})
    return LatentActionSpaceTrainer(
        model or own,
        args,
        paired,
        text_dataset=text,
        eval_dataset=held_out,
        processing_class=tiny.processor,
        callbacks=None if callback is None else [callback],
    )


def build_sft(folder, family: str = "llava", callback=None, model=None, backbone=None, peft_config=None, **options):
    """An SFT trainer on a tiny model whose policy counts as trained."""
    own, tiny = latent(family, latent_config(stage="policy"), **(backbone or {}))
    rows, held_out = options.pop("rows", paired_rows()), options.pop("eval_dataset", None)
    args = LatentActionSFTConfig(str(folder), **{**COMMON, "max_steps": 4, "learning_rate": 1e-2, **options})
    return LatentActionSFTTrainer(
        model or own,
        args,
        rows,
        held_out,
        processing_class=tiny.processor,
        peft_config=peft_config,
        callbacks=None if callback is None else [callback],
    )


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors whose bytes differ."""
    assert before.keys() == after.keys()

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()

    return {name for name in before if not same(before[name], after[name])}


def logs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


class Interrupted(Exception):
    pass


class InterruptAt(TrainerCallback):
    """Saves at some step of some stage, and ends the run there, or so many steps later, as a failure would."""

    def __init__(self, stage: str | None, step: int, later: int = 0):
        self.stage, self.step, self.later = stage, step, later

    def _here(self, args) -> bool:
        return self.stage is None or args.output_dir.endswith(f"-{self.stage}")

    def on_step_end(self, args, state, control, **kwargs):
        if self._here(args):
            control.should_save |= state.global_step == self.step
            if self.later and state.global_step == self.step + self.later:
                raise Interrupted
        return control

    def on_save(self, args, state, control, **kwargs):
        if not self.later and self._here(args) and state.global_step == self.step:
            raise Interrupted
