"""`map`: many calls from one source. Virtual time where there is no thread: a synchronous source has one."""

import asyncio
import contextvars
import gc
import itertools
import logging
import random
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref

import anyio
import numpy as np
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
    Rows,
    ShapeError,
    SimulatedBackend,
)
from aneuron.map.window import Map
from aneuron.testing import PuppetBackend, settle


def value(y):
    return y[0, 0].item()


def rows(count):
    return (row(n) for n in range(count))


async def rows_later(count):
    for n in range(count):
        yield row(n)


SOURCES = [rows, rows_later]


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


class Calls:
    """Stands for a model: calls that end when told. What comes in are rows, the result is their value negated."""

    def __init__(self):
        self.waiting = {}
        self.seen = []
        self.cancelled = []

    async def __call__(self, x):
        n = value(x)
        self.seen.append(n)
        future = self.waiting[n] = asyncio.get_running_loop().create_future()
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled.append(n)
            raise
        finally:
            del self.waiting[n]

    def end(self, *numbers):
        for n in numbers:
            self.waiting[n].set_result(-n)

    def fail(self, n, error):
        self.waiting[n].set_exception(error)


async def negate(x):
    return -x


def endless(read):
    for n in itertools.count():
        read.append(n)
        yield row(n)


async def endless_later(read):
    for n in itertools.count():
        read.append(n)
        yield row(n)


# Results and their order.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("limit", [1, 3, 1000])
async def test_every_element_gives_its_result_in_order(source, limit):
    backend = SimulatedBackend(cores=2, service_time=0.0)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        results = [value(y) async for y in Map(model, source(100), limit=limit)]
        assert results == [-n for n in range(100)]
        assert model.statistics().calls.accepted == 100


@pytest.mark.parametrize("source", SOURCES)
async def test_unordered_every_element_gives_its_index_and_result_once(source):
    backend = SimulatedBackend(cores=2, service_time=0.0)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        results = [pair async for pair in Map(model, source(100), limit=16, ordered=False)]
    assert sorted((index, value(y)) for index, y in results) == [(n, -n) for n in range(100)]


@scenario
async def test_unordered_results_come_as_they_are_finished():
    calls = Calls()
    results = Map(calls, rows_later(3), limit=3, ordered=False)
    first = asyncio.ensure_future(anext(results))
    await settle()
    calls.end(2)
    assert await first == (2, -2)
    calls.end(1)
    assert await anext(results) == (1, -1)
    calls.end(0)
    assert [pair async for pair in results] == [(0, 0)]


@scenario
async def test_ordered_a_result_waits_for_those_before_it():
    calls = Calls()
    results = Map(calls, rows_later(3), limit=3)
    first = asyncio.ensure_future(anext(results))
    await settle()
    calls.end(1, 2)
    await settle()
    assert not first.done()
    calls.end(0)
    assert await first == 0
    assert [y async for y in results] == [-1, -2]


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        (row(1), 1.0),
        (np.ones((1, 2), dtype=np.float32), 1.0),
        ((row(1), row(2)), 3.0),
        ([row(1), row(2)], 3.0),  # as a DataLoader makes
        ([row(2)], 2.0),
        ({"x": row(1), "y": row(3)}, 4.0),
        ((row(1), torch.ones(1, 2, dtype=torch.int64)), 2.0),
    ],
)
async def test_an_element_is_a_tensor_a_tuple_or_a_mapping(element, expected):
    def add(x, y=0):
        return x + y

    backend = SimulatedBackend(cores=1, service_time=0.0)
    async with AsyncDataParallel(add, backend=backend) as model:
        (result,) = [y async for y in Map(model, [element], limit=1)]
    assert value(result) == expected


async def test_a_mapping_that_is_no_dict_is_keyword_inputs():
    from transformers import BatchEncoding

    backend = SimulatedBackend(cores=1, service_time=0.0)
    async with AsyncDataParallel(lambda ids: ids + 1, backend=backend) as model:
        encoded = BatchEncoding({"ids": torch.zeros(2, 3)})
        (result,) = [y async for y in Map(model, [encoded], limit=1)]
    assert result.shape == (2, 3)


@pytest.mark.parametrize("source", [[], iter(()), rows_later(0)])
async def test_an_empty_source_gives_no_results(source):
    results = Map(negate, source, limit=4)
    assert [y async for y in results] == []
    with pytest.raises(StopAsyncIteration):
        await anext(results)


