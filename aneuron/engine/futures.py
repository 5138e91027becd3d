"""The futures of the accepted calls, and the one function that ends a call.

Lives here: everything that touches a caller's future, all of it on the loop thread. Must not be here: queues, lanes,
threads.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from aneuron.errors import DeadlineExceeded
from aneuron.ownership import Owned
from aneuron.sched.call import Call, Limit
from aneuron.stats import Counters


class Futures:
    """The calls that were accepted and have not ended. Each ends once: by `end`, or by `withdraw`."""

    owned = Owned(loop=("calls", "_drained"))

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        counters: Counters,
        discard: Callable[[Call], None],
        guard: Callable[[Callable[[], None]], None],
    ) -> None:
        self.calls: set[Call] = set()
        self._loop = loop
        self._clock = clock
        self._counters = counters
        self._discard = discard  # takes a call's waiting rows out of the queue
        self._guard = guard  # around what the loop calls: what it raises must not leave anybody waiting
        self._drained: asyncio.Future[None] | None = None

    def accept(self, call: Call, now: float) -> "asyncio.Future[Any]":
        """Accept a call; its future. Who stops waiting for that before the call is settled must `withdraw` it."""
        future: asyncio.Future[Any] | None = call.future
        if future is None:  # a call of another process has what answers that
            call.future = future = self._loop.create_future()
        call.admitted = now
        self.calls.add(call)
        self._counters.accepted += 1
        return future

    def time(self, call: Call, timeout: Limit) -> None:
        """Give a call its deadline."""
        call.deadline, call.limit = call.admitted + timeout, timeout
        call.timer = self._loop.call_later(timeout, self._guard, partial(self.expire, call))

    def expire(self, call: Call) -> None:
        """A call's deadline has passed, or cannot be met."""
        now = self._clock()
        why = f"{call.limit!s} has passed"
        if now < call.deadline:
            why = f"{call.limit!s} cannot be met: {now - call.admitted:.3g} s have passed, and the cores need "
            why += "more than the rest"
        self.end([(call, DeadlineExceeded(f"{why}; allow more time, or send less"))], failed=True)

    def end(self, outcomes: Iterable[tuple[Call, Any]], failed: bool = False, now: float | None = None) -> None:
        """The one function that ends calls, with a result or (`failed`) an exception each.

        A call whose caller has left is left to `withdraw`.
        """
        now, seconds, forget = self._clock() if now is None else now, [], self._forget
        for call, outcome in outcomes:
            if call.settled or (future := call.future).done():  # its caller has left
                continue
            if failed:
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
            seconds.append(now - call.admitted)
            forget(call)
        if failed:
            self._counters.failed += len(seconds)
        else:
            self._counters.completed += len(seconds)
        self._counters.total_seconds.add_all(seconds)
        if self._drained is not None:
            self._check_drained()

    def withdraw(self, call: Call) -> None:
        """The caller has left: its rows leave the queue, or their results will be dropped."""
        future = call.future
        self._forget(call)
        self._counters.cancelled += 1
        with suppress(RuntimeError):  # the loop is closed
            future.cancel()
        if self._drained is not None:
            self._check_drained()

    def drained(self) -> "asyncio.Future[None]":
        """Done when no call is left."""
        if self._drained is None:
            self._drained = self._loop.create_future()
            self._check_drained()
        return self._drained

    def _check_drained(self) -> None:
        if self._drained is not None and not self.calls and not self._drained.done():
            self._drained.set_result(None)

    def _forget(self, call: Call) -> None:
        # At once: the call itself may be in a queue for a while, or in the frames that an exception's traceback holds.
        call.settled = True
        self.calls.discard(call)
        if call.bound < call.rows:
            self._discard(call)
        if call.timer is not None:
            call.timer.cancel()
        call.leaves = call.future = None
        if call.template is not None:
            call.template = None
        if call.parts is not None:
            call.parts = None


def has_left(call: Call) -> bool:
    """Whether a call has ended, or its caller has left and will withdraw it."""
    return call.settled or call.future.done()
