"""`AsyncDataParallel`: what the user holds. Checks, settings, lifecycle.

Lives here: the arguments and what they mean, starting and closing. Must not be here: futures (engine/futures.py),
threads (engine/threads.py), tensor work (tensors/rows.py), which rows run next (sched/scheduler.py).
"""

import asyncio
import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from threading import get_ident
from types import TracebackType
from typing import Any, Self, TypeVar

from aneuron._native import why_pure_once
from aneuron.backends import (
    Backend,
    automatic,
    check_ids,
    check_models,
    choose_backend,
    choose_cores,
    parse_device_ids,
)
from aneuron.backends.torchscript import held, released
from aneuron.engine.evidence import Evidence, check_declared
from aneuron.engine.lane import Load
from aneuron.engine.lanes import FORKED, Lanes
from aneuron.engine.threads import Workers
from aneuron.errors import Closed, DeadlineExceeded, DeviceError, ShapeError
from aneuron.map.window import Map
from aneuron.observing import Observer, Trace
from aneuron.options import Options, View, seconds
from aneuron.program import Models
from aneuron.sched.call import Cut, Limit, Rest, Terms
from aneuron.sched.scheduler import Rules, Sizes
from aneuron.stats import Counters, Statistics, Timing
from aneuron.tensors.buckets import Buckets
from aneuron.tensors.outputs import Unpad
from aneuron.tensors.rows import Call
from aneuron.tensors.signature import Compiled, list_of_rows, measure

logger = logging.getLogger("aneuron")

T = TypeVar("T")

Model = Any  # nn.Module | ScriptModule | callable | path of a TorchScript file


class _Start:
    """A start in progress, and how many wait for it."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Lanes] | None = None
        self.waiters = 0

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for: a task that is cancelled before its first step cannot say so itself."""
        return self.task is None or self.task.done()


