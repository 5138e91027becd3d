"""Rows with callers that call in a loop: W1, W2, W3, one large call beside small ones, W4, W5.

Lives here: who calls, and the bounds of the performance budget. Must not be here: how a turn is timed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import torch

from benchmarks.contenders import Contender, Device, Makers, everybody, without_threads, yardsticks
from benchmarks.floors import FEATURES
from benchmarks.rows import Row, above, at_least, at_most, p50, p99, rate, row
from benchmarks.timing import Checked, Effort, Say, Turn, rounds, started, take_turn

CORES, BATCH, SERVICE = 4, 8, 0.005
CAPACITY = CORES * BATCH / SERVICE  # rows a second
MANY, MANY_SERVICE = (24, 64), 0.002
LARGE = 256
PATIENCE = 10.0  # s, from when a turn should be over to when its contender is out


def looping(callers: list[int], seconds: float) -> Callable[[Contender], Awaitable[Turn]]:
    """A turn of callers in a loop."""

    async def look(contender: Contender) -> Turn:
        async with asyncio.timeout(seconds + PATIENCE):
            return await take_turn(contender.call, callers, seconds, contender.executed)

    return look


async def w1(effort: Effort, say: Say) -> list[Row]:
    """One-row calls in a loop: 4 cores, batch 8, 5 ms."""
    rows = []
    for callers in (1, 16, 64, 256, 1024):
        say(f"W1, {callers} callers")
        async with started(everybody(), CORES, SERVICE, BATCH) as contenders:
            seen = await rounds(contenders, effort, looping([1] * callers, effort.seconds), SERVICE)
            name = f"W1 {callers:>5,} callers"
            if callers == 1:
                rows.append(row(name, "ms", seen, p50(), above(0.2, "floor"), above(0.05, "floor"), lambda s: s * 1e3))
                continue
            must = at_least(0.97 if callers == 16 else 0.985)
            full = min(callers, CORES * BATCH)
            rows.append(row(name, "rows/s", seen, rate, must, at_least(1.0), lambda sleep, full=full: full / SERVICE))
            if callers in (16, 256):
                cpu = at_most(1.5), at_most(1.2)
                rows.append(row(name, "us/row", seen, lambda turn: turn.cpu_per_row * 1e6, *cpu))
    return rows


async def w2(effort: Effort, say: Say) -> list[Row]:
    """One call of 256 rows at a time."""
    say("W2, one caller with 256 rows")
    async with started(everybody(), CORES, SERVICE, BATCH) as contenders:
        longer = effort.longer(2)
        seen = await rounds(contenders, longer, looping([LARGE], longer.seconds), SERVICE)
    return [row("W2 256 rows", "ms", seen, p50(), at_most(1.03), at_most(1.0), lambda s: LARGE / CAPACITY * 1e3)]


async def w3(effort: Effort, say: Say) -> list[Row]:
    """16 one-row callers beside 8 callers with 256 rows; then one call of 256 rows beside many of one."""
    rows = []
    longer = effort.longer(6)
    async with started(everybody(), CORES, SERVICE, BATCH) as contenders:
        say("W3, 16 callers with one row beside 8 with 256")
        seen = await rounds(contenders, longer, looping([1] * 16 + [LARGE] * 8, longer.seconds), SERVICE)
    rows.append(row("W3 one row, p99", "ms", seen, p99, at_most(4, "ideal"), at_most(2.7, "ideal"), lambda s: s * 1e3))
    executed = row("W3 all rows", "rows/s", seen, lambda turn: turn.executed_per_second, ideal=lambda s: CAPACITY)
    executed.must, executed.goal = at_least(0.95, "ideal"), at_least(0.97, "ideal")
    rows.append(executed)
    for callers in (64, 1024):
        say(f"one call of 256 rows beside {callers} callers")
        async with started(yardsticks(), CORES, SERVICE, BATCH) as contenders:
            seen = await rounds(contenders, longer, lambda c, n=callers: beside(c, n, longer.seconds), SERVICE)
            name = f"256 beside {callers:,}"
            rows.append(
                row(
                    name,
                    "ms",
                    seen,
                    slowest,
                    at_most(500, None),
                    at_most(200, None),
                    lambda s: LARGE / CAPACITY * 1e3,
                )
            )
    return rows


def slowest(turn: Turn) -> float:
    return max(turn.latencies) * 1e3


async def beside(contender: Contender, callers: int, seconds: float) -> Turn:
    """Large calls one after another, at least one, while one-row callers call in a loop; the large ones' latencies."""
    x = torch.rand(LARGE, FEATURES)
    answers = Checked(x)
    latencies: list[float] = []

    async def large() -> None:
        await asyncio.sleep(0.1)  # until the small ones are at it
        until = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < until or not latencies:
            answers.add(await contender.call(x))
            latencies.append(time.perf_counter() - begin)

    async with asyncio.timeout(seconds + PATIENCE), asyncio.TaskGroup() as group:
        small = group.create_task(take_turn(contender.call, [1] * callers, seconds + 0.1))
        await group.create_task(large())
        await small
    return Turn(latencies=latencies)


def contenders_for(device: Device | None) -> Makers:
    """Everybody; or who there is where aneuron's cores are executed in another way than in threads."""
    return everybody() if device is None else without_threads(device)


async def w4(effort: Effort, say: Say, where: str, device: Device | None = None) -> list[Row]:
    """One-row calls in a loop on cores that take no time: what the runtime itself costs."""
    rows = []
    title = " ".join(("W4", *(device or ()), where))
    for callers in (1, 64, 1024):
        say(f"{title}, {callers} callers")
        async with started(contenders_for(device), CORES, 0.0, BATCH) as contenders:
            seen = await rounds(contenders, effort, looping([1] * callers, effort.seconds))
        name = f"{title} {callers:>5,}"
        if callers == 1:
            bounds = at_most(1.2, "fair floor"), at_most(0.9, "fair floor")
            rows.append(row(name, "us", seen, p50(1e6), *bounds))
        else:
            bounds = at_least(0.8 if where == "free" else 0.75, "fair floor"), at_least(1.0, "fair floor")
            rows.append(row(name, "rows/s", seen, rate, *bounds))
    return rows


async def w5(effort: Effort, say: Say, where: str, device: Device | None = None) -> list[Row]:
    """Many cores: batch 8, 2 ms, 16 callers a core."""
    rows = []
    title = " ".join(("W5", *(device or ()), where))
    for cores in MANY:
        say(f"{title}, {cores} cores")
        async with started(contenders_for(device), cores, MANY_SERVICE, BATCH) as contenders:
            seen = await rounds(contenders, effort, looping([1] * 16 * cores, effort.seconds), MANY_SERVICE)
        bounds = at_least(0.7 if where == "free" else 0.85, "fair floor"), at_least(1.0, "fair floor")
        made = row(f"{title} {cores} cores", "rows/s", seen, rate, *bounds)
        made.values["ideal"] = [cores * BATCH / MANY_SERVICE] * len(seen.sleeps)
        rows.append(made)
    return rows
