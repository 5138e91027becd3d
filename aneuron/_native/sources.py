"""Which modules are compiled, and what from: every .pyx, and every .py that has a .pxd beside it.

Must not be here: how they are compiled (build.py), which are used (__init__.py). The build reads this file without
importing the package.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

SUFFIX = EXTENSION_SUFFIXES[0]  # .cpython-311-x86_64-linux-gnu.so
FOLDER = f"_native/compiled/{SUFFIX.split('.')[1]}"  # in the package; one for each kind of interpreter
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
MANIFEST = "manifest.json"  # in that folder: the sources that the extensions beside it were made from


def digests(package: Path) -> dict[str, str]:
    """SHA-256 of all that is compiled, by path in the package: modules, and declarations that they share."""
    found: list[str] = []
    for folder, folders, names in os.walk(package):
        if "compiled" in folders and Path(folder).name == "_native":
            folders.remove("compiled")
        stems = {name[:-4] for name in names if name.endswith((".pxd", ".pyx"))}
        written = {name[:-4] for name in names if name.endswith(".pyx")}  # a .py beside one is what runs without it
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if suffix in ("pxd", "pyx") or (suffix == "py" and stem in stems - written):
                found.append(Path(folder, name).relative_to(package).as_posix())
    return {path: hashlib.sha256(package.joinpath(path).read_bytes()).hexdigest() for path in sorted(found)}


def modules(sources: Iterable[str]) -> dict[str, str]:
    """Module names with the sources that they are compiled from.

    >>> modules(["sched/call.pxd", "sched/call.py", "tensors/_copying.pyx", "shared.pxd"])
    {'aneuron.sched.call': 'sched/call.py', 'aneuron.tensors._copying': 'tensors/_copying.pyx'}
    """
    return {
        "aneuron." + path.rpartition(".")[0].replace("/", "."): path
        for path in sources
        if path.endswith((".py", ".pyx"))
    }


def extension(source: str) -> str:
    """Where a source's extension lies, in FOLDER."""
    return source.rpartition(".")[0] + SUFFIX
