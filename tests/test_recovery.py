"""Faults, on virtual time: whose they are, where the rows go, when a core is back."""

import asyncio
import logging
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
import torch
from puppets import call, check_sum, release_all, row, scenario

from aneuron import (
    AsyncDataParallel,
    Closed,
    CoreFailed,
    CpuBackend,
    Fault,
    NoHealthyCores,
    QueueFull,
    SimulatedBackend,
)
from aneuron.engine import health
from aneuron.engine.execution import Execution
from aneuron.engine.health import FIRST, LIMIT
from aneuron.testing import PuppetBackend, settle

pytestmark = pytest.mark.core

CORE, FATAL, INPUT = OSError("the core"), SystemError("the process"), ValueError("the input")
BACK = 1.25 * FIRST + 0.01  # seconds until a core is back for sure


class Backend(PuppetBackend):
    """Loads are counted, and may be made to fail."""

    def __init__(self, cores=2, recoverable=True, **settings):
        super().__init__(cores, faults={OSError: Fault.CORE, SystemError: Fault.FATAL}, **settings)
        self.recoverable = recoverable
        self.loads, self.unloadable = [], set()

    def load(self, model, core_id, batch_size):
        self.loads.append(core_id)
        if core_id in self.unloadable:
            raise OSError(f"core {core_id} cannot be loaded")
        return super().load(model, core_id, batch_size)


def served(cores=2, recoverable=True, concurrent=False, **settings):
    backend = Backend(cores, recoverable, concurrent=concurrent)
    settings.setdefault("batch_size", 4)
    return backend, AsyncDataParallel(torch.neg, backend=backend, **settings)


def states(model):
    return [core.state for core in model.statistics().cores]


def values(tasks):
    return [task.result()[0, 0].item() for task in tasks]


def busy(backend):
    """The ids of the cores that execute."""
    return [core_id for core_id, core in sorted(backend.loaded.items()) if core.executing is not None]


# A core fails.


@scenario
async def test_the_rows_of_a_core_that_fails_run_on_another_each_call_alone():
    backend, model = served()
    async with model:
        calls = [call(model, n) for n in range(3)]
        await settle()
        (lost,) = busy(backend)
        backend[lost].release(CORE)
        await settle()
        assert sorted(states(model)) == ["quarantined", "ready"]
        assert model.ready
        await release_all(backend, *calls)
        assert values(calls) == [0, -1, -2]
        assert [len(args[0]) for args, _ in backend[1 - lost].executed] == [4, 4, 4]  # padded; one call each
        assert [len(set(args[0][:, 0].tolist())) for args, _ in backend[1 - lost].executed] == [1, 1, 1]
        check_sum(model)


@scenario
async def test_a_core_that_has_failed_is_closed_loaded_again_and_serves():
    backend, model = served(cores=1, example_inputs=row(rows=4))
    async with model:
        first = call(model, 1)
        await settle()
        before = backend[0]
        before.release(CORE)
        await settle()
        assert before.closed
        assert isinstance(first.exception(), CoreFailed)
        assert first.exception().core == 0
        assert first.exception().__cause__ is CORE
        assert not model.ready
        with pytest.raises(NoHealthyCores) as caught:
            await model(row(2))
        assert 0.75 * FIRST <= caught.value.retry_after <= 1.25 * FIRST
        await asyncio.sleep(caught.value.retry_after + 0.001)
        await settle()
        assert model.ready
        assert states(model) == ["ready"]
        assert backend[0] is not before
        again = call(model, 3)
        await settle()
        backend[0].release()
        assert (await again)[0, 0] == -3
        assert backend.loads == [0, 0]


@scenario
async def test_without_an_example_the_first_batch_proves_a_core():
    backend, model = served(cores=1)
    async with model:
        first = call(model, 1)
        await settle()
        backend[0].release(CORE)
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.sleep(BACK)
        assert states(model) == ["suspect"]
        assert model.ready
        again = call(model, 3)
        await settle()
        backend[0].release()
        await again
        assert states(model) == ["ready"]


