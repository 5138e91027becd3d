"""What threads do to one another, with real ones: the lanes', those that read and change, those that call."""

import asyncio
import threading

import pytest
import torch

from aneuron import AsyncDataParallel, CpuBackend

pytestmark = pytest.mark.core

PATIENCE = 60.0  # seconds after which a test that hangs is over


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_was_stolen_is_not_executed_where_it_was_prepared_as_well():
    """The thread that has prepared it waits for its core meanwhile, and then finds it gone."""
    gates = {value: threading.Event() for value in (1.0, 2.0, 3.0)}
    began = {}  # the cores, by value

    def gated(x):
        value = x[0, 0].item()
        if value in gates:
            began.setdefault(value, []).append(int(threading.current_thread().name.partition("/")[0][-1]))
            gates[value].wait(PATIENCE)
        return -x

    def large(value):
        return torch.full((4, 1 << 16), value)

    async with AsyncDataParallel(gated, batch_size=4, num_workers=4, backend=CpuBackend(cores=2)) as model:
        await asyncio.gather(*[model(large(0.0)) for _ in range(20)])  # copying them takes long: threads prepare ahead
        lanes = model._life.run.dispatcher.board.lanes
        calls = []
        for value in gates:
            calls.append(asyncio.ensure_future(model(large(value))))
            await until(lambda value=value: value in began or any(lane.staged for lane in lanes))
        (behind,) = [index for index, lane in enumerate(lanes) if lane.staged]
        first, other = sorted((1.0, 2.0), key=lambda value: began[value] != [behind])
        gates[other].set()
        await until(lambda: 3.0 in began)
        gates[first].set()
        await calls[int(first) - 1]
        await model(large(0.0))  # by the thread that had prepared what was stolen, or after it
        gates[3.0].set()
        assert [(await each)[0, 0].item() for each in calls] == [-1.0, -2.0, -3.0]
    assert began == {first: [behind], other: [1 - behind], 3.0: [1 - behind]}
