"""Calls on their own terms, through the front door: deadlines, priorities, tenants, timings, holding back.

On virtual time with puppet cores; the last ones with real threads.
"""

import asyncio
import gc
import random
import threading
import tracemalloc
from collections import Counter
from decimal import Decimal

import anyio
import pytest
import torch
import uvloop
from puppets import call, check_sum, release_all, row, scenario

from aneuron import AsyncDataParallel, Closed, SimulatedBackend
from aneuron.errors import AneuronError, DeadlineExceeded, QueueFull
from aneuron.testing import PuppetBackend, run, settle

pytestmark = pytest.mark.core

NAN, INF = float("nan"), float("inf")


def puppets(cores=1, service_time=None, concurrent=False, **settings):
    """Cores that wait to be released, or that take `service_time`."""
    settings.setdefault("batch_size", 4)
    backend = PuppetBackend(cores, service_time, concurrent=concurrent)
    return backend, AsyncDataParallel(torch.neg, backend=backend, **settings)


def now():
    return asyncio.get_running_loop().time()


def executed(backend):
    """The first column of what all cores have executed, batch by batch."""
    batches = [args[0] for core in backend.loaded.values() for args, _ in core.executed]
    return [batch[:, 0].tolist() for batch in batches]


def executed_rows(backend):
    return [value for batch in executed(backend) for value in batch]


async def fate(awaitable):
    """The name of what became of a call."""
    try:
        await awaitable
    except (AneuronError, asyncio.CancelledError) as error:
        return type(error).__name__
    return "answer"


# Bad input.


@pytest.mark.parametrize("timeout", [-1, -0.001, NAN, INF, -INF, True, False, "1", b"1", [1], Decimal(1), 1j])
def test_a_timeout_is_seconds(timeout):
    with pytest.raises(ValueError, match="expected seconds, 0 or more and finite") as caught:
        AsyncDataParallel(torch.neg).options(timeout=timeout)
    assert repr(timeout) in str(caught.value)


@pytest.mark.parametrize("priority", [NAN, INF, -INF, True, False, "high", None, [1], Decimal(1), 1j])
def test_a_priority_is_a_finite_number(priority):
    with pytest.raises(ValueError, match="expected a finite number") as caught:
        AsyncDataParallel(torch.neg).options(priority=priority)
    assert repr(priority) in str(caught.value)


@pytest.mark.parametrize("max_delay", [-1, -0.001, NAN, INF, -INF, True, False, "1", [1], Decimal(1)])
def test_a_delay_is_seconds(max_delay):
    with pytest.raises(ValueError, match="expected seconds, 0 or more and finite") as caught:
        AsyncDataParallel(torch.neg, max_delay=max_delay)
    assert "max_delay" in str(caught.value)
    assert repr(max_delay) in str(caught.value)


@pytest.mark.parametrize("tenant", [[], {}, {1}, ("a", [1]), bytearray(b"a")])
def test_a_tenant_is_hashable(tenant):
    with pytest.raises(TypeError, match="is not hashable; pass a name"):
        AsyncDataParallel(torch.neg).options(tenant=tenant)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError):
        AsyncDataParallel(torch.neg).options(prioritiy=1)


@scenario
async def test_any_hashable_is_a_tenant_and_any_finite_number_a_priority():
    _, model = puppets(service_time=1.0)
    terms = [{"tenant": tenant} for tenant in ("", 0, False, (), ("a", 1), frozenset(), object(), NAN, row(), len)]
    terms += [{"priority": priority} for priority in (0, -0.0, 1, -1e308, 1e308, 5e-324, 2**70)]
    terms += [{"timeout": timeout} for timeout in (100, 1e9, 1e300)]
    async with model:
        answers = await asyncio.gather(*(model.options(**each)(row(n)) for n, each in enumerate(terms)))
    assert [answer[0, 0].item() for answer in answers] == [-n for n in range(len(terms))]


# The view.


@scenario
async def test_a_view_is_bound_and_may_be_used_again():
    _, model = puppets(service_time=1.0)
    view = model.options(timeout=5, priority=1, tenant="acme")  # before the start
    async with model:
        for _ in range(3):
            assert (await view(row(2)))[0, 0] == -2
        assert torch.equal(await view(input=row(3)), -row(3))
        result, timing = await view.timed(row(4, rows=2))
        assert result.tolist() == [[-4, -4], [-4, -4]]
        assert timing.total == 1
    assert "options(timeout=5.0, priority=1, tenant='acme')" in repr(view)


