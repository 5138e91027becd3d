"""What a model is made of, kept: pickled and copied, said in the log, and counted the same from every thread."""

import asyncio
import copy
import logging
import pickle
import threading

import cloudpickle
import pytest
import torch
from puppets import scenario

from aneuron import AsyncDataParallel, CpuBackend, Fault, SimulatedBackend
from aneuron.testing import PuppetBackend


class Named(AsyncDataParallel):
    """A subclass with arguments and attributes of its own."""

    def __init__(self, name):
        super().__init__(torch.nn.Hardtanh().eval(), batch_size=4, backend=CpuBackend(cores=1), max_pending=64)
        self.name = name


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


def test_what_cannot_be_pickled_is_named():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(AsyncDataParallel(lambda x: x))


def test_pickling_warns_of_nothing_that_was_said_before():
    with pytest.warns(UserWarning, match="dim=1"):
        model = AsyncDataParallel(torch.nn.ReLU().eval(), None, 1, True)
    assert pickled(model)._dim == 1


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


# Statistics.


def check(statistics):
    calls = statistics.calls
    parts = (calls.completed, calls.failed, calls.cancelled, calls.waiting, calls.running)
    assert calls.accepted == sum(parts)
    assert min(parts) >= 0
    assert all(0 <= core.in_flight <= 2 for core in statistics.cores)


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
        for _ in range(30):
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