@scenario
async def test_a_core_that_cannot_be_mended_stays_failed_and_its_slots_move():
    backend, model = served(cores=2, recoverable=False, num_workers=4)
    async with model:
        first = call(model, 1)
        await settle()
        (lost,) = busy(backend)
        backend[lost].release(CORE)
        await release_all(backend, first)
        assert values([first]) == [-1]
        await asyncio.sleep(1000.0)
        assert states(model)[lost] == "failed"
        assert model.ready
        assert model.num_workers == 4
        assert model._life.run.dispatcher.board.slots.slots == ([0, 4] if lost == 0 else [4, 0])
        assert len(backend.loads) == 2


@scenario
async def test_when_the_last_core_is_lost_for_good_everybody_is_told_to_restart():
    backend, model = served(cores=1, recoverable=False)
    async with model:
        executing = call(model, 1, rows=4)
        await settle()
        waiting = [call(model, n, rows=4) for n in range(3)]
        await settle()
        backend[0].release(CORE)
        outcomes = await asyncio.gather(executing, *waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [CoreFailed] + [NoHealthyCores] * 3
        assert len({id(each) for each in outcomes}) == 4
        assert all(each.retry_after is None for each in outcomes[1:])
        assert "restart the process" in str(outcomes[1])
        with pytest.raises(NoHealthyCores, match="restart the process"):
            await model(row(1))
        assert not model.ready
        check_sum(model)


@scenario
async def test_a_core_that_does_not_load_again_is_tried_ever_later_and_then_no_more():
    backend, model = served(cores=1)
    async with model:
        first = call(model, 1)
        await settle()
        backend.unloadable = {0}
        backend[0].release(CORE)
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.sleep(3600.0)
        assert len(backend.loads) == LIMIT
        assert states(model) == ["failed"]
        with pytest.raises(NoHealthyCores, match="restart the process"):
            await model(row(1))


@scenario
async def test_waiting_batches_of_a_core_that_fails_run_elsewhere():
    backend, model = served(cores=2, concurrent=True, num_workers=6)
    async with model:
        calls = [call(model, n, rows=4) for n in range(6)]
        await settle()
        backend[0].release(CORE)
        await settle()
        assert busy(backend) == [1]
        await release_all(backend, *calls)
        assert values(calls) == [-n for n in range(6)]
        check_sum(model)


@scenario
async def test_an_input_that_fails_two_cores_is_blamed_and_not_tried_again():
    backend, model = served(cores=3)
    async with model:
        bad, good = call(model, 13), call(model, 1)
        await settle()
        cores = []
        while not (bad.done() and good.done()):
            for core_id in busy(backend):
                poison = (backend[core_id].executing[0][0] == 13).any()
                cores += [core_id] if poison else []
                backend[core_id].release(OSError("killed by the input") if poison else None)
            await settle()
        assert values([good]) == [-1]
        assert len(cores) == len(set(cores)) == 2
        assert type(bad.exception()) is OSError  # the device's own
        assert any("the input is to blame" in note for note in bad.exception().__notes__)
        assert sum(state == "ready" for state in states(model)) == 1
        check_sum(model)


@scenario
async def test_several_callers_of_a_core_that_fails_get_errors_of_their_own():
    backend, model = served(cores=1, recoverable=False)
    async with model:
        calls = [call(model, n) for n in range(3)]
        await settle()
        backend[0].release(CORE)
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert len({id(error) for error in errors}) == 3


@scenario
async def test_a_fatal_fault_takes_every_core_out_at_once(caplog):
    backend, model = served(cores=3)
    async with model:
        calls = [call(model, n, rows=4) for n in range(5)]
        await settle()
        backend[0].release(FATAL)
        await settle()
        assert not model.ready
        assert states(model) == ["failed"] * 3
        with pytest.raises(NoHealthyCores, match="the process"):
            await model(row(1))
        for core_id in busy(backend):  # what executes may still end well
            backend[core_id].release()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        kinds = [type(each) for each in outcomes]
        assert kinds.count(NoHealthyCores) == 2
        assert kinds.count(CoreFailed) == 1
        assert kinds.count(torch.Tensor) == 2
        await asyncio.sleep(1000.0)
        assert len(backend.loads) == 3
        check_sum(model)
    assert [record.levelno for record in caplog.records if "fatal" in record.getMessage()] == [logging.ERROR]


@scenario
async def test_a_close_while_a_core_is_out_does_not_wait_for_it():
    backend, model = served(cores=2)
    async with model:
        first = call(model, 1)
        await settle()
        (lost,) = busy(backend)
        backend[lost].release(CORE)
        await release_all(backend, first)
    assert states(model) == ["closed", "closed"]
    await asyncio.sleep(1000.0)
    assert len(backend.loads) == 2


@scenario
async def test_a_model_that_is_started_again_trusts_its_cores_again():
    backend, model = served(cores=1, recoverable=False)
    async with model:
        first = call(model, 1)
        await settle()
        backend[0].release(CORE)
        await asyncio.gather(first, return_exceptions=True)
        assert not model.ready
    async with model:
        assert model.ready
        again = call(model, 2)
        await settle()
        backend[0].release()
        assert (await again)[0, 0] == -2


@scenario
async def test_a_cancelled_caller_is_not_run_again():
    backend, model = served(cores=2)
    async with model:
        calls = [call(model, n) for n in range(3)]
        await settle()
        (lost,) = busy(backend)
        calls[1].cancel()
        await settle()
        backend[lost].release(CORE)
        await release_all(backend, *calls)
        assert len(backend[1 - lost].executed) == 2
        assert check_sum(model).cancelled == 1


@scenario
async def test_ready_asks_for_min_cores():
    backend, model = served(cores=3, min_cores=2)
    async with model:
        for expected in (True, False):
            task = call(model, 1)
            await settle()
            backend[busy(backend)[0]].release(CORE)
            await settle()
            assert model.ready is expected
            await release_all(backend, task)
        await asyncio.sleep(BACK)
        assert model.ready
        assert "suspect" in states(model)


@scenario
async def test_max_pending_holds_while_cores_are_out():
    backend, model = served(cores=2, max_pending=4)
    async with model:
        running = [call(model, n, rows=4) for n in range(2)]
        await settle()
        waiting = call(model, 5, rows=4)
        await settle()
        backend[0].release(CORE)
        await settle()
        with pytest.raises(QueueFull):
            await model(row(1, rows=2))
        await release_all(backend, *running, waiting)
        check_sum(model)


# All calls of a batch fail: the input, or the core?


async def fail_everything_on(backend, sick, *tasks):
    while not all(task.done() for task in tasks):
        for core_id in busy(backend):
            backend[core_id].release(ValueError("no good") if core_id in sick else None)
        await settle()


@scenario
async def test_where_all_calls_fail_on_one_core_another_is_asked_and_acquits_them():
    backend, model = served(cores=2)
    async with model:
        block = call(model, 9, rows=4)
        await settle()
        (other,) = busy(backend)
        sick = 1 - other
        calls = [call(model, n) for n in range(4)]
        await settle()
        while not backend[sick].executed or len(backend[sick].executed) < 7:  # 1 + 2 + 4
            backend[sick].release(ValueError("no good"))
            await settle()
        assert not any(task.done() for task in calls)  # held, until the other has been asked
        backend[other].release()
        await fail_everything_on(backend, {sick}, *calls, block)
        assert values(calls) == [0, -1, -2, -3]
        assert states(model)[sick] == "quarantined"
        check_sum(model)


@scenario
async def test_where_all_calls_fail_everywhere_each_gets_its_own_error():
    backend, model = served(cores=2)
    async with model:
        calls = [call(model, n) for n in range(4)]
        await settle()
        await fail_everything_on(backend, {0, 1}, *calls)
        errors = [task.exception() for task in calls]
        assert all(type(error) is ValueError for error in errors)
        assert len({id(error) for error in errors}) == 4
        assert states(model) == ["ready", "ready"]
        assert sum(len(core.executed) for core in backend.loaded.values()) <= 8
        check_sum(model)


@scenario
async def test_on_a_single_core_nobody_else_can_be_asked():
    backend, model = served(cores=1)
    async with model:
        calls = [call(model, n) for n in range(4)]
        await settle()
        await fail_everything_on(backend, {0}, *calls)
        assert all(type(task.exception()) is ValueError for task in calls)
        assert states(model) == ["ready"]
        assert len(backend[0].executed) == 7


@pytest.mark.parametrize("end", ["abort", "lost"])
@scenario
async def test_calls_that_are_held_end_when_nothing_runs_any_more(end):
    backend, model = served(cores=1, recoverable=False)
    await model.start()
    calls = [call(model, n) for n in range(4)]
    await settle()
    for _ in range(4):  # 4, 2, 1, 1: two have failed alone
        backend[0].release(ValueError("no good"))
        await settle()
    assert not any(task.done() for task in calls)
    if end == "abort":
        await model.abort()
        backend[0].release(ValueError("no good"))
    else:
        backend[0].release(CORE)
    await settle()
    assert all(task.done() for task in calls)
    assert [type(task.exception()) for task in calls[:2]] == [ValueError, ValueError]
    check_sum(model)
    await model.abort()


@pytest.mark.parametrize("bad", [{0}, {1, 2}, {0, 1, 2}, {3}])
@scenario
async def test_bad_rows_never_fail_their_batch_mates(bad):
    backend, model = served(cores=2)
    async with model:
        calls = [call(model, n) for n in range(4)]
        await settle()
        while not all(task.done() for task in calls):
            for core_id in busy(backend):
                rows = set(backend[core_id].executing[0][0][:, 0].tolist())
                backend[core_id].release(ValueError("bad") if rows & bad else None)
            await settle()
        for n, task in enumerate(calls):
            if n in bad:
                assert type(task.exception()) is ValueError
            else:
                assert values([task]) == [-n]
        assert states(model) == ["ready", "ready"]
        check_sum(model)


# Hangs.


@scenario
async def test_a_hung_core_is_given_up_and_its_rows_run_elsewhere():
    backend, model = served(cores=2, exec_timeout=5.0)
    async with model:
        task = call(model, 1)
        await settle()
        (hung,) = busy(backend)
        old = backend[hung]
        await asyncio.sleep(4.9)
        assert states(model)[hung] == "ready"
        await asyncio.sleep(0.2)
        assert states(model)[hung] == "quarantined"
        assert busy(backend)[-1:] == [1 - hung] or 1 - hung in busy(backend)
        backend[1 - hung].release()
        assert (await task)[0, 0] == -1
        await asyncio.sleep(BACK)
        assert states(model)[hung] == "suspect"
        assert backend[hung] is not old
        old.release()  # too late: nobody is told, nothing is counted
        await settle()
        calls = check_sum(model)
        assert (calls.completed, calls.failed) == (1, 0)
        more = [call(model, n, rows=4) for n in range(4)]
        await settle()
        await release_all(backend, *more)
        assert values(more) == [0, -1, -2, -3]
    assert states(model) == ["closed", "closed"]


@scenario
async def test_an_input_that_hangs_two_cores_is_blamed():
    backend, model = served(cores=3, exec_timeout=5.0)
    async with model:
        task = call(model, 1)
        await asyncio.sleep(20.0)
        error = task.exception()
        assert isinstance(error, CoreFailed)
        assert "exec_timeout=5 s" in str(error)
        assert any("the input is to blame" in note for note in error.__notes__)
        good = call(model, 2)
        await settle()
        await release_all(backend, good)
        assert values([good]) == [-2]
        check_sum(model)


@scenario
async def test_a_drain_does_not_wait_for_a_core_that_was_given_up():
    backend, model = served(cores=2, exec_timeout=5.0, recoverable=False)
    await model.start()
    task = call(model, 1)
    await settle()
    (hung,) = busy(backend)
    closing = asyncio.ensure_future(model.aclose())
    await asyncio.sleep(5.1)
    backend[1 - hung].release()
    await asyncio.wait_for(closing, 1.0)
    assert (await task)[0, 0] == -1
    assert backend[1 - hung].closed
    assert not backend[hung].closed


@scenario
async def test_an_execution_within_its_time_is_left_alone():
    backend = Backend(2, service_time=4.9)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, exec_timeout=5.0) as model:
        results = await asyncio.gather(*(model(row(n)) for n in range(40)))
        assert [y[0, 0].item() for y in results] == [-n for n in range(40)]
        assert states(model) == ["ready", "ready"]
        assert len(backend.loads) == 2


