"""The event loop in which async rewards run, whether or not another one runs already."""

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable
from typing import Any


def run_together(awaitables: list[Awaitable]) -> list[Any]:
    """
    Results of awaitables, or the exceptions that they raise; also where an event loop runs already.

    Raises:
        RuntimeError: Inside an async reward, which would wait for itself.
    """

    async def gathered():
        return await asyncio.gather(*awaitables, return_exceptions=True)

    # The loop runs in a thread of its own.
    loop = _event_loop(os.getpid())
    if _running_loop() is loop:
        raise RuntimeError("An async reward cannot wait for other rewards in this way. Await them.")
    future = asyncio.run_coroutine_threadsafe(gathered(), loop)
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


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of a process. It lives as long as the process, so that functions may keep their connections."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
