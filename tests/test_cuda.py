"""The CUDA backend: on a double of `torch.cuda` everywhere, and on the real one where there is a GPU."""

import asyncio
import contextvars
import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import types
import typing
import weakref

import pytest
import torch
from fake_cuda import Device, FakeCuda, On

from aneuron import AsyncDataParallel, CoreFailed, CudaBackend, DeviceError, Fault, OutputError
from aneuron.testing import check_backend

X = torch.arange(12.0).reshape(3, 4)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")


@pytest.fixture
def cuda(monkeypatch):
    """Two devices that are not there."""
    return FakeCuda(monkeypatch, devices=2)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.trace(net(), X).save(path)
    return path


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.layer(x) + self.shift


def net():
    torch.manual_seed(0)
    return Net().eval()


def outcome(core, *args, **kwargs):
    """What an execution on a thread of its own returns or raises."""
    ends = []

    def run():
        torch.set_grad_enabled(False)
        try:
            ends.append(core.execute(args, kwargs))
        except Exception as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return ends[0]


async def serve(model, *calls, **settings):
    async with AsyncDataParallel(model, **settings) as served:
        return await asyncio.gather(*(served(*args) for args in calls), return_exceptions=True)


# Cores and settings.


@pytest.mark.parametrize(
    ("devices", "cores_per_device", "ids"), [(0, 1, []), (0, 3, []), (2, 1, [0, 1]), (2, 3, [0, 1, 2, 3, 4, 5])]
)
def test_cores_are_so_many_of_each_device_and_none_is_touched(cuda, devices, cores_per_device, ids):
    cuda.devices = devices
    backend = CudaBackend(cores_per_device)
    assert list(backend.cores()) == ids
    assert (backend.report()["found"], backend.report()["cores"]) == (bool(devices), len(ids))
    assert cuda.touched == set()


@pytest.mark.parametrize("name", ["cores_per_device", "staging_bytes"])
@pytest.mark.parametrize("value", [-1, True, 1.0, "2", None])
def test_settings_are_counts(name, value):
    with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))}: expected an int of at least [01]"):
        CudaBackend(**{name: value})


def test_a_device_is_at_least_one_core():
    with pytest.raises(ValueError, match="cores_per_device=0: expected an int of at least 1"):
        CudaBackend(cores_per_device=0)
    assert repr(CudaBackend(staging_bytes=0)) == "CudaBackend(cores_per_device=1, staging_bytes=0)"


async def test_no_device_is_a_device_error(cuda):
    cuda.devices = 0
    with pytest.raises(DeviceError, match="the cuda backend sees no cores"):
        await serve(torch.neg, backend=CudaBackend())


@pytest.mark.parametrize(
    ("devices", "version", "visible", "why", "lacks"),
    [
        (2, "12.8", None, "2 devices, PyTorch", []),
        (1, "12.8", "3", "1 device, PyTorch .*, CUDA_VISIBLE_DEVICES='3'", []),
        (0, None, None, "is built without CUDA", ["a PyTorch with CUDA"]),
        (0, "12.8", None, "finds no device", ["a visible NVIDIA GPU"]),
        (0, "12.8", "", "finds no device, CUDA_VISIBLE_DEVICES=''", ["a visible NVIDIA GPU"]),
    ],
)
def test_the_report_says_why(cuda, monkeypatch, devices, version, visible, why, lacks):
    cuda.devices = devices
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    report = CudaBackend().report()
    assert re.search(why + "$" if visible is not None else why, report["why"])
    assert [said.startswith(start) for said, start in zip(report["lacks"], lacks, strict=True)] == [True] * len(lacks)


# Executing.


@pytest.mark.parametrize("cores_per_device", [1, 2])
def test_the_contract_on_the_double(cuda, cores_per_device):
    check_backend(CudaBackend(cores_per_device))
    check_backend(CudaBackend(cores_per_device, staging_bytes=0), net(), (X,))
    assert set(cuda.log) == {"event", "stream", "query"}  # no thread waits by spinning


