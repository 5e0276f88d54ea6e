"""How long learning and RL take, by arithmetic calibrated on the one GPU run that was measured."""

from dataclasses import dataclass

from .layout import Layout
from .memory import FOUR_BITS, HALF, RESTING, Batch

# What preset `3b` of `benchmarks/rl_step.py` reached on an H100 (docs/speed.md, "On a GPU"): 12.7 ms for a token of 8
# rows and .129 s for an update, both bound by the host that launches kernels. Larger batches reach more.
BANDWIDTH_SHARE, FLOPS_SHARE = 0.2, 0.07
# Codes that the policy stage reads at some positions of each row.
CLONED_POSITIONS = 4


@dataclass
class Gpu:
    """
    A GPU by its data sheet.

    Args:
        name (`str`): What is sold with that memory.
        memory (`float`): GiB.
        bandwidth (`float`): Bytes a second of its memory.
        flops (`float`): Dense bfloat16 operations a second.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float


GPUS = [
    Gpu("RTX 4090", 24, 1.008e12, 1.65e14),
    Gpu("L40S", 48, 8.64e11, 3.62e14),
    Gpu("A100", 80, 2.039e12, 3.12e14),
    Gpu("H200", 141, 4.8e12, 9.89e14),
]
H100 = Gpu("H100", 80, 3.35e12, 9.89e14)


def nearest_gpu(memory: float) -> Gpu:
    """The GPU of the list whose memory, in GiB, is nearest."""
    return min(GPUS, key=lambda gpu: abs(gpu.memory - memory))


def learning_seconds(layout: Layout, gpu: Gpu, batch: Batch, tokens: float) -> float:
    """Seconds of the four stages over so many tokens each."""
    backbone = 2 * layout.parameters("backbone")
    head = 6 * layout.vocabulary * layout.width
    there = layout.components
    space = sum(
        layout.parameters(name)
        for name in ("inverse_dynamics", "codebook", "world_model", "projector")
        if name in there
    )
    reads = 2 * layout.config.num_codes * CLONED_POSITIONS * layout.vocabulary * layout.width / batch.length
    stages = 4 if "projector" in there else 3
    operations = stages * backbone + 2 * (6 * space + head) + 6 * layout.parameters("policy") + reads
    return tokens * operations / (gpu.flops * FLOPS_SHARE)


def rl_step_seconds(layout: Layout, gpu: Gpu, batch: Batch, four_bit: bool = False) -> tuple[float, float]:
    """
    Seconds of the rollout and of the update of one step of `batch.completions` completions.

    Args:
        layout (`Layout`), gpu (`Gpu`), batch (`Batch`): What runs, where, and how much at once.
        four_bit (`bool`, defaults to `False`): The backbone's linear maps in 4 bits.
    """
    prompts = max(1, batch.completions // batch.generations)
    operations, bandwidth = gpu.flops * FLOPS_SHARE, gpu.bandwidth * BANDWIDTH_SHARE
    text = sum(parameter.numel() for parameter in layout.backbone.get_decoder().parameters())
    packed = layout.quantizable() if four_bit else 0
    names = [name for name in ("policy", "codebook", "world_model") if name in layout.components]
    read = packed * FOUR_BITS + (text - packed) * HALF + layout.parameters(*names) * RESTING
    length = batch.prompt_length + batch.completion_length
    caches = layout.cache_bytes(layout.backbone.get_decoder()) * length * batch.completions
    prefill = 2 * layout.parameters("backbone") * batch.prompt_length * prompts / operations
    decoding = batch.completion_length * (read + caches) / bandwidth
    states = batch.prompt_length * prompts + batch.completion_length * batch.completions
    update = 6 * layout.parameters("policy") * states / operations
    return prefill + decoding, update
