"""What waiting calls stand in: flows, by tenant, line and level, and who is first in each.

Lives here: heaps that are mended when they are looked at. Must not be here: whose turn it is among levels, counting
(fair_queue.py), batches, lanes, asyncio, threads, torch, a clock.

Whoever can be first stands in a heap. Entries may lag behind, to the front only, and are mended when they come to the
top: each step takes the time of a few heap operations, however many calls, tenants, signatures or priorities wait.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

from aneuron.sched.call import Call, Terms

STARTS = 3  # batches in a row that may start from the first line while others wait
FEW = 4  # batches that a medium call is

SMALL, MEDIUM, LARGE = range(3)  # standings: a medium call that has had its first batch is large
LINES = (slice(0, 1), slice(0, 2), slice(1, 2))  # those that a flow of each standing is in

Heap = list[tuple[float, int, Any]]  # tenants, or flows: by tag, then by the sequence of the first call


class Tenant:
    """A tenant within a line. `tag`: the rows it has had, in the line's time."""

    __slots__ = ("heap", "listed", "live", "tag")

    def __init__(self) -> None:
        self.tag = 0.0
        self.live = 0  # calls
        self.listed = False  # in the line's heap
        self.heap: list[tuple[int, Flow]] = []  # by the sequence of the first call

    def first(self) -> "Flow | None":
        """The flow whose first call came first."""
        heap = self.heap
        while heap:
            sequence, flow = heap[0]
            call = flow.first()
            if call is None:
                heapq.heappop(heap)
                flow.listed = False
            elif call.sequence != sequence:
                heapq.heapreplace(heap, (call.sequence, flow))
            else:
                return flow
        return None


class Line:
    """One of the lines of a level."""

    __slots__ = ("begun", "heap", "live", "present", "second", "tenants", "time")

    def __init__(self, second: bool) -> None:
        self.second = second
        self.present = 0  # tenants that have calls here
        self.heap: Heap = []  # of tenants
        self.tenants: dict[Hashable, Tenant] = {}
        self.time = 0.0
        self.live = 0  # calls
        self.begun: deque[Flow] = deque()  # their first call was cut by the end of a batch: it goes on at once

    def first(self) -> "Flow | None":
        """The flow whose turn it is."""
        while self.begun:
            flow = self.begun[0]
            call = flow.first()
            if call is not None and call.bound:
                return flow
            self.begun.popleft()
        heap = self.heap
        while heap:
            tag, sequence, tenant = heap[0]
            due: Flow | None = tenant.first()
            if due is None:
                heapq.heappop(heap)
                tenant.listed = False
            elif tag != tenant.tag or sequence != due.calls[0].sequence:
                heapq.heapreplace(heap, (tenant.tag, due.calls[0].sequence, tenant))
            else:
                return due
        return None


