"""
What a starting model's states hold: a small network learns the true answers of the RL questions from the states of one
layer, and is asked the held-out ones. No policy that reads these states can be expected to answer much better.

    python benchmarks/reproduction/probe.py --size pocket
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "examples" / "scripts")]

import torch  # noqa: E402
from arms import load_backbone, load_processor  # noqa: E402
from evaluate_pocket_vlm import probe  # noqa: E402
from matrix import SIZES  # noqa: E402
from page import figure, markdown  # noqa: E402
from tasks import Tasks  # noqa: E402
from tqdm import tqdm  # noqa: E402

from latent_trl.data.prompts import encode_prompts  # noqa: E402
from latent_trl.data.shapes import shape_questions  # noqa: E402


@torch.no_grad()
def last_states(model, processor, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The state after each prompt, of every layer: `[layers + 1, rows, d]`."""
    parts = []
    for start in range(0, len(rows), 64):
        inputs = encode_prompts(processor, rows[start : start + 64])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        states = model(**inputs, output_hidden_states=True).hidden_states
        parts.append(torch.stack([layer[:, -1].float().cpu() for layer in states]))
    return torch.cat(parts, dim=1)


def found(states, rows: list[dict[str, Any]], test_states, test_rows: list[dict[str, Any]], seed: int) -> float:
    """Share of `test_rows` that a probe fitted on `states` `[n, d]` of `rows` answers right; states are normed."""
    torch.manual_seed(seed)
    mean, std = states.mean(dim=0), states.std(dim=0) + 1e-5
    said = probe((states - mean) / std, [row["answer"] for row in rows], (test_states - mean) / std)
    return sum(one == row["answer"] for one, row in zip(said, test_rows, strict=True)) / len(test_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="pocket")
    size = SIZES[parser.parse_args().size]
    model, processor = load_backbone(size).eval(), load_processor(size)
    tasks = Tasks.load(size.questions, size.others)
    known = list(shape_questions("rl", seed=0))
    asked = {"held out": tasks.held_out, "other style": tasks.other_style}
    states = {name: last_states(model, processor, rows) for name, rows in asked.items()}
    table = []
    for layer, fit_on in enumerate(tqdm(last_states(model, processor, known), desc="probe", unit="layer")):
        scores = [
            [found(fit_on, known, states[name][layer], rows, seed) for seed in size.seeds]
            for name, rows in asked.items()
        ]
        table.append([str(layer) if layer else "0, embeddings", *map(figure, scores)])
    print(markdown(["states of layer", *asked], table))


if __name__ == "__main__":
    main()
