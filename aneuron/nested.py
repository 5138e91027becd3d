"""Nested structures: any nesting of tuples, lists, dicts, named tuples and dataclasses of tensors and NumPy arrays.

Lives here: the walk over a structure and the way back. Must not be here: shapes, rows, anything done to a tensor.

torch's own pytree knows no dataclasses and costs 6.5 us a tensor; optree takes dataclasses and subclasses of dict and
list as leaves. Hence the short walk below. Hugging Face's outputs are dicts.
"""

import copy
import sys
from collections import UserDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def walk(value: Any, leaves: list[Any], key: list[Any], constants: list[Any]) -> None:
    """Collect the tensors of a structure, its other leaves, and a hashable description of what is around them."""
    kind = type(value)
    if isinstance(value, torch.Tensor) or is_array(value):
        leaves.append(value)
        key.append(torch.Tensor)
        return
    if isinstance(value, (tuple, list)):
        key.append((kind, len(value)))
        children: Iterable[Any] = value
    elif isinstance(value, (dict, UserDict)):
        key.append((kind, tuple(value)))
        children = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        key.append((kind, "fields"))
        children = [getattr(value, field.name) for field in fields(value)]
    else:
        constants.append(value)
        key.append(_constant_key(value))
        return
    for child in children:
        walk(child, leaves, key, constants)


def fill(template: Any, values: Iterator[Any]) -> Any:
    """A copy of a structure with its tensors replaced, in the order of the walk."""
    if isinstance(template, torch.Tensor) or is_array(template):
        return next(values)
    if isinstance(template, tuple):
        filled = [fill(child, values) for child in template]
        kind: Any = type(template)
        return kind._make(filled) if hasattr(kind, "_make") else kind(filled)
    if isinstance(template, list):
        twin: Any = copy.copy(template)
        twin[:] = [fill(child, values) for child in template]
        return twin
    if isinstance(template, (dict, UserDict)):
        twin = copy.copy(template)
        for name, child in template.items():
            twin[name] = fill(child, values)
        return twin
    if is_dataclass(template) and not isinstance(template, type):
        twin = copy.copy(template)
        for field in fields(template):
            object.__setattr__(twin, field.name, fill(getattr(template, field.name), values))
        return twin
    return template


def is_array(value: Any) -> bool:
    """Whether a value is a NumPy array; NumPy is not imported for the question."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _constant_key(value: Any) -> Hashable:
    """Equal for arguments that are the same to a model: 1, True and 1.0 are not, two NaNs are."""
    kind = type(value)
    if value is None or kind in (int, bool, str, bytes, torch.dtype, torch.device):
        return (kind, value)
    if kind in (float, complex) or kind.__module__ == "numpy":
        return (kind, repr(value))
    return (kind, id(value))


def paths(value: Any, name: str) -> Iterator[str]:
    """The names of a structure's tensors, in the order of the walk; for messages."""
    if isinstance(value, torch.Tensor) or is_array(value):
        yield name
    elif isinstance(value, (tuple, list)):
        for index, child in enumerate(value):
            yield from paths(child, f"{name}[{index}]")
    elif isinstance(value, (dict, UserDict)):
        for index, child in value.items():
            yield from paths(child, f"{name}[{index!r}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from paths(getattr(value, field.name), f"{name}.{field.name}")
