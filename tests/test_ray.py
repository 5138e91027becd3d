"""What replicas of Ray Serve and views of handles do: all of it that needs no Ray (that is in `test_ray_serve.py`)."""

import asyncio
import importlib.util
import logging
import threading
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch
from puppets import scenario

import aneuron.ray
from aneuron import (
    AsyncDataParallel,
    Closed,
    CoreFailed,
    CpuBackend,
    DeadlineExceeded,
    QueueFull,
    Rows,
    ShapeError,
    Shared,
    SimulatedBackend,
)
from aneuron.backends import cpus
from aneuron.ray.arrays import LARGE, foreign, owned
from aneuron.ray.handles import original, view_of
from aneuron.ray.replica import Replica
from aneuron.ray.sizing import Resources, figures, needed, ongoing, scaling


def make(factor=2.0, **options):
    backend = options.pop("backend", None) or SimulatedBackend(cores=2, service_time=0.0)
    return AsyncDataParallel(Scale(factor).eval(), backend=backend, batch_size=8, **options)


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is here")
def test_without_ray_the_error_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'aneuron\[ray\]'"):
        aneuron.ray.deployment  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'deploy'"):
        aneuron.ray.deploy  # noqa: B018


# Numbers.


def test_calls_at_a_time_fill_the_batches_of_all_cores():
    for cores in (1, 2, 12, 24, 64):
        assert ongoing(cores) >= max(256, needed(2 * cores, cores, 64))
    assert needed(in_flight=4, cores=2, batch_size=8) == 48


@pytest.mark.parametrize(
    ("asked", "given", "wanted"),
    [
        (Resources(), None, {}),
        (Resources(num_cpus=2), {"memory": 1}, {"memory": 1, "num_cpus": 2}),
        (Resources(neuron_cores=2), {"resources": {"disk": 1}}, {"resources": {"disk": 1, "neuron_cores": 2}}),
        (Resources(num_gpus=0.5, num_cpus=0), None, {"num_gpus": 0.5, "num_cpus": 0}),
        (Resources(num_cpus=2), {"num_cpus": 2}, {"num_cpus": 2}),
    ],
)
def test_resources_become_options_of_an_actor(asked, given, wanted):
    assert asked.actor_options(given) == wanted


@pytest.mark.parametrize(
    ("asked", "given", "error"),
    [
        (Resources(neuron_cores=0), None, "neuron_cores=0: expected an int of at least 1"),
        (Resources(neuron_cores=1.5), None, "NeuronCores are given out whole"),
        (Resources(neuron_cores=True), None, "neuron_cores=True"),
        (Resources(num_gpus=-1), None, "num_gpus=-1: expected a number, 0 or more"),
        (Resources(num_cpus=float("nan")), None, "num_cpus=nan"),
        (Resources(num_cpus="2"), None, "num_cpus='2'"),
        (Resources(num_cpus=2), {"num_cpus": 4}, "num_cpus=2, and ray_actor_options say 4; say it once"),
        (Resources(neuron_cores=2), {"resources": {"neuron_cores": 4}}, "say it once"),
    ],
)
def test_resources_that_cannot_be_meant(asked, given, error):
    with pytest.raises(ValueError, match=error):
        asked.actor_options(given)


def test_autoscaling_aims_at_what_a_batcher_takes_unless_told():
    assert scaling(None, None, 300) is None
    assert scaling(None, "auto", 300) == {"target_ongoing_requests": 100}
    assert scaling({"target_ongoing_requests": 7}, None, 300) == {"target_ongoing_requests": 7}
    made = object()  # an AutoscalingConfig
    assert scaling(made, None, 300) is made


async def test_figures_are_of_the_time_since_they_were_asked_for():
    async with make() as model:
        before = model.statistics()
        assert figures(before, None, 0.0) == {
            "calls": 0.0, "waiting_rows": 0.0, "waiting_work": 0.0, "busy": 0.0, "queue_seconds": 0.0, "cores": 2.0,
        }  # fmt: skip
        await model(torch.ones(4, 1))
        now = model.statistics()
        spent = sum(core.busy_seconds for core in now.cores) - sum(core.busy_seconds for core in before.cores)
        told = figures(now, before, seconds=10.0)
        assert told["busy"] == pytest.approx(spent / 20)
        assert told["queue_seconds"] == pytest.approx(now.queue_seconds.sum)
        assert all(type(value) is float for value in told.values())
        assert figures(now, now, seconds=10.0)["busy"] == 0.0