def test_an_execution_stays_on_its_thread_s_stream(cuda):
    backend = CudaBackend(cores_per_device=2)
    cores = [backend.load(net(), core, None) for core in backend.cores()]
    cuda.copies.clear()
    inside = threading.Barrier(2)
    together = backend.load(lambda x: inside.wait(60.0) * 0 + x, 3, None)
    threads = [threading.Thread(target=outcome, args=(together, X)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({stream for *_, stream, _ in cuda.copies}) == 2  # each slot has its own
    for core_id, core in enumerate(cores):
        cuda.copies.clear()
        cuda.kernels.clear()
        assert torch.equal(outcome(core, X), net()(X))
        (stream,) = {stream for *_, stream, _ in cuda.copies} | {kernel.stream for kernel in cuda.kernels}
        assert stream.device.index == core_id // 2
        assert stream is not cuda._defaults.get(core_id // 2)
        assert [(way, pinned) for way, pinned, *_ in cuda.copies] == [("in", True), ("out", True)]


def test_a_thread_keeps_its_stream_whichever_of_its_cores_it_serves(cuda):
    backend = CudaBackend()
    small, large = (backend.load(torch.neg, 0, size) for size in (1, 8))
    streams = []

    def run():
        for core in (small, large, small):
            core.execute((X,), {})
            streams.append(cuda.copies[-1].stream)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(streams) == 3
    assert len(set(streams)) == 1


def test_devices_that_are_not_used_are_not_touched(cuda):
    core = CudaBackend().load(net(), 1, None)
    assert torch.equal(outcome(core, X), net()(X))
    assert cuda.touched == {1}


def test_loading_waits_for_the_weights(cuda):
    CudaBackend().load(net(), 1, None)
    assert cuda.log == ["stream"]


@pytest.mark.parametrize(
    ("bound", "pinned"),  # of the two inputs, of 48 and 24 bytes, and of the output, of 48
    [
        (0, [False, False, False]),
        (23, [False, False, False]),
        (24, [False, True, False]),
        (48, [True, False, False]),
        (95, [True, True, False]),
        (119, [True, True, False]),
        (120, [True, True, True]),
    ],
)
def test_so_many_bytes_of_a_batch_are_pinned(cuda, bound, pinned):
    core = CudaBackend(staging_bytes=bound).load(lambda x, y: x + y.float().sum(), 0, None)
    y = torch.ones(3, dtype=torch.long)
    cuda.log.clear()
    twice = types.SimpleNamespace(execute=lambda *batch: [core.execute(*batch) for _ in range(2)])
    assert all(torch.equal(result, X + 3) for result in outcome(twice, X, y))
    assert [copy.pinned for copy in cuda.copies] == pinned * 2  # as many of the next batch
    assert cuda.log == ["event"] * (2 if pinned[2] else 4)  # an ordinary copy begins when its thread has slept


class Pair(typing.NamedTuple):
    first: torch.Tensor
    second: typing.Any


def test_structures_go_and_come_as_they_are(cuda):
    seen = []

    def model(inputs, scale, *, flag):
        seen.append((type(inputs["a"]), type(inputs["b"][0]), scale, flag))
        assert torch.is_inference_mode_enabled()
        host = torch.full((3,), 7)
        return Pair(inputs["a"] * scale, {"b": inputs["b"][0], "none": None, "host": host})

    core = CudaBackend().load(model, 1, None)
    first, rest = outcome(core, {"a": X, "b": [X.bool()]}, 2, flag="on")
    assert seen == [(On[1], On[1], 2, "on")]
    assert torch.equal(first, X * 2)
    assert torch.equal(rest["b"], X.bool())
    assert rest["none"] is None
    assert torch.equal(rest["host"], torch.full((3,), 7))
    assert cuda.log[-1:] == ["event"]  # the tensor on the host is not waited for by itself
    assert cuda.log.count("event") == 1
    assert type(outcome(core, {"a": X, "b": [X]}, 1, flag="off")) is Pair


@pytest.mark.parametrize(
    "x",
    [
        X.bool(),
        X.to(torch.int8),
        X.long(),
        X.half(),
        X.bfloat16(),
        X.double(),
        X.to(torch.complex64) * 1j,
        torch.empty(3, 0),
        X.reshape(3, 2, 2).transpose(1, 2),
    ],
    ids=lambda x: f"{str(x.dtype)[6:]} {list(x.shape)}",
)
@pytest.mark.parametrize("bound", [0, 1 << 20])
def test_any_dense_tensor_comes_back(cuda, x, bound):
    core = CudaBackend(staging_bytes=bound).load(lambda x: x, 0, None)
    result = outcome(core, x)
    assert result.dtype == x.dtype
    assert torch.equal(result, x)


def test_a_bit_that_stands_for_a_conjugation_is_resolved_on_the_device(cuda):
    x = X * (1 + 1j)
    core = CudaBackend().load(lambda x: (x.conj(), (x * 1j).conj().imag), 0, None)
    conjugate, imaginary = outcome(core, x)
    assert torch.equal(conjugate, x.conj())
    assert torch.equal(imaginary, (x * 1j).conj().imag)


def test_an_output_of_another_device_is_waited_for_by_itself(cuda):
    other = torch.ones(3).as_subclass(On[0])
    core = CudaBackend().load(lambda x: (x, other), 1, None)
    cuda.copies.clear()
    assert torch.equal(outcome(core, X)[1], torch.ones(3))
    assert [(copy.way, copy.pinned) for copy in cuda.copies] == [("in", True), ("out", True), ("out", False)]


def test_an_error_is_raised_when_the_device_has_read_what_it_was_given(cuda):
    def fail(x):
        raise LookupError("no such row")

    core = CudaBackend().load(fail, 0, None)
    cuda.log.clear()
    error = outcome(core, X)
    assert isinstance(error, LookupError)
    assert CudaBackend().classify(error) is Fault.INPUT
    assert cuda.log == ["event"]
    assert cuda.copies[-1].stream.pending == []


async def test_two_slots_of_a_core_serve_calls_at_once(cuda):
    meeting = threading.Barrier(2)

    def model(x):
        meeting.wait(60.0)
        return x * 2

    settings = {"backend": CudaBackend(), "device_ids": [1], "batch_size": 3, "num_workers": 2, "check_rows": False}
    results = await serve(model, *([X + n] for n in range(4)), **settings)
    assert all(torch.equal(result, (X + n) * 2) for n, result in enumerate(results))
    assert not any(isinstance(result, Device) or result.is_inference() for result in results)


async def test_an_error_that_ends_cuda_fails_the_call_as_the_core_s(cuda):
    def model(x):
        cuda.poison = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
        raise LookupError("what the host makes of it")

    (failure,) = await serve(model, [X], backend=CudaBackend(), device_ids=[0])
    assert type(failure) is CoreFailed
    assert failure.__cause__ is cuda.poison


async def test_a_batch_that_needs_too_much_memory_runs_in_halves(cuda):
    sizes = []

    def model(x):
        sizes.append(len(x))
        if len(x) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return x * 2

    rows = [X[n : n + 1] for n in range(3)]
    results = await serve(model, *([row] for row in rows), backend=CudaBackend(), device_ids=[0])
    assert all(torch.equal(result, row * 2) for row, result in zip(rows, results, strict=True))
    assert max(sizes) == 3


# Submitting.


class Ends(list):
    """What submissions have ended with."""

    def __init__(self, core):
        super().__init__()
        self.core, self.over = core, threading.Semaphore(0)

    def submit(self, *args, **kwargs):
        self.core.submit(args, kwargs, self.done)

    def done(self, output, error):
        self.append((output, error))
        self.over.release()

    def wait(self, number=1):
        """The ends so far, when so many more have come."""
        for _ in range(number):
            assert self.over.acquire(timeout=60.0)
        return self


@pytest.fixture
def submitting(cuda):
    """Loads a model on a core that submits, and closes it in the end."""
    made = []

    def load(model, core=0, **settings):
        made.append(CudaBackend(**settings).load(model, core, None))
        return Ends(made[-1])

    yield load
    for each in made:
        each.close()


def test_a_submission_touches_nothing_on_the_calling_thread(cuda, submitting):
    ends = submitting(net(), core=1)
    here, place = threading.get_ident(), dict(cuda._local.__dict__)
    cuda.kernels.clear()
    ends.submit(X)
    assert cuda._local.__dict__ == place
    ((output, error),) = ends.wait()
    assert error is None
    assert torch.equal(output, net()(X))
    assert not output.requires_grad
    assert {kernel.device for kernel in cuda.kernels} == {1}
    assert here not in {kernel.thread for kernel in cuda.kernels}
    assert cuda.touched == {1}
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_batches_are_launched_in_order_by_one_thread_and_asked_for_by_another(cuda, submitting):
    launched, more = [], threading.Semaphore(0)

    def model(x):
        launched.append((float(x.as_subclass(torch.Tensor)[0, 0]), threading.get_ident(), torch.cuda.current_stream()))
        more.release()
        return x + 1

    ends = submitting(model)
    ends.core._length.add(0.0, 0.0)  # as one that launches in no time
    cuda.hangs = True
    for index in range(5):
        ends.submit(X + index)
    for _ in range(5):
        assert more.acquire(timeout=60.0)
    assert not ends
    assert [value for value, *_ in launched] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len({thread for _, thread, _ in launched}) == 1
    assert len({stream for *_, stream in launched}) == 5  # in flight together
    cuda.hangs = False
    ends.wait(5)
    ends.submit(X)
    ends.wait()
    assert launched[-1][2] in {stream for *_, stream in launched[:-1]}  # a stream serves the next
    assert {float(output[0, 0]) for output, _ in ends} == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_a_forward_that_blocks_holds_no_other_back(cuda, submitting):
    meeting = threading.Barrier(3)

    def model(x):
        meeting.wait(60.0)
        return x * 2

    ends = submitting(model, cores_per_device=2)
    for index in range(3):
        ends.submit(X + index)
    assert sorted(float(output[0, 0]) for output, _ in ends.wait(3)) == [0.0, 2.0, 4.0]


def test_an_error_comes_when_the_device_has_read_what_it_was_given(cuda, submitting):
    def fail(x):
        raise LookupError("no such row")

    ends = submitting(fail)
    cuda.log.clear()
    ends.submit(X)
    ((output, error),) = ends.wait()
    assert output is None
    assert isinstance(error, LookupError)
    assert cuda.log == ["query", "query"]
    assert cuda.copies[-1].stream.pending == []
    ends.submit(X)  # and the stream serves again
    ends.wait()
    assert len({copy.stream for copy in cuda.copies}) == 1


def test_what_the_device_says_goes_before_what_the_host_made_of_it(cuda, submitting):
    def model(x):
        cuda.poison = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
        raise LookupError("what the host makes of it")

    ends = submitting(model)
    ends.submit(X)
    ((output, error),) = ends.wait()
    assert output is None
    assert error is cuda.poison
    assert isinstance(error.__context__, LookupError)
    assert CudaBackend().classify(error) is Fault.FATAL


@pytest.mark.parametrize("where", ["stream", "event", "thread"])
def test_what_fails_around_a_launch_comes_by_done(cuda, submitting, monkeypatch, where):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"no {where}")

    ends = submitting(torch.neg)
    if where == "stream":
        monkeypatch.setattr(torch.cuda, "Stream", refuse)
    elif where == "event":
        monkeypatch.setattr("fake_cuda.Event.record", refuse)
    else:
        monkeypatch.setattr("aneuron.backends.cuda._events.at", refuse)
    ends.submit(X)
    ((output, error),) = ends.wait()
    assert output is None
    assert str(error) == f"no {where}"


def test_too_little_memory_comes_by_done_as_the_input_s_fault(cuda, submitting):
    def model(x):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    ends = submitting(model)
    ends.submit(X)
    ((_, error),) = ends.wait()
    assert CudaBackend().classify(error) is Fault.INPUT


def test_a_device_that_hangs_holds_nothing_when_it_is_closed(cuda, submitting):
    launched = threading.Event()
    ends, other = submitting(lambda x: launched.set() or x), submitting(torch.neg, core=1)
    cuda.hangs = True
    ends.submit(X)
    assert launched.wait(60.0)
    ends.core.close()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("aneuron")]:
        thread.join(60.0)  # nobody asks any more
        assert not thread.is_alive()
    cuda.hangs = False
    other.submit(X)
    ((output, _),) = other.wait()
    assert torch.equal(output, -X)
    assert not ends  # given up


def test_a_model_sees_the_context_in_which_it_was_loaded(cuda, submitting):
    variable, seen = contextvars.ContextVar("variable", default="none"), []

    def load():
        variable.set("of the load")
        return submitting(lambda x: seen.append(variable.get()) or x)

    ends = contextvars.copy_context().run(load)
    ends.submit(X)
    ends.wait()
    assert seen == ["of the load"]


def test_a_forked_process_is_told_by_submit_too(cuda, submitting, monkeypatch):
    ends = submitting(torch.neg)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(DeviceError, match="does not survive a fork"):
        ends.submit(X)
    monkeypatch.undo()
    assert not ends


def test_cores_can_be_had_that_do_not_submit(cuda):
    backend = CudaBackend(submits=False)
    assert not hasattr(backend.load(torch.neg, 0, None), "submit")
    assert repr(backend) == "CudaBackend(cores_per_device=1, staging_bytes=67108864, submits=False)"
    assert pickle.loads(pickle.dumps(backend)).submits is False
    check_backend(backend)
    with pytest.raises(ValueError, match="submits=1: expected True or False"):
        CudaBackend(submits=1)


# Loading.


def test_cores_of_a_device_share_the_weights(cuda):
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    cores = [CudaBackend(cores_per_device=2).load(model, core, None) for core in range(4)]
    modules = [core._copy.module for core in cores]
    assert modules[0] is modules[1]
    assert modules[2] is modules[3]
    assert modules[0] is not modules[2]
    assert len(cuda.copies) == 2 * 3  # tensors
    assert model not in modules
    assert all(module.training for module in modules)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_freed_with_the_last_core(cuda):
    model = net()
    first, second = (CudaBackend().load(model, 0, size) for size in (1, 8))
    weights = weakref.ref(first._copy.module)
    first.close()
    assert weights() is not None
    second.close()
    gc.collect()
    assert weights() is None


class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.scale, self.drop = 1.0, torch.nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.drop(x)) * self.scale


