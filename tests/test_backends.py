"""The backends that ship, one written from the docstrings alone, and the written contract itself."""

import asyncio
import contextlib
import gc
import logging
import re
import textwrap
import threading
import types
import warnings

import pytest
import torch
from puppets import named

import aneuron
from aneuron import AsyncDataParallel, Backend, CoreFailed, CpuBackend, Fault, SimulatedBackend
from aneuron.backends import cpu, simulated
from aneuron.backends.simulated import SimulatedFault
from aneuron.engine import lane
from aneuron.testing import PuppetBackend, check_backend, run, settle

GOOD = torch.arange(6.0).reshape(3, 2)


def net():
    layer = torch.nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    return layer


# The contract.


@pytest.mark.parametrize(
    "backend",
    [
        CpuBackend(cores=2),
        CpuBackend(cores=1, threads_per_core=2),
        SimulatedBackend(cores=2, service_time=0.0),
        PuppetBackend(2),
    ],
    ids=lambda backend: f"{backend.name} {len(backend.cores())}",
)
def test_what_ships_keeps_the_contract(backend):
    check_backend(backend)
    check_backend(backend, net(), (GOOD,))


def test_cores_that_overlap_copies_keep_the_contract():
    backend = SimulatedBackend(cores=1, service_time=0.0, copy_time=0.001)
    check_backend(backend)
    assert backend.load(torch.neg, 0, None).concurrent


def test_a_frozen_graph_is_served():
    frozen = torch.jit.freeze(torch.jit.trace(net(), GOOD))  # has neither weights nor a mode

    async def main():
        async with AsyncDataParallel(frozen, backend=CpuBackend(cores=1), example_inputs=GOOD) as model:
            return await model(GOOD[:2])

    assert torch.equal(asyncio.run(main()), net()(GOOD[:2]))


def documented():
    """The backend that the docstring of `Backend` shows, word for word."""
    block = re.search(r"::\n\n(.*?)\n    `aneuron.testing", Backend.__doc__ + "", re.DOTALL)
    assert block, "the docstring of Backend shows no backend"
    names = {"aneuron": aneuron}
    exec(compile(textwrap.dedent(block[1]), "the docstring of Backend", "exec"), names)
    return names["InlineBackend"]()


def test_the_backend_of_the_docstring_works():
    backend = documented()
    assert isinstance(backend, Backend)
    check_backend(backend)
    layer = net()

    async def main():
        async with AsyncDataParallel(layer, backend=backend, batch_size=4, example_inputs=GOOD) as model:
            calls = [torch.full((rows, 2), float(rows)) for rows in (1, 2, 3, 9, 1)]
            for x, result in zip(calls, await asyncio.gather(*map(model, calls)), strict=True):
                assert torch.equal(result, x)
                assert not result.requires_grad
            assert [core.id for core in model.statistics().cores] == [0, 1]

    asyncio.run(main())


def test_a_backend_needs_nothing_that_the_docstring_does_not_name():
    backend = documented()
    public = {name for name in dir(backend) if not name.startswith("_")}
    assert public == {"name", "recoverable", "cores", "load", "classify"}
    core = backend.load(torch.neg, 0, None)
    assert {name for name in dir(core) if not name.startswith("_")} == {"concurrent", "execute", "close", "model"}


class Recording:
    """A backend from the docstrings that notes how it is used."""

    name = "recording"
    recoverable = False

    def __init__(self, cores=2, concurrent=False):
        self.ids, self.concurrent, self.log, self.lock = range(cores), concurrent, [], threading.Lock()
        self.inside = self.most = 0

    def note(self, *what):
        with self.lock:
            self.log.append((*what, threading.current_thread().name, torch.is_grad_enabled()))

    def cores(self):
        return self.ids

    def load(self, model, core_id, batch_size):
        self.note("load", core_id, batch_size)
        return RecordingCore(self, model, core_id)

    def classify(self, error):
        return Fault.INPUT


