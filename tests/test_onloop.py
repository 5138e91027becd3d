"""Lanes that the loop serves: cores with `submit`, cores that are executed in place, and what goes to threads all the
same. On virtual time, and with real threads and descriptors."""

import asyncio
import contextlib
import contextvars
import gc
import os
import threading
import weakref

import pytest
import torch
from puppets import check_sum, row, scenario

import aneuron
from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault, Pool, SimulatedBackend
from aneuron.testing import PuppetBackend, PuppetCore, settle

pytestmark = pytest.mark.core

PLACE = contextvars.ContextVar("PLACE", default="nowhere")


class Handed:
    """A batch in the hands of a core."""

    def __init__(self, core, args, kwargs, done):
        self.core, self.args, self.kwargs, self.done = core, args, kwargs, done

    def values(self):
        return self.args[0][:, 0].tolist()

    def end(self, error=None):
        if self in self.core.handed:
            self.core.handed.remove(self)
        if error is not None:
            self.done(None, error)
        else:
            self.done(self.core.execute(self.args, self.kwargs), None)


class Core(PuppetCore):
    """Is handed batches, and ends them when it is told to."""

    raises = None  # by `submit`
    at_once = False  # done is called before it returns
    when_handed = None

    def __init__(self, *args):
        super().__init__(*args)
        self.handed = []

    def submit(self, args, kwargs, done):
        assert not self.closed
        if self.when_handed is not None:
            self.when_handed()
        handed = Handed(self, args, kwargs, done)
        if self.at_once:
            handed.end()
        if self.raises is not None:
            raise self.raises
        if not self.at_once:
            self.handed.append(handed)


class Backend(PuppetBackend):
    def __init__(self, cores=1, concurrent=False, **settings):
        super().__init__(
            cores, faults={OSError: Fault.CORE, SystemError: Fault.FATAL}, concurrent=concurrent, **settings
        )
        self.made = []

    def load(self, model, core_id, batch_size):
        core = self.loaded[core_id] = Core(model, core_id, self._concurrent)
        self.made.append(core)
        return core


def served(cores=1, concurrent=False, **settings):
    backend = Backend(cores, concurrent)
    settings.setdefault("batch_size", 4)
    return backend, AsyncDataParallel(torch.neg, backend=backend, **settings)


def call(model, value, rows=1):
    return asyncio.ensure_future(model(row(value, rows)))


async def finish(backend, *calls):
    """End whatever is handed to cores until the calls have ended."""
    while not all(each.done() for each in calls):
        for core in backend.made:
            for handed in list(core.handed):
                handed.end()
        await settle()


@scenario
async def test_calls_that_come_together_share_a_batch_and_each_gets_its_rows():
    backend, model = served()
    async with model:
        calls = [call(model, value) for value in range(3)]
        await settle()
        (handed,) = backend[0].handed
        assert handed.values() == [0, 1, 2, 2]
        handed.end()
        assert [(await each)[0, 0].item() for each in calls] == [0, -1, -2]
        assert model.statistics().cores[0].batches == 1
    assert backend[0].closed
    check_sum(model)


@scenario
async def test_a_core_that_takes_one_batch_has_its_next_before_results_are_handed_out():
    backend, model = served()
    async with model:
        calls = [call(model, value, 4) for value in range(3)]
        await settle()
        (first,) = backend[0].handed
        done = []
        backend[0].when_handed = lambda: done.append(calls[0].done())
        first.end()
        await settle()
        (second,) = backend[0].handed
        assert second.values() == [1] * 4
        assert done == [False]
        assert calls[0].done()
        await finish(backend, *calls)


@scenario
async def test_a_concurrent_core_has_as_many_as_it_has_slots_and_they_end_in_any_order():
    backend, model = served(concurrent=True, num_workers=3)
    async with model:
        calls = [call(model, value, 4) for value in range(5)]
        await settle()
        first, second, third = backend[0].handed
        assert model.statistics().cores[0].in_flight == 3
        third.end()
        await settle()
        assert [each.done() for each in calls] == [False, False, True, False, False]
        assert len(backend[0].handed) == 3
        second.end()
        first.end()
        await finish(backend, *calls)
        for value, each in enumerate(calls):
            assert torch.equal(each.result(), -row(value, 4))


