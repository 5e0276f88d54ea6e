"""What a reward function does to the process that calls it: random numbers and working directory are put back."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SLOW_AFTER = 600.0


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


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """
    Puts back the generators of Python, NumPy and PyTorch, and the working directory. A function that seeds them would
    have every rollout draw the same codes, and one that leaves the directory would have checkpoints written elsewhere.
    """
    folder = os.getcwd()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)
        if os.getcwd() != folder:
            logger.warning_once(f"A reward function has changed the working directory; it is {folder!r} again.")
            os.chdir(folder)


def own_copy(value: Any) -> Any:
    """Lists and dicts anew, however deep: whoever is given them changes nobody else's. What they hold is shared."""
    if isinstance(value, list):
        return [own_copy(one) for one in value]
    if isinstance(value, dict):
        return {name: own_copy(one) for name, one in value.items()}
    return value
