"""Rows into batches, and batches back into results: all the tensor work that is not the model's.

Lives here: a call as data, collate and scatter, which run in worker threads. Must not be here: asyncio, threads,
decisions about who runs when.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from aneuron.errors import OutputError
from aneuron.lengths import Pads, padded
from aneuron.nested import fill
from aneuron.outputs import Carried, Output, checked, tensor
from aneuron.waiting import Chunk, Waiting

Guard = AbstractContextManager[Any]


class Call(Waiting):
    """One `await model(...)`: its inputs, and its result where that grows in parts."""

    __slots__ = ("future", "leaves", "settled")

    future: Any  # the lanes alone touch it; set on admission
    template: Any = None  # (args, kwargs); None for a single tensor
    parts: "Parts | None" = None
    timer: Any = None  # that ends a call with a deadline
    limit: Any = None  # whose deadline that is
    trace: Any = None  # where the lanes note how the call was run, if anybody asks

    # Without buckets; see `BucketCall`.
    base: Hashable = None
    length: int = 0
    pads: Pads | None = None

    def __init__(self, rows: int, signature: Hashable, leaves: Sequence[Any], template: Any) -> None:
        self.rows = rows
        self.signature = signature
        self.bound = self.sequence = 0
        self.leaves: Sequence[Any] | None = leaves  # tensors and arrays, in the order of the walk; None at the end
        self.settled = False
        if template is not None:
            self.template = template


class BucketCall(Call):
    """A call to a model with buckets: `bucket` is the smallest that holds its `length`, `pads` what brings it there.

    Its signature is `(base, bucket)`; the base is the same in all buckets.
    """

    __slots__ = ("base", "bucket", "length", "pads")

    def __init__(
        self, rows: int, base: Hashable, leaves: Sequence[Any], template: Any, bucket: int, length: int, pads: Pads
    ) -> None:
        super().__init__(rows, (base, bucket), leaves, template)
        self.base = base
        self.bucket = bucket
        self.length = length
        self.pads = pads


class Parts:
    """The result of a call that is spread over several batches, as it grows.

    Two workers may be here for one call: `guard` is held while they agree, not while rows are copied.
    """

    def __init__(self, rows: int, output: Output) -> None:
        self._rows = self._missing = rows
        self._counted: set[int] = set()  # first rows of the chunks that are there
        self._dim = output.dim
        self._structure = output.structure
        self._pieces: dict[int, list[torch.Tensor]] = {}  # by first row
        self._whole: list[torch.Tensor] | None = None
        self.result: Any = None

    def place(self, start: int, output: Output, leaves: list[torch.Tensor], guard: Guard) -> None:
        """Copy output rows to their place in the result, from row `start` on."""
        with guard:
            if self._whole is None:
                whole = [_room(leaf, self._rows, self._dim) for leaf in leaves]
                self.result = fill(output.value, iter(whole))
                self._whole = whole
        self._check_structure(output)
        _check_alike([self._whole, leaves], self._dim)
        for whole_leaf, leaf in zip(self._whole, leaves, strict=True):
            whole_leaf.narrow(self._dim, start, leaf.shape[self._dim]).copy_(leaf)

    def append(self, start: int, output: Output) -> None:
        """Keep the output of a piece, whatever its size, for `join`."""
        self._check_structure(output)
        self._pieces[start] = [leaf.clone(memory_format=torch.contiguous_format) for leaf in output.leaves]

    def join(self, output: Output) -> None:
        """Join the pieces along `dim`, as they came."""
        pieces = [piece for _, piece in sorted(self._pieces.items())]
        _check_alike(pieces, self._dim)
        self.result = fill(output.value, iter(_concatenate(pieces, self._dim)))

    def count(self, start: int, rows: int, guard: Guard) -> bool:
        """Count rows that have their results; whether the last have. Once a chunk: a batch may run twice."""
        with guard:
            if start in self._counted:
                return False
            self._counted.add(start)
            self._missing -= rows
            return not self._missing

    def _check_structure(self, output: Output) -> None:
        if output.structure != self._structure:
            raise OutputError(
                "the model returned different structures for the parts of one call; they cannot be joined"
            )


Finished = tuple[Call, Any]  # a call and its result


def gather(chunks: Sequence[Chunk[Call]]) -> tuple[Sequence[Chunk[Call]], list[Sequence[Any]], Any]:
    """The chunks whose callers are still there, their calls' tensors, and what these stand in."""
    templates = [call.template for call, _, _ in chunks]  # before the leaves, of which the loop lets go first
    inputs: list[Any] = [call.leaves for call, _, _ in chunks]
    if None in inputs:
        there = [index for index, leaves in enumerate(inputs) if leaves is not None]
        chunks, templates, inputs = [[each[index] for index in there] for each in (chunks, templates, inputs)]
    return chunks, inputs, templates[0] if templates else None


