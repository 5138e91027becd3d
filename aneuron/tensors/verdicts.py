"""Whether an output has a row for each row of its batch: what a few executions of the same rows say.

Lives here: the judgement, from outputs that are there, and which execution would say more. Must not be here: executing
anything (engine/evidence.py), what follows from a verdict (outputs.py, rows.py), threads.

Three verdicts on each tensor or list of an output: *row*, it has an entry for each row, which follows its row wherever
that stands; *whole*, it is the same for other rows; *mixed*, neither. Numbers of rows tell most: what has as many
entries as rows in executions of different numbers has one for each. Where only one number can be executed, entries
must follow their rows to other places: a permutation leaves a row's company what it is, so this holds also for models
whose rows influence one another, which an execution in other company then shows. A model that answers the same rows
differently twice (it samples) leaves no evidence by values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from aneuron.tensors.marked import Rows
from aneuron.tensors.nested import Steps, children, is_leaf, walk

# How far results of the same row may be apart, as a share of the largest in the output. Kernels for other numbers of
# rows and places round differently: float32 by 1e-6 to 1e-5 after some layers, 1e-3 with TF32.
_ROUNDING = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ROUNDING_FLOAT8 = 0.3
_ROUNDING_ELSE = 1e-3
_FEW = 1 / 3  # of the entries that may disagree before the whole does: what depends on a threshold may flip

Need = Literal["other rows", "repeat", "order", "company"]


class Seen(NamedTuple):
    """An execution: which row stood at each place (equal numbers are equal rows), and what the model returned."""

    rows: tuple[int, ...]
    value: Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """What executions say of one tensor or list. `need`: the execution that would say more, None: it is settled."""

    what: Literal["row", "whole", "mixed"]
    need: Need | None = None
    influence: float = 0.0  # by how much other company changed a row, as a share of the largest value
    sampled: bool = False  # the same rows were answered differently
    elsewhere: int | None = None  # the dim along which the rows stand, where it is another one
    loose: bool = False  # it has another number of entries, which may be right where pieces are joined as they come


def row_lists(seen: Sequence[Seen], dim: int) -> Iterator[Steps]:
    """Where lists (or tuples) stand that have one entry for each row; what is in them is the model's affair.

    Those whose length is the number of rows in executions of different numbers; where there is one number only, those
    whose entries follow their rows, and lists in whose entries nothing has as many rows.
    """
    yield from _row_lists(seen, [each.value for each in seen], dim, ())


def _row_lists(seen: Sequence[Seen], values: list[Any], dim: int, steps: Steps) -> Iterator[Steps]:
    first = values[0]
    if is_leaf(first) or any(type(value) is not type(first) for value in values):
        return
    counts = [len(each.rows) for each in seen]
    if type(first) in (list, tuple) and [len(value) for value in values] == counts and first:
        several = len(set(counts)) > 1
        if several or _follow(seen, [Rows(value) for value in values]) or _lacks_rows(values, counts, dim):
            yield steps
            return
    below = [children(value) for value in values]
    if all(len(each) == len(below[0]) for each in below):
        for places in zip(*below, strict=True):
            yield from _row_lists(seen, [child for _, child in places], dim, (*steps, places[0][0]))


def _lacks_rows(values: Sequence[Any], counts: Sequence[int], dim: int) -> bool:
    """Whether these are lists in which nothing has as many rows, so that they must be what has them."""
    return type(values[0]) is list and not any(
        _may_have_rows(child, count, dim) for value, count in zip(values, counts, strict=True) for child in value
    )


def _may_have_rows(value: Any, count: int, dim: int) -> bool:
    if is_leaf(value):
        return _size(value, dim) == count
    if not (below := children(value)):
        return value is None or isinstance(value, (list, tuple, dict))
    return (type(value) in (list, tuple) and len(value) == count) or all(
        _may_have_rows(child, count, dim) for _, child in below
    )


def _follow(seen: Sequence[Seen], leaves: list[Any]) -> bool:
    """Whether the entries of lists follow their rows to other places."""
    rows = [each.rows for each in seen]
    moved = len(set(rows)) > 1 and any(len(set(each)) > 1 for each in rows)
    all_alike = _apart(leaves, [(0,) * len(each) for each in rows], 0)[1] <= _FEW
    return moved and not all_alike and _apart(leaves, rows, 0)[1] <= _FEW


def _size(leaf: Any, dim: int) -> int | None:
    if isinstance(leaf, Rows):
        return len(leaf)
    return leaf.shape[dim] if -leaf.ndim <= dim < leaf.ndim else None


def judge(seen: Sequence[Seen], leaves: Sequence[Any], dim: int, repeatable: bool | None) -> Verdict:
    """The verdict on one tensor or list, of which `leaves` has what each execution made of it.

    `repeatable` says whether the same rows were answered alike twice; None: not tried.
    """
    rows = [each.rows for each in seen]
    counts = [len(each) for each in rows]
    numbers = len(set(counts)) > 1
    differ = len(set(rows)) > 1
    if any(_size(leaf, dim) != count for leaf, count in zip(leaves, counts, strict=True)):
        if not differ:
            return Verdict("mixed", "other rows", loose=True)
        if all(_alike(leaf, leaves[0]) for leaf in leaves[1:]):
            return _whole(rows)
        elsewhere = _elsewhere(leaves, rows, dim)
        fixed = numbers and len({_size(leaf, dim) for leaf in leaves}) == 1
        return Verdict("mixed", elsewhere=elsewhere, loose=elsewhere is None and not fixed)
    if len(seen) == 1:
        return Verdict("row", "other rows" if _apart(leaves, rows, dim)[1] <= _FEW else "repeat")
    if numbers and _follows_elsewhere(leaves, counts, dim):
        return Verdict("mixed")
    if not numbers and differ and _is_whole(leaves, rows, dim):
        return _whole(rows)
    return _by_values(leaves, rows, dim, numbers, differ, repeatable)


def _whole(rows: Sequence[tuple[int, ...]]) -> Verdict:
    """The verdict on what has stayed the same: unless it has seen other rows it may be a sum, or be sorted."""
    others = len({tuple(sorted(each)) for each in rows}) > 1
    return Verdict("whole") if others else Verdict("mixed", "company", loose=True)


def _by_values(
    leaves: Sequence[Any], rows: list[tuple[int, ...]], dim: int, numbers: bool, differ: bool, repeatable: bool | None
) -> Verdict:
    """The verdict on what has as many entries as rows in each execution."""
    groups: dict[tuple[int, ...], list[int]] = {}  # executions of the same rows, in whatever order
    for index, each in enumerate(rows):
        groups.setdefault(tuple(sorted(each)), []).append(index)
    most, _ = _apart(leaves, rows, dim)
    tolerance = _tolerance(leaves[0])
    if most <= tolerance:
        mixed_company = any(len(set(each)) > 1 for each in rows)
        return Verdict("row", "other rows" if not mixed_company else None if len(groups) > 1 else "company")
    within = [
        _apart([leaves[index] for index in members], [rows[index] for index in members], dim)
        for members in groups.values()
    ]
    if max(share for _, share in within) <= _FEW and len(groups) > 1:
        moved = any(len({rows[index] for index in members}) > 1 for members in groups.values())
        return Verdict("row", None if moved else "order", influence=most)
    if repeatable is None:
        return Verdict("row" if numbers else "mixed", "repeat")
    if repeatable and not (numbers and isinstance(leaves[0], Rows)):
        if max(share for _, share in within) <= _FEW:
            return Verdict("row", "company" if differ else "other rows")
        return Verdict("mixed", elsewhere=_elsewhere(leaves, rows, dim))
    return Verdict("row", None if differ else "other rows", sampled=not repeatable)


def repeats(seen: Sequence[Seen], leaves: Sequence[Sequence[Any]]) -> bool | None:
    """Whether executions of the very same rows gave the same; None if there were no two."""
    answers = [
        all(_alike(one, other) for one, other in zip(leaves[index], leaves[earlier], strict=True))
        for index, each in enumerate(seen)
        for earlier in range(index)
        if seen[earlier].rows == each.rows
    ]
    return all(answers) if answers else None


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far two tensors of equal shapes are apart, as a share of the largest value; 0 if no more than by rounding."""
    if one.shape != other.shape or one.dtype != other.dtype or not one.numel():
        return 0.0
    share = float(_deviations(*(_comparable(each).reshape(1, -1) for each in (one, other))).max())
    return share if share > _tolerance(one) else 0.0


