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
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from arms import load_backbone, load_processor  # noqa: E402
from matrix import SIZES  # noqa: E402
from page import figure, markdown  # noqa: E402
from tasks import Tasks  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from latent_trl.data.prompts import encode_prompts  # noqa: E402
from latent_trl.data.shapes import shape_questions  # noqa: E402

HIDDEN, STEPS, BATCH = 256, 1500, 128


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


def fitted(states: torch.Tensor, targets: torch.Tensor, classes: int, seed: int) -> nn.Module:
    """A network of one hidden layer that tells `targets` `[n]` from `states` `[n, d]`."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.BatchNorm1d(states.shape[1], affine=False),
        nn.Linear(states.shape[1], HIDDEN),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(HIDDEN, classes),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    for _ in range(STEPS):
        rows = torch.randint(len(states), (BATCH,))
        loss = nn.functional.cross_entropy(network(states[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> float:
    return (network(states).argmax(dim=-1) == targets).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="pocket")
    size = SIZES[parser.parse_args().size]
    model, processor = load_backbone(size).eval(), load_processor(size)
    tasks = Tasks.load(size.questions, size.others)
    known = list(shape_questions("rl", seed=0))
    answers = sorted({row["answer"] for row in known})

    def targets(rows: list[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([answers.index(row["answer"]) for row in rows])

    asked = {"held out": tasks.held_out, "other style": tasks.other_style}
    states = {name: last_states(model, processor, rows) for name, rows in asked.items()}
    fit_on, truth = last_states(model, processor, known), targets(known)
    table = []
    for layer in tqdm(range(len(fit_on)), desc="probe", unit="layer"):
        networks = [fitted(fit_on[layer], truth, len(answers), seed) for seed in size.seeds]
        found = [
            [accuracy(network, states[name][layer], targets(rows)) for network in networks]
            for name, rows in asked.items()
        ]
        table.append([str(layer) if layer else "0, embeddings", *map(figure, found)])
    print(markdown(["states of layer", *asked], table))


if __name__ == "__main__":
    main()
