"""What is compiled is what lies there; where nothing is compiled, the same runs as Python."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import aneuron._native
from aneuron import AsyncDataParallel, SimulatedBackend
from aneuron._native import choose
from aneuron._native.sources import FOLDER, MANIFEST, SUFFIX, digests, modules

ROOT = Path(__file__).parent.parent
SMALL = {
    "aneuron/__init__.py": "import aneuron._native\n",
    "aneuron/py.typed": "",
    "aneuron/sched/__init__.py": "",
    "aneuron/sched/shared.py": """\
class Counter:
    def __init__(self):
        self.count = 1

    def square(self) -> str:
        self.count *= self.count
        return self.count

    def of(self, other):
        return other.count
""",
    "aneuron/sched/shared.pxd": """\
cdef class Counter:
    cdef public long long count
    cpdef long long square(self)
    cpdef long long of(self, Counter other)
""",
    "aneuron/sched/user.py": "from aneuron.sched.shared import Counter\n\n\ndef count():\n    return Counter().count\n",
    "aneuron/sched/user.pxd": "from aneuron.sched.shared cimport Counter\n",
    "aneuron/_quick.pyx": "from libc.string cimport strlen\n\n\ndef length(char *text):\n    return strlen(text)\n",
    "aneuron/_quick.py": "def length(text):\n    return len(text)\n",
}
LOOK = """
import json
from aneuron import _native, _quick
from aneuron.sched import shared, user
files = [module.__file__.rpartition(".")[2] for module in (_quick, shared, user)]
names = [shared.Counter.__module__, user.count.__module__, _quick.length.__module__]
print(json.dumps([_native.why_pure, files, names, user.count(), _quick.length(b"four")]))
"""
NAMES = ["aneuron.sched.shared", "aneuron.sched.user", "aneuron._quick"]

pytestmark = pytest.mark.xdist_group("native")  # one worker makes the wheel


def run(folder, *arguments, **changes):
    """Run Python in a folder, from which it imports first."""
    dropped = ("ANEURON_PURE", "PYTHONPATH", "CC")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    environment = {**kept, "CFLAGS": "-O0 -g0", **changes}  # what is compiled here need not be fast
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def tree(folder):
    """A small package of the same name, with what builds the real one."""
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in SMALL.items():
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text(text)
    ignored = shutil.ignore_patterns("compiled", "__pycache__")
    shutil.copytree(ROOT / "aneuron/_native", folder / "aneuron/_native", ignore=ignored)
    return folder


def wheel(source, **changes):
    """The wheel of a folder, and what its build said."""
    done = run(source, "-m", "hatchling", "build", "-t", "wheel", **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = source.joinpath("dist").glob("*.whl")
    return made, done.stdout + done.stderr


def compile_again(source, **changes):
    return run(source, "aneuron/_native/build.py", **changes)


def change(file):
    with file.open("a") as opened:
        opened.write("\n# changed\n")


def look(folder, **changes):
    done = run(folder, "-c", LOOK, **changes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def unpacked(made, folder):
    zipfile.ZipFile(made).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A wheel with extensions, made from an unpacked source distribution, in a folder of another name."""
    source = tree(tmp_path_factory.mktemp("checkout"))
    if tried := run(source, "aneuron/_native/build.py", "--try").stderr:
        pytest.skip(tried.splitlines()[-1])
    assert run(source, "-m", "hatchling", "build", "-t", "sdist").returncode == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (archive,) = source.joinpath("dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(elsewhere, filter="data")
    (inner,) = elsewhere.iterdir()
    made, said = wheel(inner)
    return inner, made, said, unpacked(made, tmp_path_factory.mktemp("installed"))


@pytest.fixture
def installed(built, tmp_path):
    return shutil.copytree(built[3], tmp_path / "installed")


# Which are compiled.


def test_every_source_with_declarations_and_every_pyx_is_compiled(tmp_path):
    sources = digests(tree(tmp_path) / "aneuron")
    assert list(sources) == ["_quick.pyx", *(f"sched/{n}.{e}" for n in ("shared", "user") for e in ("pxd", "py"))]
    assert set(modules(sources)) == set(NAMES)


def test_what_is_compiled_is_used_here():
    """`make test` has compiled it, where there is a compiler."""
    folder = ROOT / "aneuron" / FOLDER
    chosen, why = choose(ROOT / "aneuron", None)
    if not folder.joinpath(MANIFEST).exists() or "failed" in json.loads(folder.joinpath(MANIFEST).read_text()):
        pytest.skip(why)
    assert why is None, why
    assert set(chosen) == set(modules(digests(ROOT / "aneuron")))


def test_no_extension_lies_beside_its_source():
    """Python would import it, whatever it was made from."""
    assert [path for path in (ROOT / "aneuron").rglob(f"*{SUFFIX}") if "compiled" not in path.parts] == []


# Wheels.


def test_a_wheel_holds_extensions_for_one_python(built):
    _, made, said, _ = built
    assert "compiling 3 of 3 modules" in said
    assert "none-any" not in made.name
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in made.name
    names = {name for name in zipfile.ZipFile(made).namelist() if "dist-info" not in name}
    folder = f"aneuron/{FOLDER}"
    made_here = {f"{folder}/{name}{SUFFIX}" for name in ("_quick", "sched/shared", "sched/user")}
    kept = set(SMALL) | {"aneuron/_native/__init__.py", "aneuron/_native/sources.py"}
    assert names == made_here | kept | {f"{folder}/{MANIFEST}"}


def test_extensions_are_imported_under_the_names_of_their_sources(built):
    assert look(built[3]) == [None, [SUFFIX.rpartition(".")[2]] * 3, NAMES, 1, 4]


@pytest.mark.parametrize(
    "changes", [{"CC": "/bin/false"}, {"CC": "no-such-compiler", "PATH": ""}, {"ANEURON_PURE": "1"}]
)
def test_without_a_compiler_a_wheel_is_for_any_python_and_works(tmp_path, changes):
    made, said = wheel(tree(tmp_path), **changes)
    assert made.name.endswith("-py3-none-any.whl")
    assert "will run as Python" in said
    assert ("ANEURON_PURE=1" in said) if "ANEURON_PURE" in changes else (f"{changes['CC']} does not compile" in said)
    why, files, *rest = look(unpacked(made, tmp_path / "installed"))
    assert why == "it was not compiled for this Python"
    assert files == ["py"] * 3
    assert rest == [NAMES, 1, 4]


def test_an_editable_install_finds_extensions_in_place(built):
    build = "import hatchling.build; print(hatchling.build.build_editable('dist/editable'))"
    done = run(built[0], "-c", build)
    assert done.stdout.endswith("-py3-none-any.whl\n"), done.stderr
    assert "of 3 modules" in done.stderr
    assert look(built[0])[0] is None


def test_what_must_be_compiled_and_cannot_be_is_an_error(tmp_path):
    done = compile_again(tree(tmp_path), ANEURON_PURE="0", CC="/bin/false")
    assert done.returncode == 1
    assert "ANEURON_PURE=0, and there is no compiler" in done.stderr


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        ("counter.square()", "9"),  # not a str, as its annotation has it
        ("counter.of(None)", "AttributeError: 'NoneType' object has no attribute 'count'"),
        ("counter.of(other=counter)", "3"),
        ("counter.of(3)", "TypeError: Argument 'other' has incorrect type"),
        ("setattr(counter, 'count', 2**40), counter.square()", "OverflowError: value too large"),
    ],
)
def test_compiled_code_is_right_or_raises(built, call, outcome):
    done = run(
        built[3], "-c", f"from aneuron.sched.shared import *\ncounter = Counter()\ncounter.count = 3\nprint({call})"
    )
    assert (done.stdout + done.stderr).splitlines()[-1].startswith(outcome)