# Comparing.


def _tolerance(leaf: Any) -> float:
    if isinstance(leaf, Rows):
        return 0.0
    if leaf.is_floating_point() and leaf.dtype.itemsize == 1:
        return _ROUNDING_FLOAT8
    return _ROUNDING.get(leaf.dtype, _ROUNDING_ELSE if leaf.is_floating_point() or leaf.is_complex() else 0.0)


def _apart(leaves: Sequence[Any], rows: Sequence[tuple[int, ...]], dim: int) -> tuple[float, float]:
    """How far the entries of equal rows are apart: the most, and the share of them that are not alike."""
    flat = [row for each in rows for row in each]
    first: dict[int, int] = {}
    for index, row in enumerate(flat):
        first.setdefault(row, index)
    if isinstance(leaves[0], Rows):
        entries = [entry for leaf in leaves for entry in leaf]
        unlike = [not _alike(entry, entries[first[row]]) for entry, row in zip(entries, flat, strict=True)]
        share = sum(unlike) / max(1, len(flat) - len(first))
        return share, share
    try:
        joined = torch.cat([_comparable(leaf) for leaf in leaves], dim).movedim(dim, 0)
    except RuntimeError:  # they differ beside the rows
        return float("inf"), 1.0
    if len(flat) == len(first) or not joined.numel():
        return 0.0, 0.0
    joined = joined.reshape(len(flat), -1)
    deviations = _deviations(joined, joined[[first[row] for row in flat]])
    unlike_rows = int((deviations > _tolerance(leaves[0])).sum())
    return float(deviations.max()), unlike_rows / (len(flat) - len(first))


