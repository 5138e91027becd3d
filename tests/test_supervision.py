"""Nothing dies silently: each background task, callback and thread is killed in turn, by an exception and by a
cancellation. Callers get an error before the clock moves, and `ready` turns false or the part restarts."""

import asyncio
import itertools

import pytest
import torch
from puppets import call, check_sum, release_all, row, scenario

from aneuron import AsyncDataParallel, Closed, Fault, SimulatedBackend
from aneuron.engine import health
from aneuron.engine.cores import SLOW_CLOSE
from aneuron.engine.execution import Execution
from aneuron.engine.health import FIRST
from aneuron.engine.lane import Lane
from aneuron.engine.run import SLOW_DRAIN
from aneuron.map.sources import LoopSource
from aneuron.map.window import _Window
from aneuron.testing import PuppetBackend, settle

pytestmark = pytest.mark.pure  # it puts functions that die into compiled classes

BUG = ZeroDivisionError("a bug")
DEATHS = [BUG, asyncio.CancelledError("from nowhere")]
ids = [type(death).__name__ for death in DEATHS]
every_death = pytest.mark.parametrize("death", DEATHS, ids=ids)
BACK = 1.25 * FIRST + 0.01  # seconds until a core is back for sure


def served(cores=1, **settings):
    backend = PuppetBackend(cores, faults={OSError: Fault.CORE}, concurrent=settings.pop("concurrent", False))
    settings.setdefault("batch_size", 4)
    return backend, AsyncDataParallel(torch.neg, backend=backend, **settings)


def kill(monkeypatch, owner, name, death, skip=0):
    """Have `owner.name` raise, from its call number `skip` on."""
    real, seen = getattr(owner, name), []

    def dying(*args, **kwargs):
        seen.append(name)
        if len(seen) > skip:
            raise death
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    return seen


async def all_end_at_once(model, calls):
    """Whoever waits gets an error without the clock moving, and nobody is told that all is well."""
    before = asyncio.get_running_loop().time()
    await settle(20)
    assert asyncio.get_running_loop().time() == before
    assert all(task.done() for task in calls), "somebody waits for what has died"
    assert not any(task.cancelled() for task in calls), "somebody else's cancellation"
    assert all(isinstance(task.exception(), Closed) for task in calls)
    assert not model.ready
    with pytest.raises(Closed, match="internal error"):
        await model(row(1))
    assert check_sum(model).running == 0
    await model.abort()


# The callbacks of the loop.


@every_death
@pytest.mark.parametrize("where", ["bind", "_dispatch_at", "expire"])
@scenario
async def test_dispatch_dies(monkeypatch, where, death):
    _, model = served(2, max_delay=1.0)
    await model.start()
    run = model._life.run
    executing = call(model, 1, rows=4)
    await settle()
    owner = {"bind": run.dispatcher.board, "_dispatch_at": run.dispatcher}.get(where, run)
    kill(monkeypatch, owner, where, death)
    if where == "expire":
        run.scheduler.late = [None]
    waiting = [call(model, n) for n in range(2)]  # held back, which takes a timer
    await all_end_at_once(model, [executing, *waiting])


@every_death
@scenario
async def test_a_dispatch_that_was_due_later_dies(monkeypatch, death):
    _, model = served(2, max_delay=1.0)
    await model.start()
    calls = [call(model, 1, rows=4), *(call(model, n) for n in range(2))]
    await settle()
    assert model._life.run.dispatcher._timer is not None
    kill(monkeypatch, model._life.run.scheduler, "bind", death)
    await asyncio.sleep(1.01)
    await all_end_at_once(model, calls)


@every_death
@pytest.mark.parametrize("where", ["settle", "_count"])
@scenario
async def test_delivery_dies(monkeypatch, where, death):
    backend, model = served()
    await model.start()
    calls = [call(model, n) for n in range(12)]
    await settle()
    kill(monkeypatch, model._life.run.settling, where, death)
    backend[0].release()
    await all_end_at_once(model, calls)


@every_death
@scenario
async def test_the_timer_of_a_deadline_dies(monkeypatch, death):
    _, model = served()
    await model.start()
    kill(monkeypatch, model._life.run.futures, "expire", death)
    calls = [call(model, 0, rows=4), asyncio.ensure_future(model.options(timeout=1.0)(row(1)))]
    await asyncio.sleep(1.01)
    await all_end_at_once(model, calls)


@every_death
@scenario
async def test_the_watch_for_hangs_dies(monkeypatch, death):
    _, model = served(exec_timeout=1.0)
    await model.start()
    calls = [call(model, n, rows=4) for n in range(2)]
    await settle()
    kill(monkeypatch, model._life.run, "running", death)
    await asyncio.sleep(1.01)
    await all_end_at_once(model, calls)


