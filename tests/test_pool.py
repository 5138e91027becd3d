"""Several models on the cores of one pool, on virtual time: what one of them does is the others' affair no further than
its share."""

import asyncio
import copy
import math
import pickle
import threading
from concurrent.futures import Future

import pytest
import torch
from puppets import call, check_sum, named, row, scenario

from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault, NoHealthyCores, Pool, QueueFull
from aneuron.engine.health import FIRST
from aneuron.errors import DeadlineExceeded
from aneuron.sched.shares import Shares
from aneuron.testing import PuppetBackend, VirtualTimeLoop, settle

pytestmark = pytest.mark.core

BACK = 1.25 * FIRST + 0.01  # seconds until a core is back for sure


def double(x):
    return x * 2


def negate(x):
    return -x


def add(x):
    return x + 100


class Cores(PuppetBackend):
    """Puppets of several models on the same lanes."""

    def __init__(self, cores=2, **settings):
        super().__init__(cores, faults={OSError: Fault.CORE, SystemError: Fault.FATAL}, **settings)
        self.made, self.hung, self.unloadable, self.loads = [], [], set(), []

    def workers(self, name):
        self.made.append(super().workers(name))
        return self.made[-1]

    def load(self, model, core_id, batch_size):
        self.loads.append((model, core_id))
        if (model, core_id) in self.unloadable:
            raise OSError("does not load")
        return super().load(model, core_id, batch_size)

    def executing(self):
        """What has begun and not ended, by core; not what hangs."""
        found = [each.current for each in self.made if each.current is not None and each.current not in self.hung]
        return {each.loaded.core_id: each for each in found}

    def running(self):
        """Whose it is."""
        return {core: execution.core._model for core, execution in self.executing().items()}

    def release(self, core=0, error=None):
        self.executing()[core].core.release(error)

    def hang(self, core=0):
        self.hung.append(self.executing()[core])

    async def finish(self, *tasks):
        while not all(task.done() for task in tasks):
            for core in self.executing():
                self.release(core)
            await settle()


def served(cores=2, models=(double, negate), num_workers=None, weights=(1.0,) * 3, batch_size=4, each=None, **settings):
    """A backend, a pool, and models on it; `each` are settings of the first, the others' are `settings`."""
    backend = Cores(cores, **{name: settings.pop(name) for name in ("service_time", "concurrent") if name in settings})
    pool = Pool(backend=backend, num_workers=num_workers)
    made = [
        AsyncDataParallel(
            model, pool=pool, batch_size=batch_size, weight=weight, **(settings | ((each or {}) if not index else {}))
        )
        for index, (model, weight) in enumerate(zip(models, weights, strict=False))
    ]
    return backend, pool, *made


async def start(*models):
    for model in models:
        await model.start()


async def end(pool):
    await pool.aclose()
    assert pool.statistics().models == ()
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


def states(model):
    return [core.state for core in model.statistics().cores]


async def flood(model, stop, callers=16):
    """Callers that call again at once, until told; what became of them."""
    fates = []

    async def caller():
        while not stop.is_set():
            try:
                await model(row(1, 4))
                fates.append("ok")
            except Exception as error:
                fates.append(type(error).__name__)
                await asyncio.sleep(0.001)

    await asyncio.gather(*[caller() for _ in range(callers)])
    return fates


def busy(model):
    return sum(core.busy_seconds for core in model.statistics().cores)


# What they have.


