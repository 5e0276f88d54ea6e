"""
What latent actions on a large backbone take on several GPUs: memory, bytes on the wire, and rollout machines.
Arithmetic over the sizes of Qwen2.5-VL; nothing is run. `scaling.py --held-out` fits the same counts of work to
measured seconds, and predicts a size that was not fitted.

    python benchmarks/cost_model.py
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from measuring import table

GIB, GB = 2**30, 1e9
BF16, FLOAT = 2, 4
# Weight, gradient and AdamW's two moments in float32, of what is trained.
TRAINED = 16


@dataclass(frozen=True)
class Layout:
    """
    Sizes of a backbone of Qwen's kind, and of the components on it.

    Args:
        hidden, intermediate, layers, heads, key_value_heads, vocabulary (`int`): Of the text model.
        tied (`bool`): Whether head and embedding are one tensor.
        vision (`int`): Parameters of the vision tower.
        policy_layers (`int`): Of the backbone's own shape.
        codes (`int`): K.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 152_064
    tied: bool = False
    vision: int = 676_000_000
    policy_layers: int = 8
    codes: int = 128

    @property
    def layer(self) -> int:
        d, kv = self.hidden, self.hidden // self.heads * self.key_value_heads
        return 2 * d * d + 2 * d * kv + d + 2 * kv + 3 * d * self.intermediate + 2 * d

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def text(self) -> int:
        """Parameters of the text model's layers."""
        return self.layers * self.layer

    @property
    def backbone(self) -> int:
        return self.vision + self.text + self.embedding * (1 if self.tied else 2)

    @property
    def policy(self) -> int:
        return self.policy_layers * self.layer + self.hidden + self.codes * self.hidden

    @property
    def others(self) -> int:
        """World model, codebook and projector, which RL does not train; the inverse model is left at home."""
        return 10 * self.hidden * self.intermediate + self.codes * self.hidden + 4 * self.hidden**2


QWEN = {
    "3B": Layout(2048, 11_008, 36, 16, 2, 151_936, tied=True, vision=669_000_000),
    "7B": Layout(3584, 18_944, 28, 28, 4),
    "32B": Layout(5120, 27_648, 64, 40, 8),
    "72B": Layout(8192, 29_568, 80, 64, 8),
}


@dataclass(frozen=True)
class Step:
    """An RL step of one GPU: prompts, samples of each (G), tokens of a prompt (P) and of a completion (C), and updates
    of the rollout batch."""

    prompts: int = 4
    generations: int = 8
    prompt: int = 512
    completion: int = 512
    updates: int = 1

    @property
    def rows(self) -> int:
        return self.prompts * self.generations


def memory(layout: Layout, engine: str, gpus: int, step: Step, reference: bool = False) -> float:
    """
    Bytes on one GPU at the peak of an update with a frozen backbone, without activations.

    Args:
        engine (`str`): One of `ENGINES`. `"ZeRO-3"` gathers all of the model for a rollout.
        reference (`bool`): Whether there is a policy to measure from (`beta`), which no engine shards.
    """
    policy, others, backbone = layout.policy, layout.others * BF16, layout.backbone * BF16
    kept = step.rows * (step.prompt + step.completion) * layout.hidden * BF16
    copy = layout.policy * FLOAT if reference else 0
    # What one pass gathers at a time: a layer, and what is not in layers. Two layers, as one is fetched ahead.
    at_hand = (2 * layout.layer + 2 * layout.embedding) * BF16 + others
    if engine == "DDP":
        held = backbone + others + TRAINED * policy
    elif engine == "DDP, 4-bit":
        held = layout.text * 0.55 + (layout.backbone - layout.text) * BF16 + others + TRAINED * policy
    elif engine == "ZeRO-2":
        held = backbone + others + (BF16 + FLOAT) * policy + (TRAINED - FLOAT) * policy / gpus
    elif engine == "FSDP2":
        held = (backbone + others + TRAINED * policy) / gpus + at_hand + layout.vision * BF16
    elif engine == "ZeRO-3, rollouts elsewhere":
        held = (backbone + others + TRAINED * policy) / gpus + at_hand
    elif engine == "ZeRO-3":
        held = (backbone + others + TRAINED * policy) / gpus + backbone + others + BF16 * policy
    else:
        raise ValueError(f"`engine` must be one of {list(ENGINES)}, got {engine!r}.")
    return held + kept + copy


ENGINES = ("DDP", "DDP, 4-bit", "ZeRO-2", "FSDP2", "ZeRO-3", "ZeRO-3, rollouts elsewhere")


