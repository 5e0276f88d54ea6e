"""
What a step of RL over latent actions costs as sizes grow: codes (K), completion length, samples a prompt (G), depth of
the policy. One size varies, the others stay; lines are fitted through the medians. With `--held-out` the counts of work
of `cost_model.py` are fitted to all points together, and a size that is none of them is predicted and then measured.

    python benchmarks/scaling.py --preset mini --json scaling.json --plot scaling.png
    python benchmarks/scaling.py --preset mini --held-out completion_length=64 generations=8 policy_layers=6
    python benchmarks/scaling.py --preset small --num-codes 16 256 4096 --completion-length 16 32 64 --repeats 3
"""

import argparse
import os
import tempfile
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from cost_model import Layout, Step, fit_seconds, predicted, work
from measuring import MIB, facts, median, peak_memory, seconds, table, use_clock, use_device, write
from presets import PRESETS, Preset, add_options, build_backbone
from rl_step import latent_arm
from tqdm.auto import tqdm

SIZES = {
    "num_codes": [16, 64, 256, 1024, 4096],
    "completion_length": [64, 128, 256, 512, 1024],
    "generations": [2, 4, 8, 16, 32],
    "policy_layers": [1, 2, 4, 8],
}
LABELS = {
    "num_codes": "codes, K",
    "completion_length": "completion length, tokens",
    "generations": "samples a prompt, G",
    "policy_layers": "policy layers",
}
FIGURES = ("rollout", "update", "step", "update_mib", "rollout_mib")


def measure_point(preset: Preset, backbone, num_codes: int, repeats: int, warmup: int) -> dict[str, float]:
    """Medians of seconds, and MiB over the weights, at one choice of sizes."""
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    with tempfile.TemporaryDirectory() as folder:
        arm = latent_arm(preset, backbone, folder, num_codes=num_codes)
        for repeat in range(-warmup, repeats):
            with peak_memory(backbone.device) as peak:
                parts, batch = arm.collect()
            update = seconds(lambda batch=batch: arm.update(batch))[0]
            if repeat >= 0:
                values = (parts["rollout"], update, sum(parts.values()) + update)
                for name, value in zip(FIGURES, values):
                    found[name].append(value)
                found["rollout_mib"].append(peak.growth / MIB)
        found["update_mib"].append(arm.update_memory(batch) / MIB)
    return {name: median(values) for name, values in found.items()}


def fit(sizes: list[int], values: list[float]) -> dict[str, float]:
    """The line through the points: cost of one more unit, cost at zero, and how much of the variance it explains."""
    slope, intercept = np.polyfit(sizes, values, 1)
    rest = np.var(np.array(values) - (slope * np.array(sizes) + intercept))
    explained = 1 - rest / np.var(values) if np.var(values) > 0 else 1.0
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(explained)}


def counts(preset: Preset, num_codes: int) -> dict[str, dict[str, float]]:
    """Calls and floating-point operations of a rollout and of an update of a preset."""
    text = preset.text
    layout = Layout(
        *(text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]),
        *(text["num_attention_heads"], text["num_key_value_heads"], text["vocab_size"]),
        policy_layers=preset.policy_layers,
        codes=num_codes,
    )
    step = Step(preset.prompts, preset.generations, preset.prompt_characters, preset.completion_length)
    calls = {"rollout": float(preset.completion_length), "update": 1.0}
    return {name: {"calls": calls[name], "operations": amount} for name, amount in work(layout, step).items()}


def cost(
    preset: Preset, curves: dict[str, Any], held_out: dict[str, int], measured: dict[str, float]
) -> dict[str, Any]:
    """Constants fitted through the points of all curves, and what they say of the size that was held out."""
    points: dict[str, list[dict[str, float]]] = {"rollout": [], "update": []}
    for name, curve in curves.items():
        for i, size in enumerate(curve["sizes"]):
            varied = preset if name == "num_codes" else replace(preset, **{name: size})
            found = counts(varied, size if name == "num_codes" else 128)
            for figure in points:
                points[figure].append({**found[figure], figure: curve[figure][i]})
    of_held_out, result = counts(replace(preset, **held_out), 128), {}
    for figure in points:
        constants = fit_seconds(points[figure], figure)
        guess = predicted(constants, **of_held_out[figure])
        result[figure] = {**constants, "predicted": guess, "measured": measured[figure], "points": len(points[figure])}
    return result


