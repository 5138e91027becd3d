"""Counters, and the frozen snapshot that `model.statistics()` returns.

Lives here: numbers. Must not be here: who counts when (the lanes do, on the loop), exporters, a clock.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

SECONDS = tuple(step * 10.0**power for power in range(-5, 2) for step in (1.0, 2.5, 5.0))
ROWS = tuple(2**power for power in range(13))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by size: `counts[i]` of them were at most `bounds[i]`, the last count is of the larger ones."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """Calls by fate; `accepted == completed + failed + cancelled + waiting + running`, and refused ones beside.

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

    `id` counts within the cores that this process sees, `global_id` within the machine's. `batches` counts
    executions, re-runs included; `rows` are callers' rows, `padded_rows` those added to fill the compiled size.
    `service_seconds` is the median of the last executions, None before the first.
    """

    id: int
    global_id: int
    state: str  # "loading" | "ready" | "closed"
    in_flight: int
    batches: int
    rows: int
    padded_rows: int
    busy_seconds: float
    service_seconds: float | None
    errors: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot of the model's counters. Times are in seconds, sizes in rows.

    `closed_because` counts batches by the reason that they were not made larger: "full"; "core_idle", an idle core
    took what there was; "signature", what waited besides could not share the batch; "delay"; "drain".
    """

    calls: CallStatistics
    waiting_rows: int
    cores: tuple[CoreStatistics, ...]
    closed_because: Mapping[str, int]
    batch_rows: Histogram
    queue_seconds: Histogram
    device_seconds: Histogram
    total_seconds: Histogram
    loop_lag_seconds: Histogram


class Tally:
    """A histogram that is being filled."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, values: list[float]) -> None:
        """Count several."""
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self._sum += sum(values)

    def snapshot(self) -> Histogram:
        """The frozen state of now."""
        return Histogram(self._bounds, tuple(self._counts), self._sum)


class CoreCounters:
    """The running numbers of one core."""

    def __init__(self, core_id: int) -> None:
        self.core_id = core_id
        self.state = "loading"
        self.owner: object = None  # whose state it is: a run of the model may outlast the start of the next
        self.in_flight = 0
        self.batches = self.rows = self.padded_rows = self.errors = 0
        self.busy_seconds = 0.0
        self._recent: deque[float] = deque(maxlen=31)

    def executed(self, rows: int, size: int, seconds: float) -> None:
        """Count one execution of `size` rows, `rows` of them callers'."""
        self.batches += 1
        self.rows += rows
        self.padded_rows += size - rows
        self.busy_seconds += seconds
        self._recent.append(seconds)

    def snapshot(self) -> CoreStatistics:
        """The frozen state of now."""
        recent = list(self._recent)  # at once: exporters read from other threads
        service = median(recent) if recent else None
        return CoreStatistics(
            self.core_id, self.core_id, self.state, self.in_flight, self.batches, self.rows, self.padded_rows,
            self.busy_seconds, service, self.errors,
        )  # fmt: skip


class Counters:
    """All the running numbers of one model; they outlive its restarts. Touched on the loop thread only."""

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

    @property
    def outstanding(self) -> int:
        """Calls that were accepted and have not ended."""
        return self.accepted - self.completed - self.failed - self.cancelled

    def drained(self, rows: int, now: float) -> None:
        """Count rows that have left the device."""
        self._drained.append((now, rows))

    def relaxed(self) -> None:
        """Nothing waits: the time from here to the next rows says nothing about how fast they can leave."""
        if len(self._drained) > 1:
            self._drained.clear()

    def drain_seconds(self, rows: int) -> float | None:
        """How long `rows` rows take to leave at the rate of the last batches; None while that is unknown."""
        if len(self._drained) < 2 or self._drained[-1][0] <= self._drained[0][0]:
            return None
        left = sum(count for _, count in self._drained) - self._drained[0][1]
        return rows * (self._drained[-1][0] - self._drained[0][0]) / left

    def snapshot(self, waiting_calls: int, waiting_rows: int) -> Statistics:
        """The frozen state of now."""
        calls = CallStatistics(
            self.accepted, self.completed, self.failed, self.cancelled, self.refused, waiting_calls,
            self.outstanding - waiting_calls,
        )  # fmt: skip
        return Statistics(
            calls,
            waiting_rows,
            tuple(core.snapshot() for core in self.cores.values()),
            MappingProxyType(dict(self.closed_because)),
            self.batch_rows.snapshot(),
            self.queue_seconds.snapshot(),
            self.device_seconds.snapshot(),
            self.total_seconds.snapshot(),
            self.loop_lag_seconds.snapshot(),
        )
