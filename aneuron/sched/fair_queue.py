"""Who goes first: the fair queue of the waiting calls.

Lives here: levels, lines, tenants, and whose turn it is. Must not be here: forming batches (filling.py), lanes, slots,
asyncio, threads, torch, a clock.

    level    the calls of one priority, in two lines; its tenants take turns in each
    line     the first: small calls, of at most one batch, and medium ones, of a few, that have not had their first; the
             other: all that are not small, which get one batch each turn there and wait anew
    tenant   its flows take turns by their first call
    flow     the calls of one signature, priority, tenant and standing, in order of coming
    kind     all flows of one signature: the calls that may share a batch
    load     what waits and counts for the same room: the calls of callers, or those of maps

While both wait, at least every second batch starts from the first line and at least every fourth from the other. Medium
calls wait in both, for what comes first: so there is no step in how long calls wait where they grow beyond a batch, and
where they grow beyond a few the first of them makes no difference.

Turns within a line are taken by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in rows: each tenant has
a tag, the lowest is served and its tag grows by the rows taken. A tenant that comes anew starts at the line's time, the
highest tag served: it is owed nothing for the time that it was not there.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator

from aneuron.ownership import Owned
from aneuron.sched.call import ANYWHERE, NEVER, Call, Terms
from aneuron.sched.flows import FEW, LARGE, LINES, MEDIUM, SMALL, Flow, Kind, Level, Line, Load, Stake, Tenant


class FairQueue:
    """All waiting calls; flows.py's classes are reached through this one only, and whose it is."""

    owned = Owned(
        lock=("loads", "fresh", "live", "kinds", "_levels", "_urgent", "_dirty", "_sequence", "_flows", "_sweep_at"),
        set_with_lock=("rows", "work"),  # the loop asks whether any wait
    )

    def __init__(self, unit: Callable[[int], int] = lambda bucket: 1) -> None:
        self.rows = 0  # that wait
        self.work = 0  # the same, as room is counted: a row of a bucket takes `unit(bucket)` of it
        self.loads = Load(False), Load(True)  # of callers, and of maps, which give way
        self.fresh = 0  # calls of which no row has left
        self.live = 0  # calls that have rows here
        self.kinds: dict[Hashable, Kind] = {}
        self._unit = unit
        self._levels: dict[float, Level] = {}
        self._urgent: list[tuple[float, float, Level]] = []  # heap of levels, kept while there are several
        self._dirty: set[Level] = set()  # those whose heads may have changed
        self._sequence = 0
        self._flows = 0  # that exist
        self._sweep_at = 32  # when there are so many

    def flows(self) -> Iterator[Flow]:
        """All of them; of twins the one in the first line."""
        return (flow for kind in self.kinds.values() for flow in kind.flows.values())

    def calls(self) -> Iterator[Call]:
        """Those that have rows here."""
        return (call for flow in self.flows() for call in flow.calls if call.bound < call.rows)

    def next_work(self, yields: bool) -> int:
        """That of the calls' next batches: all of a small call, one batch of a large one; of maps only if `yields`."""
        callers, maps = self.loads
        work = self.work - callers.large + callers.turns
        return work - maps.large + maps.turns if yields else work - maps.work

    def lowest(self) -> float:
        """The lowest priority that waits."""
        live = [level.priority for level in self._levels.values() if any(line.live for line in level.lines)]
        return min(live, default=NEVER)

    # Calls in, calls out.

    def push(self, calls: Iterable[Call], limit: Callable[[int], int]) -> None:
        """Queue calls; a batch of a bucket may hold `limit(bucket)` rows. Those that have left again are skipped."""
        flow: Flow | None = None
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
                    self._come(flow, count, rows, count)
                signature, terms, count, rows = call.signature, call.terms, 0, 0
                flow = self._flow(call, limit)
                most = 0 if flow.standing else flow.kind.limit
            self._sequence = call.sequence = self._sequence + 1
            flow.calls.append(call)
            count += 1
            rows += call.rows
        if flow is not None:
            self._come(flow, count, rows, count)

    def _flow(self, call: Call, limit: Callable[[int], int]) -> Flow:
        """The flow that a call goes into."""
        kind = self.kinds.get(call.signature)
        if kind is None:
            kind = self.kinds[call.signature] = Kind(
                call.signature, call.bucket, limit(call.bucket), self._unit(call.bucket)
            )
        if not kind.rows:
            kind.anywhere = True
        if call.cut.piece:
            kind.anywhere = False
        standing = self._standing(call, kind)
        flow = kind.usual if call.terms is None and not standing else kind.flows.get((call.terms or Terms(), standing))
        return flow or self._new_flow(kind, call.terms, standing)

    def _standing(self, call: Call, kind: Kind) -> int:
        if call.rows <= kind.limit:
            return SMALL
        return MEDIUM if call.rows <= FEW * kind.limit and call.since is None else LARGE

    def _new_flow(self, kind: Kind, own: Terms | None, standing: int) -> Flow:
        if self._flows >= self._sweep_at:
            self._sweep(kind)
        terms = own or Terms()
        level = self._levels.get(terms.priority)
        if level is None:
            if len(self._levels) == 1:
                self._dirty.update(self._levels.values())  # while there was one only, nobody asked
            level = self._levels[terms.priority] = Level(terms.priority)
        load = self.loads[terms.yields]
        stake = load.stakes.get(terms.tenant)
        if stake is None:
            stake = load.stakes[terms.tenant] = Stake(load)
        flows: list[Flow] = []
        lines: tuple[Line, ...] = level.lines[LINES[standing]]
        for line in lines:
            tenant = line.tenants.get(terms.tenant)
            if tenant is None:
                tenant = line.tenants[terms.tenant] = Tenant()
            flows.append(Flow(kind, level, line, tenant, stake, standing))
        flow = kind.flows[terms, standing] = flows[0]
        if len(flows) > 1:
            for twin in flows:
                twin.calls, twin.twins = flow.calls, tuple(flows)
        if own is None and not standing:
            kind.usual = flow
        self._flows += 1
        return flow

    def _come(self, flow: Flow, calls: int, rows: int, fresh: int) -> None:
        """Calls have come into a flow, `fresh` of them new: count them, and see that it stands in the heaps."""
        work = rows * flow.kind.unit
        flow.kind.rows += rows
        self.rows += rows
        self.work += work
        self.fresh += fresh
        self.live += calls
        stake = flow.stake
        if not stake.work:
            stake.load.tenants += 1
        stake.work += work
        if flow.special:
            self._load(flow, work, calls)
        self._dirty.add(flow.level)
        for twin in flow.twins:
            line, tenant = twin.line, twin.tenant
            if not tenant.live:
                tenant.tag = line.time
                line.present += 1
            tenant.live += calls
            twin.live += calls
            line.live += calls
            if not (twin.listed and twin.filed and tenant.listed):
                self._list(twin)

    def _load(self, flow: Flow, work: int, calls: int) -> None:
        """Count what has come into, or left, a flow of large calls or of calls of maps."""
        load = flow.stake.load
        if load.yields:
            load.work += work
        if flow.standing:
            load.large += work
            load.turns += calls * flow.kind.limit * flow.kind.unit

    def _list(self, flow: Flow) -> None:
        """See that a flow stands in the heaps."""
        line, tenant, sequence = flow.line, flow.tenant, flow.calls[0].sequence
        if not flow.listed:
            flow.listed = True
            heapq.heappush(tenant.heap, (sequence, flow))
        if not tenant.listed:
            tenant.listed = True
            heapq.heappush(line.heap, (tenant.tag, sequence, tenant))
        if not flow.filed:
            flow.filed = True
            heapq.heappush(flow.heap, (tenant.tag, sequence, flow))

    def _sweep(self, kept: Kind) -> None:
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
        for load in self.loads:
            load.stakes = {tenant: stake for tenant, stake in load.stakes.items() if stake.work}
        self._dirty.intersection_update(self._levels.values())
        self._collect()
        self._flows = sum(len(kind.flows) for kind in self.kinds.values())
        self._sweep_at = 2 * self._flows + 32

    def discard(self, call: Call) -> None:
        """Take a call's rows out; does nothing if none waits."""
        left = call.rows - call.bound
        if not left:
            return
        flow = self._flow_of(call)
        self._left(flow, left, fresh=call.bound == 0, finished=1)
        call.bound = call.rows
        if not flow.live:
            flow.calls.clear()
        elif len(flow.calls) > 2 * flow.live + 16:
            live = [other for other in flow.calls if other.bound < other.rows]
            flow.calls.clear()  # the deque stays: rows may be being taken from it
            flow.calls.extend(live)

    def _flow_of(self, call: Call) -> Flow:
        """The flow that a waiting call is in."""
        kind = self.kinds[call.signature]
        return kind.flows[call.terms or Terms(), self._standing(call, kind)]

    def withdraw(self, call: Call) -> None:
        """Take a call out of which no row has left, as if it had not come."""
        flow = self._flow_of(call)
        if flow.calls[-1] is call:
            flow.calls.pop()
        else:
            flow.calls.remove(call)
        self._left(flow, call.rows, fresh=1, finished=1)

    def restore(self, call: Call) -> None:
        """Put a call back that was withdrawn, the last one of its flow."""
        flow = self._flow_of(call)
        flow.calls.append(call)
        self._come(flow, 1, call.rows, 1)

    def taken(self, flow: Flow, rows: int, fresh: int, finished: int) -> None:
        """Rows of a flow are bound: count them, and charge them to the tenant."""
        self._left(flow, rows, fresh, finished)
        self.charge(flow, rows)

    def charge(self, flow: Flow, rows: float) -> None:
        """Charge a tenant for rows."""
        flow.tenant.tag = tag = flow.tenant.tag + rows
        if tag > flow.line.time:
            flow.line.time = tag

    def _left(self, flow: Flow, rows: int, fresh: int, finished: int) -> None:
        """Count rows that have left a flow."""
        work = rows * flow.kind.unit
        flow.kind.rows -= rows
        self.rows -= rows
        self.work -= work
        self.fresh -= fresh
        self.live -= finished
        stake = flow.stake
        stake.work -= work
        if not stake.work:
            stake.load.tenants -= 1
        if flow.special:
            self._load(flow, -work, -finished)
        self._dirty.add(flow.level)
        if finished:
            for twin in flow.twins:
                twin.live -= finished
                twin.line.live -= finished
                twin.tenant.live -= finished
                if not twin.tenant.live:
                    twin.line.present -= 1

    def cut(self, flow: Flow) -> None:
        """The first call of a flow was cut by the end of a batch. It goes on with the next, but for a large one's."""
        if flow.standing != LARGE:
            flow.twins[0].line.begun.append(flow.twins[0])

    def started(self, flow: Flow, call: Call, now: float) -> None:
        """A batch has started with rows of a flow's call. If it has had a batch, and has more than one left, it goes
        to the end of the second line, to wait anew.
        """
        level, limit = flow.level, flow.kind.limit
        if flow.line.second:
            level.starts = 0
        elif level.lines[1].live:
            level.starts += 1
        left = call.rows - call.bound
        if flow.standing and call.bound >= limit and left > limit:
            call.since = now
            self._sequence = call.sequence = self._sequence + 1
            flow.calls.remove(call)  # it is the first
            if flow.standing == LARGE:
                flow.calls.append(call)
            else:
                kind, terms = flow.kind, call.terms or Terms()
                large = kind.flows.get((terms, LARGE)) or self._new_flow(kind, call.terms, LARGE)
                large.calls.append(call)
                self._come(large, 1, left, 0)
                self._left(flow, left, 0, 1)

    # Who is next.

    def head(self) -> Flow | None:
        """The flow whose first call starts the next batch."""
        level = self.level()
        return None if level is None else level.turn().first()

    def has_full(self) -> bool:
        """Whether the next batch would be full."""
        head = self.head()
        return head is not None and (head.kind.rows >= head.kind.limit or not head.calls[0].cut.shared)

    def level(self) -> Level | None:
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