@scenario
async def test_results_may_be_there_before_submit_returns():
    backend, model = served(2)
    async with model:
        for core in backend.made:
            core.at_once = True
        results = await asyncio.gather(*[model(row(value, 3)) for value in range(20)])
        assert all(torch.equal(result, -row(value, 3)) for value, result in enumerate(results))


@pytest.mark.parametrize("at_once", [False, True])
@scenario
async def test_a_submission_that_raises_is_an_error_of_the_model_or_of_the_core(at_once):
    backend, model = served(2)
    async with model:
        for core in backend.made:
            core.raises, core.at_once = ValueError("this input"), at_once
        result = call(model, 1, 4)
        await settle()
        if at_once:  # it had said that it was done
            assert torch.equal(result.result(), -row(1, 4))
        else:
            with pytest.raises(ValueError, match="this input"):
                result.result()
        assert {core.state for core in model.statistics().cores} == {"ready"}
        for core in backend.made:
            core.raises, core.at_once = None, False
        backend[0].raises = OSError("the device")
        calls = [call(model, value, 4) for value in range(4)]
        await settle()
        await finish(backend, *calls)
        assert [each.result()[0, 0].item() for each in calls] == [0, -1, -2, -3]
        assert [core.state for core in model.statistics().cores] == ["quarantined", "ready"]
    check_sum(model)


@scenario
async def test_one_of_several_callers_is_found_to_blame():
    backend, model = served()
    async with model:
        calls = [call(model, value) for value in range(4)]
        await settle()
        while not all(each.done() for each in calls):
            (handed,) = backend[0].handed
            handed.end(ValueError("a 2") if 2 in handed.values() else None)
            await settle()
        assert [each.exception() is None for each in calls] == [True, True, False, True]
        assert "rows 0 to 0 of this call" in calls[2].exception().__notes__[0]


@scenario
async def test_done_that_is_called_twice_or_with_an_error_later_has_no_effect():
    backend, model = served()
    async with model:
        first = call(model, 1)
        await settle()
        (handed,) = backend[0].handed
        handed.end()
        handed.end(OSError("once more"))
        handed.end()
        assert torch.equal(await first, -row(1))
        second = call(model, 2)
        await settle()
        handed.end()
        handed.end(SystemError("of the first"))
        await settle()
        assert not second.done()
        await finish(backend, second)
        assert torch.equal(second.result(), -row(2))
        assert model.statistics().cores[0].state == "ready"
    assert check_sum(model).completed == 2


@pytest.mark.parametrize("concurrent", [False, True])
@scenario
async def test_done_that_is_never_called_is_a_hang_and_its_core_is_closed_and_loaded_again(concurrent):
    backend, model = served(2, concurrent, exec_timeout=1.0)
    async with model:
        hangs = call(model, 1)
        await settle()
        (handed,) = [each for core in backend.made for each in core.handed]
        await asyncio.sleep(1.01)
        assert handed.core.closed  # no thread is in it
        assert model.statistics().cores[handed.core.core_id].state == "quarantined"
        handed.core.handed.clear()
        await finish(backend, hangs)
        assert torch.equal(hangs.result(), -row(1))
        handed.done(torch.zeros(1, 2), None)  # too late
        handed.done(None, OSError("too late"))
        await asyncio.sleep(60.0)
        assert model.statistics().cores[handed.core.core_id].state in ("ready", "suspect")
        calls = [call(model, value, 4) for value in range(8)]
        await settle()
        await finish(backend, *calls)
        assert all(core.batches for core in model.statistics().cores)
    assert all(core.closed for core in backend.made)
    check_sum(model)