def scaled():
    torch.manual_seed(0)
    return Scaled().eval()


def write(model):
    with torch.no_grad():
        model.layer.weight.add_(1.0)


def write_data(model):
    model.layer.weight.data.add_(1.0)  # as optimisers do: no version counts it


def write_buffer(model):
    model.shift.data[0] = 5.0


def write_attribute(model):
    model.scale = 2.0


def replace_part(model):
    model.drop = torch.nn.ReLU()


def replace_parameter(model):
    model.layer.weight = torch.nn.Parameter(torch.ones(2, 4))


CHANGES = [write, write_data, write_buffer, write_attribute, replace_part, replace_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_copied_again(cuda, change):
    model = scaled()
    old = CudaBackend().load(model, 0, None)
    before = model(X)
    change(model)
    new = CudaBackend().load(model, 0, None)
    assert new._copy.module is not old._copy.module
    assert torch.equal(outcome(new, X), model(X))
    assert torch.equal(outcome(old, X), before)


def test_a_mode_is_part_of_a_model(cuda):
    model = scaled().train()
    first, second = CudaBackend().load(model, 0, None), CudaBackend().load(model.eval(), 0, None)
    assert all(module.training for module in first._copy.module.modules())
    assert not any(module.training for module in second._copy.module.modules())


def test_a_scripted_model_that_has_changed_is_loaded_again(cuda):
    model = torch.jit.script(net())
    old = CudaBackend().load(model, 0, None)
    before = model(X)
    model.layer.weight.data.add_(1.0)
    assert torch.equal(outcome(CudaBackend().load(model, 0, None), X), model(X))
    assert torch.equal(outcome(old, X), before)


def test_a_class_that_is_written_anew_is_another(cuda, monkeypatch):
    """As in a notebook: the same name, weights and attributes."""

    class Net(globals()["Net"]):
        def forward(self, x):
            return super().forward(x) * 3

    old = CudaBackend().load(net(), 0, None)
    Net.__qualname__ = "Net"
    monkeypatch.setitem(globals(), "Net", Net)
    torch.manual_seed(0)
    model = Net().eval()
    assert torch.equal(outcome(CudaBackend().load(model, 0, None), X), model(X))
    assert not torch.equal(outcome(old, X), model(X))


def test_what_cannot_be_saved_is_not_shared(cuda):
    model = net()
    model.hook = lambda x: x
    first, second = (CudaBackend(cores_per_device=2).load(model, core, None) for core in (0, 1))
    assert first._copy.module is not second._copy.module
    assert torch.equal(outcome(second, X), model(X))


def test_weights_made_under_inference_mode_can_be_loaded(cuda):
    with torch.inference_mode():
        model = net()
    assert torch.equal(outcome(CudaBackend().load(model, 0, None), X), net()(X))


@pytest.mark.parametrize("kind", ["path", "str", "traced", "scripted", "frozen"])
def test_compiled_models_are_loaded_on_the_device_once(cuda, saved, kind):
    traced = torch.jit.trace(net(), X)
    models = {"path": saved, "str": str(saved), "scripted": torch.jit.script(net()), "frozen": torch.jit.freeze(traced)}
    model = models.get(kind, traced)
    cores = [CudaBackend(cores_per_device=2).load(model, core, None) for core in range(4)]
    assert [device.index for device in cuda.loaded] == [0, 1]
    assert all(torch.equal(outcome(core, X), net()(X)) for core in cores)


@pytest.fixture(scope="module")
def program():
    """An exported program with a constant that is neither parameter nor buffer."""
    model = net()
    model.shift = torch.nn.Buffer(torch.ones(2), persistent=False)
    model.layer.scale = torch.ones(1)
    model.forward = types.MethodType(lambda self, x: self.layer(x) * self.layer.scale + self.shift, model)
    rows = torch.export.Dim("rows", min=1, max=8)
    return torch.export.export(model, (X,), dynamic_shapes=({0: rows},))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("kind", ["object", "file"])
async def test_an_exported_program_is_brought_to_each_device_once_and_whole(cuda, program, kind, tmp_path):
    model = program
    if kind == "file":
        model = tmp_path / "net.pt2"
        torch.export.save(program, model)
    before = program.state_dict["layer.weight"]
    backend = CudaBackend(cores_per_device=2)
    cores = [backend.load(model, core, None) for core in range(4)]
    first, second, *others = (core._copy.module._module for core in cores)
    assert first is second
    assert others == [others[0]] * 2
    assert others[0] is not first
    for index, core in enumerate(cores):
        output = outcome(core, X)
        torch.testing.assert_close(output, net()(X).detach())
        module = core._copy.module._module
        there = [*module.parameters(), *module.buffers(), module.layer.scale]
        assert {type(each) for each in there} <= {On[index // 2], torch.nn.Parameter}
        assert all(each.is_cuda for each in there)
    assert program.state_dict["layer.weight"] is before
    assert not before.is_cuda


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("as_file", [False, True])
async def test_an_exported_program_in_half_precision_is_cast_and_brought_there_whole(cuda, program, as_file, tmp_path):
    model = program
    if as_file:
        model = tmp_path / "net.pt2"
        torch.export.save(program, model)
    (found,) = await serve(model, (X,), backend=CudaBackend(dtype=torch.float16))
    torch.testing.assert_close(found, program.module()(X).detach(), rtol=0.01, atol=0.01)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
async def test_what_an_exported_program_makes_of_ids_comes_back_in_its_own_dtype(cuda):
    ids = torch.tensor([[1, 2], [3, 4]])
    program = torch.export.export(torch.nn.Embedding(9, 2).half(), (ids,))
    (found,) = await serve(program, (ids,), backend=CudaBackend(dtype=torch.bfloat16))
    assert found.dtype is torch.float16


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
async def test_an_input_of_an_exported_program_may_be_called_as_a_builtin_is(cuda):
    """As that of a Linear is: `input`."""
    layer = torch.nn.Linear(4, 2)
    (found,) = await serve(torch.export.export(layer, (X,)), (X,), backend=CudaBackend())
    torch.testing.assert_close(found, layer(X).detach())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
async def test_an_exported_program_s_batches_have_rows_of_its_range(cuda, program):
    results = await serve(program, (X,), (X.repeat(10, 1),), backend=CudaBackend())
    torch.testing.assert_close(results[1], net()(X.repeat(10, 1)).detach())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_an_exported_program_s_module_that_cannot_be_moved_whole_is_refused(cuda, program):
    with pytest.raises(ValueError, match=r"keeps scale where.*pass the ExportedProgram itself.*brought to cuda:0"):
        CudaBackend().load(program.module(), 0, None)
    plain = torch.export.export(net(), (X,)).module()
    torch.testing.assert_close(outcome(CudaBackend().load(plain, 0, None), X), net()(X).detach())


def test_a_callable_is_left_where_it_is(cuda):
    model = net()
    core = CudaBackend().load(model.forward, 0, None)
    error = outcome(core, X)
    assert isinstance(error, RuntimeError)
    assert "same device" in str(error)
    assert CudaBackend().classify(error) is Fault.INPUT


# Errors.


def accelerator_error(text, code):
    error = getattr(torch, "AcceleratorError", RuntimeError)(text)
    error.error_code = code
    return error


SAYS = "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call."
SCRIPT = "The following operation failed in the TorchScript interpreter.\nTraceback ...\nRuntimeError: CUDA error: {}\n"
UNAVAILABLE = "CUDA-capable device(s) is/are busy or unavailable"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        *((RuntimeError(SAYS.format(text)), Fault.FATAL) for text in (
            "an illegal memory access was encountered", "the launch timed out and was terminated",
            "device-side assert triggered", "an illegal instruction was encountered", "misaligned address",
            "unspecified launch failure", "driver shutting down",
        )),
        (RuntimeError(SCRIPT.format("device-side assert triggered")), Fault.FATAL),
        (accelerator_error(SAYS.format("something in words of the next version"), 710), Fault.FATAL),
        (accelerator_error(SAYS.format("tensor memory ..."), 721), Fault.FATAL),
        (RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with ..."), Fault.FATAL),
        (DeviceError("this process was forked"), Fault.FATAL),
        (RuntimeError(SAYS.format(UNAVAILABLE)), Fault.CORE),
        (RuntimeError(SAYS.format("uncorrectable ECC error encountered")), Fault.CORE),
        (accelerator_error(SAYS.format("unknown error"), 999), Fault.CORE),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), Fault.INPUT),
        (accelerator_error(SAYS.format("out of memory"), 2), Fault.INPUT),
        (accelerator_error(SAYS.format("invalid configuration argument"), 9), Fault.INPUT),
        (accelerator_error(SAYS.format("no kernel image is available for execution on the device"), 209), Fault.INPUT),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Fault.INPUT),
        (RuntimeError("Expected all tensors to be on the same device"), Fault.INPUT),
        (RuntimeError("an unknown error in the model, with a misaligned address"), Fault.INPUT),
        (accelerator_error("of another accelerator", 710), Fault.INPUT),
        (KeyboardInterrupt(), Fault.INPUT),
    ],
    ids=lambda value: re.sub(r"\s+", " ", str(value))[:60],
)  # fmt: skip
def test_errors_are_sorted(error, fault):
    assert CudaBackend().classify(error) is fault