# What runs.


@pytest.mark.parametrize("value", ["", "0"])
def test_compiled_modules_run_unless_told_otherwise(built, value):
    assert look(built[3], ANEURON_PURE=value)[0] is None


def test_python_runs_if_told_so(built):
    why, files, *rest = look(built[3], ANEURON_PURE="1")
    assert (why, files, rest) == ("ANEURON_PURE=1", ["py"] * 3, [NAMES, 1, 4])


def test_a_changed_source_runs_as_it_is_and_all_others_with_it(installed):
    source = installed / "aneuron/sched/shared.py"
    source.write_text(source.read_text().replace("= 1", "= 2"))
    why, files, _, count, _ = look(installed)
    assert "sched/shared.py changed since it was compiled" in why
    assert files == ["py"] * 3
    assert count == 2


@pytest.mark.parametrize("name", ["sched/shared.pxd", "_quick.pyx", "sched/new.pyx", "declared.pxd"])
def test_changed_declarations_and_new_sources_count_too(installed, name):
    change(installed / "aneuron" / name)
    assert look(installed)[0].startswith(f"{name} changed since it was compiled")


def test_a_source_that_is_gone_counts_too(installed):
    installed.joinpath("aneuron/sched/user.pxd").unlink()
    assert look(installed)[0].startswith("sched/user.pxd and 1 more changed since")


