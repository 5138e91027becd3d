"""Nested structures: tuples, lists, dicts, named tuples, dataclasses and namespaces of tensors and NumPy arrays.

Lives here: the walk over a structure and the way back; a marked value (marked.py) is a leaf like a tensor. Must not be
here: shapes, rows, anything done to a tensor.

torch's own pytree knows no dataclasses and costs 6.5 us a tensor; optree takes dataclasses and subclasses of dict and
list as leaves. Hence the short walk below. Hugging Face's outputs are dicts.
"""

import copy
import sys
from collections import UserDict, defaultdict, deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from dataclasses import fields, is_dataclass
from types import GeneratorType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch.nn.utils.rnn import PackedSequence

from aneuron.names import name_of
from aneuron.tensors.marked import Rows, Shared, is_mark


class Sealed(TypeError):
    """There are tensors in something that cannot be opened, or not made again with others in their place.

    The text is to follow "among the inputs is", or "the model returned".
    """


_PACKED = (
    "a PackedSequence, which holds its rows by time step, one through the other; hand over the two tensors that "
    "torch.nn.utils.rnn.pad_packed_sequence(x, batch_first=True) gives, padded rows and lengths (the model can pack "
    "them again), or aneuron.Rows([...]) with one tensor for each row"
)
_SEALED = (Mapping, Set, ValuesView, deque)  # may hold tensors, which would be passed whole to every piece of a call
_USED_UP = (GeneratorType, map, zip, filter, enumerate, reversed)  # by the first piece of a call
_remade: WeakSet[type] = WeakSet()  # classes that have been made again with other tensors inside


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
        if isinstance(value, PackedSequence):
            raise Sealed(_PACKED)
        items = list(enumerate(value))
    elif isinstance(value, (dict, UserDict)):
        items = list(value.items())
        known = set(value)  # Hugging Face's outputs have their items as attributes, too
    elif isinstance(value, SimpleNamespace):
        pass  # it has nothing but attributes
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
    for each one that it returns. Raises `Sealed` for tensors that `fill` could not replace.
    """
    if is_leaf(value):
        leaves.append(value)
        key.append(type(value) if is_mark(value) else torch.Tensor)
        return
    opened = _open(value)
    if opened is None:
        constants.append(value)
        key.append(_constant_key(value))
        return
    kind: Any = type(value)
    if by_name and hasattr(kind, "_fields"):
        kind = (kind.__name__, kind._fields)
    elif isinstance(value, defaultdict):
        kind = (kind, _constant_key(value.default_factory))
    names = [name if type(name) in (str, int) else _name_key(name) for name, _ in opened.items]
    key.append((kind, *names, "", *(name for name, _ in opened.attributes)))
    before = len(leaves)
    for children in opened:
        for _, child in children:
            walk(child, leaves, key, constants, by_name)
    own = not isinstance(value, tuple) and type(value) not in (list, dict)
    if own and len(leaves) > before and type(value) not in _remade:  # a class of somebody's own: try it, once
        fill(value, iter(leaves[before:]))
        _remade.add(type(value))


def fill(template: Any, values: Iterator[Any]) -> Any:
    """A copy of a structure with its tensors replaced, in the order of the walk.

    Where there are none, what cannot be copied (a `torch.Size`, frozen lists and dicts) stands for itself. Raises
    `Sealed` where there are.
    """
    return _filled(template, values)[0]


def _filled(template: Any, values: Iterator[Any]) -> tuple[Any, bool]:
    """The copy, and whether there was a tensor in it."""
    if is_leaf(template):
        return next(values), True
    opened = _open(template)
    if opened is None:
        return template, False
    items = [_filled(child, values) for _, child in opened.items]
    attributes = [_filled(child, values) for _, child in opened.attributes]
    held = any(each for _, each in (*items, *attributes))
    same = all(new is old for (new, _), (_, old) in zip(items, opened.items, strict=True))
    if isinstance(template, tuple) and same and not held and not attributes:
        return template, False
    try:
        return _remake(template, opened, [new for new, _ in items], [new for new, _ in attributes]), held
    except Exception as error:
        if not held:
            return template, False
        raise Sealed(
            f"a {type(template).__name__} with tensors inside, which cannot be made again with others in their place "
            f"({type(error).__name__}: {error}); use a dict, list, tuple or dataclass"
        ) from error


def _remake(template: Any, opened: _Opened, items: list[Any], attributes: list[Any]) -> Any:
    """A container of the same class with other items and attributes. Raises whatever the class raises."""
    kind = type(template)
    twin: Any
    if isinstance(template, tuple):
        twin = kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)
    else:
        twin = copy.copy(template)
        if twin is template:
            raise TypeError("copying it gives itself")
        if isinstance(template, list):
            twin[:] = items
        else:
            for (name, _), child in zip(opened.items, items, strict=True):
                twin[name] = child
    for (name, _), child in zip(opened.attributes, attributes, strict=True):
        object.__setattr__(twin, name, child)
    return twin


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a structure with each of its tensors changed. Raises `Sealed`."""
    if type(value) is torch.Tensor:
        return change(value)
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    return fill(value, iter([change(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]))


Steps = tuple[Any, ...]  # indices, keys and attributes on the way to a place in a structure
Marks = Mapping[Steps, type[Rows[Any]] | type[Shared[Any]]]


def mark(value: Any, marks: Marks, steps: Steps = ()) -> Any:
    """A copy of a structure with marks around what stands at some places; what is not there is not marked."""
    if (as_what := marks.get(steps)) is not None and not is_mark(value):
        return as_what(value) if as_what is Shared or len(value) else value
    opened = None if is_leaf(value) else _open(value)
    if opened is None:
        return value
    items = [mark(child, marks, (*steps, step)) for step, _, child in _items(value, opened)]
    attributes = [mark(child, marks, (*steps, name)) for name, child in opened.attributes]
    return _remake(value, opened, items, attributes)


def children(value: Any) -> list[tuple[Any, Any]]:
    """What is in a container, each with the step that leads to it; nothing is in a leaf."""
    opened = None if is_leaf(value) else _open(value)
    if opened is None:
        return []
    return [(step, child) for step, _, child in _items(value, opened)] + opened.attributes


def _items(value: Any, opened: _Opened) -> Iterator[tuple[Any, str, Any]]:
    """The items of a container: the step to each, the same in words, and the item."""
    names = getattr(value, "_fields", ()) if isinstance(value, tuple) else ()
    for index, child in opened.items:
        step, text = (names[index], f".{names[index]}") if names else (index, f"[{index!r}]")
        yield step, text, child


class Path(NamedTuple):
    """Where a tensor stands: in words, and the indices, keys and attributes on the way to it."""

    text: str
    steps: Steps

    @property
    def name(self) -> str:
        """What a user may call it: the last name on the way to it, or else the text."""
        return self.steps[-1] if self.steps and isinstance(self.steps[-1], str) else self.text


def paths(value: Any, name: str, steps: tuple[Any, ...] = ()) -> Iterator[Path]:
    """Where a structure's tensors stand, in the order of the walk; for messages, and to be named by users."""
    if is_leaf(value):
        yield Path(name, steps)
    elif (opened := _open(value)) is not None:
        for step, text, child in _items(value, opened):
            yield from paths(child, name + text, (*steps, step))
        for attribute, child in opened.attributes:
            yield from paths(child, f"{name}.{attribute}", (*steps, attribute))


def listed(value: Any) -> int:
    """How many tensors stand in plain lists: what their users may have meant as rows."""
    opened = _open(value)
    if opened is None:
        return 0
    children = [child for _, child in (*opened.items, *opened.attributes)]
    own = [child for child in children if type(value) is list and (isinstance(child, torch.Tensor) or is_array(child))]
    return len(own) + sum(map(listed, children))


def named(key: str | int, where: Sequence[Path]) -> list[int]:
    """The positions of the tensors that a key names: its position, a name on the way to it, or its whole path."""
    if isinstance(key, int):
        return [key] if key < len(where) else []
    return [index for index, path in enumerate(where) if key == path.text or key in path.steps]


def is_leaf(value: Any) -> bool:
    """Whether a value is a tensor or an array, or marked."""
    return isinstance(value, torch.Tensor) or is_array(value) or is_mark(value)


def is_array(value: Any) -> bool:
    """Whether a value is a NumPy array; NumPy is not imported for the question."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_masked(value: Any) -> bool:
    """Whether a NumPy array is a masked one: what is masked lies in it like any other number."""
    return isinstance(value, sys.modules["numpy"].ma.MaskedArray)


def _name_key(name: Any) -> Hashable:
    """Equal for keys of a dict that are the same to a model, as in `_constant_key`."""
    if type(name) is tuple:
        return (tuple, *map(_name_key, name))
    return (type(name), repr(name) if isinstance(name, (float, complex)) else name_of(name))


def _constant_key(value: Any) -> Hashable:
    """Equal for arguments that are the same to a model: 1, True and 1.0 are not, two NaNs are."""
    kind = type(value)
    if value is None or kind in (int, bool, str, bytes, torch.dtype, torch.device):
        return (kind, value)
    numpy = sys.modules.get("numpy")
    if kind in (float, complex) or (numpy is not None and isinstance(value, numpy.generic)):
        return (kind, repr(value))
    if isinstance(value, _USED_UP):
        raise Sealed(f"a {kind.__name__}, which whoever reads it first would use up; make a list of it")
    if isinstance(value, _SEALED):
        inside = value.values() if isinstance(value, Mapping) else value
        if any(isinstance(child, torch.Tensor) or is_array(child) for child in inside):
            raise Sealed(
                f"a {kind.__name__} with tensors inside, where they are not looked for; use a dict, list, tuple or "
                "dataclass (and aneuron.Shared(x) for what all rows are to see)"
            )
    return (kind, id(value))
