"""Which calls are admitted: the open door, room, deadlines.

Lives here: what a call is refused with, and its first steps, on the loop thread. Must not be here: who gives way
(sched/room.py), how a call ends (futures.py), lanes, tensors.
"""

import asyncio
from enum import Enum
from typing import Any

from aneuron.engine.dispatcher import Dispatcher
from aneuron.engine.futures import Futures
from aneuron.engine.recovery import Recovery
from aneuron.errors import Closed, QueueFull
from aneuron.ownership import Owned
from aneuron.sched.call import Call, Limit
from aneuron.sched.scheduler import Scheduler
from aneuron.stats import Counters, Recent


class Phase(Enum):
    """Where a run is in its life; it never goes back."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """Calls that were accepted are served, no others."""
    STOPPED = "stopped"
    """Nothing begins any more; what executes is waited for, and the cores are closed."""


class Admission:
    """The door of a run."""

    owned = Owned(loop=("down", "_late_by"), set_by_loop=("phase", "why_closed", "traced"))

    def __init__(
        self,
        dispatcher: Dispatcher,
        scheduler: Scheduler,
        futures: Futures,
        recovery: Recovery,
        counters: Counters,
        watched: bool,
    ) -> None:
        self.phase = Phase.LOADING
        self.why_closed = "the model is closed or closing; start() opens it again when aclose() has returned"
        self.down = False  # no core serves
        self.traced = False  # whether any call was asked how it was run
        self._dispatcher = dispatcher
        self._board = dispatcher.board
        self._clock = dispatcher.clock
        self._scheduler = scheduler
        self._futures = futures
        self._recovery = recovery
        self._counters = counters
        self._watched = watched  # for hangs
        self._late_by = Recent()  # seconds that batches have ended after they should have

    def ended(self, late_by: float, expected: float, now: float) -> None:
        """A batch has ended so many seconds after it should have, of which `expected` seconds were expected."""
        self._late_by.add(late_by, now)
        self._scheduler.slack = min(max(0.0, self._late_by.high), expected)

    def admit(self, call: Call, timeout: Limit | None = None) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must `withdraw` it."""
        self._check_open()
        outside = False
        if self._scheduler.rules.max_pending is not None and not (
            timeout is not None and self._cannot_be_met(call, timeout)
        ):
            outside = not self._find_room(call)  # nobody gives way to a call that will not run
        future = self._futures.accept(call, self._clock())
        if timeout is not None and self._is_hopeless(call, timeout):
            return future
        if call.trace is not None:
            self.traced = True
            call.trace.admitted, call.trace.clock = call.admitted, self._clock
        if outside:
            with self._board.lock:
                self._scheduler.outside.append(call)
        else:
            self._scheduler.arrivals.append(call)  # before the question: a lane that falls idle looks here afterwards
        self._dispatcher.call_came()
        if self._watched:
            self._recovery.watch()
        return future

    def check(self, rows: int) -> None:
        """Raise what a call of so many rows is refused with now, if it is."""
        self._check_open()
        if self._scheduler.rules.max_pending is not None and not self._has_room(rows, 0):
            with self._board.lock:
                let_in = self._scheduler.lets_in(rows, 0, self._clock())
            if not let_in:
                self._counters.refused += 1
                raise self._full(rows, 0)

    def _check_open(self) -> None:
        """Raise what any call is refused with now."""
        self._dispatcher.hand_out()  # results do not wait for the end of a long iteration of a loop that is flooded
        if self.phase is not Phase.SERVING:
            raise Closed(self.why_closed)
        if self.down:
            raise self._recovery.none_left()

    def _cannot_be_met(self, call: Call, timeout: Limit) -> bool:
        """Whether a call will be found to be hopeless when it is admitted."""
        now = self._clock()
        call.deadline = now + timeout
        with self._board.lock:
            return self._scheduler.hopeless(call, now)

    def _is_hopeless(self, call: Call, timeout: Limit) -> bool:
        """Give a call its deadline, and end it if that cannot be met."""
        if self._late_by.is_stale(call.admitted):
            self._late_by, self._scheduler.slack = Recent(), 0.0
        self._futures.time(call, timeout)
        with self._board.lock:
            self._board.slots.timed = True
            hopeless = self._scheduler.hopeless(call, call.admitted)
        if hopeless:
            self._futures.expire(call)
        return hopeless

    def _has_room(self, rows: int, bucket: int) -> bool:
        """Whether a caller's call finds room without another being refused for it."""
        with self._board.lock:
            self._scheduler.flush()
            full = self._scheduler.excess(rows, bucket)
        if full:
            self._dispatcher.dispatch()  # what idle cores can take does not wait
            if self.phase is not Phase.SERVING:
                raise Closed(self.why_closed)
            with self._board.lock:
                full = self._scheduler.excess(rows, bucket)
        return not full

    def _find_room(self, call: Call) -> bool:
        """Find room for a call, or raise `QueueFull`. False if it is of a map, and is to wait for room outside."""
        scheduler, guest = self._scheduler, call.terms is not None and call.terms.yields
        with self._board.lock:  # once, for nearly all calls
            scheduler.flush()
            if (
                not guest
                and not scheduler.excess(call.rows, call.bucket)
                and scheduler.is_plain(call.rows, call.bucket)
            ):
                return True
        self._has_room(call.rows, call.bucket)  # or there is, once idle cores have taken what they can
        with self._board.lock:
            if guest:
                return self._scheduler.has_room(call)
            gone = self._scheduler.make_room(call, self._clock())
        if gone is None:
            self._counters.refused += 1
            raise self._full(call.rows, call.bucket)
        if gone:
            why = "; the call has given its room to another tenant with less, or to a higher level"
            self._futures.end([(each, self._full(each.rows, each.bucket, why)) for each in gone], failed=True)
        return True

    def _full(self, rows: int, bucket: int, why: str = "") -> QueueFull:
        scheduler = self._scheduler
        with self._board.lock:
            excess, waiting, rules = scheduler.excess(rows, bucket), scheduler.waiting_work, scheduler.rules
        of, most = f"{rows} rows", f"{rules.max_pending}"
        if rules.by_positions:
            of, most = f"{rows} x {scheduler.unit(bucket)} positions", f"Work(positions={rules.max_pending})"
        return QueueFull(
            f"no room for {of}: {waiting} wait and max_pending={most}{why}; try again later, or raise max_pending",
            self._counters.drain_seconds(excess, self._clock()),
        )