@pytest.mark.parametrize("count", [2, 3])
@scenario
async def test_each_model_answers_its_own_calls_on_every_core(count):
    backend, pool, *models = served(2, (double, negate, add)[:count], service_time=0.001)
    calls = [call(model, value, 3) for value in range(20) for model in models]
    await asyncio.gather(*calls)
    for index, task in enumerate(calls):
        model = (double, negate, add)[index % count]
        assert torch.equal(task.result(), model(row(index // count, 3)))
    assert sorted(core for _, core in backend.loads) == [0] * count + [1] * count
    for model in models:
        assert check_sum(model).completed == 20
        assert all(core.batches for core in model.statistics().cores)
    await end(pool)


@scenario
async def test_statistics_of_each_model_and_of_the_pool():
    backend, pool, a, b = served(2, weights=(2.0, 1.0))
    assert pool.statistics().cores == ()
    await start(a, b)
    calls = [call(a, 1, 4), call(b, 2, 4), call(b, 3, 4), call(a, 4, 1)]
    await settle()
    seen = pool.statistics()
    assert (seen.cores, seen.slots, seen.in_flight) == ((0, 1), (2, 2), (1, 1))
    assert [(share.weight, share.in_flight, share.waiting_rows) for share in seen.models] == [(2.0, 1, 1), (1.0, 1, 4)]
    assert [core.in_flight for core in a.statistics().cores] == [1, 0]
    assert [core.in_flight for core in b.statistics().cores] == [0, 1]
    assert (a.statistics().waiting_rows, b.statistics().waiting_rows) == (1, 4)
    await asyncio.sleep(0.25)
    await backend.finish(*calls)
    first, second = pool.statistics().models
    assert (first.busy_seconds, second.busy_seconds) == (pytest.approx(0.25), pytest.approx(0.25))
    assert (busy(a), busy(b)) == (pytest.approx(0.25), pytest.approx(0.25))
    assert pool.num_workers == a.num_workers == b.num_workers == 4
    await end(pool)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 3.0, 4.0)])
@scenario
async def test_saturated_models_share_the_cores_by_weight(weights):
    _backend, pool, *models = served(3, (double, negate, add), weights=weights, service_time=0.001)
    stop = asyncio.Event()
    await start(*models)
    floods = [asyncio.ensure_future(flood(model, stop)) for model in models]
    await asyncio.sleep(0.7)  # 2,100 executions
    had = [share.busy_seconds for share in pool.statistics().models]
    for seconds, weight in zip(had, weights, strict=True):
        assert seconds / sum(had) == pytest.approx(weight / sum(weights), rel=0.05)
    stop.set()
    await asyncio.gather(*floods)
    await end(pool)


@scenario
async def test_what_an_idle_model_leaves_is_the_others_at_once():
    _backend, pool, a, b = served(2, service_time=0.001)
    stop = asyncio.Event()
    await start(a, b)
    flooded = asyncio.ensure_future(flood(a, stop))
    await asyncio.sleep(0.5)
    assert busy(a) == pytest.approx(2 * 0.5, rel=0.02)
    stop.set()
    await flooded
    await end(pool)


@scenario
async def test_a_light_call_waits_for_one_execution_of_each_at_most_under_a_flood():
    _backend, pool, a, b, light = served(1, (double, negate, add), service_time=0.010)
    stop = asyncio.Event()
    await start(a, b, light)
    floods = [asyncio.ensure_future(flood(model, stop, 100)) for model in (a, b)]
    waited = []
    for pause in range(20):
        await asyncio.sleep(0.05 + pause / 1000)
        _, timing = await light.timed(row())
        waited.append(timing.queued)
    assert max(waited) <= 2 * 0.010 + 1e-9
    stop.set()
    await asyncio.gather(*floods)
    await end(pool)


@scenario
async def test_priorities_are_compared_across_models():
    backend, pool, a, b = served(1)
    await start(a, b)
    first = call(a, 0, 4)
    await settle()
    waiting = [
        call(a, 1, 4),
        call(a.options(priority=2.0), 2, 4),
        asyncio.ensure_future(b.options(priority=1.0)(row(3, 4))),
    ]
    began = []
    while not all(task.done() for task in (first, *waiting)):
        await settle()
        began.append(backend.executing()[0].prepared[0][0][0, 0].item())
        backend.release()
        await settle()
    assert began == [0, 2, 3, 1]
    await end(pool)


@scenario
async def test_a_deadline_is_judged_by_what_the_others_have_in_flight():
    _backend, pool, a, b = served(1, service_time=1.0)
    await start(a, b)
    await asyncio.gather(a(row(0, 4)), b(row(0, 4)))  # now it is known what one takes
    first = call(a, 1, 4)
    await settle()
    late = asyncio.ensure_future(b.options(timeout=1.5)(row()))
    in_time = asyncio.ensure_future(b.options(timeout=2.5)(row()))
    with pytest.raises(DeadlineExceeded):
        await late
    assert not in_time.done()
    await in_time
    await first
    assert b.statistics().calls.failed == 1
    await end(pool)