def plot(curves: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(curves), figsize=(3.4 * len(curves), 5.6), squeeze=False)
    for column, (name, curve) in enumerate(curves.items()):
        for row, (figures, unit) in enumerate(((FIGURES[:3], "seconds"), (FIGURES[3:], "MiB over the weights"))):
            axis = axes[row][column]
            for figure_name in figures:
                part = figure_name.removesuffix("_mib")
                colour = f"C{FIGURES.index(part)}"
                axis.plot(curve["sizes"], curve[figure_name], "o", color=colour, label=part)
                line = curve["fits"][figure_name]
                ends = np.array([min(curve["sizes"]), max(curve["sizes"])])
                axis.plot(ends, line["slope"] * ends + line["intercept"], color=colour, linewidth=1)
            axis.set_xlabel(LABELS[name])
            axis.set_ylim(bottom=0)
            if column == 0:
                axis.set_ylabel(unit)
                axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(curves: dict[str, Any]) -> str:
    parts = []
    for name, curve in curves.items():
        rows = [[size, *[curve[figure][i] for figure in FIGURES]] for i, size in enumerate(curve["sizes"])]
        for label, figure_of_fit in (("one more costs", "slope"), ("R² of the line", "r2")):
            rows.append([label, *[curve["fits"][figure][figure_of_fit] for figure in FIGURES]])
        parts.append(table([LABELS[name], "rollout, s", "update, s", "step, s", "update, MiB", "rollout, MiB"], rows))
    return "\n\n".join(parts)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, preset="mini", repeats=5)
    parser.add_argument("--plot", help="picture to write")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes to vary")
    for name, sizes in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", default=sizes, help=LABELS[name])
    parser.add_argument("--held-out", nargs="+", metavar="SIZE=NUMBER", help="a size to predict, and then to measure")
    options = parser.parse_args(arguments)
    options.held_out = {name: int(value) for name, value in (word.split("=") for word in options.held_out or [])}
    if not set(options.held_out) <= set(SIZES) - {"num_codes"}:
        parser.error(f"--held-out takes {sorted(set(SIZES) - {'num_codes'})}")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    preset, device = PRESETS[options.preset], use_device(options.device)
    use_clock(options.clock)
    if options.quick:
        preset = preset.scaled_down()
    backbone = build_backbone(preset, device)
    points = [(name, size) for name in options.only for size in sorted(set(getattr(options, name)))]
    curves: dict[str, Any] = {}
    for name, size in tqdm(points, desc="scaling", unit="point"):
        varied = preset if name == "num_codes" else replace(preset, **{name: size})
        codes = size if name == "num_codes" else 128
        found = measure_point(varied, backbone, codes, options.repeats, options.warmup)
        curve = curves.setdefault(name, {"sizes": [], **{figure: [] for figure in FIGURES}})
        curve["sizes"].append(size)
        for figure, value in found.items():
            curve[figure].append(value)
    for curve in curves.values():
        curve["fits"] = {figure: fit(curve["sizes"], curve[figure]) for figure in FIGURES}
    sizes = ("prompts", "generations", "prompt_characters", "completion_length", "image_size", "policy_layers")
    result = {
        "curves": curves,
        "preset": options.preset,
        "quick": options.quick,
        "repeats": options.repeats,
        "clock": options.clock,
        "sizes": {name: getattr(preset, name) for name in sizes} | {"num_codes": 128},
        **facts(device),
    }
    print(report(curves))
    if options.held_out:
        measured = measure_point(replace(preset, **options.held_out), backbone, 128, options.repeats, options.warmup)
        result["held_out"], result["cost"] = options.held_out, cost(preset, curves, options.held_out, measured)
        rows = [[name, *(found[key] for key in ("predicted", "measured"))] for name, found in result["cost"].items()]
        print("\n" + table([f"held out: {options.held_out}", "predicted, s", "measured, s"], rows))
    write(options.json, result)
    if options.plot:
        plot(curves, options.plot)
    return result


if __name__ == "__main__":
    main()
