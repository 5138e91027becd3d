"""Queueing, cancelling and failing on virtual time: puppet cores, no threads, no waiting."""

import asyncio
import logging
import time

import anyio
import pytest
import torch
from puppets import call, check_sum, release_all, row, scenario

from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault, NoHealthyCores, QueueFull, SimulatedBackend
from aneuron.testing import PuppetBackend, run, settle

pytestmark = pytest.mark.core


def values(args_and_kwargs):
    """The first column of what a puppet executes or has executed."""
    return args_and_kwargs[0][0][:, 0].tolist()


def puppets(cores=1, concurrent=False, **settings):
    backend = PuppetBackend(cores, faults={OSError: Fault.CORE}, concurrent=concurrent)
    settings.setdefault("batch_size", 4)
    return backend, AsyncDataParallel(torch.neg, backend=backend, **settings)


@scenario
async def test_calls_of_one_iteration_share_a_batch_and_each_gets_its_own_row():
    backend, model = puppets()
    async with model:
        calls = [call(model, n) for n in range(3)]
        await settle()
        assert values(backend[0].executing) == [0, 1, 2, 2]  # padded with a real row
        backend[0].release()
        assert [(await c)[0, 0].item() for c in calls] == [0, -1, -2]
    stats = model.statistics()
    assert stats.cores[0].padded_rows == 1
    assert dict(stats.closed_because) == {"full": 0, "core_idle": 1, "delay": 0, "signature": 0, "drain": 0}


@scenario
async def test_while_the_core_is_busy_the_queue_is_the_batching_window():
    backend, model = puppets()
    async with model:
        first = call(model, 0)
        await settle()
        late = [call(model, n) for n in (1, 2)]
        await settle()
        assert check_sum(model).waiting == 2
        late.append(call(model, 3))
        await settle()
        backend[0].release()
        await settle()
        assert values(backend[0].executing) == [1, 2, 3, 3]
        await release_all(backend, first, *late)


@scenario
async def test_one_big_call_runs_on_every_core_and_comes_back_in_order():
    backend, model = puppets(cores=3)
    async with model:
        x = torch.arange(50.0).reshape(25, 2)
        big = asyncio.ensure_future(model(x))
        await settle()
        assert all(core.executing for core in backend.loaded.values())
        await release_all(backend, big)
        assert torch.equal(await big, -x)


@scenario
async def test_a_queued_call_that_is_cancelled_costs_nothing():
    backend, model = puppets(concurrent=True)
    async with model:
        calls = [call(model, n) for n in range(12)]  # two batches bound, the third waits
        await settle()
        assert check_sum(model).waiting == 4
        calls[9].cancel()
        await settle()
        assert model.statistics().waiting_rows == 3
        await release_all(backend, *calls)
        executed = [value for batch in backend[0].executed for value in values(batch)]
        assert 9.0 not in executed
        assert calls[9].cancelled()
        assert [c.result()[0, 0].item() for n, c in enumerate(calls) if n != 9] == [-n for n in range(12) if n != 9]
    assert check_sum(model).cancelled == 1


@scenario
async def test_a_bound_call_that_is_cancelled_is_dropped_from_its_batch():
    backend, model = puppets()
    async with model:
        calls = [call(model, n) for n in range(8)]
        await settle()
        calls[5].cancel()  # in the second batch, which is bound and has not begun
        await settle()
        backend[0].release()
        await settle()
        assert values(backend[0].executing) == [4, 6, 7, 7]
        await release_all(backend, *calls)


@scenario
async def test_a_batch_whose_callers_have_all_left_is_not_executed():
    backend, model = puppets()
    async with model:
        calls = [call(model, n) for n in range(8)]
        await settle()
        for c in calls[4:]:
            c.cancel()
        await settle()
        await release_all(backend, *calls)
        assert [values(batch) for batch in backend[0].executed] == [[0, 1, 2, 3]]
        assert model.statistics().cores[0].in_flight == 0


@scenario
async def test_a_caller_that_leaves_during_execution_keeps_the_slot_taken_until_the_core_returns():
    backend, model = puppets(num_workers=1)
    async with model:
        gone = call(model, 1)
        await settle()
        gone.cancel()
        await settle()
        after = call(model, 2)
        await settle()
        assert model.statistics().cores[0].in_flight == 1
        assert check_sum(model).waiting == 1
        await release_all(backend, after)
        assert (await after)[0, 0] == -2
    calls = check_sum(model)
    assert (calls.completed, calls.cancelled) == (1, 1)


