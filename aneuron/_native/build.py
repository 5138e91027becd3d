"""Compiles the core: the build hook of wheels and editable installs, and `python aneuron/_native/build.py`.

What has not changed is not compiled again. What cannot be compiled, for want of a compiler, say, is no error: the
package runs as Python. With ANEURON_PURE=1 nothing is compiled; with ANEURON_PURE=0 all must be.

Must not be here: which modules are compiled (sources.py); the package, and torch, which a build has not.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
# Annotations are for readers and mypy, as in Python: types that change what is compiled stand in the .pxd alone.
DIRECTIVES = {"language_level": 3, "annotation_typing": False, "binding": True, "freethreading_compatible": True}
FLAGS = [] if sys.platform == "win32" else ["-O2", "-g0"]


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
    """Compile what has changed; None, or why the package runs as Python."""
    pure = os.environ.get("ANEURON_PURE") or None
    if pure not in (None, "0"):
        return f"ANEURON_PURE={pure}"
    found = sources.digests(PACKAGE)
    keys = _keys(found)
    try:
        kept = json.loads(MANIFEST.read_text())["modules"]
    except (OSError, ValueError, KeyError):
        kept = {}
    kept = {name: key for name, key in kept.items() if keys.get(name) == key and _extension(found, name).exists()}
    todo = [name for name in keys if name not in kept]
    try:
        _write({"failed": "its compilation was not finished", "modules": kept})
        _compile(todo, sources.modules(found))
        if sources.digests(PACKAGE) != found:
            raise RuntimeError("its sources changed while it was compiled")
    except (OSError, RuntimeError) as error:
        if pure == "0":
            raise
        failed = f"it could not be compiled: {error}"
        if FOLDER.exists():
            _write({"failed": failed.partition("\n")[0], "modules": kept})
        return failed
    _write({"sources": found, "modules": keys})
    print(f"aneuron: compiled {len(todo)} of {len(keys)} modules", file=sys.stderr)
    return None


def _extension(found: dict[str, str], name: str) -> Path:
    path: Path = FOLDER / sources.extension(sources.modules(found)[name])
    return path


def _write(manifest: dict[str, Any]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    new = MANIFEST.with_suffix(".new")
    new.write_text(json.dumps(manifest, indent=1))
    new.replace(MANIFEST)  # whoever reads it meanwhile sees it whole


def _keys(found: dict[str, str]) -> dict[str, str]:
    """For each module a hash of all that its extension is made from, the declarations that it may use included."""
    try:
        compiler = version("cython")
    except PackageNotFoundError:
        compiler = ""
    parts = [compiler, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    words = {path: set(re.findall(r"\w+", PACKAGE.joinpath(path).read_text())) for path in found if path[-1] != "y"}
    keys = {}
    for name, source in sources.modules(found).items():
        used = {source}
        new = used | ({source.rpartition(".")[0] + ".pxd"} & words.keys())
        while new > used:  # a declaration is used by whoever says its name: too often rather than too seldom
            said = set().union(*(words.get(path, ()) for path in new))
            used, new = new, new | {path for path in words if Path(path).suffix == ".pxd" and Path(path).stem in said}
        key = "\n".join([*parts, *(found[path] for path in sorted(used))])
        keys[name] = hashlib.sha256(key.encode()).hexdigest()
    return keys


def _compile(names: list[str], modules: dict[str, str]) -> None:
    """Compile in processes, JOBS at a time; RuntimeError says which failed, with what was printed."""

    def one(name: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), name, modules[name]]
        done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            last = lines[-1] if lines else f"the compilation of {name} failed"
            raise RuntimeError("\n".join([last, f"While compiling {name}:", *lines]))

    with ThreadPoolExecutor(JOBS) as pool:
        futures = [pool.submit(one, name) for name in names]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _compile_one(name: str, source: str) -> None:
    """In a process of its own, in the folder above the package: tracebacks name files from there."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    with tempfile.TemporaryDirectory() as scratch:
        extension = Extension(name, [f"{PACKAGE.name}/{source}"], extra_compile_args=FLAGS)
        extensions = cythonize([extension], force=True, build_dir=scratch, compiler_directives=DIRECTIVES)
        command = Distribution({"name": "aneuron", "ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = f"{scratch}/lib", f"{scratch}/objects"
        command.ensure_finalized()
        command.run()
        made = Path(command.get_ext_fullpath(name))
        target = FOLDER / sources.extension(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        shutil.copy(made, new)
        new.replace(target)  # a process that runs the old one keeps it


class BuildHook(BuildHookInterface):  # type: ignore[misc]
    """Puts the extensions into a wheel, which is then for one Python and platform; an editable one finds them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it makes a wheel."""
        if why := build():
            self.app.display_warning(f"aneuron will run as Python, more slowly: {why}")
        elif version != "editable":
            made = sources.modules(sources.digests(PACKAGE)).values()
            files = [MANIFEST, *(FOLDER / sources.extension(source) for source in made)]
            build_data["force_include"].update({str(file): f"aneuron/{file.relative_to(PACKAGE)}" for file in files})
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _compile_one(*sys.argv[1:])
    elif why := build():
        print(f"aneuron will run as Python, more slowly: {why}", file=sys.stderr)
