"""Exported programs: as files, objects and modules, on virtual cores."""

import asyncio
import copy
import gc
import io
import json
import pickle
import threading
import warnings
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim

from aneuron import AsyncDataParallel, Buckets, CpuBackend, Fault, ShapeError, Shared, SimulatedBackend
from aneuron.backends import automatic, cpu
from aneuron.backends.exported import Inputs, Size, inputs_of, is_module, load_program, module_on
from aneuron.sched.sizes import Range

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's own, of its own code
]


class Net(nn.Module):
    """Row-wise, with a buffer and a constant; it says how many rows it sees."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("offset", torch.ones(2))
        self.constant = torch.full((2,), 2.0)

    def forward(self, x):
        rows = torch.ones(x.shape[0], 1) * x.shape[0]
        return self.dropout(self.linear(x)) + self.offset * self.constant, rows


class Tagger(nn.Module):
    """Rows and length are dynamic; the output carries the length."""

    def forward(self, ids, mask):
        return ids.float() * mask


NET = Net().eval()


@pytest.fixture(scope="module")
def export():
    """Programs of `NET` for so many rows, or a range of them; each made once."""
    made = {}

    def program(rows, example=None):
        key = rows if isinstance(rows, int) else (rows.__name__, rows.min, rows.max)
        if key not in made:
            shapes = None if isinstance(rows, int) else ({0: rows},)
            count = rows if isinstance(rows, int) else min(max(4, rows.min), rows.max)
            made[key] = torch.export.export(NET, (torch.rand(count, 3),), dynamic_shapes=shapes)
        return made[key]

    return program


def between(low, high):
    return Dim("batch", min=low, max=high)


@pytest.fixture(scope="module")
def tagger():
    rows, length = between(1, 16), Dim("length", min=2, max=32)
    example = torch.ones(4, 8, dtype=torch.long), torch.ones(4, 8)
    free = {0: rows, 1: length}
    return torch.export.export(
        Tagger(), (example[0],), {"mask": example[1]}, dynamic_shapes={"ids": free, "mask": free}
    )  # fmt: skip


def saved(program, path):
    torch.export.save(program, path)
    return path


def one_core(model, **settings):
    return AsyncDataParallel(model, backend=CpuBackend(cores=1), **settings)


async def answers(model, *calls):
    """What the calls, made at once, return."""
    async with model:
        return await asyncio.gather(*[model(x) for x in calls])


def expected(x):
    with torch.no_grad():
        return NET(x)[0]


# What is given.


@pytest.mark.parametrize("kind", ["path", "another name", "object", "module", "copied module"])
async def test_it_is_served_in_whatever_form_it_is_given(kind, export, tmp_path):
    program = export(between(1, 8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        model = {
            "path": lambda: saved(program, tmp_path / "model.pt2"),
            "another name": lambda: str(saved(program, tmp_path / "model.pt2").rename(tmp_path / "model.bin")),
            "object": lambda: program,
            "module": program.module,
            "copied module": lambda: copy.deepcopy(program.module()),
        }[kind]()
    x = torch.rand(20, 3)
    served = AsyncDataParallel(model, backend=CpuBackend(cores=2))
    ((whole, rows), (one, _)) = await answers(served, x, x[:1])
    torch.testing.assert_close(whole, expected(x))
    torch.testing.assert_close(one, expected(x[:1]))
    assert rows.max() <= 8


async def test_it_may_be_one_of_several_models_by_size(export, tmp_path):
    models = {4: saved(export(4), tmp_path / "4.pt2"), 8: export(between(2, 8))}
    ((y, rows),) = await answers(one_core(models), torch.ones(3, 3))
    assert y.shape == (3, 2)
    assert rows.tolist() == [[4.0]] * 3
    with pytest.raises(ValueError, match=r"batch_size=9.*2 to 8 rows"):
        await one_core({9: export(between(2, 8))}).start()


async def test_two_loads_at_once_do_not_meet(export, tmp_path):
    """`torch.export.load` in a second thread raises, as it is."""
    paths = [saved(export(between(1, 8)), tmp_path / f"{n}.pt2") for n in range(4)]
    models = [AsyncDataParallel(path, backend=CpuBackend(cores=2)) for path in paths]
    await asyncio.gather(*[model.start() for model in models])
    for model in models:
        await model.aclose()


async def test_a_file_is_read_once_for_all_cores_and_not_kept(export, tmp_path, monkeypatch):
    path, loads = saved(export(between(1, 8)), tmp_path / "model.pt2"), []
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda file: loads.append(file) or load(file))
    model = AsyncDataParallel(path, backend=CpuBackend(cores=3))
    async with model:
        assert len(loads) == 1
    gc.collect()
    assert not [module for module in cpu._loaded.values() if is_module(module)]
    async with model:
        assert len(loads) == 2


async def test_cores_share_the_parameters_and_nothing_else(export):
    program = export(between(1, 8))
    cores = [CpuBackend(cores=2).load(program, core, None) for core in range(2)]
    mine, other = (core._model._module for core in cores)
    weights = {each.data_ptr() for each in program.state_dict.values() if isinstance(each, nn.Parameter)}
    assert {each.data_ptr() for each in mine.parameters()} == weights
    assert {each.data_ptr() for each in other.parameters()} == weights
    assert not {each.data_ptr() for each in mine.buffers()} & {each.data_ptr() for each in other.buffers()}


async def test_it_can_be_pickled_with_its_model(export):
    model = pickle.loads(pickle.dumps(one_core(export(between(1, 8)))))
    ((y, _),) = await answers(model, torch.ones(1, 3))
    torch.testing.assert_close(y, expected(torch.ones(1, 3)))


async def test_simulated_cores_answer_with_it(export):
    served = AsyncDataParallel(export(4), backend=SimulatedBackend(cores=1, service_time=0.001))
    ((y, rows),) = await answers(served, torch.ones(2, 3))
    assert y.shape == (2, 2)
    assert rows.tolist() == [[4.0]] * 2


# Rows.


async def test_a_static_program_is_packed_and_padded_to_its_rows(export):
    model = one_core(export(4))
    results = await answers(model, torch.ones(1, 3), torch.ones(3, 3), torch.ones(9, 3))
    assert [len(y) for y, _ in results] == [1, 3, 9]
    assert {rows.unique().item() for _, rows in results} == {4.0}
    assert "batch_size=4" in repr(model)


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize(("low", "high"), [(1, 8), (2, 8), (5, 8), (1, 2), (2, 3), (1, 1000)])
@pytest.mark.parametrize("settings", [{}, {"split_size": 50}, {"example_inputs": torch.ones(1, 3)}], ids=str)
async def test_every_execution_has_rows_of_the_range(low, high, settings, export, monkeypatch):
    program, seen = export(between(low, high)), []
    forward = CpuBackend(cores=1).load(program, 0, None).__class__.execute

    def execute(core, args, kwargs):
        seen.append(len(args[0]))
        return forward(core, args, kwargs)

    monkeypatch.setattr(cpu.CpuCore, "execute", execute)
    sizes = (1, 1, 3, 7, 20, 9, 1, 61)
    inputs = [torch.rand(size, 3) for size in sizes]
    results = await answers(AsyncDataParallel(program, backend=CpuBackend(cores=2), **settings), *inputs)
    for x, (y, _) in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, expected(x))
    assert low <= min(seen)
    assert max(seen) <= high


async def test_a_batch_size_within_the_range_is_taken_and_another_one_is_refused(export):
    program = export(between(2, 8))
    ((_, rows),) = await answers(one_core(program, batch_size=6), torch.ones(1, 3))
    assert rows.item() == 6.0
    for batch_size, words in ((1, "2 to 8"), (9, "2 to 8")):
        with pytest.raises(ValueError, match=rf"batch_size={batch_size}.*{words} rows.*torch\.export\.Dim"):
            await one_core(program, batch_size=batch_size).start()
    with pytest.raises(ValueError, match=r"batch_size=8.*exactly 4 rows.*min=4, max=8"):
        await one_core(export(4), batch_size=8).start()


async def test_rows_that_are_computed_need_a_batch_size():
    half = between(1, 8)
    program = torch.export.export(nn.ReLU(), (torch.ones(6, 3),), dynamic_shapes=({0: 2 * half},))
    with pytest.raises(ValueError, match=r"2\*.* rows.*batch_size="):
        await one_core(program).start()
    (y,) = await answers(one_core(program, batch_size=6), torch.ones(5, 3))
    assert y.shape == (5, 3)


async def test_without_dynamic_batching_the_pieces_must_be_in_the_range(export):
    async with one_core(export(between(2, 8)), set_dynamic_batching=False) as model:
        assert (await model(torch.ones(8, 3)))[0].shape == (8, 2)
        for rows in (1, 9):
            with pytest.raises(ShapeError, match=rf"{rows} rows / 1 cores = {rows}.*2 to 8"):
                await model(torch.ones(rows, 3))


async def test_the_example_of_a_file_does_not_fix_the_rows_of_a_program(export, tmp_path):
    path = saved(export(between(1, 8)), tmp_path / "model.pt2")
    ((_, rows),) = await answers(one_core(path, example_inputs=torch.ones(5, 3)), torch.ones(2, 3))
    assert rows.unique().item() == 2.0
    path = saved(export(4), path)
    ((_, rows),) = await answers(one_core(path, example_inputs=torch.rand(5, 3)), torch.ones(2, 3))
    assert rows.unique().item() == 4.0


async def test_rows_may_stand_in_another_dimension():
    program = torch.export.export(nn.ReLU(), (torch.ones(3, 4),), dynamic_shapes=({1: between(1, 8)},))
    async with AsyncDataParallel(program, dim=1, backend=CpuBackend(cores=2)) as model:
        assert (await model(torch.ones(3, 10))).shape == (3, 10)
        with pytest.raises(ShapeError, match="1 to 8"):
            await model(torch.ones(3, 30))
        with pytest.raises(ShapeError, match=r"shape \(4, 10\).*exactly 3 along dim 0"):
            await model(torch.ones(4, 10))


# Evidence, swaps.


async def test_evidence_is_taken_on_the_rows_that_it_takes(export, caplog):
    for rows in (4, between(2, 3), between(5, 8)):
        model = one_core(export(rows), example_inputs=torch.rand(1, 3))
        ((y, _), _) = await answers(model, torch.rand(2, 3), torch.rand(1, 3))
        assert y.shape == (2, 2)
    assert "refused" not in caplog.text


async def test_a_swap_to_and_from_an_exported_program(export, tmp_path):
    example = torch.ones(4, 3)
    path = saved(export(4), tmp_path / "model.pt2")
    async with one_core(export(between(1, 8)), example_inputs=example) as model:
        await model.swap(NET)
        await model.swap(export(between(2, 8)))
        assert (await model(torch.ones(1, 3)))[1].item() == 2.0
        await model.swap(export(between(1, 8)).module())
        assert (await model(torch.ones(1, 3)))[1].item() == 1.0
        with pytest.raises(ShapeError, match=r"compiled for \[\(4, 0\)\]"):
            await model.swap(path)
    script = torch.jit.trace(NET, example)
    async with one_core(script, example_inputs=example) as model:
        await model.swap(path)
        await model.swap(export(between(2, 8)))  # padded to the rows of the old one
        y, _ = await model(torch.ones(1, 3))
        torch.testing.assert_close(y, expected(torch.ones(1, 3)))
        with pytest.raises(ValueError, match=r"batch_size=4.*5 to 8"):
            await model.swap(export(between(5, 8)))


# What it takes.


async def test_inputs_that_it_was_not_exported_for_are_refused_before_any_batch(tagger):
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5)
    async with one_core(tagger) as model:
        assert (await model(ids, mask=mask)).shape == (2, 5)
        assert (await model(ids[:, :2].numpy(), mask=mask[:, :2])).shape == (2, 2)
        before = model.statistics().calls.accepted
        wide = torch.ones(1, 40, dtype=torch.long)
        for args, kwargs, words in (
            ((wide,), {"mask": torch.ones(1, 40)}, r"input 0 has shape \(1, 40\).*2 to 32 along dim 1.*wider range"),
            ((ids[:, :1],), {"mask": mask[:, :1]}, r"input 0 has shape \(2, 1\).*2 to 32 along dim 1"),
            ((ids,), {"mask": mask[:, :4]}, r"input 'mask', dim 1 has size 4 and input 0, dim 1 5.*equal"),
            ((ids,), {"mask": mask.double()}, r"input 'mask' has dtype torch\.float64.*torch\.float32"),
            ((ids,), {"mask": mask[..., None]}, r"input 'mask' has shape \(2, 5, 1\).*2 dimensions, of sizes 1 to"),
        ):
            with pytest.raises(ShapeError, match=words):
                await model(*args, **kwargs)
        assert model.statistics().calls.accepted == before
        assert model.statistics().cores[0].state == "ready"


async def test_lengths_of_its_own_share_no_batch_and_are_all_answered(tagger):
    async with one_core(tagger) as model:
        lengths = [2, 3, 7, 32, 3]
        results = await asyncio.gather(
            *[model(torch.full((2, n), n), mask=torch.ones(2, n)) for n in lengths]
        )  # fmt: skip
    assert [y.shape[1] for y in results] == lengths
    assert [y[0, 0].item() for y in results] == lengths


async def test_buckets_within_the_range_of_lengths(tagger):
    buckets = Buckets(dim=1, sizes=(8, 16), pad=0)
    async with one_core(tagger, buckets=buckets, batch_size=4) as model:
        y = await model(torch.ones(1, 5, dtype=torch.long), mask=torch.ones(1, 5))
        assert y.tolist() == [[1.0] * 5]
    buckets = Buckets(dim=1, sizes=(64,), pad=0)
    async with one_core(tagger, buckets=buckets) as model:
        with pytest.raises(ShapeError, match=r"shape \(1, 64\).*2 to 32 along dim 1"):
            await model(torch.ones(1, 50, dtype=torch.long), mask=torch.ones(1, 50))
        assert model.statistics().cores[0].state == "ready"


async def test_a_table_for_all_rows():
    class Nearest(nn.Module):
        def forward(self, x, table):
            return torch.cdist(x, table).argmin(1)

    shapes = ({0: between(2, 8)}, None)
    program = torch.export.export(Nearest(), (torch.ones(4, 1), torch.ones(3, 1)), dynamic_shapes=shapes)
    table = torch.tensor([[0.0], [10.0], [20.0]])
    async with one_core(program) as model:
        calls = [model(torch.tensor([[x]]), Shared(table)) for x in (1.0, 19.0)]
        assert [y.item() for y in await asyncio.gather(*calls)] == [0, 2]
        with pytest.raises(ShapeError, match=r"input 1.* exactly 1 along dim 1"):
            await model(torch.ones(1, 1), Shared(torch.ones(3, 2)))


async def test_a_module_around_one_has_its_guards_explained(export):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = export(between(1, 8)).module()

        def forward(self, x):
            return self.inner(x)[0]

    async with one_core(Around()) as model:  # neither warned of its mode nor told to eval()
        assert (await model(torch.ones(2, 3))).shape == (2, 2)
        with pytest.raises(ShapeError, match=r"exported for: Guard failed"):
            await model(torch.ones(20, 3))
        assert CpuBackend(cores=1).classify(ShapeError()) is Fault.INPUT


async def test_rows_are_read_from_all_inputs():
    free, fixed = (Size(Range(2, 64), "s0"), Size(Range(3, 3), "")), (Size(Range(10, 10), ""),)
    other, computed = (Size(Range(4, None), "s1"),), (Size(Range(2, 8), "2*s0", True),)

    def rows(*leaves, dim=0):
        return Inputs(None, tuple((torch.float32, each) if each else None for each in leaves), None).rows(dim)

    assert rows(free).range == Range(2, 64)
    assert rows(free, fixed, None).range == Range(2, 64)  # a table
    assert rows(free, other).range == Range(4, 64)
    assert rows(free, computed).derived
    assert rows(fixed, fixed).range == Range(10, 10)
    assert rows(fixed, (Size(Range(3, 3), ""),)) is None
    assert rows(free, dim=1).range == rows(free, dim=-1).range == Range(3, 3)
    assert rows(fixed, dim=1) is None
    assert rows((Size(Range(2, 3), "a"),), (Size(Range(5, 6), "b"),)) is None


async def test_other_graphs_are_no_programs():
    traced = torch.fx.symbolic_trace(nn.ReLU())
    assert not is_module(traced)
    assert inputs_of(traced) is None


# Files that cannot be loaded.


def rewritten(path, change):
    """An archive with the text of its program changed."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            if name.endswith("models/model.json"):
                said = json.loads(content)
                change(said)
                content = json.dumps(said).encode()
            archive.writestr(name, content)