@scenario
async def test_an_idle_model_is_not_watched():
    backend, model = served(exec_timeout=5.0)
    async with model:
        task = call(model, 1)
        await settle()
        await release_all(backend, task)
        await asyncio.sleep(6.0)
        assert model._life.run.recovery._watch is None
        late = call(model, 2)  # and is watched again when there is something to see
        await asyncio.sleep(5.1)
        assert "quarantined" in states(model)
        await release_all(backend, late)


@scenario
async def test_batches_behind_a_hung_one_move_elsewhere():
    backend, model = served(cores=2, concurrent=True, num_workers=6, exec_timeout=5.0)
    async with model:
        calls = [call(model, n, rows=4) for n in range(6)]
        await settle()
        for _ in range(10):
            if backend[1].executing is not None:
                backend[1].release()
            await settle()
        await asyncio.sleep(5.1)
        while not all(task.done() for task in calls):
            for core_id in busy(backend):
                if core_id == 1:
                    backend[1].release()
            await settle()
        assert values(calls) == [-n for n in range(6)]
        check_sum(model)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5"])
def test_exec_timeout_is_a_time(value):
    with pytest.raises((ValueError, TypeError), match="exec_timeout"):
        AsyncDataParallel(torch.neg, exec_timeout=value)


@scenario
async def test_abort_while_a_core_is_loaded_again():
    backend, model = served(cores=1)
    await model.start()
    task = call(model, 1)
    await settle()
    backend[0].release(CORE)
    await asyncio.gather(task, return_exceptions=True)
    await model.abort()
    await asyncio.sleep(100.0)
    assert len(backend.loads) == 1
    with pytest.raises(Closed):
        await model(row(1))


