"""All lanes of one run of a model, on one loop: calls in, batches out, results back.

Lives here: the lock around the scheduler, which the loop and the workers ask in turn; what wakes whom. Must not be
here: callers' futures (futures.py), tensors, decisions (ask the scheduler), blocking.

Lanes are driven by callbacks, not by tasks: `asyncio.run` cancels every task before a drain in `finally` gets its turn.
A worker that ends an execution takes its lane's next batch itself (`_take`): rows are bound when the core is free for
them, not before, and the way round by the loop is saved.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from aneuron.backends import Backend, Fault
from aneuron.batches import Batch
from aneuron.errors import Closed, CoreFailed, QueueFull
from aneuron.futures import Futures, has_left
from aneuron.lane import TICK, Lane, Load
from aneuron.observing import observed
from aneuron.rows import Call
from aneuron.scheduler import Rules, Scheduler, Sizes, rounded
from aneuron.slots import spread
from aneuron.stats import CoreCounters, Counters, Recent, Statistics
from aneuron.workers import Common, Execution, Workers, carried, text

logger = logging.getLogger("aneuron")

SLOW_DRAIN = 10.0  # seconds after which a drain that goes on is logged


class Lanes:
    """All lanes of one run of a model, from its start to its close, on one loop."""

    def __init__(
        self,
        backend: Backend,
        core_ids: list[int],
        rules: Rules,
        load: Load,
        sizes: Mapping[int, Sizes],
        counters: Counters,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()  # the loop's; to ask for the running loop costs a system call
        self.serving = False
        self.why_closed = "the model is closed or closing; start() opens it again when aclose() has returned"
        self.rules = rules
        self._backend = backend
        self._load = load
        self._sizes = sizes
        self._counters = counters
        self._lock = threading.Lock()  # around the scheduler, the lanes' queues and what they have in flight
        self._scheduler: Scheduler[Call] = Scheduler(rules, sizes, self._estimate)
        self._arrivals: deque[Call] = deque()  # appended by the loop, taken with the lock, by whoever binds next
        self._scheduled = False  # a dispatch is
        self._timer: asyncio.TimerHandle | None = None  # a dispatch that is due later
        self._done: deque[Execution] = deque()  # filled by the workers
        self._posted = False  # a delivery is
        self._traced = False  # whether any call was asked how it was run
        self._late_by = Recent()  # seconds that batches have ended after they should have
        self._stopped = False
        self._common = Common(backend, load.dim, load.unpad, threading.Lock(), self._post)
        self._closed = self.loop.create_future()  # done when the last core is closed
        make = getattr(backend, "workers", Workers)  # aneuron.testing has threadless ones
        number = getattr(backend, "global_id", lambda core_id: core_id)
        for core_id in core_ids:
            counters.cores.setdefault(core_id, CoreCounters(core_id, number(core_id)))
        self._lanes = [
            Lane(index, core_id, backend, make(f"aneuron-core-{core_id}"), counters.cores[core_id])
            for index, core_id in enumerate(core_ids)
        ]
        for lane in self._lanes:
            lane.take = partial(self._take, lane)
        self._open_cores = len(self._lanes)
        self.clock = self._lanes[0].workers.clock
        self.futures = Futures(self.loop, self.clock, counters, self.discard)

    # Lifecycle.

    async def start(self, min_cores: int) -> None:
        """Load the cores one after the other; those that fail are left out, as long as `min_cores` of them remain.

        If fewer do, or the caller is cancelled, those loaded are freed. Serving begins with `resize`.
        """
        failures: list[Exception] = []
        try:
            for lane in self._lanes:
                try:
                    lane.counters.state, lane.counters.owner = "loading", self
                    lane.workers.grow(1)
                    await asyncio.wrap_future(lane.workers.submit(lane.load, self._load))
                    lane.counters.state = "ready"
                except Exception as error:
                    failures.append(error)
                    self._leave_out(lane, error)
                    if len(self._lanes) - len(failures) < min_cores or self._is_fatal(error):
                        raise failures[0] from failures[0].__cause__
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                await asyncio.shield(self._closed)
                self._join()
            raise
        self.change(cores=len(self._lanes) - len(failures))
        for core in self._counters.cores.values():
            for (rows, bucket), recent in core.services.items():
                if bucket in self._sizes:
                    self._sizes[bucket].learn(rows, recent.median)
        self.serving = True

    def _leave_out(self, lane: Lane, error: Exception) -> None:
        """A core has not loaded: the others serve without it."""
        _note(error, f"aneuron: while loading core {lane.core_id} of the {self._backend.name} backend")
        logger.warning("core %d did not load: %s", lane.core_id, text(error))
        lane.counters.state = "failed"
        lane.counters.errors += 1
        lane.stop(self._lane_closed)

    def _is_fatal(self, error: Exception) -> bool:
        """Whether the other cores would not load either."""
        try:
            return self._backend.classify(error) is Fault.FATAL
        except Exception:
            logger.exception("the %s backend could not classify an error", self._backend.name)
            return False

    def resize(self, num_workers: int) -> None:
        """Spread `num_workers` slots over the lanes that are up; batches in flight are left alone."""
        shares = iter(spread(num_workers, self.rules.cores))
        slots = [0 if lane.counters.state == "failed" else next(shares) for lane in self._lanes]
        leads = [lane.widen(own) if own else None for lane, own in zip(self._lanes, slots, strict=True)]
        with self._lock:
            self._scheduler.resize(slots, leads)
        self._dispatch_soon()

    def change(self, **settings: Any) -> None:
        """Replace rules for the calls that come from now on."""
        with self._lock:
            self.rules = self._scheduler.rules = replace(self.rules, **settings)

    async def drain(self) -> None:
        """Refuse new calls, finish those accepted, free the cores."""
        self.serving = False
        self._scheduler.draining = True
        self._dispatch_soon()  # nothing is held back any more
        slow = self.loop.call_later(SLOW_DRAIN, self._log_slow_drain)
        try:
            await asyncio.shield(self.futures.drained())
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
        with self._lock:
            self._stopped = True
            calls = [*self._arrivals, *self._scheduler.calls()]
            for lane in self._lanes:
                batches = [lane.queue.get_nowait() for _ in range(lane.queue.qsize())]
                batches += [execution.batch for execution in lane.in_flight if not execution.begun]
                calls += [call for batch in batches for call, _, _ in batch.chunks]
        self.futures.end(
            [(call, Closed("the model was closed before it ran this call")) for call in calls], failed=True
        )
        self.stop()

    def stop(self) -> None:
        """Let every lane's threads end."""
        self.serving, self._stopped = False, True
        if self._timer is not None:
            self._timer.cancel()
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

    def _log_slow_drain(self) -> None:
        logger.warning("closing has taken %g s; %d calls have not ended", SLOW_DRAIN, len(self.futures.calls))

    # Calls in.

    def admit(self, call: Call, timeout: float | None = None) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must `withdraw` it."""
        if not self.serving:
            raise Closed(self.why_closed)
        if self.rules.max_pending is not None:
            self._find_room(call)
        future = self.futures.accept(call, self.clock())
        if timeout is not None and self._is_hopeless(call, timeout):
            return future
        if call.trace is not None:
            self._traced = True
            call.trace.admitted, call.trace.clock = call.admitted, self.clock
        self._arrivals.append(call)  # before the question: a lane that falls idle looks here after it has said so
        if not self._scheduled and self._scheduler.wants_calls:
            self._dispatch_soon()
        return future

    def _is_hopeless(self, call: Call, timeout: float) -> bool:
        """Give a call its deadline, and end it if that cannot be met."""
        self._scheduler.timed = True
        if self._late_by.is_stale(call.admitted):
            self._late_by, self._scheduler.slack = Recent(), 0.0
        self.futures.time(call, timeout)
        with self._lock:
            hopeless = self._scheduler.hopeless(call, call.admitted)
        if hopeless:
            self.futures.expire(call)
        return hopeless

    def _find_room(self, call: Call) -> None:
        with self._lock:
            self._flush()
            room = self._scheduler.room(call.rows, call.bucket)
        if not room:
            self._dispatch()  # what idle cores can take does not wait
            if not self.serving:
                raise Closed(self.why_closed)
            if not self._scheduler.room(call.rows, call.bucket):
                raise self._refusal(call)

    def _refusal(self, call: Call) -> QueueFull:
        self._counters.refused += 1
        retry_after = self._counters.drain_seconds(self._scheduler.excess(call.rows, call.bucket))
        return QueueFull(
            f"no room for {call.rows} rows: {self._scheduler.waiting_rows} wait and "
            f"max_pending={self.rules.max_pending}; try again later, or raise max_pending",
            retry_after,
        )

    # Batches out.

    def _dispatch_soon(self) -> None:
        """Dispatch at the end of this iteration of the loop, so that calls made in the same one are packed together."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Queue what has come, and wake the lanes that can begin with it."""
        self._scheduled = False
        try:
            with self._lock:
                now = self.clock()
                woken = self._bind(now)
                due = self._scheduler.due
            for lane in woken:
                lane.workers.wake(lane.take)
            if due is not None and not self._stopped:
                self._dispatch_at(due, now)
            if self._scheduler.late:
                self._end_late()
        except Exception as error:
            self._crash(error)

    def _bind(self, now: float) -> list[Lane]:
        """With the lock: bind what can begin; the lanes that have to be woken for it."""
        woken: list[Lane] = []
        if self._stopped:
            return woken
        bound = self._scheduler.bind_at_once(self._arrivals, now) if self._arrivals else None
        if bound is not None:
            self._arrivals.clear()
        else:
            self._flush()
            bound = self._scheduler.bind(now)
        while bound is not None:
            index, batch = bound
            self._lanes[index].queue.put_nowait(batch)
            woken.append(self._lanes[index])
            bound = self._scheduler.bind(now)
        return woken

    def _flush(self) -> None:
        """With the lock: let the scheduler have the calls that have come."""
        if count := len(self._arrivals):
            self._scheduler.admit([self._arrivals.popleft() for _ in range(count)])

    def _dispatch_at(self, due: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(max(due - now, TICK), self._dispatch)

    def _end_late(self) -> None:
        with self._lock:
            late, self._scheduler.late = self._scheduler.late, []
        for call in late:
            if not call.settled:
                self.futures.expire(call)

    def _take(self, lane: Lane, ended: Execution | None) -> Execution | None:
        """The next execution of a lane whose last one has `ended`. Worker thread."""
        try:
            with self._lock:
                now = self.clock()
                if ended is not None:
                    lane.in_flight.remove(ended)
                    self._scheduler.release(lane.index, now, ended.batch)
                execution = None
                if not self._stopped and (ended is None or not ended.failed):
                    execution = self._next(lane, now)
                idles = execution is None and not lane.in_flight
                waits = self._scheduler.has_work or self._arrivals
            if self._scheduler.late or (idles and waits):  # what waits is held back, or for the loop to decide
                self._call_loop(self._dispatch_soon)
            return execution
        except Exception as error:
            self._call_loop(partial(self._crash, error))
            return None

    def _next(self, lane: Lane, now: float) -> Execution | None:
        """With the lock: from the lane's queue, or from the scheduler, or from a lane that is late."""
        staged = bool(lane.in_flight)
        if lane.queue.empty():
            self._flush()
            batch = self._scheduler.pull(lane.index, now)
        else:
            batch = lane.queue.get_nowait()
        if batch is None:
            return None if staged or not self._scheduler.staging else self._take_over(lane, now)
        execution = self._execution(lane, batch)
        if staged:
            execution.staged = Staged(self._lock, lane, execution)
        lane.in_flight.append(execution)
        return execution

    def _execution(self, lane: Lane, batch: Batch[Call]) -> Execution:
        size = batch.size if batch.chunks[0][0].cut.shared else None  # to pad to
        execution = Execution(batch, size, lane.core(batch.size, batch.bucket), lane.index, self._common)
        if batch.bucket:
            execution.other = lane.other(batch.size, batch.bucket)
        if self._traced:
            execution.watch = self._watch
        return execution

    def _watch(self, execution: Execution) -> AbstractContextManager[Any]:  # worker thread
        rows, core = execution.rows, self._lanes[execution.lane].core_id
        padded = (execution.size or rows) - rows
        return observed(execution.chunks, core, rows, padded, execution.batch.because)

    def _take_over(self, lane: Lane, now: float) -> Execution | None:
        """With the lock: a batch that is bound to another lane and has not begun, for one that has nothing to do."""
        for other in self._lanes if self._scheduler.has_slot(lane.index) else ():
            if other.staged:
                execution = other.staged.pop(0)
                other.in_flight.remove(execution)
                execution.lane, execution.staged = lane.index, None
                execution.core = lane.core(execution.batch.size, execution.batch.bucket)
                execution.other = lane.other(execution.batch.size, execution.batch.bucket)
            elif other.in_flight and not other.queue.empty():
                execution = self._execution(lane, other.queue.get_nowait())
            else:
                continue
            self._scheduler.move(execution.batch, other.index, lane.index, now)
            lane.in_flight.append(execution)
            return execution
        return None

    def _estimate(self, lane: int, rows: int, bucket: int) -> float:
        """Seconds that a lane takes for an execution of that shape; 0 while that is not known."""
        return self._lanes[lane].counters.service((rows, bucket), self.clock())

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
        now = self.clock()
        try:
            if self._done:
                self._counters.loop_lag_seconds.add(now - self._done[0].posted)  # of those that wait, the longest
            while self._done:
                self._settle(self._done.popleft(), now)
        except Exception as error:
            self._crash(error)
        if not self._scheduler.has_work and not self._arrivals:
            self._counters.relaxed()
        elif self._scheduler.staging:
            self._dispatch_soon()

    def _settle(self, execution: Execution, now: float) -> None:
        """End the calls that the batch has completed."""
        lane = self._lanes[execution.lane]
        if execution.begun:
            self._count(execution, lane, now)
        if execution.error is not None:
            self._failed(execution, lane, execution.error)
        self.futures.end(execution.finished, now=now)
        # A traceback holds the worker's frames, and they the execution: no cycle, and nobody else's rows.
        execution.chunks, execution.error, execution.finished = (), None, []
        execution.batch.chunks = []

    def _count(self, execution: Execution, lane: Lane, now: float) -> None:
        counters, batch, rows = self._counters, execution.batch, execution.rows
        started, ended = execution.started, execution.ended
        service = max(0.0, ended - max(started, lane.ended))
        lane.ended = max(lane.ended, ended)
        padded = (execution.size or rows) - rows
        lane.counters.executed(rows, padded, service, (batch.size or rounded(rows), batch.bucket), now)
        if batch.size is not None and len(self._load.models) > 1 and service:
            with self._lock:
                self._sizes[batch.bucket].learn(batch.size, service)
        if lane.copied(execution.copied, execution.preparing, now):
            self._scheduler.lead(lane.index, lane.lead)
        counters.drained(rows, now)
        counters.device_seconds.add(ended - started)
        if batch.expected:
            self._late_by.add(ended - batch.due, now)
            self._scheduler.slack = min(max(0.0, self._late_by.high), batch.expected)
        if batch.because != "rerun":
            counters.closed_because[batch.because] += 1
            counters.batch_rows.add(rows)
            counters.queue_seconds.add_all(
                [started - call.admitted for call, start, _ in execution.chunks if not start]
            )
        if self._traced:
            for call, _, _ in execution.chunks:
                if call.trace is not None:
                    call.trace.note(lane.core_id, started, ended, rows, padded, batch.because)

    def _failed(self, execution: Execution, lane: Lane, error: BaseException) -> None:
        """Give the error to the call that caused it: a batch of several runs again in halves until it stands alone."""
        lane.counters.errors += 1
        alone = len(execution.chunks) == 1  # a caller who has left since may be the one to blame, so: of those executed
        chunks = [(call, start, stop) for call, start, stop in execution.chunks if not has_left(call)]
        if execution.fault is not Fault.INPUT:
            logger.warning("core %d failed: %s", lane.core_id, type(error).__name__, exc_info=error)
            self.futures.end([(call, self._core_failed(lane, error)) for call, _, _ in chunks], failed=True)
        elif alone:
            note = "aneuron: core {}, rows {} to {} of this call"
            own = [(call, _own(error, note.format(lane.core_id, start, stop - 1))) for call, start, stop in chunks]
            self.futures.end(own, failed=True)
        elif not self._stopped:
            with self._lock:
                self._scheduler.rerun(execution.batch, chunks)
            self._dispatch_soon()
        else:
            closed = "the model was closed before it could run this call again"
            self.futures.end([(call, Closed(closed)) for call, _, _ in chunks], failed=True)

    def _core_failed(self, lane: Lane, error: BaseException) -> CoreFailed:
        failure = CoreFailed(f"core {lane.core_id} failed while it ran this call: {text(error)}", lane.core_id)
        failure.__cause__ = error.with_traceback(None)  # its frames hold the rows of all who shared the batch
        return failure

    def discard(self, call: Call) -> None:
        """Take a call's waiting rows out of the queue."""
        with self._lock:
            if call.sequence:
                self._scheduler.discard(call)
            else:
                call.bound = call.rows  # it has not got there yet

    def _crash(self, error: Exception) -> None:
        """A bug of ours must not leave anybody waiting."""
        logger.critical("the lanes failed and are closed; please report this", exc_info=error)
        why = f"the model was closed by an internal error ({text(error)}); please report it. aclose(), then start()"
        self.why_closed = why
        self.stop()
        calls = list(self.futures.calls)
        for call in calls:
            with suppress(Exception):  # the queue may be what is broken
                self.discard(call)
            call.bound = call.rows
        self.futures.end([(call, Closed(why)) for call in calls], failed=True)

    def statistics(self) -> Statistics:
        """The frozen snapshot of now; from another thread than the loop's its numbers may be of moments close by."""
        with self._lock:
            for lane in self._lanes:
                lane.counters.in_flight = self._scheduler.in_flight(lane.index)
            calls, rows = self._scheduler.waiting_calls, self._scheduler.waiting_rows
            coming = [call.rows for call in self._arrivals.copy() if not call.bound]
        return self._counters.snapshot(calls + len(coming), rows + sum(coming))


class Staged:
    """A batch that a lane's second thread has prepared, and that waits for the core, or for whoever is free sooner."""

    def __init__(self, lock: threading.Lock, lane: Lane, execution: Execution) -> None:
        self._lock, self._lane, self._execution = lock, lane, execution

    def park(self) -> None:
        """It is prepared."""
        with self._lock:
            self._lane.staged.append(self._execution)

    def claim(self) -> bool:
        """The core is free: whether the batch is still this lane's."""
        with self._lock:
            if self._execution.lane != self._lane.index:
                return False
            self._lane.staged.remove(self._execution)
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
