"""Times, peak memory, tables and the facts of a measurement."""

import ctypes
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = time.perf_counter


def use_clock(name: str) -> None:
    """
    What time is measured by: `wall`, or `cpu`, the processor time of this process. The second is for one thread on a
    machine that other processes use as well.
    """
    global _clock
    if name == "cpu" and (torch.get_num_threads() > 1 or torch.cuda.is_available()):
        raise SystemExit("--clock cpu is for one thread without a GPU: set OMP_NUM_THREADS=1.")
    _clock = CLOCKS[name]


def now() -> float:
    """Seconds, once the device has done its work."""
    synchronize()
    return _clock()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long `call` takes, with the work that it left on the device, and what it returns."""
    start = now()
    result = call()
    return now() - start, result


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles over the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / median(values)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Peak:
    """`growth` is the most memory in use inside the block over what was in use `before` it, in bytes."""

    growth: int = 0
    before: int = 0


@contextmanager
def peak_memory(device: torch.device):
    """A [`Peak`], filled in at the end of the block: of the GPU, or of the process where there is none (Linux)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peak.before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.growth = torch.cuda.max_memory_allocated() - peak.before
        return
    # What the allocator keeps for itself would hide the first part of the growth.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    peak.before, done = resident_bytes(), threading.Event()

    def watch():
        while not done.wait(0.005):
            peak.growth = max(peak.growth, resident_bytes() - peak.before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def tensor_bytes(tensors) -> int:
    """Bytes of distinct tensors."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return tensor_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


def facts(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    import accelerate
    import peft
    import transformers
    import trl

    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), cpu)
    modules = (torch, transformers, trl, peft, accelerate)
    return {
        "versions": {module.__name__: module.__version__ for module in modules},
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
    }


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers with three digits."""

    def cell(value) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and value < 1000
            else f"{value:,.0f}"
            if isinstance(value, float)
            else str(value)
        )

    lines = [header, ["---"] * len(header), *[[cell(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: str | None, result: dict[str, Any]) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def use_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