def test_a_view_is_small_and_does_not_start_anything():
    model = AsyncDataParallel(torch.neg)
    view = model.options(timeout=1)
    assert not hasattr(view, "__dict__")
    assert not model.ready
    assert model.statistics().calls.accepted == 0


def test_views_are_fully_typed():
    for function in (AsyncDataParallel.options, AsyncDataParallel.timed, type(AsyncDataParallel(len).options()).timed):
        hints = {**function.__annotations__}
        assert "return" in hints
        names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        assert set(names) <= set(hints)


@scenario
async def test_a_view_of_a_closed_model_is_refused_and_of_a_restarted_one_serves():
    _, model = puppets(service_time=1.0)
    view = model.options(tenant="a")
    async with model:
        pass
    with pytest.raises(Closed):
        await view(row())
    async with model:
        await view(row())


@scenario
async def test_bad_inputs_are_refused_on_any_terms():
    _, model = puppets(service_time=1.0)
    async with model:
        with pytest.raises(ValueError, match="rows"):
            await model.options(timeout=1, tenant="a")(torch.ones(0, 2))
    assert check_sum(model).accepted == 0


# Deadlines.


@scenario
async def test_a_deadline_ends_a_call_that_waits_and_its_rows_are_not_executed():
    backend, model = puppets(num_workers=1)
    async with model:
        first = call(model, 1)
        await settle()
        late = asyncio.ensure_future(model.options(timeout=2)(row(7, rows=3)))
        fine = call(model, 2)
        await settle()
        assert model.statistics().waiting_rows == 4
        with pytest.raises(DeadlineExceeded, match=r"timeout=2 s has passed") as caught:
            await late
        assert isinstance(caught.value, TimeoutError)
        assert now() == 2
        assert model.statistics().waiting_rows == 1
        await release_all(backend, first, fine)
        assert 7 not in executed_rows(backend)
    calls = check_sum(model)
    assert (calls.completed, calls.failed, calls.cancelled) == (2, 1, 0)


@scenario
async def test_a_deadline_ends_a_call_that_is_bound_and_drops_its_rows_from_the_batch():
    backend, model = puppets(concurrent=True)
    async with model:
        first = [call(model, 1) for _ in range(4)]
        late = asyncio.ensure_future(model.options(timeout=2)(row(7)))
        mates = [call(model, 2) for _ in range(3)]
        await settle()
        assert model.statistics().cores[0].in_flight == 2
        assert await fate(late) == "DeadlineExceeded"
        assert check_sum(model).running == 7
        await release_all(backend, *first, *mates)
        assert 7 not in executed_rows(backend)


@scenario
async def test_a_bound_batch_whose_calls_are_all_late_is_not_executed():
    backend, model = puppets(concurrent=True)
    async with model:
        first = call(model, 1, rows=4)
        late = [asyncio.ensure_future(model.options(timeout=2)(row(7))) for _ in range(4)]
        await settle()
        assert model.statistics().cores[0].in_flight == 2
        assert {await fate(task) for task in late} == {"DeadlineExceeded"}
        await release_all(backend, first)
        assert executed(backend) == [[1, 1, 1, 1]]
        assert model.statistics().cores[0].in_flight == 0


@scenario
async def test_a_deadline_ends_a_call_that_executes_and_the_slot_stays_taken():
    backend, model = puppets(num_workers=1)
    async with model:
        late = asyncio.ensure_future(model.options(timeout=2)(row(7)))
        mate = call(model, 1)
        await settle()
        assert await fate(late) == "DeadlineExceeded"
        assert now() == 2
        after = call(model, 2)
        await settle()
        assert model.statistics().cores[0].in_flight == 1
        assert check_sum(model).waiting == 1
        await release_all(backend, mate, after)
        assert [(await task)[0, 0].item() for task in (mate, after)] == [-1, -2]
    assert check_sum(model).failed == 1


@scenario
async def test_what_cannot_fit_even_alone_is_refused_at_once():
    backend, model = puppets(2, service_time=1.0)
    async with model:
        await model(row(0, rows=8))
        begin = now()
        with pytest.raises(DeadlineExceeded, match="cannot be met"):
            await model.options(timeout=0.5)(row(7))
        with pytest.raises(DeadlineExceeded, match="cannot be met"):
            await model.options(timeout=1.5)(row(7, rows=9))  # two rounds on two cores of four rows each
        assert now() == begin
        assert (await model.options(timeout=2.5)(row(1, rows=9))).shape == (9, 2)
        assert 7 not in executed_rows(backend)
    calls = check_sum(model)
    assert (calls.accepted, calls.completed, calls.failed, calls.refused) == (4, 2, 2, 0)


