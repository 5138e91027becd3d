"""The Neuron backend on a double of torch_neuronx: loading, placing, running, and what it says when that goes wrong."""

import asyncio
import contextlib
import copy
import json
import logging
import os
import re
import sys
import threading
import warnings
from pathlib import Path

import doubles
import pytest
import torch

from aneuron import AsyncDataParallel, CoreFailed, CpuBackend, DeviceError, Fault
from aneuron.backends import neuron
from aneuron.backends.neuron import NeuronBackend, cores, placement
from aneuron.backends.neuron.faults import Repeated
from aneuron.testing import check_backend

NET = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1)).eval()
X = torch.arange(8.0).reshape(2, 4)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith("NEURON"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cores, "_started", None)


@pytest.fixture
def on_double():
    """Put the process on a machine of the double; arguments are those of its Config."""
    with contextlib.ExitStack() as stack:
        yield lambda **config: stack.enter_context(doubles.neuronx(**config))


@pytest.fixture
def machine(on_double):
    return on_double(cores=4)


@pytest.fixture
def backend(tmp_path):
    return NeuronBackend(root=tmp_path / "no such root")


def traced(net=NET, example=X, **options):
    import torch_neuronx

    return torch_neuronx.trace(net, example, **options)


def saved(path, model=None):
    (traced() if model is None else model).save(path)
    return path


def where(module):
    """The core that a module is on, by running it."""
    doubles.machine.executions.clear()
    module(X)
    return {execution.local for execution in doubles.machine.executions}


# Which cores.


@pytest.mark.parametrize(
    ("environ", "number"),
    [({}, 4), ({"NEURON_RT_VISIBLE_CORES": "1-3"}, 3), ({"NEURON_RT_NUM_CORES": "2"}, 2)],
)
def test_cores_are_counted_without_taking_them(machine, tmp_path, monkeypatch, environ, number):
    doubles.build(tmp_path / "root", cores=4)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    backend = NeuronBackend(root=tmp_path / "root")
    assert list(backend.cores()) == list(range(number))
    assert machine.visible is None
    assert backend.found().cores == number
    assert backend.report() == {
        "found": True,
        "cores": number,
        "why": f"{backend.found().why} (trace)",
        "lacks": [],
        "takes": "traced models",
    }


def test_the_runtime_is_asked_where_nothing_else_tells(machine, backend):
    assert not backend.report()["found"]  # nothing says that there are any; it does not ask
    assert machine.visible is None
    assert list(backend.cores()) == [0, 1, 2, 3]
    assert machine.visible == [0, 1, 2, 3]


def test_the_cores_follow_the_environment_until_the_runtime_has_started(machine, tmp_path, monkeypatch):
    doubles.build(tmp_path / "root", cores=4)
    backend = NeuronBackend(root=tmp_path / "root")
    assert list(backend.cores()) == [0, 1, 2, 3]
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2-3")
    assert list(backend.cores()) == [0, 1]
    assert [backend.global_id(core) for core in (0, 1)] == [2, 3]
    backend.load(traced(), 0, 2)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-3")
    assert list(backend.cores()) == [0, 1]  # as the runtime has read it
    with pytest.warns(UserWarning, match="NEURON_RT_VISIBLE_CORES='0-3': changed after the Neuron runtime has started"):
        backend.load(traced(), 1, 2)


def test_no_cores(machine, tmp_path, monkeypatch, backend):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "")
    with pytest.raises(DeviceError, match="no NeuronCore: NEURON_RT_VISIBLE_CORES is empty"):
        backend.cores()
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0,2")
    with pytest.raises(DeviceError, match=r"NEURON_RT_VISIBLE_CORES='0,2'.*without gaps"):
        backend.cores()