@scenario
async def test_what_is_done_before_it_is_missed_is_no_hang_though_the_loop_is_late():
    """Loops may have timers before what threads have called for; uvloop does."""
    backend, model = served(exec_timeout=1.0)
    async with model:
        asyncio.get_running_loop().call_later(1.0, lambda: backend[0].handed[0].end())
        assert torch.equal(await model(row(1)), -row(1))
        assert model.statistics().cores[0].state == "ready"
        assert len(backend.made) == 1
    assert check_sum(model).completed == 1


@scenario
async def test_what_nobody_waits_for_is_given_up_though_it_hangs_behind_another_models():
    backend = Backend(concurrent=True)
    pool = Pool(backend=backend, num_workers=2)
    slow = AsyncDataParallel(torch.neg, pool=pool, batch_size=4)
    hung = AsyncDataParallel(torch.neg, pool=pool, batch_size=4, exec_timeout=1.0)
    async with slow, hung:
        first = call(slow, 1, 4)
        await settle()
        left = call(hung, 2, 4)
        await settle()
        assert [len(core.handed) for core in backend.made] == [1, 1]
        left.cancel()
        await asyncio.sleep(2.0)
        backend.made[0].handed.pop().end()
        await first
        await asyncio.sleep(2.0)
        assert pool.statistics().in_flight == (0,)
        backend.made[1].handed.clear()


@scenario
async def test_what_was_done_is_answered_and_the_rest_runs_elsewhere_where_a_core_is_lost():
    backend, model = served(2, True, num_workers=4)
    async with model:
        calls = [call(model, value, 4) for value in range(4)]
        await settle()
        first, second = backend[0].handed
        first.end()
        run = model._life.run
        run.lose(run.loaded[0], OSError("nobody knows what it has completed"))
        second.core.handed.clear()
        second.end()  # too late
        await finish(backend, *calls)
        assert [each.result()[0, 0].item() for each in calls] == [0, -1, -2, -3]
    assert check_sum(model).completed == 4


def test_what_a_core_ends_after_it_was_given_up_and_its_loop_has_ended_is_kept_by_nobody():
    """Found by chaos, on real threads, under load."""
    inputs, handed = [], []

    @scenario
    async def life():
        backend, model = served(exec_timeout=1.0)
        async with model:
            x = row(1)
            inputs.append(weakref.ref(x))
            lost = asyncio.ensure_future(model(x))
            del x
            await settle()
            handed.extend(backend[0].handed)
            with pytest.raises(CoreFailed):
                await lost
        return model

    model = life()
    handed.pop().end()
    gc.collect()
    assert inputs[0]() is None
    assert check_sum(model).failed == 1


@scenario
async def test_what_waits_behind_a_submission_that_hangs_runs_elsewhere():
    backend, model = served(2, True, exec_timeout=1.0, num_workers=4)
    async with model:
        calls = [call(model, value, 4) for value in range(4)]
        await settle()
        assert [len(core.handed) for core in backend.made] == [2, 2]
        backend[0].handed.clear()
        for handed in list(backend[1].handed):
            handed.end()
        await asyncio.sleep(1.01)
        await finish(backend, *calls)
        assert [each.result()[0, 0].item() for each in calls] == [0, -1, -2, -3]
    check_sum(model)


@scenario
async def test_who_leaves_is_forgotten_and_the_others_of_the_batch_are_served():
    backend, model = served()
    async with model:
        calls = [call(model, value) for value in range(3)]
        await settle()
        calls[1].cancel()
        await settle()
        (handed,) = backend[0].handed
        handed.end()
        await settle()
        assert [each.cancelled() for each in calls] == [False, True, False]
        assert torch.equal(calls[2].result(), -row(2))
        lone = call(model, 7)
        await settle()
        lone.cancel()
        await settle()
        (handed,) = backend[0].handed
        handed.end()
        await settle()
        assert not backend[0].handed
    check_sum(model)


