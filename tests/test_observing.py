"""What an observer is told of calls and executions. On virtual time with puppet cores; the last one with threads."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch
from puppets import check_sum, row, scenario

from aneuron import AsyncDataParallel, CpuBackend, ShapeError
from aneuron.testing import PuppetBackend, settle


class Diary:
    """Writes everything down; calls are named in the order of their coming."""

    def __init__(self):
        self.calls = []  # (name, what ended it)
        self.batches = []  # ([(name, rows)], core, rows, padded rows, why, what ended it)
        self.timings = {}
        self.open = 0
        self.threads = set()

    @contextmanager
    def call(self, timing):
        name = f"call {len(self.timings)}"
        self.timings[name] = None
        self.open += 1
        try:
            yield name
        except BaseException as error:
            self.calls.append((name, type(error)))
            raise
        else:
            self.timings[name] = timing()
            self.calls.append((name, None))
        finally:
            self.open -= 1

    @contextmanager
    def batch(self, calls, *, core, rows, padded_rows, why):
        self.threads.add(threading.current_thread().name)
        ended = None
        try:
            yield
        except BaseException as error:
            ended = type(error)
            raise
        finally:
            self.batches.append((list(calls), core, rows, padded_rows, why, ended))


def observed(net=torch.neg, cores=1, service_time=1.0, **settings):
    model = AsyncDataParallel(net, backend=PuppetBackend(cores, service_time), batch_size=4, **settings)
    diary = Diary()
    model.observe(diary)
    return model, diary


@scenario
async def test_calls_that_share_a_batch_are_named_with_their_rows():
    model, diary = observed()
    async with model:
        await asyncio.gather(model(row(1)), model.options(tenant="x")(row(2, rows=2)))
        check_sum(model)
    assert diary.batches == [([("call 0", 1), ("call 1", 2)], 0, 3, 1, "core_idle", None)]
    assert diary.calls == [("call 0", None), ("call 1", None)]
    timing = diary.timings["call 1"]
    assert (timing.queued, timing.device, timing.total, timing.batch_rows) == (0.0, 1.0, 1.0, 3)


@scenario
async def test_a_call_over_several_batches_is_in_each_of_them():
    model, diary = observed(cores=2)
    async with model:
        await model(row(1, rows=9))
    assert sorted(calls for calls, *_ in diary.batches) == [[("call 0", 1)], [("call 0", 4)], [("call 0", 4)]]
    assert {core for _, core, *_ in diary.batches} == {0, 1}
    assert diary.calls == [("call 0", None)]


@scenario
async def test_map_timed_and_views_are_observed_once():
    async def source():  # an asynchronous one: threads have no place in virtual time
        yield row(2)

    model, diary = observed()
    async with model:
        _, timing = await model.timed(row(1))
        _, again = await model.options(priority=1).timed(row(1))
        assert [y async for y in model.map(source())]
    assert diary.calls == [("call 0", None), ("call 1", None), ("call 2", None)]
    assert [diary.timings["call 0"], diary.timings["call 1"]] == [timing, again]
    assert [calls for calls, *_ in diary.batches] == [[(f"call {n}", 1)] for n in range(3)]


@scenario
async def test_an_error_leaves_the_batch_and_then_the_call_that_caused_it():
    def picky(x):
        if (x == 5).any():
            raise LookupError("five")
        return -x

    model, diary = observed(picky)
    async with model:
        results = await asyncio.gather(*(model(row(n)) for n in (1, 2, 3, 5)), return_exceptions=True)
    assert [type(result) for result in results] == [torch.Tensor] * 3 + [LookupError]
    assert sorted(diary.calls) == [("call 0", None), ("call 1", None), ("call 2", None), ("call 3", LookupError)]
    first, *others = diary.batches
    assert first == ([(f"call {n}", 1) for n in range(4)], 0, 4, 0, "full", LookupError)
    assert {batch[4] for batch in others} == {"rerun"}
    assert [batch[5] for batch in others if ("call 3", 1) in batch[0]] == [LookupError, LookupError]
    assert [batch[5] for batch in others if ("call 3", 1) not in batch[0]] == [None, None]


@scenario
async def test_a_call_that_is_refused_or_does_not_fit_is_a_call_too():
    model, diary = observed(example_inputs=row(rows=4))
    async with model:
        with pytest.raises(ShapeError):
            await model(torch.ones(1, 7))
        before = diary.batches.copy()
    with pytest.raises(RuntimeError):
        await model(row())  # closed
    assert [error.__name__ for _, error in diary.calls] == ["ShapeError", "Closed"]
    assert before == []  # and warming up is not an execution of calls


@scenario
async def test_a_call_that_is_cancelled_while_it_waits_is_in_no_batch():
    model, diary = observed()
    async with model:
        first = asyncio.ensure_future(model(row(0, rows=4)))
        await settle()
        second = asyncio.ensure_future(model(row(1)))
        await settle()
        second.cancel()
        await asyncio.wait([second])
        await first
        third = asyncio.ensure_future(model(row(2)))
        await settle()
        third.cancel()  # while it is executed: the device is still working
        await asyncio.wait([third])
    assert diary.calls == [("call 1", asyncio.CancelledError), ("call 0", None), ("call 2", asyncio.CancelledError)]
    assert [calls for calls, *_ in diary.batches] == [[("call 0", 4)], [("call 2", 1)]]


@scenario
async def test_calls_from_before_and_after_are_left_out():
    model, diary = observed()
    model.observe(None)
    async with model:
        blind = asyncio.ensure_future(model(row(0, rows=4)))
        await settle()
        waiting = asyncio.ensure_future(model(row(1)))
        await settle()
        model.observe(diary)
        await asyncio.gather(waiting, blind, model.timed(row(2)))
        model.observe(None)
        await model(row(3))
    assert [batch[:3] for batch in diary.batches] == [([("call 0", 1)], 0, 2)]
    assert diary.calls == [("call 0", None)]


@scenario
async def test_another_observer_is_told_of_its_own_calls_only():
    model, old = observed()
    new = Diary()
    async with model:
        busy = asyncio.ensure_future(model(row(0, rows=4)))
        await settle()
        calls = [asyncio.ensure_future(model(row(1)))]
        await settle()
        model.observe(new)
        await asyncio.gather(busy, *calls, model(row(2)))
    assert [calls for calls, *_ in old.batches] == [[("call 0", 4)]]
    assert [calls for calls, *_ in new.batches] == [[("call 0", 1)]]
    assert old.calls == [("call 0", None), ("call 1", None)]


@scenario
async def test_a_model_that_was_started_again_is_still_observed():
    model, diary = observed()
    for _ in range(2):
        async with model:
            await model(row())
    assert len(diary.calls) == len(diary.batches) == 2


async def test_batches_are_told_of_in_the_threads_that_execute_them():
    current = threading.local()

    class Local(Diary):
        @contextmanager
        def batch(self, calls, **of):
            current.calls = len(calls)
            with super().batch(calls, **of):
                yield
            del current.calls

    diary = Local()
    seen = []

    def net(x):
        seen.append(current.calls)
        return x

    async with AsyncDataParallel(net, backend=CpuBackend(cores=2), batch_size=4, check_rows=False) as model:
        model.observe(diary)
        await asyncio.gather(*(model(row(n)) for n in range(20)))
    assert diary.open == 0
    assert sum(seen) == len(diary.calls) == 20
    assert all(thread.startswith("aneuron-core-") for thread in diary.threads)