# Real threads.


async def until(condition):
    async with asyncio.timeout(60.0):
        while not condition():
            await asyncio.sleep(0.01)


class Planned(SimulatedBackend):
    """What is planned for a core happens once: when it is loaded again it is sound."""

    def __init__(self, plan, cores=4, service_time=0.002):
        super().__init__(cores, service_time)
        self.plan = plan

    def load(self, model, core_id, batch_size):
        own = [fault for fault in self.plan if fault.core == core_id]
        self.plan = [fault for fault in self.plan if fault.core != core_id]
        return SimulatedBackend(1, self.service_time, faults=own).load(model, core_id, batch_size)


@pytest.mark.pure
async def test_what_waits_in_the_queue_of_a_device_that_hangs_is_not_to_blame(monkeypatch):
    """It runs elsewhere, as if it had not been here."""
    plan = [SimulatedBackend.fault("hang", core=0, execution=0, seconds=3.0)]
    model = AsyncDataParallel(torch.neg, batch_size=4, backend=Planned(plan, 2, 0.02), exec_timeout=1.5, num_workers=4)
    async with model:
        again, real = [], model._life.run.run_again

        def run_again(execution, chunks, retry):
            again.append((chunks[0][0].rows, retry.tried))
            real(execution, chunks, retry)

        monkeypatch.setattr(model._life.run, "run_again", run_again)
        calls = [call(model, n, rows=rows) for n, rows in enumerate([4, 4])]
        await until(lambda: [core.in_flight for core in model.statistics().cores] == [1, 1])
        calls += [call(model, n, rows=8) for n in range(2, 3)]  # a batch for each core's queue
        assert [(await each)[0, 0].item() for each in calls] == [0, -1, -2]
        assert sorted(again) == [(4, 0), (8, None)]
        assert model.statistics().cores[0].errors == 1


