"""What a model takes and returns, for whoever has to say it or to make its calls from names: servers, clients, docs.

Lives here: the description, and how calls are made from it. Must not be here: whether a call fits
(tensors/signature.py), which outputs have rows (engine/evidence.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aneuron.errors import OutputError, ShapeError
from aneuron.tensors.marked import Rows, Shared
from aneuron.tensors.nested import Path, Steps, children, is_leaf
from aneuron.tensors.outputs import Carried, Output
from aneuron.tensors.signature import Compiled, dtype_of


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    name: what stands at the end of the way to it: the keyword, the key of a dict, the field of a tuple with names, with
        a dot between the steps of what is nested; "input0", "output1" by position where there is no name.
    dtype: the dtype of its tensor; of Python objects, one for each row (`Rows`), their type: `str`, `bytes`, and
        `object` for others.
    shape: -1 where each call has its own size: its rows, and its length with `buckets`.
    whole: whether it belongs to all rows (`Shared`, `outputs={...: "whole"}`).
    """

    name: str
    dtype: torch.dtype | type
    shape: tuple[int, ...]
    whole: bool = False
    rows: int | None = field(default=None, repr=False, compare=False)  # the dimension that counts its rows, if it has
    # The way to it, from the arguments or the output; None where only its name is known.
    steps: Steps | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and returns; what `AsyncDataParallel.signature` is, or a declaration of it.

    inputs: in the order of the call; empty where nobody has said it. Those of a declaration are given to the model by
        position, or in the places of its `example_inputs` where it has some.
    outputs: in the order that the model returns them; None where it is not known yet: before the start, and without
        `example_inputs`.

        >>> import torch, aneuron
        >>> example = {"ids": torch.zeros(1, 4, dtype=torch.long)}
        >>> model = aneuron.AsyncDataParallel(torch.nn.Embedding(9, 2).eval(), example_inputs=example)
        >>> model.signature.inputs
        (TensorSpec(name='ids', dtype=torch.int64, shape=(-1, 4), whole=False),)
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] | None = None
    _arrange: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]] | None = field(
        default=None, repr=False, compare=False
    )
    # Most models have one tensor in, by position, and one out: the short way, which each request takes.
    _one_input: bool = field(default=False, init=False, repr=False, compare=False)
    _one_output: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for specs in (self.inputs, self.outputs or ()):
            names = [spec.name for spec in specs]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{sorted(twice)} name more than one of {names}: declare other names")
        plain = [spec.steps for spec in self.inputs if isinstance(spec.dtype, torch.dtype) and not spec.whole]
        object.__setattr__(self, "_one_input", plain == [(0,)] and len(self.inputs) == 1)
        if self.outputs is not None and [spec.steps for spec in self.outputs] == [()]:
            object.__setattr__(self, "_one_output", self.outputs[0].name)

    def arguments(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these inputs, in the order of `inputs`; the rest is as in the example."""
        if self._one_input:
            (value,) = values
            return (value,), {}
        marked = [
            Shared(value) if spec.whole else Rows(value) if isinstance(spec.dtype, type) else value
            for spec, value in zip(self.inputs, values, strict=True)
        ]
        return (tuple(marked), {}) if self._arrange is None else self._arrange(marked)

    def named(self, output: Any) -> list[tuple[str, Any]]:
        """What a call has returned, by name, in order. Raises `OutputError` where something is not there."""
        if self._one_output is not None:
            return [(self._one_output, output)]
        if self.outputs is None or any(spec.steps is None for spec in self.outputs):
            return _found(output, self.outputs)
        return [(spec.name, _at(spec.steps or (), output)) for spec in self.outputs]

    def declared(self, other: "Signature") -> "Signature":
        """The same in the words of a declaration. Raises `ShapeError` where that is of another number of tensors."""
        return Signature(
            _renamed("inputs", self.inputs, other.inputs),
            other.outputs if self.outputs is None else _renamed("outputs", self.outputs, other.outputs),
            self._arrange,
        )


def inputs_of(example: Compiled | None) -> Signature:
    """What an example says of the inputs."""
    if example is None:
        return Signature(())
    specs = [_input(path, leaf, example) for path, leaf in zip(example.paths, example.leaves, strict=True)]
    return Signature(tuple(specs), None, example.filled)


def outputs_of(output: Output, rows: int, carried: Carried | None) -> tuple[TensorSpec, ...]:
    """What an execution of so many rows says of the outputs; `carried` are the dims that have the bucket's length."""
    dims = carried or ((),) * len(output.leaves)
    return tuple(
        _output(path, leaf, output.dim, rows, lengths)
        for path, leaf, lengths in zip(output.paths(), output.leaves, dims, strict=True)
    )


def _input(path: Path, leaf: Any, example: Compiled) -> TensorSpec:
    name = _name(path.steps, "input")
    if type(leaf) is Rows:
        return TensorSpec(name, _type_of(leaf), (-1,), rows=0, steps=path.steps)
    if type(leaf) is Shared:
        if not hasattr(leaf.value, "shape"):
            raise ShapeError(f"{path.text} is {leaf!r}: no tensor, and so nothing that can be described")
        return TensorSpec(name, dtype_of(leaf.value.dtype), tuple(leaf.value.shape), True, steps=path.steps)
    free = example.free(path.text)  # its rows first
    return TensorSpec(name, dtype_of(leaf.dtype), _sizes(leaf.shape, free), rows=free[0], steps=path.steps)


def _output(path: Path, leaf: Any, dim: int, rows: int, lengths: Sequence[int]) -> TensorSpec:
    name = _name(path.steps, "output")
    if type(leaf) is Rows:
        return TensorSpec(name, _type_of(leaf), (-1,), rows=0, steps=path.steps)
    whole = type(leaf) is Shared
    value = leaf.value if whole else leaf
    if not hasattr(value, "shape"):
        return TensorSpec(name, object, (), whole, steps=path.steps)
    own = [] if whole or not -value.ndim <= dim < value.ndim or value.shape[dim] != rows else [dim % value.ndim]
    shape = _sizes(value.shape, [*own, *lengths])
    return TensorSpec(name, dtype_of(value.dtype), shape, whole, own[0] if own else None, path.steps)


def _type_of(objects: Rows[Any]) -> type:
    """What the objects of rows are, all of them."""
    kinds = {type(each) for each in objects}
    return next((kind for kind in (str, bytes) if kinds == {kind}), object)


def _sizes(shape: Sequence[int], free: Sequence[int]) -> tuple[int, ...]:
    return tuple(-1 if at in free else int(size) for at, size in enumerate(shape))


def _name(steps: Steps, kind: str) -> str:
    first, *rest = steps or (0,)
    words = [first if isinstance(first, str) else f"{kind}{first}", *map(str, rest)]
    return ".".join(words)


def _leaves(value: Any, steps: Steps) -> Iterator[tuple[Steps, Any]]:
    """The tensors of an output, and its lists of texts, each with the way to it."""
    if is_leaf(value) or (type(value) is list and value and all(isinstance(each, (str, bytes)) for each in value)):
        yield steps, value
        return
    for step, child in children(value):
        yield from _leaves(child, (*steps, step))


def _found(output: Any, declared: Sequence[TensorSpec] | None) -> list[tuple[str, Any]]:
    """What is in an output, by its own names; or by declared ones: theirs where all are there, else by position."""
    found = {_name(steps, "output"): value for steps, value in _leaves(output, ())}
    names = list(found) if declared is None else [spec.name for spec in declared]
    if not set(names) <= found.keys():
        if len(names) != len(found):
            raise OutputError(f"{len(names)} outputs are declared, {names}, and the model returned {list(found)}")
        found = dict(zip(names, found.values(), strict=True))
    return [(name, found[name]) for name in names]


def _at(steps: Steps, value: Any) -> Any:
    """What stands at the end of a way."""
    try:
        for step in steps:
            by_item = isinstance(value, Mapping) or (isinstance(value, (tuple, list)) and isinstance(step, int))
            value = value[step] if by_item else getattr(value, step)
    except (LookupError, AttributeError, TypeError) as error:
        raise OutputError(f"the model returned nothing at {steps} this time ({error!r:.80})") from error
    return value


def _renamed(what: str, own: Sequence[TensorSpec], said: Sequence[TensorSpec] | None) -> tuple[TensorSpec, ...]:
    """Those that are known in the words of a declaration."""
    if said is None or not own:
        return tuple(own or said or ())
    if len(said) != len(own):
        raise ShapeError(
            f"{len(said)} {what} are declared, {[spec.name for spec in said]}, and the model has {len(own)}: "
            f"{[spec.name for spec in own]}"
        )
    return tuple(
        TensorSpec(new.name, new.dtype, new.shape, old.whole, old.rows, old.steps)
        for new, old in zip(said, own, strict=True)
    )
