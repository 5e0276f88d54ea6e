"""
The stages that learn the latent action space: tokens a second, peak memory, and the time of a step over that of one
pass of the frozen backbone without gradient over the same tokens.

    python benchmarks/learn_step.py --preset small --json learn_step_small.json

`over_states` compares with a pass to the last hidden state, `over_logits` with one to the logits of every position.
"""

import argparse
import os
from collections import defaultdict
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measuring import (
    MIB,
    facts,
    median,
    optimizer_bytes,
    peak_memory,
    seconds,
    spread,
    table,
    use_clock,
    use_device,
    write,
)
from presets import PRESETS, Preset, add_options, answered_rows, build_backbone, processing_class
from tqdm.auto import tqdm

from latent_trl import LatentActionConfig, LatentActionModel
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.trainer.run.component_training import train_only
from latent_trl.trainer.space.objective import LatentActionSpaceObjective
from latent_trl.trainer.space.stages import STAGE_COMPONENTS


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


class Stage:
    """One stage's step: the objective's loss, backward, optimizer."""

    def __init__(self, model: LatentActionModel, name: str):
        self.model, self.name = model, name
        self.objective = LatentActionSpaceObjective(name)
        # As at the steps between two logs; the gaps are measured at the logged ones alone.
        self.objective.measure_gaps = False
        self.components = STAGE_COMPONENTS[name]
        trained = [p for part in self.components for p in getattr(model, part).parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(self, batch: dict[str, Any]) -> None:
        train_only(self.model, self.components)
        self.objective(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def hidden_states(model: LatentActionModel, batch: dict[str, Any]) -> None:
    model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])


@torch.no_grad()
def logits(model: LatentActionModel, batch: dict[str, Any]) -> None:
    model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **batch["vision"])


def measure(preset: Preset, device: torch.device, rows: int, repeats: int, warmup: int, stages: list[str]):
    """Seconds of each stage's step and of the two passes of the backbone, bytes of each step, tokens of the batch."""
    config = LatentActionConfig(policy_decoder={"num_hidden_layers": preset.policy_layers})
    model = LatentActionModel.from_backbone(build_backbone(preset, device), config)
    model.train()
    collate = LatentActionDataCollator(processing_class(preset), vision_token_ids=model.config.vision_token_ids)
    batch = to_device(collate(answered_rows(preset, rows)), device)
    steps = {name: Stage(model, name) for name in stages}
    times: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, list[int]] = defaultdict(list)
    for repeat in tqdm(range(-warmup, repeats), desc="learn_step", unit="repeat"):
        found = {
            "hidden_states": seconds(lambda: hidden_states(model, batch))[0],
            "logits": seconds(lambda: logits(model, batch))[0],
        }
        for name, stage in steps.items():
            with peak_memory(device) as peak:
                found[name] = seconds(lambda stage=stage: stage.step(batch))[0]
            if repeat >= 0:
                memory[name].append(peak.growth + optimizer_bytes(stage.optimizer))
        if repeat >= 0:
            for name, value in found.items():
                times[name].append(value)
    return times, memory, int(batch["attention_mask"].sum())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, preset="small", repeats=5)
    parser.add_argument("--rows", type=int, default=4, help="rows a batch")
    parser.add_argument("--stages", nargs="+", choices=list(STAGE_COMPONENTS), default=list(STAGE_COMPONENTS))
    parser.add_argument("--completion-length", type=int, help="tokens of each answer")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    preset, device = PRESETS[options.preset], use_device(options.device)
    use_clock(options.clock)
    if options.quick:
        preset = preset.scaled_down()
    if options.completion_length:
        preset = replace(preset, completion_length=options.completion_length)
    stages = [name for name in options.stages if preset.vision is not None or name != "projector"]
    if preset.vision is None:
        # A text model has no projector, which the joint stage trains.
        stages = [name for name in stages if name != "joint"]
    times, memory, tokens = measure(preset, device, options.rows, options.repeats, options.warmup, stages)
    result = {
        "stages": {
            name: {
                "seconds": median(times[name]),
                "spread": spread(times[name]),
                "tokens_per_second": tokens / median(times[name]),
                "over_states": median([a / b for a, b in zip(times[name], times["hidden_states"])]),
                "over_logits": median([a / b for a, b in zip(times[name], times["logits"])]),
                "peak_mib": median(memory[name]) / MIB,
            }
            for name in stages
        },
        "backbone_seconds": {name: median(times[name]) for name in ("hidden_states", "logits")},
        "tokens": tokens,
        "preset": options.preset,
        "quick": options.quick,
        "rows": options.rows,
        "repeats": options.repeats,
        "clock": options.clock,
        **facts(device),
    }
    columns = ("seconds", "tokens_per_second", "over_states", "over_logits", "peak_mib")
    print(table(["stage", *columns], [[name, *map(row.get, columns)] for name, row in result["stages"].items()]))
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