@scenario
async def test_time_that_two_models_executions_overlap_on_a_core_counts_once():
    backend, pool, a, b = served(1, concurrent=True, num_workers=2)
    await start(a, b)
    calls = [call(a, 1, 4), call(b, 1, 4)]
    await settle()
    await asyncio.sleep(1.0)
    await backend.finish(*calls)
    assert busy(a) + busy(b) == pytest.approx(1.0)
    assert [share.busy_seconds for share in pool.statistics().models] == pytest.approx([busy(a), busy(b)])
    await end(pool)


# Opened and closed.


@scenario
async def test_a_pool_starts_with_its_first_model_and_ends_with_its_last():
    _backend, pool, a, b = served(1, service_time=0.001)
    assert repr(pool).startswith("<Pool of <")
    await a(row())
    await b(row())
    lanes = pool._dispatcher
    await a.aclose()
    assert not lanes.stopped
    assert torch.equal(await b(row(3)), -row(3))
    await b.aclose()
    assert lanes.stopped
    await start(a)
    assert pool._dispatcher is not lanes
    assert torch.equal(await a(row(3)), 2 * row(3))
    await end(pool)


@scenario
async def test_while_it_is_entered_its_threads_stay():
    _backend, pool, a, b = served(1, service_time=0.001)
    async with pool:
        async with a:
            await a(row())
        lanes = pool._dispatcher
        assert not lanes.stopped
        async with b:
            await b(row())
        assert pool._dispatcher is lanes
        assert pool.statistics().models == ()
    assert lanes.stopped
    async with b:  # without
        await b(row())
    assert pool._dispatcher.stopped


@scenario
async def test_leaving_it_finishes_what_its_models_have_accepted():
    backend, pool, a, b = served(1)
    async with pool:
        await start(a, b)
        calls = [call(a, 1), call(b, 2)]
        await settle()
        asyncio.get_running_loop().call_later(1.0, lambda: asyncio.ensure_future(backend.finish(*calls)))
    assert torch.equal(calls[0].result(), row(2))
    assert torch.equal(calls[1].result(), row(-2))


@scenario
async def test_leaving_it_with_an_error_does_not_wait_for_what_has_not_begun():
    backend, pool, a, b = served(1)
    with pytest.raises(KeyError):  # noqa: PT012
        async with pool:
            await start(a, b)
            calls = [call(a, 1), call(b, 2)]
            await settle()
            raise KeyError
    await settle()
    assert isinstance(calls[1].exception(), Closed)
    backend.release()
    await settle()
    assert torch.equal(calls[0].result(), row(2))


@scenario
async def test_a_pool_that_is_closed_closes_its_models_and_their_calls_say_so():
    _backend, pool, a, b, never = served(2, (double, negate, add), service_time=0.1)
    await start(a, b)
    accepted = [call(model, value) for model in (a, b) for value in range(5)]
    await settle()
    closing = asyncio.ensure_future(pool.aclose())
    await asyncio.sleep(0)
    for use in (lambda: a(row()), a.start, lambda: never(row())):
        with pytest.raises(Closed, match=r"the pool (was|is being) closed"):
            await use()
    with pytest.raises(Closed, match="the pool is being closed; start"):
        await never.start()
    await closing
    assert all(torch.equal(task.result(), row(value * factor)) for task, (factor, value) in zip(
        accepted, [(factor, value) for factor in (2, -1) for value in range(5)], strict=True))  # fmt: skip
    for model in (a, b, never):
        with pytest.raises(Closed, match=r"the pool was closed, and this model with it; start\(\) opens both again"):
            await model(row())
        assert not model.ready
    await a.start()
    assert torch.equal(await a(row(1)), row(2))
    await a.aclose()
    with pytest.raises(Closed, match="the model is closed"):
        await a(row())
    await pool.aclose()
    await pool.aclose()


@scenario
async def test_a_close_that_is_cancelled_ends_what_has_not_begun():
    backend, pool, a, b = served(1)
    async with pool:
        await start(a, b)
        calls = [call(a, 1), call(b, 2)]
        await settle()
        closing = asyncio.ensure_future(pool.aclose())
        await settle()
        assert not closing.done()
        closing.cancel()
        await settle()
        assert closing.cancelled()
        assert isinstance(calls[1].exception(), Closed)
        backend.release()
        await settle()
        assert calls[0].done()
        assert pool._dispatcher.stopped


