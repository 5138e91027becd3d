"""Who goes first: the fair order of the waiting calls.

Lives here: levels, lines, tenants, and whose turn it is. Must not be here: forming batches (batches.py), lanes, slots,
asyncio, threads, torch, a clock.

    level    the calls of one priority: in two lines, of calls of at most one batch, and of larger ones
    line     its tenants take turns
    tenant   its flows take turns by their first call
    flow     the calls of one signature, priority, line and tenant, in order of coming
    kind     all flows of one signature: the calls that may share a batch

Turns are taken by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in rows: each tenant has a tag, the
lowest is served and its tag grows by the rows taken. A tenant that comes anew starts at the line's time, the highest
tag served: it is owed nothing for the time that it was not there.

Whoever can be first stands in a heap. Entries may lag behind, to the front only, and are mended when they come to the
top: each step takes the time of a few heap operations, however many calls, tenants, signatures or priorities wait.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic

from aneuron.waiting import ANYWHERE, C, Terms

SMALL_STARTS = 3  # batches in a row that may start from the line of small calls while large ones wait

Heap = list[tuple[float, int, Any]]  # tenants, or flows: by tag, then by the sequence of the first call


class _Tenant(Generic[C]):
    """A tenant within a line. `tag`: the rows it has had, in the line's time."""

    __slots__ = ("heap", "listed", "live", "tag")

    def __init__(self) -> None:
        self.tag = 0.0
        self.live = 0  # calls
        self.listed = False  # in the line's heap
        self.heap: list[tuple[int, Flow[C]]] = []  # by the sequence of the first call

    def first(self) -> "Flow[C] | None":
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


class _Line(Generic[C]):
    """The small or the large calls of a level."""

    __slots__ = ("begun", "heap", "large", "live", "tenants", "time")

    def __init__(self, large: bool) -> None:
        self.large = large
        self.heap: Heap = []  # of tenants
        self.tenants: dict[Hashable, _Tenant[C]] = {}
        self.time = 0.0
        self.live = 0  # calls
        self.begun: deque[Flow[C]] = deque()  # their first call was cut by the end of a batch: it goes on at once

    def first(self) -> "Flow[C] | None":
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
            due: Flow[C] | None = tenant.first()
            if due is None:
                heapq.heappop(heap)
                tenant.listed = False
            elif tag != tenant.tag or sequence != due.calls[0].sequence:
                heapq.heapreplace(heap, (tenant.tag, due.calls[0].sequence, tenant))
            else:
                return due
        return None


class _Level(Generic[C]):
    """The calls of one priority."""

    __slots__ = ("key", "lines", "priority", "small_starts")

    def __init__(self, priority: float) -> None:
        self.priority = priority
        self.lines: tuple[_Line[C], _Line[C]] = (_Line(False), _Line(True))
        self.small_starts = 0  # batches since one started from the large line, while both waited
        self.key: float | None = None  # as in the heap of levels; None: not there

    def turn(self) -> _Line[C]:
        """The line that starts the next batch: the small one, but for every fourth batch while large calls wait."""
        small, large = self.lines
        if not small.live or (large.live and self.small_starts >= SMALL_STARTS):
            return large
        return small

    def urgency(self) -> float | None:
        """The time since which its eldest head waits, less a second for each unit of priority; None if empty."""
        heads = [flow.calls[0] for line in self.lines if (flow := line.first()) is not None]
        return min((call.since or call.admitted) for call in heads) - self.priority if heads else None


class Flow(Generic[C]):
    """The waiting calls of one signature, priority, line and tenant; those with no row left are skipped on the way."""

    __slots__ = ("calls", "filed", "heap", "kind", "level", "line", "listed", "live", "tenant")

    def __init__(self, kind: "Kind[C]", level: _Level[C], line: _Line[C], tenant: _Tenant[C]) -> None:
        self.calls: deque[C] = deque()
        self.live = 0  # calls that still have rows
        self.kind, self.level, self.line, self.tenant = kind, level, line, tenant
        self.heap = kind.heap(level.priority, line.large)
        self.listed = self.filed = False  # whether it is in the tenant's heap, and in the kind's

    def first(self) -> C | None:
        """The first call that has rows."""
        calls = self.calls
        while calls:
            call = calls[0]
            if call.bound < call.rows:
                return call
            calls.popleft()
        return None


