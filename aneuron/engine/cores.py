"""The cores of a run: loaded on the lanes of a pool, and closed when nothing executes on them any more.

Lives here: the threads that load and close, and what is open. Must not be here: what is loaded and how (loading.py),
which core serves (recovery.py), batches.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Protocol

from aneuron.backends import PolledCore
from aneuron.engine.dispatcher import Dispatcher
from aneuron.engine.failures import text
from aneuron.engine.futures import Futures
from aneuron.engine.loading import Load, Loaded
from aneuron.engine.recovery import Recovery
from aneuron.ownership import Owned, adopt
from aneuron.stats import CoreCounters, Counters, ServiceTimes

logger = logging.getLogger("aneuron")

SLOW_CLOSE = 30.0  # seconds after which a core that does not close is left to itself


class Owner(Protocol):
    """A run."""

    futures: Futures
    recovery: Recovery

    def lose(self, loaded: Loaded, error: BaseException) -> None:
        """A core does not say any more what it has completed."""


class Cores:
    """What is loaded for a run."""

    owned = Owned(loop=("open", "end", "_stopped"))

    def __init__(
        self,
        dispatcher: Dispatcher,
        load: Load,
        counters: Counters,
        times: dict[int, ServiceTimes],
        context: Context,
        run: Owner,
    ) -> None:
        self.loaded: list[Loaded] = []  # the last one on each lane
        self.open: set[Loaded] = set()  # those whose cores have not been closed; hung ones may never be
        self.closed = dispatcher.loop.create_future()  # done when the last core is closed
        self.end = "closed"  # the state of the cores then
        self._stopped = False  # no other is made
        self._dispatcher = dispatcher
        self._load = load
        self._counters = counters
        self._times = times  # of the model, by core id: it may have run before
        self._context = context
        self._run = run
        for core_id in dispatcher.core_ids:
            counters.cores.setdefault(core_id, CoreCounters(core_id, dispatcher.traits.global_id(core_id)))
        for index in range(len(dispatcher.core_ids)):
            self.loaded.append(self.make(index))

    def make(self, index: int) -> Loaded:
        """What is to be loaded on a lane."""
        core_id = self._dispatcher.core_ids[index]
        times = self._times.setdefault(core_id, ServiceTimes())
        backend, core = self._dispatcher.backend, self._counters.cores[core_id]
        loaded = Loaded(index, core_id, backend, core, times, self._dispatcher.clock, self._run)
        adopt(self._dispatcher.board.lock, loaded, core)
        self.open.add(loaded)
        return loaded

    def begin_to_load(self, loaded: Loaded) -> "Future[None]":
        """Load; if nobody wants it any more by then, it is closed."""

        def ended() -> None:
            loaded.loading = False
            self._poll(loaded)
            self.close_what_is_out()

        future = self._in_a_thread(loaded, partial(loaded.load, self._load))
        loaded.loading = True
        self._call_when_done(future, ended)
        return future

    def _in_a_thread(self, loaded: Loaded, fn: Callable[[], None]) -> "Future[None]":
        """Have a thread of its own load or close: those of the lane may be serving others."""
        workers = self._dispatcher.workers(loaded.core_id, self._context)
        workers.grow(1)
        future = workers.submit(fn)
        workers.stop()
        loaded.workers = workers
        return future

    def _call_when_done(self, future: "Future[None]", callback: Callable[[], None]) -> None:
        """Have the loop call when a thread is done with what it was given."""
        guarded = partial(self._dispatcher.guard, callback)
        future.add_done_callback(lambda _: self._dispatcher.call_loop(guarded))

    def _poll(self, loaded: Loaded) -> None:
        """Have the loop read the completions of cores that write them to a file descriptor."""
        try:
            for core in loaded.polled:
                self._dispatcher.loop.add_reader(core.completions, self._complete, loaded, core)
        except Exception as error:  # this loop watches no descriptors, or not that one
            loaded.submits = False
            logger.warning(
                "core %d executes in threads: the event loop cannot watch its completions (%s)",
                loaded.core_id, text(error),
            )  # fmt: skip

    def _complete(self, loaded: Loaded, core: PolledCore) -> None:
        try:
            core.complete()
        except BaseException as error:  # it must not: nobody knows what it has completed
            self._poll_no_more(loaded)
            self._dispatcher.guard(partial(self._run.lose, loaded, error))

    def _poll_no_more(self, loaded: Loaded) -> None:
        for core in loaded.polled:
            with suppress(Exception):  # it was not watched
                self._dispatcher.loop.remove_reader(core.completions)

    # The end.

    def stop(self) -> None:
        """Nothing begins any more: close each core as soon as nothing executes on it."""
        self._stopped = True
        for loaded in list(self.open):
            self.leave(loaded)
        self.check_closed()

    def leave(self, loaded: Loaded) -> None:
        """A core is not used any more: it is closed when no thread has an execution of it in hand."""
        loaded.out = True
        self.close_what_is_out()

    def close_what_is_out(self) -> None:
        """Close the cores that are out of service, if nothing executes on them."""
        board = self._dispatcher.board
        for loaded in [each for each in self.open if each.out and not each.closed]:
            with board.lock:
                holds = board.holds(loaded.index, loaded)
            if not holds and not loaded.loading:
                loaded.closed = True
                self._poll_no_more(loaded)
                if loaded.is_empty:
                    self._left(loaded)
                    continue
                try:
                    self._call_when_done(self._in_a_thread(loaded, loaded.close), partial(self._left, loaded))
                except RuntimeError:  # no thread is to be had, as at the end of the interpreter
                    self._left(loaded)

    def _left(self, loaded: Loaded) -> None:
        self.open.discard(loaded)
        self.check_closed()

    def check_closed(self) -> None:
        """See whether all are closed that ever will be."""
        if not self._stopped or self.closed.done() or not all(each.hung for each in self.open):
            return
        for loaded in self.loaded:
            if loaded.counters.owner in (self._run, None):  # not another run of the model, on the same core
                loaded.counters.state = self.end
        if not self._run.futures.calls:
            self._run.recovery.end()
        self.closed.set_result(None)

    async def wait_closed(self) -> None:
        """Wait for the cores to be closed, but not for ever."""
        await asyncio.wait({self.closed}, timeout=SLOW_CLOSE)
        if not self.closed.done():  # it hangs in its close, or executes for nobody
            cores = sorted(loaded.core_id for loaded in self.open)
            logger.warning("cores %s have not closed within %g s, and are left to themselves", cores, SLOW_CLOSE)
            for loaded in self.open:
                loaded.hung = True
            self.check_closed()
        for loaded in self.loaded:
            if loaded.workers is not None and not loaded.hung:
                loaded.workers.join(1.0)  # they have said their last words
        if self._dispatcher.stopped:
            self._dispatcher.join()
