"""Nested inputs to rows, and rows back to nested results: all the tensor work that is not the model's.

Lives here: measuring (loop thread: shapes and references only), and collate and scatter (worker threads).
Must not be here: asyncio, threads, decisions about who runs when.
"""

import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from aneuron.errors import OutputError, ShapeError
from aneuron.nested import fill, is_array, paths, walk
from aneuron.scheduler import Chunk, Cut, Waiting

_ALIGNMENT = 64  # bytes, as torch's CPU allocator aligns; MKL's results depend on it in the last bit


class Inputs(NamedTuple):
    """The inputs of one call, measured."""

    rows: int
    signature: Hashable  # equal for calls that may share a batch
    leaves: list[Any]  # tensors and NumPy arrays, in the order of the walk
    template: Any  # (args, kwargs); None for a single tensor


Guard = AbstractContextManager[Any]


class Call(Waiting):
    """One `await model(...)`: its inputs, and its result as it grows."""

    __slots__ = ("_buffers", "_pieces", "admitted", "ended", "future", "inputs", "missing", "result", "settled")

    def __init__(self, inputs: Inputs, cut: Cut) -> None:
        super().__init__(inputs.rows, inputs.signature, cut)
        self.inputs: Inputs | None = inputs
        self.missing = inputs.rows  # rows that the result has not got yet
        self.result: Any = None
        self._buffers: list[torch.Tensor] | None = None
        self._pieces: dict[int, list[torch.Tensor]] | None = None
        # Set by the lane, which alone touches the future.
        self.future: Any = None
        self.ended: Callable[[], bool] = bool
        self.settled = False
        self.admitted = 0.0

    def place(self, start: int, stop: int, output: Any, parts: list[torch.Tensor], dim: int, guard: Guard) -> bool:
        """Copy the output `parts` of rows `start` to `stop` to their place; whether the result is complete.

        Two workers may be here for one call: `guard` is held while they agree, not while rows are copied.
        """
        with guard:
            if self._buffers is None:
                self._buffers = [_room(part, self.rows, dim) for part in parts]
                self.result = fill(output, iter(self._buffers))
        _check_alike(self._buffers, parts, dim)
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.narrow(dim, start, stop - start).copy_(part)
        with guard:
            self.missing -= stop - start
            return not self.missing

    def append(self, start: int, stop: int, output: Any, parts: list[torch.Tensor], dim: int, guard: Guard) -> bool:
        """Keep the output `parts` of a piece, whatever its size; the last one in joins them all along `dim`."""
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        with guard:
            self._pieces = self._pieces or {}
            self._pieces[start] = copies
            self.missing -= stop - start
            if self.missing:
                return False
        joined = _concatenate([self._pieces[first] for first in sorted(self._pieces)], dim)
        self.result = fill(output, iter(joined))
        return True


Part = tuple[Inputs, int, int]  # the inputs of a call, and which rows of them
Finished = tuple[Call, Any]  # a call and its result


def _input_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    names = [name for index, value in enumerate(args) for name in paths(value, f"input {index}")]
    return names + [name for key in sorted(kwargs) for name in paths(kwargs[key], f"input {key!r}")]


# Measuring: on the loop thread, before admission.


