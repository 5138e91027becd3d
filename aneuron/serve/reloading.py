"""Models that are loaded anew while they serve.

Lives here: one after the other, in a thread, then `swap`. Must not be here: signals, requests.
"""

import asyncio
import logging
import time
from collections.abc import Iterable

from aneuron import AsyncDataParallel
from aneuron.serve.config import ConfigError
from aneuron.serve.loading import Made

logger = logging.getLogger("aneuron.serve")


class Reloading:
    """Loads models anew, from where they came: a file is read again, a module imported again."""

    def __init__(self, made: Iterable[Made]) -> None:
        self._made = {each.name: each for each in made}
        self._one = asyncio.Lock()  # modules are imported again one at a time, and cores have room for one model more

    async def load(self, name: str) -> None:
        """Have one serve as its source is now. If it fails, it serves as before; raises what `swap` and loading raise.

        No call fails or is lost meanwhile; cancelled before the new model serves, nothing changes.
        """
        made = self._made[name]
        async with self._one:
            began = time.monotonic()
            model = await asyncio.to_thread(made.reload)
            if isinstance(model, AsyncDataParallel):
                raise ConfigError(
                    f"models.{name}: {made.source!r} makes an AsyncDataParallel; only what it runs can be loaded anew: "
                    "name its module, or a function that makes one"
                )
            await made.model.swap(model)
            logger.info("%s: swapped for %s in %.1f s", name, made.source, time.monotonic() - began)

    async def load_all(self) -> None:
        """The same for all, in order; those that fail are in the log."""
        for name in self._made:
            try:
                await self.load(name)
            except Exception as error:
                logger.error("%s: not loaded anew, serves as before: %s: %s", name, type(error).__name__, error)
