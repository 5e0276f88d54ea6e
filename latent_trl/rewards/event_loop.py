"""The event loop in which async rewards run, whether or not another one runs already."""

import asyncio
import functools
import os
from collections.abc import Awaitable
from typing import Any

from trl.trainer.utils import start_event_loop_in_daemon


def run_together(awaitables: list[Awaitable]) -> list[Any]:
    """Results of awaitables, or the exceptions that they raise; also where an event loop runs already."""

    async def gathered():
        return await asyncio.gather(*awaitables, return_exceptions=True)

    # The loop runs in a thread of its own.
    future = asyncio.run_coroutine_threadsafe(gathered(), _event_loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def run_async(awaitable: Awaitable[Any]) -> Any:
    """The result of one awaitable, also where an event loop runs already."""
    (outcome,) = run_together([awaitable])
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of a process. It lives as long as the process, so that functions may keep their connections."""
    _, loop, ready = start_event_loop_in_daemon("rewards")
    ready.wait()
    return loop