def test_a_grant_of_cpus_is_heeded():
    try:
        cpus.grant(1.0, "Ray (num_cpus)")
        assert list(CpuBackend().cores()) == [0]
        cpus.grant(10_000, "Ray (num_cpus)")
        everything = len(CpuBackend().cores())
        cpus.grant(0, "Ray (num_cpus)")
        assert len(CpuBackend().cores()) == everything
    finally:
        cpus.grant(0, "")


# Arrays.


def read_only(array):
    array.flags.writeable = False
    return array


def test_arrays_that_cannot_be_written_to_are_copied_wherever_they_are():
    array, own, tensor = read_only(np.zeros(2)), np.ones(2), torch.ones(2)
    value = {"a": [array, (own, tensor)], "b": Rows([array, "text"]), "c": Shared({"d": array}), "e": 5}
    copied = owned(value)
    assert copied["a"][1][0] is own
    assert copied["a"][1][1] is tensor
    for each in (copied["a"][0], copied["b"].objects[0], copied["c"].value["d"]):
        assert each.flags.writeable
        assert not np.shares_memory(each, array)
    assert foreign(value) == 3 * array.nbytes
    assert owned([own, tensor, 5])[0] is own


def test_what_cannot_be_opened_in_a_mark_keeps_nothing_else_from_being_copied():
    array = read_only(np.zeros(2))
    closed = deque([array])
    value = [array, Rows([closed, array, "text"]), Shared(closed)]
    first, rows, shared = owned(value)
    assert first.flags.writeable
    assert rows.objects[1].flags.writeable
    assert rows.objects[0] is shared.value is closed
    assert foreign(value) == 2 * array.nbytes


def test_tensors_are_copied_where_ray_hands_out_those_of_its_store():
    tensor = torch.ones(2)
    assert owned([tensor])[0] is tensor
    assert owned([tensor], tensors=True)[0].data_ptr() != tensor.data_ptr()
    assert foreign([tensor], tensors=True) == 8


# Replicas.


async def answer(replica, *inputs, terms=None, timeout=None, timed=False, **kwargs):
    return await replica.answer((terms, timeout, timed), inputs, kwargs)


async def served(factory=make, *args, config=None, tensors=False, **kwargs):
    replica = Replica(factory, args, kwargs, tensors)
    await replica.start(config)
    return replica


async def test_a_replica_answers_with_arrays_of_any_size_and_says_how_it_is():
    replica = await served()
    for columns in (1, LARGE):
        x = read_only(np.ones((1, columns), "float32"))
        assert torch.equal(await answer(replica, x), torch.full((1, columns), 2.0))
    _, timing = await answer(replica, torch.ones(1, 1), timed=True)
    assert timing.batch_rows == 1
    replica.check_health()
    assert replica.figures()["cores"] == 2
    with pytest.raises(ShapeError, match="no tensor among its inputs"):
        await answer(replica, [1.0, 2.0])
    with pytest.raises(DeadlineExceeded):
        await answer(replica, torch.ones(1, 1), timeout=0.0)
    await replica.close()
    with pytest.raises(RuntimeError, match="is not ready; its cores"):
        replica.check_health()
    with pytest.raises(Closed):
        await answer(replica, torch.ones(1, 1))


async def test_a_factory_may_be_awaited_and_gets_the_configuration_over_its_arguments():
    async def later(factor, max_pending=None):
        return make(factor, max_pending=max_pending)

    replica = await served(later, factor=2.0, config={"factor": 3.0})
    assert (await answer(replica, torch.ones(1, 1))).item() == 3.0
    await replica.close()


async def test_a_factory_that_returns_something_else_is_told():
    with pytest.raises(TypeError, match=r"Linear returned Linear\(.*returns an aneuron.AsyncDataParallel"):
        await served(torch.nn.Linear, 2, 2)


async def test_what_the_factory_or_the_model_raises_at_the_start_is_raised():
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        await served(lambda: AsyncDataParallel("missing.pt", backend="cpu"))


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
async def test_another_configuration_swaps_the_model_and_loses_no_call():
    replica = await served(make, max_pending=100)
    calls = [asyncio.create_task(answer(replica, torch.ones(1, 1))) for _ in range(50)]
    await replica.reconfigure({"factor": 5.0, "max_pending": 20, "split_size": 4, "num_workers": 3})
    assert {task.item() for task in await asyncio.gather(*calls)} <= {2.0, 5.0}
    assert (await answer(replica, torch.ones(1, 1))).item() == 5.0
    assert (replica.model.max_pending, replica.model.split_size, replica.model.num_workers) == (20, 4, 3)
    await replica.reconfigure(None)  # as bind() said
    assert (await answer(replica, torch.ones(1, 1))).item() == 2.0
    assert replica.model.max_pending == 100
    await replica.close()


