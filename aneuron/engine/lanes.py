"""All lanes of one run of a model, on one loop: calls in, batches out, results back.

Lives here: the lock around the scheduler, which the loop and the workers ask in turn; what wakes whom. Must not be
here: callers' futures (futures.py), faults (recovery.py), tensors, decisions (ask the scheduler), blocking.

Lanes are driven by callbacks, not by tasks: `asyncio.run` cancels every task before a drain in `finally` gets its turn.
A worker that ends an execution takes its lane's next batch itself (`_take`): rows are bound when the core is free for
them, not before, and the way round by the loop is saved.
"""

import asyncio
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

from aneuron.backends import Backend, Fault
from aneuron.engine.futures import Futures
from aneuron.engine.lane import TICK, Lane, Load
from aneuron.engine.recovery import Recovery, note
from aneuron.engine.threads import Common, Execution, Workers, text
from aneuron.errors import Closed, CoreFailed, DeviceError, OutputError, QueueFull, ShapeError
from aneuron.observing import observed
from aneuron.sched.call import Chunk, Limit
from aneuron.sched.filling import Batch
from aneuron.sched.scheduler import Rules, Scheduler, Sizes, rounded
from aneuron.sched.slots import spread
from aneuron.stats import CoreCounters, Counters, Recent, ServiceTimes, Statistics
from aneuron.tensors.rows import Call

logger = logging.getLogger("aneuron")

