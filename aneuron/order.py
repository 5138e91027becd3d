"""Who goes first: the fair order of the waiting calls.

Lives here: levels, lines, tenants, and taking rows from them in turn. Must not be here: lanes, slots, deadlines,
asyncio, threads, torch, a clock.

A call waits in a `Flow`: those of one signature, priority, tenant and line, in order of coming. Each flow stands in
two heaps: its line's, which says who starts the next batch, and one of its kind's (the calls that may share a batch),
which say who fills it. Entries may lag behind, to the front only: they are mended when they come to the top. So all
steps take the time of a few heap operations, however many calls, tenants, signatures or priorities wait.

Turns are taken by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in rows: each tenant has a tag, the
lowest is served and its tag grows by the rows taken. A tenant that comes anew starts at the line's time, the highest
tag served: it is owed nothing for the time that it was not there.
"""

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic

from aneuron.waiting import ANYWHERE, C, Terms

SMALL_STARTS = 3  # batches in a row that may start from the line of small calls while large ones wait

Heap = list[tuple[float, int, Any]]  # flows, by the tag of their tenant, then by the sequence of their first call


class _Tenant:
    """A tenant within a line. `tag`: the rows it has had, in the line's time."""

    __slots__ = ("live", "tag")

    def __init__(self) -> None:
        self.tag = 0.0
        self.live = 0  # calls


class _Line(Generic[C]):
    """The small or the large calls of a level."""

    __slots__ = ("heap", "large", "live", "tenants", "time")

    def __init__(self, large: bool) -> None:
        self.large = large
        self.heap: Heap = []
        self.tenants: dict[Hashable, _Tenant] = {}
        self.time = 0.0
        self.live = 0  # calls


class _Level(Generic[C]):
    """The calls of one priority, in two lines."""

    __slots__ = ("key", "lines", "priority", "small_starts")

    def __init__(self, priority: float) -> None:
        self.priority = priority
        self.lines: tuple[_Line[C], _Line[C]] = (_Line(False), _Line(True))
        self.small_starts = 0  # since the last batch that started from the large line, or both lines waited
        self.key: float | None = None  # as in the heap of levels; None: not there

    def turn(self) -> _Line[C]:
        """The line that starts the next batch: the small one, but for every fourth batch while large calls wait."""
        small, large = self.lines
        if not small.live or (large.live and self.small_starts >= SMALL_STARTS):
            return large
        return small

    def urgency(self) -> float | None:
        """The time at which its eldest head came, less a second for each unit of priority; None if nothing waits."""
        came = [flow.calls[0].admitted for line in self.lines if (flow := first(line.heap)) is not None]
        return min(came) - self.priority if came else None


class Flow(Generic[C]):
    """The waiting calls of one signature, priority, tenant and line; those with no row left are skipped on the way."""

    __slots__ = ("calls", "filed", "heap", "kind", "level", "line", "listed", "live", "tenant")

    def __init__(self, kind: "Kind[C]", level: _Level[C], line: _Line[C], tenant: _Tenant) -> None:
        self.calls: deque[C] = deque()
        self.live = 0  # calls that still have rows
        self.kind, self.level, self.line, self.tenant = kind, level, line, tenant
        self.heap: Heap = kind.heaps.setdefault((level.priority, line.large), [])  # the one of its kind
        self.listed = self.filed = False  # whether it is in the line's heap, and in the kind's


class Kind(Generic[C]):
    """The waiting calls that may share a batch."""

    __slots__ = ("anywhere", "bucket", "flows", "heaps", "limit", "rows", "signature", "usual")

    def __init__(self, signature: Hashable, bucket: int, limit: int) -> None:
        self.signature = signature
        self.bucket = bucket
        self.limit = limit  # rows that a batch may hold
        self.rows = 0  # that wait
        self.anywhere = True  # whether all its calls may be cut anywhere
        self.flows: dict[tuple[Terms, bool], Flow[C]] = {}
        self.usual: Flow[C] | None = None  # of small calls on the usual terms, to find it faster
        self.heaps: dict[tuple[float, bool], Heap] = {}  # by priority and line


def first(heap: Heap, filling: bool = False) -> Any:
    """The flow whose turn it is in a line's heap, or (`filling`) in a kind's; its first call has rows."""
    while heap:
        tag, sequence, flow = heap[0]
        calls = flow.calls
        while calls and calls[0].bound == calls[0].rows:
            calls.popleft()
        if not calls:
            heapq.heappop(heap)
            if filling:
                flow.filed = False
            else:
                flow.listed = False
        elif flow.tenant.tag != tag or calls[0].sequence != sequence:
            heapq.heapreplace(heap, (flow.tenant.tag, calls[0].sequence, flow))
        else:
            return flow
    return None