@scenario
async def test_nothing_is_refused_while_times_are_unknown():
    backend, model = puppets(1, service_time=1.0)
    async with model:
        begin = now()
        tasks = [asyncio.ensure_future(model.options(timeout=0.25)(row(7))) for _ in range(20)]
        await settle()
        assert not any(task.done() for task in tasks)
        assert {await fate(task) for task in tasks} == {"DeadlineExceeded"}
        assert now() == begin + 0.25
    assert len(executed(backend)) == 1


@scenario
async def test_a_timeout_of_zero_is_a_deadline_now():
    _, model = puppets(1, service_time=1.0)
    async with model:
        begin = now()
        assert await fate(model.options(timeout=0)(row())) == "DeadlineExceeded"
        assert await fate(model.options(timeout=0.0)(row())) == "DeadlineExceeded"
        assert now() == begin
        await model(row())
        assert await fate(model.options(timeout=0)(row())) == "DeadlineExceeded"
    assert check_sum(model).failed == 3


@scenario
async def test_a_call_that_has_become_hopeless_is_dropped_before_it_costs_anything():
    backend, model = puppets(1, service_time=1.0, num_workers=1)
    async with model:
        await model(row())
        begin = now()
        first = call(model, 1, rows=4)
        await asyncio.sleep(0.5)
        hopeless = asyncio.ensure_future(model.options(timeout=1.25)(row(7)))  # half a second, and one for itself
        fine = asyncio.ensure_future(model.options(timeout=1.75)(row(2)))
        with pytest.raises(DeadlineExceeded, match="cannot be met"):
            await hopeless
        assert now() == begin + 1  # when its turn came, not when the deadline passed
        await asyncio.gather(first, fine)
        assert now() == begin + 2
        assert 7 not in executed_rows(backend)
    check_sum(model)


@scenario
async def test_an_answer_in_time_stops_the_clock():
    _, model = puppets(1, service_time=1.0)
    async with model:
        for _ in range(5):
            await model.options(timeout=60)(row())
        begin = now()
    assert now() == begin  # nothing is left to wait for
    assert check_sum(model).completed == 5


@scenario
async def test_a_cancelled_call_with_a_deadline_is_cancelled_once():
    backend, model = puppets(num_workers=1)
    async with model:
        first = call(model, 1)
        await settle()
        task = asyncio.ensure_future(model.options(timeout=1)(row(7)))
        await settle()
        task.cancel()
        assert await fate(task) == "CancelledError"
        await asyncio.sleep(2)
        await release_all(backend, first)
    calls = check_sum(model)
    assert (calls.completed, calls.failed, calls.cancelled) == (1, 0, 1)


@scenario
async def test_scopes_work_on_views_as_everywhere():
    backend, model = puppets(num_workers=1)
    view = model.options(timeout=50, tenant="a")
    async with model:
        first = call(model, 1)
        await settle()
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1):
                await view(row(7))
        assert not isinstance(caught.value, DeadlineExceeded)
        with anyio.move_on_after(1) as scope:
            await view(row(7))
        assert scope.cancelled_caught
        await release_all(backend, first)
    assert check_sum(model).cancelled == 2


@scenario
async def test_the_inner_of_two_timeouts_is_the_one_that_strikes():
    _, model = puppets(num_workers=1, service_time=100.0)
    async with model:
        first = call(model, 1)
        await settle()
        async with asyncio.timeout(5):
            with pytest.raises(DeadlineExceeded):
                await model.options(timeout=1)(row())
        await first


@scenario
async def test_a_large_call_with_a_deadline_leaves_with_all_its_rows():
    backend, model = puppets(2, service_time=1.0, num_workers=2)
    async with model:
        late = asyncio.ensure_future(model.options(timeout=2.5)(row(7, rows=400)))
        fine = [call(model, n) for n in range(4)]
        assert await fate(late) == "DeadlineExceeded"
        assert now() <= 2.5
        await asyncio.gather(*fine)
        await asyncio.sleep(5)
        assert model.statistics().waiting_rows == 0
        before = len(executed(backend))
        await asyncio.sleep(5)
        assert len(executed(backend)) == before <= 8
    check_sum(model)


