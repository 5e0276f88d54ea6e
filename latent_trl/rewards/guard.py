"""What a reward function does to the process that calls it: what a run relies on is put back."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SLOW_AFTER = 600.0
# How settings are read, and put back.
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    # A default device that is set, the CPU too, slows down every call into PyTorch.
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (sys.getrecursionlimit, sys.setrecursionlimit),
]


@contextmanager
def named_when_slow(name: str) -> Iterator[None]:
    """Says every `SLOW_AFTER` seconds which reward function the run is waiting for."""
    done = threading.Event()

    def watch() -> None:
        waited = 0.0
        while not done.wait(SLOW_AFTER):
            waited += SLOW_AFTER
            logger.warning(f"The reward function {name!r} has not returned for {waited:,.0f} s; the run waits for it.")

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        # It has been removed.
        return None


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """
    Puts back what a reward function may have changed: the generators of Python, NumPy and PyTorch, PyTorch's settings,
    the working directory, and who handles SIGTERM and SIGINT. A function that seeds the
    generators would have every rollout draw the same codes, and one that leaves the directory would have checkpoints
    written elsewhere. Environment variables stay as they are, and a warning names them.
    """
    folder, environment = os.getcwd(), dict(os.environ)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    # Python has the main thread alone change handlers.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    settings = [get() for get, _ in SETTINGS]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for (get, put_back), value in zip(SETTINGS, settings, strict=True):
            if get() != value:
                put_back(value)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if _working_directory() != folder:
            try:
                os.chdir(folder)
                logger.warning_once(f"A reward function has changed the working directory; it is {folder!r} again.")
            except OSError as error:
                logger.warning_once(f"A reward function has left the working directory, which is gone: {error}.")
        changed = sorted(
            name for name in environment.keys() | os.environ if environment.get(name) != os.environ.get(name)
        )
        if changed:
            logger.warning_once(f"A reward function has changed the environment variables {changed}; they stay so.")


def own_copy(value: Any) -> Any:
    """Lists and dicts anew, however deep: whoever is given them changes nobody else's. What they hold is shared."""
    if isinstance(value, list):
        return [own_copy(one) for one in value]
    if isinstance(value, dict):
        return {name: own_copy(one) for name, one in value.items()}
    return value