class Level:
    """The calls of one priority."""

    __slots__ = ("key", "lines", "priority", "starts")

    def __init__(self, priority: float) -> None:
        self.priority = priority
        self.lines: tuple[Line, ...] = (Line(False), Line(True))
        self.starts = 0  # batches since one started from the second line, while calls waited there
        self.key: float | None = None  # as in the heap of levels; None: not there

    def turn(self) -> Line:
        """The line that starts the next batch: the first, but for every fourth while calls wait in the second.

        Or up to every second, where more tenants wait in that: each is to have half its fair share at least.
        """
        line, other = self.lines
        if not line.live:
            return other
        if other.live and self.starts >= max(1, min(STARTS, STARTS * line.present // other.present)):
            return other
        return line

    def urgency(self) -> float | None:
        """The time since which its eldest head waits, less a second for each unit of priority; None if empty."""
        heads = [flow.calls[0] for line in self.lines if (flow := line.first()) is not None]
        return min((call.since or call.admitted) for call in heads) - self.priority if heads else None


class Stake:
    """What a tenant has waiting, in all lines, levels and signatures."""

    __slots__ = ("load", "work")

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.work = 0


class Load:
    """What waits and counts for the same room."""

    __slots__ = ("large", "stakes", "tenants", "turns", "work", "yields")

    def __init__(self, yields: bool) -> None:
        self.yields = yields
        self.work = 0  # of maps; that of callers is the rest
        self.large = 0  # work of calls of more than one batch
        self.turns = 0  # that of one batch for each of these calls
        self.stakes: dict[Hashable, Stake] = {}  # by tenant
        self.tenants = 0  # that have rows here

    @property
    def rest(self) -> int:
        """Work of large calls that is not of their next batch."""
        return max(0, self.large - self.turns)


class Flow:
    """The waiting calls of one signature, priority, tenant and standing; those without rows are skipped on the way.

    Where these stand in two lines there is a flow for each, with the same calls: its `twins`.
    """

    __slots__ = (
        "calls", "filed", "heap", "kind", "level", "line", "listed", "live", "special", "stake", "standing", "tenant",
        "twins",
    )  # fmt: skip

    def __init__(self, kind: "Kind", level: Level, line: Line, tenant: Tenant, stake: Stake, standing: int) -> None:
        self.calls: deque[Call] = deque()
        self.live = 0  # calls that still have rows
        self.kind, self.level, self.line, self.tenant = kind, level, line, tenant
        self.stake, self.standing = stake, standing
        self.special = bool(standing) or stake.load.yields
        self.heap = kind.heap(level.priority, standing == LARGE)
        self.listed = False  # in the tenant's heap
        self.filed = standing == MEDIUM and line.second  # in the kind's heap; of twins one is enough
        self.twins: tuple[Flow, ...] = (self,)

    def first(self) -> Call | None:
        """The first call that has rows."""
        calls = self.calls
        while calls:
            call = calls[0]
            if call.bound < call.rows:
                return call
            calls.popleft()
        return None

    def newest(self) -> Call | None:
        """The call that came last, if none of its rows has left."""
        calls = self.calls
        while calls and calls[-1].bound == calls[-1].rows:
            calls.pop()
        return calls[-1] if calls and not calls[-1].bound else None


class Kind:
    """The waiting calls that may share a batch."""

    __slots__ = ("_heaps", "_priorities", "anywhere", "bucket", "flows", "limit", "rows", "signature", "unit", "usual")

    def __init__(self, signature: Hashable, bucket: int, limit: int, unit: int = 1) -> None:
        self.signature = signature
        self.unit = unit  # the work of a row, as room is counted
        self.bucket = bucket
        self.limit = limit  # rows that a batch may hold
        self.rows = 0  # that wait
        self.anywhere = True  # whether all its calls may be cut anywhere
        self.flows: dict[tuple[Terms, int], Flow] = {}  # by terms and standing; of twins the one in the first line
        self.usual: Flow | None = None  # of small calls on the usual terms, to find it faster
        self._heaps: dict[
            float, tuple[Heap, Heap]
        ] = {}  # of flows, by priority: those of the first line, and the others
        self._priorities: list[float] = []  # negative, so rising: the highest comes first

    def heap(self, priority: float, large: bool) -> Heap:
        """The flows of a level and line."""
        if priority not in self._heaps:
            self._heaps[priority] = [], []
            insort(self._priorities, -priority)
        return self._heaps[priority][large]

    def heaps(self, head: Flow) -> Iterator[Heap]:
        """The flows of all levels and lines, in the order in which they fill a batch that starts with `head`."""
        large = head.line.second
        first = self._heaps.get(head.level.priority)
        if first is not None:
            yield first[large]
            yield first[not large]
        for negative in self._priorities if len(self._priorities) > 1 else ():
            pair = self._heaps[-negative]
            if pair is not first:
                yield pair[large]
                yield pair[not large]

    def every_heap(self) -> Iterator[Heap]:
        """The flows of all levels and lines, the highest first."""
        for negative in self._priorities:
            yield from self._heaps[-negative]

    def sweep(self) -> None:
        """Let go of what nothing waits in."""
        self.flows = {key: flow for key, flow in self.flows.items() if flow.live}
        if self.usual is not None and not self.usual.live:
            self.usual = None
        for pair in self._heaps.values():
            for heap in pair:
                heap[:] = [entry for entry in heap if entry[2].live]
                heapq.heapify(heap)
        self._heaps = {priority: pair for priority, pair in self._heaps.items() if any(pair)}
        self._priorities = sorted(-priority for priority in self._heaps)


def first(heap: Heap) -> Any:
    """The flow of a kind whose turn it is."""
    while heap:
        tag, sequence, flow = heap[0]
        call = flow.first()
        if call is None:
            heapq.heappop(heap)
            flow.filed = False
        elif flow.tenant.tag != tag or call.sequence != sequence:
            heapq.heapreplace(heap, (flow.tenant.tag, call.sequence, flow))
        else:
            return flow
    return None
