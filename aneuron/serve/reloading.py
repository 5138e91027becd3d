"""Models that are loaded anew while they serve.

Lives here: one after the other, in a thread, then `swap`. Must not be here: signals, requests.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

from aneuron.serve.loading import Made

T = TypeVar("T")
logger = logging.getLogger("aneuron.serve")


class Reloading:
    """Loads models anew, from where they came: a file is read again, a module imported again."""

    def __init__(self, made: Iterable[Made]) -> None:
        self._made = {each.name: each for each in made}
        self._one = asyncio.Lock()  # cores have room for one model more

    async def load(self, name: str) -> None:
        """Have one serve as its source is now. If it fails, it serves as before; raises what `swap` and loading raise.

        No call fails or is lost meanwhile; cancelled before the new model serves, nothing changes.
        """
        made = self._made[name]
        async with self._one:
            began = time.monotonic()
            await made.model.swap(await _in_a_thread(made.reload))
            logger.info("%s: swapped for %s in %.1f s", name, made.source, time.monotonic() - began)

    async def load_all(self) -> None:
        """The same for all, in order; those that fail are in the log."""
        for name in self._made:
            try:
                await self.load(name)
            except Exception as error:  # whatever loading, or a module that is imported, raises
                why = f"{type(error).__name__}: {error}"
                logger.error("%s: not loaded anew, serves as before: %s", name, why, exc_info=error)


async def _in_a_thread(work: Callable[[], T]) -> T:
    """Have it done in a thread that the process does not wait for at its end, as it does for those of `to_thread`. Who
    is cancelled leaves the thread to itself.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def end(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.cancelled():
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome: Any = done.set_result, work()
        except BaseException as error:
            outcome = done.set_exception, error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, *outcome)

    Thread(target=run, name="aneuron load", daemon=True).start()
    return await done