@scenario
async def test_time_in_the_queue_of_a_device_does_not_count_as_a_hang():
    backend, model = served(1, exec_timeout=1.0)
    async with model:
        task = call(model, 1)
        await settle()
        lanes = model._life.run.dispatcher.board.lanes
        await asyncio.sleep(0.9)
        lanes[0].since = 0.9  # an execution before it has ended just now
        await asyncio.sleep(0.9)
        assert states(model) == ["ready"]
        await release_all(backend, task)
        await asyncio.sleep(5.0)


async def test_simulated_cores_fail_and_hang_and_every_caller_gets_the_right_answer(monkeypatch):
    monkeypatch.setattr(health, "FIRST", 0.02)
    plan = [
        SimulatedBackend.fault("core", core=0, execution=20),
        SimulatedBackend.fault("hang", core=1, execution=30, seconds=3.0),
        SimulatedBackend.fault("core", core=2, execution=40),
    ]
    backend = Planned(plan)
    model = AsyncDataParallel(torch.neg, batch_size=4, backend=backend, exec_timeout=1.5, example_inputs=row())
    async with model:

        async def caller(number):
            for n in range(60):
                assert (await model(row(100 * number + n)))[0, 0] == -(100 * number + n)

        await asyncio.gather(*(caller(number) for number in range(24)))
        assert check_sum(model).completed == 24 * 60
        assert sum(core.errors for core in model.statistics().cores) >= 2
        await until(lambda: "loading" not in states(model) and "quarantined" not in states(model))


