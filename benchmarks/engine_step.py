"""
One GRPO step over latent actions with rollouts from vLLM, beside TRL's GRPO with vLLM, each with its engine in the
trainer's process (`vllm_mode="colocate"`), on the same text backbone, prompts and lengths.

    OMP_NUM_THREADS=1 python benchmarks/engine_step.py --preset small --clock cpu --json engine_step_small.json
    python benchmarks/engine_step.py --preset micro --quick                 # tiny sizes, to see that it runs

A step is rollout (the engine's new weights, generation, decoding), scoring (context states, old scores, rewards) and
update. The trainers alternate; figures are medians over `--repeats`, after `--warmup`.
"""

import argparse
import os
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Engines run in this process, whose time is measured, with a small cache where there is no GPU.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from measuring import facts, median, seconds, spread, table, use_clock, use_device, write
from presets import PRESETS, Preset, add_options, build_backbone, processing_class
from rl_step import Arm, batch_rows, shared_arguments, trainer_options
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from latent_trl import LatentActionConfig, LatentActionGRPOConfig, LatentActionGRPOTrainer, LatentActionModel

PARTS = ("rollout", "scoring", "update", "step")
BAR = 0.5


def engine_options(preset: Preset, device: torch.device) -> dict[str, Any]:
    """What both trainers have in common."""
    options = trainer_options(preset, device)
    del options["generation_kwargs"]
    longest = preset.prompt_characters + 64 + preset.completion_length
    return options | {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": longest}


def latent_arm(preset: Preset, folder: Path, device: torch.device) -> Arm:
    backbone = LlamaForCausalLM.from_pretrained(folder, dtype=preset.dtype).to(device)
    config = LatentActionConfig(policy_decoder={"num_hidden_layers": preset.policy_layers})
    model = LatentActionModel.from_backbone(backbone, config)
    model.inverse_dynamics = None
    shared = shared_arguments(preset)
    args = LatentActionGRPOConfig(str(folder / "latent"), **engine_options(preset, device))
    trainer = LatentActionGRPOTrainer(model=model, args=args, **shared)
    # Texts of equal length, whatever random weights say: nothing ends them.
    trainer.eos_token_ids = []
    return Arm(trainer, batch_rows(preset, shared["train_dataset"]))


def token_arm(preset: Preset, folder: Path, device: torch.device) -> Arm:
    backbone = LlamaForCausalLM.from_pretrained(folder, dtype=preset.dtype).to(device)
    shared, options = shared_arguments(preset), engine_options(preset, device)
    args = GRPOConfig(str(folder / "token"), generation_kwargs={"ignore_eos": True}, **options)
    with unpacked_weights():
        trainer = GRPOTrainer(model=backbone, args=args, **shared)
    return Arm(trainer, batch_rows(preset, shared["train_dataset"]))


@contextmanager
def unpacked_weights():
    """vLLM packs linear weights for the CPU, and then TRL's new weights do not fit into its engine."""
    from vllm import _custom_ops

    packs = _custom_ops._supports_onednn
    _custom_ops._supports_onednn = False
    try:
        yield
    finally:
        _custom_ops._supports_onednn = packs


def measure_once(arms: dict[str, Arm], length: int) -> dict[str, float]:
    """Seconds of every part of each arm's step."""
    found: dict[str, float] = {}
    for name, arm in arms.items():
        parts, batch = arm.collect()
        assert bool((batch["completion_mask"].sum(dim=1) == length).all()), "the texts must have the length asked for"
        parts["update"], _ = seconds(lambda a=arm, b=batch: a.update(b))
        # Weights go to the engine once a step.
        arm.trainer.state.global_step += 1
        parts["step"] = sum(parts.values())
        found |= {f"{part}_{name}": value for part, value in parts.items()}
    return found


def measure(preset: Preset, device: torch.device, repeats: int, warmup: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        build_backbone(preset, device).save_pretrained(folder)
        processing_class(preset).save_pretrained(folder)
        arms = {}
        for name, build in (("latent", latent_arm), ("token", token_arm)):
            arms[name] = build(preset, folder, device)
            # Our engine starts with the first rollout.
            measure_once({name: arms[name]}, preset.completion_length)
        for repeat in tqdm(range(-warmup, repeats), desc="engine_step", unit="repeat"):
            found = measure_once(arms, preset.completion_length)
            tqdm.write("  ".join(f"{name} {value:.3g}" for name, value in found.items()))
            if repeat >= 0:
                for name, value in found.items():
                    times[name].append(value)
    return times


def report(result: dict[str, Any]) -> str:
    named = (("latent actions + vLLM", "latent"), ("TRL + vLLM, all text parameters", "token"))
    rows = [[name, *[result["seconds"][f"{part}_{arm}"] for part in PARTS]] for name, arm in named]
    shown = table(["trainer", *[f"{part}, s" for part in PARTS]], rows)
    ratio = result["step_ratio"]
    row = ["`step_ratio`", ratio, BAR, "yes" if ratio <= BAR else "no"]
    return f"{shown}\n\n{table(['ratio', 'measured', 'bar', 'met'], [row])}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, preset="micro", repeats=3)
    for name in ("prompts", "generations", "completion-length", "policy-layers"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    preset, device = PRESETS[options.preset].of_text(), use_device(options.device)
    use_clock(options.clock)
    if options.quick:
        preset = preset.scaled_down()
        # The smallest heads that vLLM has kernels for on a CPU.
        preset.text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = ("prompts", "generations", "completion_length", "policy_layers")
    preset = replace(preset, **{name: getattr(options, name) for name in sizes if getattr(options, name)})
    times = measure(preset, device, options.repeats, options.warmup)
    steps = zip(times["step_latent"], times["step_token"], strict=True)
    result = {
        "step_ratio": median([one / other for one, other in steps]),
        "seconds": {name: median(values) for name, values in times.items()},
        "spread": {name: spread(values) for name, values in times.items()},
        "preset": options.preset,
        "quick": options.quick,
        "clock": options.clock,
        "repeats": options.repeats,
        "sizes": {name: getattr(preset, name) for name in sizes} | {"layers": preset.text["num_hidden_layers"]},
        **facts(device),
    }
    print(report(result))
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