async def test_a_source_may_be_anything_that_can_be_iterated_over():
    class ByIndex:  # as a data set is
        def __getitem__(self, index):
            if index == 3:
                raise IndexError
            return row(index)

    class BothWays:
        def __iter__(self):
            raise AssertionError("the asynchronous way is there")

        def __aiter__(self):
            return rows_later(3)

    for source in ([row(0), row(1), row(2)], ByIndex(), BothWays()):
        assert [value(y) async for y in Map(negate, source, limit=2)] == [0, -1, -2]


# The limit.


@scenario
async def test_the_limit_bounds_what_is_read_called_and_kept():
    calls, read = Calls(), []
    results = Map(calls, endless_later(read), limit=3)
    first = asyncio.ensure_future(anext(results))
    await settle()
    assert calls.seen == read == [0, 1, 2]
    calls.end(1, 2)  # two results that wait for the head
    await settle()
    assert read == [0, 1, 2]
    calls.end(0)
    assert await first == 0
    await settle()
    assert read == [0, 1, 2, 3]
    await results.aclose()


@scenario
async def test_a_slow_consumer_slows_the_source_down():
    read = []
    async with Map(negate, endless_later(read), limit=4, ordered=False) as results:
        for taken in range(1, 10):
            await anext(results)
            await asyncio.sleep(1)
            assert len(read) == taken + 4


async def test_a_thread_does_not_read_beyond_the_limit_either():
    calls, read = Calls(), []
    async with Map(calls, endless(read), limit=5) as results:
        first = asyncio.ensure_future(anext(results))
        await until(lambda: len(calls.seen) == 5)
        calls.end(0, 1)
        await first
        await anext(results)
        await until(lambda: len(calls.seen) == 7)
        assert read == list(range(7))


async def test_the_first_element_of_a_slow_source_is_called_at_once():
    calls, more = Calls(), threading.Event()

    def slow():
        yield row(0)
        assert more.wait(60)
        yield row(1)

    async with Map(calls, slow(), limit=8) as results:
        first = asyncio.ensure_future(anext(results))
        await until(lambda: calls.seen == [0])
        calls.end(0)
        assert await first == 0
        second = asyncio.ensure_future(anext(results))
        more.set()
        await until(lambda: calls.seen == [0, 1])
        calls.end(1)
        assert await second == -1


async def test_a_synchronous_source_has_one_thread_and_the_consumer_s_context():
    where, tenant = set(), contextvars.ContextVar("tenant")

    def source():
        for n in range(50):
            where.add((threading.current_thread(), tenant.get()))
            yield row(n)
        tenant.set("of the source")
        yield row(50)

    async def call(x):
        assert tenant.get() == "acme"
        return x

    tenant.set("acme")
    assert len([y async for y in Map(call, source(), limit=3)]) == 51
    ((thread, seen),) = where
    assert seen == "acme"
    assert thread is not threading.current_thread()


async def test_ten_million_elements_in_bounded_memory():
    """Some of them are run; the rest is never read."""
    total = reached = 0

    def source():
        nonlocal reached
        for n in range(10_000_000):
            reached = n
            yield (n,)

    async def call(n):
        return n

    tracemalloc.start()
    try:
        async with Map(call, source(), limit=64) as results:
            async for n in results:
                assert n == total
                total += 1
                if total == 20_000:  # a reference kept for each, and nothing else, would be 160 kB
                    _, peak = tracemalloc.get_traced_memory()
                    break
    finally:
        tracemalloc.stop()
    assert peak < 250_000
    assert reached < 20_064


# Failing.


@pytest.mark.parametrize("ordered", [True, False])
@scenario
async def test_a_call_s_error_is_raised_in_its_place_and_ends_the_rest(ordered):
    calls = Calls()
    results = Map(calls, endless_later([]), limit=4, ordered=ordered)
    first = asyncio.ensure_future(anext(results))
    await settle()
    calls.end(0)
    calls.fail(1, ShapeError("bad"))
    await settle()
    assert first.result() == (0 if ordered else (0, 0))
    with pytest.raises(ShapeError, match="bad") as caught:
        await anext(results)
    assert caught.value.__notes__ == ["raised for element 1 of the map"]
    assert calls.cancelled == [2, 3, 4]
    assert len(asyncio.all_tasks()) == 1
    with pytest.raises(Closed):
        await anext(results)


@scenario
async def test_ordered_results_before_an_error_are_yielded_first():
    calls = Calls()
    results = Map(calls, rows_later(3), limit=3)
    first = asyncio.ensure_future(anext(results))
    await settle()
    calls.fail(2, ShapeError("bad"))
    await settle()
    calls.end(0, 1)
    assert [await first, await anext(results)] == [0, -1]
    with pytest.raises(ShapeError):
        await anext(results)


