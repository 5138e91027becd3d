"""Rows with calls that come when they come: W1b, many cores, overload.

Lives here: rates, and the bounds of the performance budget. Must not be here: how a schedule is replayed.
"""

import asyncio
import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

import aneuron
from benchmarks.contenders import Contender, Makers, everybody, learned_hold, ours, yardsticks
from benchmarks.floors import FairFloor, Floor
from benchmarks.loops import BATCH, CAPACITY, CORES, SERVICE
from benchmarks.replay import Replay, poisson
from benchmarks.rows import Row, at_least, at_most, p99, percentile, rate, row
from benchmarks.timing import Effort, Say, Seen, Turn, rounds, sleep_length, started

MAX_PENDING = 1024  # 0.16 s of work
MEMORY = Path("/proc/self/statm")


async def w1b(effort: Effort, say: Say) -> list[Row]:
    """Poisson arrivals at 30, 70 and 90 % of the capacity of 4 cores, batch 8, 5 ms."""
    rows = []
    longer = effort.longer(6)
    for load in (30, 70, 90):
        say(f"W1b, {load} % of capacity")
        async with started(everybody() | learned_hold(), CORES, SERVICE, BATCH) as contenders:
            schedule = poisson(CAPACITY * load / 100, longer.seconds, seed=load)
            seen = await rounds(contenders, longer, lambda c, s=schedule: Replay(c.call, s).run(1.0), SERVICE)
            held = _only(seen, "aneuron, held")
            for one, name in ((seen, f"W1b {load} %, p99"), (held, f"W1b {load} % held, p99")):
                if one is not None:
                    made = row(name, "ms", one, p99, at_most(1.1), at_most(1.0, "best peer"))
                    made.add_best_peer()
                    rows.append(made)
    return rows


def _only(seen: Seen, who: str) -> Seen | None:
    """What was seen with this one in the place of aneuron; it leaves the first."""
    if who not in seen.turns and who not in seen.fails:
        return None
    fails = {name: why for name, why in seen.fails.items() if name not in (who, "aneuron")}
    if who in seen.fails:
        fails["aneuron"] = seen.fails.pop(who)
    turns = {name: turns for name, turns in seen.turns.items() if name not in (who, "aneuron")}
    if who in seen.turns:
        turns["aneuron"] = seen.turns.pop(who)
    return Seen(turns, fails, seen.sleeps)


async def many(effort: Effort, say: Say) -> list[Row]:
    """Poisson arrivals at 70 % of what aneuron answers when more is offered: 24 cores, batch 1, 2 ms.

    Arrivals cost CPU as well, so what callers in a loop reach would be too much. And since here the machine is the
    limit, whose speed drifts, it is looked at before each repetition, which has a schedule of its own.
    """
    cores, service = 24, 0.002
    longer = effort.longer(8, least=0.1)
    once = Effort(longer.seconds, 1, 1)
    parts: list[Seen] = []
    async with started(yardsticks(), cores, service, 1) as contenders:
        for seed in range(effort.repetitions):
            ideal = cores / sleep_length(service)
            offered = poisson(ideal, longer.seconds / 4, seed)
            answered = (await Replay(contenders["aneuron"].call, offered).run()).rows_per_second
            reached = min(answered, ideal)  # answers that come in one burst after a pause of the machine look faster
            say(f"{cores} cores, batch 1: Poisson at 70 % of {reached:,.0f} rows/s")
            schedule = poisson(0.7 * reached, longer.seconds, seed)
            parts.append(await rounds(contenders, once, lambda one, s=schedule: Replay(one.call, s).run()))
    fails = {name: why for part in parts for name, why in part.fails.items()}
    turns = {who: [turn for part in parts for turn in part.turns[who]] for who in contenders if who not in fails}
    seen = Seen(turns, fails, [])

    def tail(turn: Turn) -> float:
        return percentile(turn.latencies, 0.999) / percentile(turn.latencies, 0.5)

    return [row("24 cores at 70 %", "x p50", seen, tail, at_most(4, None), at_most(3, None))]


async def overload(effort: Effort, say: Say) -> list[Row]:
    """Twice the capacity offered; aneuron refuses beyond `max_pending`, the floors keep everything."""
    longer = Effort(40 * effort.seconds, max(1, effort.repetitions // 2), 1)
    # aneuron first: memory that a floor has let go of would be used again, and growth not seen.
    makers: Makers = {**ours(max_pending=MAX_PENDING), "floor": Floor, "fair floor": FairFloor}
    async with started(makers, CORES, SERVICE, BATCH) as contenders:
        say(f"overload: twice the capacity for {longer.seconds:g} s")
        schedule = poisson(2 * CAPACITY, longer.seconds, seed=2)
        seen = await rounds(contenders, longer, lambda c: _overloaded(c, schedule), SERVICE)
    goodput = row("overload: goodput", "rows/s", seen, rate, ideal=lambda sleep: CAPACITY)
    goodput.must, goodput.goal = at_least(0.95, "ideal"), at_least(0.98, "ideal")
    rows = [goodput]
    if _resident() is not None:
        rows.append(row("overload: memory", "MB", seen, lambda turn: turn.more["grown"], at_most(8, None)))
    wait = row("overload: p99", "ms", seen, p99, None, at_most(1.2, "ideal"))
    wait.values["ideal"] = [MAX_PENDING / CAPACITY * 1e3] * len(seen.sleeps)
    return [*rows, wait]


async def _overloaded(contender: Contender, schedule: list[float]) -> Turn:
    """Adds how many MB the process has grown from a fifth of the time on."""
    grown: list[float] = []

    async def watch() -> None:
        await asyncio.sleep(schedule[-1] / 5)
        before = _resident()
        while before is not None and (now := _resident()) is not None:
            grown.append(now - before)
            await asyncio.sleep(schedule[-1] / 50)

    _give_back()
    watching = asyncio.create_task(watch())
    try:
        full = getattr(contender, "package", aneuron).QueueFull
        turn = await Replay(contender.call, schedule, (full,)).run(patience=5.0 + 2 * schedule[-1])
    finally:
        watching.cancel()
    turn.more["grown"] = max(grown, default=float("nan"))
    return turn


def _resident() -> float | None:
    """MB of memory that this process has; None where the system does not say."""
    if not MEMORY.exists():
        return None
    return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _give_back() -> None:
    """Free what earlier turns have left: memory that is used again does not count as growth."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not the GNU library
        ctypes.CDLL(None).malloc_trim(0)