@scenario
async def test_a_drain_waits_for_submissions_and_an_abort_fails_what_waits():
    backend, model = served()
    await model.start()
    calls = [call(model, value, 4) for value in range(3)]
    await settle()
    closing = asyncio.ensure_future(model.aclose())
    await settle()
    assert not closing.done()
    await finish(backend, *calls)
    await closing
    assert backend[0].closed
    await model.start()
    calls = [call(model, value, 4) for value in range(3)]
    await settle()
    aborting = asyncio.ensure_future(model.abort())
    await settle()
    assert [type(each.exception()) if each.done() else None for each in calls] == [None, Closed, Closed]
    assert not backend[0].closed
    await finish(backend, *calls)
    await aborting
    await settle()
    assert torch.equal(calls[0].result(), -row(0, 4))
    assert all(core.closed for core in backend.made)
    check_sum(model)


@scenario
async def test_a_core_that_failed_all_is_out_and_its_calls_get_core_failed():
    backend, model = served(1)
    async with model:
        failing = call(model, 1)
        await settle()
        backend[0].handed[0].end(SystemError("the process"))
        await settle()
        with pytest.raises(CoreFailed):
            failing.result()
        assert model.statistics().cores[0].state == "failed"


@scenario
async def test_two_models_share_cores_that_are_handed_batches():
    backend = Backend(1)
    pool = Pool(backend=backend)
    light, heavy = (AsyncDataParallel(torch.neg, pool=pool, batch_size=4, weight=weight) for weight in (1.0, 1.0))
    async with pool, light, heavy:
        calls = [call(heavy, value, 4) for value in range(6)]
        await settle()
        mine = call(light, 9)
        await settle()
        for _ in range(2):  # what executes, and one of the other at most
            for core in backend.made:
                for handed in list(core.handed):
                    handed.end()
            await settle()
        assert mine.done()
        await finish(backend, *calls)


# Real threads, loops and descriptors.


def lanes_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("aneuron-core")}


async def test_simulated_cores_need_no_thread_of_a_lane():
    backend = SimulatedBackend(cores=3, service_time=0.001)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, example_inputs=(row(),)) as model:
        before = lanes_threads()
        for _ in range(5):
            results = await asyncio.gather(*[model(row(value)) for value in range(40)])
            assert all(torch.equal(result, -row(value)) for value, result in enumerate(results))
        assert lanes_threads() <= before  # those that have loaded
        assert all(core.batches for core in model.statistics().cores)


@pytest.mark.parametrize("backend", [{"service_time": 0.001}, {"service_time": 0.0, "inline": True}], ids=str)
async def test_outputs_that_nobody_has_seen_are_found_out_about_in_a_thread_or_in_place(backend):
    def net(x):
        return {"sums": x.sum(1), "rows": (x * 2, [x + 1])}

    async with AsyncDataParallel(net, backend=SimulatedBackend(cores=2, **backend), batch_size=4) as model:
        for _ in range(3):
            results = await asyncio.gather(*[model(row(value, 1 + value % 3)) for value in range(20)])
            for value, result in enumerate(results):
                x = row(value, 1 + value % 3)
                assert torch.equal(result["sums"], x.sum(1))
                assert torch.equal(result["rows"][0], x * 2)
                assert torch.equal(result["rows"][1][0], x + 1)


async def test_large_batches_are_copied_in_threads():
    backend = SimulatedBackend(cores=1, service_time=0.001)
    large = torch.zeros(1, 1 << 16)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2, example_inputs=(large,)) as model:
        before = lanes_threads()
        results = await asyncio.gather(*[model(large + value) for value in range(6)])
        assert all(torch.equal(result, -large - value) for value, result in enumerate(results))
        assert len(lanes_threads() - before) == 1