CROWDED = 4000.0  # executions a second that the cores could do, beyond which it is Python that they wait for
SLOW_DRAIN = 10.0  # seconds after which a drain that goes on is logged
SLOW_CLOSE = 30.0  # seconds after which a core that does not close is left to itself
FORKED = (
    "this process was forked while the model was running: threads and devices stay with the parent; use the spawn "
    "method, or make and start a model of its own after the fork"
)


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
        times: dict[int, ServiceTimes],
        exec_timeout: float | None = None,
        beside: bool = False,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()  # the loop's; to ask for the running loop costs a system call
        self.serving = False
        self.why_closed = "the model is closed or closing; start() opens it again when aclose() has returned"
        self.rules = rules
        self._backend = backend
        self._load = load
        self.sizes = sizes
        self._counters = counters
        self._times = times  # of the model, by core id: it may have run before
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
        self._down = False  # no core serves
        self._watched = exec_timeout is not None
        by_bucket = {bucket: each.sizes for bucket, each in sizes.items()}
        self._common = Common(backend, load.dim, load.unpad, load.evidence, by_bucket, threading.Lock(), self._post)
        self._closed = self.loop.create_future()  # done when the last core is closed
        self.context = copy_context()  # that of the start, for all threads there will be
        workers = partial(Workers, context=self.context)
        self._make_workers = getattr(backend, "workers", workers)  # aneuron.testing has threadless ones
        self.slots = 0  # batches that may be in flight, on all lanes
        number = getattr(backend, "global_id", lambda core_id: core_id)
        for core_id in core_ids:
            counters.cores.setdefault(core_id, CoreCounters(core_id, number(core_id)))
        self._beside = beside  # another run of the model serves on these cores until `take_over`
        self._core_ids = core_ids
        self._open: set[Lane] = set()  # lanes whose cores have not been closed; hung ones may never be
        self.forked = self._crashed = False
        _all.add(self)
        self.lanes = [self._new_lane(index) for index in range(len(core_ids))]
        self.clock = self.lanes[0].workers.clock
        self.recovery = Recovery(self, len(core_ids), backend.recoverable, load.compiled is not None, exec_timeout)
        self.futures = Futures(self.loop, self.clock, counters, self.discard, self._guard)

    def _new_lane(self, index: int) -> Lane:
        core_id = self._core_ids[index]
        workers = self._make_workers(f"aneuron-core-{core_id}")
        times = self._times.setdefault(core_id, ServiceTimes())
        lane = Lane(index, core_id, self._backend, workers, self._counters.cores[core_id], times)
        lane.take = partial(self._take, lane)
        lane.run = self
        workers.on_death = lambda error: self._call_loop(partial(self._thread_died, lane, error))
        self._open.add(lane)
        return lane

    # Lifecycle.

    async def start(self, min_cores: int) -> None:
        """Load the cores one after the other; those that fail are left out, as long as `min_cores` of them remain.

        If fewer do, or the caller is cancelled, those loaded are freed. Serving begins with `resize`.
        """
        failures: list[Exception] = []
        try:
            for lane in self.lanes:
                try:
                    if not self._beside:
                        lane.own()
                    lane.show("loading")
                    lane.workers.grow(1)
                    await asyncio.wrap_future(lane.workers.submit(lane.load, self._load))
                    self.recovery.health[lane.index].loaded(self.clock())
                    lane.show("ready")
                except Exception as error:
                    failures.append(error)
                    note(error, f"aneuron: while loading core {lane.core_id} of the {self._backend.name} backend")
                    self.recovery.not_loaded(lane, error)
                    self._end(lane)
                    if len(self.lanes) - len(failures) < min_cores or self._is_hopeless_to_load(error):
                        raise failures[0] from failures[0].__cause__
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                await self._cores_closed()
            raise
        finally:
            failures.clear()  # their tracebacks hold this frame, and that the cores
        for times in self._times.values():
            for (rows, bucket), seconds in times.medians().items():
                if bucket in self.sizes:
                    self.sizes[bucket].learn(rows, seconds)
        self.serving = True

    def _is_hopeless_to_load(self, error: Exception) -> bool:
        """Whether the other cores would not load either: it is about the model, or fatal."""
        about_the_model = (ValueError, TypeError, FileNotFoundError, OutputError)
        if isinstance(error, about_the_model) and not isinstance(error, DeviceError):
            return True
        try:
            return self._backend.classify(error) is Fault.FATAL
        except Exception:
            logger.exception("the %s backend could not classify an error", self._backend.name)
            return False

    def resize(self, num_workers: int) -> None:
        """Let so many batches be in flight; those that are, are left alone."""
        self.slots = num_workers
        self.spread()

    def spread(self) -> None:
        """Spread the slots over the lanes in service, and dispatch."""
        serves = [health.serves for health in self.recovery.health]
        self.change(cores=max(1, sum(serves)))
        self._down = not any(serves)
        shares = iter(spread(self.slots, self.rules.cores))
        slots = [next(shares) if serves[lane.index] else 0 for lane in self.lanes]
        crowded = sum([lane.pace for lane in self.lanes if serves[lane.index]]) > CROWDED
        leads = [lane.widen(own, crowded) if own else None for lane, own in zip(self.lanes, slots, strict=True)]
        with self._lock:
            self._scheduler.resize(slots, leads)
        self._dispatch_soon()

    def change(self, **settings: Any) -> None:
        """Replace rules for the calls that come from now on. From any thread."""
        with self._lock:
            self.rules = self._scheduler.rules = replace(self.rules, **settings)
            waiting = bool(self._scheduler.outside)
        if waiting:
            self._call_loop(self._dispatch_soon)  # there may be more room

    async def drain(self) -> None:
        """Refuse new calls, finish those accepted, free the cores."""
        self.serving = False
        self._scheduler.draining = True
        self._dispatch_soon()  # nothing is held back any more
        slow = self.loop.call_later(SLOW_DRAIN, self._log_slow_drain)
        try:
            await asyncio.shield(self.futures.drained())
            self.stop()
            await self._cores_closed()
        finally:
            slow.cancel()

    async def _cores_closed(self) -> None:
        """Wait for the cores to be closed and their threads to end, but not for ever."""
        await asyncio.wait({self._closed}, timeout=SLOW_CLOSE)
        if not self._closed.done():  # it hangs in its close, or executes for nobody
            cores = sorted(lane.core_id for lane in self._open)
            logger.warning("cores %s have not closed within %g s, and are left to themselves", cores, SLOW_CLOSE)
            for lane in self._open:
                lane.hung = True
            self._check_closed()
        for lane in self.lanes:
            if not lane.hung:
                lane.workers.join(1.0)  # they have said their last words

    def abort(self) -> None:
        """Fail what has not begun to execute, and let the threads end after what they execute."""
        with self._lock:
            self._stopped = True
            calls = [*self._arrivals, *self._scheduler.calls()]
            for lane in self.lanes:
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
        self.recovery.stop()
        for lane in list(self._open):
            self._end(lane)
        self._check_closed()

    def _end(self, lane: Lane) -> None:
        """Let a lane's threads end."""
        lane.stop(lambda: self._call_loop(partial(self._guard, partial(self._lane_closed, lane))))

    def _lane_closed(self, lane: Lane) -> None:
        self._open.discard(lane)
        self._check_closed()

    def forget(self) -> None:
        """Be in a process that was forked: nothing here works any more, and nothing may wait."""
        self.forked, self.serving, self.why_closed = True, False, FORKED
        self.thread, self._lock = 0, threading.Lock()

    def _check_closed(self) -> None:
        if not self._stopped or self._closed.done() or not all(lane.hung for lane in self._open):
            return
        for lane in self.lanes:
            if lane.counters.owner in (self, None):  # not another run of the model, on the same core
                lane.counters.state = "failed" if self._crashed else "closed"
        if not self.futures.calls:
            self.recovery.end()
        self._closed.set_result(None)

    def _log_slow_drain(self) -> None:
        logger.warning("closing has taken %g s; %d calls have not ended", SLOW_DRAIN, len(self.futures.calls))

    # Calls in.

    def admit(self, call: Call, timeout: Limit | None = None) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must `withdraw` it."""
        self._check_open()
        outside = False
        if self.rules.max_pending is not None and not (timeout is not None and self._cannot_be_met(call, timeout)):
            outside = not self._find_room(call)  # nobody gives way to a call that will not run
        future = self.futures.accept(call, self.clock())
        if timeout is not None and self._is_hopeless(call, timeout):
            return future
        if call.trace is not None:
            self._traced = True
            call.trace.admitted, call.trace.clock = call.admitted, self.clock
        if outside:
            with self._lock:
                self._scheduler.outside.append(call)
        else:
            self._arrivals.append(call)  # before the question: a lane that falls idle looks here after it has said so
        if not self._scheduled and self._scheduler.wants_calls:
            self._dispatch_soon()
        if self._watched:
            self.recovery.watch()
        return future

    def check(self, rows: int) -> None:
        """Raise what a call of so many rows is refused with now, if it is."""
        self._check_open()
        if self.rules.max_pending is not None and not self._has_room(rows, 0):
            with self._lock:
                let_in = self._scheduler.lets_in(rows, 0, self.clock())
            if not let_in:
                self._counters.refused += 1
                raise self._full(rows, 0)

    def _check_open(self) -> None:
        """Raise what any call is refused with now."""
        if self._done:
            self._hand_out()  # results do not wait for the end of a long iteration of a loop that is flooded
        if not self.serving:
            raise Closed(self.why_closed)
        if self._down:
            raise self.recovery.none_left()

    def _cannot_be_met(self, call: Call, timeout: Limit) -> bool:
        """Whether a call will be found to be hopeless when it is admitted."""
        now = self.clock()
        call.deadline = now + timeout
        with self._lock:
            return self._scheduler.hopeless(call, now)

    def _is_hopeless(self, call: Call, timeout: Limit) -> bool:
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

    def _has_room(self, rows: int, bucket: int) -> bool:
        """Whether a caller's call finds room without another being refused for it."""
        with self._lock:
            self._flush()
            full = self._scheduler.excess(rows, bucket)
        if full:
            self._dispatch()  # what idle cores can take does not wait
            if not self.serving:
                raise Closed(self.why_closed)
            full = self._scheduler.excess(rows, bucket)
        return not full

    def _find_room(self, call: Call) -> bool:
        """Find room for a call, or raise `QueueFull`. False if it is of a map, and is to wait for room outside."""
        room, guest = self._has_room(call.rows, call.bucket), call.terms is not None and call.terms.yields
        if room and not guest and self._scheduler.is_plain(call.rows):
            return True
        with self._lock:
            if guest:
                return self._scheduler.has_room(call)
            gone = self._scheduler.make_room(call, self.clock())
        if gone is None:
            self._counters.refused += 1
            raise self._full(call.rows, call.bucket)
        if gone:
            why = "; the call has given its room to another tenant with less, or to a higher level"
            self.futures.end([(each, self._full(each.rows, each.bucket, why)) for each in gone], failed=True)
        return True

    def _full(self, rows: int, bucket: int, why: str = "") -> QueueFull:
        retry_after = self._counters.drain_seconds(self._scheduler.excess(rows, bucket), self.clock())
        return QueueFull(
            f"no room for {rows} rows: {self._scheduler.waiting_rows} wait and max_pending={self.rules.max_pending}"
            f"{why}; try again later, or raise max_pending",
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
        except BaseException as error:
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
            self.lanes[index].queue.put_nowait(batch)
            woken.append(self.lanes[index])
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
                    if ended.abandoned:
                        return None
                    if lane.in_flight[0] is ended:
                        lane.since = now
                    lane.in_flight.remove(ended)
                    self._scheduler.release(lane.index, now, ended.batch)
                    if ended.fault is not Fault.INPUT:
                        self._take_out(lane)
                execution = None
                if not self._stopped and not lane.out and (ended is None or not ended.failed):
                    execution = self._next(lane, now)
                idles = execution is None and not lane.in_flight
                waits = self._scheduler.has_work or self._arrivals
            if self._scheduler.late or (idles and waits):  # what waits is held back, or for the loop to decide
                self._call_loop(self._dispatch_soon)
            return execution
        except BaseException as error:
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
        execution = Execution(batch, size, lane.core(batch.size, batch.bucket), lane, self._common)
        if batch.bucket:
            execution.other = lane.other(batch.size, batch.bucket)
        if self._traced:
            execution.watch = self._watch
        return execution

    def _watch(self, execution: Execution) -> AbstractContextManager[Any]:  # worker thread
        rows, core = execution.rows, execution.lane.core_id
        padded = (execution.size or rows) - rows
        return observed(execution.chunks, core, rows, padded, execution.batch.because)

    def _take_over(self, lane: Lane, now: float) -> Execution | None:
        """With the lock: a batch that is bound to another lane and has not begun, for one that has nothing to do."""
        for other in self.lanes if self._scheduler.has_slot(lane.index) else ():
            if other.staged:
                execution = other.staged.pop(0)
                other.in_flight.remove(execution)
                execution.lane, execution.staged = lane, None
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
        return self.lanes[lane].times.service((rows, bucket), self.clock())

    # Results back.

    def _post(self, execution: Execution) -> None:  # worker thread
        self._done.append(execution)
        if not self._posted:
            self._posted = True
            try:
                self._call_loop(self._deliver)
            except BaseException:
                self._posted = False  # the next one tries again
                raise

    def _call_loop(self, callback: Callable[[], None]) -> None:  # worker thread
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            logger.debug("the loop is closed, nobody waits")

    def _deliver(self) -> None:
        self._posted = False  # before the queue is emptied: what is posted from here on posts again
        self._hand_out()
        if not self._scheduler.has_work and not self._arrivals:
            self._counters.relaxed()
        elif self._scheduler.staging:
            self._dispatch_soon()

    def _hand_out(self) -> None:
        now = self.clock()
        try:
            if self._done:
                self._counters.loop_lag_seconds.add(now - self._done[0].posted)  # of those that wait, the longest
            while self._done:
                self._settle(self._done.popleft(), now)
        except BaseException as error:
            self._crash(error)

    def _settle(self, execution: Execution, now: float) -> None:
        """End the calls that the batch has completed."""
        batch = execution.batch
        if not execution.abandoned:
            if execution.begun:
                self._count(execution, execution.lane, now)
            if execution.error is not None:
                execution.lane.counters.errors += 1
                self.recovery.failed(execution, execution.error)
            elif batch.because == "rerun" or self.recovery.health[execution.lane.index].state == "suspect":
                self.recovery.succeeded(execution)
        self.futures.end(execution.finished, now=now)  # given up or not: they are the right ones
        # A traceback holds the worker's frames, and they the execution: no cycle, and nobody else's rows.
        execution.chunks, execution.error, execution.finished = (), None, []
        batch.chunks, batch.inquest, batch.trial = [], None, None

    def _count(self, execution: Execution, lane: Lane, now: float) -> None:
        counters, batch, rows = self._counters, execution.batch, execution.rows
        started, ended = execution.started, execution.ended
        service = max(0.0, ended - max(started, lane.ended))
        lane.ended = max(lane.ended, ended)
        padded = (execution.size or rows) - rows
        lane.counters.executed(rows, padded, service)
        if execution.error is None:  # what raises at once is not fast
            lane.times.executed((batch.size or rounded(rows), batch.bucket), service, now)
            if batch.size is not None and len(self._load.models) > 1 and service:
                with self._lock:
                    self.sizes[batch.bucket].learn(batch.size, service)
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

    # For recovery.py.

    def _take_out(self, lane: Lane) -> None:
        """With the lock: nothing more is bound to a lane; what has not begun there goes elsewhere."""
        lane.out = True
        if self.lanes[lane.index] is lane:
            self._scheduler.retire(lane.index)
        back = [lane.queue.get_nowait() for _ in range(lane.queue.qsize())]
        for execution in [each for each in lane.in_flight if each.staged is not None and not each.begun]:
            lane.in_flight.remove(execution)
            execution.lane = None
            back.append(execution.batch)
        lane.staged.clear()
        for batch in reversed(back):
            self._scheduler.recall(lane.index, batch)

    def retire(self, lane: Lane) -> None:
        """Take a lane out of service, and what has not begun there back into the queue. Its threads end."""
        with self._lock:
            self._take_out(lane)
        self._end(lane)

    def running(self) -> list[tuple[Lane, list[Execution]]]:
        """What executes, oldest first, by lane; also on those that are out of service."""
        with self._lock:
            found = [(lane, [each for each in lane.in_flight if each.begun and not each.over]) for lane in self._open]
        return [(lane, executions) for lane, executions in found if executions]

    def abandon(self, lane: Lane, execution: Execution) -> bool:
        """Give an execution up, and wait no more for its lane; whether it had not ended."""
        with self._lock:
            if execution not in lane.in_flight:
                return False
            execution.abandoned = True
            lane.in_flight.remove(execution)
            self._scheduler.release(lane.index, self.clock(), execution.batch)
            lane.hung = True
        self._check_closed()
        return True

    def reload(self, index: int, done: Callable[[Lane, BaseException | None], None]) -> None:
        """Make a new lane for a core and load it."""
        lane = self._new_lane(index)
        lane.show("loading")

        def loaded(future: "asyncio.Future[None]") -> None:
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            done(lane, error)
            if self.lanes[index] is not lane:
                self._end(lane)

        lane.workers.grow(1)
        future = asyncio.wrap_future(lane.workers.submit(lane.load, self._load))
        future.add_done_callback(lambda future: self._guard(partial(loaded, future)))

    def run_again(self, execution: Execution, chunks: Sequence[Chunk[Call]], **how: Any) -> None:
        """Queue rows of an execution ahead of everything else, as one batch."""
        with self._lock:
            self._scheduler.rerun(execution.batch, chunks, **how)
        self._dispatch_soon()

    def end_waiting(self, error: Callable[[], Exception]) -> None:
        """No core serves: end the calls that wait, each with an error of its own; no other is accepted."""
        self._down = True
        with self._lock:
            calls = [*self._arrivals, *self._scheduler.calls()]
        self.futures.end([(call, error()) for call in calls], failed=True)

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Have the loop call; what it raises closes the lanes."""
        return self.loop.call_later(delay, self._guard, callback)

    def _guard(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except BaseException as error:
            self._crash(error)

    def _thread_died(self, lane: Lane, error: BaseException) -> None:
        """A worker thread has ended that was not told to: what it had in hand runs elsewhere."""
        if lane.in_flight:
            self._guard(partial(self.recovery.lost, lane, list(lane.in_flight), error))
        if not self._stopped:  # it may have had nothing in hand, and been the one to take what comes
            self._guard(partial(self.recovery.take_out, lane, error))

    def discard(self, call: Call) -> None:
        """Take a call's waiting rows out of the queue."""
        with self._lock:
            self._flush()
            if call.sequence:
                self._scheduler.discard(call)
            else:
                call.bound = call.rows  # it has not got there, and will not
        if self._scheduler.outside:
            self._dispatch_soon()  # there is room for another

    def _crash(self, error: BaseException) -> None:
        """A bug of ours must not leave anybody waiting, nor may a cancellation or an exit that has gone astray."""
        logger.critical("the lanes failed and are closed; please report this", exc_info=error)
        why = f"the model was closed by an internal error ({text(error)}); please report it. aclose(), then start()"
        self.why_closed, self._crashed = why, True
        for lane in self.lanes:
            lane.show("failed")  # whoever asks whether the process is to be restarted is to see it
        with suppress(BaseException):  # it may be what is broken, or the queue
            self.stop()
        for lane in list(self._open):
            with suppress(BaseException):
                self._end(lane)
        calls = list(self.futures.calls)
        for call in calls:
            with suppress(BaseException):
                self.discard(call)
            call.bound = call.rows
        self.futures.end([(call, Closed(why)) for call in calls], failed=True)
        if isinstance(error, (KeyboardInterrupt, SystemExit)) and threading.get_ident() == self.thread:
            raise error

    def differ_from(self, old: "Lanes") -> Exception | None:
        """Why these lanes cannot take the place of others on the same cores; None if they can."""
        for lane, other, health, before in zip(
            self.lanes, old.lanes, self.recovery.health, old.recovery.health, strict=True
        ):
            if before.serves and not health.serves:
                return CoreFailed(f"core {lane.core_id} has not loaded the new model, see the log", lane.core_id)
            for shape, kind in other.kinds.items() if health.serves else ():
                if lane.kinds.get(shape) != kind:
                    return ShapeError(
                        f"a row of example_inputs gives {lane.kinds.get(shape)} with the new model (structure, shapes "
                        f"and dtypes), and {kind} with the one that serves"
                    )
        return None

    def take_over(self) -> None:
        """The run that these lanes were loaded beside serves no new calls any more: the cores are these lanes'."""
        for lane in self.lanes:
            lane.own()
            lane.show(self.recovery.health[lane.index].state)

    def statistics(self, retired: "Iterable[Lanes]" = ()) -> Statistics:
        """The frozen snapshot of now, from any thread; `retired` are runs on the same cores that have calls left."""
        calls = rows = 0
        in_flight: dict[int, int] = {}
        for run in {self, *retired}:  # a run that is being swapped may be both
            with run._lock:
                run._flush()
                calls += run._scheduler.waiting_calls
                rows += run._scheduler.waiting_rows
                for lane in run.lanes if not run._closed.done() else ():
                    batches = run._scheduler.in_flight(lane.index)
                    in_flight[lane.core_id] = in_flight.get(lane.core_id, 0) + batches
        return self._counters.snapshot(calls, rows, in_flight)


class Staged:
    """A batch that a lane's second thread has prepared, and that waits for the core, or for whoever is free sooner."""

    def __init__(self, lock: threading.Lock, lane: Lane, execution: Execution) -> None:
        self._lock, self._lane, self._execution = lock, lane, execution

    def park(self) -> bool:
        """It is prepared: whether it is still this lane's."""
        with self._lock:
            if self._execution.lane is self._lane:
                self._lane.staged.append(self._execution)
                return True
            return False

    def claim(self) -> bool:
        """The core is free: whether the batch is still this lane's."""
        with self._lock:
            if self._execution.lane is not self._lane:
                return False
            self._lane.staged.remove(self._execution)
            self._execution.staged = None  # nobody can take it away any more, although it has not begun
            return True


_all: "weakref.WeakSet[Lanes]" = weakref.WeakSet()


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
