"""Rows into batches, and batches back into results: all the tensor work that is not the model's.

Lives here: collate and scatter, which run in worker threads. Must not be here: asyncio, threads,
decisions about who runs when.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor  # looked up for each row

from aneuron.errors import InputModified, OutputError
from aneuron.sched.call import Call, Chunk
from aneuron.tensors.lengths import padded
from aneuron.tensors.marked import Rows, Shared, is_mark
from aneuron.tensors.nested import fill, is_array, walk
from aneuron.tensors.outputs import Carried, Output, checked, tensor
from aneuron.tensors.quantized import QUANTIZED, grid, joined

Guard = AbstractContextManager[Any]


def base_of(call: Call) -> Hashable:
    """What is the same of the calls of all buckets, as their signature says it; None without buckets."""
    return call.signature[0] if call.bucket else None  # type: ignore[index]


class Parts:
    """The result of a call that is spread over several batches, as it grows.

    Two workers may be here for one call: `guard` is held while they agree, not while rows are copied.
    """

    def __init__(self, rows: int, output: Output) -> None:
        self._rows = self._missing = rows
        self._counted: set[int] = set()  # first rows of the chunks that are there
        self._dim = output.dim
        self._structure = output.structure
        self._pieces: dict[int, list[Any]] = {}  # by first row
        self._whole: list[Any] | None = None
        self.result: Any = None

    def place(self, start: int, output: Output, leaves: list[Any], guard: Guard) -> None:
        """Copy output rows to their place in the result, from row `start` on. What is shared comes from the first."""
        with guard:
            if self._whole is None:
                pairs = zip(output.leaves, leaves, strict=True)
                whole = [leaf if isinstance(of, Shared) else _room(leaf, self._rows, self._dim) for of, leaf in pairs]
                self.result = fill(output.value, iter(whole))
                self._whole = whole
        self._check_structure(output)
        _check_alike([_unshared(output, each) for each in (self._whole, leaves)], self._dim)
        for of, whole_leaf, leaf in zip(output.leaves, self._whole, leaves, strict=True):
            if isinstance(of, Rows):
                whole_leaf[start : start + len(leaf)] = leaf
            elif not isinstance(of, Shared):
                whole_leaf.narrow(self._dim, start, leaf.shape[self._dim]).copy_(leaf)

    def append(self, start: int, output: Output) -> None:
        """Keep the output of a piece, whatever its size, for `join`."""
        self._check_structure(output)
        self._pieces[start] = [_keep(leaf) for leaf in output.leaves]

    def join(self, output: Output) -> None:
        """Join the pieces along `dim`, as they came; the only one is the result, whatever it is."""
        pieces = [piece for _, piece in sorted(self._pieces.items())]
        if len(pieces) > 1:
            _check_alike([_unshared(output, piece) for piece in pieces], self._dim)
            _check_joinable(output)
        self.result = fill(output.value, iter(_concatenate(output, pieces, self._dim)))

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


def gather(chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], list[Sequence[Any]], Any]:
    """The chunks whose callers are still there, their calls' tensors, and what these stand in."""
    templates = [call.template for call, _, _ in chunks]  # before the leaves, of which the loop lets go first
    inputs: list[Any] = [call.leaves for call, _, _ in chunks]
    if None in inputs:
        there = [index for index, leaves in enumerate(inputs) if leaves is not None]
        chunks, templates, inputs = [[each[index] for index in there] for each in (chunks, templates, inputs)]
    return chunks, inputs, templates[0] if templates else None


def version_of(leaves: Sequence[Any]) -> int:
    """How often the tensors have been written to in place, all together, as far as torch counts it."""
    return sum([_version(leaf) for leaf in leaves])


def _version(leaf: Any) -> int:
    if isinstance(leaf, torch.Tensor):
        return 0 if leaf.is_inference() else leaf._version
    return version_in(leaf.value if type(leaf) is Shared else leaf.objects) if is_mark(leaf) else 0


def version_in(value: Any) -> int:
    """The same of the tensors in a structure; 0 for what a call will refuse."""
    leaves: list[Any] = [value]
    if not isinstance(value, torch.Tensor):
        leaves.clear()
        with suppress(Exception):
            walk(value, leaves, [], [])
    return version_of(leaves)


MODIFIED = (
    "a tensor among the inputs was modified in place while its call waited; inputs are read when their batch is "
    "formed: leave them alone until the call has ended, or pass a copy (x.clone()); for a slice of a buffer whose "
    "other rows are written to, buffer[i:j].data"
)


def check_unmodified(chunks: Sequence[Chunk], inputs: Sequence[Sequence[Any]], template: Any) -> None:
    """Raise `InputModified` if a tensor has been written to since its call; after they are read, not before."""
    if template is None:  # the short way, same results
        with suppress(AttributeError, RuntimeError):  # an array, or an inference tensor, among them
            for (call, _, _), leaves in zip(chunks, inputs, strict=True):
                if leaves[0]._version != call.version:
                    break
            else:
                return
    if list(map(version_of, inputs)) != [call.version for call, _, _ in chunks]:
        raise InputModified(MODIFIED)