class RecordingCore:
    def __init__(self, backend, model, core_id):
        self.backend, self.model, self.core_id, self.concurrent = backend, model, core_id, backend.concurrent

    def execute(self, args, kwargs):
        with self.backend.lock:
            self.backend.inside += 1
            self.backend.most = max(self.backend.most, self.backend.inside)
        try:
            self.backend.note("execute", self.core_id, [tuple(x.shape) for x in args])
            return self.model(*args, **kwargs)
        finally:
            with self.backend.lock:
                self.backend.inside -= 1

    def close(self):
        self.backend.note("close", self.core_id)


def test_a_backend_is_used_as_its_docstrings_say():
    backend = Recording()

    async def main():
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, example_inputs=GOOD) as model:
            await asyncio.gather(*(model(GOOD) for _ in range(10)))

    asyncio.run(main())
    loads = [entry[:3] for entry in backend.log if entry[0] == "load"]
    assert loads == [("load", 0, 4), ("load", 1, 4)]  # once a core, in the order of the ids, with the compiled size
    for core in (0, 1):
        mine = [entry for entry in backend.log if entry[1] == core]
        assert [entry[0] for entry in mine[:3]] == ["load", "execute", "execute"]  # the example runs twice
        assert mine[-1][0] == "close"
        assert [entry[0] for entry in mine].count("close") == 1
        assert all(entry[2] == [(4, 2)] for entry in mine if entry[0] == "execute")
        assert {entry[-2].split("/")[0] for entry in mine} == {f"aneuron-core-{core}"}  # in its own threads
    assert not any(entry[-1] for entry in backend.log)  # gradients are off there


@pytest.mark.parametrize("concurrent", [False, True])
def test_one_thread_at_a_time_executes_unless_the_core_is_concurrent(concurrent, monkeypatch):
    monkeypatch.setattr(lane, "COPYING_PAYS", -1.0, raising=False)  # so that a core has a second thread before long
    backend = Recording(cores=1, concurrent=concurrent)
    meeting = threading.Barrier(3 if concurrent else 2)
    met, meet = [], threading.Event()

    def net(x):
        # Three are expected, and a long wait is for an error only; or the first looks a moment whether another comes.
        if meet.is_set():
            with contextlib.suppress(threading.BrokenBarrierError):
                met.append(meeting.wait(60.0 if concurrent else 0.2))
        return x

    async def main():
        async with AsyncDataParallel(net, backend=backend, batch_size=3, num_workers=3) as model:
            for turn in range(2):
                results = await asyncio.gather(*(model(GOOD + index) for index in range(15)))
                assert all(torch.equal(result, GOOD + index) for index, result in enumerate(results))
                if not turn:
                    backend.most = 0
                    meet.set()

    asyncio.run(main())
    assert len({entry[-2] for entry in backend.log}) == (3 if concurrent else 2)  # threads
    assert backend.most == (3 if concurrent else 1)
    assert bool(met) is concurrent


def broken(**changes):
    """The documented backend with something about it, or about its core, changed."""
    backend = documented()
    load = backend.load
    for name in ("name", "recoverable", "cores", "classify"):
        if name in changes:
            setattr(backend, name, changes.pop(name))

    def changed(model, core_id, batch_size):
        core = load(model, core_id, batch_size)
        for name, value in changes.items():
            setattr(core, name, types.MethodType(value, core) if callable(value) else value)
        return core

    backend.load = changed
    return backend


def count_along(self, args, kwargs):
    self.calls = getattr(self, "calls", 0) + 1
    return self.model(*args) + self.calls


def overwrite(self, args, kwargs):
    return args[0].clamp_(max=9.0) * 2  # the same answer each time


def fail_the_second_time(self, args, kwargs):
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls > 1:
        raise RuntimeError("only once")
    return self.model(*args)


