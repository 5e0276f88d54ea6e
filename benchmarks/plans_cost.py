"""
What RL over plans costs: processor seconds of rollouts and updates, on backbones of a real layout with random weights.

    python benchmarks/plans_cost.py --presets micro mini small --arms bandit grpo ppo

Prompts have a picture each, but for text models. Answers are greedy, of `completion_length` tokens, and the reward is
drawn; the batches are those of the arms' defaults, unless `--prompts` makes them smaller. What a trainer does once, at
the start of a run and at its end, is left out.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from plans import ARMS
from presets import PRESETS, Preset, build_backbone, processing_class, prompt_rows
from transformers import TrainerCallback

from latent_trl import PlanConfig, PlanModel


def drawn(completion_ids, **columns) -> list[float]:
    """A reward that depends on the answer alone."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class Clock(TrainerCallback):
    """Processor seconds from the first step to the last, and of the rollouts among them."""

    def __init__(self, trainer: Any):
        self.rollouts = self.steps = 0.0
        self.decoded: list[float] = []
        self._trainer, self._roll_out = trainer, trainer.roll_out
        trainer.roll_out = self._timed

    def _timed(self, batch: int) -> None:
        before = time.process_time()
        self._roll_out(batch)
        self.rollouts += time.process_time() - before
        self.decoded += self._trainer.figures["plans/decoded"][-1:]

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += time.process_time() - self._since


def measure(name: str, preset: Preset, arm: str, batches: int, prompts: int | None, folder: str) -> dict[str, float]:
    trainer_class, config_class, options = ARMS[arm]
    model = PlanModel(build_backbone(preset), PlanConfig(num_plans=16))
    model.backbone.generation_config.eos_token_id = None
    options = {**options, **({"rollout_prompts": prompts} if prompts else {})}
    args = config_class(
        f"{folder}/{name}-{arm}",
        max_steps=batches * config_class.num_iterations,
        max_completion_length=preset.completion_length,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=10_000,
        **options,
    )
    rows = prompt_rows(preset, 2 * args.rollout_prompts)
    trainer = trainer_class(model, drawn, args, rows, processing_class=processing_class(preset))
    trainer.ends = []
    clock = Clock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    updates = clock.steps - clock.rollouts
    return {
        "rollout_ms": 1000 * clock.rollouts / (batches * args.rollout_prompts * args.num_generations),
        "update_ms": 1000 * updates / trainer.state.global_step,
        "update_share": updates / clock.steps,
        "decoded": sum(clock.decoded) / len(clock.decoded),
    }


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=["micro", "small"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["bandit"])
    parser.add_argument("--batches", type=int, default=4, help="of rollouts")
    parser.add_argument("--prompts", type=int, help="of a batch of rollouts")
    parser.add_argument("--quick", action="store_true", help="the presets' layouts with tiny sizes")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for name in args.presets:
        preset = PRESETS[name].scaled_down() if args.quick else PRESETS[name]
        for arm in args.arms:
            with tempfile.TemporaryDirectory() as folder:
                one = measure(name, preset, arm, args.batches, args.prompts, str(Path(folder)))
            found[f"{name}, {arm}"] = one
            print(f"{name}, {arm}: " + ", ".join(f"{key} {value:.3g}" for key, value in one.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