@pytest.mark.parametrize("source", SOURCES)
async def test_errors_can_be_results(source):
    async def odd_ones_fail(x):
        if value(x) % 2:
            raise ShapeError(f"{value(x)}")
        return value(x)

    results = [y async for y in Map(odd_ones_fail, source(6), limit=2, return_exceptions=True)]
    assert [y if isinstance(y, float) else str(y) for y in results] == [0, "1.0", 2, "3.0", 4, "5.0"]
    pairs = [pair async for pair in Map(odd_ones_fail, source(2), limit=2, ordered=False, return_exceptions=True)]
    assert {index: type(y) for index, y in pairs} == {0: float, 1: ShapeError}


@scenario
async def test_cancellation_is_never_a_result():
    async def call(x):
        if value(x) == 1:
            asyncio.current_task().cancel()
            await asyncio.sleep(0)

    results = Map(call, rows_later(3), limit=1, return_exceptions=True)
    assert await anext(results) is None
    with pytest.raises(asyncio.CancelledError):
        await anext(results)


def test_an_exit_is_never_a_result():
    async def leave(x):
        raise SystemExit(3)

    async def main():
        await anext(Map(leave, rows_later(1), limit=1, return_exceptions=True))

    with pytest.raises(SystemExit):
        asyncio.run(main())


@pytest.mark.parametrize("element", [None, "text", 3, b"", {1, 2}, lambda: 0])
@pytest.mark.parametrize("later", [True, False])
async def test_a_wrong_element_is_an_error_in_its_place(element, later):
    async def source():
        for x in (row(0), element, row(2)):
            yield x

    elements = source() if later else [row(0), element, row(2)]
    results = Map(negate, elements, limit=3)
    assert value(await anext(results)) == 0
    with pytest.raises(TypeError, match=f"element 1 of the source is a {type(element).__name__}: expected a tensor"):
        await anext(results)
    kinds = [type(y) async for y in Map(negate, [element, row(0)], limit=3, return_exceptions=True)]
    assert kinds == [TypeError, torch.Tensor]


async def test_wrong_shapes_are_the_model_s_errors_in_their_place():
    backend = SimulatedBackend(cores=1, service_time=0.0)
    example = torch.zeros(4, 2)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, example_inputs=example) as model:
        elements = [row(0), torch.zeros(1, 3), torch.zeros(0, 2), (), {}, {1: row(1)}, row(6)]
        results = [y async for y in Map(model, elements, limit=3, return_exceptions=True)]
        expected = [torch.Tensor, *[ShapeError] * 4, TypeError, torch.Tensor]
        assert [type(y) for y in results] == expected
        with pytest.raises(ShapeError) as caught:
            [y async for y in Map(model, elements, limit=3)]
        assert caught.value.__notes__[-1] == "raised for element 1 of the map"


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("later", [True, False])
async def test_what_a_source_raises_comes_after_the_results_before_it(ordered, later):
    def breaks():
        yield from rows(5)
        raise OSError("the disk is gone")

    async def breaks_later():
        for x in rows(5):
            yield x
        raise OSError("the disk is gone")

    source = breaks_later() if later else breaks()
    results = Map(negate, source, limit=2, ordered=ordered, return_exceptions=True)
    assert len([await anext(results) for _ in range(5)]) == 5
    with pytest.raises(OSError, match="disk"):
        await anext(results)
    with pytest.raises(Closed):
        await anext(results)


@pytest.mark.parametrize("kind", ["__iter__", "__next__", "__aiter__", "__anext__"])
async def test_a_source_that_breaks_at_once_or_in_disguise(kind):
    class Broken:
        pass

    def method(self):
        raise OSError(kind)

    methods = {kind: method}
    if kind.endswith("next__"):
        methods[kind.replace("next", "iter")] = lambda self: self
    source = type("Broken", (), methods)()
    with pytest.raises(OSError, match=kind):
        await anext(Map(negate, source, limit=1))


async def test_an_error_that_looks_like_the_end_is_not_taken_for_it():
    class Odd:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopAsyncIteration

    async def odd(x):
        raise StopAsyncIteration

    for results in (Map(negate, Odd(), limit=1), Map(odd, [row(0)], limit=1)):
        with pytest.raises(RuntimeError, match="looked like its end"):
            await anext(results)