@scenario
async def test_closing_a_pool_that_nobody_has_started():
    _backend, pool, a = served(1, (double,))
    await pool.aclose()
    with pytest.raises(Closed, match="the pool was closed"):
        await a(row())


class Slow(Cores):
    """Its models load when told."""

    def __init__(self, cores=1, **settings):
        super().__init__(cores, **settings)
        self.asked = []

    def workers(self, name):
        workers = super().workers(name)
        if name == "aneuron-start" or "core" in name:
            real, wait = workers.submit, self.wait

            def submit(fn, /, *args):
                future = Future()

                def later():
                    done = real(fn, *args)
                    error = done.exception()
                    future.set_exception(error) if error else future.set_result(done.result())

                wait(later)
                return future

            workers.submit = submit
        return workers

    def wait(self, later):
        asyncio.get_running_loop().call_later(1.0, later)


@scenario
async def test_a_model_that_is_being_loaded_while_the_last_one_leaves_serves():
    for pause in (0.5, 1.5, 2.5, 3.5):
        backend = Slow(1, service_time=0.001)
        pool = Pool(backend=backend)
        a, b = (AsyncDataParallel(model, pool=pool, batch_size=4) for model in (double, negate))
        await a.start()
        starting = asyncio.ensure_future(b.start())
        await asyncio.sleep(pause)
        await a.aclose()
        await starting
        assert torch.equal(await b(row(1)), row(-1))
        await b.aclose()
        assert pool._dispatcher.stopped


@scenario
async def test_a_model_that_is_being_loaded_when_the_pool_is_closed_is_not_served():
    backend = Slow(1)
    pool = Pool(backend=backend)
    a, b = (AsyncDataParallel(model, pool=pool, batch_size=4) for model in (double, negate))
    await a.start()
    starting = asyncio.ensure_future(b(row()))
    await asyncio.sleep(0.5)
    await pool.aclose()
    with pytest.raises(Closed, match="the pool was closed"):
        await starting
    await asyncio.sleep(10)
    assert pool._dispatcher.stopped
    assert pool.statistics().models == ()


@scenario
async def test_models_started_at_once_share_one_set_of_lanes():
    _backend, pool, *models = served(2, (double, negate, add), service_time=0.001)
    await asyncio.gather(*[model.start() for model in models])
    assert len(pool.statistics().models) == 3
    assert len({model._life.run.dispatcher for model in models}) == 1
    await end(pool)


# What one does to the others.


@scenario
async def test_a_hang_of_one_leaves_the_other_on_that_core():
    backend, pool, a, b = served(1, each={"exec_timeout": 1.0})
    await start(a, b)
    hung = call(a, 1)
    await settle()
    backend.hang()
    waiting = [call(b, value, 4) for value in range(3)]
    await asyncio.sleep(1.01)
    with pytest.raises(CoreFailed, match="exec_timeout=1 s"):
        await hung
    assert (states(a), states(b)) == (["quarantined"], ["ready"])
    await backend.finish(*waiting)
    assert [task.result()[0, 0].item() for task in waiting] == [0, -1, -2]
    assert b.statistics().calls.failed == 0
    with pytest.raises(NoHealthyCores):
        await a(row())
    await asyncio.sleep(BACK)
    again = call(a, 2)
    await settle()
    await backend.finish(again)
    assert states(a) == ["ready"]
    closing = asyncio.ensure_future(pool.aclose())
    await settle()
    backend.hung.clear()
    await backend.finish(closing)


@pytest.mark.parametrize("concurrent", [False, True])
@scenario
async def test_what_is_bound_behind_a_hang_runs_although_its_own_model_has_no_timeout(concurrent):
    backend, pool, a, b = served(1, each={"exec_timeout": 1.0}, concurrent=concurrent, num_workers=4)
    await start(a, b)
    hung = call(a, 1, 4)
    await settle()
    backend.hang()
    waiting = [call(b, value, 4) for value in range(6)]
    await settle()
    assert pool.statistics().in_flight == ((4,) if concurrent else (1,))
    await asyncio.sleep(1.01)
    assert isinstance(hung.exception(), CoreFailed)
    await backend.finish(*waiting)
    assert [task.result()[0, 0].item() for task in waiting] == [0, -1, -2, -3, -4, -5]
    backend.hung.clear()
    await backend.finish(asyncio.ensure_future(pool.aclose()))


