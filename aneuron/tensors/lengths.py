"""The length that inputs have where a model is compiled for several.

Lives here: which inputs have one, from shapes alone, and padding a tensor to its bucket. Must not be here: which bucket
fits (buckets.py), batches (rows.py), outputs (outputs.py).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isinf
from typing import Any, NamedTuple

import torch

from aneuron.errors import ShapeError
from aneuron.tensors.buckets import Buckets
from aneuron.tensors.marked import is_mark
from aneuron.tensors.nested import Path, named
from aneuron.tensors.quantized import QUANTIZED

Lengths = Mapping[str, float | None]  # for each input by its path what pads it, None if it has no length


class Pads(NamedTuple):
    """What brings the inputs of a call to its bucket: `values` has for each what pads it at `dim`, None if nothing."""

    dim: int
    values: tuple[float | None, ...]
    length: int  # that the call has
    left: bool = False  # whether padding comes first


def padded(piece: torch.Tensor, dim: int, bucket: int, value: float, left: bool = False) -> torch.Tensor:
    """A tensor padded along `dim` to the length of a bucket, or cut to it; the tensor itself if it has that length."""
    more = bucket - piece.shape[dim]
    behind = piece.ndim - 1 - dim % piece.ndim
    sides = [more, 0] if left else [0, more]
    return torch.constant_pad_nd(piece, [0, 0] * behind + sides, value) if more else piece


def choose_pads(
    where: list[Path], sizes: Sequence[int | None], buckets: Buckets, lengths: Lengths | None
) -> tuple[float | None, ...]:
    """What pads each input, None for those that have no length: as the example has it, as was said, or as it looks."""
    if lengths is not None:
        for path in where:
            if path.text not in lengths:
                raise ShapeError(
                    f"{path.text} is not among the example inputs ({', '.join(lengths)}), so it cannot be known "
                    "whether it has a length; add it to example_inputs"
                )
        return tuple(lengths[path.text] for path in where)
    if not isinstance(buckets.pad, Mapping):
        length = next((size for size in sizes if size is not None), None)
        return tuple(None if size is None or size != length else buckets.pad for size in sizes)
    pads: list[float | None] = [None] * len(where)
    for key, pad in buckets.pad.items():
        found = named(key, where)
        if not found:
            there = ", ".join(f"{index}: {path.text}" for index, path in enumerate(where))
            raise ShapeError(f"pad={buckets.pad!r}: the call has no input {key!r}; there are {there}")
        for index in found:
            pads[index] = pad
    return tuple(pads)


def size_at(leaf: Any, dim: int, buckets: Buckets) -> int | None:
    """The size at the dimension where the length stands; None where there is none, or rows are counted there."""
    if is_mark(leaf):
        return None
    at = buckets.dim if buckets.dim >= 0 else buckets.dim + leaf.ndim
    return leaf.shape[at] if 0 <= at < leaf.ndim and at != dim % leaf.ndim else None


def common_length(
    where: list[Path], leaves: Sequence[Any], sizes: Sequence[int | None], pads: Sequence[float | None], dim: int
) -> int:
    """The length of a call: all its inputs that have one have the same. `dim` is that of the length, for the error."""
    found = {size for size, pad in zip(sizes, pads, strict=True) if pad is not None}
    if len(found) == 1 and (length := found.pop()) is not None:
        return length
    said = ", ".join(f"{path.text} has shape {tuple(leaf.shape)}" for path, leaf in zip(where, leaves, strict=True))
    if len(found) < 2 or None in found:
        held = [
            path.text for path, size, pad in zip(where, sizes, pads, strict=True) if pad is not None and size is None
        ]
        raise ShapeError(
            f"{' and '.join(held) or 'the call'} lacks a dim {dim} beside the rows, where Buckets(dim={dim}) has the "
            f"length: {said}; for one row without its batch dimension pass x.unsqueeze(0)"
        )
    raise ShapeError(f"the inputs have unequal lengths along dim {dim}: {said}; pad them to one length")


def check_pad(name: str, pad: float, dtype: torch.dtype) -> None:
    """Raise `ShapeError` unless an input of this dtype can hold what pads it."""
    if dtype in QUANTIZED:
        raise ShapeError(f"{name} is quantized ({dtype}) and is not padded to a bucket; pass x.dequantize()")
    if not _holds(dtype, pad):
        raise ShapeError(f"{name} has dtype {dtype}, which cannot hold pad={pad!r}; choose another in Buckets(pad=...)")


@lru_cache
def _holds(dtype: torch.dtype, value: float) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return isinf(value) or abs(value) <= torch.finfo(dtype).max
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return low <= value <= high and value == int(value)