def test_a_runtime_that_does_not_start(on_double, tmp_path):
    on_double(cores=4, dir=str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    held = doubles.hardware.Machine(doubles.machine.config)
    held.start()
    try:
        with pytest.raises(DeviceError, match=r"could not be initialized.*no /dev/neuron\*"):
            NeuronBackend(root=tmp_path / "nothing").cores()
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev/neuron0").touch()
        with pytest.raises(DeviceError, match=r"could not be initialized.*another process has the cores"):
            NeuronBackend(root=tmp_path).cores()
    finally:
        held.close()


def test_without_a_package(monkeypatch, tmp_path, backend):
    for name in ("torch_neuronx", "torch_neuron"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=r"no Neuron package is installed.*this is no Inf or Trn instance"):
        backend.cores()
    with pytest.raises(DeviceError, match="no Neuron package is installed"):
        backend.load(torch.jit.trace(NET, X), 0, 2)
    doubles.build(tmp_path / "root", cores=4)
    with pytest.raises(DeviceError, match=r"no Neuron package is installed \(torch_neuronx; torch_neuron for Inf1\)$"):
        NeuronBackend(root=tmp_path / "root").cores()


def test_construction_looks_at_nothing(monkeypatch):
    monkeypatch.setattr(cores, "package", lambda: pytest.fail("looked for a package"))
    monkeypatch.setattr(neuron.machine, "chips", lambda root: pytest.fail("looked for devices"))
    backend = NeuronBackend(compile=True)
    assert (backend.name, backend.recoverable) == ("neuron", False)
    assert repr(backend) == "NeuronBackend(compile=True)"


# Loading.


def test_the_contract(machine, backend, tmp_path):
    check_backend(backend, traced(), (X,))
    check_backend(backend, saved(tmp_path / "net.pt"), (X,))


@pytest.mark.parametrize("names", ["top", "experimental", "experimental.placement"])
def test_a_file_is_loaded_once_on_each_core(on_double, backend, tmp_path, names):
    machine = on_double(cores=4, placement=names)
    path = saved(tmp_path / "net.pt")
    loaded = [backend.load(path, core, 2) for core in backend.cores()]
    assert machine.loads == [1, 1, 1, 1]
    assert not any(core.unloads for core in machine.cores.values())
    assert machine.default == (-1, -1)
    assert [where(lambda x, core=core: core.execute((x,), {})) for core in loaded] == [{0}, {1}, {2}, {3}]
    for core in loaded:
        core.close()
    assert not any(core.used for core in machine.cores.values())


@pytest.mark.parametrize("names", ["top", "experimental", "experimental.placement"])
def test_a_module_goes_to_every_core_as_a_copy(on_double, backend, names):
    machine = on_double(cores=3, placement=names)
    module = traced()
    loaded = [backend.load(module, core, 2) for core in (1, 0, 2)]
    assert [where(lambda x, core=core: core.execute((x,), {})) for core in loaded] == [{1}, {0}, {2}]
    assert machine.loads == [1, 1, 1]
    for core in loaded:
        core.close()
    assert [core.used for core in machine.cores.values()] == [0, 0, 0]
    again = backend.load(module, 1, 2)
    assert where(lambda x: again.execute((x,), {})) == {1}


class Around(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


def test_a_part_that_two_models_share_stays_where_it_serves(machine, backend):
    import torch_neuronx

    part = traced()
    torch_neuronx.set_neuron_cores(part, 3, 1)  # the user's own doing
    one, other = backend.load(Around(part).eval(), 0, 2), backend.load(Around(part).eval(), 1, 2)
    bare = backend.load(part, 2, 2)
    assert [where(lambda x, core=core: core.execute((x,), {})) for core in (one, other, bare)] == [{0}, {1}, {2}]
    assert where(part) == {3}


def test_a_module_that_does_not_fit_leaves_nothing_on_the_device(on_double, backend):
    machine = on_double(cores=2)
    model = two()
    machine.config.memory = sum(part.model.numel() for part in placement.traced_parts(model)) - 1
    with pytest.raises(DeviceError, match="core 1 could not load the model") as refused:
        backend.load(model, 1, 2)
    assert [core.used for core in machine.cores.values()] == [0, 0]
    assert refused.value.__cause__ is not None  # whose traceback is still there to hold it


def test_a_core_is_closed_while_another_loads(machine, backend, monkeypatch):
    core = backend.load(traced(), 0, 2)
    closing = threading.Thread(target=core.close, daemon=True)

    def loading(module):
        closing.start()
        closing.join(60.0)
        assert not closing.is_alive()

    monkeypatch.setattr(placement, "_check_cores", loading)
    backend.load(traced(), 1, 2)
    assert machine.core(0).used == 0


def test_two_models_may_share_a_core(machine, backend):
    other = traced(torch.nn.Softmax(1).eval(), X)
    first, second = backend.load(traced(), 1, 2), backend.load(other, 1, 2)
    torch.testing.assert_close(first.execute((X,), {}), NET(X))
    torch.testing.assert_close(second.execute((X,), {}), X.softmax(1))
    assert {execution.local for execution in machine.executions} == {1}


@pytest.mark.parametrize("mode", ["lazy_load", "async_load"])
@pytest.mark.parametrize("kind", ["file", "module"])
def test_models_that_load_later_load_on_their_core(machine, backend, tmp_path, mode, kind):
    import torch_neuronx

    module = getattr(torch_neuronx, mode)(traced(), True)
    model = saved(tmp_path / "net.pt", module) if kind == "file" else module
    loaded = [backend.load(model, core, 2) for core in (0, 1, 2)]
    assert [where(lambda x, core=core: core.execute((x,), {})) for core in reversed(loaded)] == [{2}, {1}, {0}]
    assert machine.loads == [1, 1, 1, 0]


@pytest.mark.parametrize("kind", ["file", "module"])
def test_separate_weights_go_with_their_model(machine, backend, tmp_path, kind):
    import torch_neuronx

    module = traced(inline_weights_to_neff=False)
    model = saved(tmp_path / "net.pt", module) if kind == "file" else module
    loaded = [backend.load(model, core, 2) for core in (0, 1, 2)]
    assert [where(lambda x, core=core: core.execute((x,), {})) for core in loaded] == [{0}, {1}, {2}]
    assert machine.slow_copies == 0
    assert machine.default == (-1, -1)
    left = traced()  # the default is not where the last of them went
    torch_neuronx.set_neuron_cores(left)
    assert where(left) == {3}


class Two(torch.nn.Module):
    """Parts on a core, and one on the host."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last, self.host = first, last, torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(self.host.weight)

    def forward(self, x):
        return self.last(self.host(self.first(x)))


def two():
    return Two(traced(), traced(torch.nn.Softmax(1).eval(), torch.ones(2, 3))).eval()


@pytest.mark.parametrize("partitioned", [False, True])
def test_all_parts_of_a_module_go_to_one_core(machine, backend, partitioned):
    model = torch.jit.trace(two(), X, check_trace=False) if partitioned else two()
    assert placement.is_neuron(model)
    assert len(placement.traced_parts(model)) == 2
    machine.start()
    own = [core.models for core in machine.cores.values()]  # where tracing the whole has put them
    loaded = [backend.load(model, core, 2) for core in (0, 1)]
    for core, each in enumerate(loaded):
        assert where(lambda x, each=each: each.execute((x,), {})) == {core}
        torch.testing.assert_close(each.execute((X,), {}), NET(X).softmax(1))
    assert [core.models - before for core, before in zip(machine.cores.values(), own, strict=True)] == [2, 2, 0, 0]


def test_separate_weights_of_a_part_are_moved_and_the_hosts_are_not(machine, backend, monkeypatch):
    import torch_neuronx

    model = Two(traced(inline_weights_to_neff=False), traced(torch.nn.Softmax(1).eval(), torch.ones(2, 3))).eval()
    moved = []
    monkeypatch.setattr(torch_neuronx, "move_trace_to_device", lambda part, core: moved.append((part, core)))
    core = backend.load(model, 1, 2)
    assert moved == [(core._model.first, 1)]


def test_parts_that_do_not_fit_name_the_core(on_double, backend):
    machine = on_double(cores=2)
    model = two()
    sizes = [part.model.numel() for part in placement.traced_parts(model)]
    machine.config.memory = sum(sizes) - 1
    with pytest.raises(DeviceError, match=r"core 1 could not load the model.*status=4.*memory") as refused:
        backend.load(model, 1, 2)
    assert "status=4" in str(refused.value.__cause__)
    machine.config.memory = sum(sizes)
    backend.load(model, 1, 2)


def test_a_load_that_fails_leaves_no_default_behind(on_double, backend, tmp_path):
    machine = on_double(cores=2, memory=10)
    with pytest.raises(DeviceError, match="core 1 could not load"):
        backend.load(saved(tmp_path / "net.pt"), 1, 2)
    assert machine.default == (-1, -1)


def test_loads_do_not_run_at_once(machine, backend, tmp_path, monkeypatch):
    path, inside, most = saved(tmp_path / "net.pt"), [], []
    load = torch.jit.load

    def watched(*args, **kwargs):
        inside.append(1)
        most.append((len(inside), doubles.machine.default))
        try:
            return load(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(torch.jit, "load", watched)
    threads = [threading.Thread(target=NeuronBackend().load, args=(path, core, 2)) for core in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert sorted(most) == [(1, (core, 1)) for core in range(4)]
    assert machine.loads == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["cpu", "neuron"])
def test_loading_a_file_leaves_the_process_s_warnings_alone(machine, backend, tmp_path, monkeypatch, name):
    """Not even meanwhile: loads run in threads, and the filters are everybody's."""
    path = saved(tmp_path / "net.pt", torch.jit.trace(NET, X) if name == "cpu" else traced())
    load, filters, seen = torch.jit.load, warnings.filters, []

    def watched(*args, **kwargs):
        seen.append(warnings.filters is filters)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch.jit, "load", watched)
    (CpuBackend(cores=1) if name == "cpu" else backend).load(path, 0, 2)
    assert seen == [True]


# What is no model for these cores.


class Unlike(torch.nn.Module):
    """Scripted, it has no forward."""

    @torch.jit.export
    def run(self, x: torch.Tensor):
        return x


def test_what_has_a_neuron_graph(machine, tmp_path):
    model = traced()
    stock = torch.jit.trace(NET, X)
    stock.save(tmp_path / "stock.pt")
    torch.save(NET.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("ops.neuron.forward_v2")
    yes = [model, Two(model, NET), saved(tmp_path / "net.pt"), str(tmp_path / "net.pt"), copy.deepcopy(model)]
    no = [NET, stock, torch.neg, torch.jit.script(Unlike()), torch.jit.script(torch.nn.ReLU()), None, 3, {1: model}]
    no += [tmp_path / name for name in ("stock.pt", "weights.pt", "text.pt", "missing.pt", ".")] + ["", "\0"]
    assert [placement.is_neuron(each) for each in yes] == [True] * len(yes)
    assert [placement.is_neuron(each) for each in no] == [False] * len(no)
    assert machine.visible is None


class Buckets(torch.nn.Module):
    """Several graphs, and a scripted choice among them: what bucket_model_trace makes."""

    def __init__(self, model: torch.Tensor):
        super().__init__()
        self.register_buffer("model", model)

    def forward(self, x: torch.Tensor):
        if x.shape[0] > 1:
            return torch.ops.neuron.forward_v2([x], self.model)[0]
        return x


def test_a_graph_behind_a_choice_is_found(machine):
    assert placement.is_neuron(torch.jit.script(Buckets(traced().model)))


class Binding:
    """As the package's class looks like from Python."""

    def set_neuron_devices(self, start, count):
        pass


def test_a_part_is_also_known_by_its_binding():
    module = torch.nn.Module()
    assert not placement.is_neuron(module)
    module.model = Binding()
    assert placement.is_neuron(module)


@pytest.mark.parametrize(
    "model", [NET, torch.neg, torch.jit.script(torch.nn.ReLU())], ids=["eager", "function", "stock"]
)
def test_a_model_that_is_not_traced_is_told_to_be(machine, backend, model):
    with pytest.raises(ValueError, match=r"has no graph for NeuronCores.*torch_neuronx.trace\(model, example\)"):
        backend.load(model, 0, 2)
    assert machine.visible is None
    assert cores.frozen_environment() is os.environ


def test_files_that_are_no_traced_models(machine, backend, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        backend.load(tmp_path / "missing.pt", 0, 2)
    torch.save(NET.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "junk.pt").write_text("junk")
    for name, words in (("weights.pt", "state_dict"), (".", "directory"), ("junk.pt", "no TorchScript file; save the")):
        with pytest.raises(ValueError, match=words):
            backend.load(str(tmp_path / name), 0, 2)
    torch.jit.trace(NET, X).save(tmp_path / "stock.pt")
    with pytest.raises(ValueError, match=r"stock\.pt has no graph for NeuronCores"):
        backend.load(tmp_path / "stock.pt", 0, 2)
    content = saved(tmp_path / "net.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"is a damaged or incomplete archive"):
        backend.load(tmp_path / "short.pt", 0, 2)


def test_a_model_for_several_cores_is_refused(machine, backend, tmp_path):
    pipeline = traced(compiler_args="--neuroncore-pipeline-cores 2")
    for model in (pipeline, saved(tmp_path / "pipeline.pt", pipeline)):
        with pytest.raises(DeviceError, match=r"core 1 could not load.*status=9.*no NeuronCore Pipeline"):
            backend.load(model, 1, 2)
    (tmp_path / "config.json").write_text(json.dumps({"neuron": {"tensor_parallel_size": 2}}))
    with pytest.raises(ValueError, match=r"net\.pt was compiled for tensor parallelism on 2 cores; aneuron puts each"):
        backend.load(saved(tmp_path / "net.pt"), 0, 2)


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_class_for_several_cores_is_refused_by_name(machine, backend, tmp_path, monkeypatch, kind):
    model = saved(tmp_path / "net.pt") if kind == "file" else traced()
    monkeypatch.setattr(placement, "_traces", lambda part: iter(["__torch__.torch.classes.neuron.SPMDModel"]))
    with pytest.raises(ValueError, match="compiled for several cores that work together"):
        backend.load(model, 0, 2)


def test_a_load_that_fails_tells_whether_the_runtime_has_started(on_double, backend, tmp_path, monkeypatch):
    machine = on_double(cores=2)
    model = traced()
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "7")  # a runtime that does not start may be asked again
    with pytest.raises(DeviceError, match="could not be initialized"):
        backend.load(model, 0, 2)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "1")
    machine.config.family = "trn1"
    with pytest.raises(DeviceError, match="status=10"):
        backend.load(model, 0, 2)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0")  # too late: it has
    machine.config.family = "inf2"
    with pytest.warns(UserWarning, match="NEURON_RT_VISIBLE_CORES='0': changed after"):
        backend.load(model, 0, 2)
    assert machine.visible == [1]


def test_a_model_of_another_sdk(on_double, backend):
    on_double(cores=2)
    model = traced()
    doubles.machine.config.family = "trn1"
    with pytest.raises(DeviceError, match=r"core 0 could not load.*status=10.*compile it again"):
        backend.load(model, 0, 2)


def test_a_model_for_other_logical_cores(on_double, backend, monkeypatch):
    on_double(cores=8, cores_per_chip=8, lnc=2)
    model = traced(compiler_args=["--lnc=1"])
    with pytest.raises(DeviceError, match=r"status=2.*NEURON_LOGICAL_NC_CONFIG"):
        backend.load(model, 0, 2)


def test_a_version_without_placement(machine, backend, monkeypatch):
    import torch_neuronx

    monkeypatch.delattr(torch_neuronx, "set_neuron_cores")
    with pytest.raises(DeviceError, match="torch_neuronx has no set_neuron_cores; install one that has"):
        backend.load(traced(), 0, 2)


# Batch sizes.


def test_a_core_cuts_batches_where_their_size_is_not_known(machine, backend, tmp_path):
    path = saved(tmp_path / "net.pt")
    with pytest.warns(UserWarning, match=r"pass batch_size=, what the model was traced with") as caught:
        loaded = [backend.load(path, core, None) for core in (0, 1)]
    assert [warning.category for warning in caught].count(UserWarning) == 1
    with pytest.warns(UserWarning, match="batch_size="):
        loaded.append(backend.load(traced(), 2, None))
    for core in loaded:
        for rows in (1, 2, 5):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(core.execute((x,), {}), NET(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        backend.load(path, 2, 2)
        backend.load(path, 3, None, dynamic_batching=False)


def test_compiling_is_for_the_native_device_only(machine, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        NeuronBackend(compile=True, root=tmp_path).load(traced(), 0, None, dynamic_batching=False)


@pytest.mark.parametrize(("batch_size", "dynamic_batching"), [(2, True), (2, False), (None, False)])
@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_model_that_was_saved_with_cutting_does_not_cut_where_it_must_not(
    machine, backend, tmp_path, kind, batch_size, dynamic_batching
):
    import torch_neuronx

    module = torch_neuronx.dynamic_batch(traced(), True)
    core = backend.load(
        saved(tmp_path / "net.pt", module) if kind == "file" else module, 0, batch_size, dynamic_batching
    )
    assert core.execute((X,), {}).shape == (2, 3)
    with pytest.raises(RuntimeError, match="Incorrect"):
        core.execute((torch.ones(3, 4),), {})


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({"neuron": {"static_batch_size": 4}}, 4),
        ({"neuron": {"static_batch_size": 4, "dynamic_batch_size": False}}, 4),
        ({"neuron": {"static_batch_size": 4, "dynamic_batch_size": True}}, None),
        ({"neuron": {"static_batch_size": 0}}, None),
        ({"neuron": {"static_batch_size": True}}, None),
        ({"neuron": {"static_batch_size": "4"}}, None),
        ({"neuron": {"static_sequence_length": 128}}, None),
        ({"neuron": [4]}, None),
        ({"model_type": "bert"}, None),
        ([], None),
        ("neuron", None),
        (None, None),
    ],
)
def test_the_rows_that_optimum_neuron_compiled_for(backend, tmp_path, config, rows):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert backend.compiled_rows(tmp_path / "model.neuron") == rows
    assert backend.compiled_rows(str(tmp_path / "model.neuron")) == rows
    assert backend.compiled_rows(NET) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, None])
def test_a_strange_configuration_says_nothing(backend, tmp_path, content):
    if content is None:
        (tmp_path / "config.json").mkdir()
    else:
        (tmp_path / "config.json").write_bytes(content)
    assert backend.compiled_rows(tmp_path / "model.neuron") is None
    assert backend.compiled_rows("no such folder/model.neuron") is None
    assert backend.compiled_rows("\0") is None


def test_the_configuration_beside_a_file_in_this_folder(backend, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"neuron": {"static_batch_size": 4}}))
    monkeypatch.chdir(tmp_path)
    assert backend.compiled_rows("model.neuron") == 4


