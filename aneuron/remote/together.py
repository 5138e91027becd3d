"""Coroutines side by side.

Lives here: what becomes of the others when one fails. Must not be here: what they do.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from typing import Any


async def all_of(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Side by side; the first error cancels the others, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except BaseException:
        await _cancelled(tasks)
        raise
    await _cancelled(rest)
    failed = [task for task in tasks if task in done and task.exception() is not None]
    if failed:
        error = failed[0].exception()
        assert error is not None
        raise error
    return [task.result() for task in tasks]


async def _cancelled(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(BaseException):
            await task


async def each_of(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Side by side; results, or errors."""
    return await asyncio.gather(*coroutines, return_exceptions=True)