def newer(said):
    said["schema_version"]["major"] += 1
    said["torch_version"] = "3.1.0+cpu"


def of_others(said):
    node = said["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.ops.other_package.operator.default"


@pytest.mark.filterwarnings("ignore")
async def test_a_file_of_a_newer_torch_says_so(export, tmp_path):
    path = saved(export(between(1, 8)), tmp_path / "model.pt2")
    rewritten(path, newer)
    words = rf"model\.pt2.*PyTorch 3\.1\.0\+cpu \(schema 9\.\d+\).*{torch.__version__[:4]}"
    with pytest.raises(ValueError, match=words) as told:
        await one_core(path).start()
    assert "install PyTorch 3.1.0 or newer, or export it again" in str(told.value)
    rewritten(saved(export(between(1, 8)), path), of_others)
    with pytest.raises(ValueError, match="operators of other packages, import these first"):
        await one_core(path).start()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
async def test_a_truncated_file_of_any_format_says_so(share, export, tmp_path):
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(2, 3)), script)
    program = io.BytesIO()
    torch.export.save(export(between(1, 8)), program)
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("p/archive_format", "pt2")
        archive.writestr("p/data/aotinductor/model/x.so", bytes(1000))
    for name, whole in (("script.pt", script), ("program.pt2", program), ("package.pt2", package)):
        path = tmp_path / name
        path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
        with pytest.raises(ValueError, match=rf"{name}' is (a damaged or incomplete archive|an empty file)"):
            await one_core(path).start()


