"""One model takes the place of another while it serves."""

import asyncio
import threading

import pytest
import torch
from puppets import check_sum, row, scenario

from aneuron import AsyncDataParallel, Closed, CoreFailed, CpuBackend, Fault, ShapeError, SimulatedBackend
from aneuron.testing import PuppetBackend, settle


def plus(n):
    return lambda x: x + n


class Backend(PuppetBackend):
    """All cores that were ever loaded, by model and core id."""

    def __init__(self, cores=2, **settings):
        super().__init__(cores, faults={OSError: Fault.CORE}, **settings)
        self.every, self.fail, self.on_load = [], set(), None

    def load(self, model, core_id, batch_size):
        if self.on_load is not None:
            self.on_load(core_id)
        if (model, core_id) in self.fail:
            raise OSError(f"core {core_id} does not load it")
        core = super().load(model, core_id, batch_size)
        self.every.append(core)
        return core

    def of(self, model):
        return [core for core in self.every if core._model is model]

    async def release_all(self, *tasks):
        while not all(task.done() for task in tasks):
            for core in self.every:
                if core.executing is not None:
                    core.release()
            await settle()


OLD, NEW = plus(0), plus(100)


def served(cores=2, **settings):
    backend = Backend(cores)
    settings.setdefault("batch_size", 4)
    return backend, AsyncDataParallel(OLD, backend=backend, **settings)


def call(model, value, rows=1):
    return asyncio.ensure_future(model(row(value, rows)))


def values(tasks):
    return [sorted(set(task.result()[:, 0].tolist())) for task in tasks]


@scenario
async def test_a_new_model_is_not_held_to_the_times_of_the_old_one():
    pace = [1.0]
    for started in (True, False):
        model = AsyncDataParallel(OLD, backend=Backend(1, service_time=lambda rows: pace[0]), batch_size=4)
        pace[0] = 1.0
        async with model:
            for n in range(5):
                await model(row(n))
            if started:
                await model.swap(NEW)
        if not started:
            await model.swap(NEW)
        pace[0] = 0.01
        async with model:
            assert dict(model.statistics().cores[0].services) == {}
            assert (await model.options(timeout=0.5)(row(1)))[0, 0] == 101  # not refused for want of time
            assert dict(model.statistics().cores[0].services) == pytest.approx({(4, 0): 0.01})


@scenario
async def test_the_last_calls_of_the_old_model_do_not_say_how_fast_the_new_one_is():
    backend, model = served(1)
    async with model:
        old = call(model, 1)
        await settle()
        swap = asyncio.ensure_future(model.swap(NEW))
        await settle()
        await asyncio.sleep(5.0)  # of virtual time
        await backend.release_all(old, swap)
        new = call(model, 2)
        await settle()
        assert dict(model.statistics().cores[0].services) == {}
        await backend.release_all(new)
        assert dict(model.statistics().cores[0].services) == {(4, 0): 0.0}


@scenario
async def test_calls_made_before_are_the_old_models_and_calls_made_after_are_the_new_ones():
    backend, model = served()
    async with model:
        before = [call(model, n, rows=9) for n in range(4)]
        await settle()
        swap = asyncio.ensure_future(model.swap(NEW))
        await settle()
        assert model.ready
        assert not swap.done()  # the old one has calls left
        after = [call(model, n, rows=9) for n in range(4)]
        await settle()
        assert check_sum(model).waiting >= 1
        await backend.release_all(*before, *after)
        await swap
        assert values(before) == [[n] for n in range(4)]  # wholly
        assert values(after) == [[100 + n] for n in range(4)]
        assert all(core.closed for core in backend.of(OLD))
        assert not any(core.closed for core in backend.of(NEW))
        assert [core.state for core in model.statistics().cores] == ["ready", "ready"]
        calls = check_sum(model)
        assert (calls.accepted, calls.completed) == (8, 8)
    assert all(core.closed for core in backend.of(NEW))
    assert [core.state for core in model.statistics().cores] == ["closed", "closed"]


@scenario
async def test_the_old_model_serves_while_the_new_one_loads_on_one_core_after_the_other():
    backend, model = served(cores=3)
    async with model:
        seen = []
        backend.on_load = lambda core_id: seen.append((core_id, model.ready, model.statistics().cores[core_id].state))
        await model.swap(NEW)
        assert seen == [(core_id, True, "ready") for core_id in range(3)]


