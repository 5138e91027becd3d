"""One run of a model on a pool, from its loading to its close: calls in, results back.

Lives here: admission, what follows from an execution, what is counted, the state of the run. Must not be here: callers'
futures (futures.py), faults (recovery.py), which batch is next (sched/, behind board.py), threads, tensors, blocking.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from dataclasses import replace
from enum import Enum
from functools import partial
from threading import Lock
from typing import Any

from aneuron.backends import Fault
from aneuron.engine.dispatcher import Dispatcher
from aneuron.engine.execution import Common, Execution
from aneuron.engine.futures import Futures
from aneuron.engine.loading import Load, Loaded
from aneuron.engine.recovery import Recovery, note
from aneuron.errors import Closed, CoreFailed, DeviceError, OutputError, QueueFull, ShapeError
from aneuron.observing import observed
from aneuron.sched.call import Call, Chunk, Limit
from aneuron.sched.filling import Batch, Retry
from aneuron.sched.scheduler import Rules, Scheduler, Sizes, rounded
from aneuron.stats import CoreCounters, Counters, Recent, ServiceTimes, Statistics

logger = logging.getLogger("aneuron")

SLOW_DRAIN = 10.0  # seconds after which a drain that goes on is logged
SLOW_CLOSE = 30.0  # seconds after which a core that does not close is left to itself


class Phase(Enum):
    """Where a run is in its life; it never goes back."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """Calls that were accepted are served, no others."""
    STOPPED = "stopped"
    """Nothing begins any more; what executes is waited for, and the cores are closed."""


class Run:
    """A model that is loaded on the lanes of a pool."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        rules: Rules,
        load: Load,
        sizes: Mapping[int, Sizes],
        counters: Counters,
        times: dict[int, ServiceTimes],
        exec_timeout: float | None = None,
        beside: bool = False,
        weight: float = 1.0,
    ) -> None:
        self.dispatcher = dispatcher
        self.loop = dispatcher.loop
        self.thread = dispatcher.thread
        self.clock = dispatcher.clock
        self.phase = Phase.LOADING
        self.why_closed = "the model is closed or closing; start() opens it again when aclose() has returned"
        self.weight = weight
        self.sizes = sizes
        self.counters = counters
        self.scheduler = Scheduler(rules, sizes, self._estimate, dispatcher.board.slots, self)
        self._board = dispatcher.board
        self._load = load
        self._times = times  # of the model, by core id: it may have run before
        self._down = False  # no core serves
        self._end = "closed"  # the state of its cores when they are closed
        self._traced = False  # whether any call was asked how it was run
        self._late_by = Recent()  # seconds that batches have ended after they should have
        self._watched = exec_timeout is not None
        self._beside = beside  # another run of the model serves on these cores until `take_over`
        backend, context = dispatcher.backend, copy_context()
        self._common = Common(
            backend,
            load.dim,
            load.unpad,
            load.evidence,
            {bucket: each.sizes for bucket, each in sizes.items()},
            Lock(),
            dispatcher.post,
            None if dict(context) == dict(dispatcher.context) else context,
        )
        self.context = context
        self.closed = self.loop.create_future()  # done when the last core is closed
        for core_id in dispatcher.core_ids:
            counters.cores.setdefault(core_id, CoreCounters(core_id, dispatcher.traits.global_id(core_id)))
        self.loaded: list[Loaded] = []  # the last one on each lane
        self._open: set[Loaded] = set()  # those whose cores have not been closed; hung ones may never be
        for index in range(len(dispatcher.core_ids)):
            self.loaded.append(self._make_loaded(index))
        proven = load.compiled is not None
        self.recovery = Recovery(self, len(self.loaded), backend.recoverable, proven, exec_timeout)
        self.futures = Futures(self.loop, self.clock, counters, self.discard, dispatcher.guard)

    def _make_loaded(self, index: int) -> Loaded:
        core_id = self.dispatcher.core_ids[index]
        times = self._times.setdefault(core_id, ServiceTimes())
        backend, core = self.dispatcher.backend, self.counters.cores[core_id]
        loaded = Loaded(index, core_id, backend, core, times, self.clock, self)
        self._open.add(loaded)
        return loaded

    @property
    def rules(self) -> Rules:
        """What decides how calls are cut and packed."""
        return self.scheduler.rules

    @property
    def serving(self) -> bool:
        """Whether calls are accepted."""
        return self.phase is Phase.SERVING

    def serves(self, lane: int) -> bool:
        """Whether it may have batches on a lane."""
        return self.phase in (Phase.SERVING, Phase.DRAINING) and self.recovery.health[lane].serves

    # Lifecycle.

    async def start(self, min_cores: int) -> None:
        """Load the cores one after the other; those that fail are left out, as long as `min_cores` of them remain.

        If fewer do, or the caller is cancelled, those loaded are freed. Serving begins with `serve`.
        """
        failures: list[Exception] = []
        self.dispatcher.add(self, self.weight)
        try:
            for loaded in list(self.loaded):
                try:
                    if not self._beside:
                        loaded.own()
                    loaded.show("loading")
                    await asyncio.wrap_future(self._begin_to_load(loaded))
                    self.recovery.health[loaded.index].loaded(self.clock())
                    loaded.show("ready")
                except Exception as error:
                    failures.append(error)
                    note(error, f"aneuron: while loading core {loaded.core_id} of the {self._backend_name} backend")
                    self.recovery.not_loaded(loaded, error)
                    self._leave(loaded)
                    if len(self.loaded) - len(failures) < min_cores or self._is_hopeless_to_load(error):
                        raise failures[0] from failures[0].__cause__
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                await self.cores_closed()
            raise
        finally:
            failures.clear()  # their tracebacks hold this frame, and that the cores
        for times in self._times.values():
            for (rows, bucket), seconds in times.medians().items():
                if bucket in self.sizes:
                    self.sizes[bucket].learn(rows, seconds)

    @property
    def _backend_name(self) -> str:
        return self.dispatcher.backend.name

    def _in_a_thread(self, loaded: Loaded, fn: Callable[[], None]) -> "Future[None]":
        """Have a thread of its own load or close cores: those of the lane may be serving others."""
        workers = self.dispatcher.workers(loaded.core_id, self.context)
        workers.grow(1)
        future = workers.submit(fn)
        workers.stop()
        loaded.workers = workers
        return future

    def _begin_to_load(self, loaded: Loaded) -> "Future[None]":
        """Load cores; if nobody wants them any more by then, they are closed."""

        def ended() -> None:
            loaded.loading = False
            self.close_what_is_out()

        future = self._in_a_thread(loaded, partial(loaded.load, self._load))
        loaded.loading = True
        self._call_when_done(future, ended)
        return future

    def _call_when_done(self, future: "Future[None]", callback: Callable[[], None]) -> None:
        """Have the loop call when a thread is done with what it was given."""
        guarded = partial(self.dispatcher.guard, callback)
        future.add_done_callback(lambda _: self.dispatcher.call_loop(guarded))

    def _is_hopeless_to_load(self, error: Exception) -> bool:
        """Whether the other cores would not load either: it is about the model, or fatal."""
        about_the_model = (ValueError, TypeError, FileNotFoundError, OutputError)
        if isinstance(error, about_the_model) and not isinstance(error, DeviceError):
            return True
        backend = self.dispatcher.backend
        try:
            return backend.classify(error) is Fault.FATAL
        except Exception:
            logger.exception("the %s backend could not classify an error", backend.name)
            return False

    def serve(self) -> None:
        """Accept calls. Raises if no threads are to be had."""
        self.phase = Phase.SERVING
        self.spread()

    def spread(self) -> None:
        """Cores have come into service, or gone: the calls that come from now on are cut for those that serve."""
        serves = [health.serves for health in self.recovery.health]
        with self._board.lock:
            self.scheduler.out = {lane for lane, each in enumerate(serves) if not each}
        self.change(cores=max(1, sum(serves)))
        self._down = not any(serves)
        self.dispatcher.spread()

    def change(self, **settings: Any) -> None:
        """Replace rules for the calls that come from now on. From any thread."""
        with self._board.lock:
            self.scheduler.rules = replace(self.scheduler.rules, **settings)
            waiting = bool(self.scheduler.outside)
        if waiting:
            self.dispatcher.ask()  # there may be more room

    def refuse(self, why: str | None = None) -> None:
        """Refuse new calls; None: with the usual words."""
        if self.phase is Phase.SERVING:
            self.phase, self.why_closed = Phase.DRAINING, why or self.why_closed

    async def drain(self) -> None:
        """Refuse new calls, finish those accepted, free the cores."""
        self.refuse()
        self.scheduler.draining = True
        self.dispatcher.dispatch_soon()  # nothing is held back any more
        slow = self.loop.call_later(SLOW_DRAIN, self._log_slow_drain)
        try:
            await asyncio.shield(self.futures.drained())
            self.stop()
            await self.cores_closed()
        finally:
            slow.cancel()

    def _log_slow_drain(self) -> None:
        logger.warning("closing has taken %g s; %d calls have not ended", SLOW_DRAIN, len(self.futures.calls))

    async def cores_closed(self) -> None:
        """Wait for the cores to be closed, but not for ever."""
        await asyncio.wait({self.closed}, timeout=SLOW_CLOSE)
        if not self.closed.done():  # it hangs in its close, or executes for nobody
            cores = sorted(loaded.core_id for loaded in self._open)
            logger.warning("cores %s have not closed within %g s, and are left to themselves", cores, SLOW_CLOSE)
            for loaded in self._open:
                loaded.hung = True
            self._check_closed()
        for loaded in self.loaded:
            if loaded.workers is not None and not loaded.hung:
                loaded.workers.join(1.0)  # they have said their last words
        if self.dispatcher.stopped:
            self.dispatcher.join()

    def abort(self) -> None:
        """Fail what has not begun to execute, and free the cores after what they execute."""
        with self._board.lock:
            calls = self.scheduler.calls()
            bound = self._board.not_begun(self.scheduler)  # until `stop`: they hold bisections that it is to close
            calls += [call for batch in bound for call, _, _ in batch.chunks]
        closed = "the model was closed before it ran this call"
        self.futures.end([(call, Closed(closed)) for call in calls], failed=True)
        self.stop()

    def stop(self) -> None:
        """Begin nothing more, and free the cores as soon as nothing executes on them."""
        self.phase = Phase.STOPPED
        self.recovery.stop()
        self.dispatcher.remove(self)
        for loaded in list(self._open):
            self._leave(loaded)
        self._check_closed()

    def _leave(self, loaded: Loaded) -> None:
        """A core is not used any more: it is closed when no thread has an execution of it in hand."""
        loaded.out = True
        self.close_what_is_out()

    def close_what_is_out(self) -> None:
        """Close the cores that are out of service, if nothing executes on them."""
        for loaded in [each for each in self._open if each.out and not each.closed]:
            with self._board.lock:
                holds = self._board.holds(loaded.index, loaded)
            if not holds and not loaded.loading:
                loaded.closed = True
                if loaded.is_empty:
                    self._left(loaded)
                    continue
                try:
                    self._call_when_done(self._in_a_thread(loaded, loaded.close), partial(self._left, loaded))
                except RuntimeError:  # no thread is to be had, as at the end of the interpreter
                    self._left(loaded)

    def _left(self, loaded: Loaded) -> None:
        self._open.discard(loaded)
        self._check_closed()

    def _check_closed(self) -> None:
        if self.phase is not Phase.STOPPED or self.closed.done() or not all(each.hung for each in self._open):
            return
        for loaded in self.loaded:
            if loaded.counters.owner in (self, None):  # not another run of the model, on the same core
                loaded.counters.state = self._end
        if not self.futures.calls:
            self.recovery.end()
        self.closed.set_result(None)

    def crash(self, why: str) -> None:
        """A bug of ours: end everything, whatever of it is broken."""
        self.why_closed, self._end = why, "failed"  # whoever asks whether the process is to be restarted is to see it
        for loaded in self.loaded:
            loaded.show("failed")
        with suppress(BaseException):  # it may be what is broken, or the queue
            self.stop()
        self.phase = Phase.STOPPED
        calls = list(self.futures.calls)
        for call in calls:
            with suppress(BaseException):
                self.discard(call)
            call.bound = call.rows
        self.futures.end([(call, Closed(why)) for call in calls], failed=True)

    def forget(self, why: str) -> None:
        """Be in a process that was forked."""
        self.phase, self.why_closed, self.thread = Phase.STOPPED, why, 0

    # Calls in.

    def admit(self, call: Call, timeout: Limit | None = None) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must `withdraw` it."""
        self._check_open()
        outside = False
        if self.scheduler.rules.max_pending is not None and not (
            timeout is not None and self._cannot_be_met(call, timeout)
        ):
            outside = not self._find_room(call)  # nobody gives way to a call that will not run
        future = self.futures.accept(call, self.clock())
        if timeout is not None and self._is_hopeless(call, timeout):
            return future
        if call.trace is not None:
            self._traced = True
            call.trace.admitted, call.trace.clock = call.admitted, self.clock
        if outside:
            with self._board.lock:
                self.scheduler.outside.append(call)
        else:
            self.scheduler.arrivals.append(call)  # before the question: a lane that falls idle looks here afterwards
        if self.dispatcher.wants_calls:
            self.dispatcher.dispatch_soon()
        if self._watched:
            self.recovery.watch()
        return future

    def check(self, rows: int) -> None:
        """Raise what a call of so many rows is refused with now, if it is."""
        self._check_open()
        if self.rules.max_pending is not None and not self._has_room(rows, 0):
            with self._board.lock:
                let_in = self.scheduler.lets_in(rows, 0, self.clock())
            if not let_in:
                self.counters.refused += 1
                raise self._full(rows, 0)

    def _check_open(self) -> None:
        """Raise what any call is refused with now."""
        self.dispatcher.hand_out()  # results do not wait for the end of a long iteration of a loop that is flooded
        if self.phase is not Phase.SERVING:
            raise Closed(self.why_closed)
        if self._down:
            raise self.recovery.none_left()

    def _cannot_be_met(self, call: Call, timeout: Limit) -> bool:
        """Whether a call will be found to be hopeless when it is admitted."""
        now = self.clock()
        call.deadline = now + timeout
        with self._board.lock:
            return self.scheduler.hopeless(call, now)

    def _is_hopeless(self, call: Call, timeout: Limit) -> bool:
        """Give a call its deadline, and end it if that cannot be met."""
        self._board.slots.timed = True
        if self._late_by.is_stale(call.admitted):
            self._late_by, self.scheduler.slack = Recent(), 0.0
        self.futures.time(call, timeout)
        with self._board.lock:
            hopeless = self.scheduler.hopeless(call, call.admitted)
        if hopeless:
            self.futures.expire(call)
        return hopeless

    def _has_room(self, rows: int, bucket: int) -> bool:
        """Whether a caller's call finds room without another being refused for it."""
        with self._board.lock:
            self.scheduler.flush()
            full = self.scheduler.excess(rows, bucket)
        if full:
            self.dispatcher.dispatch()  # what idle cores can take does not wait
            if self.phase is not Phase.SERVING:
                raise Closed(self.why_closed)
            full = self.scheduler.excess(rows, bucket)
        return not full

    def _find_room(self, call: Call) -> bool:
        """Find room for a call, or raise `QueueFull`. False if it is of a map, and is to wait for room outside."""
        room, guest = self._has_room(call.rows, call.bucket), call.terms is not None and call.terms.yields
        if room and not guest and self.scheduler.is_plain(call.rows):
            return True
        with self._board.lock:
            if guest:
                return self.scheduler.has_room(call)
            gone = self.scheduler.make_room(call, self.clock())
        if gone is None:
            self.counters.refused += 1
            raise self._full(call.rows, call.bucket)
        if gone:
            why = "; the call has given its room to another tenant with less, or to a higher level"
            self.futures.end([(each, self._full(each.rows, each.bucket, why)) for each in gone], failed=True)
        return True

    def _full(self, rows: int, bucket: int, why: str = "") -> QueueFull:
        retry_after = self.counters.drain_seconds(self.scheduler.excess(rows, bucket), self.clock())
        return QueueFull(
            f"no room for {rows} rows: {self.scheduler.waiting_rows} wait and max_pending={self.rules.max_pending}"
            f"{why}; try again later, or raise max_pending",
            retry_after,
        )

    def expire(self, call: Call) -> None:
        """A call that waits cannot meet its deadline."""
        if not call.settled:
            self.futures.expire(call)

    def discard(self, call: Call) -> None:
        """Take a call's waiting rows out of the queue."""
        with self._board.lock:
            self.scheduler.flush()
            if call.sequence:
                self.scheduler.discard(call)
            else:
                call.bound = call.rows  # it has not got there, and will not
        if self.scheduler.outside:
            self.dispatcher.dispatch_soon()  # there is room for another

    # Executions.

    def execution(self, batch: Batch, lane: int) -> Execution:
        """A batch as it is executed on a lane. Worker thread."""
        execution = Execution(batch, self.loaded[lane], self._common)
        if self._traced:
            execution.watch = self._watch
        return execution

    def _watch(self, execution: Execution) -> AbstractContextManager[Any]:  # worker thread
        rows, core = execution.rows, execution.loaded.core_id
        return observed(execution.chunks, core, rows, (execution.size or rows) - rows, execution.batch.reason)

    def _estimate(self, lane: int, rows: int, bucket: int) -> float:
        """Seconds that a lane takes for an execution of that shape; 0 while that is not known."""
        return self.loaded[lane].times.service((rows, bucket), self.clock())

    def settle(self, execution: Execution, now: float) -> None:
        """End the calls that an execution has completed."""
        batch = execution.batch
        if not execution.abandoned:
            if execution.begun:
                self._count(execution, execution.loaded, now)
            if execution.error is not None:
                execution.loaded.counters.errors += 1
                self.recovery.failed(execution, execution.error)
            elif batch.retry is not None or self.recovery.health[execution.loaded.index].state == "suspect":
                self.recovery.succeeded(execution)
        self.futures.end(execution.finished, now=now)  # given up or not: they are the right ones
        # A traceback holds the worker's frames, and they the execution: no cycle, and nobody else's rows.
        execution.chunks, execution.error, execution.finished = (), None, []
        batch.chunks, batch.retry = [], None

    def _count(self, execution: Execution, loaded: Loaded, now: float) -> None:
        counters, batch, rows = self.counters, execution.batch, execution.rows
        started, ended = execution.started, execution.ended
        lane = execution.lane
        service = max(0.0, ended - max(started, lane.ended))
        lane.ended = max(lane.ended, ended)
        padded = (execution.size or rows) - rows
        loaded.counters.executed(rows, padded, service)
        if execution.error is None:  # what raises at once is not fast
            loaded.times.executed((batch.size or rounded(rows), batch.bucket), service, now)
            if batch.size is not None and len(self._load.models) > 1 and service:
                with self._board.lock:
                    self.sizes[batch.bucket].learn(batch.size, service)
        self.dispatcher.took(execution, now)
        counters.drained(rows, now)
        counters.device_seconds.add(ended - started)
        if batch.expected:
            self._late_by.add(ended - batch.due, now)
            self.scheduler.slack = min(max(0.0, self._late_by.high), batch.expected)
        if batch.reason != "rerun":
            counters.closed_because[batch.reason] += 1
            counters.batch_rows.add(rows)
            counters.queue_seconds.add_all(
                [started - call.admitted for call, start, _ in execution.chunks if not start]
            )
        if self._traced:
            for call, _, _ in execution.chunks:
                if call.trace is not None:
                    call.trace.note(loaded.core_id, started, ended, rows, padded, batch.reason)

    def relax(self) -> None:
        """Results have been handed out: if nothing waits, the time to the next ones says nothing."""
        if not self.scheduler.has_work and not self.scheduler.arrivals:
            self.counters.relaxed()

    # For recovery.py.

    def retire(self, loaded: Loaded) -> None:
        """Take a core out of service, and what has not begun there back into the queue."""
        with self._board.lock:
            if self.loaded[loaded.index] is loaded:
                self._board.recall(loaded.index, self.scheduler)
        self._leave(loaded)

    def running(self) -> list[tuple[Loaded, list[Execution]]]:
        """What executes, oldest first, by core; also on those that are out of service."""
        found: dict[Any, list[Execution]] = {}
        for executions in self._board.executing(self.scheduler):
            for each in executions:
                found.setdefault(each.loaded, []).append(each)
        return list(found.items())

    def since(self, loaded: Loaded) -> float:
        """When the oldest execution in flight on a core's lane came to be the oldest."""
        return self._board.lanes[loaded.index].since

    def give_up(self, execution: Execution) -> bool:
        """Give an execution up: its thread hangs, and others serve the lane; whether it had not ended."""
        loaded = execution.loaded
        with self._board.lock:
            given_up = self._board.give_up(loaded.index, execution, self.clock())
        if given_up:
            loaded.hung = True
            self.dispatcher.replace(execution.lane)
            self.dispatcher.spread()
            self._check_closed()
        return given_up

    def threads_died(self, lane: int, error: BaseException) -> None:
        """Threads of a lane have died: what they had in hand is lost."""
        loaded = self.loaded[lane]
        with self._board.lock:
            lost = [each for each in self._board.lanes[lane].in_flight if each.batch.scheduler is self.scheduler]
        if lost:
            self.recovery.lost(lost[0].loaded, lost, error)
        if self.phase is not Phase.STOPPED:  # it may have had nothing in hand, and been the one to take what comes
            self.recovery.take_out(loaded, error)

    def reload(self, index: int, done: Callable[[Loaded, BaseException | None], None]) -> None:
        """Load a core anew."""
        loaded = self._make_loaded(index)
        loaded.show("loading")

        def ended(future: "asyncio.Future[None]") -> None:
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            done(loaded, error)
            if self.loaded[index] is not loaded:
                self._leave(loaded)

        future = asyncio.wrap_future(self._begin_to_load(loaded))
        future.add_done_callback(lambda future: self.dispatcher.guard(partial(ended, future)))

    def install(self, loaded: Loaded) -> None:
        """What has been loaded anew serves."""
        self.loaded[loaded.index] = loaded
        self.spread()

    def run_again(self, execution: Execution, chunks: Sequence[Chunk], retry: Retry) -> None:
        """Queue rows of an execution ahead of everything else, as one batch."""
        with self._board.lock:
            self.scheduler.rerun(execution.batch, chunks, retry)
        self.dispatcher.dispatch_soon()

    def end_waiting(self, error: Callable[[], Exception]) -> None:
        """No core serves: end the calls that wait, each with an error of its own; no other is accepted."""
        self.spread()  # the lanes are the others'
        with self._board.lock:
            calls = self.scheduler.calls()
        self.futures.end([(call, error()) for call in calls], failed=True)

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Have the loop call; what it raises closes the run."""
        return self.dispatcher.call_later(delay, callback)

    # A swap.

    def differ_from(self, old: "Run") -> Exception | None:
        """Why this run cannot take the place of another on the same cores; None if it can."""
        for loaded, other, health, before in zip(
            self.loaded, old.loaded, self.recovery.health, old.recovery.health, strict=True
        ):
            if before.serves and not health.serves:
                return CoreFailed(f"core {loaded.core_id} has not loaded the new model, see the log", loaded.core_id)
            for shape, kind in other.kinds.items() if health.serves else ():
                if loaded.kinds.get(shape) != kind:
                    return ShapeError(
                        f"a row of example_inputs gives {loaded.kinds.get(shape)} with the new model (structure, "
                        f"shapes and dtypes), and {kind} with the one that serves"
                    )
        return None

    def take_over(self) -> None:
        """The run that this was loaded beside serves no new calls any more: the cores are this one's."""
        for loaded in self.loaded:
            loaded.own()
            loaded.show(self.recovery.health[loaded.index].state)

    def statistics(self, retired: "Iterable[Run]" = ()) -> Statistics:
        """The frozen snapshot of now, from any thread; `retired` are runs on the same cores that have calls left."""
        calls = rows = 0
        in_flight: dict[int, int] = {}
        with self._board.lock:
            for run in {self, *retired}:  # a run that is being swapped may be both
                run.scheduler.flush()
                calls += run.scheduler.waiting_calls
                rows += run.scheduler.waiting_rows
                batches = self._board.in_flight(run.scheduler) if not run.closed.done() else ()
                for core_id, count in zip(self.dispatcher.core_ids, batches, strict=False):
                    in_flight[core_id] = in_flight.get(core_id, 0) + count
        return self.counters.snapshot(calls, rows, in_flight)
