"""`Pool`: cores that several models share.

Lives here: the cores that were asked for, when their threads start and end, who is on them. Must not be here: what is
loaded (program.py), who runs when (sched/), threads (engine/).
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from aneuron.arguments import count
from aneuron.backends import (
    Backend,
    automatic,
    check_ids,
    choose_backend,
    choose_cores,
    parse_device_ids,
)
from aneuron.backends.traits import Traits, traits_of
from aneuron.engine.dispatcher import FORKED, Dispatcher, in_a_thread
from aneuron.stats import PoolStatistics


class Pool:
    """Cores that several models share: one scheduler for all of them, one set of threads.

    ``pool = Pool(); encoder = AsyncDataParallel(net, pool=pool); reranker = AsyncDataParallel(other, pool=pool)``. Each
    model is loaded on every core of the pool; a core takes the batch of the model whose turn it is. Models that have
    rows waiting share the time of the cores by their `weight`; what one leaves is the others' at once. Priorities
    (`options(priority=...)`) are compared across models, as within one.

    A pool starts with its first model and ends with its last one; ``async with pool`` keeps its threads until it is
    left, and closes models that are still served then. It belongs to the event loop that has started it, until it ends.
    A model without ``pool=`` has one of its own.

    device_ids, backend, num_workers: as for `AsyncDataParallel`. With "auto" the first model that starts decides.

        >>> import asyncio, torch, aneuron
        >>> async def main():
        ...     async with aneuron.Pool(backend=aneuron.CpuBackend(cores=2)) as pool:
        ...         double = aneuron.AsyncDataParallel(lambda x: 2 * x, pool=pool, weight=2.0)
        ...         negate = aneuron.AsyncDataParallel(torch.neg, pool=pool)
        ...         return await double(torch.ones(1, 1)), await negate(torch.ones(1, 1))
        >>> asyncio.run(main())
        (tensor([[2.]]), tensor([[-1.]]))
    """

    def __init__(
        self,
        device_ids: Iterable[int | str] | None = None,
        backend: str | Backend = "auto",
        num_workers: int | None = None,
    ) -> None:
        if isinstance(device_ids, Iterable) and not isinstance(device_ids, (str, bytes)):
            device_ids = list(device_ids)
        self._settings = device_ids, backend
        self._ids = parse_device_ids(device_ids)
        self.chosen = choose_backend(backend)  # None: by each start
        if self.chosen is not None:
            check_ids(self.chosen, self._ids)
        self._num_workers = count("num_workers", num_workers)
        self._dispatcher: Dispatcher | None = None
        self._opening = asyncio.Lock()
        self._held = False  # by an `async with`

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled or copied it is its configuration, not started."""
        return type(self), (*self._settings, self._num_workers)

    @property
    def backend(self) -> Backend | None:
        """What runs models; None before the first start where it was not said."""
        return self.chosen if self._dispatcher is None else self._dispatcher.backend

    @property
    def given_num_workers(self) -> int | None:
        """What was said, at whatever time."""
        return self._num_workers

    @property
    def num_workers(self) -> int | None:
        """Batches that may be in flight, on all cores together; None before the start if none was given. Settable."""
        if self._num_workers is None and self._dispatcher is not None:
            return self._dispatcher.slots or None
        return self._num_workers

    @num_workers.setter
    def num_workers(self, value: int) -> None:
        self._num_workers = count("num_workers", value)
        dispatcher = self._dispatcher
        if dispatcher is not None and not dispatcher.stopped:
            dispatcher.call_loop(lambda: dispatcher.resize(value))

    def statistics(self) -> PoolStatistics:
        """A frozen snapshot of what the cores do, by model. From any thread."""
        dispatcher = self._dispatcher
        return PoolStatistics((), (), (), ()) if dispatcher is None else dispatcher.statistics()

    # Opening and closing.

    async def open(self, given: Iterable[Any], ask: Callable[[Backend, Traits], None]) -> Dispatcher:
        """The lanes, for a model that is to be loaded on them; started if need be. Of the package.

        `ask` asks the backend what it knows of the model, in a thread; what it raises is raised, and starts nothing.
        """
        self.check_loop()
        async with self._opening:
            while True:
                before = self._dispatcher
                if before is not None and before.stopped:
                    before = None
                make = getattr(self.chosen, "workers", None) if before is None else before.traits.workers
                backend, traits, ids = await in_a_thread(partial(self._look, before, list(given), ask), make)
                if before is None:
                    self._dispatcher = Dispatcher(backend, traits, ids, self._num_workers, self._held)
                    return self._dispatcher
                if not before.stopped:  # meanwhile, with its last model
                    return before

    def _look(
        self, dispatcher: Dispatcher | None, given: list[Any], ask: Callable[[Backend, Traits], None]
    ) -> tuple[Backend, Traits, Sequence[int]]:
        """What the cores are, and what the backend knows of a model. Blocking."""
        if dispatcher is not None:
            backend, traits, ids = dispatcher.backend, dispatcher.traits, dispatcher.core_ids
        else:
            backend = self.chosen or automatic(given)
            traits, ids = traits_of(backend), choose_cores(backend, self._ids)
        ask(backend, traits)
        return backend, traits, ids

    def check_loop(self) -> None:
        """Raise `RuntimeError` on another loop than the pool's, or in a process that was forked. Of the package."""
        dispatcher = self._dispatcher
        if dispatcher is None or dispatcher.loop is asyncio.get_running_loop():
            return
        if dispatcher.forked:
            raise RuntimeError(FORKED)
        if not dispatcher.stopped and not dispatcher.loop.is_closed():
            raise RuntimeError(
                "the pool runs on another event loop, and belongs to it until its last model is closed; close it there "
                "first, or make one pool for each loop"
            )
        self.let_go()

    def let_go(self) -> None:
        """The loop of the lanes has gone without closing them, or nobody will. Of the package."""
        dispatcher, self._dispatcher = self._dispatcher, None
        self._opening = asyncio.Lock()
        if dispatcher is not None and not dispatcher.forked:
            for run in list(dispatcher.runs):
                run.stop()
            dispatcher.stop()

    async def aclose(self) -> None:
        """Close the models that are served, as their `aclose` does, and end the threads. If cancelled, at once."""
        self.check_loop()
        self._held = False
        dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.held = False
            await dispatcher.drain()

    async def __aenter__(self) -> Self:
        self.check_loop()
        self._held = True
        if self._dispatcher is not None:
            self._dispatcher.held = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Pool of {self.backend or 'auto'!r}>"