def test_a_forked_process_is_told_what_to_do(cuda, monkeypatch):
    core = CudaBackend().load(torch.neg, 0, None)
    cuda.forked = True
    with pytest.raises(DeviceError, match="does not survive a fork: start processes by 'spawn'"):
        CudaBackend().load(torch.neg, 0, None)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    error = outcome(core, X)
    assert isinstance(error, DeviceError)
    assert CudaBackend().classify(error) is Fault.FATAL


# The double itself.


def test_the_double_shows_what_is_not_waited_for(cuda):
    stream = torch.cuda.Stream("cuda:0")
    with torch.cuda.stream(stream):
        there = X.pin_memory().to(torch.device("cuda", 0), non_blocking=True)
        host = torch.empty(3, 4, pin_memory=True).copy_(there, non_blocking=True)
        assert not torch.equal(host, X)
        with pytest.raises(AssertionError, match="needs pinned memory"):
            torch.empty(3, 4).copy_(there, non_blocking=True)
        with pytest.raises(RuntimeError, match="same device"):
            there + X
        with pytest.raises(RuntimeError, match="same device"):
            there + X.to(torch.device("cuda", 1))
    stream.synchronize()
    assert torch.equal(host, X)


def test_the_double_sees_pinned_memory_that_is_written_to_early(cuda):
    stream = torch.cuda.Stream("cuda:0")
    with torch.cuda.stream(stream):
        staged = X.pin_memory()
        staged.to(torch.device("cuda", 0), non_blocking=True)
        staged.add_(1)
    with pytest.raises(AssertionError, match="while it was being copied"):
        stream.synchronize()


