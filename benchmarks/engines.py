"""Rows of pools in processes, beside the same in this process: `python -m benchmarks --only processes`.

`python -m benchmarks.engines NAME CALLERS` is a client of shared engines: it starts, and does a turn for each number of
seconds on its input, which it says on its output.

Lives here: who calls engines, what is done to them, and the bounds. Must not be here: how a turn is timed, servers.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import aneuron
from benchmarks import wrk
from benchmarks.contenders import THREADS, Contender, Makers, installed
from benchmarks.floors import FEATURES, model
from benchmarks.loops import BATCH, CORES, PATIENCE, SERVICE, looping
from benchmarks.rows import Row, above, at_least, at_most, p50, percentile, rate, row
from benchmarks.timing import Effort, Say, Seen, Turn, WrongAnswer, rounds, started, take_turn

HERE = "in process"  # the contender that all bounds refer to
HOLD = 0.002  # s, for which a model holds the interpreter
LARGE = 16 * 2**20 // (4 * FEATURES)  # rows of 16 MB
TICK = 0.001
BETWEEN = 2.0  # s, between two deaths of engines
FOLDER = Path(__file__).parents[1]


def holding(x: torch.Tensor) -> torch.Tensor:
    """The same model in Python that takes its time."""
    until = time.thread_time() + HOLD
    while time.thread_time() < until:
        pass
    return model(x)


class Engines:
    """Aneuron, with its cores in so many processes; None: in this one."""

    def __init__(self, processes: int | None, net: Any = model, share: str | None = None) -> None:
        self._processes, self._net, self._share = processes, net, share

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        backend = aneuron.SimulatedBackend(cores=cores, service_time=seconds, **THREADS)
        self.pool = aneuron.Pool(backend=backend, processes=self._processes, share=self._share, linger=0.0)
        example = torch.zeros(1, FEATURES)
        self.call = aneuron.AsyncDataParallel(self._net, pool=self.pool, batch_size=batch, example_inputs=example)
        await self.call.start()

    def executed(self) -> int:
        return sum(core.rows for core in self.call.statistics().cores)

    def pids(self) -> list[int]:
        """Of the engines."""
        return [engine.pid for engine in self.pool.statistics().engines if engine.pid is not None]

    async def stop(self) -> None:
        await self.call.aclose()


def beside(processes: int, net: Any = model) -> Makers:
    """The contenders of most rows."""
    return {HERE: lambda: Engines(None, net), "aneuron": lambda: Engines(processes, net)}


async def processes(effort: Effort, say: Say, cheap: bool = False) -> list[Row]:
    """All of them; `cheap` leaves out those that start many processes."""
    rows = [*await no_op(effort, say), *await killed(effort, say)]
    if cheap:
        return rows
    return [*rows, *await shared(effort, say), *await held(effort, say), *await large(effort, say),
            *await http(effort, say)]  # fmt: skip


# A call's way to an engine and back.


async def no_op(effort: Effort, say: Say) -> list[Row]:
    """One-row calls on cores that take no time: what the way costs."""
    rows = []
    lone = 0.15 if "uvloop" in type(asyncio.get_running_loop()).__module__ else 0.2
    async with started(beside(1), CORES, 0.0, BATCH) as contenders:
        for callers in (1, 64, 1024):
            say(f"processes, {callers} callers on cores that take no time")
            seen = await rounds(contenders, effort, with_cpu(looping([1] * callers, effort.seconds)))
            if callers == 1:
                rows.append(row("engine, a lone call", "ms", seen, p50(), above(lone, HERE)))
                continue
            name = f"engine, no-op {callers:>5,}"
            rows.append(row(name, "rows/s", seen, rate, at_least(0.6, HERE)))
            rows.append(_costs(f"{name}, client", seen, lambda turn: turn.cpu_per_row * 1e6))
            rows.append(_costs(f"{name}, engine", seen, lambda turn: turn.more["engine"] * 1e6))
    return rows


def _costs(name: str, seen: Seen, value: Callable[[Turn], float]) -> Row:
    """CPU of one side, which can do so many rows at most; beside it what the process costs that is both."""
    made = row(name, "us/row", seen, value, goal=at_most(1 / 0.6, HERE))
    made.values[HERE] = [turn.cpu_per_row * 1e6 for turn in seen.turns.get(HERE, ())]
    made.p50, made.p99 = {}, {}
    return made


def with_cpu(look: Callable[[Any], Awaitable[Turn]]) -> Callable[[Any], Awaitable[Turn]]:
    """The same turn, and the seconds of CPU that the engines have for a row."""

    async def looked(contender: Engines) -> Turn:
        done, cpu = contender.call.statistics().calls.completed, sum(map(_cpu, contender.pids()))
        turn = await look(contender)
        rows, cpu = contender.call.statistics().calls.completed - done, sum(map(_cpu, contender.pids())) - cpu
        return Turn(turn.rows_per_second, turn.cpu_per_row, turn.latencies, more={"engine": cpu / max(1, rows)})

    return looked


def _cpu(pid: int) -> float:
    """Seconds that the threads of a process have had."""
    total = 0
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


# Two processes, one set of cores.


class Clients:
    """So many processes, each with its part of the callers, that use the same engines."""

    def __init__(self, count: int, callers: int) -> None:
        self._count, self._callers = count, callers
        self._clients: list[asyncio.subprocess.Process] = []

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        name = f"benchmark-{os.getpid()}"
        pipe = asyncio.subprocess.PIPE
        for _ in range(self._count):
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.engines", name, str(self._callers // self._count), cwd=FOLDER,
                stdin=pipe, stdout=pipe, limit=1 << 26,
            )  # fmt: skip
            self._clients.append(client)
        await asyncio.gather(*map(_said, self._clients))  # they are ready

    async def turn(self, seconds: float) -> Turn:
        """One of all of them at once."""
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.write(f"{seconds}\n".encode())
        parts = await asyncio.gather(*map(_said, self._clients))
        batches, rows = parts[0]["batches"], parts[0]["rows"]  # of all clients, as the engines have said to one
        return Turn(
            sum(part["rows/s"] for part in parts), latencies=[each for part in parts for each in part["took"]],
            more={"fill": rows / max(1, batches) / BATCH},
        )  # fmt: skip

    async def stop(self) -> None:
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.close()
            await client.wait()


async def _said(client: asyncio.subprocess.Process) -> Any:
    assert client.stdout is not None
    line = await client.stdout.readline()
    if not line:
        raise RuntimeError(f"a client of the engines has ended with {await client.wait()}; see above")
    return json.loads(line)


async def shared(effort: Effort, say: Say) -> list[Row]:
    """64 callers in two processes on one engine, in one process on one, and where the cores are."""
    say("processes, two clients on one engine")
    longer, callers = effort.longer(4), 64
    contenders: dict[str, Any] = {HERE: Engines(None), "one client": Engines(1), "aneuron": Clients(2, callers)}

    async def look(contender: Any) -> Turn:
        if isinstance(contender, Clients):
            return await contender.turn(longer.seconds)
        return await filled(contender, callers, longer.seconds)

    try:
        for contender in contenders.values():
            await contender.start(CORES, SERVICE, BATCH)
        seen = await rounds(contenders, longer, look, SERVICE)
    finally:
        for contender in contenders.values():
            await contender.stop()
    capacity = CORES * BATCH / SERVICE
    return [
        row("2 clients, 1 engine", "rows/s", seen, rate, at_least(0.97, HERE), ideal=lambda sleep: capacity),
        row("2 clients, fill", "of 1", seen, lambda turn: turn.more["fill"], at_least(0.97, "one client")),
    ]


async def filled(contender: Engines, callers: int, seconds: float) -> Turn:
    """A turn, and how full its batches were."""
    before = await _executed(contender)
    async with asyncio.timeout(seconds + PATIENCE):
        turn = await take_turn(contender.call, [1] * callers, seconds)
    rows, batches = (now - then for now, then in zip(await _executed(contender), before, strict=True))
    fill = rows / max(1, batches) / BATCH
    return Turn(turn.rows_per_second, turn.cpu_per_row, turn.latencies, more={"fill": fill, "rows": rows,
                "batches": batches})  # fmt: skip


async def _executed(contender: Engines) -> tuple[int, int]:
    await asyncio.sleep(0.1)  # what engines say of themselves is that old at most
    cores = contender.call.statistics().cores
    return sum(core.rows for core in cores), sum(core.batches for core in cores)


async def client(name: str, callers: int) -> None:
    """One process of `Clients`."""
    engines = Engines(1, share=name)
    await engines.start(CORES, SERVICE, BATCH)
    print(json.dumps("ready"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        turn = await filled(engines, callers, float(line))
        said = {"rows/s": turn.rows_per_second, "took": turn.latencies, **turn.more}
        print(json.dumps(said), flush=True)
    await engines.stop()


# Python that is held; large inputs.


async def held(effort: Effort, say: Say) -> list[Row]:
    """A model that holds the interpreter while it is executed: two of them are there."""
    say("processes, a model that holds the interpreter")
    longer = effort.longer(4, least=0.2)
    async with started(beside(2, holding), 2, 0.0, BATCH) as contenders:
        seen = await rounds(contenders, longer, looping([1] * 64, longer.seconds))
    return [row("2 engines, Python 2 ms", "rows/s", seen, rate, at_least(1.7, HERE), goal=at_least(1.9, HERE))]


async def large(effort: Effort, say: Say) -> list[Row]:
    """Calls of 16 MB, four at a time, and how late a timer is on their loop."""
    say("processes, inputs of 16 MB")
    longer = effort.longer(8, least=2.0)
    async with started(beside(1), 1, SERVICE, LARGE) as contenders:
        for contender in contenders.values():
            await contender.call(torch.rand(LARGE, FEATURES))  # which finds out what of the output has rows
        seen = await rounds(contenders, longer, lambda contender: _large(contender, longer.seconds))
    size = LARGE * 4 * FEATURES / 1e6
    lag = row("16 MB, lag p99.9", "ms", seen, lambda turn: turn.more["lag"] * 1e3, at_most(5, None))
    lag.p50, lag.p99 = {}, {}
    return [row("16 MB", "MB/s", seen, lambda turn: turn.rows_per_second * size, at_least(0.7, HERE)), lag]


async def _large(contender: Contender, seconds: float) -> Turn:
    x = torch.rand(LARGE, FEATURES)
    right, running = model(x), True
    took: list[float] = []
    lags: list[float] = []

    async def caller() -> None:
        while running:
            begin = time.perf_counter()
            y = await contender.call(x)
            took.append(time.perf_counter() - begin)
            if not await asyncio.to_thread(torch.equal, y, right):
                raise WrongAnswer(f"not the answer to {LARGE:,} rows")

    async with asyncio.timeout(seconds + 3 * PATIENCE), asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(caller())
        begin = time.perf_counter()
        while (now := time.perf_counter()) - begin < seconds:
            await asyncio.sleep(TICK)
            lags.append(max(0.0, time.perf_counter() - now - TICK))
        calls = len(took) / (time.perf_counter() - begin)
        running = False
    return Turn(calls, latencies=took, more={"lag": percentile(lags, 0.999)})


# Engines that die.


async def killed(effort: Effort, say: Say) -> list[Row]:
    """64 callers for a minute, and every two seconds an engine is killed."""
    seconds = effort.seconds * 240
    say(f"processes, an engine is killed every {BETWEEN:g} s, for {seconds:.0f} s")
    engines = Engines(2)
    await engines.start(CORES, SERVICE, BATCH)
    try:
        whole = await take_turn(engines.call, [1] * 64, effort.seconds * 8)
        seen = await _under_fire(engines, seconds)
    finally:
        await engines.stop()
    could = whole.rows_per_second * seen["serving"]
    rows = [Row("killed engines", "rows/s", at_least(0.9, "ideal")), Row("killed engines", "lost", at_most(0, None)),
            Row("killed engines", "wrong", at_most(0, None)), Row("killed engines", "deaths")]  # fmt: skip
    values = seen["answers"] / seconds, seen["lost"], seen["wrong"], seen["deaths"]
    for made, value in zip(rows, values, strict=True):
        made.values["aneuron"] = [float(value)]
    rows[0].values["ideal"] = [could]
    return rows


async def _under_fire(engines: Engines, seconds: float) -> dict[str, float]:
    """What came of it; `serving`: the mean part of the cores that were in service."""
    seen = {"answers": 0, "lost": 0, "wrong": 0, "deaths": 0}
    serving: list[float] = []
    running = True

    async def caller(index: int) -> None:
        x = torch.full((1, FEATURES), float(index)) + torch.rand(1, FEATURES)
        right = model(x)
        while running:
            try:
                y = await engines.call(x)
            except Exception:
                seen["lost"] += 1
                await asyncio.sleep(TICK)
                continue
            seen["answers" if torch.equal(y, right) else "wrong"] += 1

    async def kill() -> None:
        victim = 0
        while True:
            states = engines.pool.statistics().engines
            state = states[victim % len(states)]
            if state.state == "ready" and state.pid is not None and all(each.state == "ready" for each in states):
                os.kill(state.pid, signal.SIGKILL)
                seen["deaths"] += 1
                victim += 1
            await asyncio.sleep(BETWEEN)

    async with asyncio.TaskGroup() as group:
        for index in range(64):
            group.create_task(caller(index))
        killer = group.create_task(kill())
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            states = engines.pool.statistics().engines
            ready = sum(len(each.cores) for each in states if each.state == "ready")
            serving.append(ready / CORES)
            await asyncio.sleep(0.02)
        running = False
        killer.cancel()
    return {**seen, "serving": sum(serving) / len(serving)}


# Over HTTP.


async def http(effort: Effort, say: Say) -> list[Row]:
    """FastAPI with two workers and a shared pool, and with one worker that has the cores."""
    if not (wrk.there() and installed("fastapi") and installed("uvicorn")):
        say("wrk, FastAPI or uvicorn is not installed: the rows over HTTP are left out")
        return []
    from benchmarks import http as scenes
    from benchmarks.processes import Server

    module, one = "benchmarks.servers.fastapi_app", {**scenes.SCENE, "behind": "aneuron"}
    many = {**one, "workers": 2, "share": f"benchmark-http-{os.getpid()}"}
    contenders = {HERE: Server(module, one), "aneuron": Server(module, many)}
    longer = effort.longer(12, least=1.0)
    rows = []
    async with scenes.started(contenders) as fails:
        for connections in (32, 256):
            say(f"processes, FastAPI, {connections} connections")
            able = {name: server for name, server in contenders.items() if name not in fails}
            seen = await rounds(able, longer, lambda server, n=connections: scenes.look(server, n, longer.seconds))
            fails |= seen.fails
            seen.fails.update(fails)
            rows.append(row(f"FastAPI x2, {connections:>4,}", "answers/s", seen, rate, at_least(1.15, HERE)))
    return rows


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=None) as runner:
        runner.run(client(sys.argv[1], int(sys.argv[2])))