@pytest.mark.pure
async def test_a_thread_that_dies_takes_nothing_with_it(monkeypatch, caplog):
    """The worker's own code fails, not the model: in `take`, or between two steps."""
    monkeypatch.setattr(health, "FIRST", 0.02)
    backend = SimulatedBackend(cores=2, service_time=0.001, submits=False)
    async with AsyncDataParallel(torch.neg, batch_size=4, backend=backend) as model:
        await model(row(1))
        real, died = Execution.begin, []

        def begin(execution, clock):
            if not died:
                died.append(execution)
                raise SystemExit("the thread is to end")
            return real(execution, clock)

        monkeypatch.setattr(Execution, "begin", begin)
        results = await asyncio.gather(*(model(row(n)) for n in range(40)))
        assert [y[0, 0].item() for y in results] == [-n for n in range(40)]
        await until(lambda: all(state in ("ready", "suspect") for state in states(model)))
        assert "the thread is to end" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
async def test_what_a_model_raises_does_not_end_its_thread(error):
    def fail(x):
        if (x == 13).any():
            raise error("from the model")
        return -x

    async with AsyncDataParallel(fail, backend=CpuBackend(cores=2), batch_size=2) as model:
        outcomes = await asyncio.gather(*(model(row(n)) for n in (1, 13, 2)), return_exceptions=True)
        assert outcomes[0][0, 0] == -1
        assert outcomes[2][0, 0] == -2
        assert "from the model" in str(outcomes[1])
        assert not isinstance(outcomes[1], asyncio.CancelledError)
        assert states(model) == ["ready", "ready"]


class Closing(PuppetBackend):
    """Cores whose `close` raises."""

    recoverable = True

    def load(self, model, core_id, batch_size):
        core = super().load(model, core_id, batch_size)
        core.close = lambda: (_ for _ in ()).throw(OSError("cannot be closed"))
        return core


@scenario
async def test_a_core_that_cannot_be_closed_does_not_keep_the_model_from_closing(caplog):
    model = AsyncDataParallel(torch.neg, backend=Closing(2, service_time=0.01))
    async with model:
        assert (await model(row(1)))[0, 0] == -1
    assert states(model) == ["closed", "closed"]
    assert caplog.text.count("cannot be closed") >= 2


class Mute(Exception):
    """A fault that carries no text, and whose constructor needs arguments."""

    def __init__(self, one, two):
        super().__init__()

    def __str__(self):
        raise ZeroDivisionError("no text")


@pytest.mark.parametrize("fault", [Fault.INPUT, Fault.CORE, Fault.FATAL])
@scenario
async def test_faults_that_say_nothing(fault):
    backend = PuppetBackend(1, faults={Mute: fault})
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        task = call(model, 1)
        await settle()
        backend[0].release(Mute(1, 2))
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, Mute if fault is Fault.INPUT else CoreFailed)


