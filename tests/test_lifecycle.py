"""Starting, closing, loops and processes, with real threads."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from concurrent.futures import Future

import pytest
import torch
from puppets import scenario

from aneuron import AsyncDataParallel, Closed, CpuBackend, DeviceError, Fault, Pool, SimulatedBackend
from aneuron.engine import dispatcher
from aneuron.engine.cores import SLOW_CLOSE
from aneuron.testing import PuppetBackend, VirtualTimeLoop, settle


def net():
    torch.manual_seed(0)
    return torch.nn.Linear(16, 16).eval()


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("aneuron-core")]


class Reluctant(PuppetBackend):
    """Its first core does not come back from its close."""

    def workers(self, name):
        workers = super().workers(name)
        real = workers.submit
        if name.endswith("core-0"):
            workers.submit = lambda fn: Future() if getattr(fn, "__name__", "") == "close" else real(fn)
        return workers


@scenario
async def test_a_core_that_hangs_in_its_close_is_left_to_itself_after_a_while(caplog):
    backend = Reluctant(2)
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4)
    await model.start()
    closing = asyncio.ensure_future(model.aclose())
    await asyncio.sleep(SLOW_CLOSE - 0.01)
    assert not closing.done()
    assert backend[1].closed
    await asyncio.sleep(0.02)
    assert closing.done()
    assert "cores [0] have not closed within 30 s" in caplog.text
    await model.start()
    assert model.ready
    await model.abort()


def test_a_model_that_a_forked_process_was_given_says_so():
    program = """
        import asyncio, os, sys, torch, aneuron

        async def child(model):
            for use in (lambda: model(torch.ones(1, 1)), model.start, model.aclose):
                try:
                    await use()
                except RuntimeError as error:
                    assert "forked while the model was running" in str(error), error
                else:
                    raise AssertionError("no error")
            assert not model.ready
            async with aneuron.AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(1)) as own:
                assert await own(torch.ones(1, 1)) == -1

        async def main():
            async with aneuron.AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(1)) as model:
                await model(torch.ones(1, 1))
                pid = os.fork()
                if not pid:
                    code = 1
                    try:
                        loop = asyncio.new_event_loop()
                        asyncio._set_running_loop(None)
                        loop.run_until_complete(child(model))
                        code = 0
                    finally:
                        sys.stdout.flush()
                        os._exit(code)
                _, status = os.waitpid(pid, 0)
                assert os.waitstatus_to_exitcode(status) == 0
                assert await model(torch.ones(1, 1)) == -1
                print("well")

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr


@pytest.mark.parametrize(
    ("crowded", "example", "expected"),
    [(1e12, True, 2), (1e-3, True, 1), (1e-3, False, 2)],
    ids=["slow cores", "together faster than Python", "nobody knows yet"],
)
async def test_a_second_thread_is_for_cores_that_would_wait_for_the_first(monkeypatch, crowded, example, expected):
    monkeypatch.setattr(dispatcher, "CROWDED", crowded)
    inputs = torch.ones(1, 2) if example else None
    backend = SimulatedBackend(cores=2, service_time=0.001, submits=False)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, example_inputs=inputs) as model:
        assert len(threads()) == 2 * expected
        x = torch.arange(400.0).reshape(200, 2)
        assert torch.equal(await model(x), -x)


class Gate:
    """A backend whose loads wait until they are let through."""

    name = "gate"
    recoverable = True

    def __init__(self, cores=2, fail=None):
        self.open = threading.Event()
        self.reached = threading.Event()
        self.closed: list[int] = []
        self.loads: list[int] = []
        self._cores, self._fail = cores, fail

    def cores(self):
        return range(self._cores)

    def load(self, model, core_id, batch_size):
        self.reached.set()
        assert self.open.wait(60)
        if core_id == self._fail:
            raise OSError(f"core {core_id} does not load")
        self.loads.append(core_id)
        return GateCore(self, model, core_id)

    def classify(self, error):
        raise NotImplementedError


class GateCore:
    concurrent = False

    def __init__(self, gate, model, core_id):
        self.gate, self.model, self.core_id = gate, model, core_id

    def execute(self, args, kwargs):
        return self.model(*args, **kwargs)

    def close(self):
        self.gate.closed.append(self.core_id)


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


