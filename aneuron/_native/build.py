"""Compiles the core: the build hook of wheels and editable installs, and `python aneuron/_native/build.py`.

What has not changed is not compiled again. Where nothing can be compiled the package runs as Python. With
ANEURON_PURE=1 nothing is compiled; with ANEURON_PURE=0 all must be. By hand, an error of a compiler that works is an
error as well.

Must not be here: which modules are compiled (sources.py); the package, and torch, which a build has not.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object

PACKAGE = Path(__file__).resolve().parent.parent
JOBS = 2  # compilers at a time
DIRECTIVES = {"language_level": 3, "binding": True}
# Compiled, a .py means what it says in Python: annotations are for readers, types of C stand in the .pxd alone; an
# attribute of None, and a whole number beyond 64 bits, raise instead of reading what is no object, and wrapping round.
AS_PYTHON = {"annotation_typing": False, "nonecheck": True, "overflowcheck": True}
FLAGS = os.environ.get("CFLAGS", "" if sys.platform == "win32" else "-O2 -g0").split()


def _load_sources() -> Any:
    spec = spec_from_file_location("aneuron_sources", PACKAGE / "_native" / "sources.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sources = _load_sources()
FOLDER = PACKAGE / sources.FOLDER
MANIFEST = FOLDER / sources.MANIFEST


def build() -> str | None:
    """Compile what has changed; None, or why the package runs as Python.

    Raises RuntimeError where there is a compiler and it fails, or, with ANEURON_PURE=0, where there is none.
    """
    pure = os.environ.get("ANEURON_PURE") or "0"
    if pure != "0":
        return f"ANEURON_PURE={pure}"
    if sources.FREE_THREADED:
        return _unless_required("it is not compiled:", ["this Python is free-threaded"])
    found = sources.digests(PACKAGE)
    names, keys = sources.modules(found), _keys(found)
    try:
        before = json.loads(MANIFEST.read_text())
    except (OSError, ValueError):
        before = {"modules": {}}
    old = before["modules"]
    made = {name: keys[name] for name in names if old.get(name) == keys[name] and _extension(names[name]).exists()}
    todo = {name: source for name, source in names.items() if name not in made}
    print(f"aneuron: compiling {len(todo)} of {len(names)} modules", file=sys.stderr)
    if not todo and before.get("sources") == found:
        return None
    try:
        _write(made, failed="it was not compiled to the end")
        if todo and (why := _run("--try")):
            _write(made, failed=f"there was no compiler for it: {why[-1]}")
            return _unless_required("there is no compiler for it:", why)
        for name in _compile(todo):
            made[name] = keys[name]
        if sources.digests(PACKAGE) != found:
            raise RuntimeError("its sources changed while it was compiled")
    except OSError as error:  # a folder that is not ours to write in
        return _unless_required("it cannot be compiled here:", [str(error)])
    except RuntimeError:
        _write(made, failed="its compilation failed")
        raise
    _write(made, sources=found)
    return None


def _unless_required(why: str, lines: list[str]) -> str:
    if os.environ.get("ANEURON_PURE") == "0":
        raise RuntimeError("\n".join([f"ANEURON_PURE=0, and {why}", *lines]))
    return f"{why} {lines[-1]}"


def _extension(source: str) -> Path:
    path: Path = FOLDER / sources.extension(source)
    return path


def _write(made: dict[str, str], **state: Any) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    new = MANIFEST.with_suffix(".new")
    new.write_text(json.dumps({**state, "modules": made}, indent=1))
    new.replace(MANIFEST)  # whoever reads it meanwhile sees it whole


def _keys(found: dict[str, str]) -> dict[str, str]:
    """For each module a hash of all that its extension is made from, the declarations that it may use included."""
    try:
        compiler = version("cython")
    except PackageNotFoundError:
        compiler = ""
    parts = [compiler, *FLAGS, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    words = {path: set(re.findall(r"\w+", PACKAGE.joinpath(path).read_text())) for path in found if path[-1] != "y"}
    keys = {}
    for name, source in sources.modules(found).items():
        used = {source, source.rpartition(".")[0] + ".pxd"} & found.keys()
        while True:  # a declaration is used by whoever says its name: too often rather than too seldom
            said = set().union(*(words.get(path, ()) for path in used))
            more = {path for path in words if path.endswith(".pxd") and Path(path).stem in said} - used
            if not more:
                break
            used |= more
        key = "\n".join([*parts, *(found[path] for path in sorted(used))])
        keys[name] = hashlib.sha256(key.encode()).hexdigest()
    return keys


def _compile(todo: dict[str, str]) -> Iterator[str]:
    """Compile modules in processes, JOBS at a time: the names of those made. RuntimeError says what was printed."""
    with ThreadPoolExecutor(JOBS) as pool:
        running = {name: pool.submit(_run, name, source) for name, source in todo.items()}
        for name, future in running.items():
            if lines := future.result():
                pool.shutdown(cancel_futures=True)
                raise RuntimeError("\n".join([f"{name} does not compile:", *lines]))
            yield name


def _run(*arguments: str) -> list[str]:
    """Run this file; what it printed if it failed."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    # In the folder above the package: tracebacks name files from there.
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines() or ["it ended without a word"] if done.returncode else []


