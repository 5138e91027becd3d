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

    __slots__ = ("_missing", "_parts", "_structure", "admitted", "ended", "future", "inputs", "result", "settled")

    def __init__(self, inputs: Inputs, cut: Cut) -> None:
        super().__init__(inputs.rows, inputs.signature, cut)
        self.inputs: Inputs | None = inputs
        self.result: Any = None
        self._missing = inputs.rows  # rows that the result has not got yet
        self._structure: list[Any] | None = None  # of the model's output, once a part of it is there
        self._parts: dict[int, list[torch.Tensor]] | None = None  # by first row; all rows together at 0 if shared
        # Set by the lane, which alone touches the future.
        self.future: Any = None
        self.ended: Callable[[], bool] = bool
        self.settled = False
        self.admitted = 0.0

    # Two workers may be here for one call: `guard` is held while they agree, not while rows are copied.

    def place(self, start: int, stop: int, output: "Output", parts: list[torch.Tensor], guard: Guard) -> None:
        """Copy the output `parts` of rows `start` to `stop` to their place in the result."""
        dim = output.dim
        with guard:
            if self._parts is None:
                buffers = [_room(part, self.rows, dim) for part in parts]
                self.result = fill(output.value, iter(buffers))
                self._structure, self._parts = output.structure, {0: buffers}
            buffers = self._parts[0]
        _check_structure(self._structure, output.structure)
        _check_alike([buffers, parts], dim)
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.narrow(dim, start, stop - start).copy_(part)

    def append(self, start: int, output: "Output", guard: Guard) -> None:
        """Keep the output of a piece, whatever its size, for `join`."""
        copies = [part.clone(memory_format=torch.contiguous_format) for part in output.leaves]
        with guard:
            self._structure = self._structure or output.structure
            self._parts = self._parts or {}
            self._parts[start] = copies
        _check_structure(self._structure, output.structure)

    def join(self, output: "Output") -> None:
        """Join the pieces along `dim`, as they came."""
        pieces = [piece for _, piece in sorted((self._parts or {}).items())]
        _check_alike(pieces, output.dim)
        self.result = fill(output.value, iter(_concatenate(pieces, output.dim)))

    def count(self, rows: int, guard: Guard) -> bool:
        """Count rows that have their results; whether all have. Once a chunk: a batch may run twice."""
        with guard:
            self._missing -= rows
            return not self._missing


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
        if sorted(names) != sorted(self._names):
            raise ShapeError(f"the model was compiled for {_listed(self._names)}; this call has {_listed(names)}")
        expected = dict(zip(self._names, self.inputs.leaves, strict=True))  # by name: dicts may come in another order
        for name, leaf in zip(names, inputs.leaves, strict=True):
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
    if type(tensor) is not torch.Tensor:
        tensor = tensor.as_subclass(torch.Tensor)  # or one caller's subclass would be its batch-mates' as well
    return (tensor if stop - start == rows else tensor.narrow(dim, start, stop - start)).contiguous()


def _tensor(array: Any) -> torch.Tensor:
    """A tensor over an array's memory, or over a copy where torch cannot share it."""
    numpy = sys.modules["numpy"]
    aligned = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    shareable = aligned and array.flags.writeable and array.dtype.isnative
    native = array if shareable else numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def _aligned(piece: torch.Tensor) -> torch.Tensor:
    return piece.clone() if piece.data_ptr() % _ALIGNMENT else piece


class Output:
    """What the model returned for a batch, looked through: every tensor must have the batch's rows along `dim`.

    `size` is the number of rows of the batch, None where any number will do. Raises `OutputError`.
    """

    def __init__(self, value: Any, size: int | None, dim: int) -> None:
        self.value = value
        self.dim = dim
        self.leaves: list[torch.Tensor] = []
        self.structure: list[Any] = []
        constants: list[Any] = []
        walk(value, self.leaves, self.structure, constants)
        self.leaves = [_checked_output(leaf, size, dim) for leaf in self.leaves]
        for constant in constants:
            if constant is not None:
                raise OutputError(
                    f"the model returned a {type(constant).__name__} ({constant!r:.60}); only tensors with the batch's "
                    "rows can be handed out to the calls that shared the batch: return tensors, and None where there "
                    "is nothing"
                )
        if not self.leaves and size is not None:
            raise OutputError("the model returned no tensor; every call needs its rows of at least one")