@every_death
@pytest.mark.parametrize("where", ["_load", "_loaded", "reload"])
@scenario
async def test_bringing_a_core_back_dies(monkeypatch, where, death):
    backend, model = served(2)
    await model.start()
    recovery = model._life.run.recovery
    calls = [call(model, n, rows=4) for n in range(2)]
    await settle()
    backend[0].release(OSError("the core"))
    kill(monkeypatch, recovery if where.startswith("_") else model._life.run, where, death)
    await settle()
    assert model.ready
    if where == "_load":  # bound before: the timer has it
        recovery._come_back_in(0, 0.1)
    await asyncio.sleep(BACK)
    await all_end_at_once(model, calls)


@every_death
@scenario
async def test_a_load_in_progress_dies_and_is_tried_again(monkeypatch, death):
    backend, model = served(1)
    await model.start()
    first = call(model, 1)
    await settle()
    load = backend.load
    kill(monkeypatch, backend, "load", death)
    backend[0].release(OSError("the core"))
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(BACK)
    assert not model.ready
    monkeypatch.setattr(backend, "load", load)
    await asyncio.sleep(4 * BACK)
    assert model.ready
    again = call(model, 2)
    await settle()
    backend[0].release()
    assert (await again)[0, 0] == -2
    await model.aclose()


@every_death
@scenario
async def test_a_resize_dies_and_the_slots_stay(monkeypatch, death):
    backend, model = served(2)
    async with model:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context["exception"]))
        seen = []
        with monkeypatch.context() as patch:
            kill(patch, model._life.run.dispatcher, "spread", death)
            model.num_workers = 7
            await settle()
        assert seen == [death]
        assert model.ready
        calls = [call(model, n, rows=4) for n in range(6)]
        await settle()
        await release_all(backend, *calls)


@scenario
async def test_the_task_of_a_start_is_cancelled():
    backend, model = served(2)
    calls = [call(model, n) for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    model._life._starting.task.cancel()
    await settle(20)
    assert model.ready  # those who waited have begun another
    await release_all(backend, *calls)
    await model.aclose()


@every_death
@scenario
async def test_what_says_that_a_core_is_closed_dies_and_the_close_ends(monkeypatch, death):
    backend, model = served(2)
    await model.start()
    kill(monkeypatch, model._life.run.cores, "_left", death)
    calls = [call(model, n, rows=4) for n in range(3)]
    await settle()
    await model.abort()
    await release_all(backend, *calls)
    await model.start()  # nothing of the old run is in its way
    await model.aclose()


@every_death
@pytest.mark.parametrize("where", ["_left", "check_closed"])
@scenario
async def test_a_drain_does_not_wait_for_what_has_died(monkeypatch, where, death):
    backend, model = served(2)
    await model.start()
    calls = [call(model, n, rows=4) for n in range(3)]
    await settle()
    kill(monkeypatch, model._life.run.cores, where, death)
    closing = asyncio.ensure_future(model.aclose())
    await release_all(backend, *calls)
    await asyncio.sleep(SLOW_CLOSE + 0.01)
    await settle()
    assert closing.done()
    assert not model.ready


@every_death
@scenario
async def test_the_log_of_a_slow_drain_dies_and_the_drain_goes_on(monkeypatch, death):
    backend, model = served()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context["exception"]))
    seen = []
    await model.start()
    first = call(model, 1)
    await settle()
    kill(monkeypatch, model._life.run, "_log_slow_drain", death)
    closing = asyncio.ensure_future(model.aclose())
    await asyncio.sleep(SLOW_DRAIN + 0.01)
    assert not closing.done()
    await release_all(backend, first, closing)
    assert seen in ([], [death])  # as the loop likes it


@every_death
@scenario
async def test_the_task_that_drains_a_swapped_model_dies(monkeypatch, death):
    backend, model = served(1)
    async with model:
        old = model._life.run
        first = call(model, 1, rows=9)  # a batch executes, two wait
        await settle()
        core = backend[0]
        if death is BUG:
            kill(monkeypatch, old.futures, "drained", death)
        swap = asyncio.ensure_future(model.swap(torch.neg))
        await settle()
        if death is not BUG:
            next(task for task in asyncio.all_tasks() if task.get_name() == "aneuron swap").cancel()
        await settle()
        assert isinstance(first.exception(), Closed)
        await asyncio.gather(swap, return_exceptions=True)
        core.release()
        await settle()
        assert core.closed
        assert not model._life.retired
        assert model.ready
        await release_all(backend, call(model, 2))


# The source of a map.