class Threaded:
    """A core whose batches are done in threads that nobody knows; what they saw is kept."""

    concurrent = True

    def __init__(self, model, seen):
        self.model, self.seen = model, seen

    def execute(self, args, kwargs):
        return self.model(*args, **kwargs)

    def submit(self, args, kwargs, done):
        self.seen.append((threading.get_ident(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

        def run():
            with torch.no_grad():
                done(self.execute(args, kwargs), None)

        threading.Thread(target=run, daemon=True).start()

    def close(self):
        pass


class OneKind:
    name = "one kind"
    recoverable = True

    def __init__(self, make):
        self.make = make

    def cores(self):
        return [0, 1]

    def load(self, model, core_id, batch_size):
        return self.make(model)

    def classify(self, error):
        return Fault.CORE if isinstance(error, OSError) else Fault.INPUT


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: default_device("meta"),
}


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch.get_default_device(),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["submits", "inline"])
async def test_modes_of_the_loop_s_thread_neither_reach_the_results_nor_are_changed(kind, mode):
    weight = torch.nn.Parameter(torch.ones(2, 2))

    def net(x):
        return x @ weight

    seen = []
    backend = OneKind(lambda model: Threaded(model, seen))
    if kind == "inline":
        backend = SimulatedBackend(cores=2, service_time=0.0, inline=True)
    x = torch.ones(1, 2, requires_grad=True)
    async with AsyncDataParallel(net, backend=backend, batch_size=4, example_inputs=(torch.ones(1, 2),)) as model:
        with MODES[mode]():
            before = modes()
            calls = [asyncio.ensure_future(model(x)) for _ in range(6)]
            for _ in range(2000):
                await asyncio.sleep(0)
                if all(each.done() for each in calls):
                    break
                await asyncio.sleep(0.001)
            assert modes() == before
        for each in calls:
            result = each.result()
            assert result.tolist() == [[2.0, 2.0]]
            assert result.dtype is torch.float32
            assert not result.requires_grad
            assert not result.is_inference()
    if kind == "submits":
        assert {thread for thread, *_ in seen} == {threading.get_ident()}


async def test_in_place_is_on_the_loop_s_thread_in_the_context_of_the_start_and_modes_are_put_back():
    seen = []

    def net(x):
        seen.append((threading.get_ident(), PLACE.get(), torch.is_grad_enabled()))
        torch.set_grad_enabled(True)  # a model that leaves it on
        return x * 2

    PLACE.set("the start")
    backend = SimulatedBackend(cores=1, service_time=0.0, inline=True)
    with torch.no_grad():
        async with AsyncDataParallel(net, backend=backend, batch_size=4, check_rows=False) as model:
            PLACE.set("a caller")
            for value in range(3):
                assert torch.equal(await model(row(value)), row(2 * value))
                assert not torch.is_grad_enabled()
    assert seen == [(threading.get_ident(), "the start", False)] * 3


async def test_the_loop_has_its_turn_while_much_is_executed_in_place():
    turns = 0

    def tick():
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(tick)

    backend = SimulatedBackend(cores=2, service_time=0.0, inline=True)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=1, example_inputs=(row(),)) as model:
        calls = [asyncio.ensure_future(model(row(value))) for value in range(2000)]
        await asyncio.sleep(0)
        tick()
        before = turns
        results = await asyncio.gather(*calls)
        assert turns - before > 3
        assert all(torch.equal(result, -row(value)) for value, result in enumerate(results))


class Polled:
    """A core that tells its completions by a descriptor; `descriptor` is the writing end of a pipe."""

    concurrent = True
    broken = False

    def __init__(self, model):
        self.model = model
        self.completions, self.descriptor = os.pipe()
        os.set_blocking(self.completions, False)
        self.ended, self.executed = [], 0

    def execute(self, args, kwargs):
        self.executed += 1
        return self.model(*args, **kwargs)

    def submit(self, args, kwargs, done):
        self.ended.append((args[0].neg(), done))
        os.write(self.descriptor, b"x")

    def complete(self):
        with contextlib.suppress(BlockingIOError):
            os.read(self.completions, 1000)
        if self.broken:
            raise OSError("cannot be read")
        ended, self.ended = self.ended, []
        for output, done in ended:
            done(output, None)

    def close(self):
        os.close(self.completions)
        os.close(self.descriptor)


