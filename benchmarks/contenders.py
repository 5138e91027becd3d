"""Who takes part: aneuron, the floors, and what people use today, all behind one face.

Lives here: how each product is set up, as its own documentation shows. Must not be here: timing, judgement.

Every contender: `await start(cores, seconds, batch)`, `await call(x)` with x of shape [n, 16], `executed()` rows since
the start, `await stop()`. All but aneuron run on `floors.Core`, which does what `aneuron.SimulatedBackend` does.
"""

import asyncio
import inspect
import itertools
import os
import platform
import queue
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch

import aneuron
from benchmarks import before
from benchmarks.floors import FEATURES, Core, FairFloor, Floor, model

PEERS = ("batched", "async-batcher", "original")
PACKAGES = PEERS[:2]  # that one can install
Makers = dict[str, Callable[[], "Contender"]]
Device = Mapping[str, bool]  # how cores are executed: attributes of the simulated backend, by name
THREADS: Device = {"submits": False, "inline": False}  # in a thread each, as the floors' are


class Contender(Protocol):
    """What the workloads drive."""

    @property
    def call(self) -> Callable[[torch.Tensor], Awaitable[torch.Tensor]]: ...

    async def start(self, cores: int, seconds: float, batch: int) -> None: ...

    def executed(self) -> int: ...

    async def stop(self) -> None: ...


class Aneuron:
    """The product: all features on, nothing tuned but what a row is about."""

    def __init__(self, package: Any = aneuron, device: Device = THREADS, **options: Any) -> None:
        self.package, self.options = package, options
        known = inspect.signature(package.SimulatedBackend).parameters  # a build before may have threads only
        self.device = {name: value for name, value in {**THREADS, **device}.items() if name in known}

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        backend = self.package.SimulatedBackend(cores=cores, service_time=seconds, **self.device)
        self.call = self.package.AsyncDataParallel(
            model, batch_size=batch, backend=backend, example_inputs=torch.zeros(1, FEATURES), **self.options
        )
        await self.call.start()

    def executed(self) -> int:
        return sum(core.rows for core in self.call.statistics().cores)

    async def stop(self) -> None:
        await self.call.aclose()


def learned_hold() -> Makers:
    """Aneuron that may hold a partial batch back as long as it finds worthwhile; nothing where it cannot yet."""
    if "max_delay" not in inspect.signature(aneuron.AsyncDataParallel).parameters:
        return {}
    return {"aneuron, held": lambda: Aneuron(max_delay=None)}


class _Peer:
    """The cores that a peer runs on."""

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.batch = batch
        self.cores = [Core(seconds, batch) for _ in range(cores)]

    def executed(self) -> int:
        return sum(core.rows for core in self.cores)


class Original(_Peer):
    """What `torch_neuronx.DataParallel` does by default, from asyncio's default executor.

    Each call starts a pool of 2 threads, whatever the number of cores (the source says two a loaded module, and
    consecutive cores share one), cuts its rows in as many pieces as there are cores, and waits for all. The device's
    runtime cuts a piece to the compiled size, pads it, and goes to the next core in rotation. Nothing is packed
    across callers.
    """

    WORKERS = 2

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        await super().start(cores, seconds, batch)
        self.rotation = itertools.count()

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        return await self.loop.run_in_executor(None, self._forward, x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        each, extra = divmod(x.shape[0], len(self.cores))
        sizes = [each + 1] * extra + [each] * (len(self.cores) - extra if each else 0)
        with ThreadPoolExecutor(self.WORKERS) as pool:
            results = [pool.submit(self._run, piece) for piece in x.split(sizes)]
        return torch.cat([result.result() for result in results])

    def _run(self, piece: torch.Tensor) -> torch.Tensor:
        cores = self.cores
        return torch.cat([cores[next(self.rotation) % len(cores)].run(rows) for rows in piece.split(self.batch)])

    async def stop(self) -> None:
        """Nothing to stop: the executor belongs to the loop."""


class Batched(_Peer):
    """`batched.aio.dynamically`, one for each core, since each runs one batch at a time. Rows are dealt in turn."""

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        await super().start(cores, seconds, batch)
        self.threads = ThreadPoolExecutor(cores)
        self.processors = [self._processor(core) for core in self.cores]
        self.rotation = itertools.cycle(self.processors)

    def _processor(self, core: Core) -> Any:
        from batched import aio

        def run(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return core.run(torch.cat(rows)).split(1)

        @aio.dynamically(batch_size=self.batch)
        async def infer(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return await self.loop.run_in_executor(self.threads, run, rows)

        return infer

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return await next(self.rotation)(x)
        shares = x.split(-(-x.shape[0] // len(self.cores)))
        results = await asyncio.gather(*(next(self.rotation)(list(share.split(1))) for share in shares))
        return torch.cat([row for rows in results for row in rows])

    async def stop(self) -> None:
        for processor in self.processors:
            if processor._task is not None:
                processor._task.cancel()  # it has no way to be closed
        self.threads.shutdown()


class AsyncBatcher(_Peer):
    """`async_batcher.AsyncBatcher`, with one batch more at a time than there are cores: it is the faster for it."""

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        from async_batcher.batcher import AsyncBatcher as Batcher

        await super().start(cores, seconds, batch)
        self.threads = ThreadPoolExecutor(cores)
        idle: queue.SimpleQueue[Core] = queue.SimpleQueue()
        for core in self.cores:
            idle.put(core)

        class Infer(Batcher):
            def process_batch(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
                core = idle.get()
                try:
                    return list(core.run(torch.cat(batch)).split(1))
                finally:
                    idle.put(core)

        self.batcher = Infer(max_batch_size=batch, concurrency=cores + 1, executor=self.threads)

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return await self.batcher.process(x)
        return torch.cat(await asyncio.gather(*map(self.batcher.process, x.split(1))))

    async def stop(self) -> None:
        await self.batcher.stop(force=True)
        self.threads.shutdown()


def ours(device: Device = THREADS, **options: Any) -> Makers:
    """aneuron, and the build that it is measured against, if any."""
    makers: Makers = {"aneuron": lambda: Aneuron(device=device, **options)}
    if (package := before.package()) is not None:
        makers["before"] = lambda: Aneuron(package, device, **options)
    return makers


def yardsticks() -> Makers:
    """aneuron, and what its bounds refer to."""
    return {"floor": Floor, "fair floor": FairFloor, **ours()}


def without_threads(device: Device) -> Makers:
    """On cores that need no thread of their own, and on those that do, beside the floors on theirs."""
    return {"floor": Floor, "fair floor": FairFloor, **ours(device), "threads": Aneuron}


def everybody() -> Makers:
    """With the peers that are installed."""
    peers: Makers = {"batched": Batched, "async-batcher": AsyncBatcher, "original": Original}
    return yardsticks() | {name: make for name, make in peers.items() if name == "original" or installed(name)}


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(*packages: str, load: float) -> dict[str, str]:
    """What ran, on what: for every table and file of figures. `load`: of the machine, before."""
    return {
        **{name: installed(name) or "not installed" for name in packages},
        "python": platform.python_version(),
        "CPUs": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load before": f"{load:.1f}",
    }
