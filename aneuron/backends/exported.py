"""Exported programs: `ExportedProgram` objects, what `torch.export.save` writes (`.pt2`), and what `module()` makes.

Lives here: loading one, bringing it to a device, what rows and inputs it takes, what its guards' errors mean. Must not
be here: what a file is (files.py), what each core has of its own (copies.py), who runs when.
"""

import copy
import io
import json
import math
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from aneuron.backends.unwarned import unwarned
from aneuron.errors import ShapeError
from aneuron.sched.sizes import Range
from aneuron.tensors.marked import Shared

LOADS = threading.Lock()  # the process's: torch keeps what it is loading in a global, and a second load raises


def is_program(model: Any) -> bool:
    """Whether it is an `ExportedProgram`."""
    export = sys.modules.get("torch.export")
    return export is not None and isinstance(model, export.ExportedProgram)


def is_module(model: Any) -> bool:
    """Whether it is what an exported program's `module()` has made, or a copy: its mode was fixed, `eval()` raises."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return False
    return "train" in vars(model) or (isinstance(model, torch.fx.GraphModule) and "_in_spec" in vars(model))


def load_program(path: str | os.PathLike[str]) -> Any:
    """The `ExportedProgram` in a file, whatever its name. It is unpickled, in parts: only files that one trusts.

    Raises `ValueError` for one that this PyTorch cannot load, with what the file says of itself.
    """
    with open(path, "rb") as file:  # a path without .pt2 is warned of
        try:
            with LOADS, unwarned():
                return torch.export.load(file)
        except Exception as error:
            raise ValueError(f"model={os.fspath(path)!r} {_why_not(path)} ({type(error).__name__}: {error})") from error


def _why_not(path: str | os.PathLike[str]) -> str:
    """Why an exported program could not be loaded, by what is in the archive beside the weights."""
    ours = torch.__version__
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is a damaged or incomplete archive: copy or export it again"
            inner = {name.partition("/")[2]: name for name in archive.namelist()}
            if "models/model.json" not in inner:
                others = ", ".join(sorted(name[7:-5] for name in inner if name.startswith("models/")))
                return (
                    f"holds {others}, and no program by the name of 'model': load it, and pass the ExportedProgram"
                    if others
                    else f"is of an old PyTorch, which {ours} does not read: export it again"
                )
            said = json.loads(archive.read(inner["models/model.json"]))
        schema, by = said.get("schema_version") or {}, said.get("torch_version", "an unknown version")
        theirs = f"{schema.get('major', '?')}.{schema.get('minor', '?')}"
    except Exception:
        return f"is an exported program that PyTorch {ours} cannot read"
    return (
        f"was exported by PyTorch {by} (schema {theirs}), and the one that is installed, {ours} (schema {_schema()}), "
        f"cannot load it: install PyTorch {by.partition('+')[0]} or newer, or export it again with {ours}; if it has "
        "operators of other packages, import these first"
    )


def _schema() -> str:
    from torch._export.serde.schema import SCHEMA_VERSION

    return ".".join(map(str, SCHEMA_VERSION))


class Saved:
    """Holds an `ExportedProgram`, which pickle takes and does not give back: it is pickled as it is saved."""

    def __init__(self, program: Any) -> None:
        self.held = program

    def __deepcopy__(self, memo: dict[int, Any]) -> "Saved":
        return Saved(self.held)  # its weights are whoever's it was made of anyway

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        with LOADS, unwarned():
            torch.export.save(self.held, file)
        return _read, (file.getvalue(),)


def _read(saved: bytes) -> Saved:
    with LOADS, unwarned():
        return Saved(torch.export.load(io.BytesIO(saved)))


def module_on(program: Any, device: torch.device | str = "cpu") -> torch.nn.Module:
    """What an `ExportedProgram` computes, as a module around its weights; on another device around copies of them."""
    with LOADS, unwarned():
        if torch.device(device).type != "cpu":
            try:
                from torch.export.passes import move_to_device_pass
            except ImportError:
                raise ValueError(
                    f"PyTorch {torch.__version__} cannot bring an exported program to {device}; install 2.7 or newer"
                ) from None
            program = move_to_device_pass(_copied(program), str(device))  # the pass writes into the program
        return program.module()  # type: ignore[no-any-return]


def _copied(program: Any) -> Any:
    """A copy of an `ExportedProgram` around the same tensors."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    made = copy.deepcopy(program, {id(each): each for each in tensors})
    for part, twin in zip(program.graph_module.modules(), made.graph_module.modules(), strict=True):
        if isinstance(part, torch.fx.GraphModule):
            for node, other in zip(part.graph.nodes, twin.graph.nodes, strict=True):
                other.name = node.name  # what is called as a builtin is, `input` for one, has got another name
    return made


