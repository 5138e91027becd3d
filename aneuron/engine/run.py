"""One run of a model on a pool, from its loading to its close: calls in, results back.

Lives here: how it starts and ends, and its parts: who is let in (admission.py), what is loaded (cores.py), what
follows from an execution (settling.py) and from a fault (recovery.py). Must not be here: callers' futures (futures.py),
which batch is next (sched/, behind board.py), threads, tensors, blocking.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

from aneuron.engine.admission import Admission, Phase
from aneuron.engine.cores import Cores
from aneuron.engine.dispatcher import Dispatcher
from aneuron.engine.execution import Common, Execution
from aneuron.engine.futures import Futures
from aneuron.engine.loading import Load, Loaded, is_hopeless
from aneuron.engine.modes import OwnContext, same
from aneuron.engine.recovery import Recovery, note
from aneuron.engine.settling import Settling
from aneuron.errors import Closed
from aneuron.observing import observed
from aneuron.ownership import Owned, adopt
from aneuron.program import Settings
from aneuron.sched.call import Call, Chunk
from aneuron.sched.filling import Batch, Retry
from aneuron.sched.scheduler import Rules, Scheduler, Sizes
from aneuron.sched.sizes import Steps
from aneuron.stats import Counters, ServiceTimes, Statistics

logger = logging.getLogger("aneuron")

SLOW_DRAIN = 10.0  # seconds after which a drain that goes on is logged


class Run:
    """A model that is loaded on the lanes of a pool."""

    owned = Owned(set_by_loop=("thread",), parts=("scheduler", "admission", "futures", "recovery", "cores", "counters"))

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
        self.weight = weight
        self.sizes = sizes
        self.counters = counters
        self._board = dispatcher.board
        with self._board.lock:  # others may be served there
            cost = lambda lane, *shape: self.loaded[lane].times.cost(*shape)  # noqa: E731
            self.scheduler = Scheduler(rules, sizes, self._estimate, self._board.slots, self, cost, load.buckets)
        self._load = load
        self._times = times  # of the model, by core id: it may have run before
        self._beside = beside  # another run of the model serves on these cores until `take_over`
        backend, context = dispatcher.backend, copy_context()
        by_bucket = {bucket: each.sizes for bucket, each in sizes.items() if not isinstance(each, Steps)}
        own = None if same(context, dispatcher.context) else OwnContext(context)
        self._common = Common(
            backend, load.dim, load.unpad, load.evidence, by_bucket, Lock(), dispatcher.post, own, load.takes
        )
        self.context = context
        self.cores = Cores(dispatcher, load, counters, times, context, self)
        self.loaded: list[Loaded] = self.cores.loaded
        self.recovery = Recovery(self, len(self.loaded), backend.recoverable, bool(load.compiled), exec_timeout)
        self.futures = Futures(self.loop, self.clock, counters, self.discard, dispatcher.guard)
        watched = exec_timeout is not None
        self.admission = Admission(dispatcher, self.scheduler, self.futures, self.recovery, counters, watched)
        ends = counters, self.futures, self.recovery, self.admission
        self.settling = Settling(dispatcher, self.scheduler, sizes, len(load.models) > 1, *ends)
        adopt(self._board.lock, self, *sizes.values())

    @property
    def rules(self) -> Rules:
        """What decides how calls are cut and packed."""
        return self.scheduler.rules

    @property
    def why_closed(self) -> str:
        """What calls are told that come when none are accepted."""
        return self.admission.why_closed

    @property
    def serving(self) -> bool:
        """Whether calls are accepted."""
        return self.admission.phase is Phase.SERVING

    def serves(self, lane: int) -> bool:
        """Whether it may have batches on a lane."""
        return self.admission.phase in (Phase.SERVING, Phase.DRAINING) and self.recovery.health[lane].serves

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
                    await asyncio.wrap_future(self.cores.begin_to_load(loaded))
                    self.recovery.health[loaded.index].loaded(self.clock())
                    loaded.show("ready")
                except Exception as error:
                    failures.append(error)
                    note(error, f"aneuron: while loading core {loaded.core_id} of the {self._backend_name} backend")
                    self.recovery.not_loaded(loaded, error)
                    self.cores.leave(loaded)
                    if len(self.loaded) - len(failures) < min_cores or is_hopeless(self.dispatcher.backend, error):
                        raise failures[0] from failures[0].__cause__
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception):
                await self.cores.wait_closed()
            raise
        finally:
            failures.clear()  # their tracebacks hold this frame, and that the cores
        with self._board.lock:
            for times in self._times.values():
                for (rows, bucket), seconds in times.medians().items():
                    if bucket in self.sizes:
                        self.sizes[bucket].learn(rows, seconds)

    @property
    def _backend_name(self) -> str:
        return self.dispatcher.backend.name

    def serve(self) -> None:
        """Accept calls. Raises if no threads are to be had."""
        self.admission.phase = Phase.SERVING
        self.spread()

    def spread(self) -> None:
        """Cores have come into service, or gone: the calls that come from now on are cut for those that serve."""
        serves = [health.serves for health in self.recovery.health]
        with self._board.lock:
            self.scheduler.out = {lane for lane, each in enumerate(serves) if not each}
            self.scheduler.rules = replace(self.scheduler.rules, cores=max(1, sum(serves)))
        self.admission.down = not any(serves)
        self.dispatcher.spread()

    def follow(self, settings: Settings) -> None:
        """Serve the calls that come from now on as is set by now. From any thread, after every change."""
        with self._board.lock:
            rules = self.scheduler.rules
            packing = rules.packing and settings.packing
            self.scheduler.rules = replace(
                rules, split_size=settings.split_size, max_pending=settings.room, packing=packing
            )
            waiting = bool(self.scheduler.outside)
        if waiting:
            self.dispatcher.ask()  # there may be more room

    def refuse(self, why: str | None = None) -> None:
        """Refuse new calls; None: with the usual words."""
        door = self.admission
        if door.phase is Phase.SERVING:
            door.phase, door.why_closed = Phase.DRAINING, why or door.why_closed

    async def drain(self) -> None:
        """Refuse new calls, finish those accepted, free the cores."""
        self.refuse()
        with self._board.lock:
            self.scheduler.draining = True
        self.dispatcher.dispatch_soon()  # nothing is held back any more
        slow = self.loop.call_later(SLOW_DRAIN, self._log_slow_drain)
        try:
            await asyncio.shield(self.futures.drained())
            self.stop()
            await self.cores.wait_closed()
        finally:
            slow.cancel()

    def _log_slow_drain(self) -> None:
        logger.warning("closing has taken %g s; %d calls have not ended", SLOW_DRAIN, len(self.futures.calls))

    def abort(self) -> None:
        """Fail what has not begun to execute, and free the cores after what they execute."""
        self.recovery.stop()  # first: of calls that wait for other parts of their batch nobody else knows
        with self._board.lock:
            calls = self.scheduler.calls()
            bound = self._board.not_begun(self.scheduler)  # until `stop`: they hold bisections that it is to close
            calls += [call for batch in bound for call, _, _ in batch.chunks]
        closed = "the model was closed before it ran this call"
        self.futures.end([(call, Closed(closed)) for call in calls], failed=True)
        self.stop()

    def stop(self) -> None:
        """Begin nothing more, and free the cores as soon as nothing executes on them."""
        self.admission.phase = Phase.STOPPED
        self.recovery.stop()
        self.dispatcher.remove(self)
        self.cores.stop()

    def close_what_is_out(self) -> None:
        """Close the cores that are out of service, if nothing executes on them."""
        self.cores.close_what_is_out()

    @property
    def closed(self) -> "asyncio.Future[None]":
        """Done when the last core is closed."""
        return self.cores.closed

    def crash(self, why: str) -> None:
        """A bug of ours: end everything, whatever of it is broken."""
        self.admission.why_closed = why
        self.cores.end = "failed"  # whoever asks whether the process is to be restarted is to see it
        for loaded in self.loaded:
            loaded.show("failed")
        with suppress(BaseException):  # it may be what is broken, or the queue
            self.stop()
        self.admission.phase = Phase.STOPPED
        calls = list(self.futures.calls)
        for call in calls:
            with suppress(BaseException):
                self.discard(call)
            call.bound = call.rows
        self.futures.end([(call, Closed(why)) for call in calls], failed=True)

    def forget(self, why: str) -> None:
        """Be in a process that was forked."""
        self.admission.phase, self.admission.why_closed, self.thread = Phase.STOPPED, why, 0

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
        made = Execution(batch, self.loaded[lane], self._common)
        if self.admission.traced:
            made.watch = self._watch
        return made

    def tell_begun(self, begins: Callable[[Sequence[Chunk]], None]) -> None:
        """Have somebody told of all chunks that begin to execute, in the threads that execute them."""
        self._common.begins = begins

    def marked(self, output: Any, call: Call) -> Any:
        """A call's result, with marks around what in it is no tensor of its rows."""
        return self._common.evidence.marked(output, call.structure, call.rows, packing=True).value

    def _watch(self, execution: Execution) -> AbstractContextManager[Any]:  # worker thread
        rows, core = execution.rows, execution.loaded.core_id
        return observed(execution.chunks, core, rows, (execution.size or rows) - rows, execution.batch.reason)

    def _estimate(self, lane: int, rows: int, bucket: int) -> float:
        """Seconds that a lane takes for an execution of that shape; 0 while that is not known."""
        return self.loaded[lane].times.service((rows, bucket), self.clock())

    # For recovery.py.

    def retire(self, loaded: Loaded) -> None:
        """Take a core out of service, and what has not begun there back into the queue."""
        with self._board.lock:
            if self.loaded[loaded.index] is loaded:
                self._board.recall(loaded.index, self.scheduler)
        self.cores.leave(loaded)

    def running(self) -> list[tuple[Loaded, list[Execution]]]:
        """What executes, oldest first, by core; also on those that are out of service."""
        found: dict[Any, list[Execution]] = {}
        for executions in self._board.executing(self.scheduler):
            for each in executions:
                found.setdefault(each.loaded, []).append(each)
        return list(found.items())

    def has_work(self) -> bool:
        """Whether anything is to be executed yet, or is in flight, though it be behind another model's."""
        with self._board.lock:
            return bool(self.futures.calls) or any(self._board.in_flight(self.scheduler))

    def since(self, loaded: Loaded) -> float:
        """When the oldest execution in flight on a core's lane came to be the oldest."""
        with self._board.lock:
            return self._board.lanes[loaded.index].since

    def give_up(self, execution: Execution) -> bool:
        """Give an execution up; whether it had not ended. If its thread hangs, others serve the lane."""
        loaded = execution.loaded
        with self._board.lock:
            given_up = self._board.give_up(loaded.index, execution, self.clock())
        if given_up and execution.submission is not None:
            self.close_what_is_out()
            self.dispatcher.dispatch_soon()  # its slot may be another model's
        elif given_up:
            loaded.hung = True
            self.dispatcher.replace(execution.lane)
            self.dispatcher.spread()
            self.cores.check_closed()
        return given_up

    def lose(self, loaded: Loaded, error: BaseException) -> None:
        """A core does not say any more what it has completed: what it executes runs elsewhere."""
        for other, executions in self.running():
            if other is loaded:
                self.recovery.lost(executions, error)
        self.recovery.take_out(loaded, error)

    def threads_died(self, lane: int, error: BaseException) -> None:
        """Threads of a lane have died: what they had in hand is lost."""
        loaded = self.loaded[lane]
        with self._board.lock:
            lost = [each for each in self._board.lanes[lane].in_flight if each.batch.scheduler is self.scheduler]
        self.recovery.lost(lost, error)
        if self.admission.phase is not Phase.STOPPED:  # it may have been the one to take what comes
            self.recovery.take_out(loaded, error)

    def reload(self, index: int, done: Callable[[Loaded, BaseException | None], None]) -> None:
        """Load a core anew."""
        loaded = self.cores.make(index)
        loaded.show("loading")

        def ended(future: "asyncio.Future[None]") -> None:
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            done(loaded, error)
            if self.loaded[index] is not loaded:
                self.cores.leave(loaded)

        future = asyncio.wrap_future(self.cores.begin_to_load(loaded))
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

    def take_over(self) -> None:
        """The run that this was loaded beside serves no new calls any more: the cores are this one's."""
        for loaded in self.loaded:
            loaded.own()
            loaded.show(self.recovery.health[loaded.index].state)

    def statistics(self, retired: "Iterable[Run]" = ()) -> Statistics:
        """The frozen snapshot of now, from any thread; `retired` are runs on the same cores that have calls left."""
        calls = rows = work = 0
        in_flight: dict[int, int] = {}
        with self._board.lock:
            for run in {self, *retired}:  # a run that is being swapped may be both
                run.scheduler.flush()
                calls += run.scheduler.waiting_calls
                rows += run.scheduler.waiting_rows
                work += run.scheduler.waiting_work
                batches = self._board.in_flight(run.scheduler) if not run.closed.done() else ()
                for core_id, count in zip(self.dispatcher.core_ids, batches, strict=False):
                    in_flight[core_id] = in_flight.get(core_id, 0) + count
        return self.counters.snapshot(calls, rows, work, in_flight)