# On a GPU.


@gpu
@pytest.mark.parametrize("cores_per_device", [1, 2])
@pytest.mark.parametrize("staging_bytes", [0, 1 << 20])
def test_the_contract(cores_per_device, staging_bytes):
    check_backend(CudaBackend(cores_per_device, staging_bytes))
    check_backend(CudaBackend(cores_per_device, staging_bytes), net(), (X,))


@gpu
@pytest.mark.parametrize("kind", ["module", "path", "traced", "frozen"])
async def test_answers_are_those_of_the_plain_model(saved, kind):
    traced = torch.jit.trace(net(), X)
    model = {"module": net(), "path": saved, "traced": traced, "frozen": torch.jit.freeze(traced)}[kind]
    calls = [torch.randn(1 + n % 7, 4) for n in range(100)]
    settings = {"backend": CudaBackend(cores_per_device=2), "batch_size": 3, "example_inputs": X}
    results = await serve(model, *([x] for x in calls), **settings)
    for x, result in zip(calls, results, strict=True):
        torch.testing.assert_close(result, net()(x).detach())


@gpu
@pytest.mark.parametrize("staging_bytes", [0, 1 << 20, 1 << 26])
async def test_large_inputs_and_outputs_come_back(staging_bytes):
    calls = [torch.randn(64, 1 << 16) for _ in range(8)]  # 16 MiB each
    settings = {"backend": CudaBackend(staging_bytes=staging_bytes), "batch_size": 64, "num_workers": 3}
    results = await serve(lambda x: (x * 2, x > 0), *([x] for x in calls), **settings)
    for x, (double, positive) in zip(calls, results, strict=True):
        assert torch.equal(double, x * 2)
        assert torch.equal(positive, x > 0)


