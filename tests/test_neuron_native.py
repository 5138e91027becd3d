"""The Neuron backend on a double of TorchNeuron's native device: plain modules on `neuron:i`."""

import asyncio
import os
import re
import threading
import warnings
from pathlib import Path

import doubles
import numpy
import pytest
import torch
from doubles import device

from aneuron import AsyncDataParallel, Buckets, DeviceError, Fault
from aneuron.backends.neuron import NeuronBackend, cores, native
from aneuron.testing import check_backend

pytestmark = pytest.mark.skipif(not device.available, reason="this torch cannot have a device type written in Python")

NET = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1)).eval().requires_grad_(False)
X = torch.arange(8.0).reshape(2, 4)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("NEURON", "TORCH_NEURONX")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cores, "_started", None)
    with doubles.native() as machine:
        yield machine


@pytest.fixture
def backend(tmp_path):
    return NeuronBackend(root=tmp_path / "no such root")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_contract(machine, tmp_path, compiled):
    backend = NeuronBackend(compile=compiled, root=tmp_path)
    assert list(backend.cores()) == [0, 1, 2, 3]
    assert machine.visible is None  # counted, not taken
    check_backend(backend, NET, (X,))
    assert {execution.local for execution in machine.executions} == {0, 1, 2, 3}
    assert len(machine.executions) == 4 * 2 * 2 * (1 if compiled else 2)  # cores, loads, runs, operations
    assert not any(core.used for core in machine.cores.values())
    assert next(NET.parameters()).device.type == "cpu"  # ours are copies


def test_calls_and_structures(machine, backend):
    class Named(torch.nn.Module):
        def forward(self, x, *, scale):
            return {"twice": x * 2, "scaled": [x * scale, None]}

    async def main():
        async with AsyncDataParallel(Named().eval(), [1, 3], backend=backend, batch_size=2) as model:
            results = await asyncio.gather(*(model(X[:1] + n, scale=X[:1]) for n in range(9)))
            for n, result in enumerate(results):
                assert torch.equal(result["twice"], (X[:1] + n) * 2)
                assert torch.equal(result["scaled"][0], (X[:1] + n) * X[:1])
                assert type(result["twice"]) is torch.Tensor
                assert not result["twice"].is_inference()

    asyncio.run(main())
    assert {execution.local for execution in machine.executions} == {1, 3}


def test_a_run_is_over_when_execute_returns(machine, backend, monkeypatch):
    """Also one without an output to be copied, whose fault nobody would see."""

    class Silent(torch.nn.Module):
        def forward(self, x):
            self.seen = x + 1

    monkeypatch.setenv("TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS", "1")
    core = backend.load(Silent().eval(), 1, 2)
    assert core.execute((X,), {}) is None
    machine.fail(1, 1003)
    with pytest.raises(RuntimeError, match="numerical errors") as raised:
        core.execute((X,), {})
    assert backend.classify(raised.value) is Fault.INPUT


class Failing(torch.nn.Module):
    """Its own error comes when the device has been given work."""

    def forward(self, x, bad):
        y = x + 1
        if bad:
            raise LookupError("no such row")
        return y


def test_what_was_launched_before_an_error_is_waited_for(machine, backend, monkeypatch):
    monkeypatch.setenv("TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS", "1")
    core = backend.load(Failing().eval(), 1, 2)
    machine.fail(1, 1003)
    with pytest.raises(RuntimeError, match="numerical errors") as raised:
        core.execute((X, True), {})
    assert isinstance(raised.value.__context__, LookupError)
    assert torch.equal(core.execute((X, False), {}), X + 1)  # not the next caller's
    with pytest.raises(LookupError, match="no such row"):
        core.execute((X, True), {})


def test_what_is_no_tensor_comes_as_it_is(machine, backend):
    class Mixed(torch.nn.Module):
        def forward(self, x, scale):
            return {"twice": x * 2, "array": array, "scale": scale, "none": None}

    array = numpy.ones(2)
    output = backend.load(Mixed().eval(), 1, 2).execute((X, 3), {})
    assert torch.equal(output.pop("twice"), X * 2)
    assert output == {"array": array, "scale": 3, "none": None}


