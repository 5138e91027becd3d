"""Rows about what should not be noticed: an idle model, calls that wait, and the loop while a large input is served.

Lives here: what is counted, and the bounds of the performance budget. Must not be here: traffic.
"""

import asyncio
import gc
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contenders import Contender, Makers, everybody, ours, yardsticks
from benchmarks.floors import FEATURES, Floor, model
from benchmarks.loops import BATCH, CORES, SERVICE
from benchmarks.rows import Row, above, at_most, percentile, row
from benchmarks.timing import Effort, Say, Turn, WrongAnswer, rounds, started

THREADS = Path("/proc/self/task")
MEGABYTES = 256
ROWS = MEGABYTES * 2**20 // (4 * FEATURES)
TICK = 0.001
WAITING = 10_000  # calls


class Nothing:
    """Computes on the loop: what is counted beside it is the process's own."""

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        """Nothing to start."""

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    def executed(self) -> int:
        return 0

    async def stop(self) -> None:
        """Nothing to stop."""


async def idle(effort: Effort, say: Say) -> list[Row]:
    """A model that has served one call and waits for the next, alone in the process."""
    if not _counted():
        say("this system does not count the wake-ups of threads: the idle model is left out")
        return []
    say("idle model")
    makers = {"nothing": Nothing, **everybody()}
    longer = effort.longer(4)
    seen = await rounds(makers, longer, lambda make: _wait(make, longer.seconds))
    woken = row("idle model", "wakes/s", seen, lambda turn: turn.more["woken"], above(1.0, "nothing"))
    cpu = row("idle model", "ms CPU/s", seen, lambda turn: turn.more["cpu"] * 1e3, above(1.0, "nothing"))
    for one in (woken, cpu):
        one.p50, one.p99 = {}, {}
    return [woken, cpu]


async def _wait(make: Callable[[], Contender], seconds: float) -> Turn:
    contender = make()
    await contender.start(CORES, SERVICE, BATCH)
    try:
        await contender.call(torch.zeros(1, FEATURES))
        await asyncio.sleep(0.2)
        woken, cpu = _wake_ups(), time.process_time()
        await asyncio.sleep(seconds)
        cpu, woken = time.process_time() - cpu, _wake_ups() - woken
    finally:
        await contender.stop()
    return Turn(more={"woken": woken / seconds, "cpu": cpu / seconds})


def _counted() -> bool:
    return THREADS.exists()


def _wake_ups() -> int:
    """How often this process's threads have gone to sleep of their own will, and so were woken."""
    lines = [line for task in THREADS.iterdir() for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


async def waiting(effort: Effort, say: Say) -> list[Row]:
    """What a one-row call takes in memory while it waits, its task included, beside many others of the same tensor."""
    say(f"{WAITING:,} calls that wait")
    once = Effort(effort.seconds, 1, 1)  # it is a matter of which objects there are, the same each time
    seen = await rounds(yardsticks(), once, _let_wait)
    made = row("a waiting call", "kB", seen, lambda turn: turn.more["kB"], at_most(1.5, None), at_most(1, None))
    made.p50, made.p99 = {}, {}
    return [made]


async def _let_wait(make: Callable[[], Contender]) -> Turn:
    contender, x = make(), torch.zeros(1, FEATURES)
    await contender.start(1, 1.0, 1)
    tasks: list[asyncio.Future[torch.Tensor]] = []
    try:
        for calls in (100, WAITING):  # the first are on their way to the core, or make what is made once
            gc.collect()
            tracemalloc.start()
            tasks += [asyncio.ensure_future(contender.call(x)) for _ in range(calls)]
            await asyncio.sleep(0.05)
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await contender.stop()
    return Turn(more={"kB": size / WAITING / 1e3})


async def lag(effort: Effort, say: Say) -> list[Row]:
    """How late a 1 ms timer is while inputs of 256 MB are served, in batches of 8 MB on a core fewer than CPUs."""
    say(f"loop lag beside {MEGABYTES} MB")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    x = torch.arange(float(ROWS))[:, None].remainder(1000).repeat(1, FEATURES)
    right = model(x)
    longer = effort.longer(8)
    makers: Makers = {"nothing": Nothing, "floor": Floor, **ours()}
    async with started(makers, max(1, cpus - 1), SERVICE, ROWS // 32) as contenders:
        for contender in contenders.values():
            await contender.call(x)
        seen = await rounds(contenders, longer, lambda one: _ticks(one, x, right, longer.seconds))
    tail = row("lag, 256 MB, p99.9", "ms", seen, lambda turn: percentile(turn.latencies, 0.999) * 1e3)
    tail.must, tail.goal = at_most(5, None), at_most(2, None)
    return [tail, row("lag, 256 MB, max", "ms", seen, lambda turn: max(turn.latencies) * 1e3)]


async def _ticks(contender: Contender, x: torch.Tensor, right: torch.Tensor, seconds: float) -> Turn:
    """The lags of a timer while calls are served, at least `seconds` of them; checking is not timed."""
    lags: list[float] = []
    while len(lags) * TICK < seconds:
        call = asyncio.ensure_future(
            contender.call(x) if not isinstance(contender, Nothing) else asyncio.sleep(0.2, right)
        )
        while not call.done():
            begin = time.perf_counter()
            await asyncio.sleep(TICK)
            lags.append(max(0.0, time.perf_counter() - begin - TICK))
        if not torch.equal(await call, right):
            raise WrongAnswer(f"not the answer to {ROWS:,} rows")
    return Turn(latencies=lags)
