"""Room for waiting calls (`max_pending`): who finds it, who gives way, and which calls of maps wait for it outside.

Must not be here: who goes first (fair_queue.py), batches, lanes, callers' futures: what is decided comes back as data.

Room is counted in work: a row is 1, or, with `Work(positions=...)`, as long as it is padded to; `unit` says of a bucket
which. A waiting call takes room for the rows of its next batch: a small call for all, a large one for a batch, so that
it shuts out nobody by its size. What large calls have beyond that has as much room again, and one call that is larger
than this may wait beside. Where there is no room, a tenant that has less than its share takes it from the largest, and
a higher level from the lowest: the newest calls go, and none that has begun. Calls of maps take what is left over.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aneuron.ownership import Owned
from aneuron.sched.call import Call, Chunk, Terms
from aneuron.sched.fair_queue import FairQueue
from aneuron.sched.flows import SMALL, Flow, Load


@dataclass(frozen=True)
class Work:
    """A bound of `max_pending` by work and not by rows, for models with `buckets`: a row counts as many positions as it
    is padded to, so that one long call takes the room of many short ones.

    What a refusal counts, and by what it tells when to come again, are these positions, too.

        >>> Work(positions=65536)
        Work(positions=65536)
        >>> Work(positions=0)
        Traceback (most recent call last):
        ValueError: positions=0: expected an int of at least 1, those that may wait: rows times the length of each
    """

    positions: int

    def __post_init__(self) -> None:
        if isinstance(self.positions, bool) or not isinstance(self.positions, int) or self.positions < 1:
            raise ValueError(
                f"positions={self.positions!r}: expected an int of at least 1, those that may wait: rows times the "
                "length of each"
            )


def one(bucket: int) -> int:
    """A row counts one."""
    return 1


def positions(buckets: Iterable[int]) -> Callable[[int], int]:
    """A row counts what it is padded to; where that is not known (bucket 0) as much as the shortest."""
    shortest = min(buckets, default=1)
    return lambda bucket: bucket or shortest


def work_of(chunks: Iterable[Chunk], unit: Callable[[int], int]) -> int:
    """What the rows of a batch count."""
    return sum([(stop - start) * unit(call.bucket) for call, start, stop in chunks])


class Room:
    """The room of one order; `most`: the work that may wait, None: no bound."""

    owned = Owned(lock=("_inside", "_huge"))  # `outside` is the scheduler's, too

    def __init__(self, queue: FairQueue, limit: Callable[[int], int], unit: Callable[[int], int]) -> None:
        self.outside: deque[Call] = deque()  # calls of maps that wait for room, and some that have left
        self._inside: deque[Call] = deque()  # calls of maps that have found it, and some that have begun or left
        self._queue = queue
        self._rows = limit  # that a batch of a bucket may hold
        self._unit = unit  # the work of one of them
        self._callers = queue.loads[0]
        self._huge: dict[Load, Call] = {}  # the call of a load that is larger than the room

    def excess(self, rows: int, bucket: int, most: int | None, yields: bool = False) -> int:
        """Work that must leave before a call of `rows` rows finds room; 0: it does. Calls of maps count for maps."""
        if most is None:
            return 0
        limit, work = self._limit(bucket), rows * self._unit(bucket)
        there = self._queue.next_work(yields)
        if work <= limit:
            return max(0, min(there, there + work - most))
        loads = self._queue.loads if yields else (self._callers,)
        excess, rest = min(there, there + limit - most), work - limit
        huge = sum([self._huge_rest(load) for load in loads])
        there = sum([load.rest for load in loads]) - huge
        return max(0, excess, huge if rest > most else min(there, there + rest - most))

    def _limit(self, bucket: int) -> int:
        """Work that a batch of a bucket may hold."""
        return self._rows(bucket) * self._unit(bucket)

    def _huge_rest(self, load: Load) -> int:
        call = self._huge.get(load)
        if call is None:
            return 0
        return max(0, (call.rows - call.bound) * self._unit(call.bucket) - self._limit(call.bucket))

    # Callers.

    def is_plain(self, rows: int, bucket: int, most: int | None) -> bool:
        """Whether a caller's call that finds room changes nothing here."""
        return not self._inside and (most is None or rows * self._unit(bucket) <= most)

    def make(self, call: Call, most: int | None, now: float) -> list[Call] | None:
        """Make room for a caller's call: the calls that are to be refused for it; None if it is to be itself."""
        gone: list[Call] = []
        terms = call.terms or Terms()
        while self.excess(call.rows, call.bucket, most):
            victim = self._victim(call.rows, call.bucket, terms, most or 0, now)
            if victim is None:
                for each in reversed(gone):
                    each.bound = 0
                    self._queue.restore(each)
                return None
            self._queue.withdraw(victim)
            victim.bound = victim.rows
            gone.append(victim)
        self._note(call, most, self._callers)
        while self._inside and self.excess(call.rows, call.bucket, most, yields=True):
            self._give_way(self._inside.pop())
        return gone

    def lets_in(self, rows: int, bucket: int, most: int | None, now: float) -> bool:
        """Whether a call on the usual terms would be let in; where tenants wait, one of a tenant that does not."""
        if not self.excess(rows, bucket, most):
            return True
        named = any(stake.work and tenant is not None for tenant, stake in self._callers.stakes.items())
        terms = Terms(tenant=object() if named else None)
        return self._victim(rows, bucket, terms, most or 0, now) is not None

    def _victim(self, rows: int, bucket: int, terms: Terms, most: int, now: float) -> Call | None:
        """The call that is to give way to one of `rows` rows."""
        load = self._callers
        lower = self._queue.lowest() < terms.priority
        own = load.stakes.get(terms.tenant)
        held = own.work if own is not None else 0
        poor = held * (load.tenants + (not held)) < most  # it has less than its share
        if not lower and not poor:
            return None
        calls = [(call, flow) for flow in self._in_the_way(rows, bucket, most) if (call := flow.newest()) is not None]
        if lower and calls:
            levels = [(flow.level.priority + now - call.admitted, -call.sequence, call) for call, flow in calls]
            level, _, call = min(levels)
            if level < terms.priority:
                return call
        if poor:
            richer = [each for each in calls if each[1].stake.work > held + rows * self._unit(bucket)]
            richer = [each for each in richer if each[1].level.priority <= terms.priority]
            if richer:
                return max(richer, key=lambda each: (each[1].stake.work, each[0].sequence))[0]
        return None

    def _in_the_way(self, rows: int, bucket: int, most: int) -> Iterable[Flow]:
        """The flows whose calls have the room that one of `rows` rows lacks."""
        flows = [flow for flow in self._queue.flows() if not flow.stake.load.yields]
        limit, work = self._limit(bucket), rows * self._unit(bucket)
        if self._queue.next_work(False) + min(work, limit) > most:
            return flows
        if work - limit <= most:
            return [flow for flow in flows if flow.standing != SMALL]
        return [flow for flow in flows if flow.newest() is self._huge.get(self._callers)]

    def _note(self, call: Call, most: int | None, load: Load) -> None:
        """A call is let in."""
        if most is not None and call.rows * self._unit(call.bucket) - self._limit(call.bucket) > most:
            self._huge[load] = call

    # Calls of maps.

    def enter(self, call: Call, most: int | None) -> bool:
        """Whether a map's call finds room now, and nobody waits outside before it; else it is to be put there."""
        return not self.outside and self._let_in(call, most)

    def next(self, most: int | None) -> Call | None:
        """The first call outside, if it has found room."""
        while self.outside:
            call = self.outside[0]
            left = call.bound == call.rows
            if not left and not self._let_in(call, most):
                return None
            self.outside.popleft()
            if not left:
                return call
        return None

    def _let_in(self, call: Call, most: int | None) -> bool:
        if self.excess(call.rows, call.bucket, most, yields=True):
            return False
        while self._inside and self._inside[0].bound:
            self._inside.popleft()
        self._inside.append(call)
        self._note(call, most, self._queue.loads[1])
        return True

    def _give_way(self, call: Call) -> None:
        """A map's call waits outside again, first of all, if it has not begun."""
        if not call.bound:
            self._queue.withdraw(call)
            call.sequence = 0
            load = self._queue.loads[1]
            if self._huge.get(load) is call:
                del self._huge[load]
            self.outside.appendleft(call)