def measure(args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> Inputs:
    """Rows, signature and tensors of a call's inputs. Raises `ShapeError` for what no model could take."""
    if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
        leaves, structure, template = [args[0]], (), None
    else:
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
        if dim:
            axis = dim % len(shape)
            shapes.append((shape[:axis], shape[axis + 1 :], _dtype(dtype)))
        else:
            shapes.append((shape[1:], _dtype(dtype)))
    return Inputs(rows, (structure, *shapes), leaves, template)


def _flatten_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], Any]:
    leaves: list[Any] = []
    key: list[Any] = []
    ordered = dict(sorted(kwargs.items()))
    walk((args, ordered), leaves, key, [])
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
    equal = getattr(torch, dtype.name, None)
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
        self.args, self.kwargs = args, kwargs
        self.inputs = measure(args, kwargs, dim)
        self._names = _input_names(args, kwargs)

    def check(self, inputs: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `ShapeError` unless the inputs have the compiled structure, shapes and dtypes."""
        if inputs.signature == self.inputs.signature:
            return
        names = _input_names(args, kwargs)
        if names != self._names:
            raise ShapeError(f"the model was compiled for {_listed(self._names)}; this call has {_listed(names)}")
        for name, leaf, ours in zip(names, inputs.leaves, self.inputs.leaves, strict=True):
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
        have = self.inputs.rows
        times, rest = divmod(rows or have, have)
        parts = [(self.inputs, 0, have)] * times + [(self.inputs, 0, rest)] * bool(rest)
        return collate(parts, rows or have, self._dim)


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names)})"


# Collating and scattering: in worker threads.


def collate(parts: Sequence[Part], size: int, dim: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments for a batch: the parts' rows one after the other, padded to `size` rows.

    Padding repeats the last row: zeros can be outside the model's domain. The tensors are contiguous and aligned
    whoever shares the batch, so that a row's result does not depend on how its neighbours lay in memory.
    """
    rows = sum(stop - start for _, start, stop in parts)
    joined = []
    for index in range(len(parts[0][0].leaves)):
        pieces = [_piece(inputs.leaves[index], start, stop, inputs.rows, dim) for inputs, start, stop in parts]
        if rows < size:
            last = pieces[-1]
            pieces += [last.narrow(dim, last.shape[dim] - 1, 1)] * (size - rows)
        joined.append(torch.cat(pieces, dim) if len(pieces) > 1 else _aligned(pieces[0]))
    template = parts[0][0].template
    if template is None:
        return (joined[0],), {}
    return fill(template, iter(joined))  # type: ignore[no-any-return]


def _piece(leaf: Any, start: int, stop: int, rows: int, dim: int) -> torch.Tensor:
    tensor: torch.Tensor = leaf if isinstance(leaf, torch.Tensor) else _tensor(leaf)
    return (tensor if stop - start == rows else tensor.narrow(dim, start, stop - start)).contiguous()


def _tensor(array: Any) -> torch.Tensor:
    """A tensor over an array's memory, or over a copy where torch cannot share it."""
    numpy = sys.modules["numpy"]
    shareable = array.flags.writeable and array.dtype.isnative and all(stride >= 0 for stride in array.strides)
    native = array if shareable else numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def _aligned(piece: torch.Tensor) -> torch.Tensor:
    return piece.clone() if piece.data_ptr() % _ALIGNMENT else piece


def scatter(output: Any, chunks: Sequence[Chunk[Call]], size: int, dim: int, guard: Guard) -> list[Finished]:
    """Hand the rows of a batch's output to its calls, each in storage of its own; the calls that are complete now.

    Raises `OutputError`, before anybody has got anything, if the output does not have the batch's rows.
    """
    leaves: list[Any] = []
    constants: list[Any] = []
    walk(output, leaves, [], constants)
    _check_output(leaves, constants, size if chunks[0].call.cut.shared else None, dim)
    leaves = [leaf if isinstance(leaf, torch.Tensor) else _tensor(leaf) for leaf in leaves]
    if not chunks[0].call.cut.shared:
        call, start, stop = chunks[0]
        return [(call, call.result)] if call.append(start, stop, output, leaves, dim, guard) else []
    sizes = [stop - start for _, start, stop in chunks]
    rows = sum(sizes)
    split = [_split(leaf if rows == size else leaf.narrow(dim, 0, rows), chunks, sizes, dim) for leaf in leaves]
    finished: list[Finished] = []
    for (call, start, stop), *parts in zip(chunks, *split, strict=True):
        if stop - start == call.rows:
            finished.append((call, parts[0] if output is leaves[0] else fill(output, iter(parts))))
        elif call.place(start, stop, output, parts, dim, guard):
            finished.append((call, call.result))
    return finished


def check_output(output: Any, size: int, dim: int) -> None:
    """Raise `OutputError` unless the output of a batch of `size` rows can be handed out to callers."""
    leaves: list[Any] = []
    constants: list[Any] = []
    walk(output, leaves, [], constants)
    _check_output(leaves, constants, size, dim)


def _split(leaf: torch.Tensor, chunks: Sequence[Chunk[Call]], sizes: list[int], dim: int) -> Sequence[torch.Tensor]:
    """A leaf cut into chunks: copies for calls that are whole, views for those whose rows will be copied anyway."""
    leaf = leaf if leaf.is_cpu else leaf.cpu()
    if all(stop - start == call.rows for call, start, stop in chunks):
        # One release of the GIL, and storage of its own for each.
        copies: list[torch.Tensor] = torch.split_with_sizes_copy(leaf, sizes, dim)  # type: ignore[func-returns-value,assignment]
        return copies
    views = torch.split(leaf, sizes, dim)
    return [
        view.clone(memory_format=torch.contiguous_format) if stop - start == call.rows else view
        for view, (call, start, stop) in zip(views, chunks, strict=True)
    ]


def _check_output(leaves: list[Any], constants: list[Any], size: int | None, dim: int) -> None:
    """Every tensor must have the batch's `size` rows (None: any number) along `dim`; `None` may stand beside."""
    for value in constants:
        if value is not None:
            raise OutputError(
                f"the model returned a {type(value).__name__} ({value!r:.60}); only tensors with the batch's rows can "
                "be handed out to the calls that shared the batch: return tensors, and None where there is nothing"
            )
    if not leaves and size is not None:
        raise OutputError("the model returned no tensor; every call needs its rows of at least one")
    for leaf in leaves:
        if getattr(leaf, "layout", torch.strided) is not torch.strided:
            raise OutputError(
                f"the model returned a {leaf.layout} tensor, which cannot be cut into rows; return a dense one"
            )
        if size is not None and (not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != size):
            raise OutputError(
                f"the model returned a tensor of shape {tuple(leaf.shape)} for a batch of {size} rows; every output "
                f"tensor needs that many along dim {dim}, so that each call can be given its own (a value for the "
                "whole batch, or a list with an object a row, needs disable_dynamic_batching())"
            )


def _room(part: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    shape = list(part.shape)
    shape[dim] = rows
    return torch.empty(shape, dtype=part.dtype)


def _check_alike(buffers: list[torch.Tensor], parts: list[torch.Tensor], dim: int) -> None:
    kinds = [[(*t.shape[:dim], *t.shape[dim + 1 :], t.dtype) for t in tensors] for tensors in (buffers, parts)]
    if kinds[0] != kinds[1]:
        raise OutputError(
            f"the model returned {kinds[1]} for one part of a call and {kinds[0]} for another (shape without rows, "
            "dtype, for each tensor); they cannot be joined"
        )


def _concatenate(parts: list[list[torch.Tensor]], dim: int) -> list[torch.Tensor]:
    """Chunk outputs joined along `dim`, as they come."""
    if len(parts) == 1:
        return parts[0]
    try:
        return [torch.cat(column, dim) for column in zip(*parts, strict=True)]
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = [[tuple(part.shape) for part in row] for row in parts]
        raise OutputError(f"the outputs of the chunks cannot be joined along dim {dim}: {shapes}: {error}") from error