@scenario
async def test_if_one_core_does_not_load_it_the_old_one_stays_everywhere():
    backend, model = served(cores=3)
    async with model:
        backend.fail = {(NEW, 1)}
        with pytest.raises(OSError, match="core 1 does not load it"):
            await model.swap(NEW)
        await settle()
        assert all(core.closed for core in backend.of(NEW))
        assert not any(core.closed for core in backend.of(OLD))
        assert [core.state for core in model.statistics().cores] == ["ready"] * 3
        task = call(model, 5)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[5]]
        backend.fail = set()
        await model.swap(NEW)  # it may be tried again
        task = call(model, 5)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[105]]
        await asyncio.sleep(1000.0)
        assert len(backend.of(OLD)) == 3


@scenario
async def test_a_core_that_is_out_of_service_may_miss_the_swap_and_one_that_serves_may_not():
    backend, model = served(cores=2)
    async with model:
        task = call(model, 1)
        await settle()
        lost = next(core for core in backend.of(OLD) if core.executing is not None)
        lost.release(OSError("lost"))
        await settle()
        await backend.release_all(task)
        serving = 1 - lost.core_id
        backend.fail = {(NEW, serving)}
        with pytest.raises((CoreFailed, OSError)):
            await model.swap(NEW)
        backend.fail = {(NEW, lost.core_id)}
        await model.swap(NEW)
        assert sorted(core.state for core in model.statistics().cores) == ["quarantined", "ready"]
        backend.fail = set()
        await asyncio.sleep(10.0)
        assert "quarantined" not in [core.state for core in model.statistics().cores]


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: x[:, :1], "a row of example_inputs gives"),
        (lambda x: (x, x), "a row of example_inputs gives"),
        (lambda x: x @ torch.zeros(7, 7), "does not take example_inputs"),
    ],
)
@scenario
async def test_a_model_of_other_shapes_changes_nothing(new, words):
    backend, model = served(example_inputs=row(rows=4))
    async with model:
        with pytest.raises(ShapeError, match=words):
            await model.swap(new)
        await settle()
        task = call(model, 5)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[5]]
        assert all(core.closed for core in backend.of(new))


@scenario
async def test_models_for_other_sizes_are_refused():
    backend = Backend()
    async with AsyncDataParallel({1: OLD, 4: OLD}, backend=backend) as model:
        for other in ({1: NEW, 8: NEW}, {1: NEW}, NEW):
            with pytest.raises(ShapeError):
                await model.swap(other)
        await model.swap({1: NEW, 4: NEW})
        task = call(model, 5)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[105]]


@scenario
async def test_a_model_that_is_not_started_starts_with_the_new_one():
    backend, model = served()
    await model.swap(NEW)
    assert not backend.every
    async with model:
        task = call(model, 5)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[105]]


@scenario
async def test_a_restart_is_with_the_new_one():
    backend, model = served()
    async with model:
        await model.swap(NEW)
    async with model:
        task = call(model, 5)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[105]]


@pytest.mark.parametrize("nonsense", [None, 3, {}, {0: NEW}])
@scenario
async def test_what_is_no_model_changes_nothing(nonsense):
    _, model = served()
    async with model:
        with pytest.raises((TypeError, ValueError)):
            await model.swap(nonsense)
        assert model.ready


@pytest.mark.parametrize("end", ["aclose", "abort"])
@scenario
async def test_a_close_while_the_old_model_has_calls_left_ends_both(end):
    backend, model = served()
    await model.start()
    before = call(model, 1, rows=9)
    await settle()
    swap = asyncio.ensure_future(model.swap(NEW))
    await settle()
    after = call(model, 2)
    await settle()
    closing = asyncio.ensure_future(getattr(model, end)())
    await settle()
    if end == "aclose":
        assert not closing.done()
        await backend.release_all(before, after)
        assert values([before, after]) == [[1], [102]]
    await closing
    await backend.release_all(before, after)
    for core in backend.every:  # what executes is left to finish
        if core.executing is not None:
            core.release()
    await asyncio.gather(before, after, swap, return_exceptions=True)
    assert all(core.closed for core in backend.every)
    check_sum(model)