def columns(
    chunks: Sequence[Chunk], inputs: Sequence[Sequence[Any]], size: int, dim: int, bucket: int = 0
) -> list[Any]:
    """A batch's inputs, one after the other: the chunks' rows, padded to `size` rows. `inputs` are the calls' tensors.

    Padding repeats the last row: zeros can be outside the model's domain. With `bucket`, inputs that have a length are
    padded to it (or cut, to see what a model makes of a shorter one). The tensors are the batch's own, contiguous and
    aligned, whoever shares it: a row's result does not depend on how its neighbours lay in memory, and a model that
    writes to its input writes to no caller's. What is `Shared` is the first call's; `Rows` become a list.
    """
    joined: list[Any] = []
    pads = chunks[0][0].pads if bucket else None
    rows = sum([stop - start for _, start, stop in chunks])
    for index, column in enumerate(zip(*inputs, strict=True)):
        if (kind := type(column[0])) is Rows or kind is Shared:
            joined.append(column[0] if kind is Shared else _objects(chunks, column, size))
            continue
        pieces = [
            leaf if stop - start == call.rows and type(leaf) is Tensor else _piece(leaf, start, stop, dim)
            for (call, start, stop), leaf in zip(chunks, column, strict=True)
        ]
        if pads is not None and (value := pads.values[index]) is not None:
            pieces = [padded(piece, pads.dim, bucket, value) for piece in pieces]
        if rows < size:
            last = pieces[-1]
            row = last if last.shape[dim] == 1 else last.narrow(dim, last.shape[dim] - 1, 1)
            pieces += [row] * (size - rows)
        whole = cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
        joined.append(whole if whole.is_contiguous() else whole.contiguous())
    return joined