# The legacy package, on Inf1.


def test_models_of_the_legacy_package(tmp_path):
    with doubles.neuron() as machine:
        import torch_neuron

        backend = NeuronBackend(root=tmp_path / "no such root")
        assert list(backend.cores()) == [0, 1, 2, 3]
        model = torch_neuron.trace(NET, X)
        path = saved(tmp_path / "net.pt", model)
        for each in (model, path):
            loaded = [backend.load(each, core, 2) for core in (0, 1, 2, 3)]
            assert [where(lambda x, core=core: core.execute((x,), {})) for core in loaded] == [{0}, {1}, {2}, {3}]
        assert machine.loads == [2, 2, 2, 2]
        check_backend(backend, model, (X,))
        pipeline = torch_neuron.trace(NET, X, compiler_args=["--neuroncore-pipeline-cores", "2"])
        with pytest.raises(DeviceError, match=r"status=9.*no NeuronCore Pipeline"):
            backend.load(pipeline, 0, 2)


def test_the_legacy_package_cuts_what_was_traced_so(tmp_path):
    with doubles.neuron():
        import torch_neuron

        backend = NeuronBackend(root=tmp_path / "no such root")
        with pytest.warns(UserWarning, match="dynamic_batch_size=True"):
            core = backend.load(torch_neuron.trace(NET, X, dynamic_batch_size=True), 0, None)
        x = torch.randn(5, 4)
        torch.testing.assert_close(core.execute((x,), {}), NET(x))