async def overload(model, seconds, rate, terms):
    """Calls of one row at `rate` a second; `terms(n)` are those of the nth one. Fates by tenant."""
    fates = Counter()

    async def one(n):
        own = terms(n)
        fates[own.get("tenant"), await fate(model.options(**own)(row(n)))] += 1

    tasks = []
    for n in range(int(seconds * rate)):
        tasks.append(asyncio.ensure_future(one(n)))
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*tasks)
    return fates


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@scenario
async def test_at_twice_the_capacity_goodput_stays_there_and_none_is_executed_in_vain(jitter):
    pick = random.Random(1)
    _, model = puppets(4, service_time=lambda rows: 0.1 * (1 + jitter * pick.uniform(-1, 1)))
    async with model:
        await model(row())
        capacity = 4 * 4 / 0.1
        fates = await overload(model, 20, 2 * capacity, lambda n: {"timeout": 0.503})  # not the time of so many batches
        good = fates[None, "answer"]
        assert set(fates) == {(None, "answer"), (None, "DeadlineExceeded")}
        assert good >= (0.98 if not jitter else 0.95) * 20 * capacity
        rows = sum(core.rows for core in model.statistics().cores)
        assert rows - good - 1 <= (0 if not jitter else 0.05 * good)  # executed for somebody who had left
    check_sum(model)


@scenario
async def test_under_overload_who_asks_for_less_than_a_share_loses_nothing():
    _, model = puppets(4, service_time=0.1)
    async with model:
        await model(row())
        terms = [{"timeout": 0.5, "tenant": "small" if n % 8 == 0 else "greedy"} for n in range(8)]
        fates = await overload(model, 20, 2 * 160, lambda n: terms[n % 8])
    assert fates["small", "DeadlineExceeded"] == 0
    assert fates["small", "answer"] == 800
    assert fates["greedy", "answer"] >= 0.97 * (160 * 20 - 800)


@scenario
async def test_under_overload_the_important_are_served_and_the_others_share_the_rest():
    _, model = puppets(4, service_time=0.1)
    async with model:
        await model(row())

        def terms(n):
            return {"timeout": 0.503, "tenant": n % 4 == 0, "priority": 10 * (n % 4 == 0)}

        fates = await overload(model, 10, 2 * 160, terms)
    assert fates[True, "DeadlineExceeded"] == 0
    assert fates[False, "answer"] >= 0.97 * (1600 - 800)


@scenario
async def test_under_overload_without_deadlines_the_bound_refuses():
    _, model = puppets(4, service_time=0.1, max_pending=64)
    async with model:
        await model(row())
        fates = await overload(model, 10, 2 * 160, lambda n: {})
        assert set(fates) == {(None, "answer"), (None, "QueueFull")}
        assert fates[None, "answer"] >= 0.98 * 1600
    assert check_sum(model).refused == fates[None, "QueueFull"]


@scenario
async def test_a_tenant_has_its_share_also_when_another_fills_the_room():
    _, model = puppets(4, service_time=0.05, max_pending=64)
    loop, fates = asyncio.get_running_loop(), Counter()

    async def caller(tenant):
        while loop.time() < 0.5:
            try:
                await model.options(tenant=tenant)(row())
                fates[tenant, "answer"] += 1
            except QueueFull as error:
                fates[tenant, "refused"] += 1
                await asyncio.sleep(error.retry_after or 0.017)

    async with model:
        await asyncio.gather(*[caller("many") for _ in range(200)], caller("few"), caller("few"))
        calls = check_sum(model)
    assert fates["few", "refused"] == 0
    assert fates["few", "answer"] >= 2 * 4  # each waits for a batch at most, and for its own
    assert calls.failed + calls.refused == fates["many", "refused"]  # those that gave way had been accepted
    assert calls.failed > 0


@scenario
async def test_who_gives_way_is_told_so_and_when_to_come_back():
    backend, model = puppets(num_workers=1, max_pending=2)
    async with model:
        tasks = [call(model, 0)]
        await settle()
        tasks += [call(model, n) for n in range(1, 3)]
        await settle()
        high = asyncio.ensure_future(model.options(priority=100)(row(7)))
        await settle()
        error = tasks[2].exception()
        assert isinstance(error, QueueFull)
        assert "has given its room to another tenant with less, or to a higher level" in str(error)
        await release_all(backend, high, *tasks[:2])
        calls = check_sum(model)
        assert (calls.accepted, calls.completed, calls.failed, calls.refused) == (4, 3, 1, 0)


@scenario
async def test_the_door_refuses_nobody_who_might_find_room():
    backend, model = puppets(num_workers=1, max_pending=2)
    async with model:
        tasks = []
        for n in range(3):
            tasks.append(asyncio.ensure_future(model.options(tenant="many")(row(n))))
            await settle()
        model.check_admission()  # it may be another tenant's
        tasks += [asyncio.ensure_future(model.options(tenant="few")(row(3)))]
        await settle()
        assert isinstance(tasks[2].exception(), QueueFull)
        with pytest.raises(QueueFull):
            model.check_admission()  # both have their share, and a third would find none
        await release_all(backend, *tasks)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