def arguments(template: Any, joined: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments: the inputs of a batch, in what they stand in."""
    if template is None:
        return (joined[0],), {}
    values = [_unmarked(each.value) if type(each) is Shared else each for each in joined]
    return fill(template, iter(values))  # type: ignore[no-any-return]


def collate(
    chunks: Sequence[Chunk], inputs: Sequence[Sequence[Any]], template: Any, size: int, dim: int, bucket: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments for a batch: its `columns`, in what they stand in."""
    return arguments(template, columns(chunks, inputs, size, dim, bucket))


def _objects(chunks: Sequence[Chunk], column: Sequence[Any], size: int) -> list[Any]:
    """The objects of a batch's rows; the last one is repeated."""
    objects = [each for (_, start, stop), own in zip(chunks, column, strict=True) for each in own[start:stop]]
    return objects + objects[-1:] * (size - len(objects))


def _unmarked(value: Any) -> Any:
    """What is shared, as the model gets it: arrays as tensors, like everywhere."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    if not any(map(is_array, leaves)):
        return value
    return fill(value, iter([tensor(leaf) if is_array(leaf) else leaf for leaf in leaves]))


def cat(pieces: list[torch.Tensor] | tuple[torch.Tensor, ...], dim: int) -> torch.Tensor:
    """Pieces of one kind, one after the other."""
    return joined(pieces, dim) if pieces[0].is_quantized else torch.cat(pieces, dim)


def _piece(leaf: Any, start: int, stop: int, dim: int) -> torch.Tensor:
    """Rows of a tensor or an array, as a plain tensor."""
    if not isinstance(leaf, torch.Tensor):
        return tensor(leaf[(slice(None),) * (dim % leaf.ndim) + (slice(start, stop),)])
    plain: torch.Tensor = leaf.as_subclass(torch.Tensor)  # or one caller's subclass would be its batch-mates' as well
    return plain.narrow(dim, start, stop - start)


def scatter(
    value: Any, chunks: Sequence[Chunk], size: int, dim: int, guard: Guard, cut: Carried | None = None
) -> list[Finished]:
    """Hand the rows of a batch's output to its calls, each in storage of its own; the calls that are complete now.

    `value` is a single tensor, or an `Output`. With `cut`, what has the length of the batch's bucket is cut back to
    each call's own. Raises `OutputError` if the output does not have the batch's rows. Rows count as handed out when
    all of the batch are: if one call's cannot be, the batch will run again in parts.
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
    output = value if isinstance(value, Output) else Output(value, size, dim)
    split = [
        _cut_up(leaf, rows, chunks, sizes, dim, bool(spread), dims)
        for leaf, dims in zip(output.leaves, cut or [()] * len(output.leaves), strict=True)
    ]
    finished: list[Finished] = []
    for (call, start, stop), *leaves in zip(chunks, *split, strict=True):
        if stop - start == call.rows:
            finished.append((call, leaves[0] if output.value is output.leaves[0] else fill(output.value, iter(leaves))))
        else:
            _parts(call, output, guard).place(start, output, leaves, guard)
    for call, start, stop in spread:
        parts = _parts(call, output, guard)
        if parts.count(start, stop - start, guard):
            finished.append((call, parts.result))
    return finished


def _keep_piece(value: Any, chunk: Chunk, dim: int, guard: Guard, cut: Carried | None) -> list[Finished]:
    """The same where batches are not shared: the output of a piece may have any number of rows."""
    call, start, stop = chunk
    output = value if isinstance(value, Output) else Output(value, None, dim)
    if cut:
        output.leaves = [
            _cut(leaf, call, dims) if dims else leaf for leaf, dims in zip(output.leaves, cut, strict=True)
        ]
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


def _cut_up(
    leaf: Any,
    rows: int,
    chunks: Sequence[Chunk],
    sizes: list[int],
    dim: int,
    spread: bool,
    lengths: tuple[int, ...],
) -> Sequence[Any]:
    """What of a tensor, a list of rows or a shared value each chunk gets."""
    if isinstance(leaf, torch.Tensor):
        there = leaf if leaf.shape[dim] == rows else leaf.narrow(dim, 0, rows)
        return _split(there, chunks, sizes, dim, spread, lengths)
    if isinstance(leaf, Shared):
        return [own(leaf.value) for _ in chunks]
    ends = list(accumulate(sizes))
    return [[own(each) for each in leaf[end - size : end]] for end, size in zip(ends, sizes, strict=True)]


def own(value: Any) -> Any:
    """A caller's own copy of what is not cut further: its tensors detached, on the host, in storage of their own."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    if not leaves:
        return value
    copies = [checked(leaf, None, 0).detach().clone(memory_format=torch.contiguous_format) for leaf in leaves]
    return fill(value, iter(copies))


def _split(
    leaf: torch.Tensor,
    chunks: Sequence[Chunk],
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
        leaf = leaf.narrow(dim, 0, call.pads.length) if call.bucket and leaf.shape[dim] != call.pads.length else leaf
    return leaf


def _room(part: Any, rows: int, dim: int) -> Any:
    if isinstance(part, list):
        return [None] * rows
    shape = list(part.shape)
    shape[dim] = rows
    if part.is_quantized:
        return torch.empty_quantized(shape, part)
    return torch.empty(shape, dtype=part.dtype, device="cpu")


def _unshared(output: Output, parts: list[Any]) -> list[Any]:
    """Without what is the same for all: that is taken from the first part."""
    return [part for of, part in zip(output.leaves, parts, strict=True) if not isinstance(of, Shared)]


def _check_alike(pieces: list[list[Any]], dim: int) -> None:
    """The tensors of the parts of one call must differ in their rows only."""
    kinds = [[_kind(part, dim) for part in parts if isinstance(part, torch.Tensor)] for parts in pieces]
    for kind in kinds[1:]:
        if kind != kinds[0]:
            raise OutputError(
                f"the model returned {kind} for one part of a call and {kinds[0]} for another (shape without rows, "
                "dtype, and how it is quantized, for each tensor); they cannot be joined"
            )


def _kind(part: torch.Tensor, dim: int) -> tuple[Any, ...]:
    on_grid = (grid(part, dim),) if part.dtype in QUANTIZED else ()
    return (*part.shape[:dim], *part.shape[dim:][1:], part.dtype, *on_grid)


def _keep(leaf: Any) -> Any:
    """A part of a piece's output in storage of its own."""
    return own(leaf.objects if isinstance(leaf, Rows) else leaf.value if isinstance(leaf, Shared) else leaf)


def _check_joinable(output: Output) -> None:
    """What is neither tensor nor list of rows is one piece's, and cannot be joined with another's."""
    for constant in output.constants:
        if constant is not None:
            raise OutputError(
                f"the model returned a {type(constant).__name__} ({constant!r:.60}) for each of several pieces of a "
                "call; a value for the whole batch can be given to a call that is one piece only: send fewer rows, "
                "raise split_size, name one core with device_ids, or leave it out"
            )


def _concatenate(output: Output, parts: list[list[Any]], dim: int) -> list[Any]:
    """Chunk outputs joined along `dim`, as they come; lists after each other, and of what is shared the first."""
    if len(parts) == 1:
        return parts[0]
    return [_join(leaf, column, dim) for leaf, column in zip(output.leaves, zip(*parts, strict=True), strict=True)]


def _join(leaf: Any, column: tuple[Any, ...], dim: int) -> Any:
    if isinstance(leaf, Rows):
        return [each for part in column for each in part]
    if isinstance(leaf, Shared):
        return column[0]
    try:
        return cat(column, dim)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = [tuple(part.shape) for part in column]
        raise OutputError(f"the outputs of the chunks cannot be joined along dim {dim}: {shapes}: {error}") from error