def polled(made):
    def make(model):
        made.append(Polled(model))
        return made[-1]

    return OneKind(make)


async def test_completions_are_read_from_a_descriptor():
    made = []
    async with AsyncDataParallel(torch.neg, backend=polled(made), batch_size=4, check_rows=False) as model:
        for _ in range(3):
            results = await asyncio.gather(*[model(row(value)) for value in range(20)])
            assert all(torch.equal(result, -row(value)) for value, result in enumerate(results))
        assert sum(core.executed for core in made) == 0
    loop = asyncio.get_running_loop()
    assert not any(loop.remove_reader(core.completions) for core in made)


async def test_a_core_whose_completions_cannot_be_read_is_out_and_its_batch_runs_elsewhere(caplog):
    made = []
    async with AsyncDataParallel(torch.neg, backend=polled(made), batch_size=4, check_rows=False) as model:
        made[0].broken = True
        results = await asyncio.gather(*[model(row(value, 4)) for value in range(6)])
        assert all(torch.equal(result, -row(value, 4)) for value, result in enumerate(results))
        assert [core.state for core in model.statistics().cores] == ["quarantined", "ready"]
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("error", [NotImplementedError, OSError("a file"), ValueError("closed")], ids=str)
async def test_what_the_loop_cannot_watch_executes_in_threads(monkeypatch, caplog, error):
    def refuse(*args):
        raise error

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_reader", refuse)
    monkeypatch.setattr(loop, "remove_reader", refuse)
    made = []
    async with AsyncDataParallel(torch.neg, backend=polled(made), batch_size=4, check_rows=False) as model:
        results = await asyncio.gather(*[model(row(value)) for value in range(20)])
        assert all(torch.equal(result, -row(value)) for value, result in enumerate(results))
        assert sum(core.executed for core in made) > 0
    assert "core 0 executes in threads: the event loop cannot watch" in caplog.text


async def test_a_context_and_an_observer_are_around_executions_in_threads():
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(threading.get_ident())
        yield

    backend = SimulatedBackend(cores=1, service_time=0.001)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, context=context) as model:
        assert torch.equal(await model(row(3)), -row(3))
    assert entered
    assert threading.get_ident() not in entered

    class Observer:
        def __init__(self):
            self.batches = []

        def call(self, timing):
            return contextlib.nullcontext(self)

        @contextlib.contextmanager
        def batch(self, calls, *, core, rows, padded_rows, why):
            self.batches.append((threading.get_ident(), len(calls), rows))
            yield

    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, example_inputs=(row(),)) as model:
        _, timing = await model.timed(row(3))
        assert timing.core == 0
        observer = Observer()
        model.observe(observer)
        await asyncio.gather(*[model(row(value)) for value in range(4)])
        assert sum(rows for _, _, rows in observer.batches) == 4
        assert threading.get_ident() not in {thread for thread, *_ in observer.batches}


async def test_faults_slow_and_hung_executions_of_simulated_cores_are_mended_without_threads():
    fault = SimulatedBackend.fault
    faults = [
        fault("core", probability=0.03),
        fault("slow", probability=0.02, seconds=0.02),
        fault("hang", core=1, execution=9),
    ]
    backend = SimulatedBackend(cores=3, service_time=0.0005, faults=faults, seed=5)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, exec_timeout=1.0, check_rows=False) as model:
        answered = 0
        for _ in range(12):
            results = await asyncio.gather(*[model(row(value)) for value in range(30)], return_exceptions=True)
            for value, result in enumerate(results):
                if isinstance(result, torch.Tensor):
                    assert torch.equal(result, -row(value))
                    answered += 1
                else:
                    assert isinstance(result, (aneuron.CoreFailed, aneuron.NoHealthyCores, OSError, RuntimeError))
            await asyncio.sleep(0.05)
        assert answered
    check_sum(model)


