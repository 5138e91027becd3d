"""A program on one lane: the cores that it is loaded on, and what is known of their speed.

Lives here: loading, warming up, what the example tells, closing; all of it blocking, in threads. Must not be here: who
runs when, callers' futures.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from aneuron.backends import Backend, Core, Fault, PolledCore, ReducedCore, SubmittingCore
from aneuron.backends.precision import Precision
from aneuron.engine.comparing import Executed, compare
from aneuron.engine.evidence import Evidence, Trials, percent, snapshot
from aneuron.engine.modes import Within, execute_in_own
from aneuron.errors import DeviceError, OutputError
from aneuron.ownership import Owned
from aneuron.program import Shape
from aneuron.sched.scheduler import rounded
from aneuron.sched.sizes import ANY, Range
from aneuron.signature import TensorSpec, outputs_of
from aneuron.stats import CoreCounters, ServiceTimes
from aneuron.tensors.buckets import beside
from aneuron.tensors.outputs import Carried, Output, Unpad, kind
from aneuron.tensors.signature import Compiled
from aneuron.tensors.varied import identities
from aneuron.tensors.verdicts import Seen, apart

logger = logging.getLogger("aneuron")

TAKEN_FOR_CONTENT = (
    "{}: a row's result changed by {} of the largest value when it was padded to {} positions instead of {}: the model "
    "takes padding for content, so what a call gets depends on what it is padded to, and so on who shares its batch. "
    "Pass a mask as an input (attention_mask, padded with 0), or pad with what the model ignores; check_rows=False "
    "silences this"
)


@dataclass(frozen=True, slots=True)
class Load:
    """What every lane loads, and how the batches for it are laid out."""

    models: Mapping[Shape, Any]
    warm: Sequence[Shape]  # those of them to run the example with
    free: bool  # whether any length will do: then a model need not take what is shorter than the example
    dim: int
    compiled: Compiled | None  # the example to warm up with
    packing: bool  # whether calls share batches
    dynamic: bool  # whether cores may cut batches, where that is what they do
    evidence: Evidence  # what of the outputs has rows
    cuts_batches: bool = False  # whether the backend's cores may
    wants_example: bool = False  # whether the backend has to see the example
    unpad: Unpad | None = None  # which outputs carry the length of their bucket
    context: Callable[[], AbstractContextManager[Any]] | None = None  # around each execution
    precision: Precision | None = None  # what cores compute in, where it is not the model's own
    takes: Range = ANY  # rows of an execution that was not compiled for so many
    compared: set[int] = field(default_factory=set)  # by id, the models whose results are known in both

    @property
    def buckets(self) -> set[int]:
        """Those that there are models for."""
        return {bucket for _, bucket in self.models}


class Loaded:
    """A program on one lane. What is free is set by the thread that loads or closes it, while nothing else uses it."""

    owned = Owned(
        loop=("closed", "loading", "workers", "hung"),
        set_by_loop=("out",),
        free=("warming", "kinds", "outputs", "concurrent", "submits", "_cores"),
    )

    def __init__(
        self, index: int, core_id: int, backend: Backend, counters: CoreCounters, times: ServiceTimes,
        clock: Callable[[], float], run: object,
    ) -> None:  # fmt: skip
        self.index = index  # the lane's
        self.core_id = core_id
        self.counters = counters
        self.times = times  # of this program
        self.run = run  # whose it is
        self.out = False  # of service, for good: what serves later on this lane is another one
        self.closed = False  # or being closed
        self.loading = False
        self.workers: Any = None  # the last thread that has loaded or closed it
        self.hung = False  # a thread that has an execution of it does not come back
        self.warming = False  # loaded, and not warmed up
        self.kinds: dict[Shape, Hashable] = {}  # of the outputs that the example gave
        self.outputs: tuple[TensorSpec, ...] | None = None  # the same, described; of the first shape
        self.concurrent = False
        self.submits = False  # whether the loop may hand batches to the cores
        self._backend = backend
        self._clock = clock
        self._cores: dict[Shape, Core] = {}

    def load(self, load: Load) -> None:
        """Load every shape and run the example twice on each. Blocking."""
        loaded: dict[tuple[int, int | None], Core] = {}
        for (size, bucket), model in load.models.items():
            with _naming(size, bucket, len(load.models)):
                key = (id(model), size)
                core = loaded.get(key) or self._load_one(model, size, bucket, load)
                loaded[key] = self._cores[size, bucket] = core
        self.concurrent = all(core.concurrent for core in loaded.values())
        self.submits = all(isinstance(core, SubmittingCore) for core in loaded.values())
        if load.compiled is not None:
            self._compare(load, load.compiled)
            self.warming = True
            self._warm_up(load, load.compiled)
            self.warming = False

    def _load_one(self, model: Any, size: int | None, bucket: int, load: Load) -> Core:
        told: dict[str, Any] = {"dynamic_batching": load.dynamic} if load.cuts_batches else {}
        if load.wants_example:
            told["example"] = load.compiled and load.compiled.example(size, bucket)
        core = self._backend.load(model, self.core_id, size, **told)
        return core if load.context is None else Within(core, load.context)

    def _compare(self, load: Load, compiled: Compiled) -> None:
        """Compare with full precision what computes in another: each model, on the first core that has loaded it."""
        for shape in load.warm:
            model = load.models[shape]
            if load.precision is None or id(model) in load.compared:
                continue
            with _naming(*shape, len(load.models)):
                shown = load, compiled, shape
                reduced, full = partial(self._timed, *shown), partial(self._in_full, *shown)
                compare(load.precision, reduced, full, self._backend.classify)
            load.compared.add(id(model))

    def _timed(self, load: Load, compiled: Compiled, shape: Shape, core: Core | None = None) -> Executed:
        rows = shape[0] or load.takes.clip(compiled.rows)
        return warm_up(core or self._cores[shape], compiled, rows, shape[1], self._clock, True)[1:]

    def _in_full(self, load: Load, compiled: Compiled, shape: Shape) -> Executed:
        core = self._cores[shape]
        assert isinstance(core, ReducedCore), "a core of a backend with `computes_in` has `full`"
        full = core.full()
        try:
            return self._timed(load, compiled, shape, full)
        finally:
            full.close()

    def _warm_up(self, load: Load, compiled: Compiled) -> None:
        clock, asked = self._clock, compiled.structure
        values: dict[Shape, Any] = {}
        seen: list[Seen] = []  # the executions in the first bucket
        wanted = load.packing and load.evidence.wants(asked)
        _, bucket = load.warm[0]
        numbers = identities(compiled.columns(bucket), load.dim) if wanted else []
        for shape in load.warm:
            rows = shape[0] or load.takes.clip(compiled.rows)
            try:
                with _naming(*shape, len(load.models)):
                    first, value, seconds = warm_up(self._cores[shape], compiled, rows, shape[1], clock, wanted)
            except Exception as error:
                if not load.free or shape[1] >= bucket or self._backend.classify(error) is not Fault.INPUT:
                    raise
                logger.info("the model does not take %d positions: %s: %s", shape[1], type(error).__name__, error)
            else:
                self.times.learn((shape[0] or rounded(rows), shape[1]), seconds, clock())
                values[shape] = value
                if wanted and shape[1] == bucket:
                    order = tuple(numbers[row % compiled.rows] for row in range(rows))
                    seen += [Seen(order, first), Seen(order, value)]
        if wanted:
            load.evidence.take(seen, asked, True, self._trials(load, compiled, bucket))
        self._learn(load, compiled, values, wanted)

    def _trials(self, load: Load, compiled: Compiled, bucket: int) -> Trials:
        """What else of the example can be executed."""
        compiled_sizes = [size for size, of in load.models if of == bucket and size is not None]

        def execute(columns: list[Any], count: int) -> Any:
            core = self._cores[count if compiled_sizes else None, bucket]
            return execute_in_own(core, *compiled.arguments(columns))

        return Trials(compiled.columns(bucket), load.dim, compiled_sizes or load.takes.trials(), execute)

    def _learn(self, load: Load, compiled: Compiled, values: Mapping[Shape, Any], compare: bool) -> None:
        """Note what the outputs are like, and what in them carries the length; compare what padding makes of it."""
        outputs: dict[int | None, tuple[Output, int]] = {}  # by size, that of the first bucket
        lengths: Carried | None = None
        for (size, bucket), value in values.items():
            with _naming(size, bucket, len(load.models)):
                rows = size or load.takes.clip(compiled.rows)
                output = load.evidence.marked(value, compiled.structure, rows, load.packing)
                output.asked = compiled.base
                self.kinds[size, bucket] = kind(output)
                self.outputs = self.outputs or outputs_of(output, rows, None)
                if not load.packing:
                    continue
                one, of = outputs.setdefault(size, (output, bucket))
                if load.unpad is None:
                    continue
                carried = load.unpad.known(output, bucket)
                if carried is None and one is not output:
                    carried = load.unpad.learn(output, bucket, one, of)
                elif carried is None and len({bucket for _, bucket in load.models}) == 1:
                    carried = load.unpad.learn(output, bucket)
                if carried is not None and lengths is None:
                    lengths, self.outputs = carried, outputs_of(output, rows, carried)
                if compare and carried is not None and one is not output and compiled.length <= min(of, bucket):
                    found = padding_in(one, output, carried, compiled.length, compiled.padded_left)
                    for name, share in found[:1]:
                        load.evidence.say("padding", TAKEN_FOR_CONTENT.format(name, percent(share), bucket, of))

    def other(self, size: int | None, bucket: int) -> tuple[Core, int] | None:
        """Another bucket, and the core to execute it."""
        found = beside(bucket, [b for s, b in self._cores if s in (size, None)])
        return None if found is None else (self.core(size, found), found)

    def core(self, size: int | None, bucket: int) -> Core:
        """The core loaded with the shape of a batch, or with any number of rows."""
        return self._cores.get((size, bucket)) or self._cores[None, bucket]

    def own(self) -> None:
        """Show what this run makes of the core from now on, and no other run of the model."""
        self.counters.owner, self.counters.times = self.run, self.times

    def show(self, state: str) -> None:
        """Its state, for the statistics: of two runs of a model on a core, the one that owns it shows its own."""
        if self.counters.owner is self.run:
            self.counters.state = state

    @property
    def polled(self) -> "list[PolledCore]":
        """The cores whose completions are read from a file descriptor."""
        return [core for core in dict.fromkeys(self._cores.values()) if isinstance(core, PolledCore)]

    @property
    def pace(self) -> float:
        """Executions a second, of the shape that takes longest; 0 while that is not known."""
        slowest = max(self.times.medians().values(), default=0.0)
        return 1 / slowest if slowest else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to close."""
        return not self._cores

    def close(self) -> None:
        """Free the cores. Blocking."""
        cores = {id(core): core for core in self._cores.values()}
        self._cores = {}
        for core in cores.values():
            try:
                core.close()
            except BaseException:
                logger.warning("core %d did not close", self.core_id, exc_info=True)