@gpu
def test_no_more_is_pinned_than_was_said():
    core = CudaBackend(staging_bytes=1 << 20).load(lambda x: (x[:, :100] + 1, x + 1), 0, None)
    x = torch.randn(1024, 255)  # nearly all of what may be pinned
    small, large = outcome(core, x)
    assert torch.equal(small, x[:, :100] + 1)
    assert torch.equal(large, x + 1)
    assert not small.is_pinned()
    assert not large.is_pinned()
    small, large = outcome(core, x[:512])
    assert torch.equal(large, x[:512] + 1)
    assert small.is_pinned()
    assert not large.is_pinned()


@gpu
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.conj(),
        lambda x: x.conj().imag,  # with a bit for its sign
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, ::2],
        lambda x: x.t()[::2].t(),
        lambda x: x.real.half(),
        lambda x: x.real.bfloat16(),
        lambda x: x.real > 5,
        lambda x: x.real.long(),
        lambda x: x[:, :1].expand(-1, 1000),
        lambda x: x[:, :0],
    ],
)
def test_any_dense_output_comes_back(change):
    x = torch.randn(999, 40, dtype=torch.complex64)
    core = CudaBackend().load(change, 0, None)
    for _ in range(20):
        assert torch.equal(outcome(core, x), change(x))


