"""What is served and how: the user's model, or one for each compiled shape, and the settings.

Lives here: checks that need no device, and what is to be loaded for which shape. Must not be here: loading
(engine/loading.py), which shape runs (tensors/buckets.py, sched/scheduler.py).
"""

import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from aneuron.arguments import count, seconds, weight
from aneuron.backends import Backend, check_models
from aneuron.backends.exported import Inputs, Size, is_module
from aneuron.backends.files import COMPILED, graph_in, is_package, is_program
from aneuron.backends.traits import Traits
from aneuron.engine.evidence import check_declared
from aneuron.errors import ShapeError
from aneuron.sched.room import Work
from aneuron.sched.sizes import ANY, Cover, Range, Steps
from aneuron.stats import ServiceTimes
from aneuron.tensors.buckets import Buckets, beside
from aneuron.tensors.signature import Compiled

_MOST = 1000  # signatures that are remembered: a length of its own makes a new one
Shape = tuple[int | None, int]  # rows (None = any number) and bucket (0 = none) of an execution


def check_model(model: Any) -> None:
    """Raise for what cannot be a model; warn of one in training mode."""
    if not callable(model) and not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"model={model!r:.80}: expected a module, a callable, an exported program, the path of a file, or a "
            "mapping from batch sizes, or (batch size, bucket), to these"
        )
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise TypeError(f"model={model.__name__} is a class; pass a module, as {model.__name__}(...).eval()")
    if type(model).__name__ == "AOTICompiledModel" and type(model).__module__.startswith("torch."):
        raise ValueError(f"model is {COMPILED}")
    if isinstance(model, torch.nn.Module) and getattr(model, "training", False) and not _exported(model):
        warnings.warn(  # (a frozen graph cannot say whether it trains)
            "the model is in training mode: dropout would be active, and batch statistics would mix callers; "
            "call model.eval() first",
            stacklevel=4,
        )


def _exported(model: torch.nn.Module) -> bool:
    """Whether there is a module of an exported program in it: the mode was fixed then, and `eval()` raises."""
    return any(map(is_module, model.modules()))


def is_compiled(model: Any, scripts: bool) -> bool:
    """Whether a model is a compiled graph, with the shapes of its example; `scripts`: and so is what a path names."""
    if isinstance(model, (str, os.PathLike)):
        return scripts and not is_program(model) and graph_in(model) is None
    return isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction))


@dataclass(slots=True)
class Settings:
    """What a model is served with, checked. Those that can be set at run time are replaced here."""

    dim: int
    packing: bool  # whether calls may share batches, and cores cut them where that is what they do
    example: Compiled | None
    buckets: Buckets | None
    split_size: int | None
    max_pending: int | Work | None
    max_delay: float | None
    exec_timeout: float | None
    min_cores: int | None
    outputs: Mapping[str | int, str]
    check_rows: bool
    context: Callable[[], AbstractContextManager[Any]] | None
    weight: float
    by_positions: bool  # whether `max_pending` counts these, and not rows

    @classmethod
    def of(cls, program: "Program", given: Mapping[str, Any]) -> "Settings":
        """Those that a program is served with, of the arguments by name; an example may say the program's size."""
        dim, exec_timeout, context = given["dim"], given["exec_timeout"], given["context"]
        max_delay, buckets = given["max_delay"], given["buckets"]
        if exec_timeout is not None and not seconds("exec_timeout", exec_timeout):
            raise ValueError("exec_timeout=0: expected seconds, more than the longest execution takes, or None")
        if context is not None and (not callable(context) or hasattr(context, "__enter__")):
            raise TypeError(
                f"context={context!r:.80}: expected a function that makes a context manager for each execution, such "
                "as lambda: torch.autocast('cpu'), or None"
            )
        return cls(
            dim=dim,
            packing=bool(given["set_dynamic_batching"]) and dim == 0,
            example=_read_example(given["example_inputs"], program, dim, buckets),
            buckets=buckets,
            split_size=count("split_size", given["split_size"]),
            max_pending=pending(given["max_pending"], buckets),
            max_delay=None if max_delay is None else seconds("max_delay", max_delay),
            exec_timeout=None if exec_timeout is None else seconds("exec_timeout", exec_timeout),
            min_cores=count("min_cores", given["min_cores"]),
            outputs=check_declared(given["outputs"]),
            check_rows=bool(given["check_rows"]),
            context=context,
            weight=weight(given["weight"]),
            by_positions=isinstance(given["max_pending"], Work),
        )

    def checked_pending(self, value: Any) -> int | Work | None:
        """A `max_pending` that is to be in place of this one: counted in the same unit."""
        checked = pending(value, self.buckets)
        if checked is not None and isinstance(checked, Work) != self.by_positions:
            unit, other = ("positions", "rows") if self.by_positions else ("rows", "positions")
            raise ValueError(f"max_pending={checked}: it was constructed to count {unit}, and goes on so; not {other}")
        return checked

    @property
    def room(self) -> int | None:
        """The rows, or positions, that may wait."""
        return self.max_pending.positions if isinstance(self.max_pending, Work) else self.max_pending