def close_badly(self):
    raise OSError("busy")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "name is a text"),
        ({"recoverable": 1}, "recoverable is a bool"),
        ({"cores": list}, "names each core once"),
        ({"cores": lambda: [1, 0]}, "rising"),
        ({"cores": lambda: [0, 0]}, "once"),
        ({"cores": lambda: [-1, 0]}, "ints from 0"),
        ({"cores": lambda: ["nc:0"]}, "ints from 0"),
        ({"classify": lambda error: None}, "classify"),
        ({"concurrent": None}, "concurrent"),
        ({"execute": None}, "execute"),
        ({"execute": count_along}, "the same"),
        ({"execute": overwrite}, "left as they are"),
        ({"execute": fail_the_second_time}, "only once"),
        ({"close": close_badly}, "busy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_check_finds_what_is_broken(changes, words):
    with pytest.raises(Exception, match=words):
        check_backend(broken(**changes))


def test_the_check_refuses_what_is_no_backend():
    with pytest.raises(AssertionError, match="a backend has"):
        check_backend(object())


def test_the_check_finds_cores_that_disagree():
    backend = documented()
    load = backend.load
    backend.load = lambda model, core_id, batch_size: load(lambda x: model(x) + core_id, core_id, batch_size)
    with pytest.raises(AssertionError, match="every core gives the same answer"):
        check_backend(backend)


# Faults.


class Sorted(PuppetBackend):
    """Puppets whose backend sorts errors as it is told."""

    def __init__(self, sort, **settings):
        super().__init__(**settings)
        self.sort = sort

    def classify(self, error):
        return self.sort(error)


@pytest.mark.parametrize("fault", [Fault.CORE, Fault.FATAL])
def test_a_fault_of_the_core_is_core_failed_for_all_that_shared_the_batch(fault, caplog):
    error = OSError("the device is gone")

    async def main():
        backend = Sorted(lambda error: fault if isinstance(error, OSError) else Fault.INPUT, cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            calls = [asyncio.ensure_future(model(GOOD)) for _ in range(2)]
            await settle()
            backend[0].release(error)
            failures = await asyncio.gather(*calls, return_exceptions=True)
            for failure in failures:
                assert type(failure) is CoreFailed
                assert isinstance(failure, RuntimeError)
                assert failure.core == 0
                assert failure.__cause__ is error
                assert "core 0" in str(failure)
                assert "the device is gone" in str(failure)
            assert failures[0] is not failures[1]
            assert len(backend[0].executed) == 1  # not run again: the rows are not to blame
            assert not hasattr(error, "__notes__")

    run(main())
    level = logging.ERROR if fault is Fault.FATAL else logging.WARNING
    assert [(record.name, record.levelno) for record in caplog.records] == [("aneuron", level)]
    assert "core 0" in caplog.text


def test_an_error_that_the_backend_cannot_sort_is_the_model_s(caplog):
    def sort(error):
        raise KeyError("no idea")

    async def main():
        backend = Sorted(sort, cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            call = asyncio.ensure_future(model(GOOD))
            await settle()
            backend[0].release(LookupError("the model's"))
            with pytest.raises(LookupError, match="the model's"):
                await call
            again = asyncio.ensure_future(model(GOOD))
            await settle()
            backend[0].release()
            assert torch.equal(await again, -GOOD)

    run(main())
    assert "could not classify" in caplog.text


def test_a_base_exception_while_sorting_costs_no_thread():
    def sort(error):
        raise SystemExit("while sorting")

    backend = documented()
    backend.classify = sort

    def picky(x):
        if (x < 0).any():
            raise LookupError("negative")
        return x

    async def main():
        async with asyncio.timeout(60.0):  # not reached, unless the thread has died with the batch
            async with AsyncDataParallel(picky, [0], backend=backend, batch_size=4) as model:
                with pytest.raises(LookupError, match="negative"):
                    await model(-GOOD - 1)
                assert torch.equal(await model(GOOD), GOOD)

    asyncio.run(main())


def test_what_the_cpu_backend_sees_is_always_about_the_input():
    for error in (ValueError(), MemoryError(), RuntimeError("CUDA"), KeyboardInterrupt(), SystemExit()):
        assert CpuBackend(cores=1).classify(error) is Fault.INPUT


def test_the_simulated_backend_sorts_by_its_plan():
    backend = SimulatedBackend(cores=1)
    for fault in Fault:
        assert backend.classify(SimulatedFault("x", fault)) is fault
    for error in (ValueError(), RuntimeError(), KeyboardInterrupt()):
        assert backend.classify(error) is Fault.INPUT


def test_faults_have_the_three_names():
    assert {fault.name: fault.value for fault in Fault} == {"INPUT": "input", "CORE": "core", "FATAL": "fatal"}


# The cpu backend.


@pytest.mark.parametrize("name", ["cores", "threads_per_core"])
@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "2"], ids=named)
def test_numbers_that_are_no_counts_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        CpuBackend(**{name: value})


def test_there_are_as_many_cores_as_the_process_may_use(monkeypatch):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda pid: {3, 4, 7}, raising=False)
    assert list(CpuBackend().cores()) == [0, 1, 2]
    assert list(CpuBackend(cores=5).cores()) == [0, 1, 2, 3, 4]


