"""The event loop in which async rewards run, whether or not another one runs already."""

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections.abc import Awaitable
from typing import Any

from .time_limit import OverTime

# Seconds after which a loop whose functions are over their time, and that has not cancelled them, is given up.
GRACE = 1.0


def run_together(awaitables: list[Awaitable], seconds: float | None = None) -> list[Any]:
    """
    Results of awaitables, or the exceptions that they raise; also where an event loop runs already.

    Args:
        awaitables (`list[Awaitable]`): Run side by side.
        seconds (`float`, *optional*): After which each is cancelled, and its result is [`OverTime`].

    Raises:
        RuntimeError: Inside an async reward, which would wait for itself.
    """

    async def settled(awaitable):
        # `SystemExit` and the like would end the loop, for which the caller waits.
        try:
            return await awaitable
        except BaseException as error:
            return error

    async def limited(awaitable):
        task = asyncio.ensure_future(settled(awaitable))
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if done:
            return task.result()
        # It may refuse to be cancelled, and is not waited for.
        task.cancel()
        raise OverTime

    async def gathered():
        return await asyncio.gather(*map(limited, awaitables), return_exceptions=True)

    # The loop runs in a thread of its own.
    loop = _event_loop(os.getpid())
    if _running_loop() is loop:
        raise RuntimeError("An async reward cannot wait for other rewards in this way. Await them.")
    future = asyncio.run_coroutine_threadsafe(gathered(), loop)
    try:
        return future.result(None if seconds is None else seconds + GRACE)
    except concurrent.futures.TimeoutError:
        # An async function that waits without `await` stops its loop: the next call has a new one.
        _event_loop.cache_clear()
        return [OverTime() for _ in awaitables]
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