def test_loads_do_not_run_at_once(machine, backend):
    class Slow(torch.nn.Linear):
        def to(self, *args, **kwargs):
            inside.append(1)
            most.append(len(inside))
            meeting.wait(0.2)  # for a second one, which does not come
            inside.pop()
            return super().to(*args, **kwargs)

    inside, most, meeting, net = [], [], threading.Event(), Slow(4, 2).eval()
    threads = [threading.Thread(target=backend.load, args=(net, core, 2)) for core in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert most == [1, 1, 1]


@pytest.mark.parametrize(("status", "kind"), [(5, Fault.CORE), (101, Fault.CORE), (1202, Fault.CORE)])
def test_a_lost_core(machine, backend, status, kind):
    core = backend.load(NET, 2, 2)
    machine.fail(2, status)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NRT Execution error") as raised:
            core.execute((X,), {})
        assert backend.classify(raised.value) is kind


def test_the_current_device_is_that_of_the_core_in_every_thread(machine, backend):
    class Where(torch.nn.Module):
        def forward(self, x):
            seen.append(torch.neuron.current_device())
            return x

    seen = []
    core = backend.load(Where().eval(), 2, 2)
    assert not core.concurrent  # they share a stream, and its errors
    thread = threading.Thread(target=core.execute, args=((X,), {}))
    thread.start()
    thread.join(60.0)
    core.execute((X,), {})
    assert seen == [2, 2]


def test_what_is_no_model_for_the_device(machine, backend, tmp_path):
    script = torch.jit.trace(NET, X)
    script.save(tmp_path / "net.pt")
    for model in (script, str(tmp_path / "net.pt"), torch.neg):
        with pytest.raises(ValueError, match=r"the native device takes an nn\.Module"):
            backend.load(model, 0, 2)
    traced = torch.nn.Module()
    traced.part = type("Binding", (), {"set_neuron_devices": print})()
    with pytest.raises(ValueError, match=r"traced with torch_neuronx \(up to 2.9\).*has a native device instead"):
        backend.load(traced, 0, 2)


def test_inputs_that_the_device_refuses_cost_no_core(machine, monkeypatch, tmp_path):
    """Its errors say a status in words: two of an input in a row are not the core's."""
    core = NeuronBackend(compile=True, root=tmp_path).load(NET, 1, 2)
    core.execute((X,), {})
    for status in (1003, 1006, 1002) * 2:
        machine.fail(1, status)
        with pytest.raises(RuntimeError, match="NRT Execution error") as raised:
            core.execute((X,), {})
        assert NeuronBackend().classify(raised.value) is Fault.INPUT
    machine.fail(1, 5)
    with pytest.raises(RuntimeError, match="Operation timed out") as raised:
        core.execute((X,), {})
    assert "NEURON_RT_EXEC_TIMEOUT" in raised.value.__notes__[0]


# Compiled.


@pytest.mark.filterwarnings("ignore:it is not known how many rows")
def test_every_shape_is_compiled_on_every_core(machine, tmp_path, caplog):
    """Copies share their code, and with it what Dynamo has compiled: it takes eight programs of a code."""
    backend = NeuronBackend(compile=True, root=tmp_path)
    loaded = [backend.load(NET, core, None) for core in range(4)]
    for _ in range(2):
        for rows in range(1, 12):
            for core in loaded:
                x = torch.rand(rows, 4)
                torch.testing.assert_close(core.execute((x,), {}), NET(x))
    assert len(machine.executions) == 2 * 11 * 4  # one launch a call
    assert not caplog.text


def test_what_cannot_be_one_graph_is_refused_with_advice(machine, tmp_path):
    class Looks(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x - 1

    core = NeuronBackend(compile=True, root=tmp_path).load(Looks().eval(), 0, 2)
    with pytest.raises(RuntimeError, match="graph break") as raised:
        core.execute((X,), {})
    assert "without compile=True" in raised.value.__notes__[0]
    assert NeuronBackend().classify(raised.value) is Fault.INPUT


def test_buckets_are_compiled_when_the_model_starts(machine, tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x, mask):
            return (x * mask).sum(1) / mask.sum(1)

    async def main():
        backend = NeuronBackend(compile=True, root=tmp_path)
        mean = Mean().eval()
        example = torch.ones(1, 8), torch.ones(1, 8)
        async with AsyncDataParallel(
            dict.fromkeys((1, 2, 4), mean),
            [0, 1],
            backend=backend,
            example_inputs=example,
            buckets=Buckets(sizes=(8, 16)),
        ) as model:
            known = compilations()
            assert known == 2 * 3 * 2  # cores, numbers of rows, lengths
            for rows, length in ((1, 3), (3, 8), (4, 16), (2, 9)):
                x = torch.rand(rows, length)
                result = await model(x, torch.ones(rows, length))
                torch.testing.assert_close(result, x.mean(1))
            assert compilations() == known

    asyncio.run(main())


def compilations():
    return sum(len(known) for _, known in device._compiled.values())


def test_dynamo_compiles_each_program_once(monkeypatch):
    """torch's own Dynamo, with a backend that counts: what the double does not show."""
    counted = []

    def count(graph, example):
        counted.append(tuple(example[-1].shape))
        return graph.forward

    def compile_(function, *, backend, **options):
        assert backend == "neuron"
        return device.unpatched_compile(function, backend=count, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    copies = [native.Programs(torch.nn.Sequential(torch.nn.Linear(4, width))) for width in range(1, 4)]
    x = {rows: torch.rand(rows, 4) for rows in range(1, 7)}
    for _ in range(2):
        for rows, of_rows in x.items():
            for width, programs in enumerate(copies, 1):
                assert programs(of_rows).shape == (rows, width)
    assert len(counted) == 6 * 3


def test_keywords_are_the_same_in_any_order(machine, tmp_path):
    class Scale(torch.nn.Module):
        def forward(self, x, by):
            return x * by

    core = NeuronBackend(compile=True, root=tmp_path).load(Scale().eval(), 0, 2)
    by = torch.tensor([[2.0], [3.0]])
    for kwargs in ({"x": X, "by": by}, {"by": by, "x": X}):
        assert torch.equal(core.execute((), kwargs), X * by)
    assert compilations() == 1


def test_a_program_for_each_constant(machine, tmp_path):
    class Scale(torch.nn.Module):
        def forward(self, x, by):
            return x * by

    core = NeuronBackend(compile=True, root=tmp_path).load(Scale().eval(), 0, 2)
    for by in (*range(12), 2):
        assert torch.equal(core.execute((X, by), {}), X * by)


def test_a_compiled_model_of_unknown_rows_warns_once(tmp_path):
    backend = NeuronBackend(compile=True, root=tmp_path)
    with pytest.warns(UserWarning, match=r"compiled for each new number.*pass batch_size=") as caught:
        assert [backend.load(NET, core, None).concurrent for core in (0, 1)] == [False, False]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.load(NET, 2, 2)
        NeuronBackend(root=tmp_path).load(NET, 3, None)


def test_the_program_in_the_guide(machine, capsys):
    exec(compile(programs()["neuron, native"], "aws.md", "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out.startswith("tensor([0.")
    assert compilations() == 4 * 2 * 2  # cores, numbers of rows, lengths


def programs():
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "aws.md").read_text()
    found = re.findall(r"<!-- program: (.+?) -->\n```python\n(.*?)```", guide, re.DOTALL)
    assert len(found) == guide.count("```python") == 2
    return dict(found)


def test_a_model_that_does_not_fit_names_the_core(machine, backend):
    machine.config.memory = 10
    with pytest.raises(DeviceError, match=r"core 1 could not load the model.*status=4.*memory"):
        backend.load(NET, 1, 2)


def test_no_device(monkeypatch, backend):
    monkeypatch.setattr(torch.neuron, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="no NeuronCore: the Neuron runtime sees none"):
        backend.cores()


def test_a_child_process_is_told(machine, backend, monkeypatch):
    core = backend.load(NET, 0, 2)
    monkeypatch.setattr(cores, "_started", None)  # we would say it ourselves
    machine._pid += 1
    with pytest.raises(RuntimeError, match="forked subprocess") as raised:
        core.execute((X,), {})
    assert backend.classify(raised.value) is Fault.FATAL
    assert "spawn method" in raised.value.__notes__[0]
    with pytest.raises(DeviceError, match=r"core 1 could not load the model.*forked subprocess.*spawn"):
        backend.load(NET, 1, 2)