class Kind(Generic[C]):
    """The waiting calls that may share a batch."""

    __slots__ = ("_heaps", "_priorities", "anywhere", "bucket", "flows", "limit", "rows", "signature", "usual")

    def __init__(self, signature: Hashable, bucket: int, limit: int) -> None:
        self.signature = signature
        self.bucket = bucket
        self.limit = limit  # rows that a batch may hold
        self.rows = 0  # that wait
        self.anywhere = True  # whether all its calls may be cut anywhere
        self.flows: dict[tuple[Terms, bool], Flow[C]] = {}
        self.usual: Flow[C] | None = None  # of small calls on the usual terms, to find it faster
        self._heaps: dict[float, tuple[Heap, Heap]] = {}  # of flows, by priority: the small ones, and the large ones
        self._priorities: list[float] = []  # negative, so rising: the highest comes first

    def heap(self, priority: float, large: bool) -> Heap:
        """The flows of a level and line."""
        if priority not in self._heaps:
            self._heaps[priority] = [], []
            insort(self._priorities, -priority)
        return self._heaps[priority][large]

    def heaps(self, head: Flow[C]) -> Iterator[Heap]:
        """The flows of all levels and lines, in the order in which they fill a batch that starts with `head`."""
        large = head.line.large
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


class Order(Generic[C]):
    """All waiting calls."""

    def __init__(self) -> None:
        self.rows = 0  # that wait
        self.large_rows = 0  # those of them that belong to calls of more than one batch
        self.fresh = 0  # calls of which no row has left
        self.live = 0  # calls that have rows here
        self.kinds: dict[Hashable, Kind[C]] = {}
        self._levels: dict[float, _Level[C]] = {}
        self._urgent: list[tuple[float, float, _Level[C]]] = []  # heap of levels, kept while there are several
        self._dirty: set[_Level[C]] = set()  # those whose heads may have changed
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
                    self._come(flow, count, rows)
                signature, terms, count, rows = call.signature, call.terms, 0, 0
                flow = self._flow(call, limit)
                most = 0 if flow.line.large else flow.kind.limit
            self._sequence = call.sequence = self._sequence + 1
            flow.calls.append(call)
            count += 1
            rows += call.rows
        if flow is not None:
            self._come(flow, count, rows)

    def _flow(self, call: C, limit: Callable[[int], int]) -> Flow[C]:
        """The flow that a call goes into."""
        kind = self.kinds.get(call.signature)
        if kind is None:
            kind = self.kinds[call.signature] = Kind(call.signature, call.bucket, limit(call.bucket))
        if not kind.rows:
            kind.anywhere = True
        if call.cut.piece:
            kind.anywhere = False
        large = call.rows > kind.limit
        flow = kind.usual if call.terms is None and not large else kind.flows.get((call.terms or Terms(), large))
        return flow or self._new_flow(kind, call.terms, large)

    def _new_flow(self, kind: Kind[C], own: Terms | None, large: bool) -> Flow[C]:
        if self._flows >= self._sweep_at:
            self._sweep(kind)
        terms = own or Terms()
        level = self._levels.get(terms.priority)
        if level is None:
            if len(self._levels) == 1:
                self._dirty.update(self._levels.values())  # while there was one only, nobody asked
            level = self._levels[terms.priority] = _Level(terms.priority)
        line = level.lines[large]
        tenant = line.tenants.get(terms.tenant)
        if tenant is None:
            tenant = line.tenants[terms.tenant] = _Tenant()
        flow = kind.flows[terms, large] = Flow(kind, level, line, tenant)
        if own is None and not large:
            kind.usual = flow
        self._flows += 1
        return flow

    def _come(self, flow: Flow[C], calls: int, rows: int) -> None:
        """Calls have come into a flow: count them, and see that it stands in the heaps."""
        line, tenant = flow.line, flow.tenant
        if not tenant.live:
            tenant.tag = line.time
        tenant.live += calls
        flow.live += calls
        line.live += calls
        flow.kind.rows += rows
        self.rows += rows
        self.fresh += calls
        self.live += calls
        if line.large:
            self.large_rows += rows
        if not (flow.listed and flow.filed and tenant.listed):
            sequence = flow.calls[0].sequence
            if not flow.listed:
                flow.listed = True
                heapq.heappush(tenant.heap, (sequence, flow))
            if not tenant.listed:
                tenant.listed = True
                heapq.heappush(line.heap, (tenant.tag, sequence, tenant))
            if not flow.filed:
                flow.filed = True
                heapq.heappush(flow.heap, (tenant.tag, sequence, flow))
        self._dirty.add(flow.level)

    def _sweep(self, kept: Kind[C]) -> None:
        """Let go of what nothing waits in: tenants, signatures and priorities come and go."""
        for kind in list(self.kinds.values()):
            kind.sweep()
            if not kind.flows and kind is not kept:
                del self.kinds[kind.signature]
        for level in list(self._levels.values()):
            for line in level.lines:
                line.tenants = {name: tenant for name, tenant in line.tenants.items() if tenant.live}
                line.heap = [entry for entry in line.heap if entry[2].live]
                heapq.heapify(line.heap)
                for tenant in line.tenants.values():
                    tenant.heap = [entry for entry in tenant.heap if entry[1].live]
                    heapq.heapify(tenant.heap)
            if not any(line.live for line in level.lines):
                del self._levels[level.priority]
        self._dirty.intersection_update(self._levels.values())
        self._collect()
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

    def taken(self, flow: Flow[C], rows: int, fresh: int, finished: int) -> None:
        """Rows of a flow are bound: count them, and charge them to the tenant."""
        self._left(flow, rows, fresh, finished)
        self.charge(flow, rows)

    def charge(self, flow: Flow[C], rows: float) -> None:
        """Charge a tenant for rows."""
        flow.tenant.tag = tag = flow.tenant.tag + rows
        if tag > flow.line.time:
            flow.line.time = tag

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
        self._dirty.add(flow.level)

    def cut(self, flow: Flow[C]) -> None:
        """The first call of a flow was cut by the end of a batch. A small one goes on with the next."""
        if not flow.line.large:
            flow.line.begun.append(flow)

    def started(self, flow: Flow[C], call: C, now: float) -> None:
        """A batch has started with rows of a flow's call."""
        level = flow.level
        if not flow.line.large:
            if level.lines[1].live:
                level.small_starts += 1
            return
        level.small_starts = 0
        if call.bound < call.rows:  # to the end of the line: a large call gives one batch a turn, and waits anew
            call.since = now
            self._sequence = call.sequence = self._sequence + 1
            flow.calls.remove(call)  # it is the first
            flow.calls.append(call)

    # Who is next.

    def head(self) -> Flow[C] | None:
        """The flow whose first call starts the next batch."""
        level = self._level()
        return None if level is None else level.turn().first()

    def has_full(self) -> bool:
        """Whether the next batch would be full."""
        head = self.head()
        return head is not None and (head.kind.rows >= head.kind.limit or not head.calls[0].cut.shared)

    def _level(self) -> _Level[C] | None:
        """The level whose head is most urgent: a second of waiting counts as much as a unit of priority."""
        if not self.rows:
            return None
        if len(self._levels) == 1:
            return next(iter(self._levels.values()))
        for level in self._dirty:
            key = level.urgency()
            if key != level.key:
                level.key = key
                if key is not None:
                    heapq.heappush(self._urgent, (key, level.priority, level))
        self._dirty.clear()
        if len(self._urgent) > 2 * len(self._levels) + 32:
            self._collect()
        while (entry := self._urgent[0])[0] != entry[2].key:  # superseded
            heapq.heappop(self._urgent)
        return entry[2]

    def _collect(self) -> None:
        """Drop superseded entries from the heap of levels."""
        levels = self._levels.values()
        self._urgent = [(level.key, level.priority, level) for level in levels if level.key is not None]
        heapq.heapify(self._urgent)
