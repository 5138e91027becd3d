"""Rows of inputs in another order, beside others, or slightly changed: what executions for evidence are given.

Lives here: arranging columns of inputs, which rows are the same. Must not be here: which execution says more
(verdicts.py), executing it (engine/evidence.py).
"""

from collections.abc import Sequence
from typing import Any

import torch

from aneuron.tensors.marked import Shared


def len_of(columns: Sequence[Any], dim: int) -> int:
    """How many rows columns have."""
    return next(len(x) if isinstance(x, list) else x.shape[dim] for x in columns if not isinstance(x, Shared))


def varies(columns: Sequence[Any]) -> bool:
    """Whether there is something to vary a row by: integers may be indices, or mean something."""
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() for x in columns)


def arrange(columns: Sequence[Any], rows: Sequence[int], dim: int) -> list[Any]:
    """Columns with these rows; a number beyond those that there are is row 0, varied."""
    there = len_of(columns, dim)
    taken = [row if row < there else 0 for row in rows]
    arranged: list[Any] = []
    for column in columns:
        if isinstance(column, Shared):
            arranged.append(column)
        elif isinstance(column, list):
            arranged.append([column[row] for row in taken])
        else:
            picked = column.index_select(dim, torch.tensor(taken, device="cpu"))
            for place, row in enumerate(rows):
                if row >= there and column.is_floating_point():
                    _vary(picked.narrow(dim, place, 1), row)
            arranged.append(picked)
    return arranged


def _vary(row: torch.Tensor, seed: int) -> None:
    """Change a row by up to a quarter in each place: it stays in what is usual for the model, and zeros stay zeros."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.rand(row.shape, generator=generator, dtype=torch.float32, device="cpu")
    if row.any():
        row.mul_((0.75 + 0.5 * noise).to(row.dtype))
    else:
        row.copy_((0.1 * noise).to(row.dtype))


def identities(columns: Sequence[Any], dim: int) -> list[int]:
    """For each row its number, or 0 if it is the same as the first."""
    count = len_of(columns, dim)
    same = [True] * count
    for column in columns:
        if isinstance(column, Shared):
            continue
        for row in range(1, count):
            if same[row]:
                same[row] = _same(column, row, dim)
    return [0 if same[row] else row for row in range(count)]


def _same(column: Any, row: int, dim: int) -> bool:
    if isinstance(column, list):
        first, other = column[0], column[row]
        return other is first or (
            isinstance(first, (str, bytes, int, float)) and type(other) is type(first) and other == first
        )
    return torch.equal(column.select(dim, 0), column.select(dim, row))