# Running.


def test_results_are_ordinary_tensors(machine, backend):
    async def main():
        async with AsyncDataParallel(traced(), backend=backend, batch_size=2, example_inputs=X) as model:
            x = torch.randn(7, 4)
            result = await model(x)
            torch.testing.assert_close(result, NET(x))
            assert not result.requires_grad
            assert not result.is_inference()
            singles = await asyncio.gather(*(model(row[None]) for row in x))
            torch.testing.assert_close(torch.cat(singles), NET(x))

    asyncio.run(main())
    assert {execution.local for execution in machine.executions} == {0, 1, 2, 3}


def test_several_compiled_sizes(machine, backend, tmp_path):
    models = {1: saved(tmp_path / "1.pt", traced(NET, X[:1])), 2: traced()}

    async def main():
        async with AsyncDataParallel(models, [0, 2], backend=backend) as model:
            x = torch.randn(9, 4)
            torch.testing.assert_close(await model(x), NET(x))

    asyncio.run(main())
    assert machine.loads == [2, 0, 2, 0]
    assert {execution.local for execution in machine.executions} <= {0, 2}


def test_a_start_that_fails_on_one_core_frees_the_others(machine, backend, tmp_path):
    machine.start()
    machine.core(2).used = machine.config.memory

    async def main():
        with pytest.raises(DeviceError, match="core 2 could not load") as refused:
            await AsyncDataParallel(saved(tmp_path / "net.pt"), backend=backend, batch_size=2).start()
        assert "while loading core 2 of the neuron backend" in refused.value.__notes__[0]

    asyncio.run(main())
    assert [core.models for core in machine.cores.values()] == [0, 0, 0, 0]


