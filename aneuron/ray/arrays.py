"""Arrays that Ray hands over as they lie in its object store: read-only, and other processes read them too.

Lives here: copies. Must not be here: Ray, calls.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from aneuron import Rows, Shared
from aneuron.tensors.nested import Sealed, fill, walk

LARGE = 2**18  # bytes that are copied at once; more would hold up the loop


def foreign(value: Any, tensors: bool = False) -> int:
    """The bytes of the arrays in a structure that may not be written to, and of its tensors, if so asked."""
    return sum(int(leaf.nbytes) for leaf in _leaves(value) if _is_foreign(leaf, tensors))


def owned(value: Any, tensors: bool = False) -> Any:
    """The same structure with a copy of each array in it that may not be written to, and of each tensor, if so asked.

    Ray hands over tensors of its object store where RAY_ENABLE_ZERO_COPY_TORCH_TENSORS is set; nothing shows it, and a
    model that writes to one ends its process.

        >>> import numpy
        >>> array = numpy.zeros(2)
        >>> array.flags.writeable = False
        >>> owned({"x": array})["x"].flags.writeable
        True
    """
    if isinstance(value, Rows):
        return Rows([_inside(each, tensors) for each in value])
    if isinstance(value, Shared):
        return Shared(_inside(value.value, tensors))
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    copies = [_copy(leaf, tensors) for leaf in leaves]
    if all(copy is leaf for copy, leaf in zip(copies, leaves, strict=True)):
        return value
    return fill(value, iter(copies))


def _inside(value: Any, tensors: bool) -> Any:
    """The same of what is marked, which may be anything: what cannot be opened the model gets as it is."""
    try:
        return owned(value, tensors)
    except Sealed:
        return value


def _copy(leaf: Any, tensors: bool) -> Any:
    if isinstance(leaf, (Rows, Shared)):
        return owned(leaf, tensors)
    if not _is_foreign(leaf, tensors):
        return leaf
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy()


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and arrays in a structure, those in marks included."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    for leaf in leaves:
        if not isinstance(leaf, (Rows, Shared)):
            yield leaf
            continue
        for each in leaf if isinstance(leaf, Rows) else (leaf.value,):
            with suppress(Sealed):
                yield from _leaves(each)


def _is_foreign(leaf: Any, tensors: bool) -> bool:
    if isinstance(leaf, torch.Tensor):
        return tensors
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(leaf, numpy.ndarray) and not leaf.flags.writeable