@scenario
async def test_the_time_of_a_hang_is_charged_to_whose_it_is():
    backend, pool, a, b = served(1, each={"exec_timeout": 5.0})
    await start(a, b)
    hung = call(a, 1)
    await settle()
    backend.hang()
    await asyncio.sleep(5.01)
    assert isinstance(hung.exception(), CoreFailed)
    assert pool.statistics().models[0].busy_seconds == pytest.approx(5.0)
    backend.hung.clear()
    await backend.finish(asyncio.ensure_future(pool.aclose()))


@scenario
async def test_a_core_fault_takes_the_core_from_whose_it_is_and_from_nobody_else():
    backend, pool, a, b = served(2)
    await start(a, b)
    failing = call(a, 1, 4)
    await settle()
    (core,) = backend.executing()
    backend.release(core, OSError("the core"))
    await settle()
    assert states(a)[core] == "quarantined"
    assert states(b) == ["ready", "ready"]
    waiting = [call(b, value, 4) for value in range(8)]
    await settle()
    assert backend.running()[core] is negate
    assert backend.running()[1 - core] is double  # its rows run again
    await backend.finish(failing, *waiting)
    assert torch.equal(failing.result(), row(2, 4))
    assert [core.batches for core in b.statistics().cores] != [0, 0]
    assert pool.statistics().slots == (2, 2)
    await end(pool)


@scenario
async def test_a_fatal_fault_of_one_leaves_the_other():
    backend, pool, a, b = served(2)
    await start(a, b)
    failing, fine = call(a, 1, 4), call(b, 2, 4)
    await settle()
    core = next(core for core, model in backend.running().items() if model is double)
    backend.release(core, SystemError("the process"))
    await settle()
    assert isinstance(failing.exception(), CoreFailed)
    assert (states(a), states(b)) == (["failed", "failed"], ["ready", "ready"])
    await backend.finish(fine)
    with pytest.raises(NoHealthyCores, match="restart the process"):
        await a(row())
    await end(pool)


@scenario
async def test_cores_that_fail_one_after_the_other_are_told_to_each_model_and_come_back():
    backend, pool, a, b = served(2)
    await start(a, b)
    for model in (a, b):
        for _ in range(2):
            task = call(model, 1, 4)
            await settle()
            while backend.executing():
                backend.release(next(iter(backend.executing())), OSError("gone"))
                await settle()
            assert task.done()
    for model in (a, b):
        assert states(model) == ["quarantined", "quarantined"]
        with pytest.raises(NoHealthyCores, match=r"gone") as caught:
            await model(row())
        assert 0 <= caught.value.retry_after <= BACK
    assert pool.statistics().slots == (0, 0)
    await asyncio.sleep(BACK)
    calls = [call(model, value, 4) for value in range(4) for model in (a, b)]
    await backend.finish(*calls)
    assert states(a) == states(b) == ["ready", "ready"]
    assert all(task.exception() is None for task in calls)
    await end(pool)


@scenario
async def test_errors_of_ones_rows_are_its_own():
    def strict(x):
        if (x < 0).any():
            raise ValueError("a negative row")
        return x

    _backend, pool, a, b = served(2, (strict, negate), service_time=0.01)
    await start(a, b)
    calls = [call(a, value - 2) for value in range(6)] + [call(b, value - 2) for value in range(6)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(result, ValueError) for result in results] == [True, True] + [False] * 10
    assert b.statistics().calls.failed == 0
    await end(pool)


@scenario
async def test_a_flood_is_refused_for_its_own_bound_only():
    backend, pool, a, b = served(1, each={"max_pending": 8})
    await start(a, b)
    calls = [call(a, value, 4) for value in range(6)]
    other = call(b, 1, 4)
    await settle()
    refused = [task for task in calls if task.done() and isinstance(task.exception(), QueueFull)]
    assert len(refused) == 3
    await backend.finish(*calls, other)
    assert torch.equal(other.result(), row(-1, 4))
    assert b.statistics().calls.refused == 0
    await end(pool)