def pending(value: Any, buckets: Buckets | None) -> int | Work | None:
    """A checked `max_pending`."""
    if isinstance(value, Work):
        if buckets is None:
            raise ValueError(f"max_pending={value}: only with buckets= calls have a length; say how many rows may wait")
        return value
    return count("max_pending", value)


class Program:
    """The models by shape. `batch_size` is the largest number of rows, None where any number will do.

    `scripts` says whether paths are of TorchScript files: what a backend of one's own makes of one is its affair.
    """

    def __init__(
        self, given: Any, batch_size: int | None, dim: int, buckets: Buckets | None, scripts: bool = True
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise ValueError(f"dim={dim!r}: expected an int, the dimension that counts rows")
        if buckets is not None and not isinstance(buckets, Buckets):
            raise TypeError(f"buckets={buckets!r}: expected aneuron.Buckets(dim=..., sizes=(...), pad=...), or None")
        self.batch_size = self._said = batch_size  # what is loaded; what the user has said, or an example
        self.takes: Range = ANY  # where there is no batch size
        self.inputs: Inputs | None = None  # what each call is held to, where the model itself says it
        self._fitting: set[Hashable] = set()  # signatures of calls that were found to fit
        self.source = given  # as the user gave it
        self.times: dict[int, ServiceTimes] = {}  # by core id; they outlive a restart
        self._scripts = scripts
        self._given, self._dim, self._buckets = given, dim, buckets
        self._lengths: tuple[int, ...] = tuple(buckets.sizes) if buckets is not None else (0,)
        self._by_size = isinstance(given, Mapping)
        if buckets is not None and buckets.dim == dim:
            raise ValueError(
                f"buckets.dim={buckets.dim} is the batch dimension (dim={dim}); the length stands in another"
            )
        if self._by_size:
            if batch_size is not None:
                raise ValueError(f"batch_size={batch_size}: the keys of the models say the batch sizes; leave it out")
            if dim != 0:
                raise ValueError(f"dim={dim}: models for several batch sizes need dynamic batching, which needs dim=0")
            self._given = _by_shape(given, buckets)
            self.batch_size = self._said = max(size for size, _ in self._given)
        for model in self._given.values() if self._by_size else (given,):
            check_model(model)
        self._is_compiled = is_compiled(self._given, scripts)  # which may look into a file

    def like(self, given: Any) -> "Program":
        """Another model, for the same rows and buckets."""
        said = None if isinstance(given, Mapping) else self._said
        other = Program(given, said, self._dim, self._buckets, self._scripts)
        if other._by_size != self._by_size:
            raise ShapeError("the new model must be given as the old one was: alone, or by its compiled sizes")
        return other

    @property
    def compiled(self) -> bool:
        """Whether calls are held to the example's shapes: not if the model says itself what it takes."""
        return self.inputs is None and (self.batch_size is not None or self._is_compiled)

    @property
    def given(self) -> list[Any]:
        """What the user gave, without the shapes."""
        return list(self._given.values()) if self._by_size else [self._given]

    def ask(self, backend: Backend, traits: Traits, example_rows: int | None) -> list[Any]:
        """Find out how many rows the model was compiled for, if nobody has said it and the backend knows.

        Where every model is compiled, whatever its type, that is what the example has. May take long. Raises for models
        that the backend cannot run, and `ValueError` for rows that an exported program does not take. Returns what was
        opened for it: to be held until it is loaded, which then need not be opened again.
        """
        check_models(backend, self.given)
        if self._by_size:
            found = [(size, traits.inputs_of(model)) for (size, _), model in self._given.items()]
            for size, inputs in found:
                _rows_taken(inputs, self._dim, size)
            return [inputs.of for _, inputs in found if inputs is not None]
        inputs = traits.inputs_of(self._given)
        taken = _rows_taken(inputs, self._dim, self._said)
        rows = traits.compiled_rows(self._given)
        if rows is None and traits.cuts_batches:
            rows = example_rows
        if taken.least == taken.most:
            rows = taken.least
        self.batch_size, self.takes = self._said or rows, taken
        path = isinstance(self._given, (str, os.PathLike))
        if self.batch_size is None and inputs is None and path and is_package(self._given):
            raise ValueError(
                f"model={self._given!r} is an AOTInductor package, which does not say how many rows it takes: say "
                "batch_size=, the rows that every execution is padded to, or example_inputs= with so many, or name the "
                "package for several sizes, {2: path, 8: path}"
            )
        self.inputs = replace(inputs, of=None) if inputs is not None and self._buckets is None else None
        return [] if inputs is None else [inputs.of]

    def check(self, signature: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `ShapeError` for a call that the model does not take, as far as it says so itself."""
        if signature not in self._fitting and self.inputs is not None:
            self.inputs.check(args, kwargs, self._dim)
            if len(self._fitting) >= _MOST:
                self._fitting.clear()
            self._fitting.add(signature)

    def take_size(self, rows: int) -> None:
        """A compiled graph without a batch size has that of its example."""
        if self.batch_size is None and self._is_compiled:
            self.batch_size = self._said = rows

    def by_shape(self, dim: int) -> dict[Shape, Any]:
        """What to load for each shape."""
        if self._by_size:
            return dict(self._given)
        return {(self.batch_size if dim == 0 else None, bucket): self._given for bucket in self._lengths}

    def warm(self, dim: int, example: Compiled | None) -> list[Shape]:
        """The shapes to run the example with: all; with free lengths its own first, the longest and the shortest."""
        shapes = list(self.by_shape(dim))
        buckets = self._buckets
        if buckets is None or not buckets.free or example is None:
            return shapes
        own, longest = buckets.fit(example.length), self._lengths[-1]
        wanted = (own, longest if own != longest else beside(own, self._lengths), self._lengths[0])
        return sorted((shape for shape in shapes if shape[1] in wanted), key=lambda shape: wanted.index(shape[1]))

    def steps(self, preferred: int) -> dict[int, Steps]:
        """The rows that executions of each bucket have, where a model takes any number, of any length."""
        if self.batch_size is not None or self._buckets is None or not self._buckets.free:
            return {}
        return dict.fromkeys(self._lengths, Steps(preferred, self.takes.least))

    def sizes(self, dim: int) -> dict[int, Cover]:
        """The compiled batch sizes of each bucket; none where any number of rows will do."""
        by_bucket: dict[int, list[int]] = {}
        for size, bucket in self.by_shape(dim):
            if size is not None:
                by_bucket.setdefault(bucket, []).append(size)
        return {bucket: Cover(sizes) for bucket, sizes in by_bucket.items()}


def _rows_taken(inputs: Inputs | None, dim: int, said: int | None) -> Range:
    """The rows that an execution may have. Raises `ValueError` if they cannot be those that were `said`."""
    found: Size | None = inputs.rows(dim) if inputs is not None else None
    if found is None:
        return ANY
    if said is None and found.derived:
        raise ValueError(
            f"the program was exported for {found.name} rows, and not every number from {found.range} is that: say "
            "which is, by batch_size="
        )
    if said is not None and not found.range.holds(said):
        wider = f"torch.export.Dim('batch', min={min(said, found.range.least)}, max={said})"
        raise ValueError(
            f"batch_size={said}, and the program was exported for {found.range} rows (dim {dim}): pass one that it "
            f"takes, or none, or export it with dynamic_shapes that say {wider}"
        )
    return found.range


def _read_example(given: Any, program: Program, dim: int, buckets: Buckets | None) -> Compiled | None:
    """What to warm up with; it also says how many rows a compiled graph takes."""
    if given is None:
        return None
    kwargs: dict[str, Any] = given if type(given) is dict else {}
    args: tuple[Any, ...] = given if type(given) is tuple else (given,) * (not kwargs)
    try:
        example = Compiled(args, kwargs, dim, buckets)
    except ShapeError as error:
        raise ShapeError(f"example_inputs: {error}") from None
    program.take_size(example.rows)
    return example


def _by_shape(given: Mapping[Any, Any], buckets: Buckets | None) -> dict[tuple[int, int], Any]:
    """The models by batch size and bucket, checked."""
    rule = "expected {8: model}, a model for each batch size, or {(8, 64): model}, one for each batch size and bucket"
    if not given:
        raise ValueError(f"model={{}}: no model; {rule}")
    if all(isinstance(value, torch.Tensor) for value in given.values()):
        raise ValueError(
            f"model is weights without a model, a state_dict of {len(given)} tensors: make the module, "
            "net.load_state_dict(...), and pass net.eval()"
        )
    with_bucket = [isinstance(key, tuple) for key in given]
    for key in given:
        numbers = key if isinstance(key, tuple) and len(key) == 2 else (key,)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers):
            raise ValueError(
                f"model={{{key!r}: ...}}: {key!r} is neither a batch size nor (batch size, bucket); {rule}"
            )
    if any(with_bucket) != all(with_bucket):
        raise ValueError(f"the models' keys {list(given)} are of two kinds; {rule}")
    if not with_bucket[0]:
        lengths = buckets.sizes if buckets is not None else (0,)
        return {(size, length): model for size, model in sorted(given.items()) for length in lengths}
    lengths = sorted({length for _, length in given})
    if buckets is None:
        raise ValueError(f"models for buckets {lengths} need buckets=Buckets(dim=..., sizes={tuple(lengths)})")
    if buckets.free:
        raise ValueError(
            f"there are models for buckets {lengths}, and buckets without sizes: say sizes={tuple(lengths)}"
        )
    if lengths != list(buckets.sizes):
        raise ValueError(
            f"there are models for buckets {lengths}, and buckets={list(buckets.sizes)}: they must be the same; "
            "compile the missing ones, or leave out what is too much"
        )
    return dict(sorted(given.items()))