@pytest.mark.parametrize("limit", [0, -1, True, 1.0, "3", None])
def test_the_limit_is_a_whole_number_of_at_least_one(limit):
    with pytest.raises(ValueError, match=r"limit=.*: expected an int of at least 1"):
        Map(negate, [], limit=limit)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (None, "NoneType: expected an iterable"),
        (3, "int: expected an iterable"),
        (rows_later, r"call it: rows_later\(\)"),
        ("text", "str, which map does not iterate over"),
        (b"bytes", "bytes"),
        (torch.zeros(3, 2), r"x\.split\(1\)"),
        (np.zeros((3, 2)), r"x\.split\(1\)"),
        ({"x": torch.zeros(1, 2)}, r"pass \[element\]"),
    ],
)
def test_what_is_no_source_is_refused_where_it_is_given(source, hint):
    with pytest.raises(TypeError, match=hint):
        Map(negate, source, limit=1)


# Leaving.


@pytest.mark.parametrize("ordered", [True, False])
@scenario
async def test_leaving_early_takes_what_is_queued_out_of_the_model(ordered):
    backend = PuppetBackend(cores=1, service_time=1.0)
    closed = []

    async def source():
        try:
            for n in itertools.count():
                yield row(n)
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2) as model:
        async with Map(model, source(), limit=20, ordered=ordered) as results:
            await anext(results)
            assert model.statistics().waiting_rows
        assert closed == [True]
        assert model.statistics().waiting_rows == 0
        assert len(asyncio.all_tasks()) == 1
        with pytest.raises(Closed):
            await anext(results)
        await results.aclose()
    calls = model.statistics().calls
    assert calls.accepted == calls.completed + calls.cancelled


@pytest.mark.parametrize("later", [True, False])
async def test_a_break_without_async_with_cancels_and_closes_too(later):
    calls, closed = Calls(), threading.Event()

    def source():
        try:
            yield from endless([])
        finally:
            closed.set()

    async def source_later():
        try:
            async for x in endless_later([]):
                yield x
        finally:
            closed.set()

    async def first_ones_end(x):
        return await (calls(x) if value(x) > 2 else negate(x))

    async for y in Map(first_ones_end, source_later() if later else source(), limit=6):
        if value(y) == -1:
            break
    await until(lambda: closed.is_set() and not calls.waiting)
    await until(lambda: len(asyncio.all_tasks()) == 1)
    assert calls.cancelled == calls.seen


async def test_nothing_holds_a_map_that_is_dropped():
    calls = Calls()
    results = Map(calls, endless([]), limit=2)
    waiting = asyncio.ensure_future(anext(results))
    await until(lambda: calls.seen)
    waiting.cancel()
    await asyncio.wait([waiting])
    gone = weakref.ref(results)
    gc.disable()
    try:
        del results, waiting
        assert gone() is None
    finally:
        gc.enable()
    await until(lambda: not calls.waiting)


def test_a_map_that_outlives_its_loop_ends_its_thread():
    kept = []

    async def main():
        kept.append(Map(negate, endless([]), limit=2))
        await anext(kept[0])

    asyncio.run(main())
    (thread,) = (t for t in threading.enumerate() if t.name.startswith("aneuron-map"))
    kept.clear()
    thread.join(60)
    assert not thread.is_alive()


@scenario
async def test_a_map_that_is_never_begun_touches_nothing():
    read = []
    async with Map(negate, endless_later(read), limit=2) as results:
        pass
    with pytest.raises(Closed):
        await anext(results)
    Map(negate, endless_later(read), limit=2)
    assert not read


async def test_leaving_does_not_wait_for_a_source_that_is_stuck():
    go_on, closed, asked, called = threading.Semaphore(2), [], [], []

    def source():
        try:
            for n in itertools.count():
                asked.append(n)
                go_on.acquire()
                yield row(n)
        finally:
            closed.append(threading.current_thread().name)

    async def call(x):
        called.append(value(x))

    async with Map(call, source(), limit=4) as results:
        await anext(results)
        await settle()
        await anext(results)
        await settle()  # there is more room, which the thread has heard of
        await until(lambda: len(asked) == 3)
    assert not closed  # and yet we are here
    go_on.release()
    await until(lambda: closed)
    assert closed[0].startswith("aneuron-map")
    await settle()
    assert asked == [0, 1, 2]
    assert called == [0, 1]


@scenario
async def test_a_source_that_ignores_its_cancellation_is_read_no_further():
    calls = Calls()

    async def source():
        yield row(0)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            yield row(1)

    async with Map(calls, source(), limit=2) as results:
        waiting = asyncio.ensure_future(anext(results))
        await settle()
    assert calls.seen == [0]
    assert isinstance(waiting.exception(), Closed)


