"""The asyncio shell of the cores: each lane's queue and slots, and the one function that ends a call.

Lives here: everything that touches a caller's future, all of it on the loop thread. Must not be here: tensors,
decisions (ask the scheduler), blocking.

Lanes are driven by callbacks, not by tasks: `asyncio.run` cancels every task before a drain in `finally` gets its turn.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from aneuron.backends import Backend, Core, Fault
from aneuron.errors import Closed, CoreFailed, QueueFull
from aneuron.measure import Compiled
from aneuron.rows import Call
from aneuron.scheduler import Batch, Rules, Scheduler, spread
from aneuron.stats import CoreCounters, Counters, Statistics
from aneuron.workers import Execution, Workers, carried, text, warm_up

logger = logging.getLogger("aneuron")

SLOW_DRAIN = 10.0  # seconds after which a drain that goes on is logged
COPYING_PAYS = 0.0002  # seconds of copying a batch from which on a lane has a second thread


@dataclass(frozen=True, slots=True)
class Load:
    """What every lane loads, and how the batches for it are laid out."""

    model: Any
    size: int | None  # rows to pad a batch to; None = as many as there are
    dim: int
    compiled: Compiled | None  # the example to warm up with
    packing: bool


class Lane:
    """One core: the queue of batches bound to it that have not begun, and the threads that take them from there."""

    def __init__(self, index: int, core_id: int, backend: Backend, workers: Workers, counters: CoreCounters) -> None:
        self.index = index
        self.core_id = core_id
        self.core: Core | None = None
        self.queue: asyncio.Queue[Execution] = asyncio.Queue()
        self.handed: list[Execution] = []  # to the threads, and not back yet
        self.counters = counters
        self.workers = workers
        self.ended = 0.0  # when the last execution did
        self._backend = backend
        self._depth = 1  # batches to hand to the threads: one to execute, one to follow it without a gap
        self._slow_copies = 0  # batches in a row that took long to collate and scatter

    def load(self, load: "Load") -> None:
        """Load the model and run the example twice. Blocking, in a worker thread."""
        self.core = self._backend.load(load.model, self.core_id, load.size)
        if self.core.concurrent:
            self.workers.let_in_together()
        if load.compiled is not None:
            warm_up(self.core, load.compiled, load.size, load.dim, load.packing)

    def widen(self, slots: int) -> None:
        """Serve `slots` slots. A concurrent core has a thread for each; another has one, until copying pays."""
        assert self.core is not None
        self._depth = max(1, slots if self.core.concurrent else min(slots, 2))
        self.workers.grow(self._depth if self.core.concurrent else 1)

    def copied(self, seconds: float) -> None:
        """Note what the rows of a batch took to collate and scatter; have a second thread do it where it takes long.

        A second thread prepares the next batch while the first executes. With small rows the handing over of the
        interpreter between the two costs more than it saves. Several in a row count: a busy machine slows one or two.
        """
        self._slow_copies = self._slow_copies + 1 if seconds > COPYING_PAYS else 0
        if self._slow_copies == 8:
            with suppress(RuntimeError):  # no more threads to be had: then not
                self.workers.grow(self._depth)

    def put(self, execution: Execution) -> None:
        """Bind a batch to this lane."""
        if len(self.handed) < self._depth:  # then none waits in the queue either
            self.handed.append(execution)
            self.workers.post(execution)
        else:
            self.queue.put_nowait(execution)

    def pump(self) -> None:
        """Hand batches to the threads that are free."""
        while len(self.handed) < self._depth and not self.queue.empty():
            execution = self.queue.get_nowait()
            self.handed.append(execution)
            self.workers.post(execution)

    def stop(self, closed: Callable[[], None]) -> None:
        """Let the threads end; the last one closes the core and says `closed`."""
        self.workers.stop(lambda: self._close(closed))

    def _close(self, closed: Callable[[], None]) -> None:
        core, self.core = self.core, None
        try:
            if core is not None:
                core.close()
        except BaseException:
            logger.warning("core %d did not close", self.core_id, exc_info=True)
        finally:
            closed()


class Lanes:
    """All lanes of one run of a model, from its start to its close, on one loop."""

    def __init__(self, backend: Backend, core_ids: list[int], rules: Rules, load: Load, counters: Counters) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()  # the loop's; to ask for the running loop costs a system call
        self.serving = False
        self.why_closed = "the model is closed or closing; start() opens it again when aclose() has returned"
        self.rules = rules
        self._backend = backend
        self._load = load
        self._counters = counters
        self._scheduler: Scheduler[Call] = Scheduler(rules)
        self._calls: set[Call] = set()  # accepted and not ended
        self._scheduled = False  # a dispatch is
        self._done: deque[Execution] = deque()  # filled by the workers
        self._posted = False  # a delivery is
        self._stopped = False
        self._guard = threading.Lock()
        self._idle = self.loop.create_future()  # done when draining and no call is left
        self._closed = self.loop.create_future()  # done when the last core is closed
        make = getattr(backend, "workers", Workers)  # aneuron.testing has threadless ones
        for core_id in core_ids:
            counters.cores.setdefault(core_id, CoreCounters(core_id))
        self._lanes = [
            Lane(index, core_id, backend, make(f"aneuron-core-{core_id}"), counters.cores[core_id])
            for index, core_id in enumerate(core_ids)
        ]
        self._open_cores = len(self._lanes)
        self._clock = self._lanes[0].workers.clock

    # Lifecycle.

    async def start(self, num_workers: int) -> None:
        """Load the cores one after the other. If one fails, or the caller is cancelled, those loaded are freed."""
        try:
            for lane in self._lanes:
                lane.counters.state, lane.counters.owner = "loading", self
                lane.workers.grow(1)
                await asyncio.wrap_future(lane.workers.submit(lane.load, self._load))
                lane.counters.state = "ready"
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                _note(error, f"aneuron: while loading core {lane.core_id} of the {self._backend.name} backend")
                await asyncio.shield(self._closed)
                self._join()
            raise
        self.serving = True
        self.resize(num_workers)

    def resize(self, num_workers: int) -> None:
        """Spread `num_workers` slots over the lanes; batches in flight are left alone."""
        slots = spread(num_workers, len(self._lanes))
        for lane, own in zip(self._lanes, slots, strict=True):
            lane.widen(own)
        self._scheduler.resize(slots)
        self._dispatch_soon()

    def change(self, **settings: Any) -> None:
        """Replace rules for the calls that come from now on."""
        self.rules = self._scheduler.rules = replace(self.rules, **settings)

    async def drain(self) -> None:
        """Refuse new calls, finish those accepted, free the cores."""
        self.serving = False
        self._scheduler.draining = True
        self._check_idle()
        slow = self.loop.call_later(SLOW_DRAIN, self._log_slow_drain)
        try:
            await asyncio.shield(self._idle)
            self.stop()
            await asyncio.shield(self._closed)
            self._join()
        finally:
            slow.cancel()

    def _join(self) -> None:
        """See the threads end; they have said their last words."""
        for lane in self._lanes:
            lane.workers.join(1.0)

    def abort(self) -> None:
        """Fail what has not begun to execute, and let the threads end after what they execute."""
        calls = self._scheduler.calls()
        for lane in self._lanes:
            executions = [lane.queue.get_nowait() for _ in range(lane.queue.qsize())]
            executions += [execution for execution in lane.handed if not execution.begun]
            calls += [call for execution in executions for call, _, _ in execution.batch.chunks]
        self._end([(call, Closed("the model was closed before it ran this call")) for call in calls], failed=True)
        self.stop()

    def stop(self) -> None:
        """Let every lane's threads end."""
        self.serving, self._stopped = False, True
        for lane in self._lanes:
            lane.stop(self._lane_closed)

    def _lane_closed(self) -> None:  # worker thread
        self._call_loop(self._count_closed)

    def _count_closed(self) -> None:
        self._open_cores -= 1
        if not self._open_cores:
            for lane in self._lanes:
                if lane.counters.owner is self:  # not another run of the model, on the same core
                    lane.counters.state, lane.counters.in_flight = "closed", 0
            self._closed.set_result(None)

    def _check_idle(self) -> None:
        if self._scheduler.draining and not self._calls and not self._idle.done():
            self._idle.set_result(None)

    def _log_slow_drain(self) -> None:
        logger.warning("closing has taken %g s; %d calls have not ended", SLOW_DRAIN, len(self._calls))

    # Calls in.

    def admit(self, call: Call) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must `withdraw` it."""
        if not self.serving:
            raise Closed(self.why_closed)
        if self.rules.max_pending is not None:
            self._find_room(call.rows)
        call.future = future = self.loop.create_future()
        call.ended = future.done
        call.admitted = self._clock()
        self._scheduler.admit(call)
        self._calls.add(call)
        self._counters.accepted += 1
        if not self._scheduled:
            self._dispatch_soon()
        return future

    def _find_room(self, rows: int) -> None:
        if not self._scheduler.room(rows):
            self._dispatch()  # what idle cores can take does not wait
            if not self._scheduler.room(rows):
                raise self._refusal(rows)

    def _refusal(self, rows: int) -> QueueFull:
        self._counters.refused += 1
        retry_after = self._counters.drain_seconds(self._scheduler.excess(rows))
        return QueueFull(
            f"no room for {rows} rows: {self._scheduler.waiting_rows} wait and max_pending={self.rules.max_pending}; "
            "try again later, or raise max_pending",
            retry_after,
        )

    # Batches out.

    def _dispatch_soon(self) -> None:
        """Dispatch at the end of this iteration of the loop, so that calls made in the same one are packed together."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        try:
            while not self._stopped and (bound := self._scheduler.bind()) is not None:
                index, batch = bound
                self._lanes[index].put(self._execution(index, batch))
        except Exception as error:
            self._crash(error)

    def _execution(self, index: int, batch: Batch[Call]) -> Execution:
        core = self._lanes[index].core
        assert core is not None
        size = self._load.size if batch.chunks[0][0].cut.shared else None
        return Execution(batch, size, self._load.dim, self._backend, core, index, self._guard, self._post)

    # Results back.

    def _post(self, execution: Execution) -> None:  # worker thread
        self._done.append(execution)
        if not self._posted:
            self._posted = True
            self._call_loop(self._deliver)

    def _call_loop(self, callback: Callable[[], None]) -> None:  # worker thread
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            logger.debug("the loop is closed, nobody waits")

    def _deliver(self) -> None:
        self._posted = False  # before the queue is emptied: what is posted from here on posts again
        now = self._clock()
        try:
            while self._done:
                execution = self._done.popleft()
                self._counters.loop_lag_seconds.add(now - execution.posted)
                self._settle(execution, now)
        except Exception as error:
            self._crash(error)
        if self._scheduler.has_work:
            self._dispatch_soon()
        else:
            self._counters.relaxed()

    def _settle(self, execution: Execution, now: float) -> None:
        """Free the slot, then end the calls that the batch has completed."""
        lane = self._lanes[execution.lane]
        lane.handed.remove(execution)
        self._scheduler.release(lane.index)
        if not lane.queue.empty():
            lane.pump()
        if execution.begun:
            self._count(execution, lane, now)
        if execution.error is not None:
            self._failed(execution, lane, execution.error)
        self._end(execution.finished)
        # A traceback holds the worker's frames, and they the execution: no cycle, and nobody else's rows.
        execution.chunks, execution.error, execution.finished = (), None, []
        execution.batch.chunks = []

    def _count(self, execution: Execution, lane: Lane, now: float) -> None:
        counters, rows = self._counters, execution.rows
        service = execution.ended - max(execution.started, lane.ended)
        lane.ended = execution.ended
        lane.copied(execution.copying)
        lane.counters.executed(rows, execution.size or rows, max(0.0, service))
        counters.drained(rows, now)
        counters.device_seconds.add(execution.ended - execution.started)
        if execution.batch.because != "rerun":
            counters.closed_because[execution.batch.because] += 1
            counters.batch_rows.add(rows)
            started = execution.started
            counters.queue_seconds.add_all(
                [started - call.admitted for call, start, _ in execution.chunks if not start]
            )

    def _failed(self, execution: Execution, lane: Lane, error: BaseException) -> None:
        """Give the error to the call that caused it: a batch of several runs again in halves until it stands alone."""
        lane.counters.errors += 1
        alone = len(execution.chunks) == 1  # a caller who has left since may be the one to blame, so: of those executed
        chunks = [(call, start, stop) for call, start, stop in execution.chunks if not call.ended()]
        if execution.fault is not Fault.INPUT:
            logger.warning("core %d failed: %s", lane.core_id, type(error).__name__, exc_info=error)
            self._end([(call, self._core_failed(lane, error)) for call, _, _ in chunks], failed=True)
        elif alone:
            note = "aneuron: core {}, rows {} to {} of this call"
            own = [(call, _own(error, note.format(lane.core_id, start, stop - 1))) for call, start, stop in chunks]
            self._end(own, failed=True)
        elif not self._stopped:
            self._scheduler.rerun(chunks)
        else:
            closed = "the model was closed before it could run this call again"
            self._end([(call, Closed(closed)) for call, _, _ in chunks], failed=True)

    def _core_failed(self, lane: Lane, error: BaseException) -> CoreFailed:
        failure = CoreFailed(f"core {lane.core_id} failed while it ran this call: {text(error)}", lane.core_id)
        failure.__cause__ = error
        return failure

    def _end(self, outcomes: Iterable[tuple[Call, Any]], failed: bool = False) -> None:
        """The one function that ends calls, with a result or (`failed`) an exception each.

        A call whose caller has left is left to `withdraw`.
        """
        now, seconds = self._clock(), []
        for call, outcome in outcomes:
            if call.settled or call.future.done():
                continue
            if failed:
                call.future.set_exception(outcome)
                self._scheduler.discard(call)
            else:
                call.future.set_result(outcome)
            seconds.append(now - call.admitted)
            self._forget(call)
        if failed:
            self._counters.failed += len(seconds)
        else:
            self._counters.completed += len(seconds)
        self._counters.total_seconds.add_all(seconds)
        if self._scheduler.draining:
            self._check_idle()

    def withdraw(self, call: Call) -> None:
        """The caller has left: its rows leave the queue, or their results will be dropped."""
        future = call.future
        self._scheduler.discard(call)
        self._forget(call)
        self._counters.cancelled += 1
        with suppress(RuntimeError):  # the loop is closed
            future.cancel()
        if self._scheduler.draining:
            self._check_idle()

    def _forget(self, call: Call) -> None:
        # At once: the call itself may be in a queue for a while, or in the frames that an exception's traceback holds.
        call.settled, call.ended = True, _yes
        call.leaves = None
        call.template = call.parts = call.future = None
        self._calls.discard(call)

    def _crash(self, error: Exception) -> None:
        """A bug of ours must not leave anybody waiting."""
        logger.critical("the lanes failed and are closed; please report this", exc_info=error)
        why = f"the model was closed by an internal error ({text(error)}); please report it. aclose(), then start()"
        self.why_closed = why
        self._end([(call, Closed(why)) for call in self._calls], failed=True)
        self.stop()

    def statistics(self) -> Statistics:
        """The frozen snapshot of now."""
        for lane in self._lanes:
            lane.counters.in_flight = self._scheduler.in_flight(lane.index)
        return self._counters.snapshot(self._scheduler.waiting_calls, self._scheduler.waiting_rows)


def _yes() -> bool:
    return True


def _own(error: BaseException, note: str) -> Exception:
    """The model's exception as it reaches its caller."""
    own = carried(error)
    _note(own, note)
    return own


def _note(error: Exception, note: str) -> None:
    """Add a note, once, unless the exception will not have it."""
    with suppress(Exception):
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