async def test_the_number_of_workers_goes_back_to_what_nobody_said():
    replica = await served(make)
    for config, workers in (({"num_workers": 3}, 3), ({"num_workers": 3, "factor": 5.0}, 3), (None, 4)):
        await replica.reconfigure(config)
        assert replica.model.num_workers == workers
    await replica.close()


async def test_the_last_of_two_configurations_at_once_is_followed():
    replica = await served(make)
    await asyncio.gather(*(replica.reconfigure({"factor": factor}) for factor in (5.0, 7.0)))
    assert (await answer(replica, torch.ones(1, 1))).item() == 7.0
    await replica.close()


async def test_a_replica_closes_while_another_model_is_made():
    begun, go = threading.Event(), threading.Event()

    def slow(factor=2.0):
        if factor != 2.0:
            begun.set()
            go.wait(60)
        return make(factor)

    replica = await served(slow)
    changing = asyncio.create_task(replica.reconfigure({"factor": 5.0}))
    await asyncio.to_thread(begun.wait, 60)
    await replica.close()
    go.set()
    await changing
    assert not replica.model.ready


async def test_a_swap_that_fails_leaves_what_was_set(monkeypatch):
    replica = await served(make, max_pending=100)

    async def refuse(model):
        raise ShapeError("another shape")

    monkeypatch.setattr(replica.model, "swap", refuse)
    with pytest.raises(ShapeError, match="another shape"):
        await replica.reconfigure({"factor": 5.0, "max_pending": 7})
    assert replica.model.max_pending == 100
    await replica.close()


async def test_the_same_model_is_not_loaded_again(monkeypatch):
    replica = await served()
    monkeypatch.setattr(replica.model, "swap", None)
    await replica.reconfigure({"max_pending": 5})
    await replica.reconfigure({"max_pending": 5})
    assert replica.model.max_pending == 5
    await replica.close()


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"factr": 1.0}, TypeError, "factr"),
        ({"max_delay": 1.0}, ValueError, r"max_delay=1.0 \(it was 0.0\): what may change while a replica serves is"),
        ({"max_pending": -1}, ValueError, "max_pending=-1"),
        ([1], TypeError, r"user_config=\[1\]: expected a mapping"),
        ({1: 2}, TypeError, "expected a mapping"),
    ],
)
async def test_a_configuration_that_cannot_be_followed_changes_nothing(config, error, says):
    replica = await served()
    try:
        with pytest.raises(error, match=says):
            await replica.reconfigure(config)
        assert (await answer(replica, torch.ones(1, 1))).item() == 2.0
        await replica.reconfigure({"max_pending": 7})
        assert replica.model.max_pending == 7
    finally:
        await replica.close()


async def test_too_few_calls_at_a_time_are_warned_of(caplog):
    replica = Replica(make, (), {}, False)
    with caplog.at_level(logging.WARNING, "aneuron.ray"):
        await replica.start(None, most=47)
        await replica.close()
        assert "pass max_ongoing_requests=48 to deployment()" in caplog.text
        caplog.clear()
        replica = Replica(make, (), {}, False)
        await replica.start(None, most=48)
        await replica.close()
        assert not caplog.text


# Views.


class Died(Exception):
    pass


class Full(Exception):
    retry_after_s = 0.0


class Gone(Exception):
    pass


class Handle:
    """As Serve's: each call answers what the next plan says, an error or a function of the inputs."""

    def __init__(self, *plans, at=lambda: 0.0):
        self.plans, self.asked, self.when, self.cancelled, self.clock = list(plans), [], [], 0, at

    def options(self, method_name):
        assert method_name == "answer"
        return self

    def remote(self, how, *inputs):
        self.asked.append((*how, inputs))
        self.when.append(self.clock())
        return Response(self, self.plans.pop(0))


class Response:
    def __init__(self, handle, plan):
        self.handle, self.plan = handle, plan

    def __await__(self):
        if self.plan is None:
            yield from asyncio.get_running_loop().create_future()
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan
        yield

    def cancel(self):
        self.handle.cancelled += 1


def ray_error(cause):
    """As Ray raises what a task has: of both classes, with a traceback as its text."""
    kind = type(f"RayTaskError({type(cause).__name__})", (type(cause),), {"__init__": lambda self: None})
    error = kind()
    error.cause = cause
    return error


