"""Nested structures: any nesting of tuples, lists, dicts, named tuples and dataclasses of tensors and NumPy arrays.

Lives here: the walk over a structure and the way back. Must not be here: shapes, rows, anything done to a tensor.

torch's own pytree knows no dataclasses and costs 6.5 us a tensor; optree takes dataclasses and subclasses of dict and
list as leaves. Hence the short walk below. Hugging Face's outputs are dicts.
"""

import copy
import sys
from collections import UserDict
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch

from aneuron.names import name_of


class _Opened(NamedTuple):
    """What is in a container: items under their index or key, attributes under their name."""

    items: list[tuple[Any, Any]]
    attributes: list[tuple[str, Any]]


def _open(value: Any) -> _Opened | None:
    """What is in a container; None for a leaf.

    Attributes that an object has beside its items or fields count too: they may hold tensors, which have rows, or tell
    one call from another. Private ones of a UserDict do not: Hugging Face's encodings keep the text there.
    """
    items: list[tuple[Any, Any]] = []
    attributes: list[tuple[str, Any]] = []
    known: Container[Any] = ()
    if isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif isinstance(value, (dict, UserDict)):
        items = list(value.items())
        known = set(value)  # Hugging Face's outputs have their items as attributes, too
    elif is_dataclass(value) and not isinstance(value, type):
        attributes = [(field.name, getattr(value, field.name)) for field in fields(value) if hasattr(value, field.name)]
        known = {name for name, _ in attributes}
    else:
        return None
    if type(value) not in (tuple, list, dict):
        private = isinstance(value, UserDict)
        for name, child in _attributes(value).items():
            if name not in known and not (private and (name == "data" or name.startswith("_"))):
                attributes.append((name, child))
    return _Opened(items, attributes)


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its dictionary or in slots."""
    slots = [name for kind in type(value).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return found | getattr(value, "__dict__", {})


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def walk(value: Any, leaves: list[Any], key: list[Any], constants: list[Any], by_name: bool = False) -> None:
    """Collect the tensors of a structure, its other leaves, and a hashable description of what is around them.

    `by_name`, named tuples are described by their name and fields, not by their class: TorchScript makes a class anew
    for each one that it returns.
    """
    if isinstance(value, torch.Tensor) or is_array(value):
        leaves.append(value)
        key.append(torch.Tensor)
        return
    opened = _open(value)
    if opened is None:
        constants.append(value)
        key.append(_constant_key(value))
        return
    kind: Any = type(value)
    if by_name and hasattr(kind, "_fields"):
        kind = (kind.__name__, kind._fields)
    key.append((kind, *(name_of(name) for name, _ in opened.items), "", *(name for name, _ in opened.attributes)))
    for children in opened:
        for _, child in children:
            walk(child, leaves, key, constants, by_name)


def fill(template: Any, values: Iterator[Any]) -> Any:
    """A copy of a structure with its tensors replaced, in the order of the walk."""
    if isinstance(template, torch.Tensor) or is_array(template):
        return next(values)
    opened = _open(template)
    if opened is None:
        return template
    items = [fill(child, values) for _, child in opened.items]
    kind = type(template)
    twin: Any
    if isinstance(template, tuple):
        twin = kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)
    elif isinstance(template, list):
        twin = copy.copy(template)
        twin[:] = items
    else:
        twin = copy.copy(template)
        for (name, _), child in zip(opened.items, items, strict=True):
            twin[name] = child
    for name, child in opened.attributes:
        object.__setattr__(twin, name, fill(child, values))
    return twin


class Path(NamedTuple):
    """Where a tensor stands: in words, and the indices, keys and attributes on the way to it."""

    text: str
    steps: tuple[Any, ...]


def paths(value: Any, name: str, steps: tuple[Any, ...] = ()) -> Iterator[Path]:
    """Where a structure's tensors stand, in the order of the walk; for messages, and to be named by users."""
    if isinstance(value, torch.Tensor) or is_array(value):
        yield Path(name, steps)
    elif (opened := _open(value)) is not None:
        names = getattr(value, "_fields", ()) if isinstance(value, tuple) else ()
        for index, child in opened.items:
            step, text = (names[index], f".{names[index]}") if names else (index, f"[{index!r}]")
            yield from paths(child, name + text, (*steps, step))
        for attribute, child in opened.attributes:
            yield from paths(child, f"{name}.{attribute}", (*steps, attribute))


def named(key: str | int, where: Sequence[Path]) -> list[int]:
    """The positions of the tensors that a key names: its position, a name on the way to it, or its whole path."""
    if isinstance(key, int):
        return [key] if key < len(where) else []
    return [index for index, path in enumerate(where) if key == path.text or key in path.steps]


def is_array(value: Any) -> bool:
    """Whether a value is a NumPy array; NumPy is not imported for the question."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _constant_key(value: Any) -> Hashable:
    """Equal for arguments that are the same to a model: 1, True and 1.0 are not, two NaNs are."""
    kind = type(value)
    if value is None or kind in (int, bool, str, bytes, torch.dtype, torch.device):
        return (kind, value)
    numpy = sys.modules.get("numpy")
    if kind in (float, complex) or (numpy is not None and isinstance(value, numpy.generic)):
        return (kind, repr(value))
    return (kind, id(value))
