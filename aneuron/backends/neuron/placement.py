"""Loading a traced model on one core.

Lives here: which parts of a module are Neuron graphs, copies, the placement calls of torch_neuronx and torch_neuron.
Must not be here: the lock around loads (__init__.py), which cores there are (cores.py), what errors mean (faults.py).

The calls:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-core-placement.html.
Always one module a core: the runtime's own rotation over replicas would hide which core runs what, and which fails.
"""

import copy
import importlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from aneuron.backends.files import check_script
from aneuron.backends.neuron.cores import Package
from aneuron.backends.torchscript import load_script

_CLASSES = "__torch__.torch.classes.neuron."
_SEVERAL = _CLASSES + "SPMDModel"  # the class of models that are compiled for several cores


# What a model is.


def is_neuron(model: Any) -> bool:
    """Whether a module, one of its parts, or the TorchScript file at a path has a graph for NeuronCores. Never raises.

    >>> is_neuron(torch.nn.ReLU())
    False
    """
    if isinstance(model, (str, os.PathLike)):
        return any(b"ops.neuron." in code or _CLASSES.encode() in code for code in _code(model))
    return isinstance(model, torch.nn.Module) and bool(traced_parts(model))


def traced_parts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts whose own graph runs on NeuronCores. Placement would silently pass over the others."""
    return [part for part in module.modules() if any(True for _ in _traces(part))]


def _traces(part: torch.nn.Module) -> Iterator[str]:
    """What in a part shows that it is traced: operators, and the class of its binding to the runtime."""
    if isinstance(part, torch.jit.ScriptModule):
        with suppress(RuntimeError, AttributeError):  # it has no forward
            for node in _nodes(part.graph):
                if node.kind().startswith("neuron::"):
                    yield node.kind()
                yield from (str(out.type()) for out in node.outputs() if _CLASSES in str(out.type()))
    for name, value in list(vars(part).items()):
        if hasattr(type(value), "set_neuron_devices"):
            yield name


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _code(path: str | os.PathLike[str]) -> list[bytes]:
    """The code in a TorchScript file; empty where it is none. Reads the file's index and code, not its weights."""
    try:
        with zipfile.ZipFile(path) as file:
            return [file.read(name) for name in file.namelist() if "/code/" in name and name.endswith(".py")]
    except Exception:
        return []


def settings(model: Any) -> dict[str, Any]:
    """The "neuron" entry of the config.json that optimum-neuron puts beside a model's file, or nothing."""
    if not isinstance(model, (str, os.PathLike)):
        return {}
    try:
        with open(os.path.join(os.path.dirname(os.fsdecode(model)), "config.json"), encoding="utf-8") as file:
            entry = json.load(file)["neuron"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def compiled_rows(model: Any) -> int | None:
    """The rows that a model's file was compiled for, as its config.json has it; None where nothing says it."""
    entry = settings(model)
    rows = entry.get("static_batch_size")
    return rows if type(rows) is int and rows >= 1 and not entry.get("dynamic_batch_size") else None


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise for a file that cannot be a traced model. `FileNotFoundError`, or `ValueError`."""
    check_script(path)
    if not _code(path):
        raise ValueError(f"{os.fspath(path)} is no TorchScript file; save the traced model with torch.jit.save")
    if not is_neuron(path):
        raise ValueError(f"{os.fspath(path)} {_UNTRACED}")
    cores = settings(path).get("tensor_parallel_size")
    if type(cores) is int and cores > 1:
        raise ValueError(f"{os.fspath(path)} was compiled for tensor parallelism on {cores} cores; {_ONE_CORE}")


_UNTRACED = (
    "has no graph for NeuronCores, and would run on the CPU without a word; trace it first, "
    "model = torch_neuronx.trace(model, example), or pass backend='cpu'"
)
_ONE_CORE = (
    "aneuron puts each copy of a model on one core: compile it for one (no NeuronCore Pipeline, no tensor parallelism)"
)


# Loading.


def load(here: Package, model: Any, core_id: int, dynamic_batching: bool) -> Any:
    """A copy of the module on a core, or what the file at this path holds. Raises what the package raises.

    Always a copy: placing a module moves its traced parts, which other modules, or the user, may hold and run, and
    they would hold the device's memory after the core is closed.
    """
    if isinstance(model, (str, os.PathLike)):
        check_file(model)
        # Placed while it is loaded: placing it afterwards would unload it and load it again.
        with _function(here, "neuron_cores_context")(start_nc=core_id, nc_count=1):
            module = load_script(os.fspath(model))
    elif is_neuron(model):
        module = copy.deepcopy(model)
    else:
        raise ValueError(f"model={model!r:.80} {_UNTRACED}")
    _check_cores(module)
    _set_dynamic_batching(here, module, dynamic_batching)
    if not isinstance(model, (str, os.PathLike)):
        _function(here, "set_neuron_cores")(module, core_id, 1)
    _move_weights(here, module, core_id)
    return module


def _check_cores(module: torch.nn.Module) -> None:
    for part in traced_parts(module):
        if any(_SEVERAL in trace for trace in _traces(part)):
            raise ValueError(f"the model was compiled for several cores that work together; {_ONE_CORE}")


def _set_dynamic_batching(here: Package, module: torch.nn.Module, on: bool) -> None:
    """Have the package cut batches, or not: a model may have been saved with it on."""
    switch = _find(here, "dynamic_batch")
    if switch is not None:
        switch(module, on)


def _move_weights(here: Package, module: torch.nn.Module, core_id: int) -> None:
    """Move weights that were kept out of the compiled graph to its core: else every call copies them there."""
    separate = [part for part in traced_parts(module) if next(part.parameters(), None) is not None]
    if not separate:
        return
    with _default_kept():
        for part in separate:
            _function(here, "move_trace_to_device")(part, core_id)


@contextmanager
def _default_kept() -> Iterator[None]:
    """`move_trace_to_device` leaves the process's default core changed, and later loads would go there."""
    runtime: Any = torch.classes.neuron.Runtime()
    start, count = runtime.get_default_start_nc(), runtime.get_default_nc_count()
    try:
        yield
    finally:
        runtime.set_default_neuron_cores(start, count)


def _find(here: Package, name: str) -> Callable[..., Any] | None:
    """A function of the package, at its top level (from SDK 2.25 on) or where it was before."""
    assert here.module is not None
    for folder in ("", ".experimental", ".experimental.placement"):
        with suppress(ImportError):
            found = getattr(importlib.import_module(here.module.__name__ + folder), name, None)
            if found is not None:
                return found  # type: ignore[no-any-return]
    return None


def _function(here: Package, name: str) -> Callable[..., Any]:
    found = _find(here, name)
    if found is None:
        assert here.module is not None
        raise RuntimeError(
            f"{here.module.__name__} has no {name}; install one that has (of SDK 2.12 to 2.31, the last is 2.9.0.2.15)"
        )
    return found
