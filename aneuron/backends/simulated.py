"""Cores that do not exist: right answers, and the timing and faults that one asks for.

Lives here: how a simulated device spends its time. Must not be here: who runs when.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from aneuron.backends import Done, Fault
from aneuron.backends.copies import own
from aneuron.backends.cpu import inputs_taken, open_model
from aneuron.backends.exported import Inputs, explained
from aneuron.backends.timer import INFINITY, Length, Timer
from aneuron.tensors.nested import Sealed, fill, walk

_KINDS = ("input", "core", "fatal", "hang", "slow")
_timer = Timer("aneuron-simulated")  # of all simulated cores of the process


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One line of a plan of faults: what goes wrong, on which core (None: any), and when.

    At the core's `execution`-th one (from 0; the two of the warm-up count), each time with `probability`, or always
    where neither is given. `seconds` is what "hang" (None: 3600) and "slow" (None: 1) add.
    """

    kind: str
    core: int | None = None
    execution: int | None = None
    probability: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(_KINDS)}")
        if self.probability is not None and not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability={self.probability!r}: expected a number from 0 to 1")
        if self.seconds is None:
            object.__setattr__(self, "seconds", 3600.0 if self.kind == "hang" else 1.0)


class SimulatedFault(RuntimeError):
    """What a simulated core raises when the plan says so."""

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class SimulatedBackend:
    """Runs the given model for its answer and takes `service_time + per_row * rows` seconds for it, without the GIL.

    One batch at a time runs on a core; another may wait in the device's queue, as on a NeuronCore, and begins when the
    first has ended. `copy_time` seconds pass before the run, for the copies; they overlap with the run of another
    batch. `load_time` is the time of one load. A batch that is not of the compiled size is refused like on a real
    device. `faults` is a plan: `SimulatedBackend.fault("core", core=1, execution=3)`,
    `SimulatedBackend.fault("input", probability=0.01)`; kinds are "input", "core", "fatal" (the exception is
    classified so), "hang" and "slow" (`seconds` longer). `seed` makes probabilities repeatable; a core that is loaded
    again draws on from where it was.

    Cores that take time offer `submit`: one thread of the process says of all of them when they are done, and computes
    their models when they are due (a model that takes long, or blocks, does so in another thread beside it). With
    `submits=False` a thread sleeps in each execution instead. With `inline=True`, and no time, cores may be executed on
    the event loop itself: for models that take microseconds.

    For tests, benchmarks, and planning for machines that one does not have: 24 cores of an inf2.48xlarge are
    `SimulatedBackend(cores=24, service_time=...)`.

        >>> backend = SimulatedBackend(cores=2, service_time=0.001, faults=[SimulatedBackend.fault("core", core=0)])
        >>> list(backend.cores())
        [0, 1]
    """

    name = "simulated"
    recoverable = True
    loads_scripts = True
    fault = PlannedFault

    def __init__(
        self,
        cores: int = 4,
        service_time: float = 0.005,
        per_row: float = 0.0,
        copy_time: float = 0.0,
        load_time: float = 0.0,
        faults: Iterable[PlannedFault] = (),
        seed: int = 0,
        submits: bool = True,
        inline: bool = False,
    ) -> None:
        if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
            raise ValueError(f"cores={cores!r}: expected an int of at least 1")
        times = {"service_time": service_time, "per_row": per_row, "copy_time": copy_time, "load_time": load_time}
        for name, value in times.items():
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}: expected seconds, 0 or more")
        for name, choice in (("submits", submits), ("inline", inline)):
            if not isinstance(choice, bool):
                raise ValueError(f"{name}={choice!r}: expected True or False")
        if inline and service_time + per_row + copy_time > 0:
            raise ValueError(
                f"inline=True with service_time={service_time!r}, per_row={per_row!r}, copy_time={copy_time!r}: the "
                "event loop would sleep that long; expected 0 for each"
            )
        self.submits, self.inline = submits, inline
        self._cores = cores
        self.service_time, self.per_row, self.copy_time, self.load_time = service_time, per_row, copy_time, load_time
        self.faults = tuple(faults)
        self._seed = seed
        self._random: dict[int, random.Random] = {}  # by core

    def cores(self) -> Sequence[int]:
        """As many as were asked for."""
        return range(self._cores)

    def report(self) -> dict[str, object]:
        """What there is, why, and what is missing."""
        why = "timing and faults as asked for, anywhere; for tests and planning"
        return {"found": True, "cores": self._cores, "why": why, "lacks": []}

    def load(self, model: Any, core_id: int, batch_size: int | None) -> "SimulatedCore":
        """Takes `load_time`."""
        if self.load_time:
            time.sleep(self.load_time)
        chance = self._random.setdefault(core_id, random.Random(f"{self._seed}/{core_id}"))
        takes_time = self.copy_time + self.service_time + self.per_row > 0
        kind = SubmittingSimulatedCore if takes_time and self.submits else SimulatedCore
        return kind(self, open_model(model), core_id, batch_size, chance)

    def inputs_of(self, model: Any) -> Inputs | None:
        """What an exported program takes."""
        return inputs_taken(model)

    def classify(self, error: BaseException) -> Fault:
        """What the plan said; anything else is the model's."""
        return error.fault if isinstance(error, SimulatedFault) else Fault.INPUT