@scenario
async def test_errors_that_nobody_takes_are_silent_and_results_are_let_go(caplog):
    gc.collect()  # what another test has left would speak up below
    caplog.clear()
    calls = Calls()
    results = Map(calls, rows_later(4), limit=4)
    waiting = asyncio.ensure_future(anext(results))
    await settle()
    for n in (1, 2):
        calls.fail(n, ShapeError("bad"))
    result = torch.zeros(1)
    calls.waiting[3].set_result(result)
    gone = weakref.ref(result)
    del result
    await settle()
    assert gone() is not None
    await results.aclose()
    await settle()
    assert isinstance(waiting.exception(), Closed)
    gc.collect()
    assert gone() is None
    del results, waiting
    gc.collect()
    assert not caplog.records


def test_a_stuck_source_does_not_keep_the_interpreter_from_exiting():
    program = """
        import asyncio, threading
        from aneuron.map.window import Map

        def source():
            yield (1,)
            threading.Event().wait()

        async def call(n):
            return n

        async def main():
            async for y in Map(call, source(), limit=2):
                print(y)
                break

        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


@scenario
async def test_a_consumer_that_is_cancelled_may_go_on_and_has_lost_nothing():
    calls = Calls()
    results = Map(calls, rows_later(4), limit=2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(results), 1)
    with anyio.move_on_after(1) as scope:
        await anext(results)
    assert scope.cancelled_caught
    waiting = asyncio.ensure_future(anext(results))
    await settle()
    calls.end(0)
    waiting.cancel()  # in the very iteration in which the result comes
    await asyncio.wait([waiting])
    calls.end(1)
    await settle()
    assert [await anext(results), await anext(results)] == [0, -1]
    await settle()
    calls.end(2, 3)
    assert [y async for y in results] == [-2, -3]


@scenario
async def test_a_scope_around_the_whole_map_ends_it():
    calls = Calls()
    with anyio.move_on_after(5):
        async with Map(calls, endless_later([]), limit=3) as results:
            async for _ in results:
                raise AssertionError("no call ends")
    await settle()
    assert calls.cancelled == [0, 1, 2]
    assert len(asyncio.all_tasks()) == 1


@scenario
async def test_closing_wakes_the_consumer_that_waits():
    results = Map(Calls(), rows_later(1), limit=1)
    waiting = asyncio.ensure_future(anext(results))
    await settle()
    await asyncio.gather(results.aclose(), results.aclose())
    with pytest.raises(Closed, match="while its next result"):
        await waiting


@scenario
async def test_a_second_consumer_that_waits_is_refused():
    calls = Calls()
    results = Map(calls, rows_later(2), limit=2)
    first = asyncio.ensure_future(anext(results))
    await settle()
    with pytest.raises(RuntimeError, match="another consumer"):
        await anext(results)
    calls.end(0, 1)
    assert [await first, await anext(results)] == [0, -1]


def test_another_loop_is_refused():
    results = Map(negate, endless_later([]), limit=1)

    async def take():
        return value(await anext(results))

    with asyncio.Runner() as one, asyncio.Runner() as other:
        assert one.run(take()) == 0
        with pytest.raises(RuntimeError, match="another event loop"):
            other.run(take())
        one.run(results.aclose())


@pytest.mark.parametrize("later", [True, False])
async def test_what_a_source_raises_while_it_is_closed_is_logged(later, caplog):
    def source():
        try:
            yield from endless([])
        finally:
            raise OSError("the disk is gone")

    async def source_later():
        try:
            async for x in endless_later([]):
                yield x
        finally:
            raise OSError("the disk is gone")

    with caplog.at_level(logging.WARNING, "aneuron"):
        async with Map(negate, source_later() if later else source(), limit=2) as results:
            await anext(results)
        await until(lambda: caplog.records)
    assert [str(record.exc_info[1]) for record in caplog.records] == ["the disk is gone"]


async def test_iterators_that_are_not_generators_are_left_open(caplog):
    class Lines:  # as a file is
        def __iter__(self):
            return self

        def __next__(self):
            return row(0)

        def close(self):
            raise AssertionError("not ours to close")

    async for _ in Map(negate, Lines(), limit=1):
        break
    await until(lambda: not any(t.name.startswith("aneuron-map") for t in threading.enumerate()))
    assert not caplog.records


# Room.


def crowded(service_time=None, cores=1, batch_size=1, max_pending=1, **settings):
    backend = PuppetBackend(cores, service_time)
    model = AsyncDataParallel(
        torch.neg, backend=backend, batch_size=batch_size, max_pending=max_pending, num_workers=cores, **settings
    )
    return backend, model


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("rows_each", "max_pending"), [(1, 1), (1, 3), (3, 2), (2, 5), (9, 4), (40, 4)])
@scenario
async def test_a_map_waits_for_room_and_is_never_refused(ordered, rows_each, max_pending):
    _, model = crowded(0.01, batch_size=4, max_pending=max_pending)
    async with model:

        async def source():
            for n in range(30):
                yield row(n, rows_each)

        seen = [y if ordered else y[1] async for y in model.map(source(), limit=20, ordered=ordered)]
        assert sorted(-value(y) for y in seen) == list(range(30))
        assert not ordered or [-value(y) for y in seen] == list(range(30))
        calls = check_sum(model)
    assert (calls.accepted, calls.completed, calls.refused) == (30, 30, 0)


@scenario
async def test_what_waits_for_room_is_not_in_the_queue_and_costs_no_wake_ups():
    backend, model = crowded(max_pending=2)
    async with model:
        results = model.map(rows_later(6), limit=6)
        first = asyncio.ensure_future(anext(results))
        await settle()
        stats = model.statistics()
        assert (stats.waiting_rows, stats.calls.waiting, stats.calls.running) == (2, 5, 1)
        with pytest.raises(RuntimeError, match="a deadlock in virtual time"):
            asyncio.get_running_loop()._run_once()  # nothing is due, ever
        for left in (4, 3, 2, 1, 0, 0):
            backend[0].release()
            await settle()
            assert check_sum(model).waiting == left
        assert [-value(await first)] + [-value(y) async for y in results] == list(range(6))


@scenario
async def test_a_map_is_never_the_reason_that_a_call_is_refused():
    backend, model = crowded(max_pending=4)
    async with model:
        results = model.options(priority=5).map(rows_later(8), limit=8)
        first = asyncio.ensure_future(anext(results))
        await settle()
        assert model.statistics().waiting_rows == 4  # the map's
        model.check_admission(4)
        calls = [call(model, 100 + n) for n in range(4)]
        await settle()
        assert model.statistics().waiting_rows == 4  # theirs
        assert not any(each.done() for each in calls)
        with pytest.raises(QueueFull):
            await model(row(0))
        with pytest.raises(QueueFull):
            model.check_admission()
        while not all(each.done() for each in calls):
            backend[0].release()
            await settle()
        await release_all(backend, first)
        rest = asyncio.ensure_future(anext(results))
        await release_all(backend, rest)
        assert [-value(first.result()), -value(rest.result())] == [
            0,
            1,
        ]  # what gave way was not lost, and kept its place
        await results.aclose()
        assert check_sum(model).refused == 2


@scenario
async def test_rows_of_a_map_that_have_begun_shut_nobody_out_either():
    backend, model = crowded(batch_size=4, max_pending=4)
    async with model:
        results = model.map(aiter_of([row(1, 100), row(2, 100)]), limit=2)
        first = asyncio.ensure_future(anext(results))
        await settle()
        calls = [call(model, n) for n in range(4)]
        large = call(model, 5, rows=8)
        await settle()
        assert isinstance(large.exception(), QueueFull)  # the calls have taken the room
        assert not any(each.done() for each in calls)
        await release_all(backend, first, *calls)
        await results.aclose()


async def aiter_of(elements):
    for element in elements:
        yield element


@pytest.mark.parametrize("how", ["aclose", "abort", "leave", "cancel", "swap", "no cores", "more room", "no bound"])
@pytest.mark.parametrize("later", [True, False])
@scenario
async def test_whatever_ends_while_a_map_waits_for_room_ends_once(how, later):
    if not later and how not in ("aclose", "abort"):
        how = "leave"  # the same for calls that gave way
    backend, model = crowded(max_pending=2)
    backend._faults = {OSError: Fault.CORE}
    backend.recoverable = False
    closed = []

    async def source():
        try:
            for n in range(6):
                yield row(n)
            await asyncio.sleep(1000)
        finally:
            closed.append(True)

    async with model:
        results = model.map(source(), limit=6, return_exceptions=True)
        first = asyncio.ensure_future(anext(results))
        await settle()
        online = [call(model, 100 + n) for n in range(2)] if not later else []
        await settle()
        assert check_sum(model).waiting == 5 + len(online)
        if how in ("aclose", "swap"):
            core = backend[0]
            ending = asyncio.ensure_future(model.aclose() if how == "aclose" else model.swap(torch.neg))
            while not ending.done():  # the old core finishes what it was given
                if core.executing is not None:
                    core.release()
                await settle()
            expected = [float] * 6
        elif how == "abort":
            await model.abort()
            await release_all(backend, first)
            expected = [float] + [Closed] * 5
        elif how in ("leave", "cancel"):
            if how == "cancel":
                first.cancel()
                await settle()
            await results.aclose()
            await settle()
            assert closed == [True]
            assert check_sum(model).waiting == len(online)
            await release_all(backend, *online)
            if backend[0].executing is not None:
                backend[0].release()
            expected = []
        elif how == "no cores":
            backend[0].release(OSError("the core"))
            await settle()
            expected = [CoreFailed] + [NoHealthyCores] * 5
        else:
            model.max_pending = 5 if how == "more room" else None
            assert model.max_pending == (5 if how == "more room" else None)
            await settle()
            assert model.statistics().waiting_rows == 5
            await release_all(backend, *[each for each in asyncio.all_tasks() if each is first])
            expected = [float] * 6
        if expected:
            rest = asyncio.ensure_future(take(results, 5))
            if how not in ("aclose", "abort", "no cores"):
                await release_all(backend, rest)
            outcomes = [await first, *await rest]
            kinds = [float if isinstance(y, torch.Tensor) else type(y) for y in outcomes]
            assert kinds == expected
            await results.aclose()
    calls = check_sum(model)
    assert (calls.waiting, calls.running) == (0, 0)
    assert all(each.done() for each in online)


async def take(results, count):
    return [await anext(results) for _ in range(count)]


@pytest.mark.parametrize("later", [True, False])
async def test_what_a_source_raises_while_its_calls_wait_for_room_comes_after_them(later):
    def breaks():
        yield from rows(20)
        raise OSError("the disk is gone")

    async def breaks_later():
        for x in rows(20):
            yield x
        raise OSError("the disk is gone")

    backend = SimulatedBackend(cores=1, service_time=0.001)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2, max_pending=2) as model:
        results = model.map(breaks_later() if later else breaks(), limit=100)
        assert [-value(await anext(results)) for _ in range(20)] == list(range(20))
        with pytest.raises(OSError, match="disk"):
            await anext(results)
        calls = check_sum(model)
        assert (calls.accepted, calls.completed, calls.waiting) == (20, 20, 0)


@scenario
async def test_two_maps_and_callers_share_a_full_model():
    _, model = crowded(0.01, cores=2, batch_size=4, max_pending=8)
    async with model:

        async def consume(view, count):
            return [-value(y) async for y in view.map(rows_later(count))]

        async def online(n):
            try:
                return -value(await model(row(n)))
            except QueueFull:
                return None

        maps = [asyncio.ensure_future(consume(model.options(tenant=tenant), 60)) for tenant in "ab"]
        answers = []
        for n in range(40):
            answers.append(asyncio.ensure_future(online(n)))
            await asyncio.sleep(0.003)
        assert [await each for each in maps] == [list(range(60))] * 2
        assert [await each for each in answers] == list(range(40))
        assert check_sum(model).refused == 0


# Sources that hold something.


def test_the_workers_of_a_data_loader_end_with_the_map():
    program = """
        import asyncio, multiprocessing, sys, time, torch
        from torch.utils.data import DataLoader, Dataset, TensorDataset
        from aneuron import AsyncDataParallel

        class Breaks(Dataset):
            def __len__(self):
                return 1000
            def __getitem__(self, n):
                if n > 4:
                    raise OSError("the disk is gone")
                return torch.full((2,), float(n))

        def gone():
            for _ in range(1000):
                if not multiprocessing.active_children():
                    return True
                time.sleep(0.01)
            return False

        async def main():
            async with AsyncDataParallel(lambda x, y=0: x + y, backend="cpu") as model:
                pairs = TensorDataset(torch.ones(100, 2), torch.ones(100, 2))
                loader = DataLoader(pairs, batch_size=2, num_workers=2)
                async with model.map(loader) as results:
                    assert (await anext(results)).tolist() == [[2.0, 2.0]] * 2  # elements are lists
                    assert multiprocessing.active_children()
                assert gone(), "left by async with"
                async for _ in model.map(loader):
                    break
                assert gone(), "left by break"
                assert len([y async for y in model.map(loader)]) == 50
                assert gone(), "read to the end"
                results = model.map(DataLoader(Breaks(), batch_size=1, num_workers=2))
                try:
                    async for _ in results:
                        pass
                except OSError as error:
                    kept = error
                assert gone(), "it has raised, and the error is kept"
                print("disk is gone" in str(kept))

        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


