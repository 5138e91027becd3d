"""Ways to get real work done: what each must offer, and how they are timed in turns.

Lives here: turns of one way (in bulk, with many callers, with a lone one), their table. Must not be here: which work
(docstrings.py, voices.py), the command line (realwork.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.rows import percentile
from benchmarks.timing import Effort, Say, Seen, Turn, WrongAnswer, reason, rounds

LEAST_COSINE = 0.99  # of each answer with the right one: half precision has 0.999 and more
CALLERS = 64


class Missing(Exception):
    """A way that this machine, environment or build does not have; says why."""


class Way:
    """One way to do the work; the defaults suit a function that blocks."""

    serves = True  # callers that come one by one
    answers = True  # what is right; the runtime without a model does not

    async def start(self) -> None:
        """Load."""

    async def bulk(self, items: Sequence[Any]) -> torch.Tensor:
        """All items, handed over at once: an answer each, in order."""
        raise NotImplementedError

    async def one(self, item: Any) -> torch.Tensor:
        """One caller's item: a row."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Free."""


@dataclass
class Work:
    """Items, the right answers, and the ways to have them; a way that raises `Missing` says why when it is made."""

    title: str
    unit: str
    items: Sequence[Any]
    expected: torch.Tensor
    makers: Mapping[str, Callable[[], Way]]
    beside: str  # the way that others are compared with
    units: Callable[[Any], int] = lambda item: 1  # in an item
    lone: int = 24  # items that a lone caller asks for
    notes: list[str] = field(default_factory=list)


async def measured(work: Work, effort: Effort, say: Say) -> str:
    """Time the ways in turns: the table."""
    ways: dict[str, Way] = {}
    out: dict[str, str] = {}  # and why
    worst: dict[str, float] = {}
    try:
        for name, make in work.makers.items():
            say(f"{work.title}: {name}")
            try:
                ways[name] = way = make()
                await way.start()
                worst[name] = await _check(work, way)
            except Exception as error:
                out[name] = str(error) if isinstance(error, Missing) else f"fails: {reason(error)}"
                if name in ways:
                    await ways.pop(name).stop()
        say(f"{work.title}: in bulk")
        bulk = await rounds(ways, effort, lambda way: _bulk(work, way))
        say(f"{work.title}: {CALLERS} callers")
        serving = {name: way for name, way in ways.items() if way.serves}
        callers = await rounds(serving, effort, lambda way: _callers(work, way))
        say(f"{work.title}: a lone caller")
        lone = await rounds(serving, effort, lambda way: _lone(work, way))
    finally:
        for way in ways.values():
            await way.stop()
    return _table(work, (bulk, callers, lone), worst, out)


async def _check(work: Work, way: Way) -> float:
    """The smallest cosine of an answer with the right one, of those in bulk and of some callers'."""
    found = [await way.bulk(work.items)]
    expected = [work.expected]
    if way.serves:
        found += await asyncio.gather(*map(way.one, work.items[:8]))
        expected += list(work.expected[:8].unsqueeze(1))
    cosine = float(torch.cosine_similarity(torch.cat(found), torch.cat(expected)).min())
    if not way.answers:
        return 0.0
    if not cosine >= LEAST_COSINE:
        raise WrongAnswer(f"cosine {cosine:.4f} with the right answer")
    return cosine


async def _timed(work: Work, items: Sequence[Any], run: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Units a second, and seconds of CPU a unit, of the whole process."""
    cpu, begin = time.process_time(), time.perf_counter()
    await run()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    units = sum(map(work.units, items))
    return units / seconds, cpu / units


async def _bulk(work: Work, way: Way) -> Turn:
    return Turn(*await _timed(work, work.items, lambda: way.bulk(work.items)))


async def _callers(work: Work, way: Way) -> Turn:
    """Callers that each ask for their share, one item after the other."""
    latencies: list[float] = []

    async def caller(items: Sequence[Any]) -> None:
        for item in items:
            begin = time.perf_counter()
            await way.one(item)
            latencies.append((time.perf_counter() - begin) / work.units(item))

    async def everybody() -> None:
        await asyncio.gather(*(caller(work.items[index::CALLERS]) for index in range(CALLERS)))

    return Turn(*await _timed(work, work.items, everybody), latencies)


async def _lone(work: Work, way: Way) -> Turn:
    latencies: list[float] = []
    items = work.items[: work.lone]

    async def alone() -> None:
        for item in items:
            begin = time.perf_counter()
            await way.one(item)
            latencies.append((time.perf_counter() - begin) / work.units(item))

    return Turn(*await _timed(work, items, alone), latencies)


# What is shown.

Cell = Callable[[Turn], float]


def _table(work: Work, seen: tuple[Seen, Seen, Seen], worst: Mapping[str, float], out: Mapping[str, str]) -> str:
    """A line for each way. Ratios are of repetitions, one by one: median."""
    bulk, callers, lone = seen
    columns: list[tuple[str, Seen, Cell, bool]] = [
        ("bulk/s", bulk, lambda turn: turn.rows_per_second, True),
        ("CPU ms", bulk, lambda turn: 1e3 * turn.cpu_per_row, False),
        (f"{CALLERS} callers/s", callers, lambda turn: turn.rows_per_second, True),
        ("CPU ms", callers, lambda turn: 1e3 * turn.cpu_per_row, False),
        ("lone p50 ms", lone, lambda turn: 1e3 * percentile(turn.latencies, 0.5), False),
    ]
    lines = [["", *(text for name, *_ in columns for text in (name, "x")), "cosine"]]
    for name in work.makers:
        if name in out:
            continue
        cells = [text for _, of, value, more in columns for text in _cell(work, of, name, value, more)]
        lines.append([name, *cells, f"{worst[name]:.4f}" if worst.get(name) else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in _zip(line, widths))
        for line in lines
    ]
    fails = {name: why for of in seen for name, why in of.fails.items()}
    notes = [f"{name} fails: {why[:160]}" for name, why in fails.items()]
    notes += [f"left out: {name}: {why}" for name, why in out.items()]
    head = f"{work.title}; x: of {work.beside}, above 1 is better; CPU ms and latencies of one {work.unit}"
    return "\n".join([head, "", *map(str.rstrip, text), "", *work.notes, *notes])


def _zip(line: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(line, widths, strict=True)))


def _cell(work: Work, seen: Seen, name: str, value: Cell, more: bool) -> tuple[str, str]:
    turns, others = seen.turns.get(name), seen.turns.get(work.beside)
    if not turns:
        return ("fails" if name in seen.fails else "-"), ""
    mine = [value(turn) for turn in turns]
    middle = median(mine)
    number = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
    if not others:
        return number, ""
    pairs = zip(mine, map(value, others), strict=True)
    return number, f"{median(a / b if more else b / a for a, b in pairs):.2f}"
