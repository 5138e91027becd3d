"""What a call brings: how many rows, what it may share a batch with, and what is wrong with it.

Lives here: looking at inputs, on the loop thread: shapes, dtypes and references, whatever the size. Must not be here:
anything that touches a tensor's data (rows.py), who runs when (scheduler.py).
"""

from typing import Any

import torch

from aneuron.errors import ShapeError
from aneuron.nested import is_array, paths, walk
from aneuron.rows import Call, collate


def _input_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    names = [name for index, value in enumerate(args) for name in paths(value, f"input {index}")]
    return names + [name for key in sorted(kwargs) for name in paths(kwargs[key], f"input {key!r}")]


def measure(args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> Call:
    """Rows, signature and tensors of a call's inputs. Raises `ShapeError` for what no model could take."""
    if len(args) == 1 and not kwargs and not dim and type(x := args[0]) is torch.Tensor:  # the short way, same results
        if x.is_cpu and x.layout is torch.strided and not x.is_nested and (shape := x.shape) and (rows := shape[0]):
            return Call(rows, (shape[1:], x.dtype), args, None)
        raise _unfit(args, kwargs, list(args), dim)
    return _measure(args, kwargs, dim)


def _measure(args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> Call:
    leaves, structure, template = _flatten_inputs(args, kwargs)
    rows = 0
    shapes: list[tuple[Any, ...]] = []
    for leaf in leaves:
        try:
            shape, dtype = leaf.shape, leaf.dtype
            size = shape[dim]
            usable = is_array(leaf) or (leaf.is_cpu and leaf.layout is torch.strided)
        except (RuntimeError, IndexError):
            raise _unfit(args, kwargs, leaves, dim) from None
        rows = rows or size
        if not usable or not size or size != rows:
            raise _unfit(args, kwargs, leaves, dim)
        axis = dim % len(shape)
        shapes.append((*shape[:axis], shape[axis + 1 :], _dtype(dtype)))
    return Call(rows, (structure, *shapes) if structure else shapes[0], leaves, template)


def _flatten_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], Any]:
    leaves: list[Any] = []
    key: list[Any] = []
    ordered = dict(sorted(kwargs.items()))
    try:
        walk((args, ordered), leaves, key, [])
    except RecursionError:
        raise ShapeError("the inputs are nested too deeply, or contain themselves; pass a flatter structure") from None
    if not leaves:
        raise ShapeError(
            "the call has no tensor among its inputs, so it has no rows; pass at least one tensor or NumPy array "
            "with a batch dimension"
        )
    if len(args) == 1 and len(key) == 4 and leaves[0] is args[0]:
        return leaves, (), (args, {})  # a single array: packed with calls of a single tensor
    return leaves, tuple(key), (args, ordered)


def _dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a tensor's or an array's dtype."""
    if type(dtype) is torch.dtype:
        return dtype
    equal = getattr(torch, dtype.name, None) if dtype.kind in "biufc" else None
    if not isinstance(equal, torch.dtype):
        raise ShapeError(
            f"a NumPy array of dtype {dtype} cannot become a tensor; convert it first, for example with "
            "array.astype('float32')"
        )
    return equal


def _unfit(args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], dim: int) -> ShapeError:
    """Say which input has no rows, or not as many as the others."""
    names = _input_names(args, kwargs)
    sizes: dict[str, int] = {}
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            if leaf.is_nested or leaf.layout is not torch.strided:
                layout = "nested" if leaf.is_nested else leaf.layout
                return ShapeError(
                    f"{name} is a {layout} tensor, which has no rows to cut; pass a dense one (to_dense())"
                )
            if leaf.is_meta:
                return ShapeError(f"{name} is a meta tensor: it has a shape but no data; pass a real one")
            if not leaf.is_cpu:
                return ShapeError(f"{name} is on {leaf.device}; inputs are host tensors: pass it as .cpu()")
        if leaf.ndim == 0:
            return ShapeError(
                f"{name} is a 0-d tensor and has no batch dimension; pass a Python number if every row is to see it, "
                "or give it one row with .reshape(1)"
            )
        if not -leaf.ndim <= dim < leaf.ndim:
            return ShapeError(f"{name} has shape {tuple(leaf.shape)} and no dimension {dim} (dim={dim}) to cut along")
        if leaf.shape[dim] == 0:
            return ShapeError(
                f"{name} has shape {tuple(leaf.shape)}: an empty batch, 0 rows along dim {dim}; send one at least"
            )
        sizes[name] = leaf.shape[dim]
    said = ", ".join(f"{name} has {rows}" for name, rows in sizes.items())
    return ShapeError(
        f"the inputs have unequal rows along dim {dim}: {said}; every tensor needs the same number "
        "(x.expand(rows, ...) repeats one row without a copy)"
    )


class Compiled:
    """The inputs that a model was compiled for; a call that differs is refused before any device work."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> None:
        self._dim = dim
        self._call = measure(args, kwargs, dim)
        self.rows = self._call.rows
        self.leaves = self._call.leaves or ()
        self._names = _input_names(args, kwargs)

    def check(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `ShapeError` unless the call's inputs have the compiled structure, shapes and dtypes."""
        if call.signature == self._call.signature:
            return
        names = _input_names(args, kwargs)
        if sorted(names) != sorted(self._names):
            raise ShapeError(f"the model was compiled for {_listed(self._names)}; this call has {_listed(names)}")
        expected = dict(zip(self._names, self.leaves, strict=True))  # by name: dicts may come in another order
        for name, leaf in zip(names, call.leaves or (), strict=True):
            ours = expected[name]
            shape, wanted_shape, axis = tuple(leaf.shape), tuple(ours.shape), self._dim % ours.ndim
            dtype, wanted = _dtype(leaf.dtype), _dtype(ours.dtype)
            row = wanted_shape[:axis] + wanted_shape[axis + 1 :]
            if len(shape) != len(wanted_shape) or shape[:axis] + shape[axis + 1 :] != row:
                hint = f"; for one row without its batch dimension pass x.unsqueeze({axis})" if shape == row else ""
                raise ShapeError(
                    f"{name} has shape {shape}; the model was compiled for {wanted_shape}, where only dim {axis} "
                    f"may differ{hint}"
                )
            if dtype != wanted:
                raise ShapeError(f"{name} has dtype {dtype}; the model was compiled for {wanted}: pass x.to({wanted})")

    def example(self, rows: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs, their rows repeated and cut to `rows` (None: as they are). Worker thread."""
        have = self.rows
        times, rest = divmod(rows or have, have)
        chunks = [(self._call, 0, have)] * times + [(self._call, 0, rest)] * bool(rest)
        return collate(chunks, [self.leaves] * len(chunks), self._call.template, rows or have, self._dim)


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names)})"
