"""Which backend, which cores, how many rows: what is decided at start, before anything is loaded."""

import asyncio
import warnings

import doubles
import pytest
import torch
from fake_cuda import FakeCuda
from puppets import check_sum, named, row, scenario

import aneuron
from aneuron import (
    AsyncDataParallel,
    CpuBackend,
    CudaBackend,
    DeviceError,
    Fault,
    NeuronBackend,
    ShapeError,
    SimulatedBackend,
)
from aneuron.backends import automatic, choose_cores, graphs, parse_device_ids
from aneuron.backends.neuron import cores, machine
from aneuron.cli import info
from aneuron.testing import PuppetBackend, PuppetCore

NET = torch.nn.Linear(4, 2).eval()
X = torch.arange(8.0).reshape(2, 4)


@pytest.fixture
def neuron_machine(monkeypatch):
    """A process on a machine with two chips, of which it has four cores."""
    monkeypatch.setattr(machine, "chips", lambda root: [0, 1])
    monkeypatch.setattr(cores, "_started", None)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-3")
    with doubles.neuronx(cores=4) as double:
        yield double


def traced():
    import torch_neuronx

    return torch_neuronx.trace(NET, X)


# "auto".


def test_where_there_is_only_a_cpu_auto_is_that(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for model in (torch.neg, NET, torch.jit.script(NET), tmp_path / "net.pt"):
        assert isinstance(automatic([model]), CpuBackend)


def test_where_there_is_a_gpu_modules_go_there_and_callables_do_not(monkeypatch, tmp_path):
    FakeCuda(monkeypatch, devices=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for model in (NET, torch.jit.script(NET), tmp_path / "net.pt", str(tmp_path / "net.pt")):
        assert isinstance(automatic([model]), CudaBackend)
    assert isinstance(automatic([torch.neg]), CpuBackend)
    assert isinstance(automatic([NET, torch.neg]), CpuBackend)


def test_where_there_are_neuroncores_traced_models_go_there(neuron_machine, tmp_path):
    traced().save(tmp_path / "net.pt")
    for model in (traced(), torch.nn.Sequential(traced()), tmp_path / "net.pt"):
        assert isinstance(automatic([model]), NeuronBackend)
    assert isinstance(automatic([torch.neg]), CpuBackend)
    assert not neuron_machine.loads  # nothing was claimed, or placed


async def test_a_module_that_was_not_traced_is_not_quietly_run_elsewhere_where_there_are_neuroncores(neuron_machine):
    model = AsyncDataParallel(NET)
    with pytest.raises(ValueError, match="trace it first"):
        await model(X)
    assert not model.ready


async def test_neither_is_an_exported_program(neuron_machine, tmp_path):
    program = torch.export.export(NET, (X,))
    torch.export.save(program, tmp_path / "net.pt2")
    for model, words in (
        (program, "trace it first"), (program.module(), "trace it first"),
        (tmp_path / "net.pt2", r"exported program, which this backend does not run.*backend='cpu'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            await AsyncDataParallel(model).start()


async def test_auto_serves_a_traced_model_on_every_core(neuron_machine):
    async with AsyncDataParallel(traced(), batch_size=2) as model:
        torch.testing.assert_close(await model(X.repeat(3, 1)), NET(X.repeat(3, 1)).detach())
        assert len(model.statistics().cores) == 4
        assert "NeuronBackend()" in repr(model)


async def test_a_traced_model_without_neuroncores_says_so(monkeypatch, tmp_path):
    with doubles.neuronx(cores=2):
        traced().save(tmp_path / "net.pt")
    with pytest.raises(DeviceError, match=r"traced for NeuronCores.*no device files.*no driver"):
        await AsyncDataParallel(tmp_path / "net.pt").start()


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
async def test_a_traced_model_does_not_go_elsewhere_when_told_to(backend, monkeypatch, tmp_path):
    FakeCuda(monkeypatch, devices=1)
    with doubles.neuronx(cores=2):
        traced().save(tmp_path / "net.pt")
        for model in (tmp_path / "net.pt", traced()):
            with pytest.raises(DeviceError, match=f"the {backend} backend cannot run it"):
                await AsyncDataParallel(model, backend=backend).start()


async def test_cores_have_the_numbers_of_the_machine_in_the_statistics(neuron_machine, monkeypatch):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2-3")
    async with AsyncDataParallel(traced(), batch_size=2) as model:
        assert [(core.id, core.global_id) for core in model.statistics().cores] == [(0, 2), (1, 3)]


@scenario
async def test_what_auto_takes_is_decided_at_start_and_kept():
    model = AsyncDataParallel(torch.neg, backend="auto")
    assert "'auto'" in repr(model)
    assert model._pool.backend is None


@pytest.mark.parametrize("name", ["neuron", "cuda", "cpu", "openvino", "onnx"])
def test_a_backend_by_name(name):
    assert AsyncDataParallel(NET, backend=name)._pool.backend.name == name


@pytest.mark.parametrize("found", [(), ("cuda",), ("neuron",), ("neuron", "cuda"), ("native",), ("native", "cuda")])
def test_info_says_what_auto_takes(monkeypatch, found):
    """Of a callable, a module and a traced model."""
    package = {"neuron": "trace", "native": "native"}.get(next(iter(found), ""), "none")
    here = cores.Found(4 if package != "none" else 0, package, "as the test has it")
    monkeypatch.setattr(cores, "found", lambda root: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int("cuda" in found))
    said = info.automatic(
        {name: info.report(getattr(aneuron, f"{title}Backend")) for name, title in info.CLASSES.items()}
    )
    assert said["callable"] == automatic([torch.neg]).name == "cpu"
    chosen = automatic([NET]).name
    assert said["module"] == (None if chosen == "neuron" and package == "trace" else chosen)
    assert said["neuron"] == ("neuron" if package == "trace" else None)


# Graphs: ONNX and OpenVINO's own.

ONNX = b"\x08\x08\x12\x07pytorch"
IR = b'<?xml version="1.0"?>\n<net name="Model0" version="11">'


@pytest.fixture
def installed(monkeypatch):
    """Decide which packages there are."""
    return lambda *packages: monkeypatch.setattr(graphs, "is_installed", lambda package: package in packages)


def written(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("packages", "chosen"),
    [(("onnxruntime",), "onnx"), (("openvino",), "openvino"), (("onnxruntime", "openvino"), "onnx")],
)
def test_an_onnx_file_is_found_by_suffix_and_by_content(packages, chosen, installed, tmp_path, neuron_machine):
    installed(*packages)
    for model in (written(tmp_path / "model", ONNX), written(tmp_path / "a.ONNX", b"?"), "not/there.onnx"):
        assert automatic([model]).name == automatic([str(model)] * 2).name == chosen
        assert not AsyncDataParallel(model, example_inputs=X)._life.program.compiled  # it takes any number of rows


def test_an_openvino_file_is_found_by_suffix_and_by_content(installed, tmp_path):
    installed("onnxruntime", "openvino")
    for model in (written(tmp_path / "model", IR), written(tmp_path / "a.xml", b"<net>"), "not/there.xml"):
        assert automatic([model]).name == automatic([model, "m.onnx"]).name == "openvino"
        assert not AsyncDataParallel(model, example_inputs=X)._life.program.compiled


def test_a_script_stays_one_whatever_its_name(tmp_path):
    torch.jit.trace(NET, X).save(tmp_path / "net.onnx")
    assert automatic([tmp_path / "net.onnx"]).name not in ("onnx", "openvino")


@pytest.mark.parametrize(
    ("backend", "model", "words"),
    [
        ("onnx", "m.onnx", r"backend='onnx' needs ONNX Runtime: pip install 'aneuron\[onnx\]'"),
        ("openvino", NET, r"backend='openvino' needs OpenVINO: pip install 'aneuron\[openvino\]'"),
        ("auto", "m.xml", r"backend='openvino' needs OpenVINO: pip install 'aneuron\[openvino\]'"),
        ("auto", "m.onnx", r"neither ONNX Runtime nor OpenVINO.*'aneuron\[onnx\]' or 'aneuron\[openvino\]'"),
    ],
)
async def test_a_package_that_is_missing_is_said_with_the_extra(backend, model, words, installed):
    installed()
    with pytest.raises(ModuleNotFoundError, match=words):
        await AsyncDataParallel(model, backend=backend, example_inputs=X).start()


# device_ids.


def test_cuda_devices_are_named_by_number(monkeypatch):
    FakeCuda(monkeypatch, devices=2)
    ids = parse_device_ids(["cuda:1", "cuda:0"])
    assert choose_cores(CudaBackend(), ids) == [1, 0]
    assert choose_cores(CudaBackend(cores_per_device=2), ids) == [2, 3, 0, 1]
    assert choose_cores(CudaBackend(cores_per_device=2), parse_device_ids([3])) == [3]
    with pytest.raises(DeviceError, match=r"\[2\] are outside"):
        choose_cores(CudaBackend(), parse_device_ids(["cuda:2"]))


@pytest.mark.parametrize("backend", ["cpu", "neuron", SimulatedBackend()], ids=named)
def test_other_backends_have_no_cuda_devices(backend):
    with pytest.raises(DeviceError, match="has no CUDA devices"):
        AsyncDataParallel(NET, device_ids=["cuda:0"], backend=backend)


async def test_auto_finds_out_at_start_that_there_is_no_cuda_device():
    model = AsyncDataParallel(torch.neg, device_ids=["cuda:0"])  # a callable: cpu
    with pytest.raises(DeviceError, match="'cuda:0' with the cpu backend"):
        await model.start()


def test_a_core_named_twice_in_two_ways_is_refused(monkeypatch):
    FakeCuda(monkeypatch, devices=2)
    for each, ids in ((1, ["cuda:0", 0]), (2, ["cuda:0", 1])):
        with pytest.raises(DeviceError, match="more than once"):
            choose_cores(CudaBackend(cores_per_device=each), parse_device_ids(ids))


def test_a_device_named_twice_is_told_how_to_have_two_cores_of_it():
    with pytest.raises(DeviceError, match=r"CudaBackend\(cores_per_device=2\)"):
        AsyncDataParallel(NET, device_ids=["cuda:0", "cuda:0"], backend="cuda")


# Cores that do not load.


class Lame(PuppetBackend):
    """Some cores cannot be loaded; the errors are fatal where the test says so."""

    def __init__(self, cores, lame, fatal=False):
        super().__init__(cores, service_time=0.01)
        self.lame, self.fatal = lame, fatal

    def load(self, model, core_id, batch_size):
        if core_id in self.lame:
            raise OSError(f"core {core_id} is lame")
        return super().load(model, core_id, batch_size)

    def classify(self, error):
        return Fault.FATAL if self.fatal else Fault.INPUT


@scenario
async def test_all_cores_must_load_unless_told_otherwise():
    backend = Lame(4, {2})
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4)
    with pytest.raises(OSError, match="core 2 is lame") as caught:
        await model.start()
    assert "aneuron: while loading core 2 of the puppet backend" in caught.value.__notes__
    assert [core.closed for core in backend.loaded.values()] == [True, True]  # what it took is free again
    assert 3 not in backend.loaded  # and no further one is taken for nothing


@scenario
async def test_with_min_cores_those_that_load_serve(caplog):
    backend = Lame(4, {0, 2})
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=4, min_cores=2) as model:
        assert model.ready
        assert model.num_workers == 4
        assert [core.state for core in model.statistics().cores] == ["quarantined", "ready", "quarantined", "ready"]
        assert [core.errors for core in model.statistics().cores] == [1, 0, 1, 0]
        results = await asyncio.gather(*(model(row(n)) for n in range(40)))
        assert [y[0, 0].item() for y in results] == [-n for n in range(40)]
        assert [bool(core.batches) for core in model.statistics().cores] == [False, True, False, True]
        model.num_workers = 1  # still spread over those that are up
        await asyncio.sleep(0.01)
        await asyncio.gather(*(model(row(n)) for n in range(8)))
        check_sum(model)
    assert "core 0 did not load (quarantined): OSError: core 0 is lame" in caplog.text
    assert "core 2 did not load" in caplog.text
    assert all(core.closed for core in backend.loaded.values())


@scenario
async def test_rows_are_cut_for_the_cores_that_are_up():
    backend = Lame(4, {3})
    async with AsyncDataParallel(torch.neg, backend=backend, min_cores=1) as model:
        await model(row(0, rows=9))
        assert sorted(len(core.executed[0][0][0]) for core in backend.loaded.values()) == [3, 3, 3]


@scenario
async def test_the_start_fails_as_soon_as_too_many_cores_have():
    backend = Lame(4, {0, 1})
    model = AsyncDataParallel(torch.neg, backend=backend, min_cores=3)
    with pytest.raises(OSError, match="core 0 is lame"):  # the first
        await model.start()
    assert not backend.loaded
    assert not model.ready
    backend.lame = {0}
    async with model:  # it may be tried again
        assert [core.state for core in model.statistics().cores] == ["quarantined", "ready", "ready", "ready"]


@scenario
async def test_a_fault_of_the_process_ends_the_start_at_once():
    backend = Lame(4, {0}, fatal=True)
    with pytest.raises(OSError, match="core 0 is lame"):
        await AsyncDataParallel(torch.neg, backend=backend, min_cores=1).start()
    assert not backend.loaded


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2"])
def test_min_cores_is_a_count(value):
    with pytest.raises(ValueError, match="min_cores"):
        AsyncDataParallel(torch.neg, min_cores=value)


@scenario
async def test_more_min_cores_than_there_are():
    with pytest.raises(DeviceError, match=r"min_cores=3, and there are 2 cores to start on: \[0, 1\]"):
        await AsyncDataParallel(torch.neg, backend=PuppetBackend(2), min_cores=3).start()


# Rows as compiled, which nobody has said.


class Cutting(PuppetBackend):
    """Cores that cut and pad batches themselves; files say how many rows they were compiled for."""

    cuts_batches = True

    def __init__(self, known=None):
        super().__init__(2, service_time=0.01)
        self.known, self.loads = known, []

    def compiled_rows(self, model):
        return self.known

    def load(self, model, core_id, batch_size, dynamic_batching):
        self.loads.append((batch_size, dynamic_batching))
        self.loaded[core_id] = PuppetCore(model, core_id, False)
        return self.loaded[core_id]

    @property
    def executed(self):
        return sorted(len(args[0]) for core in self.loaded.values() for args, _ in core.executed)


@scenario
async def test_calls_are_not_packed_where_cores_cut_batches_of_unknown_size():
    backend = Cutting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is the caller told of cores that one row leaves unused
        async with AsyncDataParallel(torch.neg, backend=backend) as model:
            await asyncio.gather(*(model(row(n)) for n in range(3)), model(row(0, rows=5)))
    assert backend.loads == [(None, True)] * 2
    assert backend.executed == [1, 1, 1, 2, 3]


@scenario
async def test_the_backend_may_know_the_compiled_rows():
    backend = Cutting(known=4)
    async with AsyncDataParallel(torch.neg, backend=backend) as model:
        await asyncio.gather(*(model(row(n)) for n in range(4)))
        assert "batch_size=4" in repr(model)
    assert backend.loads == [(4, True)] * 2
    assert backend.executed == [4]


@scenario
async def test_what_the_user_says_wins():
    backend = Cutting(known=4)
    async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2) as model:
        await asyncio.gather(*(model(row(n)) for n in range(4)))
    assert backend.loads == [(2, True)] * 2
    assert backend.executed == [2, 2]


@scenario
async def test_where_every_model_is_compiled_the_example_says_for_how_many_rows_and_for_what():
    backend = Cutting()
    module = torch.nn.ReLU().eval()  # as a wrapper of compiled parts is: no ScriptModule
    async with AsyncDataParallel(module, backend=backend, example_inputs=row(0, rows=2)) as model:
        await asyncio.gather(*(model(row(n)) for n in range(4)))
        with pytest.raises(ShapeError, match="was compiled for"):
            await model(torch.zeros(1, 3))
    assert backend.executed == [2] * 6  # four to warm up


@scenario
async def test_with_batching_off_the_cores_may_not_cut_either():
    backend = Cutting()
    async with AsyncDataParallel(torch.neg, None, 0, False, backend=backend) as model:
        await model(row(0, rows=2))
    assert backend.loads == [(None, False)] * 2
    backend = Cutting()
    model = AsyncDataParallel(torch.neg, None, 1, backend=backend)
    await model.start()
    await model.aclose()
    assert backend.loads == [(None, False)] * 2


@scenario
async def test_a_mapping_says_all_there_is_to_say():
    backend = Cutting(known=16)
    async with AsyncDataParallel({1: torch.neg, 4: torch.neg}, backend=backend) as model:
        assert (await model(row(3)))[0, 0] == -3
    assert [size for size, _ in backend.loads] == [1, 4] * 2


@scenario
async def test_switching_off_what_the_cores_do_themselves_comes_too_late_after_the_start():
    backend = Cutting()
    async with AsyncDataParallel(torch.neg, backend=backend) as model:
        with pytest.warns(UserWarning, match="before start"):
            model.disable_dynamic_batching()
        model.disable_dynamic_batching()  # once


@scenario
async def test_without_an_example_the_log_says_that_nothing_is_warmed_up(caplog):
    async with AsyncDataParallel(torch.neg, backend=Cutting(), batch_size=2):
        assert "there are no example_inputs" in caplog.text
