"""Counters, and the frozen snapshot that `model.statistics()` returns.

Lives here: numbers. Must not be here: who counts when (engine/run.py, on the loop), exporters, a clock.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import add
from types import MappingProxyType
from typing import Any

from aneuron.ownership import Owned

SECONDS = tuple(step * 10.0**power for power in range(-5, 2) for step in (1.0, 2.5, 5.0))
ROWS = tuple(2**power for power in range(13))
MANY = 256  # observations that are sorted in at once
REDRAW = 64  # observations after which the line through the times of all shapes is drawn anew, at most
FORGET = 10.0  # seconds after which what was not seen again is no longer believed


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by size: `counts[i]` of them were at most `bounds[i]`, the last count is of the larger ones."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """Calls by fate; `accepted == completed + failed + cancelled + waiting + running`, and refused ones beside.

    A call that was accepted and has given its room to another (`QueueFull`) has failed. An element of a map is accepted
    when it is read, and waits for room as a waiting call, although its rows are none of `waiting_rows` until it has it.
    A call is waiting until its first row belongs to a batch, and running from then on.
    """

    accepted: int
    completed: int
    failed: int
    cancelled: int
    refused: int
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class CoreStatistics:
    """What one core has done since the model was constructed.

    `id` counts within the cores that this process sees, `global_id` within the machine's (None if only the runtime
    knows). `state` is "suspect" for a core that was loaded again and has to prove itself with a batch, "quarantined"
    for one that will be loaded again later, "failed" for one that stays out until a restart. `batches` counts
    executions, re-runs included; `rows` are callers' rows, `padded_rows` those added to fill the compiled size.
    `services` has the median seconds of the last executions of each shape, (rows, bucket), by the model that serves;
    `service_seconds` is that of the shape executed last, None before the first. Rows as compiled or, where any number
    will do, rounded up to a power of two; bucket 0 without buckets. The warm-up counts there, and what fails does not.
    """

    id: int
    global_id: int | None
    state: str  # "loading" | "ready" | "suspect" | "quarantined" | "failed" | "closed"
    in_flight: int
    batches: int
    rows: int
    padded_rows: int
    busy_seconds: float
    service_seconds: float | None
    services: Mapping[tuple[int, int], float]
    errors: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduced(self)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot of the model's counters. Times are in seconds, sizes in rows.

    It can be taken on any thread: `calls` and each core's numbers add up there as on the model's loop. Different fields
    may then be of moments that lie a batch apart, and so may a histogram's sum and its counts.

    Of a pool in processes, `calls` and `total_seconds` are this process's; the rest is the engines', for all their
    clients, as they have said last: at most a twentieth of a second before.

    `closed_because` counts batches by the reason that they were not made larger: "full"; "core_idle", an idle core
    took what there was; "signature", what waited besides could not share the batch, or would have cost more in it for
    its length; "delay"; "drain". `waiting_work` is `waiting_rows` as `max_pending` counts them: with
    `Work(positions=...)` the lengths that they are padded to, added up.
    """

    calls: CallStatistics
    waiting_rows: int
    waiting_work: int
    cores: tuple[CoreStatistics, ...]
    closed_because: Mapping[str, int]
    batch_rows: Histogram
    queue_seconds: Histogram
    device_seconds: Histogram
    total_seconds: Histogram
    loop_lag_seconds: Histogram

    def __reduce__(self) -> tuple[Any, ...]:
        return _reduced(self)


def _reduced(snapshot: Any) -> tuple[Any, ...]:
    """How pickle takes a snapshot: it does not take the read-only mappings in it."""
    values = [getattr(snapshot, field.name) for field in fields(snapshot)]
    return _made, (type(snapshot), [dict(each) if isinstance(each, MappingProxyType) else each for each in values])


def _made(kind: Any, values: list[Any]) -> Any:
    return kind(*[MappingProxyType(each) if isinstance(each, dict) else each for each in values])