class SimulatedCore:
    """One simulated core."""

    def __init__(
        self, backend: SimulatedBackend, model: Any, core_id: int, batch_size: int | None, chance: random.Random
    ) -> None:
        self.concurrent = backend.copy_time + backend.service_time + backend.per_row > 0  # else there is no queue
        self._backend = backend
        self._given = model  # of a file: what the next core is to share
        self._model: Any = explained(own(model), model)
        self._core_id = core_id
        self._batch_size = batch_size
        self._device = threading.Lock()
        self._free = 0.0  # when the device will have done all that it was given
        self._executions = 0
        self._took: deque[float] = deque(maxlen=8)  # seconds that the model has computed, and waited for the GIL
        self._length = Length()
        self._random = chance

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer after the time that a device would take."""
        if self._backend.copy_time:
            time.sleep(self._backend.copy_time)
        rows = self._check(args, kwargs)
        with self._device:
            begin = max(self._free, time.monotonic())
            seconds = self._seconds(rows)
            output = self._answer(args, kwargs)
            self._free = end = max(begin + seconds, time.monotonic())
        if (rest := end - time.monotonic()) > 0:
            time.sleep(rest)
        return output

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output; copied, as from a device, where another batch may be in flight by the time it is used."""
        begin, computed = time.monotonic(), time.thread_time()
        output = self._model(*args, **kwargs)
        output = _copied(output) if self.concurrent else output
        self._took.append(took := time.monotonic() - begin)
        self._length.add(took, time.thread_time() - computed)
        return output

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The rows of a batch, if they are as many as the core is compiled for."""
        rows = _rows(args, kwargs)
        if self._batch_size is not None and rows != self._batch_size:
            raise ValueError(f"a batch of {rows} rows, on a core compiled for {self._batch_size}")
        return rows

    def _seconds(self, rows: int) -> float:
        """How long the device runs now, the faults of the plan with it; raises those that are to be raised."""
        faults = self._backend.faults
        extra = sum([self._strike(fault) for fault in faults]) if faults else 0.0
        self._executions += 1
        return self._backend.service_time + self._backend.per_row * rows + extra

    def _strike(self, fault: PlannedFault) -> float:
        """Seconds that a fault adds, if it strikes now; raises where its kind is to raise."""
        if fault.core not in (None, self._core_id):
            return 0.0
        probability = fault.probability if fault.probability is not None else float(fault.execution is None)
        if self._executions != fault.execution and self._random.random() >= probability:
            return 0.0
        if fault.kind in ("hang", "slow"):
            return fault.seconds or 0.0
        self._executions += 1
        raise SimulatedFault(f"simulated {fault.kind} fault on core {self._core_id}", Fault(fault.kind))

    def close(self) -> None:
        """Let the model go."""
        self._model = self._given = None


@dataclass(slots=True)
class _Run:
    """A batch in the queue of a device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: Done
    ready: float  # when its inputs have been copied
    seconds: float
    begin: float = 0.0
    end: float = 0.0
    outcome: tuple[Any, BaseException | None] = (None, None)


class SubmittingSimulatedCore(SimulatedCore):
    """One whose end a timer tells: no thread sleeps in it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._context = copy_context()  # that of the load: what the model sees
        self._lock = threading.Lock()
        self._queue: deque[_Run] = deque()  # the first of them is running

    def submit(self, args: tuple[Any, ...], kwargs: dict[str, Any], done: Done) -> None:
        """Queue a batch on the device. Its answer is computed when it is due, in the timer's thread."""
        rows = self._check(args, kwargs)
        ready = time.monotonic() + self._backend.copy_time
        with self._lock:
            try:
                run = _Run(args, kwargs, done, ready, self._seconds(rows))
            except SimulatedFault as error:
                _timer.at(ready, partial(done, None, error), self)
                return
            if not self._queue:
                self._start(run)
            self._queue.append(run)

    def _start(self, run: _Run) -> None:
        """The device is free: it begins with a batch, or will when that has been copied.

        A model that takes its time computes from the beginning, beside others; one that was not seen yet might. Others
        do so just in time: nobody has to be woken for it.
        """
        run.begin = max(self._free, run.ready)
        self._free = run.end = run.begin + run.seconds
        takes, long = min(self._took, default=INFINITY), self._length.notable
        _timer.at(run.begin if long else max(run.begin, run.end - takes), partial(self._compute, run), self, long)

    def _compute(self, run: _Run) -> None:
        begin = time.monotonic()
        try:
            with self._device:
                run.outcome = self._context.copy().run(self._answer, run.args, run.kwargs), None
        except BaseException as error:
            run.outcome = None, error
        now = time.monotonic()
        run.end = max(run.end, run.begin + now - begin)
        if now < run.end and self._model is not None:  # else the core has been closed, and nobody waits
            _timer.at(run.end, partial(self._end, run), self)
        else:
            self._end(run)

    def _end(self, run: _Run) -> None:
        """A batch is done: the device goes on with the next."""
        with self._lock:
            self._free = max(self._free, run.end)
            if self._queue and self._queue[0] is run:  # else the core has been closed
                self._queue.popleft()
                if self._queue:
                    self._start(self._queue[0])
        outcome, run.outcome = run.outcome, (None, None)  # an error's traceback holds a frame, and that the run
        run.done(*outcome)

    def close(self) -> None:
        """Let the model go; what is still in the queue was given up."""
        with self._lock:
            self._queue.clear()
        _timer.drop(self)
        super().close()


def _copied(output: Any) -> Any:
    """An output in memory of its own; as it is, if it cannot be taken apart: whoever cuts it will say so."""
    if type(output) is torch.Tensor:
        return output.clone()
    leaves: list[Any] = []
    try:
        walk(output, leaves, [], [])
        copies = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy() for leaf in leaves]
        return fill(output, iter(copies))
    except Sealed:
        return output


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first dimension of the first tensor."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].shape[0]
    leaves: list[Any] = []
    walk((args, kwargs), leaves, [], [])
    return int(leaves[0].shape[0])