def test_the_process_ends_behind_a_hung_core():
    code = """
        import asyncio, sys, torch, aneuron
        plan = [aneuron.SimulatedBackend.fault("hang", core=0, seconds=3600.0)]
        backend = aneuron.SimulatedBackend(cores=1, faults=plan)
        async def main():
            model = aneuron.AsyncDataParallel(torch.neg, backend=backend, batch_size=1, exec_timeout=0.2)
            async with model:
                try:
                    await model(torch.zeros(1, 1))
                except aneuron.CoreFailed as error:
                    print(type(error).__name__)
        asyncio.run(main())
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stdout) == (0, "CoreFailed\ndone\n"), done.stderr


# Cores that take several executions at once, with real threads.


class Held:
    """A core whose executions end when they are told to, in any order."""

    concurrent = True

    def __init__(self, backend):
        self.backend = backend

    def execute(self, args, kwargs):
        held = SimpleNamespace(first=args[0][0, 0].item(), rows=len(args[0]), ended=threading.Event(), error=None)
        self.backend.held.append(held)
        assert held.ended.wait(60.0)
        if held.error is not None:
            raise held.error
        return -args[0]

    def close(self):
        pass


class Holding:
    """A backend of such cores."""

    name, recoverable, preferred_rows, probes = "holding", True, 32, False

    def __init__(self, cores=1):
        self._cores, self.held = cores, []

    def cores(self):
        return range(self._cores)

    def load(self, model, core_id, batch_size):
        return Held(self)

    def classify(self, error):
        return Fault.CORE if isinstance(error, OSError) else Fault.INPUT

    async def end(self, first, error=None):
        """End the execution whose first row is that, once it is there."""
        await until(lambda: any(each.first == first and not each.ended.is_set() for each in self.held))
        each = next(each for each in self.held if each.first == first and not each.ended.is_set())
        each.error = error
        each.ended.set()
        await asyncio.sleep(0.02)

    def end_all(self):
        for each in self.held:
            each.ended.set()


async def test_parts_of_a_batch_are_not_waited_for_where_some_could_not_run_again(monkeypatch):
    """The core goes out of service while the halves of a batch execute on it, and comes back in between."""
    monkeypatch.setattr(health, "FIRST", 0.05)
    backend = Holding()
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4, num_workers=4)
    async with model:
        calls = [call(model, n) for n in (1, 2, 3, 4)]
        await backend.end(1, INPUT)  # and so its halves execute
        other = call(model, 9, rows=4)
        await backend.end(9, CORE)
        assert isinstance((await asyncio.gather(other, return_exceptions=True))[0], CoreFailed)
        await backend.end(1, INPUT)
        await until(lambda: model._life.run.recovery.in_service)
        await backend.end(3, INPUT)
        for first in (3, 4):
            await backend.end(first, INPUT)
        async with asyncio.timeout(60.0):
            errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [NoHealthyCores, NoHealthyCores, ValueError, ValueError]


async def test_a_hang_is_seen_while_others_come_and_go_on_the_same_core():
    backend = Holding()
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=1, num_workers=2, exec_timeout=1.0)
    async with model:
        hung = call(model, 99)
        await until(lambda: backend.held)
        for n in range(100):  # two seconds
            other = call(model, n)
            await until(lambda n=n: hung.done() or any(e.first == n and not e.ended.is_set() for e in backend.held))
            if hung.done():  # and the core is out of service, with what waited for it
                break
            await backend.end(n)
            (answer,) = await asyncio.gather(other, return_exceptions=True)
            if hung.done():
                break
            assert answer[0, 0] == -n
        assert isinstance(hung.exception(), CoreFailed)
        await asyncio.gather(other, return_exceptions=True)
        backend.end_all()


async def test_what_has_ended_meanwhile_does_not_hang_and_what_is_behind_it_stays():
    backend = Holding()
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=1, num_workers=2)
    async with model:
        calls = [call(model, n) for n in (1, 2)]
        await until(lambda: len(backend.held) == 2)
        ((_, executions),) = model._life.run.running()
        await backend.end(executions[0].chunks[0][0].leaves[0][0, 0].item())
        model._life.run.recovery.hung(executions, CoreFailed("a hang", 0))
        backend.end_all()
        assert [y[0, 0].item() for y in await asyncio.gather(*calls)] == [-1, -2]
        assert model.statistics().cores[0].errors == 0


@pytest.mark.pure
async def test_rows_that_were_handed_out_before_their_execution_was_given_up_count():
    """A thread is between handing out its rows and saying that it has ended."""
    backend = Holding(2)
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4)
    async with model:
        go, there = threading.Event(), threading.Semaphore(0)
        for lane in model._life.run.dispatcher.lanes:

            def take(ended, take=lane.take):
                if ended is not None:
                    there.release()
                    assert go.wait(60.0)
                return take(ended)

            lane.take = take
        task = call(model, 1, rows=8)
        await until(lambda: len(backend.held) == 2)
        running = model._life.run.running()
        backend.end_all()
        for _ in range(2):  # blocking: the loop does not learn of it
            assert there.acquire(timeout=60.0)
        last = next(each for each in running if each[1][0].finished)
        model._life.run.recovery.hung(last[1], CoreFailed("a hang", last[0].core_id))
        go.set()
        assert torch.equal(await asyncio.wait_for(task, 60.0), -row(1, rows=8))
        check_sum(model)
        backend.end_all()