def test_with_min_cores_a_core_that_does_not_load_stays_out_and_all_are_freed(machine, backend, tmp_path, caplog):
    machine.start()
    machine.core(2).used = machine.config.memory

    async def main():
        model = AsyncDataParallel(
            saved(tmp_path / "net.pt"), backend=backend, batch_size=2, example_inputs=X, min_cores=3
        )
        async with model:
            assert [core.state for core in model.statistics().cores] == ["ready", "ready", "failed", "ready"]
            torch.testing.assert_close(await model(X.repeat(4, 1)), NET(X.repeat(4, 1)).detach())
        with pytest.raises(DeviceError, match="core 2 could not load"):
            await AsyncDataParallel(saved(tmp_path / "net.pt"), backend=backend, batch_size=2, min_cores=4).start()

    asyncio.run(main())
    assert "core 2 did not load (failed)" in caplog.text
    assert [core.models for core in machine.cores.values()] == [0, 0, 0, 0]


def core_of(machine, backend, **plan):
    core = backend.load(traced(), 1, 2)
    machine.fail(1, **plan)
    return core


def fault(backend, core, x=X):
    """How an execution ends."""
    try:
        core.execute((x,), {})
    except Exception as error:
        return backend.classify(error), error
    return None


@pytest.mark.parametrize("status", [2, 3, 1002, 1003, 1006])
def test_a_bad_input_is_the_calls_and_the_core_goes_on(machine, backend, status):
    core = core_of(machine, backend, status=status, times=3)
    for _ in range(3):
        kind, error = fault(backend, core)
        assert kind is Fault.INPUT
        assert f"status={status}" in str(error)
    assert fault(backend, core) is None