@scenario
async def test_a_swap_of_one_leaves_the_other_and_both_versions_have_one_share():
    _backend, pool, a, b = served(1, service_time=0.01)
    stop = asyncio.Event()
    await start(a, b)
    floods = [asyncio.ensure_future(flood(model, stop, 40)) for model in (a, b)]
    await asyncio.sleep(1.0)
    before = busy(b)
    swapping = asyncio.ensure_future(a.swap(add))
    await settle()
    assert len(pool.statistics().models) == 2
    await asyncio.sleep(0.3)
    assert busy(b) - before == pytest.approx(0.15, abs=0.025)
    await swapping
    assert len(pool.statistics().models) == 2
    assert torch.equal(await a(row(1)), row(101))
    await asyncio.sleep(1.0)
    shares = pool.statistics().models
    assert shares[0].busy_seconds == pytest.approx(shares[1].busy_seconds, rel=0.05)
    stop.set()
    first, second = await asyncio.gather(*floods)
    assert set(first) == set(second) == {"ok"}
    await end(pool)


@scenario
async def test_a_load_that_fails_leaves_the_others_and_the_cores():
    backend, pool, a, b, bad = served(2, (double, negate, add), service_time=0.001)
    backend.unloadable = {(add, 1)}
    stop = asyncio.Event()
    await start(a, b)
    floods = [asyncio.ensure_future(flood(model, stop, 4)) for model in (a, b)]
    for _ in range(5):
        with pytest.raises(OSError, match="does not load"):
            await bad(row())
        assert len(pool.statistics().models) == 2
        await asyncio.sleep(0.01)
    backend.unloadable.clear()
    assert torch.equal(await bad(row(1)), row(101))
    stop.set()
    first, second = await asyncio.gather(*floods)
    assert set(first) == set(second) == {"ok"}
    await end(pool)


@pytest.mark.parametrize("way", ["aclose", "abort"])
@scenario
async def test_the_end_of_one_leaves_the_others(way):
    backend, pool, a, b = served(1)
    await start(a, b)
    calls = [call(model, value, 4) for value in range(3) for model in (a, b)]
    await settle()
    ending = asyncio.ensure_future(getattr(a, way)())
    await settle()
    await backend.finish(*calls, ending)
    of_a, of_b = calls[::2], calls[1::2]
    assert [task.result()[0, 0].item() for task in of_b] == [0, -1, -2]
    if way == "aclose":
        assert [task.result()[0, 0].item() for task in of_a] == [0, 2, 4]
    else:
        assert of_a[0].exception() is None  # it had begun
        assert all(isinstance(task.exception(), Closed) for task in of_a[1:])
    assert len(pool.statistics().models) == 1
    more = call(b, 7)
    await settle()
    await backend.finish(more)
    await a.start()
    again = call(a, 1)
    await settle()
    await backend.finish(again)
    assert torch.equal(again.result(), row(2))
    await end(pool)


@pytest.mark.pure
@scenario
async def test_a_bug_of_ours_ends_all_models_of_the_pool_and_a_start_opens_them(monkeypatch, caplog):
    backend, pool, a, b = served(1)
    async with pool:
        await start(a, b)
        calls = [call(model, value, 4) for value in range(3) for model in (a, b)]
        await settle()
        with monkeypatch.context() as patch:
            patch.setattr(Shares, "bind", lambda self, now: 1 / 0)
            calls.append(call(a))
            pool._dispatcher.dispatch_soon()
            await settle()
        for task in calls:
            assert isinstance(task.exception(), Closed)
            assert "internal error" in str(task.exception())
        assert (states(a), states(b)) == (["failed"], ["failed"])
        assert "the lanes failed" in caplog.text
        for model in (a, b):
            await model.aclose()
            await model.start()
        again = [call(a, 1), call(b, 1)]
        await settle()
        await backend.finish(*again)
        assert again[0].exception() is None
        backend.hung.clear()


# Lanes.


@scenario
async def test_an_idle_lane_steals_what_another_model_waits_for_behind_a_busy_one():
    backend, pool, a, b = served(2, concurrent=True, num_workers=4)
    await start(a, b)
    calls = [call(model, value, 4) for model in (a, b) for value in range(2)]
    await settle()
    assert pool.statistics().in_flight == (2, 2)
    for _ in range(2):
        backend.release(1)
        await settle()
    backend.release(1)  # taken from the other, which executes its first one still
    await settle()
    assert sum(task.done() for task in calls) == 3
    await backend.finish(*calls)
    await end(pool)


