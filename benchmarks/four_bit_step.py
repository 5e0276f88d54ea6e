"""
Whether a whole RL step over latent actions fits on a card when the backbone's linear maps are in 4 bits (NF4): seconds
of its parts, and the peak memory of all that is on the device. Needs bitsandbytes.

    python benchmarks/four_bit_step.py --preset 7b --completion-length 256 --json four_bit_7b.json
"""

import argparse
import os
import tempfile
from collections import defaultdict
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from measuring import MIB, facts, median, peak_memory, seconds, table, tensor_bytes, use_device, write
from presets import PRESETS, build_backbone, in_four_bits
from rl_step import latent_arm
from tqdm.auto import tqdm

SIZES = ("prompts", "generations", "completion_length", "image_size", "policy_layers")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="7b")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--quick", action="store_true", help="the preset's layout with tiny sizes")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="decode without them")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    preset, device = PRESETS[options.preset], use_device(options.device)
    if options.quick:
        preset = preset.scaled_down()
    preset = replace(preset, **{name: getattr(options, name) for name in SIZES if getattr(options, name)})
    times: dict[str, list[float]] = defaultdict(list)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        cuda_graphs = False if options.no_cuda_graphs else None
        arm = latent_arm(preset, in_four_bits(build_backbone(preset, device)), folder, cuda_graphs=cuda_graphs)
        for repeat in tqdm(range(-options.warmup, options.repeats), desc="four_bit_step", unit="repeat"):
            with peak_memory(device) as peak:
                parts, batch = arm.collect()
                parts["update"] = seconds(lambda batch=batch: arm.update(batch))[0]
            if repeat >= 0:
                peaks.append((peak.before + peak.growth) / MIB)
                for name, value in {**parts, "step": sum(parts.values())}.items():
                    times[name].append(value)
        model = arm.trainer.model
        weights = tensor_bytes(model.parameters()) / MIB
        four_bit = sum(p.numel() for p in model.backbone.parameters() if type(p).__name__ == "Params4bit")
    result = {
        "seconds": {name: median(values) for name, values in times.items()},
        "peak_mib": max(peaks),
        "weight_mib": weights,
        "four_bit_mib": four_bit / MIB,
        "preset": options.preset,
        "quick": options.quick,
        "cuda_graphs": not options.no_cuda_graphs,
        "repeats": options.repeats,
        "sizes": {name: getattr(preset, name) for name in SIZES},
        **facts(device),
    }
    memory = ("four_bit_mib", "weight_mib", "peak_mib")
    names = [*(f"{name}, s" for name in times), "weights in 4 bits, MiB", "all weights, MiB", "peak, MiB"]
    print(table(names, [[*result["seconds"].values(), *map(result.get, memory)]]))
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
