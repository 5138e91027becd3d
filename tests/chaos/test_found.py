"""What the schedules have found, each told as a story that fails without its mend."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from puppets import call, release_all, row, scenario

from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault, NoHealthyCores, Pool, SimulatedBackend
from aneuron.engine import recovery
from aneuron.engine.board import Board
from aneuron.remote.server import _Served
from aneuron.testing import PuppetBackend, settle

pytestmark = pytest.mark.core


@scenario
async def test_a_drain_gives_up_what_hangs_also_where_its_caller_has_left():
    backend = PuppetBackend(1)
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4, exec_timeout=5.0)
    await model.start()
    task = call(model, 1)
    await settle()
    task.cancel()
    await settle()
    await asyncio.wait_for(model.aclose(), 6.0)


@scenario
async def test_after_an_abort_a_hang_does_not_keep_its_caller_waiting():
    backend = PuppetBackend(1)
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4, exec_timeout=5.0)
    await model.start()
    task = call(model, 1)
    await settle()
    await model.abort()
    await asyncio.sleep(5.1)
    assert isinstance(task.exception(), CoreFailed)
    assert [core.state for core in model.statistics().cores] == ["closed"]
    assert model.statistics().calls.failed == 1


@scenario
async def test_the_error_of_a_core_does_not_keep_what_a_caller_sent(monkeypatch):
    monkeypatch.setattr(recovery.logger, "disabled", True)  # pytest keeps the records, and they the error
    backend = PuppetBackend(2, faults={OSError: Fault.CORE})
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:

        async def caller():
            x = row(13)
            sent.append(weakref.ref(x))
            try:
                await model(x)
            except OSError:
                return "its own"

        sent = []
        task = asyncio.ensure_future(caller())
        for _ in range(2):  # on two cores: then the device's own error goes to the caller
            await settle()
            (core,) = [core for core in backend.loaded.values() if core.executing is not None]
            core.release(OSError("the device"))
            core.executed.clear()
        assert await task == "its own"
        gc.collect()
        assert sent[0]() is None


@pytest.mark.pure
async def test_a_batch_that_its_thread_has_claimed_is_not_taken_away(monkeypatch):
    """Its core fails just before it begins."""
    # Concurrent, with threads: a second one has a claim.
    backend = SimulatedBackend(cores=2, service_time=0.0, copy_time=0.001, submits=False)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=1, num_workers=4) as model:
        claimed, go_on, taken = threading.Event(), threading.Event(), []
        real = Board.claim

        def claim(board, lane, execution):
            mine = real(board, lane, execution)
            if mine and not taken:
                taken.append(execution.loaded)
                claimed.set()
                go_on.wait(60.0)
            return mine

        monkeypatch.setattr(Board, "claim", claim)
        calls = [call(model, n) for n in range(40)]
        assert await asyncio.to_thread(claimed.wait, 60.0)
        model._life.run.recovery.take_out(taken[0], OSError("the core"))
        go_on.set()
        results = await asyncio.gather(*calls)
        assert [y[0, 0].item() for y in results] == [-n for n in range(40)]
        assert model.ready


@scenario
async def test_what_fails_after_the_last_core_went_out_of_service_is_not_run_again():
    """An execution outlives its core's service, and its input is at fault: nobody is left to run the halves."""
    faults = {SystemError: Fault.FATAL}
    backend = PuppetBackend(2, faults=faults)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        first = call(model, 1, rows=4)
        await settle()
        calls = [call(model, n) for n in range(4)]
        await settle()
        backend[0].release(SystemError("the process"))
        await settle()
        assert isinstance(first.exception(), CoreFailed)
        backend[1].release(ValueError("one of the inputs"))
        await settle()
        assert all(isinstance(each.exception(), NoHealthyCores) for each in calls)
        assert len({id(each.exception()) for each in calls}) == 4


@scenario
async def test_what_fails_alone_after_the_last_core_went_out_of_service_is_blamed_at_once():
    """The other half of its batch will never run: nothing is to be waited for."""
    backend = PuppetBackend(2, faults={SystemError: Fault.FATAL})
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        other = call(model, 9, rows=4)
        await settle()
        calls = [call(model, n) for n in range(2)]
        await settle()
        backend[1].release(ValueError("one of the inputs"))  # the halves: one executes, one waits
        await settle()
        backend[0].release(SystemError("the process"))
        await settle()
        assert isinstance(other.exception(), CoreFailed)
        backend[1].release(ValueError("this one"))
        await settle()
        errors = [each.exception() for each in calls]
        assert sorted(type(error).__name__ for error in errors) == ["NoHealthyCores", "ValueError"]


@scenario
async def test_what_has_failed_alone_is_not_lost_when_an_abort_finds_the_other_half_behind_another_batch():
    """The half that nobody will run was all that knew of the call that waited for it."""
    backend = PuppetBackend(2, concurrent=True)
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=2, num_workers=3)
    other = call(model, 9, rows=2)
    await settle()
    calls = [call(model, n) for n in range(2)]
    await settle()
    assert [backend[n].executing[0][0].tolist()[0][0] for n in (0, 1)] == [9, 0]
    backend[1].release(ValueError("one of the inputs"))  # the halves: one executes, one is bound behind the other batch
    await settle()
    last = call(model, 8, rows=2)
    await settle()
    backend[1].release(ValueError("this one"))
    await settle()
    await model.abort()
    await release_all(backend, other, last)
    await settle()
    assert sorted(type(each.exception()).__name__ for each in calls) == ["Closed", "ValueError"]


@scenario
async def test_a_swap_in_an_engine_that_closes_its_models_says_that_they_were_closed(monkeypatch):
    """Whoever closes the pool meanwhile; what was loaded to take the place of one is let go."""
    real = _Served.prepare

    async def prepare(served, net, generation):
        await real(served, net, generation)
        await served.close()

    monkeypatch.setattr(_Served, "prepare", prepare)
    backend = PuppetBackend(2)
    pool = Pool(backend=backend, processes=2)
    async with AsyncDataParallel(torch.neg, pool=pool, batch_size=4) as model:
        with pytest.raises(Closed, match="was closed while it was being"):
            await model.swap(torch.abs)
        assert not [task for task in asyncio.all_tasks() if "swap" in task.get_name()]


@scenario
async def test_what_waits_for_an_engine_goes_to_one_whose_core_is_back_in_service():
    """That engine has never left: nobody but its core has come."""
    backend = PuppetBackend(2, faults={OSError: Fault.CORE})
    async with AsyncDataParallel(torch.neg, pool=Pool(backend=backend, processes=2), batch_size=1) as model:
        calls = [call(model, 1), call(model, 1)]
        await settle(100)
        backend[0].release(OSError("the core"))
        await settle(100)
        (failed,), (second,) = [[each for each in calls if each.done() is done] for done in (True, False)]
        assert isinstance(failed.exception(), CoreFailed)  # no other core of its engine can take it
        backend.supervision.fail_to_start = 100
        backend.supervision.spawned[1].kill()
        async with asyncio.timeout(2.5):  # before the other is given up
            while not second.done():
                if backend[0].executing is not None:
                    backend[0].release()
                await asyncio.sleep(0.1)
        assert second.result()[0, 0] == -1
        backend.supervision.fail_to_start = 0


@scenario
async def test_a_model_that_is_closed_holds_no_descriptor():
    backend = PuppetBackend(2)
    model = AsyncDataParallel(torch.neg, pool=Pool(backend=backend, processes=2))
    await model.start()
    links = model._life.run.dispatcher
    assert all(engine.board is not None for engine in links.engines)
    await model.aclose()
    assert all(engine.board is None for engine in links.engines)