@dataclass(frozen=True, slots=True)
class Timing:
    """How a call was run; what `model.timed()` returns beside the result.

    `queued`: seconds from when the call was accepted to the beginning of its first execution; `device`: from there to
    the end of its last; `total`: until the result was there. The rest is about the execution that ended last: its
    core's id, the rows of all callers in it, those added to fill the compiled size, and why it was not made larger (the
    keys of `Statistics.closed_because`, or "rerun" after another call's error).
    """

    queued: float
    device: float
    total: float
    core: int
    batch_rows: int
    padded_rows: int
    why: str


@dataclass(frozen=True, slots=True)
class ShareStatistics:
    """What one model has of a pool's cores: its weight, the batches that are bound, the rows that wait, and the seconds
    that its executions have taken since it came.
    """

    weight: float
    in_flight: int
    waiting_rows: int
    busy_seconds: float


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine of a pool in processes: its number, process, state and cores, and how often it was started anew.

    `state`: "starting", "ready", "draining" (it has lost cores, and ends what it has), "restarting", or "failed" (it
    cannot be started; that is tried again, seldom). `rows` are this process's that it has not answered, `other_rows`
    those of other processes, `waiting_rows` those of both that wait there, as it has said last.
    """

    index: int
    pid: int | None
    state: str
    cores: tuple[int, ...]
    restarts: int
    rows: int
    other_rows: int
    waiting_rows: int


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of a pool: the ids of its cores, how many batches may be in flight on each and how many are, and the
    models that are loaded, in order of coming. `engines` are those of a pool in processes, which say all this every
    twentieth of a second while they do anything; else there are none.
    """

    cores: tuple[int, ...]
    slots: tuple[int, ...]
    in_flight: tuple[int, ...]
    models: tuple[ShareStatistics, ...]
    engines: tuple[EngineStatistics, ...] = ()


class Tally:
    """A histogram that is being filled.

    What comes is kept as it is and sorted in later, many at once: that costs a fifth. Both are replaced as one, for
    other threads, which may take a snapshot at any time.
    """

    __slots__ = ("_bounds", "_pending", "_sorted")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._pending: list[float] = []
        self._sorted: tuple[tuple[int, ...], float, list[float]] = (0,) * (len(bounds) + 1), 0.0, self._pending

    def add(self, value: float) -> None:
        """Count one observation."""
        self._pending.append(value)
        if len(self._pending) >= MANY:
            self._sort_in()

    def add_all(self, values: list[float]) -> None:
        """Count several."""
        self._pending.extend(values)
        if len(self._pending) >= MANY:
            self._sort_in()

    def _sort_in(self) -> None:
        seen = self.snapshot()
        self._pending = []
        self._sorted = seen.counts, seen.sum, self._pending

    def snapshot(self) -> Histogram:
        """The frozen state of now."""
        counts, total, pending = self._sorted
        values = sorted(pending)
        ends = [bisect_right(values, bound) for bound in self._bounds]
        more = [end - start for start, end in zip([0, *ends], [*ends, len(values)], strict=True)]
        return Histogram(self._bounds, tuple(map(add, counts, more)), total + sum(values))