def padding_in(one: Output, other: Output, carried: Carried, length: int, left: bool) -> list[tuple[str, float]]:
    """The outputs in which it shows to how many positions the same rows were padded, and by what share of the largest.

    Along the dims that `carried` names the first `length` positions count, or the last ones if padding comes first.
    """
    found = []
    for path, dims, *pair in zip(one.paths(), carried, one.leaves, other.leaves, strict=True):
        if all(isinstance(leaf, torch.Tensor) for leaf in pair):
            for dim in dims:
                pair = [leaf.narrow(dim, leaf.shape[dim] - length if left else 0, length) for leaf in pair]
            if share := apart(*pair):
                found.append((path.text, share))
    return found


def is_hopeless(backend: Backend, error: Exception) -> bool:
    """Whether the other cores would not load either: what one has raised is about the model, or fatal."""
    about_the_model = (ValueError, TypeError, FileNotFoundError, OutputError)
    if isinstance(error, about_the_model) and not isinstance(error, DeviceError):
        return True
    try:
        return backend.classify(error) is Fault.FATAL
    except Exception:
        logger.exception("the %s backend could not classify an error", backend.name)
        return False


def warm_up(
    core: Core, compiled: Compiled, size: int, bucket: int, clock: Callable[[], float], keep: bool
) -> tuple[Any, Any, float]:
    """Run the example twice, brought to `size` rows and to `bucket`: throughput climbs over the first runs, and a fault
    of a compiled model can show in the second. Both outputs, in memory of their own if they are to be kept, and the
    seconds that the second run took.
    """
    own = snapshot if keep else _as_it_is
    args, kwargs = compiled.example(size, bucket)
    first = own(execute_in_own(core, args, kwargs))
    begin = clock()
    output = execute_in_own(core, args, kwargs)
    seconds = clock() - begin
    return first, own(output), seconds


def _as_it_is(output: Any) -> Any:
    return output


@contextmanager
def _naming(size: int | None, bucket: int, of: int) -> Iterator[None]:
    """Say in an error which of several models it came from."""
    try:
        yield
    except Exception as error:
        if of > 1:
            rows = "any number of" if size is None else size
            error.add_note(f"aneuron: with the model for {rows} rows" + (f", bucket {bucket}" if bucket else ""))
        raise