def check_movable(module: torch.nn.Module, device: torch.device) -> None:
    """Raise `ValueError` for an exported program's module with constants of its own device, which `to` leaves there."""
    roots = [root for root in module.modules() if isinstance(root, torch.fx.GraphModule) and is_module(root)]
    for part in dict.fromkeys(part for root in roots for part in root.modules()):
        fixed = [name for name, value in vars(part).items() if isinstance(value, torch.Tensor)]
        if isinstance(part, torch.fx.GraphModule):
            fixed += [node.name for node in part.graph.nodes if node.kwargs.get("device") is not None]
        if fixed:
            raise ValueError(
                f"the model is an exported program's module, which keeps {', '.join(sorted(fixed)[:3])} where it is: "
                f"pass the ExportedProgram itself, or its .pt2 file, which can be brought to {device} whole"
            )


# What it takes.


class Size(NamedTuple):
    """One dimension of an input, as exported."""

    range: Range
    name: str  # the same for dimensions that are always equal; empty where there is one size
    derived: bool = False  # computed of another one, as 2 * rows is: not every number in the range will do


@dataclass(frozen=True)
class Inputs:
    """What a program was exported for. `of`: the module that was looked at."""

    of: Any
    leaves: tuple[tuple[torch.dtype, tuple[Size, ...]] | None, ...]  # None: no tensor
    spec: Any  # what is around them, to `torch.utils._pytree`

    def rows(self, dim: int) -> Size | None:
        """The rows of an execution, along `dim`; None where that is not known.

        Inputs whose size is fixed count only if all are: beside others a fixed one is a table for all rows.
        """
        sizes = [sizes[dim % len(sizes)] for _, sizes in filter(None, self.leaves) if -len(sizes) <= dim < len(sizes)]
        free = [size for size in sizes if size.name]
        if not free:
            return sizes[0] if len(set(sizes)) == 1 else None
        bounds = [size.range.most for size in free if size.range.most is not None]
        both = Range(max(size.range.least for size in free), min(bounds, default=None))
        if both.most is not None and both.most < both.least:
            return None
        return Size(both, free[0].name, any(size.derived for size in free))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int | None = None) -> None:
        """Raise `ShapeError` for inputs of other dtypes or shapes than it takes, leaving out their rows, along `dim`.

        Arguments in other places are left to the program, which knows them best.
        """
        wanted = self.spec.child(1).context if hasattr(self.spec, "child") else self.spec.children_specs[1].context
        if kwargs.keys() == set(wanted):
            kwargs = {name: kwargs[name] for name in wanted}
        given, spec = _pytree.tree_flatten_with_path((args, kwargs))
        if len(given) != len(self.leaves) or spec != self.spec:
            return
        seen: dict[str, tuple[int, str]] = {}
        for (path, value), leaf in zip(given, self.leaves, strict=True):
            value = value.value if isinstance(value, Shared) else value
            if leaf is not None and hasattr(value, "shape") and hasattr(value, "dtype"):
                (_, first, *rest), (dtype, sizes) = path, leaf
                name = f"input {getattr(first, 'idx', getattr(first, 'key', first))!r}{_pytree.keystr(tuple(rest))}"
                _check_leaf(name, value, dtype, sizes, dim, seen)


