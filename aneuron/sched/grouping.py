"""Which waiting calls of unequal lengths share an execution: groups, cut so that the sum of their costs is least.

Lives here: how far ahead a plan looks, and its cut. Must not be here: who goes first (fair_queue.py), which lane and
when (scheduler.py), what lengths there are (tensors/buckets.py), torch, clocks.

The cut is that of the length-sorted queue by dynamic programming, as in Razor's Edge (2026), over the time that each
shape takes (stats.py): costs are not monotonic, and padding up may be cheaper. A plan is made of the first calls in
their order of coming, is executed whole, the group first whose call is next in fair order, and only then is another
made. So who comes later overtakes nobody by more than is left of one plan; and a plan takes in no more calls than keep
this bound: no call waits for longer than twice what it would take if all were executed in order of coming, as many as a
batch holds at once, padded to the longest of them.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain, groupby
from operator import attrgetter
from typing import Any

from aneuron.ownership import Owned
from aneuron.sched.call import Call
from aneuron.sched.fair_queue import FairQueue
from aneuron.sched.flows import Flow, Kind

FORESIGHT = 16  # batches that a plan looks ahead: what it takes to cut them is small beside what they take

Cost = Callable[[int, int], float]  # seconds, of an execution of so many rows, in a bucket; 0: unknown
Group = dict[int, int]  # rows of each bucket that are executed at once, the longest bucket first


POWERS = tuple(1 << power for power in range(32))  # of rows: times are known for these where any number will do


class Grouping:
    """What shares an execution with the head of a queue, where calls that differ in their lengths only wait."""

    owned = Owned(lock=("_groups", "_planned"))

    def __init__(self, queue: FairQueue, sizes: Mapping[int, Any], buckets: Iterable[int], preferred: int) -> None:
        self._queue = queue
        self._sizes = sizes  # the rows that executions may have, by bucket; none where any number will do
        self._buckets = sorted(buckets, reverse=True)
        self._powers = POWERS[: (preferred - 1).bit_length() + 1]
        self._groups: list[Group] = []  # of the plan that is being executed,
        self._planned: Hashable = None  # for calls that are alike but for their lengths

    def group(self, head: Flow, now: float, cost: Cost) -> list[tuple[Kind, int]] | None:
        """The rows of each kind of calls that are to be executed with the head, its own kind first; None if nothing
        differs in its length only, or it is not known yet what executions cost.
        """
        kind = head.kind
        if kind.rows == self._queue.rows and not self._groups:
            return None
        alike = self._alike(kind)
        group = self._next(kind, alike)
        if group is None:
            self._groups.clear()
            if len(alike) < 2:
                return None
            self._planned = kind.signature[0]  # type: ignore[index]  # `_alike` has looked
            rows = ahead(_in_order(head, alike.values()), now, kind.limit, cost)
            self._groups = cheapest(rows, kind.limit, self._rows_of, cost) if rows else []
            group = self._next(kind, alike)
        if group is None:
            return None
        self._groups.remove(group)
        return [(kind, group[kind.bucket]), *((alike[each], group[each]) for each in group if each != kind.bucket)]

    def _next(self, kind: Kind, alike: Mapping[int, Kind]) -> Group | None:
        """The group of the plan for a head of this kind; None if there is none, or its rows are not there any more."""
        if not alike or self._planned != kind.signature[0]:  # type: ignore[index]
            return None
        for group in self._groups:
            if kind.bucket in group:
                there = all(each in alike and alike[each].rows >= rows for each, rows in group.items())
                return group if there else None
        return None

    def _alike(self, kind: Kind) -> dict[int, Kind]:
        """The kinds of calls that wait and differ from these in their lengths only, by bucket, the longest first."""
        if not kind.bucket or not isinstance(kind.signature, tuple):
            return {}
        found = ((each, self._queue.kinds.get((kind.signature[0], each))) for each in self._buckets)
        return {bucket: other for bucket, other in found if other is not None and other.rows}

    def shape(self, bucket: int, rows: int) -> int:
        """Rows of the execution that so many rows take: those that it may have, or rounded up to a power of two."""
        sizes = self._sizes.get(bucket)
        return 1 << (rows - 1).bit_length() if sizes is None else int(sizes.fit(rows))

    def fillers(self, kind: Kind, bucket: int) -> list[Kind]:
        """Those that fit into a bucket: they may fill up an execution that would be padded anyway."""
        return [other for each, other in self._alike(kind).items() if each <= bucket]

    def _rows_of(self, bucket: int) -> Sequence[int]:
        sizes = self._sizes.get(bucket)
        return self._powers if sizes is None else sizes.sizes


def _in_order(head: Flow, kinds: Iterable[Kind]) -> Iterator[Call]:
    """The calls of these kinds that have rows, as they came; the head's first call first."""
    flows = [flow.calls for kind in kinds for flow in kind.flows.values() if flow.live]
    first = head.calls[0]
    waiting = (call for call in merge(*flows, key=attrgetter("sequence")) if call.bound < call.rows)
    return chain((first,), (call for call in waiting if call is not first))


