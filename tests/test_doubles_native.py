"""The double of TorchNeuron's device does what facts 7.2 say: tensors on `neuron:i`, launches that end later."""

import copy
import os
import subprocess
import sys
import threading

import doubles
import pytest
import torch
from doubles import device
from torch import nn

pytestmark = pytest.mark.skipif(not device.available, reason="this torch cannot have a device type written in Python")

X = torch.rand(2, 3)


@pytest.fixture
def machine():
    with doubles.native() as machine:
        yield machine


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval().requires_grad_(False)


def test_the_package_has_neither_trace_nor_data_parallel(machine):
    import torch_neuronx

    assert not hasattr(torch_neuronx, "trace")
    assert not hasattr(torch_neuronx, "DataParallel")
    with pytest.raises(RuntimeError, match="does not exist"):
        torch.classes.neuron.Runtime()


@pytest.mark.parametrize("inference", [True, False])
def test_a_model_runs_on_the_device_that_it_was_moved_to(machine, net, inference):
    assert (torch.neuron.device_count(), torch.neuron.is_initialized(), machine.visible) == (4, False, None)
    with torch.inference_mode(inference):
        there = copy.deepcopy(net).to("neuron:1")
        assert torch.neuron.is_initialized()
        assert next(there.parameters()).device == torch.device("neuron:1")
        y = there(X.to("neuron:1"))
        assert (y.device, y.shape, y.dtype) == (torch.device("neuron:1"), (2, 4), torch.float32)
        torch.testing.assert_close(y.cpu(), net(X))
        torch.testing.assert_close(y.to("cpu", torch.float64), net(X).double())
        torch.testing.assert_close(copy.deepcopy(there)(X.to("neuron:1")).cpu(), net(X))
        assert y.to("neuron:2").device == torch.device("neuron:2")
        assert torch.zeros(3, device="neuron:3").sum().item() == 0
    assert {run.core for run in machine.executions if run.rows == 2} == {1}


def test_all_tensors_of_an_operation_are_on_one_device(machine, net):
    with pytest.raises(RuntimeError, match="on the same device, but found at least two devices, neuron:0 and neuron:1"):
        net.to("neuron:1")(X.to("neuron:0"))
    with pytest.raises(RuntimeError, match="cpu and neuron:0"):
        X + X.to("neuron:0")
    with pytest.raises(ValueError, match=r"Invalid device id: 4\. Valid range is 0 to 3"):
        X.to("neuron:4")


def test_devices_are_relative_to_the_visible_cores(machine, monkeypatch):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2-3")
    assert torch.neuron.device_count() == 2
    X.to("neuron:1") + 1
    assert machine.executions == [doubles.hardware.Execution(core=3, local=1, rows=2)]


def test_the_current_device_is_the_threads_own(machine):
    torch.neuron.set_device(2)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.neuron.current_device()))
    thread.start()
    thread.join()
    assert (torch.neuron.current_device(), seen) == (2, [0])
    machine.config.service_time = 3600
    X.to("neuron:2") + 1
    assert not torch.neuron.current_stream().query()
    assert torch.neuron.current_stream(0).query()
    with pytest.raises(ValueError, match="Invalid device id: 4"):
        torch.neuron.set_device(4)


def held(machine, core=1):
    """A core that ends nothing before the event is set."""
    go = threading.Event()
    machine.fail(core, 0, wait=go)
    return go


@pytest.mark.parametrize("how", ["device", "stream", "event", "blocking copy"])
def test_a_copy_to_the_host_is_garbage_until_somebody_waits(machine, how):
    machine.config.service_time = 0.01
    y = X.to("neuron:1") + 1  # returns before the launch has ended
    z = y.to("cpu", non_blocking=True)
    assert z.isnan().all()
    stream = torch.neuron.current_stream(1)
    event = stream.record_event()
    if how == "device":
        torch.neuron.synchronize("neuron:1")
    elif how == "stream":
        stream.synchronize()
    elif how == "event":
        event.synchronize()
    else:
        y.cpu()
    assert torch.equal(z, X + 1)
    assert event.query()
    assert stream.query()


def test_a_launch_returns_before_it_has_ended(machine):
    machine.config.service_time = 3600
    X.to("neuron:1") + 1
    assert not torch.neuron.current_stream(1).record_event().query()


def test_the_source_of_a_copy_to_the_device_is_free_at_once(machine):
    x = X.clone()
    y = x.to("neuron:0", non_blocking=True)
    x.zero_()
    assert torch.equal(y.cpu(), X)
    into = torch.empty(2, 3)
    assert into.copy_(y, non_blocking=True).isnan().all()
    torch.neuron.synchronize(0)
    assert torch.equal(into, X)