def collate(
    chunks: Sequence[Chunk[Call]], inputs: Sequence[Sequence[Any]], template: Any, size: int, dim: int, bucket: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments for a batch: the chunks' rows one after the other, padded to `size` rows.

    `inputs` are the calls' tensors, `template` is what they stand in. Padding repeats the last row: zeros can be
    outside the model's domain. With `bucket`, inputs that have a length are padded to it (or cut, to see what a model
    makes of a shorter one). The tensors are the batch's own, contiguous and aligned, whoever shares it: a row's
    result does not depend on how its neighbours lay in memory, and a model that writes to its input writes to no
    caller's.
    """
    joined = []
    pads = chunks[0][0].pads if bucket else None
    rows = sum([stop - start for _, start, stop in chunks])
    for index, column in enumerate(zip(*inputs, strict=True)):
        pieces = [
            leaf if stop - start == call.rows and type(leaf) is torch.Tensor else _piece(leaf, start, stop, dim)
            for (call, start, stop), leaf in zip(chunks, column, strict=True)
        ]
        if pads is not None and (value := pads.values[index]) is not None:
            pieces = [padded(piece, pads.dim, bucket, value) for piece in pieces]
        if rows < size:
            last = pieces[-1]
            row = last if last.shape[dim] == 1 else last.narrow(dim, last.shape[dim] - 1, 1)
            pieces += [row] * (size - rows)
        whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
        joined.append(whole if whole.is_contiguous() else whole.contiguous())
    if template is None:
        return (joined[0],), {}
    return fill(template, iter(joined))  # type: ignore[no-any-return]


def _piece(leaf: Any, start: int, stop: int, dim: int) -> torch.Tensor:
    """Rows of a tensor or an array, as a plain tensor."""
    if not isinstance(leaf, torch.Tensor):
        return tensor(leaf[(slice(None),) * (dim % leaf.ndim) + (slice(start, stop),)])
    plain: torch.Tensor = leaf.as_subclass(torch.Tensor)  # or one caller's subclass would be its batch-mates' as well
    return plain.narrow(dim, start, stop - start)


def scatter(
    value: Any, chunks: Sequence[Chunk[Call]], size: int, dim: int, guard: Guard, cut: Carried | None = None
) -> list[Finished]:
    """Hand the rows of a batch's output to its calls, each in storage of its own; the calls that are complete now.

    With `cut`, what has the length of the batch's bucket is cut back to each call's own. Raises `OutputError` if the
    output does not have the batch's rows. Rows count as handed out when all of the batch
    are: if one call's cannot be, the batch will run again in parts.
    """
    if not chunks[0][0].cut.shared:
        return _keep_piece(value, chunks[0], dim, guard, cut)
    calls, sizes = [call for call, _, _ in chunks], [stop - start for _, start, stop in chunks]
    rows = sum(sizes)
    whole = sizes == [call.rows for call in calls]
    if type(value) is torch.Tensor and whole:  # the short way, same results
        leaf = checked(value, size, dim)
        copies = _split(leaf if rows == size else leaf.narrow(dim, 0, rows), chunks, sizes, dim, False, *(cut or ()))
        return list(zip(calls, copies, strict=True))
    spread = [] if whole else [chunk for chunk, own in zip(chunks, sizes, strict=True) if own != chunk[0].rows]
    output = Output(value, size, dim)
    split = [
        _split(leaf if rows == size else leaf.narrow(dim, 0, rows), chunks, sizes, dim, bool(spread), dims)
        for leaf, dims in zip(output.leaves, cut or [()] * len(output.leaves), strict=True)
    ]
    finished: list[Finished] = []
    for (call, start, stop), *leaves in zip(chunks, *split, strict=True):
        if stop - start == call.rows:
            finished.append((call, leaves[0] if value is output.leaves[0] else fill(value, iter(leaves))))
        else:
            _parts(call, output, guard).place(start, output, leaves, guard)
    for call, start, stop in spread:
        parts = _parts(call, output, guard)
        if parts.count(start, stop - start, guard):
            finished.append((call, parts.result))
    return finished


def _keep_piece(value: Any, chunk: Chunk[Call], dim: int, guard: Guard, cut: Carried | None) -> list[Finished]:
    """The same where batches are not shared: the output of a piece may have any number of rows."""
    call, start, stop = chunk
    output = Output(value, None, dim)
    if cut:
        output.leaves = [_cut(leaf, call, dims) for leaf, dims in zip(output.leaves, cut, strict=True)]
    parts = _parts(call, output, guard)
    parts.append(start, output)
    if not parts.count(start, stop - start, guard):
        return []
    parts.join(output)
    return [(call, parts.result)]


def _parts(call: Call, output: Output, guard: Guard) -> Parts:
    with guard:
        call.parts = parts = call.parts or Parts(call.rows, output)
        return parts


def _split(
    leaf: torch.Tensor,
    chunks: Sequence[Chunk[Call]],
    sizes: list[int],
    dim: int,
    spread: bool,
    lengths: tuple[int, ...] = (),
) -> Sequence[torch.Tensor]:
    """A leaf cut into chunks: copies for calls that are whole, views for those whose rows will be copied anyway.

    At the dims `lengths` it has the length, and is cut back to each call's own.
    """
    if not spread and not lengths:
        # One release of the GIL, and storage of its own for each.
        copies: Sequence[torch.Tensor] = torch.split_with_sizes_copy(leaf, sizes, dim)  # type: ignore[func-returns-value,assignment]
        return copies
    views: Sequence[torch.Tensor] = torch.split(leaf, sizes, dim)
    if lengths:
        views = [_cut(view, call, lengths) for view, (call, _, _) in zip(views, chunks, strict=True)]
    return [
        view.clone(memory_format=torch.contiguous_format) if stop - start == call.rows else view
        for view, (call, start, stop) in zip(views, chunks, strict=True)
    ]


def _cut(leaf: torch.Tensor, call: Call, dims: tuple[int, ...]) -> torch.Tensor:
    """A view of a leaf as long as the call was."""
    for dim in dims:
        leaf = leaf.narrow(dim, 0, call.length) if call.bucket and leaf.shape[dim] != call.length else leaf
    return leaf


def _room(part: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    shape = list(part.shape)
    shape[dim] = rows
    return torch.empty(shape, dtype=part.dtype)


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