async def test_construction_needs_no_loop_and_no_device():
    class Untouchable(PuppetBackend):
        def cores(self):
            raise AssertionError("a device was touched")

    model = AsyncDataParallel(net(), backend=Untouchable())
    assert not model.ready
    assert model.num_workers is None
    assert "not started" in repr(model)


async def test_the_first_call_starts_the_model_once_for_all_callers():
    gate = Gate()
    model = AsyncDataParallel(net(), backend=gate)
    calls = [asyncio.ensure_future(model(torch.ones(1, 16))) for _ in range(10)]
    await until(gate.reached.is_set)
    calls[0].cancel()  # the one that began the start
    gate.open.set()
    await asyncio.gather(*calls[1:])
    assert gate.loads == [0, 1]
    assert calls[0].cancelled()
    await model.aclose()
    assert sorted(gate.closed) == [0, 1]
    assert not threads()


async def test_a_start_that_nobody_waits_for_any_more_is_cancelled_and_frees_what_it_loaded():
    gate = Gate()
    model = AsyncDataParallel(net(), backend=gate)
    starts = [asyncio.ensure_future(model.start()) for _ in range(2)]
    await until(gate.reached.is_set)
    for start in starts:
        start.cancel()
    await asyncio.wait(starts)
    assert all(start.cancelled() for start in starts)
    gate.open.set()
    await until(lambda: not threads())
    assert gate.closed == gate.loads == [0]
    assert not model.ready
    await model.start()  # and it can be started again
    assert model.ready
    await model.aclose()


async def test_a_start_that_fails_half_way_frees_the_cores_already_loaded():
    gate = Gate(cores=3, fail=1)
    gate.open.set()
    model = AsyncDataParallel(net(), backend=gate)
    with pytest.raises(OSError, match="core 1 does not load") as caught:
        await model.start()
    assert any("loading core 1" in note for note in caught.value.__notes__)
    assert gate.closed == [0]
    assert not threads()
    assert not model.ready


async def test_closing_during_the_start_ends_it_with_closed():
    gate = Gate()
    model = AsyncDataParallel(net(), backend=gate)
    call = asyncio.ensure_future(model(torch.ones(1, 16)))
    await until(gate.reached.is_set)
    await model.aclose()
    gate.open.set()
    with pytest.raises(Closed):
        await call
    await until(lambda: not threads())
    assert gate.closed == gate.loads


async def test_a_closed_model_can_be_started_again():
    model = AsyncDataParallel(net(), backend=CpuBackend(cores=2))
    for _ in range(3):
        async with model:
            assert (await model(torch.ones(3, 16))).shape == (3, 16)
        with pytest.raises(Closed):
            await model(torch.ones(1, 16))
    assert model.statistics().calls.completed == 3
    assert not threads()


def test_a_module_level_model_serves_one_loop_after_the_other():
    model = AsyncDataParallel(net(), backend=CpuBackend(cores=2))

    async def client():
        async with model:
            return await model(torch.ones(2, 16))

    assert torch.equal(asyncio.run(client()), asyncio.run(client()))


def test_use_from_a_second_loop_is_refused_while_the_first_one_runs():
    model = AsyncDataParallel(net(), backend=CpuBackend(cores=1))
    refusals = []

    async def second():
        for use in (lambda: model(torch.ones(1, 16)), model.start, model.aclose, model.abort):
            with pytest.raises(RuntimeError, match="another event loop"):
                await use()
            refusals.append(use)

    async def first():
        async with model:
            await asyncio.to_thread(asyncio.run, second())
            assert (await model(torch.ones(1, 16))).shape == (1, 16)

    asyncio.run(first())
    assert len(refusals) == 4


def test_a_model_whose_loop_has_gone_starts_afresh_on_the_next():
    model = AsyncDataParallel(net(), backend=CpuBackend(cores=2))

    async def forget_to_close():
        return await model(torch.ones(1, 16))

    first = asyncio.run(forget_to_close())
    assert not model.ready
    assert torch.equal(first, asyncio.run(forget_to_close()))

    async def close():
        await model.start()
        await model.aclose()

    asyncio.run(close())
    for thread in threads():
        thread.join(60)
    assert not threads()