class Order(Generic[C]):
    """All waiting calls."""

    def __init__(self) -> None:
        self.rows = 0  # that wait
        self.large_rows = 0  # those of them that belong to calls of more than one batch
        self.fresh = 0  # calls of which no row has left
        self.live = 0  # calls that have rows here
        self.kinds: dict[Hashable, Kind[C]] = {}
        self._levels: dict[float, _Level[C]] = {}
        self._urgent: list[tuple[float, float, _Level[C]]] = []  # heap of levels; superseded entries are skipped
        self._sequence = 0
        self._flows = 0  # that exist
        self._sweep_at = 32  # when there are so many

    def calls(self) -> Iterator[C]:
        """Those that have rows here."""
        for kind in self.kinds.values():
            for flow in kind.flows.values():
                yield from (call for call in flow.calls if call.bound < call.rows)

    # Calls in, calls out.

    def push(self, calls: Iterable[C], limit: Callable[[int], int]) -> None:
        """Queue calls; a batch of a bucket may hold `limit(bucket)` rows. Those that have left again are skipped."""
        flow: Flow[C] | None = None
        signature: Hashable = None
        terms: Terms | None = None
        most = count = rows = 0  # of a run of calls that go into one flow
        for call in calls:
            if call.bound:
                continue
            if (
                call.rows > most
                or call.signature is not signature
                or call.terms is not terms
                or call.cut is not ANYWHERE
                or flow is None
            ):
                if flow is not None:
                    self._count(flow, count, rows)
                signature, terms, count, rows = call.signature, call.terms, 0, 0
                flow = self._flow(call, limit)
                most = 0 if flow.line.large else flow.kind.limit
            self._sequence = call.sequence = self._sequence + 1
            flow.calls.append(call)
            count += 1
            rows += call.rows
        if flow is not None:
            self._count(flow, count, rows)

    def _flow(self, call: C, limit: Callable[[int], int]) -> Flow[C]:
        """The flow that a call goes into."""
        kind = self.kinds.get(call.signature)
        if kind is None:
            kind = self.kinds[call.signature] = Kind(call.signature, call.bucket, limit(call.bucket))
        if call.cut.piece:
            kind.anywhere = False
        large = call.rows > kind.limit
        flow = kind.usual if call.terms is None and not large else kind.flows.get((call.terms or Terms(), large))
        return flow or self._new_flow(kind, call.terms or Terms(), large)

    def _count(self, flow: Flow[C], calls: int, rows: int) -> None:
        """Count calls that have come into a flow."""
        line, tenant = flow.line, flow.tenant
        if not tenant.live:
            tenant.tag = line.time
        tenant.live += calls
        flow.live += calls
        line.live += calls
        if not (flow.listed and flow.filed):
            self._enter(flow)
        if flow.level.key is None:
            self._rekey(flow.level)
        flow.kind.rows += rows
        self.rows += rows
        self.fresh += calls
        self.live += calls
        if line.large:
            self.large_rows += rows

    def _new_flow(self, kind: Kind[C], terms: Terms, large: bool) -> Flow[C]:
        if self._flows >= self._sweep_at:
            self._sweep(kind)
        level = self._levels.get(terms.priority)
        if level is None:
            for other in self._levels.values():
                self._rekey(other)  # while there was one only, nobody asked
            level = self._levels[terms.priority] = _Level(terms.priority)
        line = level.lines[large]
        tenant = line.tenants.get(terms.tenant)
        if tenant is None:
            tenant = line.tenants[terms.tenant] = _Tenant()
        flow = kind.flows[terms, large] = Flow(kind, level, line, tenant)
        if terms == Terms() and not large:
            kind.usual = flow
        self._flows += 1
        return flow

    def _enter(self, flow: Flow[C]) -> None:
        """Put a flow into the heaps that it is not in."""
        entry = (flow.tenant.tag, flow.calls[0].sequence, flow)
        if not flow.listed:
            flow.listed = True
            heapq.heappush(flow.line.heap, entry)
        if not flow.filed:
            flow.filed = True
            heapq.heappush(flow.heap, entry)

    def _sweep(self, kept: Kind[C]) -> None:
        """Let go of what nothing waits in: tenants, signatures and priorities come and go."""
        for kind in list(self.kinds.values()):
            kind.flows = {key: flow for key, flow in kind.flows.items() if flow.live}
            if kind.usual is not None and not kind.usual.live:
                kind.usual = None
            kind.heaps = {key: heap for key, heap in kind.heaps.items() if _keep(heap)}  # those of live flows
            if not kind.flows and kind is not kept:
                del self.kinds[kind.signature]
        for level in list(self._levels.values()):
            for line in level.lines:
                _keep(line.heap)
                line.tenants = {name: tenant for name, tenant in line.tenants.items() if tenant.live}
            if not any(line.live for line in level.lines):
                level.key = None
                del self._levels[level.priority]
        self._urgent = [entry for entry in self._urgent if entry[0] == entry[2].key]
        heapq.heapify(self._urgent)
        self._flows = sum(len(kind.flows) for kind in self.kinds.values())
        self._sweep_at = 2 * self._flows + 32

    def discard(self, call: C) -> None:
        """Take a call's rows out; does nothing if none waits."""
        left = call.rows - call.bound
        if not left:
            return
        kind = self.kinds[call.signature]
        flow = kind.flows[call.terms or Terms(), call.rows > kind.limit]
        self._left(flow, left, fresh=call.bound == 0, finished=1)
        call.bound = call.rows
        if not flow.live:
            flow.calls.clear()
        elif len(flow.calls) > 2 * flow.live + 16:
            live = [other for other in flow.calls if other.bound < other.rows]
            flow.calls.clear()  # the deque stays: rows may be being taken from it
            flow.calls.extend(live)
        if len(self._levels) > 1:
            self._rekey(flow.level)

    def _left(self, flow: Flow[C], rows: int, fresh: int, finished: int) -> None:
        """Count rows that have left a flow."""
        flow.live -= finished
        flow.line.live -= finished
        flow.tenant.live -= finished
        flow.kind.rows -= rows
        self.rows -= rows
        self.fresh -= fresh
        self.live -= finished
        if flow.line.large:
            self.large_rows -= rows

    # Who is next.

    def head(self) -> Flow[C] | None:
        """The flow whose first call starts the next batch."""
        level = self._level()
        return None if level is None else first(level.turn().heap)

    def has_full(self) -> bool:
        """Whether the next batch would be full."""
        head = self.head()
        return head is not None and (head.kind.rows >= head.kind.limit or not head.calls[0].cut.shared)

    def _level(self) -> _Level[C] | None:
        """The level whose head is most urgent: its priority counts a second each, so none waits for ever."""
        if not self.rows:
            return None
        if len(self._levels) == 1:
            return next(iter(self._levels.values()))
        heap = self._urgent
        while heap:
            key, _, level = heap[0]
            if key == level.key:
                actual = level.urgency()
                if actual == key:
                    return level
                level.key = actual
                if actual is not None:
                    heapq.heapreplace(heap, (actual, level.priority, level))
                    continue
            heapq.heappop(heap)
        return None

    def _rekey(self, level: _Level[C]) -> None:
        """See that a level's entry is not behind its head."""
        urgency = level.urgency()
        if urgency is not None and (level.key is None or urgency < level.key):
            level.key = urgency
            heapq.heappush(self._urgent, (urgency, level.priority, level))

    # Rows out.

    def heaps(self, head: Flow[C], kind: Kind[C]) -> Iterator[Heap]:
        """The heaps of a kind in the order in which they fill a batch that starts with `head`."""
        lines = (head.line.large, not head.line.large)
        levels = [head.level]
        if len(self._levels) > 1:  # of the others those near the top: many levels must not cost much
            levels += [level for key, _, level in self._urgent[:16] if key == level.key and level is not head.level]
        for level in levels:
            for large in lines:
                if heap := kind.heaps.get((level.priority, large)):
                    yield heap

    def taken(self, flow: Flow[C], rows: int, fresh: int, finished: int) -> None:
        """Rows of a flow are bound: count them, and charge them to the tenant."""
        self._left(flow, rows, fresh, finished)
        self.charge(flow, rows)

    def charge(self, flow: Flow[C], rows: float) -> None:
        """Charge a tenant for rows."""
        flow.tenant.tag = tag = flow.tenant.tag + rows
        if tag > flow.line.time:
            flow.line.time = tag

    def started(self, head: Flow[C], first: C) -> None:
        """A batch has started from `head` with rows of `first`."""
        level = head.level
        if not head.line.large:
            if level.lines[1].live:
                level.small_starts += 1
        else:
            level.small_starts = 0
            if first.bound < first.rows:  # to the end of the line: a large call gives one batch a turn
                self._sequence = first.sequence = self._sequence + 1
                head.calls.remove(first)  # it is the first
                head.calls.append(first)
        if len(self._levels) > 1:
            for each in [level, *self._levels.values()][:16]:
                self._rekey(each)


def _keep(heap: Heap) -> bool:
    """Drop the flows that nothing waits in; whether any is left."""
    heap[:] = [entry for entry in heap if entry[2].live]
    heapq.heapify(heap)
    return bool(heap)
