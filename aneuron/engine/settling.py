"""What follows from an execution that has ended: it is counted, and its calls end.

Lives here: what each execution tells the statistics, the service times, admission and recovery. Must not be here:
callers' futures (futures.py), what is done about a fault (recovery.py), threads.
"""

from collections.abc import Mapping

from aneuron.engine.admission import Admission
from aneuron.engine.dispatcher import Dispatcher
from aneuron.engine.execution import Execution
from aneuron.engine.futures import Futures
from aneuron.engine.loading import Loaded
from aneuron.engine.recovery import Recovery
from aneuron.sched.room import one, work_of
from aneuron.sched.scheduler import Scheduler, Sizes, rounded
from aneuron.stats import Counters


class Settling:
    """The end of the executions of a run. On the loop."""

    def __init__(
        self, dispatcher: Dispatcher, scheduler: Scheduler, sizes: Mapping[int, Sizes], several: bool,
        counters: Counters, futures: Futures, recovery: Recovery, admission: Admission,
    ) -> None:  # fmt: skip
        self._dispatcher = dispatcher
        self._scheduler = scheduler
        self._sizes = sizes
        self._several = several  # shapes, of which those that are slow are found out
        self._counters = counters
        self._futures = futures
        self._recovery = recovery
        self._admission = admission

    def settle(self, execution: Execution, now: float) -> None:
        """End the calls that an execution has completed."""
        batch = execution.batch
        if not execution.abandoned:
            if execution.begun:
                self._count(execution, execution.loaded, now)
            if execution.error is not None:
                execution.loaded.counters.errors += 1
                self._recovery.failed(execution, execution.error)
            elif batch.retry is not None or self._recovery.health[execution.loaded.index].state == "suspect":
                self._recovery.succeeded(execution)
        self._futures.end(execution.finished, False, now)  # given up or not: they are the right ones
        # A traceback holds the worker's frames, and they the execution: no cycle, and nobody else's rows.
        execution.chunks, execution.error, execution.finished = (), None, []
        batch.chunks, batch.retry = [], None

    def _count(self, execution: Execution, loaded: Loaded, now: float) -> None:
        counters, batch, rows = self._counters, execution.batch, execution.rows
        started, ended = execution.started, execution.ended
        lane = execution.lane
        service = max(0.0, ended - max(started, lane.ended))
        lane.ended = max(lane.ended, ended)
        padded = (execution.size or rows) - rows
        loaded.counters.executed(rows, padded, service)
        if execution.error is None:  # what raises at once is not fast
            loaded.times.executed((batch.size or rounded(rows), batch.bucket), service, now)
            if batch.size is not None and self._several and service:
                with self._dispatcher.board.lock:
                    self._sizes[batch.bucket].learn(batch.size, service)
        self._dispatcher.took(execution, now)
        unit = self._scheduler.unit
        counters.drained(rows if unit is one else work_of(execution.chunks, unit), now)
        counters.device_seconds.add(ended - started)
        if batch.expected:
            self._admission.ended(ended - batch.due, batch.expected, now)
        if batch.reason != "rerun":
            counters.closed_because[batch.reason] += 1
            counters.batch_rows.add(rows)
            counters.queue_seconds.add_all(
                [started - call.admitted for call, start, _ in execution.chunks if not start]
            )
        if self._admission.traced:
            for call, _, _ in execution.chunks:
                if call.trace is not None:
                    call.trace.note(loaded.core_id, started, ended, rows, padded, batch.reason)

    def relax(self) -> None:
        """Results have been handed out: if nothing waits, the time to the next ones says nothing."""
        if not self._scheduler.has_work() and not self._scheduler.arrivals:
            self._counters.relaxed()