def _deviations(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """For each row how far it is from another, as a share of the largest value there is; infinite if not comparable."""
    equal = (one == other) | ((one != one) & (other != other))
    finite = other[torch.isfinite(other)].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    apart = (one - other).abs() / (scale or 1.0)
    apart = torch.where(equal, torch.zeros_like(apart), torch.nan_to_num(apart, nan=float("inf")))
    return apart.amax(1)


def _comparable(leaf: torch.Tensor) -> torch.Tensor:
    """In a dtype in which differences can be taken."""
    plain = leaf.dequantize() if leaf.is_quantized else leaf
    if plain.is_complex():
        return plain if plain.dtype is torch.complex128 else plain.to(torch.complex64)
    return plain if plain.dtype in (torch.float32, torch.float64) else plain.double()


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same but for rounding; objects that are neither tensors, numbers nor texts are."""
    if isinstance(one, Rows) and isinstance(other, Rows):
        return len(one) == len(other) and sum(map(_alike, one, other)) >= (1 - _FEW) * len(one)
    leaves: tuple[list[Any], list[Any]] = ([], [])
    keys: tuple[list[Any], list[Any]] = ([], [])
    constants: tuple[list[Any], list[Any]] = ([], [])
    for value, found, key, others in zip((one, other), leaves, keys, constants, strict=True):
        walk(value, found, key, others, by_name=True)
    if len(leaves[0]) != len(leaves[1]) or len(constants[0]) != len(constants[1]):
        return False
    plain = (bool, int, float, str, bytes)
    if any(isinstance(a, plain) and isinstance(b, plain) and a != b for a, b in zip(*constants, strict=True)):
        return False
    return all(_close(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*leaves, strict=True))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel():
        return True
    flat = [_comparable(each).reshape(1, -1) for each in (one, other)]
    return float(_deviations(*flat).max()) <= _tolerance(one)


def _is_whole(leaves: Sequence[Any], rows: Sequence[tuple[int, ...]], dim: int) -> bool:
    """Whether something has stayed as it is although its rows have changed, and is not just the same for every row."""
    if not all(_alike(leaf, leaves[0]) for leaf in leaves[1:]):
        return False
    alike = _apart(leaves[:1], [(0,) * len(rows[0])], dim)[0] <= _tolerance(leaves[0])
    return not alike and len(set(rows)) > 1


def _follows_elsewhere(leaves: Sequence[Any], counts: Sequence[int], dim: int) -> bool:
    """Whether another dim grows with the number of rows, too: each row tells of all the others."""
    if isinstance(leaves[0], Rows):
        return False
    ndim = leaves[0].ndim
    return any(
        all(leaf.ndim == ndim and leaf.shape[other] == count for leaf, count in zip(leaves, counts, strict=True))
        for other in range(ndim)
        if other != dim % ndim
    )


def _elsewhere(leaves: Sequence[Any], rows: Sequence[tuple[int, ...]], dim: int) -> int | None:
    """The dim along which the rows stand instead."""
    if any(isinstance(leaf, Rows) for leaf in leaves) or len({leaf.ndim for leaf in leaves}) > 1:
        return None
    ndim = leaves[0].ndim
    for other in range(ndim):
        if other == dim % ndim or any(leaf.shape[other] != len(each) for leaf, each in zip(leaves, rows, strict=True)):
            continue
        if len({len(each) for each in rows}) > 1 or _apart(leaves, rows, other)[1] <= _FEW:
            return other
    return None
