"""`AsyncDataParallel`: what the user holds.

Lives here: the arguments and what they mean, the call. Must not be here: starting and closing (lifecycle.py), futures
and threads (engine/), tensor work (tensors/rows.py), which rows run next (sched/).
"""

import inspect
import warnings
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from aneuron.arguments import count
from aneuron.backends import Backend
from aneuron.backends.torchscript import held, released
from aneuron.calls import Calls
from aneuron.lifecycle import Lifecycle
from aneuron.map.window import Map
from aneuron.observing import Observer
from aneuron.options import Options, View
from aneuron.pool import Pool, pool_of
from aneuron.program import Program, Settings
from aneuron.remote.model import RemoteLifecycle
from aneuron.sched.room import Work
from aneuron.signature import Signature
from aneuron.stats import Statistics, Timing
from aneuron.tensors.buckets import Buckets

Model = Any  # nn.Module | ScriptModule | ExportedProgram | callable | path of a file


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
    until the call has ended (`InputModified` says which writes are seen).

    Calls that wait are packed into batches with other callers' rows if their tensors agree in shape (but for the rows)
    and dtype (quantized ones in scale and zero point) and their other arguments are the same; a call may be spread over
    several batches and cores. Cancelling an awaiting task takes its rows out of the queue; rows that a core is
    executing are finished and dropped.

    Pickled or copied, whatever it does meanwhile, it is its configuration of now, not started: with the model that
    serves and what was set at run time, without observer and statistics.

    Parameters (the first four as in `torch_neuronx.DataParallel`,
    https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-data-parallel.html):

    model: an `nn.Module`, `ScriptModule` or `ExportedProgram`, a callable, or the path of a `.pt2`, TorchScript, ONNX
        or OpenVINO file. An exported program says what it takes: batches have its numbers of rows, a `batch_size`
        that is none of them is a `ValueError` at start, inputs of other shapes or dtypes are a `ShapeError`. Or a
        mapping from batch sizes to models, `{1: net1, 8: net8}`, or from these and buckets, `{(8, 64): net}`: rows run
        on the executions that take the least time, as measured. Excludes `batch_size`.
    device_ids: ints or "nc:#", zero-based in what this process sees ("cuda:#" for CUDA devices); None for all of them.
    dim: the batch dimension. Dynamic batching works for 0 only.
    set_dynamic_batching: whether inputs are cut, packed and padded to the compiled rows. When off, a call's inputs are
        cut over the cores and `rows / cores` must equal the compiled rows, if those are known.
    backend: "neuron", "cuda", "cpu", "openvino", "onnx", or an object with the methods of `aneuron.Backend`. "auto" is,
        at start, neuron if this process has NeuronCores, else cuda if it has a device, else cpu; cpu for a plain
        callable; onnx for an ONNX file, openvino for one of OpenVINO's.
    batch_size: rows in one execution, as compiled; every batch is padded to it. None: any number of rows.
    example_inputs: what the model was traced with: a tensor, a tuple of positional or a dict of keyword inputs. It is
        run twice on each core before the model is ready. For a ScriptModule, or with `batch_size`, it also fixes
        shapes and dtypes; to a ScriptModule it gives its `batch_size` if there is none.
    num_workers: batches that may be in flight, on all cores together; None: two a core. Settable at any time.
    split_size: rows of the pieces that a call is cut into; None: up to `batch_size`, or `max(1, rows // cores)` where
        any number will do. Settable at any time.
    max_pending: rows that may wait before calls are refused with `QueueFull`, or their lengths, `Work(positions=n)`;
        None: no bound. A call takes room for its next batch; what large calls have beyond that has as much room again,
        and one larger than this may wait beside. Without room `map` waits. Settable at any time, in the same unit.
    max_delay: seconds that a batch which is not full may be held back for company, from its oldest row on, and only
        while another core works. None: one core's share of the service time, where so many rows come that it pays.
    buckets: the lengths that the model was compiled for, see `Buckets`; calls of any length are padded to the smallest
        that fits, and their outputs cut back.
    exec_timeout: seconds after which an execution is given up and its core counts as hung; None: no bound. The rows run
        once more on another core; the thread that hangs is left to itself.
    min_cores: how many of the cores must load the model to start; None: all. Below it the start fails, with the error
        of the first, and what was loaded is freed; else those that failed stay out, with a warning in the log. `ready`
        asks for as many, or for one where it is None.
    outputs: what is known of outputs, by name, position among the tensors, or path as errors print it: `{"prototypes":
        "whole"}` for what lacks the batch's rows, of which each caller gets a copy; `"rows"` for what has them.
    check_rows: whether it is found out which outputs have a row for each row of the batch, rather than guessed from
        equal numbers: by at most two executions more of other rows, at warm-up from `example_inputs`, else with the
        first calls whose rows differ or can be varied; if the model refuses them shapes decide, and a warning says so.
        It also warns, in the log, of rows that influence one another. False: shapes decide.
    context: a function that makes a context manager, which is entered around each execution, in the thread that
        executes: `lambda: torch.autocast("cpu")`. What it raises is like an error of the model.
    pool: the `Pool` whose cores the model shares with others; excludes `device_ids`, `backend` and `num_workers`, which
        are the pool's. None: a pool of its own.
    weight: its share of the pool's time while others have rows waiting too, beside their weights; above 0.

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
        max_pending: int | Work | None = None,
        max_delay: float | None = 0.0,
        buckets: Buckets | None = None,
        exec_timeout: float | None = None,
        min_cores: int | None = None,
        outputs: Mapping[str | int, str] | None = None,
        check_rows: bool = True,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        pool: Pool | None = None,
        weight: float = 1.0,
    ) -> None:
        given = {name: value for name, value in dict(locals()).items() if name not in ("self", "model")}
        others = frozenset(vars(self))  # what a subclass has set before
        if isinstance(device_ids, Iterable) and not isinstance(device_ids, (str, bytes)):
            device_ids = list(device_ids)
        self._given = given | {"device_ids": device_ids}
        self._pool = pool_of(pool, device_ids, backend, num_workers)
        program = Program(model, count("batch_size", batch_size), dim, buckets, self._pool.loads_scripts)
        self._settings = Settings.of(program, self._given)
        if self._pool.processes is None:
            self._life = Lifecycle(program, self._settings, self._pool)
        else:
            self._life = RemoteLifecycle(program, self._settings, self._pool, self._given)
        self._calls = Calls(self._life, self._settings)
        self._call, self._outstanding = self._calls.call, self._calls.outstanding
        if dim != 0 and set_dynamic_batching and self._asked_for_batching:
            warnings.warn(
                f"dynamic batching cannot be enabled for dim={dim}, only for dim=0; it is off: rows / cores must equal "
                "the compiled rows",
                stacklevel=2,
            )
        self._attributes = frozenset(vars(self)) - others | {"_attributes", "_asked_for_batching"}

    def __reduce__(self) -> tuple[Any, ...]:
        """See the class. Attributes of a subclass go along; a model goes as torch saves such: scripts, programs."""
        settings = self.configuration
        model = settings.pop("model")
        own = {name: value for name, value in vars(self).items() if name not in self._attributes}
        return _configured, (type(self), held(model), settings), own or None

    # Calls.

    def __call__(self, *inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Run the model on the inputs' rows; see the class. To be awaited."""
        return self._call(inputs, kwargs)  # not through a coroutine of its own, which each call would pay for

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run."""
        return await View(self, Options()).timed(*inputs, **kwargs)

    def map(
        self, source: Any, *, ordered: bool = True, limit: int | None = None, return_exceptions: bool = False
    ) -> Map[Any]:
        """Run the model on each element of a source; `Map` says what `async for` and `async with` do with it.

        source: an iterable or async iterable of inputs, each of them one call; `Map` says what they may be.
        limit: elements outstanding; None: as many as keep every core busy if each is one row.

        With `max_pending` elements wait for room, in order, instead of being refused, and give theirs to calls.

            >>> import asyncio, torch, aneuron
            >>> async def main():
            ...     async with aneuron.AsyncDataParallel(torch.nn.ReLU().eval()) as model:
            ...         return [y.item() async for y in model.map(torch.tensor([[n]]) for n in (-1.0, 0.0, 1.0))]
            >>> asyncio.run(main())
            [0.0, 0.0, 1.0]
        """
        return View(self, Options()).map(source, ordered=ordered, limit=limit, return_exceptions=return_exceptions)

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
        self._life.check_loop()
        if self._life.run is not None:
            self._life.run.admission.check(count("rows", rows) or 1)

    def disable_dynamic_batching(self) -> None:
        """Neither pack nor pad the calls made from now on: `rows / cores` must equal the compiled rows, if known.

        Where they are not, and the cores cut batches themselves (`Backend`), call it before the start: cores that are
        loaded go on cutting, and a warning says so.
        """
        run = self._life.run
        if run is not None and self._settings.packing and not run.rules.packing:
            warnings.warn(
                "the cores go on cutting batches, since it is not known how many rows the model was compiled for; call "
                "disable_dynamic_batching() before start(), or pass batch_size=",
                stacklevel=2,
            )
        self._life.change(packing=False)

    @property
    def configuration(self) -> dict[str, Any]:
        """The arguments by name that make another like it: those that it was given, but for what was set and swapped
        since.

        >>> import torch, aneuron
        >>> model = aneuron.AsyncDataParallel(torch.neg, batch_size=8)
        >>> model.max_pending = 64
        >>> [model.configuration[name] for name in ("model", "batch_size", "max_pending")] == [torch.neg, 8, 64]
        True
        """
        now = self._settings
        return self._given | {
            "model": self._life.program.source,
            "set_dynamic_batching": now.packing or (now.dim != 0 and not self._asked_for_batching),
            "split_size": now.split_size,
            "max_pending": now.max_pending,
            "num_workers": None if self._given["pool"] is not None else self._pool.given_num_workers,
        }

    @property
    def batch_size(self) -> int | None:
        """Rows in one execution, the most if there are several sizes, as given or, once started, as found out; None:
        any number.
        """
        return self._life.program.batch_size

    @property
    def pool(self) -> Pool:
        """Whose cores it uses: the one that was given, or its own."""
        return self._pool

    @property
    def weight(self) -> float:
        """Its share of the pool's time, beside the others' weights."""
        return self._settings.weight

    @property
    def num_workers(self) -> int | None:
        """Batches that may be in flight, on all cores of the pool together; None before the start if none was given."""
        return self._pool.num_workers

    @num_workers.setter
    def num_workers(self, value: int) -> None:
        self._pool.num_workers = value

    @property
    def split_size(self) -> int | None:
        """Rows of the pieces that a call is cut into; None: chosen, see the class."""
        return self._settings.split_size

    @split_size.setter
    def split_size(self, value: int | None) -> None:
        self._life.change(split_size=count("split_size", value))

    @property
    def max_pending(self) -> int | Work | None:
        """Rows that may wait, see the class; those that wait already are left alone. None: no bound."""
        return self._settings.max_pending

    @max_pending.setter
    def max_pending(self, value: int | Work | None) -> None:
        self._life.change(max_pending=self._settings.checked_pending(value))

    @property
    def ready(self) -> bool:
        """Whether calls are served: started, warmed up, not closing, with `min_cores` cores that serve (None: one)."""
        return self._life.ready

    @property
    def signature(self) -> Signature:
        """What it takes, by its `example_inputs`, and what it returns, as found out with them when it was started."""
        return self._life.signature()

    def statistics(self) -> Statistics:
        """A frozen snapshot of the counters, cheap enough to be read 100 times a second. They outlive a restart."""
        return self._life.statistics()

    def observe(self, observer: Observer | None) -> None:
        """Tell an observer of the calls made from now on, and of the executions that have their rows; None: nobody.

        Calls through `timed`, `map` and views are calls too. There is one observer; another takes its place.
        `Observer` has an example, `aneuron.web.tracing` makes OpenTelemetry spans. Without one, nothing is noted.
        """
        self._calls.observer = observer

    # Lifecycle.

    async def start(self) -> None:
        """Load the model on every core and warm it up. The first call does it if nobody has.

        Several may wait for one start; when the last of them is cancelled, so is the start, and what was loaded is
        freed. A closed model may be started again, also on another loop. Raises what loading raises.
        """
        await self._life.start()

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
        await self._life.swap(model)

    async def aclose(self) -> None:
        """Refuse new calls, finish the accepted ones, free cores and threads. If cancelled, `abort()` instead.

        A start in progress is cancelled: what a thread is loading then is freed when it is loaded, and not waited for.
        A core that has not closed 30 s after its last call is left to itself, with a warning in the log.
        """
        await self._life.aclose()

    async def abort(self) -> None:
        """Fail the calls that have not begun with `Closed`; what executes is left to finish, and not waited for."""
        self._life.abort()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await (self.aclose() if kind is None else self.abort())

    def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is not None and life.let_go():
            warnings.warn(
                "an AsyncDataParallel was never closed; use `async with`, or await aclose()",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"<AsyncDataParallel {self._life.state}, {self._pool.backend or 'auto'!r}, batch_size={self.batch_size}>"


AsyncDataParallel.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    AsyncDataParallel.__init__
).replace(parameters=list(inspect.signature(AsyncDataParallel.__init__).parameters.values())[1:])


def _configured(kind: type[AsyncDataParallel], model: Model, settings: dict[str, Any]) -> AsyncDataParallel:
    """An instance that is not started, whatever the arguments of a subclass are."""
    made = kind.__new__(kind)
    AsyncDataParallel.__init__(made, released(model), **settings)
    return made


__all__: Sequence[str] = ["AsyncDataParallel"]