@scenario
async def test_a_lane_does_not_steal_what_its_core_cannot_run():
    backend, pool, a, b = served(2, concurrent=True, num_workers=4)
    await start(a, b)
    failing = call(b, 9, 4)
    await settle()
    (core,) = backend.executing()
    backend.release(core, OSError("the core"))
    await settle()
    await backend.finish(failing)
    other = 1 - core
    assert states(b)[core] == "quarantined"
    calls = [call(b, value, 4) for value in range(3)]
    await settle()
    assert set(backend.running()) == {other}
    mine = call(a, 1, 4)
    await settle()
    assert backend.running()[core] is double
    backend.release(core)
    await settle()
    assert mine.done()
    assert core not in backend.running()
    await backend.finish(*calls)
    await end(pool)


@scenario
async def test_min_cores_is_each_models_own():
    backend, pool, a, b = served(2, each={"min_cores": 1})
    backend.unloadable = {(double, 1)}
    await start(a, b)
    assert (states(a), states(b)) == (["ready", "quarantined"], ["ready", "ready"])
    calls = [call(b, value, 4) for value in range(2)]
    mine = [call(a, value, 4) for value in range(3)]
    await settle()
    backend.release(1)
    await settle()
    assert backend.running().get(1) is not double  # it waits for the core that it has
    await backend.finish(*mine, *calls)
    backend.unloadable.clear()
    await asyncio.sleep(BACK)
    assert states(a)[1] in ("ready", "suspect")
    await end(pool)


@scenario
async def test_num_workers_bounds_what_all_have_in_flight():
    backend, pool, a, b = served(2, num_workers=1)
    await start(a, b)
    calls = [call(model, value, 4) for value in range(2) for model in (a, b)]
    await settle()
    assert (pool.statistics().slots, sum(pool.statistics().in_flight)) == ((1, 0), 1)
    pool.num_workers = 2
    await settle()
    assert pool.statistics().in_flight == (1, 1)
    a.num_workers = 4
    await settle()
    assert (pool.num_workers, b.num_workers, pool.statistics().slots) == (4, 4, (2, 2))
    await backend.finish(*calls)
    await end(pool)


@scenario
async def test_a_model_that_is_out_on_the_only_lane_with_a_slot_has_one_elsewhere():
    backend, pool, a, b = served(2, num_workers=1)
    await start(a, b)
    failing = call(a, 1, 4)
    await settle()
    backend.release(0, OSError("the core"))
    await settle()
    assert backend.running() == {1: double}  # not after core 0 has come back
    assert pool.statistics().slots == (0, 1)  # which both can use
    other = call(b, 1, 4)
    await backend.finish(failing, other)
    backend.hung.clear()
    failing = call(b, 1, 4)
    await settle()
    backend.release(1, OSError("the core"))
    await settle()
    more = call(a, 2, 4)
    await settle()
    assert backend.running() == {0: negate, 1: double}  # one each: else one would wait for ever
    await backend.finish(failing, more)
    await end(pool)


@scenario
async def test_a_model_that_is_restarted_goes_on_where_the_others_are():
    _backend, pool, a, b = served(1, service_time=0.01)
    stop = asyncio.Event()
    await start(a, b)
    floods = [asyncio.ensure_future(flood(b, stop, 8))]
    await asyncio.sleep(1.0)
    await a.aclose()
    await a.start()
    floods.append(asyncio.ensure_future(flood(a, stop, 8)))
    before = busy(b)
    await asyncio.sleep(1.0)
    assert busy(b) - before == pytest.approx(0.5, abs=0.05)
    assert check_sum(a).failed == 0
    stop.set()
    await asyncio.gather(*floods)
    await end(pool)


# Bad input.


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, -math.inf, "2", None, True, [1.0], 10**400], ids=named)
def test_a_weight_is_a_finite_number_above_0(weight):
    with pytest.raises(ValueError, match=r"weight=.*: expected a finite number above 0; 2.0 is twice the share of 1.0"):
        AsyncDataParallel(double, pool=Pool(backend=Cores()), weight=weight)