def _checked_output(leaf: Any, size: int | None, dim: int) -> torch.Tensor:
    """One tensor of an output, on the host."""
    if not isinstance(leaf, torch.Tensor):
        try:
            leaf = _tensor(leaf)
        except TypeError:
            raise OutputError(
                f"the model returned a NumPy array of dtype {leaf.dtype} (objects, one a row?), which cannot become a "
                "tensor; return tensors"
            ) from None
    kind = leaf.layout
    if kind is torch.strided and (leaf.is_nested or leaf.is_meta):
        kind = "nested" if leaf.is_nested else "meta"
    if kind is not torch.strided:
        raise OutputError(f"the model returned a {kind} tensor, which cannot be cut into rows; return a dense one")
    if size is not None and (not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != size):
        raise OutputError(
            f"the model returned a tensor of shape {tuple(leaf.shape)} for a batch of {size} rows; every output tensor "
            f"needs that many along dim {dim}, so that each call can be given its own (a value for the whole batch, or "
            "a list with an object a row, needs disable_dynamic_batching())"
        )
    tensor: torch.Tensor = leaf if leaf.is_cpu else leaf.cpu()
    return tensor


def scatter(value: Any, chunks: Sequence[Chunk[Call]], size: int, dim: int, guard: Guard) -> list[Finished]:
    """Hand the rows of a batch's output to its calls, each in storage of its own; the calls that are complete now.

    Raises `OutputError` if the output does not have the batch's rows. Rows count as handed out when all of the batch
    are: if one call's cannot be, the batch will run again in parts.
    """
    if not chunks[0].call.cut.shared:
        return _keep_piece(value, chunks[0], dim, guard)
    output = Output(value, size, dim)
    sizes = [stop - start for _, start, stop in chunks]
    rows = sum(sizes)
    split = [_split(leaf if rows == size else leaf.narrow(dim, 0, rows), chunks, sizes, dim) for leaf in output.leaves]
    bare = value is output.leaves[0]
    finished: list[Finished] = []
    partial: list[Chunk[Call]] = []
    for chunk, *parts in zip(chunks, *split, strict=True):
        call, start, stop = chunk
        if stop - start == call.rows:
            finished.append((call, parts[0] if bare else fill(value, iter(parts))))
        else:
            call.place(start, stop, output, parts, guard)
            partial.append(chunk)
    return finished + [(call, call.result) for call, start, stop in partial if call.count(stop - start, guard)]


def _keep_piece(value: Any, chunk: Chunk[Call], dim: int, guard: Guard) -> list[Finished]:
    """The same where batches are not shared: the output of a piece may have any number of rows."""
    call, start, stop = chunk
    output = Output(value, None, dim)
    call.append(start, output, guard)
    if not call.count(stop - start, guard):
        return []
    call.join(output)
    return [(call, call.result)]


def _split(leaf: torch.Tensor, chunks: Sequence[Chunk[Call]], sizes: list[int], dim: int) -> Sequence[torch.Tensor]:
    """A leaf cut into chunks: copies for calls that are whole, views for those whose rows will be copied anyway."""
    if all(stop - start == call.rows for call, start, stop in chunks):
        # One release of the GIL, and storage of its own for each.
        copies: list[torch.Tensor] = torch.split_with_sizes_copy(leaf, sizes, dim)  # type: ignore[func-returns-value,assignment]
        return copies
    views = torch.split(leaf, sizes, dim)
    return [
        view.clone(memory_format=torch.contiguous_format) if stop - start == call.rows else view
        for view, (call, start, stop) in zip(views, chunks, strict=True)
    ]


def _room(part: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    shape = list(part.shape)
    shape[dim] = rows
    return torch.empty(shape, dtype=part.dtype)


def _check_structure(first: list[Any] | None, other: list[Any]) -> None:
    if first != other:
        raise OutputError("the model returned different structures for the parts of one call; they cannot be joined")


def _check_alike(pieces: list[list[torch.Tensor]], dim: int) -> None:
    """The parts of one call must differ in their rows only."""
    kinds = [[(*t.shape[:dim], *t.shape[dim:][1:], t.dtype) for t in tensors] for tensors in pieces]
    for kind in kinds[1:]:
        if kind != kinds[0]:
            raise OutputError(
                f"the model returned {kind} for one part of a call and {kinds[0]} for another (shape without rows, "
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