@scenario
async def test_an_anyio_scope_cancels_like_a_task():
    backend, model = puppets()
    async with model:
        with anyio.move_on_after(1.0) as scope:
            await model(row(1))
        assert scope.cancelled_caught
        await release_all(backend, call(model, 2))
    assert check_sum(model).cancelled == 1


@scenario
async def test_asyncio_timeout_ends_the_wait_and_not_the_others():
    backend, model = puppets()
    async with model:
        other = call(model, 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await model(row(1))
        await release_all(backend, other)
        assert (await other)[0, 0] == -2


@scenario
async def test_a_result_that_arrives_with_the_cancellation_is_counted_once():
    backend, model = puppets()
    async with model:
        caller = call(model, 1)
        await settle()
        backend[0].release()
        for _ in range(10):  # until the future has its result, and the caller has not run yet
            await asyncio.sleep(0)
            if model.statistics().calls.completed:
                break
        caller.cancel()
        await settle()
        calls = check_sum(model)
        assert calls.completed + calls.cancelled == 1
        assert calls.running == 0


@scenario
async def test_a_failed_batch_is_run_in_halves_until_the_offender_stands_alone():
    def picky(x):
        if (x == 5).any():
            raise LookupError("five")
        return -x

    backend = PuppetBackend(1)
    async with AsyncDataParallel(picky, backend=backend, batch_size=8) as model:
        calls = [call(model, n) for n in range(8)]
        await settle()
        await release_all(backend, *calls)
        with pytest.raises(LookupError, match="five") as caught:
            await calls[5]
        assert any("core 0" in note for note in caught.value.__notes__)
        assert [(await c)[0, 0].item() for n, c in enumerate(calls) if n != 5] == [0, -1, -2, -3, -4, -6, -7]
        assert len(backend[0].executed) == 1 + 6  # 2 * log2(8) extra runs
    assert check_sum(model).failed == 1


@scenario
async def test_an_offender_who_has_left_does_not_leave_the_blame_to_its_batch_mate():
    backend, model = puppets(batch_size=2)
    async with model:
        offender, innocent = call(model, 1), call(model, 2)
        await settle()
        offender.cancel()
        await settle()
        backend[0].release(ValueError("about row 1"))
        await settle()
        assert values(backend[0].executing) == [2, 2]
        backend[0].release()
        assert (await innocent)[0, 0] == -2


@scenario
async def test_new_rows_do_not_join_the_rerun_halves():
    backend, model = puppets()
    async with model:
        calls = [call(model, n) for n in range(4)]
        await settle()
        late = call(model, 9)
        backend[0].release(ValueError("all of them"))
        await settle()
        assert values(backend[0].executing) == [0, 1, 1, 1]
        await release_all(backend, late, *calls)


@scenario
async def test_a_call_that_fails_in_one_batch_withdraws_the_rest_of_its_rows():
    backend, model = puppets(num_workers=1)
    async with model:
        big = call(model, 1, rows=400)
        await settle()
        assert model.statistics().waiting_rows == 396
        backend[0].release(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await big
        assert model.statistics().waiting_rows == 0
        await settle()
        assert backend[0].executing is None


@scenario
async def test_pieces_that_return_after_their_call_has_failed_are_ignored():
    backend, model = puppets(cores=2)
    async with model:
        big = call(model, 1, rows=8)
        await settle()
        backend[0].release(ValueError("no"))
        await settle()
        backend[1].release()
        await settle()
        with pytest.raises(ValueError, match="no"):
            await big
        assert check_sum(model).failed == 1


@scenario
async def test_a_core_fault_is_not_blamed_on_the_input(caplog):
    backend, model = puppets()
    async with model:
        calls = [call(model, n) for n in range(2)]
        await settle()
        with caplog.at_level(logging.WARNING, "aneuron"):
            backend[0].release(OSError("the device is gone"))
            await settle()
        errors = [c.exception() for c in calls]
        assert all(type(error) is CoreFailed and error.core == 0 for error in errors)
        assert errors[0] is not errors[1]
        assert isinstance(errors[0].__cause__, OSError)
        assert "core 0 failed" in caplog.text
        assert len(backend[0].executed) == 1  # not run in halves
        await release_all(backend, call(model, 1))


@scenario
async def test_a_full_queue_refuses_and_says_when_to_come_back():
    backend = PuppetBackend(1, service_time=1.0)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, max_pending=8) as model:
        calls = [call(model, n) for n in range(4 + 8)]  # executing, waiting
        await settle()
        with pytest.raises(QueueFull, match="max_pending=8") as caught:
            await model(row(0))
        assert caught.value.retry_after is None  # no rate measured yet
        await asyncio.sleep(1.5)
        calls += [call(model, n) for n in range(4)]
        await asyncio.sleep(1)
        calls += [call(model, n) for n in range(4)]
        await settle()
        with pytest.raises(QueueFull) as caught:
            await model(row(0))
        assert caught.value.retry_after == pytest.approx(0.25)  # one row too many, four a second leave
        await asyncio.gather(*calls)
    assert check_sum(model).refused == 2


@scenario
async def test_idle_time_says_nothing_about_the_rate_of_leaving():
    backend = PuppetBackend(1, service_time=1.0)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, max_pending=8) as model:
        for _ in range(2):
            await model(row(0))
            await asyncio.sleep(1000)
        calls = []
        for rows in (12, 4, 4):
            calls += [call(model, n) for n in range(rows)]
            await asyncio.sleep(1.1)
        calls += [call(model, n) for n in range(4)]
        await settle()
        with pytest.raises(QueueFull) as caught:
            await model(row(0))
        assert caught.value.retry_after == pytest.approx(0.25)
        await asyncio.gather(*calls)