@pytest.mark.parametrize("status", [5, 6, 101, 1004, 1201, 1202])
def test_a_lost_core_stays_lost(machine, backend, status):
    core = core_of(machine, backend, status=status)
    for _ in range(2):
        kind, error = fault(backend, core)
        assert kind is Fault.CORE
        assert error.__notes__[0].startswith("aneuron: core 1, ")


@pytest.mark.parametrize("status", [1, 4, 15, 4711])
def test_a_failure_of_nobodys_is_the_cores_when_it_repeats(machine, backend, status):
    core = core_of(machine, backend, status=status, times=1)
    assert fault(backend, core)[0] is Fault.INPUT
    assert fault(backend, core) is None
    machine.fail(1, status, times=3)
    assert fault(backend, core)[0] is Fault.INPUT  # a success was in between
    for _ in range(2):
        kind, error = fault(backend, core)
        assert kind is Fault.CORE
        assert isinstance(error, Repeated)
        assert f"status={status}" in str(error)
        assert f"status={status}" in str(error.__cause__)
        assert error.__cause__.__traceback__ is None  # it holds the rows of all who share the batch
    assert fault(backend, core) is None
    machine.fail(1, status, times=1)
    assert fault(backend, core)[0] is Fault.INPUT


def test_suspicion_is_of_one_core(machine, backend):
    first, second = backend.load(traced(), 0, 2), backend.load(traced(), 1, 2)
    machine.fail(0, 1)
    machine.fail(1, 1)
    assert fault(backend, first)[0] is Fault.INPUT
    assert fault(backend, second)[0] is Fault.INPUT