@pytest.mark.parametrize("pool", ["cpu", 2, Pool, object(), {}], ids=named)
def test_a_pool_is_a_pool(pool):
    with pytest.raises(TypeError, match=r"pool=.*: expected an aneuron.Pool, or None for cores of its own"):
        AsyncDataParallel(double, pool=pool)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"device_ids": [0]}, r"device_ids=\[0\]"),
        ({"backend": "cpu"}, "backend='cpu'"),
        ({"num_workers": 2}, "num_workers=2"),
        ({"device_ids": [0], "num_workers": 3}, r"device_ids=\[0\], num_workers=3"),
    ],
    ids=named,
)
def test_whose_cores_they_are_is_said_once(said, words):
    with pytest.raises(ValueError, match=rf"{words} with pool=: the cores are the pool's; pass it to Pool\(...\)"):
        AsyncDataParallel(double, pool=Pool(), **said)


@pytest.mark.parametrize(
    "wrong", [{"device_ids": ["x"]}, {"backend": "tpu"}, {"backend": 3}, {"num_workers": 0}], ids=named
)
def test_a_pools_arguments_are_checked_as_a_models(wrong):
    with pytest.raises((ValueError, TypeError)) as of_pool:
        Pool(**wrong)
    with pytest.raises((ValueError, TypeError)) as of_model:
        AsyncDataParallel(double, **wrong)
    assert str(of_pool.value) == str(of_model.value)


@scenario
async def test_the_same_module_twice_on_a_pool_is_two_models():
    _backend, pool, a, b = served(1, (double, double), service_time=0.001)
    assert torch.equal(await a(row(1)), await b(row(1)))
    assert len(pool.statistics().models) == 2
    await a.aclose()
    assert torch.equal(await b(row(2)), row(4))
    await end(pool)


@scenario
async def test_a_model_that_is_started_twice_is_on_its_pool_once():
    backend, pool, a = served(1, (double,), service_time=0.001)
    await asyncio.gather(a.start(), a.start(), a(row()))
    await a.start()
    assert len(pool.statistics().models) == 1
    assert backend.loads == [(double, 0)]
    await end(pool)


def other_loop(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def test_a_pool_belongs_to_the_loop_of_its_models_until_the_last_is_closed():
    _backend, pool, a, b = served(1, service_time=0.001)
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(a.start())

        async def elsewhere():
            for use in (b.start, lambda: b(row()), pool.aclose, pool.__aenter__):
                with pytest.raises(RuntimeError, match="the pool runs on another event loop, and belongs to it until"):
                    await use()

        asyncio.set_event_loop(None)
        errors = []

        def run():
            try:
                other_loop(elsewhere())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
        assert not errors, errors
        runner.run(a.aclose())

    async def now():
        assert torch.equal(await b(row(1)), row(-1))
        await b.aclose()

    other_loop(now())


def test_a_pool_whose_loop_has_gone_is_anybodys():
    _backend, pool, a, b = served(1, service_time=0.001)
    for model in (a, b, a):
        other_loop(model.start())  # and never closed

    async def close():
        await b(row())
        await pool.aclose()

    other_loop(close())


def test_a_start_that_failed_does_not_tie_the_pool_to_its_loop():
    backend, pool, a, b = served(1, service_time=0.001)
    backend.unloadable = {(double, 0)}
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:

        async def fail():
            with pytest.raises(OSError, match="does not load"):
                await asyncio.gather(a.start(), a.start())

        runner.run(fail())
        assert pool._dispatcher.stopped
        backend.unloadable.clear()

        async def elsewhere():
            await a(row())
            await b(row())
            await pool.aclose()

        thread = threading.Thread(target=other_loop, args=[elsewhere()])
        thread.start()
        thread.join(60)
    assert a.statistics().calls.completed == 1


def test_pickled_models_take_their_pool_along_together():
    pool = Pool(backend="cpu", num_workers=3)
    a, b = (
        AsyncDataParallel(model, pool=pool, weight=weight) for model, weight in ((torch.neg, 2.0), (torch.abs, 1.0))
    )

    async def main():
        async with a:
            copies = pickle.loads(pickle.dumps([a, b]))
            assert copies[0]._pool is copies[1]._pool
            assert copies[0]._pool is not pool
            assert copies[0]._pool.given_num_workers == 3
            assert copies[0]._given["weight"] == 2.0
            assert not copies[0].ready
            assert copy.copy(a)._pool is pool
            assert copy.deepcopy(a)._pool is not pool

    asyncio.run(main())