def test_a_drain_in_finally_ends_although_run_cancels_every_task():
    model = AsyncDataParallel(net(), backend=SimulatedBackend(cores=2, service_time=0.01))
    results = []

    async def serve():
        try:
            results.append(await model(torch.ones(1, 16)))
            await asyncio.sleep(3600)
        finally:
            await model.aclose()

    async def main():
        task = asyncio.create_task(serve())
        await until(lambda: bool(results))
        assert not task.done()  # asyncio.run cancels it

    asyncio.run(main())
    assert not threads()


def test_a_model_that_was_never_closed_warns_and_its_threads_end():
    def use():
        model = AsyncDataParallel(net(), backend=CpuBackend(cores=2))

        async def main():
            await model(torch.ones(1, 16))

        asyncio.run(main())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
        gc.collect()
    assert any(issubclass(w.category, ResourceWarning) and "never closed" in str(w.message) for w in caught)
    for thread in threads():
        thread.join(60)
    assert not threads()


@pytest.mark.parametrize("seconds", [0.0, 0.2, 3600.0])
def test_a_model_that_is_never_closed_lets_the_interpreter_exit(seconds):
    program = f"""
        import asyncio, torch, aneuron
        model = aneuron.AsyncDataParallel(torch.neg, backend=aneuron.SimulatedBackend(cores=2, service_time={seconds}))
        async def main():
            calls = [asyncio.ensure_future(model(torch.ones(1, 4))) for _ in range(40)]
            await asyncio.sleep(0.1)
        asyncio.run(main())
        print("the end")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
    assert "Exception" not in done.stderr


def test_no_tensor_is_touched_before_device_ids_are_known_to_exist():
    async def main():
        with pytest.raises(DeviceError, match="ids 0 to 1"):
            await AsyncDataParallel(net(), device_ids=["nc:2"], backend=CpuBackend(cores=2)).start()

    asyncio.run(main())
    assert not threads()


async def test_the_chosen_cores_are_used_and_no_others():
    backend = SimulatedBackend(cores=8, service_time=0.001)
    async with AsyncDataParallel(torch.neg, ["nc:5", 2], backend=backend, batch_size=1) as model:
        await asyncio.gather(*(model(torch.ones(1, 4)) for _ in range(20)))
        stats = model.statistics()
    assert [core.id for core in stats.cores] == [5, 2]
    assert sum(core.rows for core in stats.cores) == 20
    assert all(core.rows for core in stats.cores)


def test_waiting_for_what_cannot_happen_is_an_error_in_virtual_time():
    loop = VirtualTimeLoop()
    with pytest.raises(RuntimeError, match="deadlock"):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_virtual_time_passes_at_once():
    loop = VirtualTimeLoop()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.time() == pytest.approx(3600)
    loop.close()


async def test_a_start_that_is_closed_before_its_first_step_can_be_repeated():
    model = AsyncDataParallel(net(), backend=CpuBackend(cores=1))
    early = asyncio.ensure_future(model(torch.ones(1, 16)))
    await asyncio.sleep(0)
    await model.aclose()
    async with asyncio.timeout(60):
        await model.start()
        assert (await model(torch.ones(1, 16))).shape == (1, 16)
        with pytest.raises(Closed):
            await early
        await model.aclose()


async def test_settings_made_while_the_model_loads_hold():
    gate = Gate()
    model = AsyncDataParallel(net(), backend=gate)
    start = asyncio.ensure_future(model.start())
    await until(gate.reached.is_set)
    model.num_workers, model.split_size = 1, 3
    gate.open.set()
    await start
    assert model._life.run.dispatcher.board.slots.slots == [1, 0]
    assert model._life.run.rules.split_size == 3
    await model.aclose()


async def test_the_end_of_an_aborted_run_says_nothing_about_the_next():
    model = AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.2))
    await model.start()
    call = asyncio.ensure_future(model(torch.ones(1, 4)))
    await asyncio.sleep(0.02)
    old = model._life.run
    await model.abort()
    await model.start()
    await asyncio.shield(old.closed)
    assert [core.state for core in model.statistics().cores] == ["ready"]
    await call
    await model.aclose()
    assert [core.state for core in model.statistics().cores] == ["closed"]


@pytest.mark.parametrize("which", [0, 2])
async def test_a_thread_that_cannot_be_started_fails_the_start_and_leaves_none(monkeypatch, which):
    real, started = threading.Thread.start, []

    def start(thread):
        if thread.name.startswith("aneuron-core"):
            started.append(thread)
            if len(started) == which + 1:
                raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    model = AsyncDataParallel(net(), backend=CpuBackend(cores=4))
    with pytest.raises(RuntimeError, match="new thread"):
        await model.start()
    assert not threads()
    await model.aclose()


async def test_a_second_thread_that_cannot_be_started_is_done_without(monkeypatch):
    monkeypatch.setattr("aneuron.engine.lane.COPYING_PAYS", -1.0)
    async with AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.0)) as model:
        monkeypatch.setattr(threading.Thread, "start", lambda thread: exec("raise RuntimeError('no more')"))
        for _ in range(20):
            await model(torch.ones(1, 4))


def test_calls_that_a_closed_loop_leaves_behind_are_counted_as_cancelled():
    model = AsyncDataParallel(torch.neg, backend=SimulatedBackend(cores=1, service_time=0.2, submits=False))
    loop = asyncio.new_event_loop()

    async def main():
        await model.start()
        calls = [model(torch.ones(1, 4)) for _ in range(5)]
        for each in calls:
            each.send(None)  # admitted, and never run again
        return calls

    calls = loop.run_until_complete(main())
    loop.close()
    del calls
    gc.collect()
    counts = model.statistics().calls
    assert (counts.accepted, counts.cancelled, counts.running) == (5, 5, 0)
    model._life.run.stop()
    for thread in threads():
        thread.join(60)
    model._life.run = None


async def test_a_failing_start_that_is_cancelled_while_it_cleans_up_ends_quietly():
    class Slow(Gate):
        def load(self, model, core_id, batch_size):
            core = super().load(model, core_id, batch_size)
            core.close = lambda: time.sleep(0.3)
            return core

    gate, failures = Slow(cores=2, fail=1), []
    gate.open.set()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    model = AsyncDataParallel(net(), backend=gate)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await model.start()
    await until(lambda: not threads())
    await asyncio.sleep(0.05)
    assert failures == []


# Found by a reviewer; each was seen to fail.


@scenario
async def test_a_start_that_is_cancelled_just_when_it_succeeds_frees_the_cores():
    backend = PuppetBackend(2)
    model = AsyncDataParallel(torch.neg, backend=backend)
    task = asyncio.create_task(model.start())
    while model._life._starting is None:
        await asyncio.sleep(0)
    model._life._starting.task.add_done_callback(lambda _: task.cancel())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not model.ready
    assert all(core.closed for core in backend.loaded.values())
    async with model:  # not closed, either
        assert model.ready


class Loads:
    """A backend that knows how many of its cores are open."""

    name, recoverable = "loads", True

    def __init__(self, concurrent=True):
        self.open, self.concurrent = 0, concurrent

    def cores(self):
        return range(2)

    def load(self, model, core_id, batch_size):
        self.open += 1
        backend = self

        class Core:
            concurrent = self.concurrent

            def execute(self, args, kwargs):
                return args[0]

            def close(self):
                backend.open -= 1

        return Core()

    def classify(self, error):
        return Fault.INPUT


async def test_cores_are_freed_where_no_threads_can_be_had(monkeypatch):
    backend, start = Loads(), threading.Thread.start

    def limited(thread):
        if thread.name.endswith("/2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    model = AsyncDataParallel(torch.neg, backend=backend)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await model.start()
    await until(lambda: backend.open == 0)
    monkeypatch.undo()
    async with model:
        assert model.ready


class Big:
    """What a core holds while it loads."""


async def test_what_a_core_held_that_did_not_load_is_freed_at_once():
    alive = weakref.WeakSet()

    class Failing(Loads):
        def load(self, model, core_id, batch_size):
            held = Big()
            alive.add(held)
            if core_id:
                raise OSError("no room")
            return super().load(model, core_id, batch_size)

    gc.collect()
    gc.disable()
    try:
        model = AsyncDataParallel(torch.neg, backend=Failing(), min_cores=1)
        async with model:
            assert [core.state for core in model.statistics().cores] == ["ready", "quarantined"]
            assert not alive
        with contextlib.suppress(OSError):
            await AsyncDataParallel(torch.neg, backend=Failing()).start()
        assert not alive
    finally:
        gc.enable()


@scenario
async def test_cores_that_a_failed_start_did_not_reach_are_closed():
    backend = PuppetBackend(3, load_error=(1, OSError("no")))
    model = AsyncDataParallel(torch.neg, backend=backend)
    with pytest.raises(OSError, match="no"):
        await model.start()
    assert [core.state for core in model.statistics().cores] == ["closed"] * 3


@scenario
async def test_a_model_that_cannot_load_anywhere_is_not_tried_on_every_core():
    backend = PuppetBackend(8, load_error=(0, ValueError("no traced model")))
    with pytest.raises(ValueError, match="no traced model"):
        await AsyncDataParallel(torch.neg, backend=backend, min_cores=1).start()
    assert not backend.loaded


@scenario
async def test_calls_that_leave_behind_a_long_execution_are_not_kept():
    backend = PuppetBackend(1)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
        first = asyncio.ensure_future(model(torch.ones(4, 1)))
        await settle()
        for _ in range(20):
            tasks = [asyncio.ensure_future(model(torch.ones(1, 1))) for _ in range(50)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        waiting = model._life.run.scheduler
        queued = sum(len(flow.calls) for kind in waiting._queue.kinds.values() for flow in kind.flows.values())
        assert len(waiting.arrivals) + queued < 100
        assert model.statistics().calls.waiting == 0
        backend[0].release()
        await first


@scenario
async def test_what_one_start_has_found_does_not_bind_the_next(tmp_path):
    class Knowing(PuppetBackend):
        rows = 4

        def compiled_rows(self, model):
            return self.rows

    backend = Knowing(1, service_time=0.01)
    model = AsyncDataParallel(torch.neg, backend=backend)
    for rows in (4, 8):
        backend.rows = rows
        async with model:
            assert f"batch_size={rows}" in repr(model)
            await model(torch.ones(1, 1))
            assert len(backend[0].executed[0][0][0]) == rows


@scenario
async def test_num_workers_may_be_set_while_too_few_cores_serve():
    backend = PuppetBackend(2, faults={OSError: Fault.CORE})
    async with AsyncDataParallel(torch.neg, backend=backend, min_cores=2) as model:
        task = asyncio.ensure_future(model(torch.ones(1, 1)))
        await settle()
        core = next(core for core in backend.loaded.values() if core.executing is not None)
        core.release(OSError("lost"))
        await settle()
        assert not model.ready
        model.num_workers = 6
        await settle()
        assert sum(model._life.run.dispatcher.board.slots.slots) == 6
        next(core for core in backend.loaded.values() if core.executing is not None).release()
        await task


def test_a_start_that_fails_before_loading_leaves_its_pool_to_any_loop():
    pool = Pool(backend=PuppetBackend(2))
    first, second = VirtualTimeLoop(), VirtualTimeLoop()
    with pytest.raises(DeviceError, match="min_cores=3"):
        first.run_until_complete(AsyncDataParallel(torch.neg, pool=pool, min_cores=3).start())
    model = AsyncDataParallel(torch.neg, pool=pool)
    second.run_until_complete(model.start())
    second.run_until_complete(model.aclose())
    first.close()
    second.close()


@scenario
async def test_a_model_starts_on_a_pool_that_its_last_model_leaves_meanwhile():
    class Asked(PuppetBackend):
        def compiled_rows(self, model):
            asked.append(model)

    asked = []
    backend = Asked(1, service_time=0.01)
    pool = Pool(backend=backend)
    first, second = [AsyncDataParallel(each, pool=pool) for each in (torch.neg, torch.abs)]
    await first.start()
    start = asyncio.ensure_future(second.start())
    while torch.abs not in asked:
        await asyncio.sleep(0)
    await first.abort()
    await start
    assert torch.equal(await second(-torch.ones(1, 1)), torch.ones(1, 1))
    await second.aclose()
