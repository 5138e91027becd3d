"""Rows with large calls where Python is the limit: many at once, one after the other, a map.

Lives here: who calls, and the bounds of the performance budget. Must not be here: how a turn is timed.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from itertools import repeat

import torch

from benchmarks import loops
from benchmarks.contenders import Contender, Device
from benchmarks.floors import FEATURES
from benchmarks.loops import BATCH, CORES, MANY, MANY_SERVICE, PATIENCE, contenders_for, looping
from benchmarks.rows import Row, at_least, row
from benchmarks.timing import Call, Checked, Effort, Say, Turn, rounds, started

SHORT = 64  # callers whose calls are of one batch


async def bulk(effort: Effort, say: Say, where: str, device: Device | None = None) -> list[Row]:
    """All of them."""
    longer = effort.longer(2, least=0.05)
    title = " ".join(("bulk", *(device or ()), where))
    rows = []
    if device is None or "inline" in device:
        rows += await _no_op(longer, say, title, device)
    if device is None or "inline" not in device:
        rows += await _many_cores(longer, say, title, device)
        rows += await _one_caller(longer, say, title, device)
    return rows


async def threadless(effort: Effort, say: Say, where: str) -> list[Row]:
    """What of this, and of W4 and W5, is about threads, where aneuron's cores need none; the floors keep theirs."""
    inline, submits = {"inline": True}, {"submits": True}
    return [
        *await loops.w4(effort, say, where, inline),
        *await bulk(effort, say, where, inline),
        *await loops.w5(effort, say, where, submits),
        *await bulk(effort, say, where, submits),
    ]


async def _no_op(effort: Effort, say: Say, title: str, device: Device | None) -> list[Row]:
    """Calls of one batch and of many, on cores that take no time."""
    rows = []
    for size, callers, least, goal in ((BATCH, SHORT, 0.6, 0.9), (loops.LARGE, CORES, 0.5, 0.8)):
        say(f"{title}, {callers} callers with {size} rows on cores that take no time")
        async with started(contenders_for(device), CORES, 0.0, BATCH) as contenders:
            seen = await rounds(contenders, effort, looping([size] * callers, effort.seconds))
        bounds = at_least(least, "fair floor"), at_least(goal, "fair floor")
        rows.append(row(f"{title} {size} rows", "rows/s", seen, _executed, *bounds))
    return rows


async def _many_cores(effort: Effort, say: Say, title: str, device: Device | None) -> list[Row]:
    """As many callers as cores."""
    rows = []
    for cores in MANY:
        say(f"{title}, {cores} callers with {loops.LARGE} rows on {cores} cores")
        async with started(contenders_for(device), cores, MANY_SERVICE, BATCH) as contenders:
            seen = await rounds(contenders, effort, looping([loops.LARGE] * cores, effort.seconds), MANY_SERVICE)
        bounds = at_least(0.9, "fair floor"), at_least(1.2, "fair floor")
        made = row(f"{title} {cores} cores", "rows/s", seen, _executed, *bounds)
        made.values["ideal"] = [_capacity(cores)] * len(seen.sleeps)
        rows.append(made)
    return rows


async def _one_caller(effort: Effort, say: Say, title: str, device: Device | None) -> list[Row]:
    """One caller on many cores: each call awaited before the next, and all of them by `map`."""
    cores, large = MANY[0], loops.LARGE
    turns = -(-large // (cores * BATCH))  # that a core has in one call
    looks = {
        "await": (looping([large], effort.seconds), lambda sleep: large / ((turns - 1) * MANY_SERVICE + sleep)),
        "map": (_mapping(cores, effort.seconds), lambda sleep: _capacity(cores)),
    }
    rows = []
    for how, (look, ideal) in looks.items():
        say(f"{title}, one caller with {large} rows on {cores} cores, {how}")
        async with started(contenders_for(device), cores, MANY_SERVICE, BATCH) as contenders:
            seen = await rounds(contenders, effort, look, MANY_SERVICE)
        bounds = at_least(0.65, "ideal"), at_least(1.0)
        rows.append(row(f"{title} one {how}", "rows/s", seen, _executed, *bounds, ideal))
    rows[-1].p50, rows[-1].p99 = {}, {}  # a map has no calls to be timed
    return rows


def _capacity(cores: int) -> float:
    return cores * BATCH / MANY_SERVICE


def _executed(turn: Turn) -> float:
    """Calls end in bursts, as many at once as there are callers; what the cores have executed is steadier."""
    return turn.executed_per_second


def _mapping(cores: int, seconds: float) -> Callable[[Contender], Awaitable[Turn]]:
    """A turn of one caller that maps an endless source, and takes each result as it comes, in order."""

    async def look(contender: Contender) -> Turn:
        x = torch.rand(loops.LARGE, FEATURES)
        answers, results = Checked(x), _map(contender.call, x, cores)
        async with asyncio.timeout(seconds + PATIENCE), aclosing(results):
            answers.add(await anext(results))
            done, begin = contender.executed(), time.perf_counter()
            async for y in results:
                answers.add(y)
                if (passed := time.perf_counter() - begin) >= seconds:
                    break
            done = contender.executed() - done
        return Turn(executed_per_second=done / passed)

    return look


async def _map(call: Call, x: torch.Tensor, outstanding: int) -> AsyncGenerator[torch.Tensor]:
    """Aneuron's `map`, with its defaults; for who has none, what one would write: so many tasks, oldest first."""
    if hasattr(call, "map"):
        async with call.map(repeat(x)) as results:
            async for y in results:
                yield y
        return
    tasks = deque(asyncio.ensure_future(call(x)) for _ in range(outstanding))
    try:
        while True:
            yield await tasks[0]
            tasks.popleft()
            tasks.append(asyncio.ensure_future(call(x)))
    except GeneratorExit:
        await asyncio.gather(*tasks)  # not cancelled: what peers have queued for them would outlast the turn
        raise