def _compile_one(name: str, source: str) -> None:
    """Make one extension, in a process of its own."""
    from Cython.Build import cythonize
    from setuptools import Extension

    with tempfile.TemporaryDirectory() as scratch:
        extension = Extension(name, [f"{PACKAGE.name}/{source}"], extra_compile_args=FLAGS)
        directives = DIRECTIVES | (AS_PYTHON if source.endswith(".py") else {})
        (extension,) = cythonize([extension], force=True, build_dir=scratch, compiler_directives=directives)
        made = _build_ext(extension, scratch)
        target = _extension(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        shutil.copy(made, new)
        new.replace(target)  # a process that runs the old one keeps it


def _try() -> None:
    """Exit with the reason where there is no Cython, or no C compiler that finds Python's headers."""
    try:
        import Cython  # noqa: F401
        from setuptools import Extension
    except ImportError as error:
        sys.exit(f"{error.name} is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "tried.c")
        source.write_text("#include <Python.h>\nPyMODINIT_FUNC PyInit_tried(void) { return NULL; }\n")
        try:
            _build_ext(Extension("tried", [str(source)], extra_compile_args=FLAGS), scratch)
        except Exception as error:  # of many kinds, by platform
            used = os.environ.get("CC") or sysconfig.get_config_var("CC") or "the C compiler"
            sys.exit(f"{error}\n{used} does not compile what includes Python.h")


def _build_ext(extension: Any, scratch: str) -> str:
    from setuptools import Distribution

    command = Distribution({"name": "aneuron", "ext_modules": [extension]}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = f"{scratch}/lib", f"{scratch}/objects"
    command.ensure_finalized()
    command.run()
    return str(command.get_ext_fullpath(extension.name))


class BuildHook(BuildHookInterface):  # type: ignore[misc]
    """Puts the extensions into a wheel, which is then for one Python and platform; an editable one finds them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it makes a wheel."""
        try:
            why = build()
        except RuntimeError as error:
            if os.environ.get("ANEURON_PURE") == "0":
                raise
            why = str(error)
        if why:
            self.app.display_warning(f"aneuron will run as Python, more slowly: {why}")
        elif version != "editable":
            made = sources.modules(sources.digests(PACKAGE)).values()
            files = [MANIFEST, *(_extension(source) for source in made)]
            build_data["force_include"].update({str(file): f"aneuron/{file.relative_to(PACKAGE)}" for file in files})
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


if __name__ == "__main__":
    if sys.argv[1:] == ["--try"]:
        _try()
    elif sys.argv[1:]:
        _compile_one(*sys.argv[1:])
    else:
        try:
            why = build()
        except RuntimeError as error:
            sys.exit(str(error))
        if why:
            print(f"aneuron will run as Python, more slowly: {why}", file=sys.stderr)