@scenario
async def test_max_pending_is_set_at_run_time_and_checked(value):
    backend, model = puppets(num_workers=1, max_pending=1)
    async with model:
        tasks = [call(model, n, rows=1) for n in range(2)]
        await settle()
        with pytest.raises(ValueError, match=r"max_pending=.*: expected an int of at least 1, or None"):
            model.max_pending = value
        assert model.max_pending == 1
        with pytest.raises(QueueFull):
            await model(row(0))
        model.max_pending = 3
        tasks += [call(model, n, rows=1) for n in range(2)]
        await settle()
        model.max_pending = 1  # those that wait are left alone
        with pytest.raises(QueueFull):
            await model(row(0))
        await release_all(backend, *tasks)
        assert check_sum(model).completed == 4


@scenario
async def test_a_call_that_finds_no_room_is_refused_not_late():
    backend, model = puppets(num_workers=1, max_pending=1)
    async with model:
        tasks = [call(model, n, rows=1) for n in range(1)]
        await settle()
        tasks.append(call(model, 5))
        await settle()
        with pytest.raises(QueueFull):
            await model.options(timeout=1)(row())
        await release_all(backend, *tasks)


@scenario
async def test_a_deadline_during_the_search_for_an_offender_leaves_the_others_their_answers():
    def picky(x):
        if (x == 5).any():
            raise LookupError("five")
        return -x

    backend = PuppetBackend(1, 1.0)
    async with AsyncDataParallel(picky, backend=backend, batch_size=4) as model:
        late = asyncio.ensure_future(model.options(timeout=1.5)(row(1)))
        others = [call(model, n) for n in (2, 3, 5)]
        assert await fate(late) == "DeadlineExceeded"
        assert [(await task)[0, 0].item() for task in others[:2]] == [-2, -3]
        with pytest.raises(LookupError):
            await others[2]
    assert check_sum(model).failed == 2


# Priority and tenants.


async def order_of(backend, model, *waves):
    """The values in the order in which a core of one-row batches executes them; (terms, value) come in waves."""
    tasks = [call(model, 0)]
    for wave in waves:
        await settle()
        for terms, value in wave:
            tasks.append(asyncio.ensure_future(model.options(**terms)(row(value))))
        await asyncio.sleep(1)
    await release_all(backend, *tasks)
    return [batch[0] for batch in executed(backend)][1:]


@scenario
async def test_who_is_more_important_goes_first_and_waiting_counts_a_second_each():
    backend, model = puppets(batch_size=1)
    async with model:
        wave = [({"priority": -1}, 1), ({}, 2), ({"priority": 2.5}, 3), ({"priority": 2.5}, 4), ({"priority": 1}, 5)]
        assert await order_of(backend, model, wave) == [3, 4, 5, 2, 1]
    backend, model = puppets(batch_size=1)
    async with model:
        waves = [({"priority": -1.5}, 1), ({}, 2)], [({"priority": 1.5}, 3)], [({}, 4), ({"priority": 0.5}, 5)]
        assert await order_of(backend, model, *waves) == [3, 2, 1, 5, 4]


@scenario
async def test_tenants_take_turns_within_a_batch():
    backend, model = puppets(num_workers=1)
    async with model:
        tasks = [call(model, 0, rows=4)]
        await settle()
        tasks += [asyncio.ensure_future(model.options(tenant="a")(row(1))) for _ in range(20)]
        await settle()
        tasks += [asyncio.ensure_future(model.options(tenant="b")(row(2))) for _ in range(4)]
        await settle()
        await release_all(backend, *tasks)
        assert [Counter(batch) for batch in executed(backend)[1:3]] == [Counter({1: 2, 2: 2})] * 2


@scenario
async def test_calls_without_a_tenant_are_one_tenant():
    backend, model = puppets(num_workers=1)
    async with model:
        tasks = [call(model, 0, rows=4)]
        await settle()
        tasks += [call(model, 1) for _ in range(20)]
        await settle()
        tasks += [asyncio.ensure_future(model.options(tenant="b")(row(2))) for _ in range(4)]
        await settle()
        await release_all(backend, *tasks)
        assert [Counter(batch) for batch in executed(backend)[1:3]] == [Counter({1: 2, 2: 2})] * 2


# Timings.


@scenario
async def test_timing_of_a_packed_and_padded_call():
    _, model = puppets(1, service_time=1.0)
    async with model:
        first = call(model, 0)
        await asyncio.sleep(0.25)
        (_, one), (_, two) = await asyncio.gather(model.timed(row(1)), model.options(tenant="x").timed(row(2, rows=2)))
        await first
        assert one == two
        assert (one.queued, one.device, one.total) == (0.75, 1.0, 1.75)
        assert (one.core, one.batch_rows, one.padded_rows, one.why) == (0, 3, 1, "core_idle")
        _, full = await model.timed(row(3, rows=4))
        assert (full.queued, full.device, full.total) == (0.0, 1.0, 1.0)
        assert (full.batch_rows, full.padded_rows, full.why) == (4, 0, "full")