async def test_a_file_with_a_broken_byte_says_so(export, tmp_path):
    path = saved(export(between(1, 8)), tmp_path / "model.pt2")
    data = bytearray(path.read_bytes())
    at = data.index(b"graph_module")
    data[at : at + 5] = b"\0\0\0\0\0"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.pt2' is a damaged or incomplete archive"):
        await one_core(path).start()


async def test_an_archive_of_programs_by_other_names_says_which(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.pt2", "w") as archive:
        for name in ("archive_format", "models/encoder.json", "models/decoder.json"):
            archive.writestr(f"p/{name}", "{}")
    with pytest.raises(ValueError, match=r"holds decoder, encoder.*pass the ExportedProgram"):
        load_program(tmp_path / "two.pt2")


# AOTInductor.


async def test_a_compiled_package_is_refused_here_with_the_reason_as_a_file_and_loaded(tmp_path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/archive_format", "pt2")
        archive.writestr("p/data/aotinductor/model/x.so", b"\x7fELF")
    words = r"is an AOTInductor package.*holds the interpreter.*end the process.*pass the exported program"
    with pytest.raises(ValueError, match=words):
        await one_core(path).start()
    package = pytest.importorskip("torch.export.pt2_archive._package")
    with pytest.raises(ValueError, match=words):
        AsyncDataParallel(package.AOTICompiledModel(None))


# Which backend.


async def test_auto_takes_it_for_a_module(export, tmp_path, monkeypatch):
    program, path = export(4), saved(export(4), tmp_path / "model.pt2")
    assert automatic([program]).name == automatic([path]).name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert automatic([program]).name == automatic([path]).name == "cuda"


async def test_the_lock_is_the_process_s(export, tmp_path):
    path, errors = saved(export(4), tmp_path / "model.pt2"), []

    def load():
        try:
            module_on(load_program(path))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


async def test_ranges_in_words():
    assert [str(each) for each in (Range(4, 4), Range(2), Range(1, 8))] == ["exactly 4", "2 or more", "1 to 8"]
    assert Range(1, 2).trials() == [1, 2]
    assert Range(5, 9).trials() == [5, 6]
    assert Range(2, 64).trials() is None
