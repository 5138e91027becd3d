"""Every accepted call ends exactly once, whatever happens: random histories, on virtual time and on real threads."""

import asyncio
import random
import threading

import anyio
import pytest
import torch
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault, QueueFull, ShapeError, SimulatedBackend
from aneuron.backends.simulated import SimulatedFault
from aneuron.errors import DeadlineExceeded
from aneuron.testing import PuppetBackend, run, settle


class BadRowError(Exception):
    """What the model raises for a row that says so."""


def model_of(x):
    """The answer names the rows; a row of -1 is one that the model refuses."""
    if (x < 0).any():
        raise BadRowError("a negative row")
    return x * 2 + 1


class Callers:
    """Random callers, each of which knows what it may get."""

    def __init__(self, seed, model):
        self.random = random.Random(seed)
        self.model = model
        self.tasks: list[asyncio.Task[str]] = []
        self.fates: dict[str, int] = {}
        self.closing = False
        self.largest_late = 0  # rows of the largest call that may have a deadline

    def add(self):
        self.tasks.append(asyncio.ensure_future(self.one()))

    async def one(self):
        fate = await self._one()
        self.fates[fate] = self.fates.get(fate, 0) + 1
        return fate

    async def _one(self):
        pick = self.random
        rows = pick.choice([1, 1, 1, 2, 3, 8, 9, 30])
        width = pick.choice([2, 2, 2, 3])
        x = torch.randint(0, 1000, (rows, width)).float()
        bad = pick.random() < 0.1
        if bad:
            x[pick.randrange(rows)] = -1
        patience = pick.choice([None, None, None, 0.0, 0.001, 0.01])
        model = self.terms(rows)
        try:
            if patience is None:
                y = await model(x)
            else:
                with anyio.move_on_after(patience) as scope:
                    y = await model(x)
                if scope.cancelled_caught:
                    return "scope"
        except BadRowError:
            assert bad, "somebody else's error"
            return "bad"
        except QueueFull:
            return "refused"
        except DeadlineExceeded:
            return "late"
        except Closed:
            assert self.closing, "closed by an internal error"
            return "closed"
        except (CoreFailed, OSError, SimulatedFault):  # or the device's own, where two cores have failed with it
            return "core"
        except ShapeError:
            return "shape"  # dynamic batching is off, and the rows are not those of all cores together
        assert not bad
        assert torch.equal(y, x * 2 + 1), "somebody else's rows"
        return "answer"

    def terms(self, rows):
        """The model on terms that a call may have."""
        pick = self.random
        if pick.random() < 0.4:
            return self.model
        timeout = pick.choice([None, None, 0, 0.0005, 0.003, 10]) if rows <= self.largest_late else None
        return self.model.options(timeout, pick.choice([0, 0, 1, -1.5]), pick.choice([None, "a", "b"]))

    def cancel_one(self):
        waiting = [task for task in self.tasks if not task.done()]
        if waiting:
            self.random.choice(waiting).cancel()

    async def finish(self):
        await asyncio.wait(self.tasks) if self.tasks else None
        for task in self.tasks:
            assert task.cancelled() or isinstance(task.result(), str)


def check_nothing_left(model, lanes):
    stats = model.statistics()
    calls = stats.calls
    assert calls.accepted == calls.completed + calls.failed + calls.cancelled
    assert (calls.waiting, calls.running, stats.waiting_rows) == (0, 0, 0)
    assert not lanes.futures.calls
    assert all(call.settled for call in lanes._scheduler.calls())
    bound = [call for lane in lanes.lanes for batch in lane.queue._queue for call, _, _ in batch.chunks]
    assert all(call.settled for call in bound)


async def history(seed, largest_late=1):
    pick = random.Random(seed)
    faults = {OSError: Fault.CORE}
    backend = PuppetBackend(pick.choice([1, 2, 3]), faults=faults, concurrent=pick.random() < 0.5)
    model = AsyncDataParallel(
        model_of,
        backend=backend,
        batch_size=pick.choice([None, 1, 4, 8]),
        num_workers=pick.choice([None, 1, 5]),
        max_pending=pick.choice([None, 10]),
        split_size=pick.choice([None, None, 2]),
        max_delay=pick.choice([0.0, 0.0, 0.002, None]),
        set_dynamic_batching=pick.choice([True, True, True, False]) or pick.random() < 0.5,
    )
    await model.start()
    lanes = model._lanes
    callers = Callers(seed, model)
    callers.largest_late = largest_late
    for _ in range(pick.randrange(5, 80)):
        event = pick.random()
        if event < 0.4:
            callers.add()
        elif event < 0.55:
            callers.cancel_one()
        elif event < 0.8:
            busy = [core for core in backend.loaded.values() if core.executing is not None]
            if busy:
                pick.choice(busy).release(OSError("device") if pick.random() < 0.05 else None)
        elif event < 0.83:
            model.num_workers = pick.randrange(1, 9)
        else:
            await asyncio.sleep(pick.choice([0, 0, 0, 0.001]))
    end = pick.choice([model.aclose, model.abort])
    callers.closing = True
    closing = asyncio.ensure_future(end())
    while not closing.done() or any(core.executing for core in backend.loaded.values()):
        for core in backend.loaded.values():
            if core.executing is not None:
                core.release()
        await settle(3)
    await closing
    await callers.finish()
    await settle()
    check_nothing_left(model, lanes)
    assert all(core.closed for core in backend.loaded.values())
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return callers.fates


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_random_histories_on_virtual_time(seed):
    run(history(seed))


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_the_histories_reach_every_fate():
    seen = set()
    for seed in range(60):
        seen |= set(run(history(seed)))
    assert {"answer", "bad", "scope", "refused", "closed", "core", "late"} <= seen


async def threaded(seed):
    async with asyncio.timeout(30):
        await _threaded(seed)


async def _threaded(seed):
    pick = random.Random(seed)
    faults = [SimulatedBackend.fault("core", probability=0.02)]
    backend = SimulatedBackend(
        cores=pick.choice([1, 3]), service_time=0.0005, copy_time=pick.choice([0.0, 0.0002]), faults=faults, seed=seed
    )
    model = AsyncDataParallel(
        model_of, backend=backend, batch_size=4, max_pending=40, max_delay=pick.choice([0, 0.001])
    )
    await model.start()
    lanes = model._lanes
    callers = Callers(seed, model)
    callers.largest_late = 1
    for _ in range(60):
        for _ in range(pick.randrange(8)):
            callers.add()
        if pick.random() < 0.5:
            callers.cancel_one()
        if pick.random() < 0.1:
            model.num_workers = pick.randrange(1, 9)
        await asyncio.sleep(pick.choice([0, 0, 0.0005]))
    callers.closing = True
    await pick.choice([model.aclose, model.abort])()
    await callers.finish()
    await asyncio.shield(lanes._closed)
    check_nothing_left(model, lanes)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("seed", range(8))
def test_random_histories_on_real_threads(seed, factory):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(threaded(seed))
    for thread in threading.enumerate():
        if thread.name.startswith("aneuron-core"):
            thread.join(5)
            assert not thread.is_alive()