@pytest.mark.parametrize("later", [True, False])
async def test_an_iterator_that_the_map_has_made_is_closed_and_let_go(later):
    closed, made = [], []

    class Rows:  # what holds something, a connection say
        def __init__(self):
            made.append(weakref.ref(self))

        def __iter__(self):
            return self

        def __next__(self):
            return row(0)

        def close(self):
            closed.append(threading.current_thread().name)

    class LaterRows(Rows):
        __aiter__ = Rows.__iter__

        async def __anext__(self):
            return row(0)

        async def aclose(self):
            closed.append("aneuron-map")

    class Source:
        def __iter__(self):
            return Rows()

    class LaterSource:
        def __aiter__(self):
            return LaterRows()

    async for _ in Map(negate, LaterSource() if later else Source(), limit=1):
        break
    await until(lambda: closed and (gc.collect(), made[0]())[1] is None)
    assert closed[0].startswith("aneuron-map")


# Others.


@pytest.mark.parametrize("source", SOURCES)
async def test_it_works_under_tqdm(source, capsys):
    from tqdm.asyncio import tqdm

    bar = tqdm(Map(negate, source(20), limit=4), total=20, mininterval=0)
    assert [value(y) async for y in bar] == [-n for n in range(20)]
    assert bar.n == 20
    assert "20/20" in capsys.readouterr().err
    async for _ in tqdm(Map(negate, source(20), limit=4), disable=True):
        break