@scenario
async def test_timing_of_a_call_that_is_spread_over_cores_and_batches():
    _, model = puppets(2, service_time=1.0)
    async with model:
        _, timing = await model.timed(row(1, rows=17))  # five batches, in three rounds
        assert (timing.queued, timing.device, timing.total) == (0.0, 3.0, 3.0)
        assert (timing.batch_rows, timing.padded_rows, timing.why) == (1, 3, "core_idle")


@scenario
async def test_timing_of_a_call_that_is_run_again():
    def picky(x):
        if (x == 5).any():
            raise LookupError("five")
        return -x

    async with AsyncDataParallel(picky, backend=PuppetBackend(1, 1.0), batch_size=4) as model:
        calls = [model.timed(row(n)) for n in (1, 2, 3, 5)]
        *good, bad = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(bad, LookupError)
        timings = [timing for _, timing in good]
        assert [timing.why for timing in timings] == ["rerun"] * 3
        assert [(timing.queued, timing.device, timing.total) for timing in timings[:2]] == [(0.0, 2.0, 2.0)] * 2
        assert [timing.batch_rows for timing in timings[:2]] == [2, 2]
        assert timings[2].batch_rows == 1


@scenario
async def test_timing_of_calls_that_share_no_batch_with_what_waits():
    _, model = puppets(1, service_time=1.0)
    async with model:
        first = call(model, 0)
        await settle()
        one, other = await asyncio.gather(model.timed(row(1)), model.timed(torch.ones(1, 3)))
        await first
        assert [one[1].why, other[1].why] == ["signature", "core_idle"]