def seen(handle):
    return view_of(handle, (Died,), (Full,), (Gone,))


async def test_a_view_sends_its_terms_and_raises_what_was_raised():
    handle = Handle(1, 2, (3, "timing"), ray_error(QueueFull("full", 2.5)), ValueError("mine"))
    net = seen(handle)
    assert await net("x") == 1
    assert await net.options(timeout=5.0, priority=2, tenant="acme")("x") == 2
    assert await net.timed("x") == (3, "timing")
    with pytest.raises(QueueFull, match=r"^full$") as caught:
        await net("x")
    assert caught.value.retry_after == 2.5
    assert "RayTaskError" in type(caught.value.__cause__).__name__
    with pytest.raises(ValueError, match="mine"):
        await net("x")
    first, second, third, *_ = handle.asked
    assert first == (None, None, False, ("x",))
    assert (second[0].priority, second[0].tenant, second[1]) == (2.0, "acme", 5.0)
    assert third[2] is True


@pytest.mark.parametrize("error", [Died("gone"), ray_error(Closed("closing"))])
async def test_a_call_whose_replica_is_gone_runs_once_more(error):
    handle = Handle(error, 7)
    assert await seen(handle).options(timeout=5.0)("x") == 7
    assert len(handle.asked) == 2
    assert handle.asked[1][1] <= handle.asked[0][1]


async def test_a_call_that_two_replicas_died_over_is_not_tried_on_a_third():
    handle = Handle(Died("one"), Died("two"), 7)
    with pytest.raises(CoreFailed, match="two replicas died over the call"):
        await seen(handle)("x")
    assert handle.plans == [7]


async def test_refusals_are_not_tried_again_and_those_of_serve_are_queue_full():
    handle = Handle(Full("no room"), 7)
    with pytest.raises(QueueFull, match="no room"):
        await seen(handle)("x")
    assert handle.plans == [7]


async def test_a_timeout_is_the_callers_too_and_cancels_what_was_asked():
    handle = Handle(None, None)
    with pytest.raises(DeadlineExceeded, match="timeout=0 s has passed"):
        await seen(handle).options(timeout=0.0)("x")
    task = asyncio.create_task(seen(handle)("x"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.cancelled == len(handle.asked)


async def test_a_deployment_that_was_deleted_is_closed():
    with pytest.raises(Closed, match=r"view\(.*\) is not served: it was deleted"):
        await seen(Handle(Gone("one"), Gone("two"), 7))("x")


async def test_results_are_copied_where_ray_hands_out_tensors_of_its_store():
    tensor, timing = torch.ones(2), "timing"
    net = view_of(Handle(tensor, (tensor, timing)), tensors=True)
    assert (await net("x")).data_ptr() != tensor.data_ptr()
    result, told = await net.timed("x")
    assert torch.equal(result, tensor)
    assert told is timing


async def elements(*values):
    for value in values:
        yield (value,)


@scenario
async def test_a_map_waits_for_room_longer_each_time():
    clock = asyncio.get_running_loop().time
    handle = Handle(*[Full("no room")] * 9, 1, 2, at=clock)
    assert [y async for y in seen(handle).map(elements("a", "b"), limit=1)] == [1, 2]
    waits = [after - before for before, after in pairwise(handle.when)]
    assert waits[:3] == pytest.approx([0.02, 0.04, 0.08])
    assert max(waits) == pytest.approx(1.0)


@scenario
async def test_what_an_element_of_a_map_waits_for_room_is_taken_off_its_own_limit():
    handle = Handle(QueueFull("full", 0.3), Died("gone"), QueueFull("full", 0.5), 1, 2)
    net = seen(handle).options(timeout=2.0)
    assert [y async for y in net.map(elements("a", "b"), limit=1)] == [1, 2]
    assert [timeout for _, timeout, _, _ in handle.asked] == pytest.approx([2.0, 1.7, 1.7, 1.2, 2.0])


@scenario
async def test_an_element_of_a_map_that_never_finds_room_ends_with_its_limit():
    net = seen(Handle(*[Full("no room")] * 99)).options(timeout=2.0)
    with pytest.raises(DeadlineExceeded, match="timeout=2 s has passed"):
        await anext(net.map(elements("a"), limit=1))
    assert asyncio.get_running_loop().time() == pytest.approx(2.0)


def test_only_errors_of_ray_are_taken_apart():
    mine = ValueError("x")
    mine.cause = KeyError("y")
    assert original(mine) is mine
    assert original(ray_error(mine)) is mine