class AsyncDataParallel:
    """A model on every core of this process, to be awaited.

    ``y = await model(*inputs, **kwargs)``: every tensor among the inputs (at any depth of tuples, lists, dicts, named
    tuples, dataclasses and namespaces; NumPy arrays count as tensors, and subclasses arrive as plain ones) has the same
    number of rows n >= 1 along `dim`; everything else is passed to the model as it is. (A list is a structure of
    inputs, not of rows. One that holds nothing but what looks like images, (3, H, W) or uint8 (H, W, 3) from 8 x 8 on,
    is a `ShapeError` unless `example_inputs` has tensors in the same places; in a tuple they are inputs.) The result
    has the structure that the model makes, with n rows in each tensor, in order; its tensors are ordinary, detached, on
    the CPU, and share memory with nothing.

    Inputs are read when their batch is formed, not at the call, and again if it must run once more: leave them alone
    until the call has ended. A tensor that was written to in place meanwhile fails its call with `InputModified`;
    writes through NumPy or `.data`, and to inference tensors, nobody can see.

    Calls that wait are packed into batches with other callers' rows if their tensors agree in shape (but for the
    rows) and dtype (quantized ones in scale and zero point) and their other arguments are the same; a call may be
    spread over several batches and cores.
    Cancelling an awaiting task takes its rows out of the queue; rows that a core is executing are finished and dropped.

    Pickled or copied, whatever it does meanwhile, it is its configuration of now, not started: with the model that
    serves and what was set at run time, without observer and statistics.

    Parameters (the first four as in `torch_neuronx.DataParallel`,
    https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-data-parallel.html):

    model: an `nn.Module`, a `ScriptModule`, a callable, or the path of a TorchScript file. Or a mapping from batch
        sizes to such models, `{1: net1, 8: net8}`, or from batch sizes and buckets, `{(8, 64): net}`: rows run on the
        set of executions that takes the least time, as measured. Excludes `batch_size`.
    device_ids: ints or "nc:#", zero-based in the cores that this process sees ("cuda:#" for CUDA devices); None for all
        of them.
    dim: the batch dimension. Dynamic batching works for 0 only.
    set_dynamic_batching: whether inputs are cut, packed and padded to the compiled rows. When off, a call's inputs are
        cut over the cores and `rows / cores` must equal the compiled rows, if those are known.
    backend: "neuron", "cuda", "cpu", or an object with the methods of `aneuron.Backend`. "auto" is, at start, neuron if
        this process has NeuronCores, else cuda if it has a device, else cpu; and cpu for a plain callable.
    batch_size: rows in one execution, as compiled; every batch is padded to it. None: any number of rows.
    example_inputs: what the model was traced with: a tensor, a tuple of positional or a dict of keyword inputs. It is
        run twice on each core before the model is ready. For a ScriptModule, or with `batch_size`, it also fixes
        shapes and dtypes; to a ScriptModule it gives its `batch_size` if there is none.
    num_workers: batches that may be in flight, on all cores together; None: two a core. Settable at any time.
    split_size: rows of the pieces that a call is cut into; None: up to `batch_size`, or `max(1, rows // cores)` where
        any number will do. Settable at any time.
    max_pending: rows that may wait before calls are refused with `QueueFull`; None: no bound. A call takes room for the
        rows of its next batch; what large calls have beyond that has as much room again, and one call larger than this
        may wait beside. Where there is none, a tenant that has less than its share of it takes it from the newest call
        of the largest, and a call of a higher level from the newest of the lowest: that is refused instead, unless it
        has begun. Elements of `map` wait for room, and give way to calls. Settable at any time.
    max_delay: seconds that a batch which is not full may be held back for company, from its oldest row on, and only
        while another core works. None: one core's share of the service time, where so many rows come that it pays.
    buckets: the lengths that the model was compiled for, see `Buckets`; calls of any length are padded to the smallest
        that fits, and their outputs cut back.
    exec_timeout: seconds after which an execution is given up and its core counts as hung; None: no bound. The rows run
        once more on another core; the thread that hangs is left to itself.
    min_cores: how many of the cores must load the model to start; None: all. Below it the start fails, with the error
        of the first, and what was loaded is freed; else those that failed stay out, with a warning in the log. `ready`
        asks for as many, or for one where it is None.
    outputs: what is known of the outputs, by name, position among the tensors, or path as errors print it:
        `{"prototypes": "whole"}` for what does not have the batch's rows, of which each caller gets a copy of its own;
        `"rows"` for what has them, without evidence.
    check_rows: whether it is found out which outputs have a row for each row of the batch, rather than guessed from
        equal numbers: by at most two executions more of other rows, at warm-up from `example_inputs`, else with the
        first calls whose rows differ or can be varied; if the model refuses them shapes decide, and a warning says so.
        It also warns, in the log, of rows that influence one another. False: shapes decide.
    context: a function that makes a context manager, which is entered around each execution, those of the warm-up too,
        in the thread that executes: `lambda: torch.autocast("cpu")`, `lambda: sdpa_kernel(SDPBackend.MATH)`. What it
        raises is like an error of the model.

    Threads that execute start in a copy of the context (`contextvars`) of `start()`, or of the call that started the
    model. After each execution the thread's modes are put back, whatever the model has left on: gradients, inference
    mode, autocast, default device; and the default dtype, which is the process's: change it while nothing executes.

    Raises, from the call: `ShapeError` for inputs that do not fit, `InputModified` for those that were changed while it
    waited, `QueueFull`, `Closed`, `CoreFailed`, `OutputError` for outputs that cannot be handed out, `RuntimeError`
    when used from a second event loop, and whatever the model raised for this call's rows.

        >>> import asyncio, torch, aneuron
        >>> async def main():
        ...     async with aneuron.AsyncDataParallel(torch.nn.Softmax(1).eval(), batch_size=8) as model:
        ...         return await model(torch.zeros(3, 2))
        >>> asyncio.run(main())
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    _asked_for_batching: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note whether dynamic batching was asked for or is on by default: only then is it worth a warning."""
        self = super().__new__(cls)
        self._asked_for_batching = len(args) > 3 or "set_dynamic_batching" in kwargs
        return self

    def __init__(
        self,
        model: Model,
        device_ids: Iterable[int | str] | None = None,
        dim: int = 0,
        set_dynamic_batching: bool = True,
        *,
        backend: str | Backend = "auto",
        batch_size: int | None = None,
        example_inputs: Any = None,
        num_workers: int | None = None,
        split_size: int | None = None,
        max_pending: int | None = None,
        max_delay: float | None = 0.0,
        buckets: Buckets | None = None,
        exec_timeout: float | None = None,
        min_cores: int | None = None,
        outputs: Mapping[str | int, str] | None = None,
        check_rows: bool = True,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        others = frozenset(vars(self))  # what a subclass has set before
        self._lanes: Lanes | None = None
        self._starting: _Start | None = None
        self._closed = False
        self._closings = 0  # how often it has been
        self._observer: Observer | None = None
        if isinstance(device_ids, Iterable) and not isinstance(device_ids, (str, bytes)):
            device_ids = list(device_ids)
        self._fixed = {
            "device_ids": device_ids, "dim": dim, "backend": backend, "batch_size": batch_size,
            "example_inputs": example_inputs, "max_delay": max_delay, "buckets": buckets,
            "exec_timeout": exec_timeout, "min_cores": min_cores, "outputs": outputs, "check_rows": check_rows,
            "context": context,
        }  # fmt: skip  # what no setter changes, as it was given
        self._ids = parse_device_ids(device_ids)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise ValueError(f"dim={dim!r}: expected an int, the dimension that counts rows")
        self._dim = dim
        self._chosen = self._backend = choose_backend(backend)  # None: by each start
        if self._chosen is not None:
            check_ids(self._chosen, self._ids)
        if buckets is not None and not isinstance(buckets, Buckets):
            raise TypeError(f"buckets={buckets!r}: expected aneuron.Buckets(dim=..., sizes=(...), pad=...), or None")
        self._buckets = buckets
        scripts = self._chosen is None or getattr(self._chosen, "loads_scripts", False)
        self._models = Models(model, _count("batch_size", batch_size), dim, buckets, scripts)
        self._max_pending = _count("max_pending", max_pending)
        self._max_delay = None if max_delay is None else seconds("max_delay", max_delay)
        self._num_workers = _count("num_workers", num_workers)
        self._split_size = _count("split_size", split_size)
        self._exec_timeout = None if exec_timeout is None else seconds("exec_timeout", exec_timeout)
        if self._exec_timeout == 0:
            raise ValueError("exec_timeout=0: expected seconds, more than the longest execution takes, or None")
        self._min_cores = _count("min_cores", min_cores)
        self._outputs, self._check_rows = check_declared(outputs), bool(check_rows)
        if context is not None and (not callable(context) or hasattr(context, "__enter__")):
            raise TypeError(
                f"context={context!r:.80}: expected a function that makes a context manager for each execution, such "
                "as lambda: torch.autocast('cpu'), or None"
            )
        self._context = context
        self._packing = bool(set_dynamic_batching) and dim == 0
        self._example = self._read_example(example_inputs)
        self._compiled = self._example if self._models.compiled else None
        self._lengths = self._example.lengths if self._example is not None else None
        self._warned_of_list = False
        self._known = self._example.names if self._example is not None else ()
        self._checked: Hashable = None  # the signature of the last call that was found to fit
        self._sizes: Mapping[int, Sizes] = {}  # of this run of the model, which learns them
        self._swapping = False
        self._retired: dict[Lanes, asyncio.Task[None]] = {}  # runs of models that were swapped, with calls left
        self._counters = Counters()
        if dim != 0 and set_dynamic_batching and self._asked_for_batching:
            warnings.warn(
                f"dynamic batching cannot be enabled for dim={dim}, only for dim=0; it is off: rows / cores must equal "
                "the compiled rows",
                stacklevel=2,
            )
        self._attributes = frozenset(vars(self)) - others | {"_attributes", "_asked_for_batching"}

    def _read_example(self, example_inputs: Any) -> Compiled | None:
        """What to warm up with; it also says how many rows a compiled graph takes."""
        if example_inputs is None:
            return None
        kwargs: dict[str, Any] = example_inputs if type(example_inputs) is dict else {}
        args: tuple[Any, ...] = example_inputs if type(example_inputs) is tuple else (example_inputs,) * (not kwargs)
        try:
            example = Compiled(args, kwargs, self._dim, self._buckets)
        except ShapeError as error:
            raise ShapeError(f"example_inputs: {error}") from None
        self._models.take_size(example.rows)
        return example

    def __reduce__(self) -> tuple[Any, ...]:
        """See the class. Attributes of a subclass go along; a traced model goes as `torch.jit.save` writes it."""
        settings = self._fixed | {
            "set_dynamic_batching": self._packing or (self._dim != 0 and not self._asked_for_batching),
            "num_workers": self._num_workers,
            "split_size": self._split_size,
            "max_pending": self._max_pending,
        }
        own = {name: value for name, value in vars(self).items() if name not in self._attributes}
        return _configured, (type(self), held(self._models.source), settings), own or None

    # Calls.

    def __call__(self, *inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Run the model on the inputs' rows; see the class. To be awaited."""
        return self._run(inputs, kwargs)  # not through a coroutine of its own, which each call would pay for

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run."""
        return await self._timed(inputs, kwargs)

    def map(
        self, source: Any, *, ordered: bool = True, limit: int | None = None, return_exceptions: bool = False
    ) -> Map[Any]:
        """Run the model on each element of a source; `Map` says what `async for` and `async with` do with it.

        source: an iterable or async iterable; an element is a tensor, a tuple of positional inputs or a dict of keyword
            inputs, with its batch dimension, and one call. A list is taken for a tuple.
        limit: elements outstanding; None: as many as keep every core busy if each is one row.

        With `max_pending` elements wait for room, in order, instead of being refused, and give theirs to calls.

            >>> import asyncio, torch, aneuron
            >>> async def main():
            ...     async with aneuron.AsyncDataParallel(torch.nn.ReLU().eval()) as model:
            ...         return [y.item() async for y in model.map(torch.tensor([[n]]) for n in (-1.0, 0.0, 1.0))]
            >>> asyncio.run(main())
            [0.0, 0.0, 1.0]
        """
        return self._map(source, None, lambda: None, ordered, limit, return_exceptions)

    def _map(
        self,
        source: Any,
        terms: Terms | None,
        timeout: Callable[[], Limit | None],
        ordered: bool,
        limit: int | None,
        return_exceptions: bool,
    ) -> Map[Any]:
        terms = (terms or Terms())._replace(yields=True)

        def call(*inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
            return self._run(inputs, kwargs, terms, timeout())

        bound = self._outstanding if limit is None else limit
        return Map(call, source, ordered=ordered, limit=bound, return_exceptions=return_exceptions)

    async def _outstanding(self) -> int:
        """One-row calls that keep every core busy: two batches for each, as far as the second has room to wait."""
        rules = (await self._started()).rules
        kinds = len(self._buckets.sizes) if self._buckets is not None else 1  # each fills batches of its own
        busy = (rules.batch_size or rules.preferred) * kinds * rules.cores
        return busy + min(busy, self._max_pending or busy)

    def options(self, timeout: float | None = None, priority: float = 0.0, tenant: Hashable = None) -> View:
        """The model on other terms: a cheap object to be called like this one, with `timed`, `map` and `options`.

        Further `options` of what this returns change what they name, and leave the rest as it is.

        timeout: seconds, 0 or more, from the call to its result; None: no bound. Then `DeadlineExceeded`, at once if
            what is known of the cores says that it cannot be met; a call that becomes hopeless while it waits is
            dropped before it costs a core anything. It does not change the order.
        priority: any finite number. Batches start with the call of the highest level: its priority plus one for each
            second that it has waited.
        tenant: who asks; anything hashable, compared here and not later. Tenants take turns, row by row, however many
            calls one of them makes. Calls without one are one tenant.

            >>> import asyncio, torch, aneuron
            >>> async def main():
            ...     async with aneuron.AsyncDataParallel(torch.nn.ReLU().eval()) as model:
            ...         return await model.options(timeout=10.0, tenant="acme")(torch.tensor([[-1.0, 2.0]]))
            >>> asyncio.run(main())
            tensor([[0., 2.]])
        """
        return View(self, Options().changed(timeout, priority, tenant))

    def check_admission(self, rows: int = 1) -> None:
        """Raise what a call of so many rows would be refused with now: `QueueFull`, `NoHealthyCores`, `Closed`.

        For servers: a request can be refused before its body is read, which costs a fraction (`shed` of
        `aneuron.web`). It counts as a refused call. Asked is for a call of priority 0; where tenants wait, for one of a
        tenant that does not, so that nobody is refused here who would find room. Says nothing of a model that is not
        started, and reserves nothing. To be called on the loop of the model, `RuntimeError` elsewhere.
        """
        self._check_loop()
        if self._lanes is not None:
            self._lanes.check(_count("rows", rows) or 1)

    async def _timed(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms | None = None, timeout: Limit | None = None
    ) -> tuple[Any, Timing]:
        trace = Trace()
        result = await self._run(inputs, kwargs, terms, timeout, trace)
        return result, trace.timing()

    async def _run(
        self,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None = None,
        timeout: Limit | None = None,
        trace: Trace | None = None,
    ) -> Any:
        if self._observer is not None and (trace is None or trace.observer is None):
            return await self._observed(self._observer, inputs, kwargs, terms, timeout, trace or Trace())
        call = measure(inputs, kwargs, self._dim, self._buckets, self._lengths, self._known)
        if self._compiled is not None and call.signature is not self._checked:
            self._compiled.check(call, inputs, kwargs)
            self._checked = call.signature
        lanes = self._lanes
        if lanes is None or lanes.thread != get_ident() or not lanes.loop.is_running():
            if timeout is None:
                lanes = await self._started()
            else:
                lanes, timeout = await self._started_within(timeout)
        rules = lanes.rules
        if rules.batch_size is None or rules.split_size is not None or not rules.packing:
            call.cut = self._cut(call, rules)
        if call.structure and call.rows > 1 and not self._warned_of_list:
            self._look_for_list(call, rules, inputs, kwargs)
        if terms is not None:
            call.terms = terms
        if trace is not None:
            call.trace = trace
        future = lanes.admit(call, timeout)
        try:
            return await future
        finally:
            if not call.settled:
                lanes.futures.withdraw(call)
            del future  # an exception's traceback holds this frame

    async def _observed(
        self,
        observer: Observer,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None,
        timeout: Limit | None,
        trace: Trace,
    ) -> Any:
        with observer.call(trace.timing) as trace.token:
            trace.observer = observer
            return await self._run(inputs, kwargs, terms, timeout, trace)

    def _cut(self, call: Call, rules: Rules) -> Cut:
        """How a call will be cut, where that is not anywhere."""
        sizes = self._sizes[call.bucket].sizes if self._sizes else [self._models.batch_size or 0]
        cut = rules.cut(call.rows, sizes[-1])
        if rules.packing and rules.split_size is None:
            return cut
        pieces = cut.count(call.rows)
        if not rules.packing:
            even = call.rows == cut.piece * pieces and (rules.split_size is not None or pieces == rules.cores)
            if sizes[-1] and not (even and cut.piece in sizes):
                compiled = " or ".join(map(str, sizes))
                raise ShapeError(
                    f"{call.rows} rows / {rules.cores} cores != {compiled} compiled rows: with dynamic batching off "
                    f"the rows of a call, divided by the cores, must be those that the model was compiled for"
                    + (f" (split_size={rules.split_size})" if rules.split_size else "")
                )
        if pieces % rules.cores and (rules.split_size is not None or not self._packing):
            warnings.warn(
                f"the cores are not fully used: {call.rows} rows in {pieces} pieces on {rules.cores} cores",
                stacklevel=3,
            )
        if not rules.packing:
            call.signature = (None, call.signature)  # apart from calls that share batches
        return cut

    def _look_for_list(self, call: Call, rules: Rules, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn once of a list that is given whole to each piece of a call, and looks as if it had an entry a row."""
        cut = call.cut.count(call.rows) > 1 or call.rows > (rules.batch_size or call.rows)
        name = list_of_rows(inputs, kwargs, call.rows) if cut else None
        if name is not None:
            self._warned_of_list = True
            warnings.warn(
                f"{name} is a list of {call.rows} entries, as many as the call has rows; the call is cut into pieces, "
                "and each is given the whole list. If it has an entry for each row pass aneuron.Rows(...), if not "
                "aneuron.Shared(...) or a tuple",
                stacklevel=3,
            )

    def disable_dynamic_batching(self) -> None:
        """Neither pack nor pad the calls made from now on: `rows / cores` must equal the compiled rows, if known.

        Where they are not, and the cores cut batches themselves (`Backend`), call it before the start: cores that are
        loaded go on cutting, and a warning says so.
        """
        if self._lanes is not None:
            if self._packing and not self._lanes.rules.packing:
                warnings.warn(
                    "the cores go on cutting batches, since it is not known how many rows the model was compiled for; "
                    "call disable_dynamic_batching() before start(), or pass batch_size=",
                    stacklevel=2,
                )
            self._lanes.change(packing=False)
        self._packing = False

    @property
    def num_workers(self) -> int | None:
        """Batches that may be in flight, on all cores together; None before the start if none was given."""
        if self._num_workers is None and self._lanes is not None:
            return self._lanes.slots
        return self._num_workers

    @num_workers.setter
    def num_workers(self, value: int) -> None:
        self._num_workers = _count("num_workers", value)
        if self._lanes is not None and self._lanes.serving and not self._lanes.loop.is_closed():
            self._lanes.loop.call_soon_threadsafe(self._resize)

    def _resize(self) -> None:
        if self._lanes is not None and self._lanes.serving and self.num_workers is not None:
            self._lanes.resize(self.num_workers)

    @property
    def split_size(self) -> int | None:
        """Rows of the pieces that a call is cut into; None: chosen, see the class."""
        return self._split_size

    @split_size.setter
    def split_size(self, value: int | None) -> None:
        self._split_size = _count("split_size", value)
        if self._lanes is not None:
            self._lanes.change(split_size=self._split_size)

    @property
    def max_pending(self) -> int | None:
        """Rows that may wait, see the class; those that wait already are left alone. None: no bound."""
        return self._max_pending

    @max_pending.setter
    def max_pending(self, value: int | None) -> None:
        self._max_pending = _count("max_pending", value)
        if self._lanes is not None:
            self._lanes.change(max_pending=self._max_pending)

    @property
    def ready(self) -> bool:
        """Whether calls are served: started, warmed up, not closing, with `min_cores` cores that serve (None: one)."""
        lanes = self._lanes
        if lanes is None or not lanes.serving or lanes.loop.is_closed():
            return False
        return lanes.recovery.in_service >= (self._min_cores or 1)

    def statistics(self) -> Statistics:
        """A frozen snapshot of the counters, cheap enough to be read 100 times a second. They outlive a restart."""
        lanes = self._lanes
        return self._counters.snapshot(0, 0) if lanes is None else lanes.statistics(list(self._retired))

    def observe(self, observer: Observer | None) -> None:
        """Tell an observer of the calls made from now on, and of the executions that have their rows; None: nobody.

        Calls through `timed`, `map` and views are calls too. There is one observer; another takes its place.
        `aneuron.web.tracing` is one that makes OpenTelemetry spans. Without one, nothing is noted.

            >>> import asyncio, contextlib, torch, aneuron
            >>> class Printer:
            ...     def call(self, timing):
            ...         return contextlib.nullcontext("a call")
            ...     def batch(self, calls, *, core, rows, padded_rows, why):
            ...         print(calls, rows, padded_rows, why)
            ...         return contextlib.nullcontext()
            >>> async def main():
            ...     async with aneuron.AsyncDataParallel(torch.neg, batch_size=8) as model:
            ...         model.observe(Printer())
            ...         await model(torch.ones(3, 2))
            >>> asyncio.run(main())
            [('a call', 3)] 3 5 core_idle
        """
        self._observer = observer

    # Lifecycle.

    async def start(self) -> None:
        """Load the model on every core and warm it up. The first call does it if nobody has.

        Several may wait for one start; when the last of them is cancelled, so is the start, and what was loaded is
        freed. A closed model may be started again, also on another loop. Raises what loading raises.
        """
        if self._lanes is not None and not self._lanes.serving and not self._lanes.loop.is_closed():
            raise Closed(self._lanes.why_closed)
        self._closed = False
        await self._started()

    async def _started(self) -> Lanes:
        """The running lanes; those of this loop, started if need be."""
        closings = self._closings
        while True:
            self._check_loop()
            if self._lanes is not None:
                return self._lanes
            if self._closed or self._closings != closings:
                raise Closed("the model is closed; start() opens it again")
            start = self._starting
            if start is None or start.over:
                start = self._starting = _Start()
                start.task = asyncio.create_task(self._start(start), name="aneuron start")
            task = start.task
            assert task is not None
            start.waiters += 1
            try:
                await asyncio.wait({task})
            except BaseException:
                if start.waiters == 1 and not task.cancel():  # it has just ended
                    self._let_go(task)
                raise
            finally:
                start.waiters -= 1
            if not task.cancelled():
                try:
                    return task.result()
                finally:
                    del task, start  # an exception's traceback holds this frame
            # By a close, or because all who waited had left when we came.

    def _let_go(self, task: "asyncio.Task[Lanes]") -> None:
        """A start has succeeded, and nobody wants it any more."""
        if not task.cancelled() and task.exception() is None and not task.result().futures.calls:
            task.result().abort()
            self._lanes = None

    async def _started_within(self, timeout: Limit) -> tuple[Lanes, Limit]:
        """The running lanes, and what is left of the time."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(timeout) as scope:
                lanes = await self._started()
        except TimeoutError:
            if not scope.expired():
                raise  # the model's own, from loading
            raise DeadlineExceeded(
                f"{timeout!s} has passed while the model was being loaded; start() it before it serves"
            ) from None
        return lanes, Rest.of(timeout, gone=loop.time() - began)

    def _check_loop(self) -> None:
        """An instance belongs to the loop that started it, until it is closed or that loop is; and to its process."""
        if self._lanes is not None and self._lanes.forked:
            raise RuntimeError(FORKED)
        if self._lanes is not None:
            owner = self._lanes.loop
        elif self._starting is not None and self._starting.task is not None and not self._starting.over:
            owner = self._starting.task.get_loop()
        else:
            return
        if owner is asyncio.get_running_loop():
            return
        if not owner.is_closed():
            raise RuntimeError(
                "this model runs on another event loop, and belongs to it until aclose(). From a thread that this loop "
                "has started (a handler without async) call anyio.from_thread.run(model, x), from any other, Flask's "
                "say, portal.call(model, x) of one anyio.from_thread.start_blocking_portal() in which the model runs "
                "(README, Recipes); or close it there first, or make one instance for each loop"
            )
        if self._lanes is not None:
            self._lanes.stop()  # its loop has gone without closing it
        self._lanes = self._starting = None

    async def _start(self, start: _Start) -> Lanes:
        began = time.monotonic()
        try:
            backend, ids, rows = await self._in_a_thread(self._look_for_cores)
            self._backend = backend
            self._models.settle(rows)
            if self._min_cores is not None and self._min_cores > len(ids):
                raise DeviceError(f"min_cores={self._min_cores}, and there are {len(ids)} cores to start on: {ids}")
            lanes = self._make_lanes(backend, ids, self._models)
            await lanes.start(self._min_cores or len(ids))
            self._serve(lanes, self._models, self._num_workers or 2 * lanes.recovery.in_service)
            self._say_started("started", lanes, began)
            return lanes
        finally:
            if self._starting is start:
                self._starting = None
            del start  # whose task has the exception whose traceback holds this frame

    def _say_started(self, what: str, lanes: Lanes, began: float) -> None:
        """One line for the log, and one for the first model if the core is not compiled."""
        if why := why_pure_once():
            logger.info("the core runs as Python, more slowly: %s", why)
        ids = [lane.core_id for lane in lanes.lanes if lanes.recovery.health[lane.index].serves]
        shapes = [
            ("1 row" if rows == 1 else f"{rows or 'any number of'} rows") + (f" of length {bucket}" if bucket else "")
            for rows, bucket in self._models.by_shape(self._dim)
        ]
        logger.info(
            "%s on %d core%s of the %s backend (%s): %s; %.2f s%s",
            what, len(ids), "s" * (len(ids) != 1), self._backend.name if self._backend else "",
            ", ".join(map(str, ids)), ", ".join(shapes),
            time.monotonic() - began, f"; the process has {memory}" if (memory := _resident()) else "",
        )  # fmt: skip

    def _make_lanes(self, backend: Backend, ids: list[int], models: Models, beside: bool = False) -> Lanes:
        packing = self._packs(backend, models)
        rules = Rules(
            cores=len(ids),
            batch_size=models.batch_size,
            preferred=getattr(backend, "preferred_rows", 32),
            split_size=self._split_size,
            packing=packing,
            max_pending=self._max_pending,
            max_delay=self._max_delay,
        )
        unpad = Unpad(self._buckets) if self._buckets is not None else None
        evidence = Evidence(self._dim, self._outputs, self._check_rows and getattr(backend, "probes", True))
        shapes = models.by_shape(self._dim)
        load = Load(shapes, self._dim, self._example, packing, self._packing, evidence, unpad, self._context)
        sizes = models.sizes(self._dim)
        return Lanes(backend, ids, rules, load, sizes, self._counters, models.times, self._exec_timeout, beside)

    def _serve(self, lanes: Lanes, models: Models, num_workers: int) -> None:
        """Serve with lanes that are loaded, from the next call on."""
        try:
            packing = lanes.rules.packing and self._packing
            # As set while it loaded.
            lanes.change(split_size=self._split_size, max_pending=self._max_pending, packing=packing)
            lanes.resize(num_workers)
        except BaseException:  # no threads to be had
            lanes.stop()
            raise
        self._compiled = self._example if models.compiled else None
        self._checked = None
        self._models, self._lanes, self._sizes = models, lanes, lanes.sizes

    async def swap(self, model: Model) -> None:
        """Serve with another model from now on; no call fails or is lost, and each is answered wholly by one of them.

        The new model is loaded and warmed up on one core after the other, beside the old one, which serves meanwhile:
        the cores need room for both. Calls made before all are loaded are the old one's, calls made after that the new
        one's; the return waits for the end of the former, after which the old one is freed. A model that is not started
        will start with the new one.

        model: as for the constructor, for the same inputs, with outputs of the same structure, shapes and dtypes, and
            compiled for the same sizes. Without `example_inputs` nothing but the sizes can be checked.

        If it fails the old model stays, on every core. Raises `ShapeError` for a model that differs, what loading
        raises, `Closed` if the model was closed meanwhile, `RuntimeError` while another swap is in progress. Cancelled
        before the new model serves, it changes nothing.

            >>> import asyncio, torch, aneuron
            >>> async def main():
            ...     example = torch.zeros(1, 2)
            ...     async with aneuron.AsyncDataParallel(torch.nn.ReLU().eval(), example_inputs=example) as model:
            ...         await model.swap(torch.nn.Hardtanh().eval())
            ...         return await model(torch.tensor([[-3.0, 3.0]]))
            >>> asyncio.run(main())
            tensor([[-1.,  1.]])
        """
        if self._swapping:
            raise RuntimeError("another swap is in progress; await it first")
        began = time.monotonic()
        models = self._models.like(model)
        self._swapping = True
        try:
            if self._lanes is None and self._starting is None:
                self._models = models
                return
            old = await self._started()
            new = await self._load_beside(old, models)
        finally:
            self._swapping = False
        if self._lanes is not old or not old.serving:
            new.abort()
            raise Closed("the model was closed while it was being swapped")
        drain = asyncio.get_running_loop().create_task(old.drain(), name="aneuron swap")
        self._retired[old] = drain  # before it is replaced: a thread that reads statistics must find it somewhere
        try:
            self._serve(new, models, old.slots)
        except BaseException:
            drain.cancel()  # it has not begun
            del self._retired[old]
            raise
        drain.add_done_callback(lambda _: self._forget(old))
        new.take_over()
        self._say_started("swapped", new, began)
        await asyncio.shield(drain)

    def _forget(self, old: Lanes) -> None:
        """A run that was swapped has been drained."""
        self._retired.pop(old, None)
        old.abort()  # there is nothing left to, unless what drained it has died

    async def _load_beside(self, old: Lanes, models: Models) -> Lanes:
        """The lanes of another model on the same cores; raises if a core that serves has not loaded it."""
        backend = self._backend
        assert backend is not None
        models.settle(await self._in_a_thread(lambda: self._ask(backend, models)))
        if set(models.by_shape(self._dim)) != set(self._models.by_shape(self._dim)):
            raise ShapeError(
                f"the new model is compiled for {sorted(models.by_shape(self._dim), key=str)} (rows, bucket), the one "
                f"that serves for {sorted(self._models.by_shape(self._dim), key=str)}; they must be the same"
            )
        ids = [lane.core_id for lane in old.lanes]
        new = old.context.copy().run(self._make_lanes, backend, ids, models, beside=True)
        try:
            await new.start(max(1, old.recovery.in_service))
        except Exception as error:
            if any(lane.warming for lane in new.lanes):
                raise ShapeError(f"the new model does not take example_inputs as the old one does: {error}") from error
            raise
        if differing := new.differ_from(old):
            new.abort()
            raise differing
        return new

    async def _in_a_thread(self, fn: Callable[[], T]) -> T:
        """What may take long."""
        workers = getattr(self._chosen, "workers", Workers)("aneuron-start")
        workers.grow(1)
        try:
            future: asyncio.Future[T] = asyncio.wrap_future(workers.submit(fn))
            return await future
        finally:
            workers.stop()

    def _ask(self, backend: Backend, models: Models) -> int | None:
        """What the backend knows of the compiled rows; raises for models that it cannot run."""
        check_models(backend, models.given)
        return models.ask(backend, self._example.rows if self._example is not None else None)

    def _look_for_cores(self) -> tuple[Backend, list[int], int | None]:
        """The backend, the cores to load on, and what it knows of the compiled rows."""
        backend = self._chosen or automatic(self._models.given)
        rows = self._ask(backend, self._models)
        if self._example is None and getattr(backend, "cuts_batches", False):
            logger.warning(
                "there are no example_inputs: the cores cannot be warmed up before the model is ready; pass what it "
                "was traced with"
            )
        return backend, choose_cores(backend, self._ids), rows

    def _packs(self, backend: Backend, models: Models) -> bool:
        """Whether calls may share batches: not where cores cut batches themselves, nobody knows to how many rows."""
        return self._packing and (models.batch_size is not None or not getattr(backend, "cuts_batches", False))

    async def aclose(self) -> None:
        """Refuse new calls, finish the accepted ones, free cores and threads. If cancelled, `abort()` instead.

        A start in progress is cancelled: what a thread is loading then is freed when it is loaded, and not waited for.
        A core that has not closed 30 s after its last call is left to itself, with a warning in the log.
        """
        self._check_loop()
        self._close_door()
        lanes = self._lanes
        if lanes is None:
            return
        try:
            await lanes.drain()
            while self._retired:  # by a swap
                await asyncio.wait(list(self._retired.values()))
        except BaseException:
            self._abort_all(lanes)
            raise
        finally:
            if self._lanes is lanes:
                self._lanes = None

    async def abort(self) -> None:
        """Fail the calls that have not begun with `Closed`; what executes is left to finish, and not waited for."""
        self._check_loop()
        self._close_door()
        lanes, self._lanes = self._lanes, None
        if lanes is not None:
            self._abort_all(lanes)

    def _abort_all(self, lanes: Lanes) -> None:
        for run in (lanes, *self._retired):
            run.abort()

    def _close_door(self) -> None:
        self._closed = True
        self._closings += 1
        if self._starting is not None and self._starting.task is not None:
            self._starting.task.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await (self.aclose() if kind is None else self.abort())

    def __del__(self) -> None:
        lanes = getattr(self, "_lanes", None)
        if lanes is not None and not lanes.forked:
            for run in (lanes, *self._retired):
                run.stop()
            warnings.warn(
                "an AsyncDataParallel was never closed; use `async with`, or await aclose()",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        state = "ready" if self.ready else "closed" if self._closed else "starting" if self._starting else "not started"
        return f"<AsyncDataParallel {state}, {self._backend or 'auto'!r}, batch_size={self._models.batch_size}>"


AsyncDataParallel.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    AsyncDataParallel.__init__
).replace(parameters=list(inspect.signature(AsyncDataParallel.__init__).parameters.values())[1:])


def _resident() -> str:
    """The memory that the process has, in words; nothing where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return f"{int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB of memory"
    except (OSError, ValueError, IndexError, AttributeError):
        return ""


def _configured(kind: type[AsyncDataParallel], model: Model, settings: dict[str, Any]) -> AsyncDataParallel:
    """An instance that is not started, whatever the arguments of a subclass are."""
    made = kind.__new__(kind)
    AsyncDataParallel.__init__(made, released(model), **settings)
    return made


def _count(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r}: expected an int of at least 1, or None to leave it to aneuron")
    return value


__all__: Sequence[str] = ["AsyncDataParallel"]