@scenario
async def test_what_idle_cores_can_take_does_not_count_as_waiting():
    backend, model = puppets(cores=2, max_pending=1)
    async with model:
        calls = [call(model, n) for n in range(2)]  # each on its way to a core of its own
        await settle()
        assert check_sum(model).accepted == 2
        await release_all(backend, *calls)


@scenario
async def test_one_can_ask_whether_a_call_would_be_refused():
    backend, model = puppets(max_pending=4)
    model.check_admission()  # nobody knows before the start
    async with model:
        model.check_admission()
        calls = [call(model, n) for n in range(4 + 3)]
        await settle()
        model.check_admission()
        with pytest.raises(QueueFull, match="no room for 2 rows"):
            model.check_admission(2)
        with pytest.raises(ValueError, match="rows=0: expected an int of at least 1"):
            model.check_admission(0)
        assert check_sum(model).refused == 1
        assert check_sum(model).accepted == 7  # nothing is reserved
        closing = asyncio.ensure_future(model.aclose())
        await settle()
        with pytest.raises(Closed):
            model.check_admission()
        await release_all(backend, closing, *calls)
    model.check_admission()  # nor after the close: the call will say


@scenario
async def test_while_no_core_serves_admission_is_refused():
    backend, model = puppets()
    async with model:
        first = call(model, 1)
        await settle()
        backend[0].release(OSError("the core"))
        await settle()
        with pytest.raises(NoHealthyCores):
            model.check_admission()
        assert isinstance(first.exception(), CoreFailed)


@pytest.mark.parametrize("asks", ["check_admission", "calls"])
@scenario
async def test_results_are_handed_out_while_calls_come_and_the_loop_does_not_get_round(asks):
    """One iteration of a flooded loop may be longer than an execution."""
    backend, model = puppets()
    async with model:
        first = call(model, 1)
        await settle()
        future = next(iter(model._life.run.futures.calls)).future
        backend[0].release()
        assert not future.done()
        if asks == "calls":
            second = model(row(2))
            second.send(None)  # its first step, in this iteration
            assert future.done()
            second.close()
        else:
            model.check_admission()
            assert future.done()
        assert (await first)[0, 0] == -1


@scenario
async def test_a_cancelled_call_makes_room():
    backend, model = puppets(max_pending=4)
    async with model:
        calls = [call(model, n) for n in range(12)]
        await settle()
        with pytest.raises(QueueFull):
            await model(row(0))
        calls[11].cancel()
        await settle()
        calls.append(call(model, 12))
        await settle()
        await release_all(backend, *calls)


@scenario
async def test_num_workers_changes_while_batches_are_in_flight():
    backend, model = puppets(cores=2, concurrent=True)
    assert model.num_workers is None
    async with model:
        assert model.num_workers == 4
        calls = [call(model, n) for n in range(40)]
        await settle()
        assert [core.in_flight for core in model.statistics().cores] == [2, 2]
        model.num_workers = 1
        assert model.num_workers == 1
        await settle()
        for _ in range(2):
            for core in backend.loaded.values():
                core.release()
            await settle()
        assert [core.in_flight for core in model.statistics().cores] == [1, 0]
        model.num_workers = 6
        await settle()
        assert [core.in_flight for core in model.statistics().cores] == [3, 3]
        await release_all(backend, *calls)
        assert [c.result()[0, 0].item() for c in calls] == [-n for n in range(40)]