class Recent:
    """The last 31 observations: their median, and what few of them exceed (`high`). Sorted when somebody asks."""

    __slots__ = ("_ring", "_seen", "at")

    def __init__(self) -> None:
        self._ring: deque[float] = deque(maxlen=31)
        self._seen: tuple[float, float] | None = (0.0, 0.0)  # replaced as one: exporters ask from other threads
        self.at = 0.0  # when the last one came

    def add(self, value: float, at: float) -> None:
        """Count one observation."""
        self._ring.append(value)
        self._seen = None
        self.at = at

    @property
    def median(self) -> float:
        """The one in the middle; 0 before the first."""
        return (self._seen or self._sort())[0]

    @property
    def high(self) -> float:
        """One in sixteen exceeds it, and the worst never counts."""
        return (self._seen or self._sort())[1]

    def is_stale(self, now: float) -> bool:
        """Whether the last one is too old to be believed: where it makes all calls be refused, no other will come."""
        return now - self.at > FORGET and now - self.at > FORGET + self.median

    def _sort(self) -> tuple[float, float]:
        while True:
            try:
                ordered = sorted(self._ring)
                break
            except RuntimeError:  # where there is no GIL: one was added meanwhile
                continue
        count = len(ordered)
        self._seen = ordered[count // 2], ordered[-1 - max(count > 3, count // 16)]
        return self._seen


class ServiceTimes:
    """What the executions of one model on one core take, by shape, (rows, bucket). Another model has its own."""

    def __init__(self) -> None:
        self.shapes: dict[tuple[int, int], Recent] = {}
        self.last = (0, 0)  # the shape that was executed last
        self._line = 0.0, 0.0  # seconds of an execution, and of each position in it, by those that were seen
        self._learnt = self._drawn = 0  # observations, and at how many of them the line is drawn anew

    def executed(self, shape: tuple[int, int], seconds: float, now: float) -> None:
        """Note what an execution has taken that callers asked for."""
        self.last = shape
        self.learn(shape, seconds, now)

    def learn(self, shape: tuple[int, int], seconds: float, now: float) -> None:
        """Note what an execution of that shape took."""
        self._learnt += 1
        recent = self.shapes.get(shape)
        if recent is None or recent.is_stale(now):
            fresh = Recent()  # seen by other threads when it has something to say
            fresh.add(seconds, now)
            self.shapes[shape] = fresh
        else:
            recent.add(seconds, now)

    def service(self, shape: tuple[int, int], now: float) -> float:
        """Seconds that an execution of that shape takes; 0 if none was seen lately."""
        recent = self.shapes.get(shape)
        return 0.0 if recent is None or recent.is_stale(now) else recent.median

    def cost(self, rows: int, bucket: int) -> float:
        """Seconds that an execution takes, as far as was ever seen, and else by the line through what was: an execution
        takes so much, and so much for each position of each row. 0 before the first.
        """
        recent = self.shapes.get((rows, bucket))
        if recent is not None:
            return recent.median
        if self._learnt >= self._drawn:
            self._drawn = self._learnt + max(1, min(self._learnt // 4, REDRAW))
            self._line = line([(rows * bucket, seconds) for (rows, bucket), seconds in self.medians().items()])
        once, each = self._line
        return once + each * rows * bucket

    def medians(self) -> dict[tuple[int, int], float]:
        """Seconds by shape. On any thread."""
        return {shape: recent.median for shape, recent in self.shapes.copy().items()}


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Height at 0 and slope of the line that is nearest to points with positive coordinates, by the share by which it
    misses them; neither is negative.

        >>> line([(10.0, 3.0), (20.0, 4.0)])
        (2.0, 0.1)
        >>> line([(10.0, 3.0)])
        (0.0, 0.3)
    """
    points = [(x, y) for x, y in points if y > 0.0]
    if not points:
        return 0.0, 0.0
    weights = [1 / (y * y) for _, y in points]
    whole = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / whole
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / whole
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    several = len({x for x, _ in points}) > 1
    if several:
        slope = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / spread
        slope = max(0.0, slope)
    if not several or y_mean < slope * x_mean:
        slope = y_mean / x_mean
    return round(y_mean - slope * x_mean, 12), round(slope, 15)


class CoreCounters:
    """The running numbers of one core."""

    owned = Owned(loop=("owner",), set_by_loop=("state", "times", "errors", "_executed"))

    def __init__(self, core_id: int, global_id: int | None) -> None:
        self.core_id = core_id
        self.global_id = global_id
        self.state = "loading"
        self.owner: object = None  # whose state it is: a run of the model may outlast the start of the next
        self.times = ServiceTimes()  # the owner's
        self.errors = 0
        self._executed = (0, 0, 0, 0.0)  # batches, rows, rows added, seconds: replaced as one, for other threads

    def executed(self, rows: int, padded: int, seconds: float) -> None:
        """Count one execution of `rows` rows of callers."""
        batches, all_rows, all_padded, busy = self._executed
        self._executed = batches + 1, all_rows + rows, all_padded + padded, busy + seconds

    def work(self) -> tuple[int, float]:
        """Callers' rows that were executed, and the seconds that it took."""
        _, rows, _, seconds = self._executed
        return rows, seconds

    def snapshot(self, in_flight: int) -> CoreStatistics:
        """The frozen state of now; how many batches are in flight is the scheduler's to say."""
        times = self.times
        last = times.last
        services = times.medians()
        return CoreStatistics(
            self.core_id, self.global_id, self.state, in_flight, *self._executed, services.get(last),
            MappingProxyType(services), self.errors,
        )  # fmt: skip


class Counters:
    """All the running numbers of one model; they outlive its restarts, and anybody may take a snapshot."""

    owned = Owned(loop=("_drained",), set_by_loop=("accepted", "completed", "failed", "cancelled", "refused"))

    def __init__(self) -> None:
        self.accepted = self.completed = self.failed = self.cancelled = self.refused = 0
        self.closed_because = dict.fromkeys(("full", "core_idle", "delay", "signature", "drain"), 0)
        self.batch_rows = Tally(ROWS)
        self.queue_seconds = Tally(SECONDS)
        self.device_seconds = Tally(SECONDS)
        self.total_seconds = Tally(SECONDS)
        self.loop_lag_seconds = Tally(SECONDS)
        self.cores: dict[int, CoreCounters] = {}
        self._drained: deque[tuple[float, int]] = deque(maxlen=64)

    def drained(self, work: int, now: float) -> None:
        """Count rows that have left the device, as `max_pending` counts them."""
        self._drained.append((now, work))

    def relaxed(self) -> None:
        """Nothing waits: the time from here to the next rows says nothing about how fast they can leave."""
        if len(self._drained) > 1:
            self._drained.clear()

    def drain_seconds(self, work: int, now: float) -> float | None:
        """How long so much takes to leave at the rate of the last batches; None while that is unknown.

        Where none has left for longer than usual the rate is what it has sunk to meanwhile.
        """
        count = len(self._drained)
        if count < 2 or self._drained[-1][0] <= self._drained[0][0]:
            return None
        first = self._drained[0][0]
        seconds = max(self._drained[-1][0] - first, (now - first) * (count - 1) / count)
        return work * seconds / (sum(left for _, left in self._drained) - self._drained[0][1])

    def snapshot(
        self, calls: int, rows: int, work: int = 0, in_flight: Mapping[int, int] = MappingProxyType({})
    ) -> Statistics:
        """The frozen state of now, with what the scheduler knows: calls, rows and work that wait, and batches by core.

        On another thread than the loop's these may be of a moment before; calls add up all the same: those that have
        ended are read first, so that none has ended that was not accepted.
        """
        completed, failed, cancelled = self.completed, self.failed, self.cancelled
        accepted = self.accepted
        left = accepted - completed - failed - cancelled
        waiting = min(calls, left)
        return Statistics(
            CallStatistics(accepted, completed, failed, cancelled, self.refused, waiting, left - waiting),
            rows,
            work,
            tuple(  # of a copy: a start may add some
                core.snapshot(in_flight.get(core.core_id, 0)) for core in self.cores.copy().values()
            ),
            MappingProxyType(dict(self.closed_because)),
            self.batch_rows.snapshot(),
            self.queue_seconds.snapshot(),
            self.device_seconds.snapshot(),
            self.total_seconds.snapshot(),
            self.loop_lag_seconds.snapshot(),
        )
