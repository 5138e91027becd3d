"""The rows of the table: what is run, how it is timed, and what comes out of it.

The machine's speed drifts by a factor of two within minutes, so nothing here is compared with a number from another
run: the contenders take turns of a fraction of a second in one process, and every ratio is of two neighbouring turns.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import linear_regression, median
from typing import Any

import torch

from benchmarks.floors import FEATURES, Aneuron, Contender, FairFloor, Floor, model

CORES, BATCH, SERVICE = 4, 8, 0.005
CHECK_EVERY = 16  # calls of a caller from one check of its answer to the next
CONTENDERS: dict[str, Callable[[], Contender]] = {"floor": Floor, "fair floor": FairFloor, "aneuron": Aneuron}

Call = Callable[[torch.Tensor], Awaitable[torch.Tensor]]


class WrongAnswer(AssertionError):
    """A contender gave a caller something else than the caller's rows, times two, plus one."""


@dataclass(frozen=True)
class Must:
    """The bound of design § 14: aneuron's value against `of`'s, at least or at most `bound`."""

    bound: float
    of: str = "floor"
    at_least: bool = True
    difference: bool = False  # aneuron's value minus the other's, not divided by it

    def compare(self, ours: float, theirs: float) -> float:
        return ours - theirs if self.difference else ours / theirs

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass
class Row:
    """One row of the table: a value of each contender in each repetition."""

    name: str
    unit: str
    must: Must | None
    values: dict[str, list[float]] = field(default_factory=dict)
    p50: dict[str, float] = field(default_factory=dict)  # milliseconds from call to result
    p99: dict[str, float] = field(default_factory=dict)

    def against(self, other: str) -> list[float]:
        """The value of aneuron compared with another's, in each repetition; sorted."""
        compare = (self.must or Must(0.0)).compare
        return sorted(map(compare, self.values["aneuron"], self.values[other]))

    @property
    def verdict(self) -> bool | None:
        """Whether the bound is kept by the median of the repetitions; None without a bound."""
        return None if self.must is None else self.must.met(median(self.against(self.must.of)))

    def as_json(self) -> dict[str, Any]:
        """Everything, with the comparisons drawn."""
        others = [name for name in self.values if name != "aneuron"]
        return {**asdict(self), "against": {other: self.against(other) for other in others}, "met": self.verdict}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Row":
        """What `as_json` has written."""
        must = Must(**data["must"]) if data["must"] else None
        return cls(data["name"], data["unit"], must, data["values"], data["p50"], data["p99"])


@dataclass(frozen=True)
class Effort:
    """How long to look."""

    seconds: float = 0.25  # of one turn, not counting its start and end
    repetitions: int = 5
    turns: int = 3  # of each contender in a repetition, of which the median counts: a neighbour may spoil one


@dataclass(frozen=True)
class Turn:
    """What one contender did in one turn, or in those of a repetition."""

    rows_per_second: float
    cpu_per_row: float  # seconds of CPU, of the whole process
    latencies: list[float]  # seconds


async def take_turn(call: Call, callers: int, seconds: float) -> Turn:
    """Let `callers` tasks call in a loop, one row each, and look at them for `seconds` once all have been served.

    Each caller has a row of its own and looks at every 16th answer: whoever mixes up callers is found out.
    """
    clock = time.perf_counter
    running = True
    waiting = callers
    all_served = asyncio.Event()

    async def caller(index: int) -> list[float]:
        nonlocal waiting
        x = torch.full((1, FEATURES), float(index)) + torch.rand(1, FEATURES)
        right, ends, n = model(x), [], index
        while running:
            y = await call(x)
            ends.append(clock())
            if n % CHECK_EVERY == 0 and not torch.equal(y, right):
                raise WrongAnswer(f"caller {index} of {callers} sent {x} and got {y}")
            n += 1
            if n == index + 1:
                waiting -= 1
                if not waiting:
                    all_served.set()
        return ends

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(caller(index)) for index in range(callers)]
        await all_served.wait()
        cpu, begin = time.process_time(), clock()
        await asyncio.sleep(seconds)
        cpu, end = time.process_time() - cpu, clock()
        running = False
    return _summary([task.result() for task in tasks], begin, end, cpu)


def _summary(times: list[list[float]], begin: float, end: float, cpu: float) -> Turn:
    """The rate is the slope of rows over time: with results in bursts of 32, a plain count is 1 % off at the edges."""
    seen = sorted(at for own in times for at in own if begin < at <= end)
    if len(seen) < 2:  # too short a look: take all that there is
        return _summary(times, 0.0, float("inf"), cpu)
    latencies = [b - a for own in times for a, b in pairwise(own) if begin < b <= end]
    return Turn(linear_regression(seen, range(len(seen))).slope, cpu / len(seen), latencies)