def test_an_event_waits_for_what_was_before_it_and_no_longer(machine):
    event = torch.neuron.Event(enable_timing=True)
    other = torch.neuron.Event(enable_timing=True)
    y = X.to("neuron:1") + 1
    first = y.to("cpu", non_blocking=True)
    event.record(torch.neuron.current_stream("neuron:1"))
    go = held(machine)
    machine.core(1).faults[-1].after = 1
    second = (y + 1).to("cpu", non_blocking=True)
    other.record(torch.neuron.current_stream("neuron:1"))
    event.synchronize()
    assert torch.equal(first, X + 1)
    assert second.isnan().all()
    waiter = threading.Thread(target=other.synchronize)
    waiter.start()
    event.synchronize()  # not behind the one who waits for more
    go.set()
    waiter.join()
    assert torch.equal(second, X + 2)
    assert event.elapsed_time(other) >= 0


def test_launches_can_block(machine, monkeypatch):
    monkeypatch.setenv("NEURON_LAUNCH_BLOCKING", "1")
    X.to("neuron:1") + 1
    assert torch.neuron.current_stream(1).query()


def test_a_fault_shows_when_somebody_waits(machine, net):
    there = net.to("neuron:1")
    x = X.to("neuron:1")
    machine.fail(1, 5)
    y = there(x)
    with pytest.raises(
        RuntimeError, match=r"^NRT Execution error occurred on Neuron for operation=aten\S+\nerror message=.* timed out"
    ):
        y.cpu()
    y = there(x)
    with pytest.raises(RuntimeError, match="Operation timed out"):  # the core stays poisoned
        torch.neuron.synchronize(1)


def test_what_does_not_poison_falls_back_to_the_cpu(machine, monkeypatch):
    x = X.to("neuron:1")
    machine.fail(1, 1002, times=2)
    assert torch.equal((x + 1).cpu(), X + 1)
    assert machine.fallbacks == 1
    monkeypatch.setenv("TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS", "1")
    with pytest.raises(RuntimeError, match=r"Invalid input to exec\(\)"):
        (x + 1).cpu()


def test_a_compiled_graph_does_not_fall_back_unless_it_may(machine, net, monkeypatch):
    there, x = torch.compile(net.to("neuron:1"), backend="neuron"), X.to("neuron:1")
    machine.fail(1, 1003)
    with pytest.raises(RuntimeError, match=r"operation=graph\n.*numerical errors"):
        there(x).cpu()
    monkeypatch.setenv("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION", "0")
    machine.fail(1, 1003)
    assert there(x).cpu().shape == (2, 4)
    assert machine.fallbacks == 1


def test_a_compiled_model_is_one_launch_until_its_code_has_seen_too_many_shapes(machine, net, caplog):
    there = torch.compile(net.to("neuron:1"), backend="neuron")
    for rows in range(1, 10):
        launched = len(machine.executions)
        x = torch.rand(rows, 3)
        torch.testing.assert_close(there(x.to("neuron:1")).cpu(), net(x.to("neuron:1")).cpu())
        # The reference beside it is a launch for each operation; so is the compiled one beyond the limit of 8 shapes.
        each = (len(machine.executions) - launched) / 2
        assert (each == 1.5, "recompile_limit" in caplog.text) == ((True, False) if rows <= 8 else (False, True))
    another = torch.compile(copy.deepcopy(net), backend="neuron", fullgraph=True)  # has the same code
    with pytest.raises(device.FailOnRecompileLimitHit):
        another(torch.rand(9, 3).to("neuron:1"))


def test_what_the_backend_for_compile_refuses(machine, net, caplog):
    x = X.to("neuron:0")
    torch.compile(net.to("neuron:0"), backend="neuron", mode="max-autotune")(x)
    assert "does not support mode='max-autotune', falling back to default mode" in caplog.text
    with pytest.raises(RuntimeError, match=r"Dynamic shapes detected.*requires static shapes"):
        torch.compile(net, backend="neuron", dynamic=True)(x)

    def looks(x):
        return x + 1 if x.sum().item() > 0 else x - 1

    assert torch.equal(torch.compile(looks, backend="neuron")(x).cpu(), X + 1)
    with pytest.raises(RuntimeError, match="graph break"):
        torch.compile(looks, backend="neuron", fullgraph=True)(x)


def test_memory_of_a_device_is_bounded(machine):
    machine.config.memory = 2 * X.nbytes
    kept = [X.to("neuron:0"), X.to("neuron:0")]
    with pytest.raises(RuntimeError, match="nrt_tensor_allocate status=4 message=Allocation Failure"):
        X.to("neuron:0")
    assert torch.neuron.memory_allocated(0) == 2 * X.nbytes
    view = kept.pop()[:1]
    kept.clear()
    assert torch.neuron.memory_allocated(0) == X.nbytes  # a view keeps the whole
    del view
    assert torch.neuron.memory_allocated(0) == 0


def test_nothing_is_left_of_it():
    with doubles.native():
        pass
    assert not hasattr(torch, "neuron")
    with pytest.raises(RuntimeError, match="not linked with support for neuron"):
        X.to("neuron:0")


def test_a_forked_process_is_told_to_spawn():
    script = """
import os, torch, torch_neuronx
torch.neuron.init()
if os.fork() == 0:
    try:
        torch.zeros(1, device="neuron:0")
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(doubles.HERE / "native")}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600).stdout
    assert output.startswith("Cannot re-initialize Neuron runtime in forked subprocess. ")