def test_an_input_of_its_own_fault_is_no_success(machine, backend):
    core = core_of(machine, backend, status=1, times=1)
    assert fault(backend, core)[0] is Fault.INPUT
    machine.fail(1, 1003)
    assert fault(backend, core)[0] is Fault.INPUT
    machine.fail(1, 1)
    assert fault(backend, core)[0] is Fault.CORE


@pytest.fixture
def naps(monkeypatch):
    slept = []
    monkeypatch.setattr(neuron.time, "sleep", lambda seconds: slept.append(seconds) if seconds else None)
    return slept


def test_a_full_queue_is_tried_again(machine, backend, naps):
    core = core_of(machine, backend, status=7, times=4)
    torch.testing.assert_close(core.execute((X,), {}), NET(X))
    assert naps == [0.001, 0.002, 0.004, 0.008]


def test_a_queue_that_stays_full_is_given_up(machine, backend, naps):
    core = core_of(machine, backend, status=7, times=None)
    kind, error = fault(backend, core)
    assert kind is Fault.INPUT
    assert "status=7" in str(error)
    assert len(naps) == len(neuron.BACK_OFF)
    assert 0.1 < sum(naps) < 1.0
    assert fault(backend, core)[0] is Fault.CORE  # the second time


def test_a_torchscript_error_of_the_models_own(machine, backend):
    @torch.jit.script
    def half(x: torch.Tensor) -> torch.Tensor:
        if x.sum() < 0:
            raise ValueError("must be positive")
        return x

    class Checked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = traced()

        def forward(self, x):
            return self.part(half(x))

    core = backend.load(Checked().eval(), 0, 2)
    for _ in range(3):
        kind, error = fault(backend, core, -X)
        assert kind is Fault.INPUT
        assert isinstance(error, torch.jit.Error)
        assert not getattr(error, "__notes__", ())