@asynccontextmanager
async def started(seconds: float) -> AsyncIterator[dict[str, Contender]]:
    """All contenders on cores of that service time."""
    contenders = {name: make() for name, make in CONTENDERS.items()}
    for contender in contenders.values():
        await contender.start(CORES, seconds, BATCH)
    try:
        yield contenders
    finally:
        for contender in contenders.values():
            await contender.stop()


async def rounds(
    contenders: dict[str, Contender], callers: int, effort: Effort, sleeps: list[float] | None = None
) -> dict[str, list[Turn]]:
    """What each contender did in each repetition. They take turns, in another order each time.

    `sleeps`, if given, gets the length of the service time's sleep in each repetition.
    """
    found: dict[str, list[Turn]] = {name: [] for name in contenders}
    for repetition in range(effort.repetitions):
        if sleeps is not None:
            sleeps.append(sleep_length(SERVICE))
        turns: dict[str, list[Turn]] = {name: [] for name in contenders}
        for turn in range(effort.turns):
            first = (repetition + turn) % len(contenders)
            for name in (*list(contenders)[first:], *list(contenders)[:first]):
                turns[name].append(await take_turn(contenders[name].call, callers, effort.seconds))
        for name, own in turns.items():
            found[name].append(_middle(own))
    return found


def _middle(turns: list[Turn]) -> Turn:
    return Turn(
        median(turn.rows_per_second for turn in turns),
        median(turn.cpu_per_row for turn in turns),
        [seconds for turn in turns for seconds in turn.latencies],
    )


def sleep_length(seconds: float, times: int = 20) -> float:
    """How long this machine takes for that sleep: the ideal service time."""
    lengths = []
    for _ in range(times):
        begin = time.perf_counter()
        time.sleep(seconds)
        lengths.append(time.perf_counter() - begin)
    return median(lengths)


async def w1(effort: Effort, say: Callable[[str], None]) -> list[Row]:
    """One-row calls in a loop: 4 cores, batch 8, 5 ms."""
    rows = []
    async with started(SERVICE) as contenders:
        for callers in (1, 16, 64, 256, 1024):
            say(f"W1, {callers} callers")
            sleeps: list[float] = []
            turns = await rounds(contenders, callers, effort, sleeps)
            name = f"W1 {callers:>5,} callers"
            if callers == 1:
                row = Row(name, "ms over service", Must(0.2, at_least=False, difference=True))
                row.values = {
                    who: [(median(turn.latencies) - sleep) * 1e3 for turn, sleep in zip(own, sleeps, strict=True)]
                    for who, own in turns.items()
                }
            else:
                row = Row(name, "rows/s", Must(0.97 if callers == 16 else 0.985))
                row.values = {who: [turn.rows_per_second for turn in own] for who, own in turns.items()}
                row.values["ideal"] = [min(callers, CORES * BATCH) / sleep for sleep in sleeps]
            rows.append(_with_percentiles(row, turns))
            if callers == 256:
                cpu = Row(name, "us CPU/row", Must(2.0, at_least=False))
                cpu.values = {who: [turn.cpu_per_row * 1e6 for turn in own] for who, own in turns.items()}
                rows.append(cpu)
    return rows


async def w4(effort: Effort, say: Callable[[str], None], where: str) -> list[Row]:
    """One-row calls in a loop on cores that take no time: what the runtime itself costs."""
    rows = []
    async with started(0.0) as contenders:
        for callers in (1, 64, 1024):
            say(f"W4 {where}, {callers} callers")
            turns = await rounds(contenders, callers, effort)
            name = f"W4 {where} {callers:>5,} callers"
            if callers == 1:
                row = Row(name, "us a call", Must(1.7, at_least=False))
                row.values = {who: [median(turn.latencies) * 1e6 for turn in own] for who, own in turns.items()}
            else:
                row = Row(name, "rows/s", Must(0.6, "fair floor"))
                row.values = {who: [turn.rows_per_second for turn in own] for who, own in turns.items()}
            rows.append(_with_percentiles(row, turns))
    return rows


def _with_percentiles(row: Row, turns: dict[str, list[Turn]]) -> Row:
    for who, own in turns.items():
        latencies = sorted(seconds * 1e3 for turn in own for seconds in turn.latencies)
        row.p50[who], row.p99[who] = (latencies[int(len(latencies) * part)] for part in (0.5, 0.99))
    return row