class Held:
    """A core that keeps what it is handed."""

    concurrent = True

    def __init__(self, model):
        self.model, self.handed = model, []

    def execute(self, args, kwargs):
        return self.model(*args, **kwargs)

    def submit(self, args, kwargs, done):
        self.handed.append((args, done))

    def close(self):
        pass


async def test_what_a_model_that_was_aborted_has_hung_on_a_core_is_given_up_for_the_others():
    """Found by chaos, seed 600014: the core's only slot was free again, and nobody was told."""
    made = []

    def make(model):
        made.append(Held(model))
        made[-1].concurrent = False
        return made[-1]

    pool = aneuron.Pool(backend=OneKind(make), device_ids=[0], num_workers=1)
    hung = AsyncDataParallel(torch.neg, pool=pool, batch_size=1, exec_timeout=0.05, check_rows=False)
    other = AsyncDataParallel(torch.neg, pool=pool, batch_size=1, check_rows=False)
    async with hung, other:
        lost = asyncio.ensure_future(hung(torch.ones(1, 2)))
        while not made[0].handed:
            await asyncio.sleep(0)
        waiting = asyncio.ensure_future(other(torch.ones(1, 2)))
        await asyncio.sleep(0)
        await hung.abort()
        while not made[1].handed:
            await asyncio.sleep(0.001)
        args, done = made[1].handed.pop()
        done(args[0].neg(), None)
        assert torch.equal(await waiting, -torch.ones(1, 2))
        with pytest.raises(aneuron.AneuronError):
            await lost


async def test_what_is_given_up_while_the_loop_is_to_do_it_for_want_of_threads_is_not_executed_any_more():
    """Found by chaos, on real threads under load: all models were closed by an internal error."""
    made = []

    def make(model):
        made.append(Held(model))
        return made[-1]

    model = AsyncDataParallel(torch.neg, backend=OneKind(make), device_ids=[0], batch_size=4)
    executed = []
    async with model:
        lost = asyncio.ensure_future(model(torch.ones(1, 2)))
        while not made[0].handed:
            await asyncio.sleep(0)
        run, dispatcher = model._life.run, model._life.run.dispatcher
        lane, (_, (execution,)) = dispatcher.lanes[0], run.running()[0]
        lane.workers.stop()  # as where another model hangs in them
        args, done = made[0].handed.pop()
        made[0].execute = executed.append
        done(args[0].neg(), None)  # what has rows is to be found out by executing it again
        asyncio.get_running_loop().call_soon(run.recovery.hung, [execution], CoreFailed("a hang", 0))
        asyncio.get_running_loop().call_soon(dispatcher._threads_ended, lane)  # and comes back by now
        with pytest.raises(CoreFailed):
            await lost
        await settle()
        assert run.serving
        assert (execution.prepared, execution.output) == (None, None)
    assert not executed


@pytest.mark.parametrize("rows", [1, 3])
async def test_what_is_left_to_threads_is_done_without_where_they_have_ended(rows):
    made = []

    def make(model):
        made.append(Held(model))
        return made[-1]

    model = AsyncDataParallel(torch.neg, backend=OneKind(make), batch_size=4, check_rows=False)
    await model.start()
    large = torch.arange(float(rows * (1 << 17))).reshape(rows, -1)
    calls = [asyncio.ensure_future(model(large + value)) for value in range(2)]
    while not any(args[0][0, 0] == 0 for core in made for args, _ in core.handed):  # all rows of the first call
        await asyncio.sleep(0.001)
    await model.abort()
    with default_device("meta"), torch.enable_grad():
        while not all(each.done() for each in calls):
            for core in made:
                while core.handed:
                    args, done = core.handed.pop()
                    done(args[0].neg(), None)
            await asyncio.sleep(0.001)
    for value, each in enumerate(calls):
        if each.exception() is None:
            assert torch.equal(each.result(), -large - value)
            assert each.result().device.type == "cpu"
    assert any(each.exception() is None for each in calls)