def ahead(calls: Iterable[Call], now: float, limit: int, cost: Cost) -> Group:
    """The rows that the next plan takes in, by bucket; empty if costs are unknown."""
    taken: Group = {}
    batch: Group = {}
    seconds = 0.0  # of what is taken, in order of coming
    least = float(
        "inf"
    )  # seconds that the plan may take: what the most urgent call has waited, and twice what is ahead
    waited = float("inf")  # by the newest call of the batch
    for bucket, count, since in _pieces(calls, limit):
        batch[bucket] = batch.get(bucket, 0) + count
        waited = min(waited, now - since)
        rows = sum(batch.values())
        if rows < limit:
            continue
        seconds += cost(limit, max(batch))
        least = min(least, waited + 2 * seconds)
        if taken and seconds > least:
            return taken
        _add(taken, batch)
        batch, waited = {}, float("inf")
        if sum(taken.values()) >= FORESIGHT * limit:
            return taken
    if batch:
        seconds += cost(sum(batch.values()), max(batch))
        if not taken or seconds <= min(least, waited + 2 * seconds):
            _add(taken, batch)
    return taken if seconds else {}


def _pieces(calls: Iterable[Call], limit: int) -> Iterable[tuple[int, int, float]]:
    """Bucket, rows, and since when they wait, of calls that are cut where a batch is full."""
    room = limit
    for call in calls:
        left, since = call.rows - call.bound, call.since or call.admitted
        while left:
            count = min(left, room)
            yield call.bucket, count, since
            left -= count
            room = room - count or limit


def _add(to: Group, more: Group) -> None:
    for bucket, rows in more.items():
        to[bucket] = to.get(bucket, 0) + rows


def cheapest(rows: Group, limit: int, sizes: Callable[[int], Sequence[int]], cost: Cost) -> list[Group]:
    """The cut of these rows, by bucket, into groups whose costs have the least sum.

    Of two that cost the same the one with larger groups.

        >>> def cost(rows, bucket):
        ...     return 10 + rows * bucket
        >>> cheapest({8: 3, 64: 1, 16: 4}, 8, lambda bucket: (1, 2, 4, 8), cost)  # 74 + 74 + 42; all together 522
        [{64: 1}, {16: 4}, {8: 3}]
    """
    lengths = [bucket for bucket, count in sorted(rows.items(), reverse=True) for _ in range(count)]
    ends = [stop for bucket, stop in _ends(lengths)]  # where a shorter bucket begins
    count = len(lengths)
    best = [0.0] * (count + 1)
    cuts = [0] * count
    costs: dict[tuple[int, int], float] = {}
    for at in range(count - 1, -1, -1):
        bucket, left = lengths[at], min(count - at, limit)
        own = sizes(bucket)
        most = min(left, own[-1])
        ways = [size for size in own if size < most]
        first = bisect_left(ends, at + 1)
        ways += [end - at for end in ends[first : bisect_left(ends, at + most)]]
        ways.append(most)
        least = float("inf")
        for size in ways:
            shape = own[bisect_left(own, size)], bucket
            seconds = costs.get(shape)
            if seconds is None:
                seconds = costs[shape] = cost(*shape)
            seconds += best[at + size]
            if seconds < least or (seconds == least and size > cuts[at]):
                least, cuts[at] = seconds, size
        best[at] = least
    groups: list[Group] = []
    at = 0
    while at < count:
        groups.append(dict(_counts(lengths[at : at + cuts[at]])))
        at += cuts[at]
    return groups


def _counts(lengths: Sequence[int]) -> Iterable[tuple[int, int]]:
    return ((bucket, len(list(same))) for bucket, same in groupby(lengths))


def _ends(lengths: Sequence[int]) -> Iterable[tuple[int, int]]:
    end = 0
    for bucket, count in _counts(lengths):
        end += count
        yield bucket, end