def wire(layout: Layout, engine: str, gpus: int, step: Step) -> dict[str, float]:
    """Bytes that one GPU sends for the gradient of an update, for the passes of the policy in it, and for the backbone
    while a rollout is generated. The backbone's states of the rollout are kept: an update never runs it."""
    share, policy = (gpus - 1) / gpus, layout.policy
    if engine.startswith("DDP"):
        return {"gradient": 2 * share * FLOAT * policy, "passes": 0.0, "rollout": 0.0}
    if engine == "ZeRO-2":
        return {"gradient": share * (FLOAT + BF16) * policy, "passes": 0.0, "rollout": 0.0}
    # Forward and backward gather the layers, and each decoded token those of the backbone too.
    per_token = share * BF16 * (layout.text + policy)
    rollout = {"FSDP2": step.completion * per_token, "ZeRO-3": share * BF16 * (layout.backbone + policy)}.get(
        engine, 0.0
    )
    return {"gradient": share * FLOAT * policy, "passes": 2 * share * BF16 * policy, "rollout": rollout}


@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet, and the parts of it that are had: assumptions, to be replaced by measured ones."""

    flops: float = 989e12
    bandwidth: float = 3.35e12
    of_flops: float = 0.4
    of_bandwidth: float = 0.6


def work(layout: Layout, step: Step) -> dict[str, float]:
    """Floating-point operations of a rollout and of all updates of it: 2 a parameter and token forward, 6 with the
    backward pass. Attention over the text is left out."""
    prompts, tokens = step.prompts * step.prompt, step.rows * step.completion
    per_token = layout.text + layout.policy + layout.others + layout.embedding
    rollout = 2 * (layout.text + layout.policy) * prompts + 2 * per_token * tokens
    return {"rollout": rollout, "update": 6 * layout.policy * (prompts + tokens) * step.updates}


def seconds(layout: Layout, step: Step, machine: Machine = Machine()) -> dict[str, float]:
    """Of a rollout, in which each decoded token reads all weights once, and of the updates, on one such GPU."""
    found = work(layout, step)
    weights = BF16 * (layout.text + layout.policy + layout.others + layout.embedding)
    reading = step.completion * weights / (machine.bandwidth * machine.of_bandwidth)
    rate = machine.flops * machine.of_flops
    return {"rollout": max(reading, found["rollout"] / rate), "update": found["update"] / rate}


def rollout_machines(layout: Layout, step: Step, machine: Machine = Machine()) -> int:
    """Rollout GPUs that keep one training GPU at work."""
    times = seconds(layout, step, machine)
    return int(np.ceil(times["rollout"] / times["update"]))


def fit_seconds(points: list[dict[str, float]], figure: str) -> dict[str, float]:
    """
    Seconds of `figure` as a fixed part, a part a call, and a part an operation, none of them negative.

    Args:
        points (`list[dict]`): With `calls` (decoded tokens, or 1 for an update), `operations` and the seconds.
    """
    from scipy.optimize import nnls

    design = np.array([[1.0, point["calls"], point["operations"]] for point in points])
    scale = design.max(axis=0)
    found, _ = nnls(design / scale, np.array([point[figure] for point in points]))
    return dict(zip(("fixed", "a_call", "an_operation"), (found / scale).tolist()))


def predicted(constants: dict[str, float], calls: float, operations: float) -> float:
    """What [`fit_seconds`] says of another size."""
    return constants["fixed"] + constants["a_call"] * calls + constants["an_operation"] * operations


def report(gpus: int = 8) -> str:
    step, parts = Step(), []
    rows: list[list[Any]] = []
    for name, layout in QWEN.items():
        rows.append([name, *[f"{count / 1e6:,.0f}" for count in (layout.backbone, layout.policy, layout.others)]])
    parts.append(table(["backbone", "parameters, M", "policy of 8 layers, M", "other components, M"], rows))
    rows = [
        [f"{name}, {engine}", *[f"{memory(layout, engine, n, step) / GIB:,.0f}" for n in (1, 2, gpus)]]
        for name, layout in QWEN.items()
        for engine in ENGINES
    ]
    parts.append(table(["GiB a GPU", "1 GPU", "2 GPUs", f"{gpus} GPUs"], rows))
    rows = []
    for name, layout in QWEN.items():
        for engine in ("DDP", "ZeRO-2", "FSDP2", "ZeRO-3"):
            sent = wire(layout, engine, gpus, step)
            rows.append(
                [f"{name}, {engine}", *[f"{sent[part] / GB:,.1f}" for part in ("gradient", "passes", "rollout")]]
            )
    parts.append(table([f"GB sent a GPU and step, {gpus} GPUs", "gradient", "policy's passes", "rollout"], rows))
    rows = []
    for name, layout in QWEN.items():
        for updates in (1, 4):
            own = Step(updates=updates)
            times = seconds(layout, own)
            machines = rollout_machines(layout, own)
            cells = [f"{times['rollout']:.1f}", f"{times['update']:.2f}", machines]
            rows.append([name, updates, *cells, f"{layout.policy * BF16 / GB:.1f}"])
    header = [
        "backbone",
        "updates a batch",
        "rollout, s",
        "updates, s",
        "rollout GPUs a training GPU",
        "policy sent, GB",
    ]
    parts.append(table(header, rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(report())
