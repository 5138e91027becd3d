"""What a model is made of, kept: pickled and copied, said in the log, and counted the same from every thread."""

import asyncio
import copy
import inspect
import logging
import pickle
import sys
import threading
import warnings

import cloudpickle
import pytest
import torch
from puppets import scenario

from aneuron import AsyncDataParallel, Buckets, CpuBackend, CudaBackend, Fault, SimulatedBackend
from aneuron.stats import CoreCounters, Counters, Recent, ServiceTimes
from aneuron.testing import PuppetBackend, settle


def twice(x):
    return x * 2


class Named(AsyncDataParallel):
    """A subclass with arguments and attributes of its own."""

    def __init__(self, name):
        super().__init__(torch.nn.Hardtanh().eval(), batch_size=4, backend=CpuBackend(cores=1), max_pending=64)
        self.name = name


class Early(AsyncDataParallel):
    """One that sets attributes before it is an `AsyncDataParallel`."""

    def __init__(self, name):
        self.name, self.itself = name, self
        super().__init__(torch.nn.Hardtanh().eval(), backend="cpu")


def pickled(model):
    return pickle.loads(pickle.dumps(model))


COPIES = {
    "pickle": pickled,
    "cloudpickle": lambda model: pickle.loads(cloudpickle.dumps(model)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("when", ["before", "started", "closed"])
async def test_a_model_is_pickled_and_copied_as_its_configuration(how, when):
    model = Named("net")
    model.num_workers = 3
    if when != "before":
        await model.start()
        await model(torch.ones(2, 2))
    if when == "closed":
        await model.aclose()
    twin = COPIES[how](model)
    assert type(twin) is Named
    assert (twin.name, twin.num_workers, twin.max_pending, twin.ready) == ("net", 3, 64, False)
    assert twin.statistics().calls.accepted == 0
    async with twin:
        assert torch.equal(await twin(torch.full((5, 2), 3.0)), torch.ones(5, 2))
    await model.aclose()


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
async def test_what_was_changed_at_run_time_goes_along():
    async with AsyncDataParallel(torch.nn.ReLU().eval(), {0}, backend="cpu") as model:
        model.split_size = 2
        model.max_pending = 9
        model.disable_dynamic_batching()
        await model.swap(torch.nn.Hardtanh().eval())
        twin = pickled(model)
    assert (twin.split_size, twin.max_pending) == (2, 9)
    async with twin:
        assert torch.equal(await twin(torch.full((3, 2), 5.0)), torch.ones(3, 2))


async def test_a_view_of_a_model_is_pickled_with_it():
    async with AsyncDataParallel(torch.nn.ReLU().eval(), backend="cpu") as model:
        view = pickled(model.options(tenant="acme", timeout=9.0))
        assert repr(view).endswith("timeout=9.0, priority=0, tenant='acme')")
    assert torch.equal(await view(torch.ones(1, 2)), torch.ones(1, 2))
    await view._model.aclose()


@pytest.mark.parametrize("how", COPIES)
def test_attributes_that_a_subclass_set_first_go_along(how):
    twin = COPIES[how](Early("net"))
    assert twin.name == "net"
    if how != "copy":
        assert twin.itself is twin


def test_every_argument_goes_along():
    arguments = set(inspect.signature(AsyncDataParallel).parameters)
    _, (_, _, settings), _ = AsyncDataParallel(torch.nn.ReLU().eval()).__reduce__()
    assert arguments == {"model", *settings}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("by_size", [False, True])
async def test_a_traced_model_goes_along(how, by_size):
    net = torch.jit.trace(torch.nn.Hardtanh().eval(), torch.ones(4, 2))
    example = torch.ones(4, 2)
    model = AsyncDataParallel({4: net} if by_size else net, example_inputs=example, backend=CpuBackend(cores=1))
    async with model:
        twin = COPIES[how](model)
    if how == "copy":
        assert twin._life.program.given[0] is net
    async with twin:
        assert torch.equal(await twin(torch.full((5, 2), 3.0)), torch.ones(5, 2))
    again = COPIES[how](twin)
    async with again:
        assert torch.equal(await again(torch.full((5, 2), 3.0)), torch.ones(5, 2))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("backend", [CpuBackend(2, 1), SimulatedBackend(3, 0.1), CudaBackend(2, 1 << 20)])
def test_backends_go_along(how, backend):
    twin = COPIES[how](AsyncDataParallel(torch.nn.ReLU().eval(), backend=backend))
    for name in ("cores_per_device", "staging_bytes"):
        assert getattr(twin._pool.backend, name, None) == getattr(backend, name, None)
    assert len(twin._pool.backend.cores()) == len(backend.cores())


async def test_a_scripted_function_goes_along():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = pickled(AsyncDataParallel(torch.jit.script(twice), backend="cpu"))
    async with twin:
        assert torch.equal(await twin(torch.ones(3, 2)), torch.full((3, 2), 2.0))


def test_a_traced_model_asks_for_the_package_that_knows_its_classes(monkeypatch):
    net = torch.jit.trace(torch.nn.ReLU().eval(), torch.ones(1, 2))
    monkeypatch.setattr("aneuron.backends.torchscript.CLASSES", ("no_such_package_of_classes",))
    monkeypatch.setitem(sys.modules, "no_such_package_of_classes", logging)
    data = pickle.dumps(AsyncDataParallel(net))
    monkeypatch.delitem(sys.modules, "no_such_package_of_classes")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_classes"):
        pickle.loads(data)


def test_a_copy_shares_the_model_and_a_deep_copy_does_not():
    net = torch.nn.Linear(2, 2).eval()
    model = AsyncDataParallel(net)
    assert copy.copy(model)._life.program.source is net
    assert copy.deepcopy(model)._life.program.source is not net


def test_what_cannot_be_pickled_is_named():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(AsyncDataParallel(lambda x: x))


def test_pickling_warns_of_nothing_that_was_said_before():
    with pytest.warns(UserWarning, match="dim=1"):
        model = AsyncDataParallel(torch.nn.ReLU().eval(), None, 1, True)
    assert pickled(model)._settings.dim == 1


# A path with a backend of one's own.


class Names:
    """A backend for which a path is the name of something that takes any number of rows."""

    name = "names"
    recoverable = False

    def __init__(self):
        self.loaded = []

    def cores(self):
        return [0]

    def load(self, model, core_id, batch_size):
        self.loaded.append((model, batch_size))
        return self

    concurrent = False

    def execute(self, args, kwargs):
        return args[0] * 2

    def close(self):
        pass

    def classify(self, error):
        return Fault.INPUT


class Compiled(Names):
    def compiled_rows(self, model):
        return 4


async def test_what_a_backend_of_ones_own_makes_of_a_path_takes_any_number_of_rows():
    for backend, size in ((Names(), None), (Compiled(), 4)):
        example = torch.ones(2, 3)
        async with AsyncDataParallel("hub://model", backend=backend, example_inputs=example) as model:
            assert torch.equal(await model(torch.ones(5, 3)), torch.full((5, 3), 2.0))
            if size is None:
                assert (await model(torch.ones(5, 7))).shape == (5, 7)  # nor are calls held to the example's shape
        assert backend.loaded == [("hub://model", size)]


# The log.


async def test_one_line_says_that_a_model_has_started_and_that_it_was_swapped(caplog):
    with caplog.at_level(logging.INFO, "aneuron"):
        async with AsyncDataParallel(
            {2: torch.nn.ReLU().eval(), 8: torch.nn.ReLU().eval()}, [1, 2], backend=SimulatedBackend(4, 0.0)
        ) as model:
            (record,) = caplog.records
            assert record.levelno == logging.INFO
            assert "started on 2 cores of the simulated backend (1, 2): 2 rows, 8 rows;" in record.message
            await model(torch.full((3, 2), 0.123))
            await model.swap({2: torch.nn.ReLU().eval(), 8: torch.nn.ReLU().eval()})
            assert [each.message.partition(" ")[0] for each in caplog.records] == ["started", "swapped"]
            assert "0.123" not in caplog.text


async def test_the_line_names_one_core_one_row_and_lengths(caplog):
    grid = {(1, 32): torch.neg, (1, 64): torch.neg}
    with caplog.at_level(logging.INFO, "aneuron"):
        async with AsyncDataParallel(grid, backend=SimulatedBackend(1, 0.0), buckets=Buckets(sizes=(32, 64))):
            (record,) = caplog.records
    assert "on 1 core of the simulated backend (0): 1 row of length 32, 1 row of length 64; " in record.message


# Statistics.


def check(statistics, runs=1):
    calls = statistics.calls
    parts = (calls.completed, calls.failed, calls.cancelled, calls.waiting, calls.running)
    assert calls.accepted == sum(parts)
    assert min(parts) >= 0
    assert all(0 <= core.in_flight <= 2 * runs for core in statistics.cores)


@pytest.fixture
def threads_take_turns_often():
    """Threads that wait for the interpreter get it at once, so that they meet the loop's in many places."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_take_turns_often")
async def test_statistics_read_from_several_threads_are_possible():
    stop, errors = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                check(model.statistics())
            except BaseException as error:
                errors.append(error)
                return

    async with AsyncDataParallel(torch.neg, backend=SimulatedBackend(2, 0.0002), batch_size=4) as model:
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(10):
            calls = [asyncio.ensure_future(model(torch.ones(1 + n % 9, 2))) for n in range(40)]
            await asyncio.sleep(0)
            for call in calls[::7]:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            check(model.statistics())
        stop.set()
        for reader in readers:
            reader.join()
    assert not errors
    assert model.statistics().calls.running == 0


@pytest.mark.usefixtures("threads_take_turns_often")
async def test_statistics_read_from_several_threads_are_possible_while_models_are_swapped():
    stop, errors = threading.Event(), []

    def read():
        before = model.statistics()
        while not stop.is_set() and not errors:
            try:
                now = model.statistics()
                check(now, runs=3)
                for name in ("accepted", "completed", "failed", "cancelled"):
                    assert getattr(now.calls, name) >= getattr(before.calls, name)
                for core, earlier in zip(now.cores, before.cores, strict=True):
                    assert core.batches >= earlier.batches
                    assert core.batches <= core.rows <= 4 * core.batches
                before = now
            except BaseException as error:
                errors.append(error)

    async with AsyncDataParallel(torch.neg, backend=SimulatedBackend(2, 0.0002), batch_size=4) as model:
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for n in range(10):
            calls = [asyncio.ensure_future(model(torch.ones(1 + n % 9, 2))) for n in range(20)]
            await asyncio.sleep(0)
            await model.swap(torch.neg if n % 2 else torch.abs)
            await asyncio.gather(*calls)
        stop.set()
        for reader in readers:
            reader.join()
    assert not errors
    assert model.statistics().calls.completed == 200


@scenario
async def test_the_old_run_is_counted_from_the_moment_on_when_it_is_swapped(caplog):
    seen = []

    class Reader(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("swapped"):
                seen.append(model.statistics())

    logger, reader = logging.getLogger("aneuron"), Reader()
    backend = PuppetBackend(1)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=1) as model:
        calls = [asyncio.ensure_future(model(torch.ones(1, 2))) for _ in range(3)]
        await settle()
        old = backend[0]
        logger.addHandler(reader)
        with caplog.at_level(logging.INFO, "aneuron"):
            swap = asyncio.ensure_future(model.swap(torch.abs))
            await settle()
        logger.removeHandler(reader)
        (during,) = seen
        assert (during.calls.waiting, during.calls.running, during.cores[0].in_flight) == (2, 1, 1)
        for _ in calls:
            old.release()
            await settle()
        await asyncio.gather(swap, *calls)


@pytest.mark.pure  # compiled, numbers are compared without a word to them
def test_who_asks_while_another_sorts_gets_the_median_of_now():
    recent, seen = Recent(), []

    class Nosy(float):
        def __lt__(self, other):
            if not seen:
                seen.append(None)
                seen[0] = recent.median  # another thread, say
            return float(self) < float(other)

    for value in (3.0, 5.0, 4.0):
        recent.add(Nosy(value), 0.0)
    assert recent.median == 4.0
    assert seen == [4.0]


def test_a_core_that_is_read_at_any_moment_has_whole_executions():
    core, stop, errors = CoreCounters(0, 0), threading.Event(), []

    def read():
        while not stop.is_set():
            now = core.snapshot(0)
            if not (now.rows == 3 * now.batches and now.padded_rows == now.batches and now.busy_seconds == now.batches):
                errors.append(now)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(100_000):
        core.executed(3, 1, 1.0)
    stop.set()
    reader.join()
    assert not errors


def test_a_shape_is_seen_when_it_has_a_time():
    times = ServiceTimes()
    assert times.service((1, 0), 0.0) == 0.0
    times.executed((1, 0), 2.0, 0.0)
    times.learn((8, 0), 5.0, 0.0)
    assert times.medians() == {(1, 0): 2.0, (8, 0): 5.0}
    assert times.last == (1, 0)
    assert times.service((1, 0), 13.0) == 0.0  # too old to be believed
    times.learn((1, 0), 1.0, 13.0)
    assert times.service((1, 0), 13.0) == 1.0


def test_the_rate_at_which_rows_leave_sinks_while_none_do():
    counters = Counters()
    assert counters.drain_seconds(8, 0.0) is None
    for n in range(5):
        counters.drained(8, float(n))
    assert counters.drain_seconds(8, 4.0) == pytest.approx(1.0)
    assert counters.drain_seconds(8, 5.0) == pytest.approx(1.0)  # the next is due
    assert counters.drain_seconds(8, 50.0) == pytest.approx(10.0)


@scenario
async def test_a_snapshot_is_not_changed_by_the_next():
    backend = PuppetBackend(1)
    async with AsyncDataParallel(torch.neg, backend=backend) as model:
        call = asyncio.ensure_future(model(torch.ones(1, 2)))
        for _ in range(5):
            await asyncio.sleep(0)
        during = model.statistics()
        assert [core.in_flight for core in during.cores] == [1]
        backend[0].release()
        await call
        assert [core.in_flight for core in model.statistics().cores] == [0]
        assert [core.in_flight for core in during.cores] == [1]
