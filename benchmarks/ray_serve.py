"""64 callers of a core of 5 ms in a replica of Ray Serve, beside `@serve.batch`: `python -m benchmarks.ray_serve`.

In an environment with Ray (`make ray` makes it). What `@serve.batch` reaches with Serve's own `max_ongoing_requests`
is what the bound refers to; with 256 Ray's transport is the limit of both, and it is printed beside.

Lives here: the two deployments, the callers. Must not be here: anything that the other benchmarks need.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

import aneuron.ray
from aneuron import AsyncDataParallel, SimulatedBackend

CALLERS, SERVICE, BATCH, SECONDS, ROUNDS, BOUND = 64, 0.005, 8, 3.0, 3, 3.0


def make() -> AsyncDataParallel:
    return AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=SERVICE), batch_size=BATCH)


class Batched:
    """The same core behind Serve's decorator."""

    def __init__(self) -> None:
        self.core = asyncio.Lock()

    @serve.batch(max_batch_size=BATCH)
    async def run(self, rows: list[Any]) -> list[Any]:
        async with self.core:
            await asyncio.sleep(SERVICE)
        return list((-torch.from_numpy(np.concatenate(rows))).split(1))

    async def __call__(self, row: Any) -> Any:
        return await self.run(row)


async def rate(call: Callable[[Any], Awaitable[Any]]) -> float:
    """Rows a second, each of them checked."""
    end, done = time.monotonic() + SECONDS, 0

    async def caller(number: int) -> None:
        nonlocal done
        row = np.full((1, 64), float(number), "float32")
        while time.monotonic() < end:
            assert (await call(row))[0, 0].item() == -number
            done += 1

    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return done / SECONDS


async def measure() -> None:
    ours = aneuron.ray.view(await asyncio.to_thread(lambda: run(aneuron.ray.deployment(make), "ours")))
    batch = serve.deployment(Batched)
    plain = await asyncio.to_thread(lambda: run(batch, "plain"))
    raised = await asyncio.to_thread(lambda: run(batch.options(max_ongoing_requests=256), "raised"))
    calls = {"aneuron": ours, "@serve.batch": plain.remote, "@serve.batch, max_ongoing_requests=256": raised.remote}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rates[name].append(await rate(call))
    medians = {name: statistics.median(seen) for name, seen in rates.items()}
    for name, median in medians.items():
        print(f"{name:40} {median:6.0f} rows/s, aneuron has {medians['aneuron'] / median:.2f} times as many")
    ratio = medians["aneuron"] / medians["@serve.batch"]
    if ratio < BOUND:
        raise SystemExit(f"{ratio:.2f} times the rows/s of @serve.batch; the bound is {BOUND}")


def run(deployment: Any, name: str) -> Any:
    return serve.run(deployment.bind(), name=name, route_prefix=f"/{name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            num_cpus=8, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, _temp_dir=folder
        )
        try:
            asyncio.run(measure())
        finally:
            with suppress(RuntimeError):  # where handles belong to the loop, which has gone
                serve.shutdown()
            ray.shutdown()