@scenario
async def test_bound_batches_wait_in_the_lanes_queue_and_can_be_revoked():
    backend, model = puppets(num_workers=4, concurrent=True)
    async with model:
        calls = [call(model, n) for n in range(16)]
        await settle()
        (lane,) = model._life.run.dispatcher.board.lanes
        assert isinstance(lane.queue, asyncio.Queue)
        assert (lane.queue.qsize(), len(lane.in_flight)) == (3, 1)
        for c in calls[12:]:
            c.cancel()
        await settle()
        await release_all(backend, *calls)
        assert len(backend[0].executed) == 3


@scenario
async def test_split_size_and_dynamic_batching_can_be_changed_between_calls():
    backend, model = puppets(cores=2, batch_size=None)
    async with model:
        assert model.split_size is None
        model.split_size = 3
        six = call(model, 1, rows=6)
        await settle()
        assert [len(values(core.executing)) for core in backend.loaded.values()] == [3, 3]
        await release_all(backend, six)
        model.split_size = None
        model.disable_dynamic_batching()
        model.num_workers = 7
        assert model.num_workers == 7
        pair = [call(model, n, rows=2) for n in (1, 2)]
        await settle()
        assert [values(core.executing) for core in backend.loaded.values()] == [[1], [1]]  # nothing is packed
        await release_all(backend, *pair)


@scenario
async def test_an_idle_model_wakes_nobody_up():
    backend, model = puppets()
    async with model:
        await release_all(backend, call(model, 1))
        await settle()
        loop = asyncio.get_running_loop()
        assert not loop._ready
        assert not [timer for timer in loop._scheduled if not timer.cancelled()]


@scenario
async def test_a_drain_finishes_what_was_accepted_and_refuses_the_rest():
    backend, model = puppets()
    await model.start()
    calls = [call(model, n) for n in range(10)]
    await settle()
    closing = asyncio.ensure_future(model.aclose())
    again = asyncio.ensure_future(model.aclose())
    await settle()
    assert not model.ready
    with pytest.raises(Closed):
        await model(row(1))
    await release_all(backend, *calls)
    await asyncio.gather(closing, again)
    assert [c.result()[0, 0].item() for c in calls] == [-n for n in range(10)]
    assert backend[0].closed
    assert model.statistics().closed_because["drain"] == 1
    with pytest.raises(Closed):
        await model(row(1))


@scenario
async def test_abort_fails_what_has_not_begun_and_leaves_the_rest_to_finish():
    backend, model = puppets()
    await model.start()
    calls = [call(model, n) for n in range(12)]  # executing, staged, waiting
    await settle()
    await model.abort()
    await model.abort()
    await settle()
    assert [c.done() for c in calls] == [False] * 4 + [True] * 8
    for c in calls[4:]:
        with pytest.raises(Closed):
            await c
    backend[0].release()
    assert [(await c)[0, 0].item() for c in calls[:4]] == [0, -1, -2, -3]
    assert backend[0].closed
    calls = check_sum(model)
    assert (calls.completed, calls.failed, calls.running) == (4, 8, 0)


@scenario
async def test_a_call_that_is_spread_fails_at_abort_if_a_part_of_it_has_not_begun():
    backend, model = puppets(num_workers=1)
    await model.start()
    big = call(model, 1, rows=8)
    await settle()
    await model.abort()
    with pytest.raises(Closed):
        await big
    backend[0].release()
    await settle()
    assert check_sum(model).running == 0


@scenario
async def test_a_batch_that_fails_after_abort_is_not_run_again():
    backend, model = puppets()
    await model.start()
    calls = [call(model, n) for n in range(4)]
    await settle()
    await model.abort()
    backend[0].release(ValueError("no"))
    await settle()
    assert all(isinstance(c.exception(), Closed) for c in calls)


@scenario
async def test_a_drain_that_times_out_becomes_an_abort():
    backend, model = puppets()
    await model.start()
    calls = [call(model, n) for n in range(8)]
    await settle()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(25):
            await model.aclose()
    await settle()
    assert [c.done() for c in calls] == [False] * 4 + [True] * 4
    backend[0].release()
    await asyncio.gather(*calls[:4])