def test_wrong_arguments_are_the_callers(machine, backend):
    core = backend.load(traced(), 0, 2)
    for args, kwargs, text in [
        ((), {}, "missing value for argument"),
        ((3,), {}, "Expected a value of type"),
        ((X, X), {}, r"forward\(\)"),
        ((torch.ones(3, 4),), {}, "Incorrect"),
        ((X.int(),), {}, "Incorrect"),
    ]:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=text) as raised:
                core.execute(args, kwargs)
            assert backend.classify(raised.value) is Fault.INPUT


@pytest.mark.filterwarnings("ignore:it is not known")
def test_unequal_rows_where_the_core_cuts(machine, backend):
    class Sum(torch.nn.Module):
        def forward(self, x, y):
            return x + y

    core = backend.load(traced(Sum(), (X, X)), 0, None)
    with pytest.raises(RuntimeError, match="Inconsistent batch sizes") as raised:
        core.execute((X, X[:1]), {})
    assert backend.classify(raised.value) is Fault.INPUT
    assert "all inputs need equal rows" in raised.value.__notes__[0]


def test_a_nan_is_its_callers_and_nobody_elses(machine, backend):
    async def main():
        async with AsyncDataParallel(traced(), [0], backend=backend, batch_size=2, example_inputs=X) as model:
            bad = torch.full((1, 4), float("nan"))
            results = await asyncio.gather(*(model(x) for x in (X[:1], bad, X[1:])), return_exceptions=True)
            torch.testing.assert_close(results[0], NET(X[:1]))
            torch.testing.assert_close(results[2], NET(X[1:]))
            assert "status=1003" in str(results[1])

    asyncio.run(main())


def test_a_lost_core_says_what_to_do(machine, backend, caplog):
    async def main():
        async with AsyncDataParallel(traced(), [0], backend=backend, batch_size=2) as model:
            machine.fail(0, 1202)
            with caplog.at_level(logging.WARNING), pytest.raises(CoreFailed, match="status=1202") as failed:
                await model(X)
            assert "stop this instance and replace it" in failed.value.__cause__.__notes__[0]

    asyncio.run(main())
    assert "core 0 failed (out of service until the process is restarted)" in caplog.text


def test_two_batches_are_on_a_core_at_once(machine, backend, monkeypatch):
    core = backend.load(traced(), 0, 2)
    meeting = threading.Barrier(2)
    monkeypatch.setattr(core, "_model", lambda: meeting.wait(60.0))
    threads = [threading.Thread(target=core.execute, args=((), {})) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert core.concurrent
    assert not meeting.broken


def test_a_child_process_is_told(machine, backend, monkeypatch):
    core = backend.load(traced(), 0, 2)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for use in (
        lambda: core.execute((X,), {}),
        lambda: backend.load(traced(), 0, 2),
        backend.cores,
    ):
        with pytest.raises(RuntimeError, match=f"started in process {parent}, and this is its child") as raised:
            use()
        assert backend.classify(raised.value) is Fault.FATAL


def test_the_program_in_the_guide(machine, monkeypatch, tmp_path, capsys):
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "aws.md").read_text()
    (program,) = re.findall(r"<!-- program: neuron, traced -->\n```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 224 * 224, 2)).eval()
    saved("model.pt", traced(net, torch.rand(4, 3, 224, 224)))
    exec(compile(program, "aws.md", "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out == "torch.Size([10, 2])\n"
