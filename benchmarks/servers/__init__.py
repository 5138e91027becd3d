"""The servers of the HTTP benchmark, a program each: `python -m benchmarks.servers.fastapi_app`.

Lives here: the settings that they share, taken from the environment, and what a web app has behind its handler. Must
not be here: clients, timing.
"""

import asyncio
import gc
import os
import queue
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: simulated cores have no threads of their own

import torch

import aneuron
from benchmarks import floors
from benchmarks.floors import Core, Floor, model

PREFIX = "BENCHMARK_"
BEHIND = ("aneuron", "floor", "executor")
MEDIA_TYPE = "application/octet-stream"


def setting(name: str, default: str = "") -> str:
    """What the benchmark asked for."""
    return os.environ.get(PREFIX + name.upper(), default)


PORT = int(setting("port", "8000"))
CORES = int(setting("cores", "4"))
BATCH = int(setting("batch", "8"))
SECONDS = float(setting("seconds", "0.005"))
MAX_PENDING = int(setting("max_pending", "0")) or None
FEATURES = int(setting("features", str(floors.FEATURES)))
WORKERS = int(setting("workers", "1"))
SHARE = setting("share") or None  # the name of engines that all workers use
WHAT = setting("behind", "aneuron")


class Executor:
    """What one writes without a library: a thread a core, one call an execution."""

    async def start(self, cores: int, seconds: float, batch: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = ThreadPoolExecutor(cores)
        self.idle: queue.SimpleQueue[Core] = queue.SimpleQueue()
        for _ in range(cores):
            self.idle.put(Core(seconds, batch))

    async def call(self, x: torch.Tensor) -> torch.Tensor:
        return await self.loop.run_in_executor(self.threads, self._run, x)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        core = self.idle.get()
        try:
            return core.run(x)
        finally:
            self.idle.put(core)

    async def stop(self) -> None:
        self.threads.shutdown(cancel_futures=True)


def product() -> aneuron.AsyncDataParallel:
    """Aneuron's model, not yet started."""
    backend = aneuron.SimulatedBackend(cores=CORES, service_time=SECONDS)
    pool = aneuron.Pool(backend=backend, processes=1 if SHARE else None, share=SHARE, linger=0.0)
    return aneuron.AsyncDataParallel(
        model, batch_size=BATCH, pool=pool, example_inputs=torch.zeros(1, FEATURES), max_pending=MAX_PENDING
    )


def other() -> Floor | Executor:
    """What stands in its place."""
    return Floor() if WHAT == "floor" else Executor()


@asynccontextmanager
async def running(behind: Floor | Executor) -> AsyncIterator[None]:
    """It serves; with the freeze that aneuron's integration offers, lest that make the difference."""
    await behind.start(CORES, SECONDS, BATCH)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        await behind.stop()


def tensor(body: bytes) -> torch.Tensor:
    """The row that a request's bytes are. Of a copy: torch warns of memory that it may not write to."""
    return torch.frombuffer(bytearray(body), dtype=torch.float32).unsqueeze(0)
