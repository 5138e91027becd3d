"""How contenders are timed: callers that call in a loop, turns, repetitions.

The machine's speed drifts by a factor of two within minutes, so nothing is compared with a number from another run:
the contenders take turns of a fraction of a second in one process, and every ratio is of neighbouring turns.

Lives here: what every row needs. Must not be here: what a row is about, bounds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import linear_regression, median
from typing import TypeVar

import torch

from benchmarks.contenders import PEERS, Contender, Makers
from benchmarks.floors import FEATURES, model

CHECK_EVERY = 16  # one-row answers that are compared at once

Call = Callable[[torch.Tensor], Awaitable[torch.Tensor]]
Say = Callable[[str], None]
C = TypeVar("C")


class WrongAnswer(AssertionError):
    """A contender gave a caller something else than the caller's rows, times two, plus one."""


@dataclass(frozen=True)
class Effort:
    """How long to look."""

    seconds: float = 0.25  # of one turn of callers in a loop, not counting its start and end
    repetitions: int = 5
    turns: int = 3  # of each contender in a repetition, of which the median counts: a neighbour may spoil one

    def longer(self, factor: float, least: float = 0.0) -> "Effort":
        """One turn a repetition, so much longer: where a turn is long, it is its own median."""
        return Effort(max(least, self.seconds * factor), self.repetitions, 1)


@dataclass(frozen=True)
class Turn:
    """What one contender did in one turn, or in those of a repetition."""

    rows_per_second: float = float("nan")  # answered
    cpu_per_row: float = float("nan")  # seconds of CPU, of the whole process
    latencies: list[float] = field(default_factory=list)  # seconds, of the smallest calls
    executed_per_second: float = float("nan")  # rows, by the cores
    more: dict[str, float] = field(default_factory=dict)  # what only some workloads look at


@dataclass
class Seen:
    """What was seen of each contender, a `Turn` a repetition, or why there is nothing to be seen."""

    turns: dict[str, list[Turn]]
    fails: dict[str, str]
    sleeps: list[float]  # the length that the service time's sleep had, in each repetition


class Checked:
    """Answers to one caller, compared with the right ones: sixteen at a time, which costs a sixteenth."""

    def __init__(self, x: torch.Tensor) -> None:
        self._many = CHECK_EVERY if x.shape[0] == 1 else 1
        self._x, self._right = x, model(x).repeat(self._many, 1)
        self._answers: list[torch.Tensor] = []

    def add(self, y: torch.Tensor) -> None:
        self._answers.append(y)
        if len(self._answers) == self._many:
            self.compare()

    def compare(self) -> None:
        """Raises `WrongAnswer` if one of the answers since the last time is."""
        answers, self._answers = self._answers, []
        if not answers:
            return
        got = torch.cat(answers)
        if not torch.equal(got, self._right[: len(answers) * len(self._x)]):
            raise WrongAnswer(f"{len(self._x)} rows from {self._x[0, 0]} on: the answers begin with {got[0, 0]}")


async def take_turn(
    call: Call, callers: Sequence[int], seconds: float, executed: Callable[[], int] = lambda: 0
) -> Turn:
    """Let tasks call in a loop, `callers[i]` rows each, and look for `seconds` once all have been served.

    Each caller has rows of its own and looks at every answer: whoever mixes up callers is found out.
    """
    clock = time.perf_counter
    running = True
    waiting = len(callers)
    all_served = asyncio.Event()

    async def caller(index: int, rows: int) -> list[float]:
        nonlocal waiting
        x = torch.full((rows, FEATURES), float(index)) + torch.rand(rows, FEATURES)
        answers, times = Checked(x), [clock()]
        while running:
            answers.add(await call(x))
            times.append(clock())
            if len(times) == 2:
                waiting -= 1
                if not waiting:
                    all_served.set()
        answers.compare()
        return times

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(caller(*one)) for one in enumerate(callers)]
        await all_served.wait()
        done, cpu, begin = executed(), time.process_time(), clock()
        await asyncio.sleep(seconds)
        cpu, end, done = time.process_time() - cpu, clock(), executed() - done
        running = False
    return _summary(callers, [task.result() for task in tasks], (begin, end), cpu, done)


def _summary(
    callers: Sequence[int], times: list[list[float]], span: tuple[float, float], cpu: float, done: int
) -> Turn:
    """The rate is the slope of calls over time: with results in bursts of 32, a plain count is 1 % off at the edges."""
    begin, end = span
    seen = sorted(at for own in times for at in own[1:] if begin < at <= end)
    if len(seen) < 2:  # too short a look: take all that there is
        begin, end = 0.0, float("inf")
        seen = sorted(at for own in times for at in own[1:])
    smallest = min(callers)
    calls = [pair for rows, own in zip(callers, times, strict=True) if rows == smallest for pair in pairwise(own)]
    latencies = [b - a for a, b in calls if begin < b <= end] or [b - a for a, b in calls]
    slope = linear_regression(seen, range(len(seen))).slope if len(seen) > 1 else float("nan")
    return Turn(slope, cpu / max(1, len(seen)), latencies, done / (span[1] - span[0]))


@asynccontextmanager
async def started(makers: Makers, cores: int, seconds: float, batch: int) -> AsyncIterator[dict[str, Contender]]:
    """All contenders, on cores of that service time; new ones for each row, lest a failure reach into the next."""
    contenders = {name: make() for name, make in makers.items()}
    try:
        for contender in contenders.values():
            await contender.start(cores, seconds, batch)
        yield contenders
    finally:
        for contender in contenders.values():
            await contender.stop()


async def rounds(
    contenders: Mapping[str, C],
    effort: Effort,
    look: Callable[[C], Awaitable[Turn]],
    service: float = 0.0,
) -> Seen:
    """What each contender did in each repetition. They take turns, in another order each time.

    A contender that raises or gives wrong answers is out for the rest of the row. Peers have one turn a repetition.
    """
    seen = Seen({name: [] for name in contenders}, {}, [])
    for repetition in range(effort.repetitions):
        if service:
            seen.sleeps.append(sleep_length(service))
        turns: dict[str, list[Turn]] = {name: [] for name in contenders}
        for turn in range(effort.turns):
            first = (repetition + turn) % len(contenders)
            for name in (*list(contenders)[first:], *list(contenders)[:first]):
                if name in seen.fails or (turn and name in PEERS):
                    continue
                try:
                    turns[name].append(await look(contenders[name]))
                except Exception as error:
                    seen.fails[name] = reason(error)
        for name in seen.fails:
            seen.turns.pop(name, None)
        for name, own in seen.turns.items():
            own.append(_middle(turns[name]))
    return seen


def reason(error: BaseException) -> str:
    """Why a contender is out: the first error that is no group of others."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _middle(turns: list[Turn]) -> Turn:
    return Turn(
        median(turn.rows_per_second for turn in turns),
        median(turn.cpu_per_row for turn in turns),
        [seconds for turn in turns for seconds in turn.latencies],
        median(turn.executed_per_second for turn in turns),
        {name: median(turn.more[name] for turn in turns) for name in turns[0].more},
    )


def sleep_length(seconds: float, times: int = 20) -> float:
    """How long this machine takes for that sleep: the ideal service time."""
    lengths = []
    for _ in range(times):
        begin = time.perf_counter()
        time.sleep(seconds)
        lengths.append(time.perf_counter() - begin)
    return median(lengths)