@pytest.mark.parametrize("wait", range(8))
@pytest.mark.parametrize("end", ["aclose", "abort"])
@scenario
async def test_a_close_while_the_new_model_is_loaded_is_a_close(end, wait):
    """At whichever iteration of the loop it comes, and with calls that are still to be finished."""
    backend, model = served()
    await model.start()
    before = call(model, 1, rows=9)
    await settle()
    swap = asyncio.ensure_future(model.swap(NEW))
    for _ in range(wait):
        await asyncio.sleep(0)
    closing = asyncio.ensure_future(getattr(model, end)())
    for _ in range(20):
        await asyncio.sleep(0)
        assert not model.ready
    while not (closing.done() and before.done() and swap.done() and all(core.closed for core in backend.every)):
        for core in backend.every:
            if core.executing is not None:
                core.release()
        await settle()
    await asyncio.gather(before, swap, return_exceptions=True)
    assert not model.ready
    with pytest.raises(Closed):
        await model(row(1))
    assert not model._life.retired


@scenario
async def test_a_swap_that_is_cancelled_after_the_switch_goes_on():
    backend, model = served()
    async with model:
        before = call(model, 1, rows=9)
        await settle()
        swap = asyncio.ensure_future(model.swap(NEW))
        await settle()
        swap.cancel()
        await asyncio.gather(swap, return_exceptions=True)
        after = call(model, 2)
        await settle()
        await backend.release_all(before, after)
        assert values([before, after]) == [[1], [102]]
        await settle()
        assert all(core.closed for core in backend.of(OLD))


@scenario
async def test_a_swap_beside_a_swap_is_refused_and_one_after_the_other_is_not():
    backend, model = served()
    async with model:
        first = asyncio.ensure_future(model.swap(NEW))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another swap"):
            await model.swap(OLD)
        await first
        await model.swap(plus(7))
        task = call(model, 1)
        await settle()
        await backend.release_all(task)
        assert values([task]) == [[8]]


class Slow(CpuBackend):
    """Loads of the new model take until they are let through."""

    def __init__(self):
        super().__init__(cores=2)
        self.go, self.reached = threading.Event(), threading.Event()

    def load(self, model, core_id, batch_size):
        if getattr(model, "slow", False):
            self.reached.set()
            assert self.go.wait(60)
        return super().load(model, core_id, batch_size)


class Slowly(torch.nn.Module):
    slow = True

    def forward(self, x):
        return x + 100


async def test_cancelled_or_closed_while_it_loads():
    for how in ("cancel", "close"):
        backend = Slow()
        model = AsyncDataParallel(torch.nn.Identity().eval(), backend=backend, batch_size=4)
        await model.start()
        swap = asyncio.ensure_future(model.swap(Slowly().eval()))
        await asyncio.to_thread(backend.reached.wait, 20)
        assert (await model(row(5)))[0, 0] == 5  # served meanwhile
        if how == "cancel":
            swap.cancel()
            with pytest.raises(asyncio.CancelledError):
                await swap
            backend.go.set()
            assert (await model(row(5)))[0, 0] == 5
            await model.aclose()
        else:
            closing = asyncio.ensure_future(model.aclose())
            await asyncio.sleep(0.01)
            backend.go.set()
            await closing
            with pytest.raises(Closed):
                await swap


async def test_under_load_on_real_threads_no_call_fails_and_versions_only_grow():
    backend = SimulatedBackend(cores=3, service_time=0.001)
    version = [lambda x, n=n: x * 0 + n for n in range(5)]
    async with AsyncDataParallel(version[0], backend=backend, batch_size=4, example_inputs=row(rows=4)) as model:
        stop = False

        async def caller(rows):
            seen = [0.0]
            while not stop:
                answer = set((await model(row(1, rows)))[:, 0].tolist())
                assert len(answer) == 1  # wholly by one of them
                seen.append(answer.pop())
            assert seen == sorted(seen)
            return seen[-1]

        callers = [asyncio.ensure_future(caller(rows)) for rows in (1, 1, 1, 3, 9, 30)]
        for new in version[1:]:
            await asyncio.sleep(0.02)
            await model.swap(new)
        await asyncio.sleep(0.02)
        stop = True
        assert await asyncio.gather(*callers) == [4.0] * 6
        assert check_sum(model).failed == 0