def _check_leaf(
    name: str,
    value: Any,
    dtype: torch.dtype,
    sizes: tuple[Size, ...],
    dim: int | None,
    seen: dict[str, tuple[int, str]],
) -> None:
    """One input. `seen`: the sizes of what is to be equal, and where."""
    shape, text = tuple(value.shape), f"{name} has shape {tuple(value.shape)}"
    if str(value.dtype).rpartition(".")[2] != str(dtype).rpartition(".")[2]:
        raise ShapeError(
            f"{name} has dtype {value.dtype}; the program was exported for {dtype}: pass it as that (x.to({dtype}))"
        )
    if len(shape) != len(sizes):
        ranges = ", ".join(str(size.range) for size in sizes)
        raise ShapeError(f"{text}; the program was exported for {len(sizes)} dimensions, of sizes {ranges}")
    for axis, (have, size) in enumerate(zip(shape, sizes, strict=True)):
        if dim is not None and axis == dim % len(shape):
            continue
        at = f"{name}, dim {axis}"
        if not size.range.holds(have):
            raise ShapeError(
                f"{text}; the program was exported for {size.range} along dim {axis}, and {have} is not: pad or cut "
                "the input, or export the program with a wider range (torch.export.Dim)"
            )
        other = seen.setdefault(size.name, (have, at)) if size.name else None
        if other is not None and other[0] != have:
            raise ShapeError(f"{at} has size {have} and {other[1]} {other[0]}: the program was exported for equal ones")


def inputs_of(module: Any) -> Inputs | None:
    """What an exported program's module takes; None where it does not say so, or is none."""
    if not isinstance(module, torch.fx.GraphModule) or not is_module(module):
        return None
    told = getattr(module, "range_constraints", None) or {}  # a deep copy has lost them
    leaves: list[tuple[torch.dtype, tuple[Size, ...]] | None] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            tensor = isinstance(value, torch.Tensor)
            leaves.append((value.dtype, tuple(_size(each, told) for each in value.shape)) if tensor else None)
    return Inputs(module, tuple(leaves), module._in_spec)


def _size(size: Any, told: dict[Any, Any]) -> Size:
    if not isinstance(size, torch.SymInt):
        return Size(Range(int(size), int(size)), "")
    expression = size.node.expr
    values = told[expression] if expression in told else size.node.shape_env.bound_sympy(expression)
    lower, upper = float(values.lower), float(values.upper)
    limits = Range(max(1, int(lower)), None if math.isinf(upper) or upper >= sys.maxsize - 1 else int(upper))
    return Size(limits, str(expression), not expression.is_symbol)


# Its errors.

_GUARDS = "Guard failed", "Expected input", "Trying to flatten user inputs", "Ran into a kwarg keyword mismatch"


def explained(model: Any, given: Any = None) -> Any:
    """What to call in place of a model: of an exported program, or of a module around some, errors of guards are
    `ShapeError`; others are returned as they are. `given`: what it is a copy of, which knows more.
    """
    if isinstance(model, torch.nn.Module) and any(map(is_module, model.modules())):
        return Explained(model, inputs_of(given) or inputs_of(model))
    return model


class Explained:
    """An exported program's module whose errors say what the inputs should have been."""

    def __init__(self, module: Callable[..., Any], inputs: Inputs | None) -> None:
        self._module = module
        self._inputs = inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        try:
            return self._module(*args, **kwargs)
        except Exception as error:
            if self._inputs is not None:
                self._inputs.check(args, kwargs)
            if not str(error).startswith(_GUARDS):
                raise
            raise ShapeError(
                f"the inputs are not what the program was exported for: {error}. Pass them as its example was, in the "
                "same places (by position or by keyword) and within its ranges, or export it with wider ones "
                "(torch.export.Dim)"
            ) from error
