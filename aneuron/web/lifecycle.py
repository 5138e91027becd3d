"""Models that live as long as an application serves.

Lives here: starting, draining, freezing the garbage collector. Must not be here: a web framework.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from aneuron import AsyncDataParallel
from aneuron.web.problems import logger

Left = Callable[[], float | None]  # seconds that there are still, asked at the end; None: no bound


@asynccontextmanager
async def serving(models: Mapping[str, AsyncDataParallel], left: Left) -> AsyncIterator[None]:
    """Start the models, one after the other, with a line in the log each; at the end finish what they have accepted.

    If one fails to start, those that have are closed, and its error is raised with a note that names it.
    """
    started: dict[str, AsyncDataParallel] = {}
    try:
        for name, model in models.items():
            began = time.monotonic()
            try:
                await model.start()
            except Exception as error:
                error.add_note(f"while the model {name!r} was started")
                raise
            started[name] = model
            logger.info("%s: started in %.1f s", name, time.monotonic() - began)
        yield
    finally:
        seconds = left()
        closing = [_drain(name, model, seconds) for name, model in started.items()]
        errors = [error for error in await asyncio.gather(*closing, return_exceptions=True) if error is not None]
        if errors:
            raise errors[0]


async def _drain(name: str, model: AsyncDataParallel, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await model.aclose()
    except TimeoutError:
        logger.warning("%s did not finish its calls within %g s; those that waited were refused", name, seconds)


@contextmanager
def frozen(freeze: bool) -> Iterator[None]:
    """Spare the garbage collector what is there already: it would walk it again and again while requests wait."""
    if not freeze:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
