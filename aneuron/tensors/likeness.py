"""How far an output is from the same in full precision.

Lives here: the judgement, from two outputs that are there. Must not be here: executing (engine/comparing.py), what
follows from it.
"""

from typing import Any, NamedTuple

import torch

from aneuron.tensors.nested import paths, walk


class Likeness(NamedTuple):
    """Of the floating tensors of two outputs, that with the smallest cosine, and of them all the largest deviation."""

    cosine: float | None = None  # of the whole tensor, as one vector; NaN: not finite where the other is; None: no such
    where: str = ""
    deviation: float = 0.0
    share: float = 0.0  # the largest deviation as a share of its tensor's largest value
    differ: int = 0  # entries of other tensors (ids, flags) that are not equal
    entries: int = 0  # of so many


def likeness(full: Any, other: Any) -> Likeness:
    """How far an output is from one in full precision. Raises `ValueError` for one of another structure or shape.

    >>> likeness(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])).deviation
    0.5
    """
    leaves: tuple[list[Any], list[Any]] = ([], [])
    for value, into in zip((full, other), leaves, strict=True):
        walk(value, into, [], [])
    shapes = [[tuple(leaf.shape) for leaf in each if isinstance(leaf, torch.Tensor)] for each in leaves]
    if shapes[0] != shapes[1] or len(leaves[0]) != len(leaves[1]):
        raise ValueError(f"its outputs have the shapes {shapes[1]}, and {shapes[0]} in full precision")
    found = Likeness()
    for path, one, two in zip(paths(full, "output"), *leaves, strict=True):
        if isinstance(one, torch.Tensor) and one.numel():
            found = _with(found, path.text, one, two)
    return found


def _with(found: Likeness, where: str, full: torch.Tensor, other: torch.Tensor) -> Likeness:
    """What is found so far, and one tensor more."""
    if not (full.is_floating_point() or full.is_complex()):
        differ = int((full != other).sum()) if not full.is_quantized else 0
        return found._replace(differ=found.differ + differ, entries=found.entries + full.numel())
    one, two = _vector(full), _vector(other)
    same = (one == two) | ((one != one) & (two != two))
    finite = torch.isfinite(one) & torch.isfinite(two)
    if not bool((same | finite).all()):
        return found._replace(cosine=float("nan"), where=where, deviation=float("inf"), share=float("inf"))
    one, two = one[finite], two[finite]
    cosine = _cosine(one, two)
    deviation = float((one - two).abs().max()) if len(one) else 0.0
    largest = float(one.abs().max()) if len(one) else 0.0
    share = deviation / largest if largest else float("inf") if deviation else 0.0
    if found.cosine is None or cosine < found.cosine:  # never of NaN
        found = found._replace(cosine=cosine, where=where)
    return found._replace(deviation=max(found.deviation, deviation), share=max(found.share, share))


def _vector(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.detach().reshape(-1).double()


def _cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    lengths = float(one.norm() * two.norm())
    if not lengths:
        return float(torch.equal(one, two))
    return min(1.0, float(one @ two) / lengths)