@pytest.fixture
def process_threads():
    """The process's number of intra-op threads, to be set at will and put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    ("of_process", "cores", "asked", "inside"),
    [(6, 2, None, 3), (6, 4, None, 1), (3, 4, None, 1), (4, 2, 5, 5), (4, 1, None, 4)],
)
def test_threads_within_operations_are_divided_among_the_cores_and_nobody_else_s(
    process_threads, of_process, cores, asked, inside
):
    process_threads(of_process)
    seen = []

    def spy(x):
        seen.append((torch.get_num_threads(), threading.current_thread().name))
        return x

    async def main():
        async with AsyncDataParallel(
            spy, backend=CpuBackend(cores, asked), batch_size=1, num_workers=2 * cores
        ) as model:
            await asyncio.gather(*(model(GOOD) for _ in range(30)))
            assert torch.get_num_threads() == of_process
            assert threads_of_a_new_thread() == of_process
            assert await asyncio.to_thread(torch.get_num_threads) == of_process

    asyncio.run(main())
    assert {threads for threads, _ in seen} == {inside}
    assert torch.get_num_threads() == of_process
    assert threads_of_a_new_thread() == of_process


def test_a_setting_made_after_the_backend_is_restored_too(process_threads):
    process_threads(4)
    backend = CpuBackend(cores=2)  # as in a module that is imported before main() sets the number
    process_threads(3)

    async def main():
        async with AsyncDataParallel(torch.neg, backend=backend) as model:
            await model(GOOD)

    asyncio.run(main())
    assert torch.get_num_threads() == 3
    assert threads_of_a_new_thread() == 3


def test_the_weights_are_shared_by_all_cores():
    layer = net()
    backend = CpuBackend(cores=3)
    cores = [backend.load(layer, core, None) for core in backend.cores()]
    with torch.no_grad():
        layer.weight.mul_(10)  # seen by all
    for core in cores:
        assert torch.equal(core.execute((GOOD,), {}), GOOD.flip(1) * 10)


def test_the_model_runs_in_inference_mode_and_the_thread_does_not_stay_there():
    seen = []

    def spy(x):
        seen.append(torch.is_inference_mode_enabled())
        return x * 2

    core = CpuBackend(cores=1).load(spy, 0, None)
    output = core.execute((GOOD,), {})
    assert seen == [True]
    assert output.is_inference()
    assert not torch.is_inference_mode_enabled()


def test_a_model_answers_as_it_does_when_called():
    class Net(torch.nn.Module):
        def forward(self, x, *, scale=1.0, extra=None):
            return {"y": x * scale, "extra": extra, "pair": (x.sum(1), [x])}

    plain = Net().eval()

    async def main():
        async with AsyncDataParallel(plain, backend=CpuBackend(cores=2)) as model:
            ours, theirs = await model(GOOD, scale=3.0, extra=GOOD), plain(GOOD, scale=3.0, extra=GOOD)
            assert list(ours) == list(theirs)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    asyncio.run(main())


# Files.


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(net(), GOOD), path)
    return path


@pytest.fixture
def loads(monkeypatch):
    """The paths that torch.jit.load is asked for."""
    paths = []
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda path, **settings: paths.append(path) or load(path, **settings))
    return paths


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("make", [CpuBackend, SimulatedBackend])
def test_a_file_is_loaded_once_for_all_cores(file, loads, kind, make):
    async def main():
        settings = {"service_time": 0.0} if make is SimulatedBackend else {}
        backend = make(cores=3, **settings)
        async with AsyncDataParallel(kind(file), backend=backend, batch_size=4, example_inputs=GOOD) as model:
            results = await asyncio.gather(*(model(GOOD + index) for index in range(9)))
            for index, result in enumerate(results):
                assert torch.equal(result, (GOOD + index).flip(1))

    asyncio.run(main())
    assert loads == [str(file)]


def test_a_file_gives_its_batch_size_by_its_example_and_holds_calls_to_it(file):
    async def main():
        async with AsyncDataParallel(file, backend=CpuBackend(cores=1), example_inputs=GOOD) as model:
            assert torch.equal(await model(GOOD[:1]), GOOD[:1].flip(1))
            with pytest.raises(aneuron.ShapeError, match=r"\(3, 3\)"):
                await model(torch.zeros(3, 3))
            (core,) = model.statistics().cores
            assert (core.rows, core.padded_rows) == (1, 2)

    asyncio.run(main())


def test_two_models_of_one_file_share_its_weights_and_a_new_file_is_loaded_again(file, loads):
    backend = CpuBackend(cores=1)
    one, two = (backend.load(file, 0, None) for _ in range(2))
    assert len(loads) == 1
    torch.jit.save(torch.jit.trace(torch.nn.Sequential(net(), torch.nn.ReLU()).eval(), GOOD), file)
    three = backend.load(file, 0, None)
    assert len(loads) == 2
    assert torch.equal(one.execute((-GOOD,), {}), -GOOD.flip(1))
    assert torch.equal(three.execute((-GOOD,), {}), torch.zeros(3, 2))
    for core in (one, two, three):
        core.close()
    del one, two, three, core
    gc.collect()
    backend.load(file, 0, None)
    assert len(loads) == 3  # nothing is kept for a model that is not there


def test_a_file_s_model_is_in_evaluation_mode(tmp_path):
    path = tmp_path / "dropout.pt"
    torch.jit.save(torch.jit.script(torch.nn.Dropout(0.9)), path)
    core = CpuBackend(cores=1).load(path, 0, None)
    assert torch.equal(core.execute((GOOD,), {}), GOOD)


def deprecated():
    """As torch 2.14 warns in `torch.jit.load`, for all to see."""
    warnings.warn("`torch.jit.load` is deprecated. Please switch to `torch.export`.", FutureWarning, stacklevel=1)


def told():
    with pytest.raises(FutureWarning, match="is deprecated"):
        deprecated()


def test_a_file_is_loaded_without_a_word_of_its_deprecation(file, monkeypatch):
    """Of our loads only, and of that only: the process's warnings are not ours."""
    load = torch.jit.load

    def warns(*args, **settings):
        deprecated()
        elsewhere = threading.Thread(target=lambda: heard.append(told()))
        elsewhere.start()
        elsewhere.join(60.0)
        with pytest.raises(FutureWarning, match="odd"):
            warnings.warn("an odd file", FutureWarning, stacklevel=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real one's
            return load(*args, **settings)

    heard = []
    monkeypatch.setattr(torch.jit, "load", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told()
        core = CpuBackend(cores=1).load(file, 0, None)
        told()
    assert len(heard) == 1
    assert torch.equal(core.execute((GOOD,), {}), GOOD.flip(1))


def test_a_load_that_fails_leaves_warnings_as_they_were(tmp_path):
    with pytest.raises(FileNotFoundError):
        CpuBackend(cores=1).load(tmp_path / "none.pt", 0, None)
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(RuntimeError):
        CpuBackend(cores=1).load(tmp_path / "text.pt", 0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told()


# The simulated backend.


class Clock:
    """Stands in for the module `time`: it only goes on when somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def thread_time(self):
        return 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(simulated, "time", made)
    return made


@pytest.mark.parametrize(
    ("settings", "rows", "seconds"),
    [
        ({}, 3, 0.005),
        ({"service_time": 0.5}, 1, 0.5),
        ({"service_time": 0.5, "per_row": 0.25}, 8, 2.5),
        ({"service_time": 0.0, "per_row": 0.25}, 4, 1.0),
        ({"service_time": 0.5, "copy_time": 0.125}, 4, 0.625),
        ({"service_time": 0.0}, 4, 0.0),
    ],
    ids=named,
)
def test_an_execution_takes_the_time_that_was_asked_for(clock, settings, rows, seconds):
    core = SimulatedBackend(cores=1, **settings).load(torch.neg, 0, None)
    x = torch.ones(rows, 2)
    assert torch.equal(core.execute((x,), {}), -x)
    assert clock.now == pytest.approx(100.0 + seconds)


def test_the_time_of_the_model_itself_counts(clock):
    def net(x):
        clock.now += 0.375
        return x

    core = SimulatedBackend(cores=1, service_time=0.5).load(net, 0, None)
    core.execute((GOOD,), {})
    assert clock.now == 100.5
    SimulatedBackend(cores=1, service_time=0.25).load(net, 0, None).execute((GOOD,), {})
    assert clock.now == 100.875  # it took longer than asked for


def test_a_load_takes_its_time(clock):
    backend = SimulatedBackend(cores=2, load_time=7.0)
    backend.load(torch.neg, 0, None)
    assert clock.now == 107.0
    assert clock.slept == [7.0]


@pytest.mark.parametrize("settings", [{}, {"copy_time": 1.0}, {"per_row": 0.5, "service_time": 0.5}], ids=named)
def test_copies_overlap_with_a_run_and_runs_wait_in_the_queue_of_the_device(monkeypatch, settings):
    """Two executions while the clock stands still: the second sleeps until the first would have ended, and then as long
    again."""
    slept = []

    class Still(Clock):
        def sleep(self, seconds):
            slept.append(seconds)

    monkeypatch.setattr(simulated, "time", Still())
    core = SimulatedBackend(cores=1, **{"service_time": 2.0, **settings}).load(torch.neg, 0, None)
    assert core.concurrent
    for _ in range(2):
        core.execute((GOOD,), {})
    copies, runs = [each for each in slept if each == 1.0], [each for each in slept if each != 1.0]
    assert runs == [2.0, 4.0]
    assert len(copies) == 2 * ("copy_time" in settings)


def test_a_device_that_was_idle_begins_at_once(clock):
    core = SimulatedBackend(cores=1, service_time=2.0).load(torch.neg, 0, None)
    for _ in range(2):
        core.execute((GOOD,), {})
        clock.now += 10.0
    assert clock.slept == [2.0, 2.0]


def test_the_model_is_not_run_by_two_threads_at_once():
    inside, most = [], []

    def net(x):
        inside.append(x)
        threading.Event().wait(0.01)
        most.append(len(inside))
        inside.pop()
        return x

    core = SimulatedBackend(cores=1, service_time=0.001).load(net, 0, None)
    threads = [threading.Thread(target=core.execute, args=((GOOD,), {})) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert most == [1, 1, 1]


def test_a_core_that_is_loaded_again_has_other_luck():
    """Or it would fail at the same execution each time."""

    def fails(core):
        seen = []
        for _ in range(50):
            try:
                core.execute((GOOD,), {})
                seen.append(False)
            except SimulatedFault:
                seen.append(True)
        return seen

    def backend():
        plan = [SimulatedBackend.fault("core", probability=0.3)]
        return SimulatedBackend(cores=2, service_time=0.0, faults=plan, seed=7)

    one, other = backend(), backend()
    first, second = (fails(one.load(torch.neg, 0, None)) for _ in range(2))
    assert first != second
    assert [fails(other.load(torch.neg, 0, None)) for _ in range(2)] == [first, second]
    assert fails(other.load(torch.neg, 1, None)) != first


def test_a_core_that_takes_no_time_has_no_queue():
    assert not SimulatedBackend(cores=1, service_time=0.0).load(torch.neg, 0, None).concurrent


@pytest.mark.parametrize(
    "inputs",
    [
        ((torch.zeros(3, 2),), {}),
        ((), {"x": torch.zeros(3, 2)}),
        ((1, None, "text", torch.zeros(3, 2)), {}),
        (({"a": [torch.zeros(3, 2)]},), {}),
    ],
    ids=["positional", "keyword", "after others", "nested"],
)
def test_a_batch_that_is_not_of_the_compiled_size_is_refused(inputs):
    backend = SimulatedBackend(cores=1, service_time=0.0)
    args, kwargs = inputs
    assert backend.load(lambda *args, **kwargs: "ran", 0, 3).execute(args, kwargs) == "ran"
    assert backend.load(lambda *args, **kwargs: "ran", 0, None).execute(args, kwargs) == "ran"
    with pytest.raises(ValueError, match="a batch of 3 rows, on a core compiled for 4"):
        backend.load(lambda *args, **kwargs: "ran", 0, 4).execute(args, kwargs)


@pytest.mark.parametrize("kind", ["dict", "UserDict", "namedtuple", "dataclass"])
def test_a_compiled_size_is_no_matter_of_how_the_inputs_are_nested(kind):
    import collections
    import dataclasses

    @dataclasses.dataclass
    class Sample:
        x: torch.Tensor

    wrap = {
        "dict": lambda x: {"x": x},
        "UserDict": lambda x: collections.UserDict(x=x),
        "namedtuple": collections.namedtuple("Named", ["x"]),
        "dataclass": Sample,
    }[kind]

    async def main():
        async with AsyncDataParallel(
            lambda sample: sample["x"] if "ict" in kind else sample.x, backend=SimulatedBackend(2, 0.0), batch_size=4
        ) as model:
            assert torch.equal(await model(wrap(GOOD)), GOOD)

    asyncio.run(main())


def test_the_lanes_pad_to_the_compiled_size_so_that_no_caller_meets_the_refusal():
    async def main():
        backend = SimulatedBackend(cores=2, service_time=0.0)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4) as model:
            for rows in range(1, 14):
                assert torch.equal(await model(torch.ones(rows, 2)), -torch.ones(rows, 2))

    asyncio.run(main())


def outcomes(backend, executions=10, core=0):
    """What a core of the backend does, execution by execution."""
    loaded = backend.load(torch.neg, core, None)

    def one():
        try:
            loaded.execute((GOOD,), {})
        except SimulatedFault as error:
            return error.fault.value if f"core {core}" in str(error) else str(error)
        return "ok"

    return [one() for _ in range(executions)]


@pytest.mark.parametrize("kind", ["input", "core", "fatal"])
def test_a_planned_fault_strikes_when_and_where_the_plan_says(clock, kind):
    fault = SimulatedBackend.fault
    ok = ["ok"] * 10
    at_three = SimulatedBackend(faults=[fault(kind, execution=3)])
    assert outcomes(at_three) == [*ok[:3], kind, *ok[4:]]
    assert outcomes(at_three, core=1) == [*ok[:3], kind, *ok[4:]]
    on_one = SimulatedBackend(faults=[fault(kind, core=1, execution=0), fault(kind, core=1, execution=9)])
    assert outcomes(on_one) == ok
    assert outcomes(on_one, core=1) == [kind, *ok[1:9], kind]
    assert outcomes(SimulatedBackend(faults=[fault(kind)])) == [kind] * 10
    assert outcomes(SimulatedBackend(faults=[fault(kind, core=1)])) == ok
    assert outcomes(SimulatedBackend(faults=[fault(kind, probability=0.0)])) == ok
    assert outcomes(SimulatedBackend(faults=[fault(kind, probability=1.0)])) == [kind] * 10


def test_probabilities_repeat_with_the_seed_and_differ_between_cores(clock):
    def struck(seed, core):
        plan = [SimulatedBackend.fault("core", probability=0.3)]
        return outcomes(SimulatedBackend(faults=plan, seed=seed), 200, core)

    assert struck(1, 0) == struck(1, 0)
    assert struck(1, 0) != struck(2, 0)
    assert struck(1, 0) != struck(1, 1)
    assert 30 <= struck(1, 0).count("core") <= 90


@pytest.mark.parametrize("kind", ["slow", "hang"])
def test_a_slow_or_hanging_execution_takes_longer_and_answers(clock, kind):
    plan = [SimulatedBackend.fault(kind, execution=1, seconds=30.0)]
    core = SimulatedBackend(service_time=1.0, faults=plan).load(torch.neg, 0, None)
    taken = []
    for _ in range(3):
        before = clock.now
        assert torch.equal(core.execute((GOOD,), {}), -GOOD)
        taken.append(clock.now - before)
    assert taken == [1.0, 31.0, 1.0]
    assert SimulatedBackend.fault("hang").seconds >= 3600.0


def test_simulated_faults_reach_the_callers_as_the_real_ones_would(caplog):
    fault = SimulatedBackend.fault
    backend = SimulatedBackend(
        cores=1, service_time=0.0, faults=[fault("input", execution=1), fault("core", execution=3)]
    )

    async def main():
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, check_rows=False) as model:
            assert torch.equal(await model(GOOD), -GOOD)
            with pytest.raises(SimulatedFault, match="input fault on core 0") as caught:
                await model(GOOD)
            assert any("core 0" in note for note in caught.value.__notes__)
            assert torch.equal(await model(GOOD), -GOOD)
            with pytest.raises(CoreFailed, match="core 0") as failed:
                await model(GOOD)
            assert isinstance(failed.value.__cause__, SimulatedFault)
            (core,) = model.statistics().cores
            assert core.errors == 2

    asyncio.run(main())
    assert caplog.text.count("core 0 failed") == 1


def test_a_fault_during_warm_up_ends_the_start():
    plan = [SimulatedBackend.fault("core", core=1, execution=1)]

    async def main():
        backend = SimulatedBackend(cores=2, service_time=0.0, faults=plan)
        model = AsyncDataParallel(torch.neg, backend=backend, example_inputs=GOOD)
        with pytest.raises(SimulatedFault, match="core fault on core 1") as caught:
            await model.start()
        assert any("loading core 1 of the simulated backend" in note for note in caught.value.__notes__)
        assert not model.ready

    asyncio.run(main())


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimulatedBackend(cores=0),
        lambda: SimulatedBackend(cores=True),
        lambda: SimulatedBackend(cores=1.0),
        lambda: SimulatedBackend(service_time=-1.0),
        lambda: SimulatedBackend(per_row=float("nan")),
        lambda: SimulatedBackend(copy_time=float("inf")),
        lambda: SimulatedBackend(load_time=-0.1),
        lambda: SimulatedBackend.fault("fire"),
        lambda: SimulatedBackend.fault("core", probability=1.5),
        lambda: SimulatedBackend.fault("core", probability=-0.1),
    ],
)
def test_a_simulation_that_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
