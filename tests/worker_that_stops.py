"""A worker that shares engines, in a process of its own: `worker_that_stops.py NAME`.

It says when it has made many calls, and when all are answered.
"""

import asyncio
import sys

import torch

from aneuron import AsyncDataParallel, Pool, SimulatedBackend


def shared(name: str) -> AsyncDataParallel:
    """The model, as all workers make it."""
    pool = Pool(backend=SimulatedBackend(cores=2, service_time=0.002), processes=1, share=name, linger=0.1)
    return AsyncDataParallel(torch.nn.ReLU().eval(), pool=pool, batch_size=8)


async def main(name: str) -> None:
    async with shared(name) as model:
        large, small = torch.ones(8, 1 << 14), torch.ones(1, 4)  # half a megabyte, which goes through shared memory
        calls = [asyncio.ensure_future(model(x)) for _ in range(400) for x in (large, small)]
        while model.statistics().calls.completed < 40:
            await asyncio.sleep(0)
        print("called", flush=True)
        answers = await asyncio.gather(*calls)
        assert all(bool((answer == 1).all()) for answer in answers)
        print("answered", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