@scenario
async def test_a_call_that_fails_has_no_timing_and_the_next_has_its_own():
    backend, model = puppets()
    async with model:
        task = asyncio.ensure_future(model.timed(row()))
        await settle()
        backend[0].release(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await task
        task = asyncio.ensure_future(model.timed(row(1)))
        await settle()
        await asyncio.sleep(2)
        backend[0].release()
        _, timing = await task
        assert (timing.queued, timing.device) == (0.0, 2.0)


# Holding back.


@scenario
async def test_a_partial_batch_is_held_only_while_another_core_works():
    _, model = puppets(2, service_time=10.0, max_delay=0.5)
    async with model:
        _, alone = await model.timed(row())
        assert alone.queued == 0
        busy = call(model)
        await settle()
        timings = [asyncio.ensure_future(model.timed(row(n))) for n in range(2)]
        await asyncio.sleep(0.25)
        timings.append(asyncio.ensure_future(model.timed(row(2))))
        (_, first), _, (_, last) = await asyncio.gather(*timings)
        assert first.queued == pytest.approx(0.5)
        assert last.queued == pytest.approx(0.25)
        assert first.batch_rows == last.batch_rows == 3
        await busy


@scenario
async def test_the_reason_of_what_was_held_is_delay():
    _, model = puppets(2, service_time=8.0, max_delay=0.5)
    async with model:
        busy = call(model)
        await asyncio.sleep(1)
        _, held = await model.timed(row())
        assert held.why == "delay"
        await busy
    assert model.statistics().closed_because["delay"] == 1


@scenario
async def test_company_that_fills_the_batch_ends_the_hold():
    _, model = puppets(2, service_time=10.0, max_delay=5.0)
    async with model:
        busy = call(model)
        await settle()
        timings = [asyncio.ensure_future(model.timed(row(n))) for n in range(3)]
        await asyncio.sleep(1)
        timings.append(asyncio.ensure_future(model.timed(row(3))))
        done = [timing for _, timing in await asyncio.gather(*timings)]
        assert [timing.queued for timing in done] == [1, 1, 1, 0]
        assert {timing.why for timing in done} == {"full"}
        await busy


@scenario
async def test_a_core_that_falls_idle_ends_the_hold_where_no_other_works():
    _, model = puppets(2, service_time=2.0, max_delay=50.0)
    async with model:
        busy = call(model)
        await asyncio.sleep(1)
        _, timing = await model.timed(row())
        assert timing.queued == 1
        await busy


@scenario
async def test_full_batches_of_others_pass_a_call_that_is_held():
    backend, model = puppets(3, service_time=10.0, max_delay=5.0)
    async with model:
        busy = call(model, 1)
        await settle()
        held = asyncio.ensure_future(model.timed(row(2)))
        await settle()
        _, full = await model.timed(torch.ones(4, 3))
        assert (full.queued, full.why) == (0.0, "full")
        _, timing = await held
        assert timing.queued == pytest.approx(5.0)
        await busy
    assert len(executed(backend)) == 3


@scenario
async def test_a_drain_releases_what_is_held():
    backend, model = puppets(2, service_time=10.0, max_delay=1e6)
    await model.start()
    busy = call(model)
    await asyncio.sleep(1)
    held = asyncio.ensure_future(model.timed(row(1)))
    await settle()
    assert model.statistics().waiting_rows == 1
    await model.aclose()
    _, timing = await held
    assert (timing.queued, timing.why) == (0.0, "drain")
    assert now() == 11
    await busy
    assert len(executed(backend)) == 2


@scenario
async def test_a_held_call_may_be_cancelled_aborted_or_late():
    _, model = puppets(2, service_time=10.0, max_delay=1e6)
    await model.start()
    busy = call(model)
    await asyncio.sleep(1)
    tasks = [call(model), asyncio.ensure_future(model.options(timeout=2)(row())), call(model)]
    await settle()
    tasks[0].cancel()
    assert await fate(tasks[1]) == "DeadlineExceeded"
    assert now() == 3
    assert model.statistics().waiting_rows == 1
    await model.abort()
    assert [await fate(task) for task in tasks[::2]] == ["CancelledError", "Closed"]
    assert await fate(busy) == "answer"  # it executed
    check_sum(model)


async def held_seconds(max_delay, gap, calls=60):
    """Seconds that calls wait beside a core that always works, at one call each `gap`; a core takes a second."""
    _, model = puppets(4, service_time=1.0, batch_size=8, max_delay=max_delay)
    async with model:
        await model(row(0, rows=8))
        await model(row(0, rows=1))
        tasks = []
        for n in range(calls):
            tasks.append(asyncio.ensure_future(model.timed(row(n))))
            await asyncio.sleep(gap)
        return [timing.queued for _, timing in await asyncio.gather(*tasks)]


def test_a_learned_hold_waits_a_cores_share_where_company_comes_and_is_off_by_default():
    frequent, rare = 0.1, 0.4
    assert max(run(held_seconds(None, rare))) < 0.01
    learned = run(held_seconds(None, frequent))[20:]
    assert 0.2 < max(learned) < 0.26
    assert run(held_seconds(0.0, frequent))[:3] == [0, 0, 0]
    assert AsyncDataParallel(torch.neg)._settings.max_delay == 0.0


# Bound batches.


@scenario
async def test_an_idle_lane_takes_over_what_another_has_bound_and_not_begun():
    backend, model = puppets(2, concurrent=True)
    async with model:
        calls = [asyncio.ensure_future(model.timed(row(n))) for n in range(16)]
        await settle()
        assert [core.in_flight for core in model.statistics().cores] == [2, 2]
        await asyncio.sleep(1)
        backend[1].release()
        await settle()
        backend[1].release()
        await settle()
        assert [core.in_flight for core in model.statistics().cores] == [1, 1]
        assert backend[1].executing[0][0][:, 0].tolist() == [8, 9, 10, 11]  # was bound to core 0
        await asyncio.sleep(1)
        await release_all(backend, *calls)
        results = [await task for task in calls]
        assert [result[0, 0].item() for result, _ in results] == [-n for n in range(16)]
        moved = results[8][1]
        assert (moved.core, moved.queued, moved.device, moved.total) == (1, 1.0, 1.0, 2.0)
        assert (moved.batch_rows, moved.padded_rows, moved.why) == (4, 0, "full")
        assert [core.rows for core in model.statistics().cores] == [4, 12]
        assert [core.in_flight for core in model.statistics().cores] == [0, 0]


@scenario
async def test_calls_leave_bound_batches_in_every_way():
    backend, model = puppets(1, concurrent=True)
    async with model:
        first = call(model, 0, rows=4)
        bound = [
            call(model, 1),
            asyncio.ensure_future(model.options(timeout=1)(row(2))),
            call(model, 3),
            call(model, 4),
        ]
        waiting = call(model, 5)
        await settle()
        calls = check_sum(model)
        assert (calls.running, calls.waiting) == (5, 1)
        bound[0].cancel()
        assert await fate(bound[1]) == "DeadlineExceeded"
        await release_all(backend, first, *bound, waiting)
        assert executed(backend) == [[0] * 4, [3, 4, 4, 4], [5] * 4]
    calls = check_sum(model)
    assert (calls.completed, calls.failed, calls.cancelled) == (4, 1, 1)


@scenario
async def test_an_abort_ends_what_is_bound_and_leaves_what_executes():
    backend, model = puppets(2, concurrent=True)
    await model.start()
    calls = [call(model, n) for n in range(20)]
    await settle()
    assert check_sum(model).running == 16
    await model.abort()
    await settle()
    assert [task.done() for task in calls] == [False] * 8 + [True] * 12
    assert {await fate(task) for task in calls[8:]} == {"Closed"}
    await release_all(backend, *calls)
    assert [(await task)[0, 0].item() for task in calls[:8]] == [-n for n in range(8)]
    assert len(executed(backend)) == 2
    check_sum(model)
    assert [core.in_flight for core in model.statistics().cores] == [0, 0]


@scenario
async def test_an_error_in_a_bound_batch_stays_there():
    backend, model = puppets(1, concurrent=True)
    async with model:
        first, second = call(model, 0, rows=4), call(model, 1, rows=4)
        await settle()
        backend[0].release(ValueError("first"))
        await settle()
        backend[0].release()
        with pytest.raises(ValueError, match="first"):
            await first
        assert (await second)[0, 0] == -1


# Real threads.


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_slow_copies_get_a_second_thread_and_every_caller_its_own_rows(factory):
    width = 64 * 1024  # 2 MB a batch

    async def main():
        backend = SimulatedBackend(cores=2, service_time=0.002, submits=False)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            async with asyncio.timeout(30):
                views = [model, model.options(tenant="a"), model.options(priority=1, timeout=60)]

                async def caller(n):
                    for turn in range(6):
                        value = 10 * n + turn
                        rows = 1 + (n + turn) % 3
                        y = await views[n % 3](torch.full((rows, width), float(value)))
                        assert y.shape == (rows, width)
                        assert (y == -value).all()

                await asyncio.gather(*(caller(n) for n in range(24)))
            names = {thread.name for thread in threading.enumerate()}
            return names, check_sum(model)

    with asyncio.Runner(loop_factory=factory) as runner:
        names, calls = runner.run(main())
    assert {"aneuron-core-0/2", "aneuron-core-1/2"} <= names
    assert calls.completed == calls.accepted == 144


@pytest.mark.parametrize("end", ["aclose", "abort"])
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_callers_come_leave_and_are_late_while_batches_are_staged(factory, end):
    async def main():
        pick = random.Random(7)
        model = AsyncDataParallel(
            torch.neg, backend=SimulatedBackend(cores=2, service_time=0.002), batch_size=4, max_delay=0.001
        )
        await model.start()

        async def caller(n):
            rows = pick.choice([1, 2, 9])
            x = torch.full((rows, 64 * 1024), float(n))
            timeout = pick.choice([None, 0.0, 0.01, 0.05, 5.0]) if rows <= 4 else None
            view = model.options(timeout=timeout, tenant=pick.choice([None, "a"]))
            try:
                y = await view(x)
            except (DeadlineExceeded, Closed) as error:
                return type(error).__name__
            assert torch.equal(y, -x)
            return "answer"

        async def answered(task):
            try:
                return await task
            except asyncio.CancelledError:
                return "cancelled"

        async with asyncio.timeout(30):
            tasks = []
            for n in range(200):
                tasks.append(asyncio.ensure_future(caller(n)))
                if pick.random() < 0.1:
                    pick.choice(tasks).cancel()
                await asyncio.sleep(pick.choice([0, 0.001]))
            closing = asyncio.ensure_future(getattr(model, end)())
            fates = Counter([await answered(task) for task in tasks])
            await closing
        assert fates["answer"] > 20
        calls = check_sum(model)
        assert (calls.waiting, calls.running) == (0, 0)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


# Memory.


@pytest.mark.parametrize("terms", [{}, {"priority": 1.0, "tenant": "acme"}], ids=["usual", "tenant"])
@scenario
async def test_a_waiting_call_costs_less_than_2_kb_with_its_task(terms):
    n = 10_000
    backend, model = puppets(1, num_workers=1)
    async with model:
        first = call(model, 0, rows=4)
        await settle()
        view, x = model.options(**terms), row(1)
        warm = [asyncio.ensure_future(view(x)) for _ in range(100)]
        await settle()
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        tasks = [asyncio.ensure_future(view(x)) for _ in range(n)]
        await settle()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert check_sum(model).waiting == n + 100
        assert (after - before) / n < 2000
        for task in (*tasks, *warm):
            task.cancel()
        await settle()
        assert model.statistics().waiting_rows == 0
        await release_all(backend, first)