@scenario
async def test_a_long_drain_is_logged_once(caplog):
    backend, model = puppets()
    await model.start()
    slow = call(model, 1)
    await settle()
    closing = asyncio.ensure_future(model.aclose())
    await asyncio.sleep(100)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    await release_all(backend, slow)
    await closing


@scenario
async def test_async_with_aborts_on_an_exception():
    backend, model = puppets()
    waiting = []

    async def serve():
        async with model:
            waiting.extend(call(model, n) for n in range(8))
            await settle()
            raise KeyError

    with pytest.raises(KeyError):
        await serve()
    await settle()
    assert [c.done() for c in waiting] == [False] * 4 + [True] * 4
    backend[0].release()
    await asyncio.gather(*waiting, return_exceptions=True)


@scenario
async def test_close_waits_for_a_batch_whose_caller_has_left():
    backend, model = puppets()
    await model.start()
    gone = call(model, 1)
    await settle()
    gone.cancel()
    closing = asyncio.ensure_future(model.aclose())
    await settle()
    assert not closing.done()
    backend[0].release()
    await closing
    assert backend[0].closed


@pytest.mark.pure
@pytest.mark.parametrize("where", ["settle", "_count", "failed", "end", "execution", "next"])
@scenario
async def test_an_internal_error_leaves_nobody_waiting(caplog, monkeypatch, where):
    backend, model = puppets()
    await model.start()
    calls = [call(model, n) for n in range(12)]
    await settle()
    run = model._life.run
    owners = {"end": run.futures, "failed": run.recovery, "next": run.dispatcher.board, "execution": run}
    owner = owners.get(where, run.settling)
    real, broke = getattr(owner, where), []

    def broken(*args, **kwargs):
        if not broke:
            broke.append(where)
            raise ZeroDivisionError("a bug")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, where, broken)
    backend[0].release(ValueError("no") if where == "failed" else None)
    await settle()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, Closed) for outcome in outcomes) == (8 if where in ("execution", "next") else 12)
    assert not model.ready
    assert "a bug" in caplog.text
    assert check_sum(model).running == 0
    await model.abort()


@scenario
async def test_statistics_are_frozen_and_add_up():
    backend, model = puppets(cores=2, concurrent=True)
    assert model.statistics().cores == ()
    async with model:
        calls = [call(model, n) for n in range(21)]
        await settle()
        stats = model.statistics()
        assert (stats.calls.accepted, stats.calls.waiting, stats.calls.running, stats.waiting_rows) == (21, 5, 16, 5)
        assert [(core.id, core.global_id, core.state, core.in_flight) for core in stats.cores] == [
            (0, 0, "ready", 2),
            (1, 1, "ready", 2),
        ]
        with pytest.raises(AttributeError):
            stats.waiting_rows = 1
        with pytest.raises(TypeError):
            stats.closed_because["full"] = 1
        await release_all(backend, *calls)
        stats = model.statistics()
        assert sum(core.rows for core in stats.cores) == 21
        assert sum(stats.batch_rows.counts) == sum(core.batches for core in stats.cores) == 6
        assert stats.batch_rows.sum == 21
        for histogram in (stats.queue_seconds, stats.total_seconds):
            assert sum(histogram.counts) == 21
    assert [core.state for core in model.statistics().cores] == ["closed", "closed"]


@scenario
async def test_times_are_those_of_the_clock():
    backend = PuppetBackend(1, service_time=lambda rows: 0.5 * rows)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        await asyncio.gather(*(model(row(n)) for n in range(8)))
    stats = model.statistics()
    assert stats.cores[0].busy_seconds == pytest.approx(4.0)
    assert stats.cores[0].service_seconds == pytest.approx(2.0)
    assert stats.queue_seconds.sum == pytest.approx(4 * 2.0)
    assert stats.total_seconds.sum == pytest.approx(4 * 2.0 + 4 * 4.0)


# Found by a reviewer; each was seen to fail.