def test_an_extension_that_is_gone_leaves_all_to_python(installed):
    installed.joinpath("aneuron", FOLDER, f"_quick{SUFFIX}").unlink()
    why, files, *_ = look(installed)
    assert f"_quick{SUFFIX} is missing" in why
    assert files == ["py"] * 3


def test_an_extension_that_does_not_load_says_what_to_do(installed):
    installed.joinpath("aneuron", FOLDER, f"_quick{SUFFIX}").write_bytes(b"of another machine")
    done = run(installed, "-c", "import aneuron._quick")
    assert "ImportError" in done.stderr
    assert "ANEURON_PURE=1 runs the Python source instead" in done.stderr


@pytest.mark.parametrize("text", ["", "{", '{"failed": "it was not compiled to the end", "modules": {}}'])
def test_an_unfinished_build_is_not_used(tmp_path, text):
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    folder.joinpath(MANIFEST).write_text(text)
    chosen, why = choose(tmp_path, None)
    assert chosen == {}
    assert why.startswith("it was not compiled")


def test_a_free_threaded_python_runs_the_source(monkeypatch):
    monkeypatch.setattr("aneuron._native.FREE_THREADED", True)
    assert choose(ROOT / "aneuron", None) == ({}, "this Python is free-threaded")


# Compiling again.


def test_only_what_changed_is_compiled_again(built):
    folder = built[0] / "aneuron"
    quick = folder / FOLDER / f"_quick{SUFFIX}"
    before = quick.stat().st_mtime_ns
    for name, again in [("sched/user.py", 1), ("sched/user.py", 0), ("sched/shared.pxd", 2)]:
        if again:
            change(folder / name)
        assert f"compiling {again} of 3 modules" in compile_again(built[0]).stderr
        assert choose(folder, None)[1] is None
    assert quick.stat().st_mtime_ns == before


def test_what_a_compiler_does_not_take_is_an_error_by_hand_and_runs_as_python(built, tmp_path):
    folder = shutil.copytree(built[0], tmp_path / "tree")
    folder.joinpath("aneuron/_quick.pyx").write_text("cdef no_such_type x\n")
    done = compile_again(folder)
    assert done.returncode == 1
    assert "aneuron._quick does not compile" in done.stderr
    assert "no_such_type" in done.stderr
    assert choose(folder / "aneuron", None) == ({}, "its compilation failed")
    assert look(folder)[1] == ["py"] * 3


# What it says.


@pytest.mark.parametrize(("why", "lines"), [("ANEURON_PURE=1", 1), (None, 0)])
async def test_the_log_says_once_that_the_core_runs_as_python(monkeypatch, caplog, why, lines):
    monkeypatch.setattr(aneuron._native, "why_pure", why)
    monkeypatch.setattr(aneuron._native, "_said", False)
    with caplog.at_level(logging.INFO, "aneuron"):
        for _ in range(2):
            async with AsyncDataParallel(lambda x: x, backend=SimulatedBackend(cores=1)):
                pass
    said = [record.getMessage() for record in caplog.records if "runs as Python" in record.getMessage()]
    assert said == ["the core runs as Python, more slowly: ANEURON_PURE=1"] * lines