@gpu
async def test_a_sparse_output_is_refused():
    (failure,) = await serve(lambda x: x.to_sparse(), [X], backend=CudaBackend(), batch_size=3)
    assert isinstance(failure, OutputError)


@gpu
async def test_the_device_is_used_after_it_was_out_of_memory():
    def model(x):
        return torch.empty(1 << 60, dtype=torch.uint8, device=x.device) if (x < 0).any() else x * 2

    failure, result = await serve(model, [-X - 1], [X], backend=CudaBackend(), batch_size=8)
    assert isinstance(failure, torch.cuda.OutOfMemoryError)
    assert torch.equal(result, X * 2)


DEATH = """
import asyncio, torch
from aneuron import AsyncDataParallel, CoreFailed, CudaBackend, Fault
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(4, 2)
    def forward(self, ids):
        return self.words(ids)
async def main():
    backend = CudaBackend()
    async with AsyncDataParallel(Net().eval(), backend=backend) as model:
        await model(torch.tensor([1]))
        for ids in ([9], [1]):
            try:
                print(await model(torch.tensor(ids)))
            except CoreFailed as error:
                print("failed", error.__cause__ and backend.classify(error.__cause__))
asyncio.run(main())
"""

FORK = """
import os, torch
from aneuron import CudaBackend, DeviceError
backend = CudaBackend()
core = backend.load(torch.neg, 0, None)
child = os.fork()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
said = 0
for use in (lambda: core.execute((torch.ones(2),), {}), lambda: backend.load(torch.neg, 0, None)):
    try:
        use()
    except DeviceError:
        said += 1
os._exit(said - 2)
"""


@gpu
def test_a_device_side_assert_is_fatal():
    done = subprocess.run([sys.executable, "-c", DEATH], capture_output=True, text=True, timeout=600)
    first, second = done.stdout.splitlines()
    assert first == "failed Fault.FATAL", done.stderr
    assert second.startswith("failed"), done.stderr


@gpu
def test_a_fork_is_a_clear_error():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