@pytest.mark.parametrize("seed", range(20))
@scenario
async def test_exactly_once_whatever_ends_when(seed):
    choose = random.Random(seed)
    ordered, limit, count = choose.random() < 0.5, choose.randint(1, 9), choose.randint(0, 60)
    ended, running = [], 0

    async def call(n):
        nonlocal running
        running += 1
        assert running <= limit
        try:
            await asyncio.sleep(choose.choice([0, 0, 1, 5]))
            if n % 7 == 3:
                raise ShapeError(str(n))
            return n
        finally:
            running -= 1
            ended.append(n)

    async def source():
        for n in range(count):
            await asyncio.sleep(choose.choice([0, 0, 0, 2]))
            yield (n,)

    results = Map(call, source(), limit=limit, ordered=ordered, return_exceptions=True)
    seen = []
    while True:
        try:
            async with asyncio.timeout(choose.choice([0, 1, 100])):
                seen.append(await anext(results))
        except TimeoutError:
            continue
        except StopAsyncIteration:
            break
    pairs = list(enumerate(seen)) if ordered else seen
    assert [index for index, _ in sorted(pairs, key=lambda pair: pair[0])] == list(range(count))
    for index, result in pairs:
        assert result == index if index % 7 != 3 else str(result) == str(index)
    assert sorted(ended) == list(range(count))


