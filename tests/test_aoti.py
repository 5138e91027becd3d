"""AOTInductor packages: what is said of them here, and how engines run them. One is compiled, for all tests."""

import importlib.util
import json
import os
import shutil
import warnings
import zipfile

import pytest
import torch

from aneuron import AsyncDataParallel, CpuBackend, Pool, ShapeError
from aneuron.backends import aoti, automatic
from aneuron.backends.cpu import open_model

CAN = importlib.util.find_spec("torch.export.pt2_archive") is not None and shutil.which("g++") is not None
pytestmark = pytest.mark.xdist_group("aoti")  # one process compiles
compiles = pytest.mark.skipif(not CAN, reason="needs PyTorch 2.8 and g++")


class Both(torch.nn.Module):
    """In float32 and in bfloat16."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Parameter(torch.arange(4.0) - 1.5)
        self.narrow = torch.nn.Parameter(torch.arange(4.0).bfloat16() - 1.5)

    def forward(self, x, z):
        return {"full": torch.relu(self.wide * x), "half": torch.relu(self.narrow * z)}


def rows(number, seed=0):
    torch.manual_seed(seed)
    return torch.randn(number, 4), torch.randn(number, 4).bfloat16()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The path of a package for 2 to 64 rows: it refuses one, also where 1 is said to be the least."""
    folder = tmp_path_factory.mktemp("package")
    path = str(folder / "both.pt2")
    free = {0: torch.export.Dim("batch", min=2, max=64)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        program = torch.export.export(Both().eval(), rows(4), dynamic_shapes=(free, free))
        options = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return path


@pytest.fixture
def engine(monkeypatch):
    """This process is as an engine is."""
    monkeypatch.setattr(aoti, "_runners", 0)
    monkeypatch.setattr(aoti, "_loaded", None)
    monkeypatch.setenv(aoti.CHECKS, "0")
    aoti.serve_here(2)


def stub(path, **metadata):
    """What looks like a package from outside."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/archive_format", "pt2")
        archive.writestr("p/data/aotinductor/model/x.wrapper_metadata.json", json.dumps(metadata))
    return str(path)


async def test_in_this_process_it_is_refused_and_who_serves_it_is_named(tmp_path):
    path = stub(tmp_path / "model.pt2", AOTI_DEVICE_KEY="cpu")
    with pytest.raises(ValueError, match=r"engines only.*holds the interpreter.*Pool\(backend='cpu', processes=n\)"):
        await AsyncDataParallel(path, backend=CpuBackend(cores=1), batch_size=8).start()


async def test_auto_takes_the_cpu_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert automatic([stub(tmp_path / "model.pt2")]).name == "cpu"


async def test_one_for_another_device_is_refused(tmp_path, engine):
    with pytest.raises(ValueError, match=r"compiled for cuda.*compile the program on its CPU"):
        open_model(stub(tmp_path / "model.pt2", AOTI_DEVICE_KEY="cuda"))


async def test_one_that_does_not_load_says_so(tmp_path, engine):
    with pytest.raises(ValueError, match=r"PyTorch .* cannot load here: compile it again"):
        open_model(stub(tmp_path / "model.pt2", AOTI_DEVICE_KEY="cpu"))


@compiles
async def test_it_is_loaded_once_with_checks_on_and_leaves_nothing_outside(package, engine):
    assert os.environ[aoti.CHECKS] == "1"
    model = open_model(package)
    assert open_model(package) is model
    assert not any(os.path.exists(path) for path in aoti._mapped())
    x, z = rows(5)
    expected = Both()(x, z)
    one, other = model(x, z), model(x.t().contiguous().t(), z)
    for name, y in one.items():
        torch.testing.assert_close(y, expected[name])
        torch.testing.assert_close(other[name], y)
        assert y.untyped_storage().data_ptr() != other[name].untyped_storage().data_ptr()


@compiles
async def test_a_second_one_in_a_process_is_refused(package, engine, tmp_path):
    first = open_model(package)
    second = shutil.copy(package, tmp_path / "second.pt2")
    with pytest.raises(ValueError, match=r"has loaded '.*both.pt2' already.*one AOTInductor package.*of its own"):
        open_model(second)
    assert open_model(package) is first


@compiles
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((torch.ones(2, 4), 3), "input 1 is 3, no tensor"),
        ((torch.ones(2, 4), None), "input 1 is None, no tensor"),
        ((torch.ones(2, 4),), "compiled for"),
        ((*rows(2), torch.ones(2)), "compiled for"),
        ((torch.ones(2, 4).double(), rows(2)[1]), "unmatched dtype"),
        ((torch.ones(2, 5), rows(2)[1]), "unmatched dim value at 1"),
        ((torch.ones(65, 4), rows(65)[1]), "too large at 0"),
        (rows(1), "too small at 0"),
    ],
    ids=[
        "a number",
        "None",
        "one too few",
        "one too many",
        "another dtype",
        "another width",
        "too many rows",
        "too few rows",
    ],
)
async def test_what_it_was_not_compiled_for_is_refused(package, engine, args, says, capfd):
    model = open_model(package)
    with pytest.raises(ShapeError, match=says):
        model(*args)
    assert model(*rows(2))["full"].shape == (2, 4)


@compiles
async def test_how_many_rows_it_takes_must_be_said_and_its_dtype_is_its_own(package, engine):
    with pytest.raises(ValueError, match=r"does not say how many rows.*batch_size=.*\{2: path, 8: path"):
        await AsyncDataParallel(package, backend=CpuBackend(cores=1)).start()
    model = AsyncDataParallel(package, backend=CpuBackend(cores=1, dtype=torch.bfloat16), example_inputs=rows(4))
    with pytest.raises(ValueError, match="leave dtype= out"):
        await model.start()


@compiles
async def test_engines_serve_it(package):
    """Several sizes of one package; results as the module's, of calls that are cut and of such that are padded."""
    net = Both().eval()
    async with Pool(backend=CpuBackend(cores=2), processes=2) as pool:
        sizes = {2: package, 8: package}
        async with AsyncDataParallel(sizes, pool=pool, example_inputs=rows(4)) as model:
            for number in (1, 3, 8, 21):
                x, z = rows(number, number)
                expected, found = net(x, z), await model(x, z)
                for name, y in found.items():
                    torch.testing.assert_close(y, expected[name])
            with pytest.raises(ShapeError):
                await model(torch.ones(2, 5), rows(2)[1])
        with pytest.raises(ValueError, match="does not say how many rows"):
            await AsyncDataParallel(package, pool=pool).start()
