"""`Pool`: cores that several models share.

Lives here: the cores that were asked for, when their threads start and end, who is on them. Must not be here: what is
loaded (program.py), who runs when (sched/), threads (engine/).
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self
from weakref import WeakSet

from aneuron.arguments import count, seconds
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
from aneuron.errors import Closed
from aneuron.remote.engines import Engines
from aneuron.remote.shared import Shared
from aneuron.remote.supervision import Plan, Supervision
from aneuron.remote.supervisor import Supervisor
from aneuron.stats import PoolStatistics

CLOSED = "the pool was closed, and this model with it; start() opens both again"
OTHER_LOOP = (
    "the pool runs on another event loop, and belongs to it until its last model is closed; close it there first, or "
    "make one pool for each loop"
)


def pool_of(pool: Any, device_ids: Any, backend: Any, num_workers: int | None) -> "Pool":
    """The pool that a model was given, or one of its own, of the cores that it was given."""
    if pool is None:
        return Pool(device_ids, backend, num_workers)
    if not isinstance(pool, Pool):
        raise TypeError(f"pool={pool!r:.80}: expected an aneuron.Pool, or None for cores of its own")
    said = {"device_ids": device_ids, "backend": None if backend == "auto" else backend, "num_workers": num_workers}
    if named := [f"{name}={value!r:.80}" for name, value in said.items() if value is not None]:
        raise ValueError(f"{', '.join(named)} with pool=: the cores are the pool's; pass it to Pool(...)")
    return pool


class OnPool(Protocol):
    """A model, as its pool knows it."""

    def close_door(self, why: str) -> None:
        """Accept no more calls: they are told why."""

    async def aclose(self, why: str) -> None:
        """Finish those that were accepted."""

    def abort(self, why: str) -> None:
        """End what has not begun."""


class Pool:
    """Cores that several models share: one scheduler for all of them, one set of threads.

    ``pool = Pool(); encoder = AsyncDataParallel(net, pool=pool); reranker = AsyncDataParallel(other, pool=pool)``. Each
    model is loaded on every core of the pool; a core takes the batch of the model whose turn it is. Models that have
    rows waiting share the time of the cores by their `weight`; what one leaves is the others' at once. Priorities
    (`options(priority=...)`) are compared across models, as within one.

    A pool starts with its first model and ends with its last one; ``async with pool`` keeps its threads until it is
    left, and closes the models that are still on it then. It belongs to the event loop that has started it, until it
    ends. A model without ``pool=`` has one of its own. Pickled or copied deeply a model takes a copy of its pool along,
    not started; models that are pickled together stay together.

    device_ids, backend, num_workers: as for `AsyncDataParallel`. With "auto" the first model that starts decides.
    processes: so many engines, processes of their own among which the cores are divided; None: the cores are this
        process's. A call goes to the engine that should end it first, the rows of a large one to several. An engine
        that dies is started again while the others serve, and what it had not answered runs once more; rows that two
        engines have died of are a `CoreFailed`. A model may then be an import string besides, "module:attribute": it is
        looked up in each engine, and called there if it is a class, or a function without arguments. Else it is a path,
        or what pickle takes; weights in memory exist once for all engines. Not on Windows.
    share: with `processes`: a name. All processes of this user that say it use the same engines, which start with the
        first of them. Their arguments must be the same, and their models, in the order in which they are made for the
        pool: else a `ValueError` at start says what differs. What one of them changes at run time, or swaps, holds for
        all.
    linger: seconds that shared engines stay after the last process has left.

    Raises, from a model's start or call: `RuntimeError` on another loop than the pool's while it is used there, or in a
    process that was forked meanwhile; `Closed` while the pool is being closed, and after that for all its models until
    they are started again.

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
        *,
        processes: int | None = None,
        share: str | None = None,
        linger: float = 5.0,
    ) -> None:
        if isinstance(device_ids, Iterable) and not isinstance(device_ids, (str, bytes)):
            device_ids = list(device_ids)
        self._settings = device_ids, backend
        self.processes = count("processes", processes)
        if share is not None and (processes is None or not isinstance(share, str) or not share):
            raise ValueError(
                f"share={share!r:.80}: expected the name of engines that several processes use, with processes= as "
                "many as there are to be"
            )
        if self.processes is not None and sys.platform == "win32":
            raise NotImplementedError(
                f"processes={processes}: engines are reached by Unix sockets with file descriptors, which Windows lacks"
            )
        self._share, self._linger = share, seconds("linger", linger)
        self._ids = parse_device_ids(device_ids)
        self.chosen = choose_backend(backend)  # None: by each start
        if self.chosen is not None:
            check_ids(self.chosen, self._ids)
        self._num_workers = count("num_workers", num_workers)
        self._made = 0  # models, for it
        self._dispatcher: Dispatcher | Engines | None = None
        self._opening: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None  # one start at a time, of a loop
        self._held = False  # by an `async with`
        self._closing = 0  # how many do so
        self.models: WeakSet[OnPool] = WeakSet()  # those that were made for it, started or not

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled or copied it is its configuration, not started."""
        said: dict[str, Any] = {"processes": self.processes, "share": self._share, "linger": self._linger}
        return partial(type(self), **said), (*self._settings, self._num_workers)

    def add(self, model: OnPool) -> int:
        """A model was made for it; the how many-th. Of the package."""
        self.models.add(model)
        self._made += 1
        return self._made - 1

    @property
    def dispatcher(self) -> "Dispatcher | Engines | None":
        """What has the cores, while it is started. Of the package."""
        return self._dispatcher

    @property
    def backend(self) -> Backend | None:
        """What runs models; None before the first start where it was not said."""
        return self.chosen if self._dispatcher is None else self._dispatcher.backend

    @property
    def loads_scripts(self) -> bool:
        """Whether the path of a model is of a TorchScript file; a backend of one's own may read others."""
        return self.chosen is None or getattr(self.chosen, "loads_scripts", False)

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
            dispatcher.call_loop(self._resize)  # to what is set by then

    def _resize(self) -> None:
        dispatcher, num_workers = self._dispatcher, self._num_workers
        if dispatcher is not None and num_workers is not None and num_workers != dispatcher.num_workers:
            dispatcher.resize(num_workers)

    def statistics(self) -> PoolStatistics:
        """A frozen snapshot of what the cores do, by model. From any thread."""
        dispatcher = self._dispatcher
        return PoolStatistics((), (), (), ()) if dispatcher is None else dispatcher.statistics()

    # Opening and closing.

    @asynccontextmanager
    async def lanes(self, given: Iterable[Any]) -> AsyncIterator[Any]:
        """The lanes, for a model that is to be loaded on them meanwhile; started if need be. Of the package."""
        dispatcher = await self._open(given)
        dispatcher.coming += 1
        try:
            yield dispatcher
        finally:
            dispatcher.coming -= 1
            dispatcher.stop_if_unused()

    async def _open(self, given: Iterable[Any]) -> "Dispatcher | Engines":
        self.check_loop()
        loop = asyncio.get_running_loop()
        if self._opening is None or self._opening[0] is not loop:
            if self._opening is not None and self._opening[1].locked() and not self._opening[0].is_closed():
                raise RuntimeError(OTHER_LOOP)
            self._opening = loop, asyncio.Lock()
        async with self._opening[1]:
            self.check_open()
            dispatcher = self._dispatcher
            if dispatcher is None or dispatcher.stopped:
                make = getattr(self.chosen, "workers", None)
                backend, traits, ids = await in_a_thread(lambda: self._look_for_cores(list(given)), make)
                if self.processes is None:
                    dispatcher = Dispatcher(backend, traits, ids, self._num_workers, self._held)
                else:
                    dispatcher = await self._engines(backend, traits, ids)
                self._dispatcher = dispatcher
                self._resize()  # whoever has changed it meanwhile has seen none
            return dispatcher

    async def _engines(self, backend: Backend, traits: Traits, ids: list[int]) -> "Engines":
        assert self.processes is not None
        make, processes = traits.workers, self.processes
        plan = await in_a_thread(lambda: Plan.of(backend, ids, processes, self._num_workers), make)
        engines = Engines(self._supervision(plan), backend, traits, self._held)
        try:
            await engines.open()
        except BaseException:
            engines.stop()
            await engines.gone()
            raise
        return engines

    def _supervision(self, plan: Plan) -> Supervision:
        """What starts the engines."""
        make = getattr(self.chosen, "engines", None)  # of `aneuron.testing`: in this process
        if make is not None:
            return make(plan)  # type: ignore[no-any-return]
        return Supervisor(plan) if self._share is None else Shared(self._share, plan, self._linger)

    def _look_for_cores(self, given: list[Any]) -> tuple[Backend, Traits, list[int]]:
        backend = self.chosen or automatic(given)
        return backend, traits_of(backend), choose_cores(backend, self._ids)

    def check_open(self) -> None:
        """Raise `Closed` while it is being closed. Of the package."""
        if self._closing:
            raise Closed("the pool is being closed; start() opens it again when its aclose() has returned")

    def check_loop(self) -> None:
        """Raise `RuntimeError` on another loop than the pool's, or in a process that was forked. Of the package."""
        dispatcher = self._dispatcher
        if dispatcher is None or dispatcher.stopped:
            return
        if dispatcher.forked:
            raise RuntimeError(FORKED)
        if dispatcher.loop is asyncio.get_running_loop():
            return
        if not dispatcher.loop.is_closed():
            raise RuntimeError(OTHER_LOOP)
        for run in list(dispatcher.runs):  # the loop has gone without closing them
            run.stop()
        dispatcher.stop()

    async def aclose(self) -> None:
        """Close all models on the pool, as their `aclose` does, and end the threads. If cancelled, at once.

        Their calls raise `Closed` from now on, until somebody starts them again.
        """
        self.check_loop()
        models = list(self.models)
        for model in models:  # all at once
            model.close_door(CLOSED)
        self._closing += 1
        try:
            for error in await asyncio.gather(*[model.aclose(CLOSED) for model in models], return_exceptions=True):
                if error is not None:
                    raise error
        finally:
            self._closing -= 1
            self._let_go()
        if self._dispatcher is not None and self._dispatcher.stopped:
            self._dispatcher.join()
            await self._dispatcher.gone()

    def _let_go(self) -> None:
        self._held = False
        if self._dispatcher is not None:
            self._dispatcher.held = False
            self._dispatcher.stop_if_unused()

    async def __aenter__(self) -> Self:
        self.check_loop()
        self._held = True
        if self._dispatcher is not None:
            self._dispatcher.held = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.aclose()
            return
        self.check_loop()
        for model in list(self.models):
            model.abort(CLOSED)
        self._let_go()

    def __repr__(self) -> str:
        return f"<Pool of {self.backend or 'auto'!r}>"