@every_death
@pytest.mark.parametrize("where", ["_refill", "_finished"])
@scenario
async def test_a_callback_of_a_map_dies(monkeypatch, where, death):
    backend, model = served()
    async with model:
        results = model.map(rows(), limit=2)
        kill(monkeypatch, _Window, where, death)
        consumer = asyncio.ensure_future(drain(results))
        for _ in range(5):
            await settle()
            if backend[0].executing is not None:
                backend[0].release()
        before = asyncio.get_running_loop().time()
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            await consumer
        assert asyncio.get_running_loop().time() == before
        assert model.ready


async def rows():
    for n in range(3):
        yield row(n)


async def drain(results):
    return [y async for y in results]


async def test_the_thread_that_reads_a_source_dies():
    model = AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.0))
    async with model:
        results = model.map((row(n) for n in itertools.count()), limit=2)
        assert (await anext(results))[0, 0] == 0

        def dying():
            raise BUG

        results._window.source._workers._inbox.put(dying)
        with pytest.raises(ZeroDivisionError):
            await wait_for_error(results)
        assert model.ready


@scenario
async def test_the_task_that_reads_a_source_is_cancelled():
    backend, model = served()

    async def source():
        yield row(1)
        await asyncio.Event().wait()

    async with model:
        results = model.map(source())
        consumer = asyncio.ensure_future(anext(results))
        await settle()
        await release_all(backend, consumer)
        waiting = asyncio.ensure_future(anext(results))
        await settle()
        (task,) = results._window.source.tasks
        assert isinstance(results._window.source, LoopSource)
        task.cancel()
        await settle(20)
        assert waiting.done()
        assert model.ready
        await results.aclose()


async def wait_for_error(results):
    async with asyncio.timeout(60.0):
        async for _ in results:
            pass


async def test_handing_over_what_a_thread_has_read_dies():
    model = AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.0))
    async with model:
        results = model.map((row(n) for n in itertools.count()), limit=2)
        assert (await anext(results))[0, 0] == 0
        window = results._window

        def start(element):
            raise BUG

        window.source._start = start
        window.source._arrived.append(row(5))
        window.source._hand_over()
        with pytest.raises(ZeroDivisionError):
            await wait_for_error(results)
        assert model.ready


# The worker threads, which are real ones: in each step, at the first batch after the model has served one.


@every_death
@pytest.mark.parametrize("step", ["prepare", "begin", "execute", "finish", "post", "_deliver", "take"])
@pytest.mark.parametrize("copy_time", [0.0, 0.001], ids=["one", "two"])
async def test_a_thread_dies(monkeypatch, step, death, copy_time):
    monkeypatch.setattr(health, "FIRST", 0.02)
    backend = SimulatedBackend(cores=2, service_time=0.001, copy_time=copy_time, submits=False)
    async with AsyncDataParallel(torch.neg, batch_size=4, backend=backend) as model:
        await model(row(1))
        run, died = model._life.run, []
        dispatcher = run.dispatcher
        real = {"post": dispatcher.post, "_deliver": None, "take": Lane.take}.get(step) or getattr(
            Execution, step, None
        )

        def dying(*args):
            if not died:
                died.append(step)
                raise death
            return real(*args)

        if step == "take":
            monkeypatch.setattr(Lane, "take", dying)
        elif step == "post":
            run._common.post = dying
        elif step == "_deliver":  # it does not come to the loop
            call_loop = dispatcher.call_loop
            patched = lambda callback: (dying if callback == dispatcher._deliver and not died else call_loop)(callback)  # noqa: E731
            monkeypatch.setattr(dispatcher, "call_loop", patched)
        else:
            monkeypatch.setattr(Execution, step, dying)
        async with asyncio.timeout(60.0):
            results = await asyncio.gather(*(model(row(n)) for n in range(40)))
            assert [y[0, 0].item() for y in results] == [-n for n in range(40)]
            assert died
            while not all(core.state in ("ready", "suspect") for core in model.statistics().cores):
                await asyncio.sleep(0.005)
        assert model.ready
        check_sum(model)


@every_death
async def test_what_a_thread_decides_dies(monkeypatch, death):
    """Under the lock: who knows what is left of the queue."""
    model = AsyncDataParallel(
        torch.neg, batch_size=4, backend=SimulatedBackend(cores=2, service_time=0.001, submits=False)
    )
    await model.start()
    await model(row(1))
    kill(monkeypatch, model._life.run.dispatcher.board, "next", death)
    async with asyncio.timeout(60.0):
        outcomes = await asyncio.gather(*(model(row(n)) for n in range(40)), return_exceptions=True)
    assert all(isinstance(outcome, Closed) for outcome in outcomes)
    assert not model.ready
    await model.abort()