@scenario
async def test_a_map_that_is_left_before_its_first_element_closes_a_generator():
    closed = []

    def source():
        try:
            yield torch.ones(1, 1)
            yield torch.ones(1, 1)
        finally:
            closed.append("sync")

    async def asource():
        try:
            yield torch.ones(1, 1)
            yield torch.ones(1, 1)
        finally:
            closed.append("async")

    async with AsyncDataParallel(torch.neg, backend=PuppetBackend(1, service_time=0.01)) as model:
        begun, abegun = source(), asource()
        next(begun)
        await anext(abegun)
        async with model.map(begun):
            pass
        await model.map(abegun).aclose()
    assert closed == ["sync", "async"]


@scenario
async def test_a_map_whose_model_does_not_start_is_over():
    results = AsyncDataParallel(torch.neg, backend=PuppetBackend(1, load_error=(0, OSError("no")))).map([torch.ones(1)])
    with pytest.raises(OSError, match="no"):
        await anext(results)
    with pytest.raises(Closed):
        await anext(results)


async def test_a_source_that_has_raised_is_not_asked_again():
    asked = []

    class Breaks:
        def __iter__(self):
            return self

        def __next__(self):
            asked.append(len(asked))
            if len(asked) > 2:
                raise OSError(f"the disk is gone, {len(asked)}")
            return row(0)

    async with Map(negate, Breaks(), limit=2) as results:
        await take(results, 2)  # there is room for another, each time
        with pytest.raises(OSError, match="gone, 3"):
            await anext(results)
    assert asked == [0, 1, 2]


async def test_an_element_may_be_objects_one_a_row():
    async with AsyncDataParallel(lambda texts: [text.upper() for text in texts], backend=CpuBackend(cores=1)) as model:
        assert [y async for y in model.map([Rows(["a", "b"]), Rows(["c"])])] == [["A", "B"], ["C"]]
