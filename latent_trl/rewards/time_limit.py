"""A time limit for reward functions: one that does not return within it is no longer waited for."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch


class OverTime(Exception):
    """A reward function has not returned within its time."""


def check_timeout(name: str, seconds: float | None) -> None:
    """Raises `ValueError` unless `seconds`, the argument of that name, is `None` or above 0."""
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`{name}` must be above 0 seconds, or None to wait as long as it takes; got {seconds}.")


def call_within(seconds: float | None, function: Callable[[], Any]) -> Any:
    """
    What `function` returns or raises. With a limit it runs in a thread of its own, which is left to itself when the
    time is up: Python cannot end it.

    Raises:
        OverTime: When it has not returned within `seconds`.
    """
    if seconds is None:
        return function()
    outcome: list[tuple[Any, BaseException | None]] = []
    # Both are a thread's own.
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(grad):
                outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise OverTime
    ((result, error),) = outcome
    if error is not None:
        raise error
    return result
