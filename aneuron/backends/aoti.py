"""AOTInductor packages: the `.pt2` files that `aoti_compile_and_package` writes, run in engine processes only.

Lives here: loading one, once in a process, and what of a call it is given. Must not be here: what a file is (files.py),
what an engine is (remote/), who runs when.

A package is compiled code that trusts its inputs, behind a loader that holds the interpreter for a whole run: a process
of its own is what keeps both from callers.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils import _pytree

from aneuron.backends.exported import LOADS, Inputs, inputs_of, module_on
from aneuron.backends.files import COMPILED, compiled_for
from aneuron.backends.unwarned import unwarned
from aneuron.errors import ShapeError

CHECKS = "AOTI_RUNTIME_CHECK_INPUTS"  # what is compiled looks at it at its first run, and then at dtypes and sizes
# Errors of those checks, as the runtime words them.
_REFUSALS = "input_handles[", "expected inputs vector size", "expected ndim", "expected size", "expected number of"

_lock = threading.Lock()
_runners = 0  # in this process; none: it is no engine
_loaded: "tuple[tuple[object, ...], Package] | None" = None


def serve_here(runners: int) -> None:
    """Let packages be loaded in this process, which is an engine; `runners`: executions at a time."""
    global _runners
    _runners = runners
    os.environ[CHECKS] = "1"


def package_at(path: str) -> "Package":
    """The package in a file, loaded once in this process.

    Raises `ValueError` in a process that is no engine, for a second package in one, for one that was compiled for
    another device than a CPU, and for one that this PyTorch cannot load.
    """
    global _loaded
    if not _runners:
        raise ValueError(f"model={path!r} is {COMPILED}")
    file = os.stat(path)
    key = (path, file.st_mtime_ns, file.st_size)
    with _lock:
        if _loaded is None:
            _loaded = key, _read(path, _runners)
        elif _loaded[0] != key:
            raise ValueError(
                f"model={path!r}: this process has loaded {_loaded[0][0]!r} already, and a process takes one "
                "AOTInductor package: give each model of one a Pool(processes=) of its own, and start that anew for a "
                "new package (close it, or its process) instead of a swap"
            )
        return _loaded[1]


def _read(path: str, runners: int) -> "Package":
    device = compiled_for(path)
    if device not in ("cpu", None):
        raise ValueError(
            f"model={path!r} is an AOTInductor package compiled for {device}, and aneuron runs those for CPUs: compile "
            "the program on its CPU, or pass the ExportedProgram"
        )
    try:
        from torch.export.pt2_archive._package import load_pt2

        with LOADS, unwarned():
            found = load_pt2(path, num_runners=runners)
            (name, compiled), *others = found.aoti_runners.items()
    except Exception as error:
        raise ValueError(
            f"model={path!r} is an AOTInductor package that PyTorch {torch.__version__} cannot load here: compile it "
            f"again, on such a machine and with this version ({type(error).__name__}: {error})"
        ) from error
    if others:
        raise ValueError(f"model={path!r} holds {', '.join(found.aoti_runners)}: package one model in a file")
    _remove_extracted()
    program = found.exported_programs.get(name)
    return Package(compiled.loader, None if program is None else inputs_of(module_on(program)))


def _remove_extracted() -> None:
    """Remove what the loader has extracted, and mapped by now: it does so itself only if it ends in peace."""
    for path in set(_mapped()):
        folder = path.split("/data/aotinductor/")[0]
        if os.path.basename(os.path.dirname(folder)).startswith("aotinductor_"):
            with suppress(OSError):
                shutil.rmtree(os.path.dirname(folder))


def _mapped() -> Iterator[str]:
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            path = line.rstrip("\n").partition("/")[2]
            if "/data/aotinductor/" in path:
                yield f"/{path}"


class Package:
    """What a package computes, as a model. `inputs`: what it takes, where the exported program is packaged with it."""

    def __init__(self, loader: Any, inputs: Inputs | None) -> None:
        self.inputs = inputs
        self._run = loader.boxed_run
        with unwarned():
            self._in, self._out = map(_pytree.treespec_loads, loader.get_call_spec())
        self._names = list(self._in.child(1).context or ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it. The results are copies: nobody says that the runner does not write to its own again.

        Raises `ShapeError` for inputs that it was not compiled for.
        """
        if len(kwargs) > 1 and kwargs.keys() == set(self._names):
            kwargs = {name: kwargs[name] for name in self._names}
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        if spec != self._in:
            raise ShapeError(
                f"the inputs are {spec}, and the package was compiled for {self._in}: pass them as its example was, by "
                "position or by keyword"
            )
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                raise ShapeError(
                    f"input {at} is {leaf!r:.80}, no tensor: what it was in the example is compiled into the package, "
                    "and nothing else can take its place; export the program without it"
                )
        try:
            # As batches are collated; a lone caller's may have come in another order.
            outputs = self._run([leaf.contiguous() for leaf in leaves])
        except RuntimeError as error:
            if not str(error).startswith(_REFUSALS):
                raise
            raise ShapeError(f"the inputs are not what the package was compiled for: {str(error).strip()}") from error
        return _pytree.tree_unflatten([_own(each) for each in outputs], self._out)


def _own(output: Any) -> Any:
    return output.clone() if isinstance(output, torch.Tensor) else output
