"""Holding back a batch that is not full, for company (`max_delay`).

Lives here: how long, and what may pass meanwhile. Must not be here: lanes, clocks: `now` is an argument.
"""

from collections import deque
from collections.abc import Hashable

from aneuron.ownership import Owned
from aneuron.sched.call import Call
from aneuron.sched.fair_queue import FairQueue
from aneuron.sched.flows import Flow, Kind, first

COMPANY = 1.5  # rows that must be expected during a learned hold to make it worth while


class BatchDelay:
    """What is kept, while batches may be held back, to decide on it."""

    owned = Owned(lock=("over", "_arrivals", "_full", "_rate", "_arrived", "_since"))

    def __init__(self, queue: FairQueue) -> None:
        self.over = False  # whether the last batch that was asked for had been held back
        self._queue = queue
        self._arrivals: deque[Call] = deque()  # the waiting calls in order of coming, and some that have left
        self._full: dict[Hashable, Kind] = {}  # kinds with a full batch
        self._rate = 0.0  # rows a second, lately
        self._arrived, self._since = 0, 0.0  # rows that came since then

    def note(self, call: Call) -> None:
        """A call has come."""
        self._arrivals.append(call)
        if len(self._arrivals) > 2 * self._queue.live + 16:
            self._arrivals = deque(other for other in self._arrivals if other.bound < other.rows)
        kind = self._queue.kinds[call.signature]
        if kind.rows >= kind.limit:
            self._full[kind.signature] = kind
        self._arrived += call.rows

    def mend(self, signature: Hashable) -> None:
        """Rows of a kind have left."""
        kind = self._full.get(signature)
        if kind is not None and kind.rows < kind.limit:
            del self._full[signature]

    def until(self, seconds: float, now: float) -> float | None:
        """The time to which a batch is held back: `seconds` after the eldest row came; None if that has passed."""
        arrivals = self._arrivals
        while arrivals and arrivals[0].bound == arrivals[0].rows:
            arrivals.popleft()
        until = arrivals[0].admitted + seconds if arrivals else now
        self.over = seconds > 0 and until <= now
        return until if until > now else None

    def learned(self, service: float, cores: int, now: float) -> float:
        """One core's share of a service time, where so many rows are on their way that it pays, else 0.

        Until then one of the cores will have ended, on average.
        """
        if now - self._since > 4 * service:
            self._rate, self._since, self._arrived = self._arrived / (now - self._since), now, 0
        hold = service / max(1, cores)
        return hold if self._rate * hold >= COMPANY else 0.0

    def a_full_batch(self) -> Flow | None:
        """Who starts a full batch, while the head is held back."""
        for kind in self._full.values():
            for heap in kind.every_heap():
                flow: Flow | None = first(heap)
                if flow is not None:
                    return flow
        return None