@pytest.mark.pure
@pytest.mark.parametrize("where", ["bind", "pull"])
@scenario
async def test_a_broken_queue_leaves_nobody_waiting(monkeypatch, where):
    backend, model = puppets(concurrent=where == "bind")  # by the loop, which binds early to concurrent cores
    await model.start()
    calls = [call(model, n) for n in range(4)]
    await settle()
    calls += [call(model, n) for n in range(8)]
    await settle()
    scheduler = model._life.run.scheduler

    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(scheduler, where, broken)
    monkeypatch.setattr(scheduler, "discard", broken)
    calls.append(call(model, 0))
    await settle()
    if where == "pull":  # by the worker that has ended
        backend[0].release()
        await settle()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, Closed) for outcome in outcomes[4:])
    assert not model.ready
    await model.abort()


@scenario
async def test_a_deadline_counts_from_its_own_call_and_not_from_the_first_of_the_iteration():
    loop = asyncio.get_running_loop()
    backend = PuppetBackend(1, service_time=0.01)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        await model(row(0, rows=4))  # the service time is known
        first = call(model, 1)

        async def after_work():
            loop._jumping.now += 0.3  # somebody computes on the loop
            return await model.options(timeout=0.2)(row(2))

        late = asyncio.ensure_future(after_work())
        assert (await first)[0, 0] == -1
        assert (await late)[0, 0] == -2


async def test_a_stall_of_the_loop_does_not_refuse_calls_afterwards():
    backend = SimulatedBackend(cores=2, service_time=0.005)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        view = model.options(timeout=0.2)

        async def caller(until):
            fates = []
            while time.monotonic() < until:
                fates += await asyncio.gather(view(row(0)), return_exceptions=True)
            return fates

        callers = asyncio.gather(*(caller(time.monotonic() + 1.0) for _ in range(16)))
        await asyncio.sleep(0.2)
        time.sleep(0.3)  # the stall
        await callers
        async with asyncio.timeout(60.0):
            while not isinstance((await asyncio.gather(view(row(0)), return_exceptions=True))[0], torch.Tensor):
                pass


@scenario
async def test_map_keeps_within_max_pending():
    backend = PuppetBackend(1, service_time=0.01)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, max_pending=4) as model:
        assert await model._outstanding() == 4 + 4  # a batch executes, and as many wait as have room

        async def rows():
            for n in range(50):
                yield row(n)

        assert [y[0, 0].item() async for y in model.map(rows())] == [-n for n in range(50)]


def test_a_core_that_fails_does_not_hand_out_other_callers_rows():
    import traceback

    backend, model = puppets()

    async def main():
        async with model:
            calls = [call(model, n) for n in (1, 2)]
            await settle()
            backend[0].release(OSError("dead"))
            return await asyncio.gather(*calls, return_exceptions=True)

    for error in run(main()):
        assert isinstance(error, CoreFailed)
        frames = [frame for frame, _ in traceback.walk_tb(error.__cause__.__traceback__)]
        assert not frames


@scenario
async def test_calls_that_no_lane_can_begin_cost_the_loop_nothing_and_leave_as_they_came():
    backend, model = puppets()
    async with model:
        first = call(model, 0, rows=4)
        await settle()
        late = [call(model, n) for n in range(1, 5)]
        await asyncio.sleep(0)
        assert not model._life.run.dispatcher._scheduled  # nothing to dispatch: the worker that ends will take them
        assert check_sum(model).waiting == 4
        assert model.statistics().waiting_rows == 4
        late[1].cancel()
        await settle()
        assert (check_sum(model).waiting, check_sum(model).cancelled) == (3, 1)
        backend[0].release()
        await settle()
        assert values(backend[0].executing) == [1, 3, 4, 4]
        backend[0].release()
        assert len(await asyncio.gather(first, *late, return_exceptions=True)) == 5
        check_sum(model)


@scenario
async def test_a_lane_that_ends_with_an_error_still_gets_what_came_meanwhile():
    backend, model = puppets()
    async with model:
        first = call(model, 0)
        await settle()
        second = call(model, 1)
        await settle()
        backend[0].release(ValueError("of the first"))
        await settle()
        assert isinstance(first.exception(), ValueError)
        backend[0].release()
        assert (await second)[0, 0] == -1


@scenario
async def test_a_call_that_leaves_before_it_is_queued_is_not_noted_for_the_hold():
    backend, model = puppets(max_delay=0.1)
    async with model:
        first = call(model, 0)
        await settle()
        gone = asyncio.ensure_future(model(torch.zeros(1, 5)))  # of a kind that nothing else is
        await asyncio.sleep(0)
        gone.cancel()
        await settle()
        backend[0].release()
        assert (await first)[0, 0] == 0
        assert model.ready
