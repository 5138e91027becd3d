"""A batch that waits behind another goes to a lane that is free: between real threads, and from one to the other."""

import asyncio
import threading

import pytest
import torch

from aneuron import AsyncDataParallel, Fault, Pool

pytestmark = pytest.mark.core


class GatedBackend:
    """Cores whose executions wait, once there are gates, until their core's is open."""

    name = "gated"
    recoverable = True

    def __init__(self):
        self.gates = [threading.Semaphore(0), threading.Semaphore(0)]
        self.gated = False
        self.executed = []

    def cores(self):
        return [0, 1]

    def load(self, model, core_id, batch_size):
        return GatedCore(self, core_id)

    def classify(self, error):
        return Fault.INPUT


class GatedCore:
    concurrent = False

    def __init__(self, backend, core_id):
        self.backend, self.core_id = backend, core_id

    def execute(self, args, kwargs):
        (x,) = args
        self.backend.executed.append((self.core_id, x[0, 0].item()))
        if self.backend.gated:
            assert self.backend.gates[self.core_id].acquire(timeout=60.0)
        return x + 1

    def close(self):
        pass


async def test_a_batch_that_was_stolen_is_not_executed_where_it_waited(caplog):
    backend = GatedBackend()
    large = torch.zeros(1, 1 << 19)  # two megabytes: copied by a second thread of the lane
    pool = Pool(backend=backend, num_workers=4)
    async with pool, AsyncDataParallel(torch.neg, pool=pool, batch_size=1, example_inputs=(large,)) as model:
        board = pool._dispatcher.board
        lanes = board.lanes
        while not board.slots.staging:
            await asyncio.gather(*[model(large) for _ in range(4)])
        backend.executed.clear()
        backend.gated = True
        calls = [asyncio.ensure_future(model(large + value)) for value in range(3)]
        while not any(bound.staged for bound in lanes):
            await asyncio.sleep(0.001)
        (waits,) = [index for index, bound in enumerate(lanes) if bound.staged]
        ((execution,),) = [bound.staged for bound in lanes if bound.staged]
        stolen = execution.prepared[0][0][0, 0].item()
        backend.gates[1 - waits].release()
        while (1 - waits, stolen) not in backend.executed:
            await asyncio.sleep(0.001)
        backend.gates[waits].release(8)
        backend.gates[1 - waits].release(8)
        for value, result in enumerate(await asyncio.gather(*calls)):
            assert torch.equal(result, large + value + 1)
    assert sorted(value for _, value in backend.executed) == [0.0, 1.0, 2.0]
    assert not caplog.records  # the lanes have not failed since
