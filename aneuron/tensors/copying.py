"""Rows copied: into a batch's inputs, and out of its outputs into storage of the callers' own.

Lives here: how torch copies rows, of all kinds of tensors, and whether a native way is taken instead: for what is small
and plain, where the extension is there (_copying.pyx). Must not be here: what is copied where (rows.py).
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aneuron.tensors.lengths import padded
from aneuron.tensors.quantized import QUANTIZED, grid, joined

native: Any = None
try:
    from aneuron.tensors import _copying  # type: ignore[attr-defined]

    native = _copying
except (ImportError, AttributeError):  # not built, or a torch before 2.10
    pass


class Length(NamedTuple):
    """What rows are padded to: the length along a dimension, and the number that they are padded with."""

    dim: int
    length: int
    pad: float
    left: bool = False  # whether padding comes first


def join(
    chunks: Sequence[Any],
    inputs: Sequence[Sequence[Any]],
    index: int,
    size: int,
    dim: int,
    to: Length | None = None,
) -> Tensor:
    """The chunks' rows of one input, in memory of their own: `inputs` are the calls' tensors and arrays, `index` says
    which of them. The last row is repeated up to `size` rows. With `to` they are padded, or cut, to a length.
    """
    if native is not None and not dim:
        if to is None:
            whole = native.join(chunks, inputs, index, size)
        else:
            first = inputs[0][index]
            at = 0 if to.left else to.dim % first.ndim
            pad = _number(to.pad, first.dtype) if type(first) is Tensor else None
            whole = native.join(chunks, inputs, index, size, at, to.length, pad) if at else None
        if whole is not None:
            return whole  # type: ignore[no-any-return]
    pieces = [
        leaf if type(leaf := own[index]) is Tensor and stop - start == call.rows else _piece(leaf, start, stop, dim)
        for (call, start, stop), own in zip(chunks, inputs, strict=True)
    ]
    if to is not None:
        pieces = [padded(each, *to) for each in pieces]
    return _assemble(pieces, size - sum([stop - start for _, start, stop in chunks]), dim)


@lru_cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=dtype, device="cpu")


def _piece(leaf: Any, start: int, stop: int, dim: int) -> Tensor:
    """Rows of a tensor or an array, as a plain tensor that need not own them."""
    if not isinstance(leaf, Tensor):
        return tensor(leaf[(slice(None),) * (dim % leaf.ndim) + (slice(start, stop),)])
    # Or one caller's subclass would be its batch-mates' as well.
    plain = leaf if type(leaf) is Tensor else leaf.as_subclass(Tensor)
    return plain.narrow(dim, start, stop - start)


def _assemble(pieces: list[Tensor], missing: int, dim: int) -> Tensor:
    """Pieces one after the other, contiguous, in memory of their own; the last row is repeated for what is missing."""
    if missing:
        last = pieces[-1]
        pieces += [last if last.shape[dim] == 1 else last.narrow(dim, last.shape[dim] - 1, 1)] * missing
    whole = cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
    return whole if whole.is_contiguous() else whole.contiguous()


def cat(pieces: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    """Pieces of one kind, one after the other."""
    return joined(pieces, dim) if pieces[0].is_quantized else torch.cat(pieces, dim)


def split(leaf: Tensor, chunks: Sequence[Any], size: int, dim: int, lengths: tuple[int, ...] = ()) -> Sequence[Any]:
    """The rows of each chunk in storage of their own; None for a chunk that is a part of its call only.

    The tensor has `size` rows; those that are left at its end are nobody's. Along the dims `lengths` it is cut back to
    the length of each call.
    """
    left = bool(lengths) and chunks[0][0].pads is not None and chunks[0][0].pads.left
    if native is not None and not dim and len(lengths) < 2 and not left:
        copies = native.split(leaf, chunks, size, *lengths)
        if copies is not None:
            return copies  # type: ignore[no-any-return]
    sizes = [stop - start for _, start, stop in chunks]
    if not lengths and sizes == [call.rows for call, _, _ in chunks]:
        rows = sum(sizes)
        there = leaf if rows == size else leaf.narrow(dim, 0, rows)
        return torch.split_with_sizes_copy(there, sizes, dim)  # type: ignore[func-returns-value,return-value]
    start, found = 0, list[Any]()
    for (call, _, _), rows in zip(chunks, sizes, strict=True):
        view = shortened(leaf.narrow(dim, start, rows), call, lengths) if rows == call.rows else None
        found.append(None if view is None else view.clone(memory_format=torch.contiguous_format))
        start += rows
    return found


def deal(leaf: Tensor, chunks: Sequence[Any], size: int, dim: int) -> list[Any] | None:
    """The calls of chunks that are whole, each with its rows in storage of its own, at a glance; None where it takes
    more to see what the tensor is.
    """
    return None if native is None or dim else native.deal(leaf, chunks, size)


def shortened(leaf: Any, call: Any, lengths: tuple[int, ...]) -> Any:
    """A view of a leaf as long as the call was, along these dims."""
    for dim in lengths:
        more = leaf.shape[dim] - call.pads.length if call.bucket else 0
        leaf = leaf.narrow(dim, more if call.pads.left else 0, call.pads.length) if more else leaf
    return leaf


def room(like: Tensor, rows: int, dim: int) -> Tensor:
    """A tensor like another one, with so many rows, whose numbers are still to come."""
    if native is not None and not dim:
        whole = native.room(like, rows)
        if whole is not None:
            return whole  # type: ignore[no-any-return]
    shape = list(like.shape)
    shape[dim] = rows
    if like.is_quantized:
        return torch.empty_quantized(shape, like)
    return torch.empty(shape, dtype=like.dtype, device="cpu")


def place(whole: Tensor, at: int, leaf: Tensor, start: int, stop: int, dim: int) -> bool:
    """Copy rows `start` to `stop` of a tensor over those of another one, from row `at` on.

    False, with nothing done, if the two differ in more than the number of their rows.
    """
    if native is not None and not dim and native.place(whole, at, leaf, start, stop):
        return True
    if not alike(whole, leaf, dim):
        return False
    rows = stop - start
    whole.narrow(dim, at, rows).copy_(leaf if rows == leaf.shape[dim] else leaf.narrow(dim, start, rows))
    return True


def alike(one: Tensor, other: Tensor, dim: int) -> bool:
    """Whether two tensors could be parts of one, along `dim`."""
    if one.dtype is not other.dtype or one.dtype in QUANTIZED:
        return kind(one, dim) == kind(other, dim)
    return one.shape == other.shape or kind(one, dim) == kind(other, dim)


def kind(part: Tensor, dim: int) -> tuple[Any, ...]:
    """What the parts of one tensor have in common: the shape without rows, dtype, and how it is quantized."""
    on_grid = (grid(part, dim),) if part.dtype in QUANTIZED else ()
    return (*part.shape[:dim], *part.shape[dim:][1:], part.dtype, *on_grid)


def tensor(array: Any) -> torch.Tensor:
    """A tensor over an array's memory, or over a copy where torch cannot share it."""
    numpy = sys.modules["numpy"]
    aligned = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    shareable = aligned and array.flags.writeable and array.dtype.isnative
    native = array if shareable else numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def fits(leaf: Any, size: int | None, dim: int) -> bool:
    """Whether something is known at a glance to be a plain tensor on the host, with so many rows."""
    return native is not None and not dim and bool(native.fits(leaf, -1 if size is None else size))


def unmodified(chunks: Sequence[Any], inputs: Sequence[Sequence[Any]]) -> bool:
    """Whether the tensors of all calls have been written to as often as these have noted, all of a call's together.

    False where it is not known: what is no tensor, or was made under inference mode, may be among them.
    """
    if native is not None:
        return bool(native.unmodified(chunks, inputs))
    try:
        for (call, _, _), leaves in zip(chunks, inputs, strict=True):
            if (leaves[0]._version if len(leaves) == 1 else sum([leaf._version for leaf in leaves])) != call.version:
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
