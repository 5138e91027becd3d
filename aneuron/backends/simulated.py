"""Cores that do not exist: right answers, and the timing and faults that one asks for.

Lives here: how a simulated device spends its time. Must not be here: who runs when.
"""

import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aneuron.backends import Fault
from aneuron.backends.copies import own
from aneuron.backends.cpu import open_model
from aneuron.tensors.nested import walk

_KINDS = ("input", "core", "fatal", "hang", "slow")


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
    ) -> None:
        if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
            raise ValueError(f"cores={cores!r}: expected an int of at least 1")
        times = {"service_time": service_time, "per_row": per_row, "copy_time": copy_time, "load_time": load_time}
        for name, value in times.items():
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}: expected seconds, 0 or more")
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
        return SimulatedCore(self, open_model(model), core_id, batch_size, chance)

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
        self._model: Any = own(model)
        self._core_id = core_id
        self._batch_size = batch_size
        self._device = threading.Lock()
        self._free = 0.0  # when the device will have done all that it was given
        self._executions = 0
        self._random = chance

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer after the time that a device would take."""
        backend = self._backend
        if backend.copy_time:
            time.sleep(backend.copy_time)
        rows = _rows(args, kwargs)
        if self._batch_size is not None and rows != self._batch_size:
            raise ValueError(f"a batch of {rows} rows, on a core compiled for {self._batch_size}")
        with self._device:
            begin = max(self._free, time.monotonic())
            extra = sum([self._strike(fault) for fault in backend.faults]) if backend.faults else 0.0
            output = self._model(*args, **kwargs)
            self._executions += 1
            end = begin + backend.service_time + backend.per_row * rows + extra
            self._free = end = max(end, time.monotonic())
        if (rest := end - time.monotonic()) > 0:
            time.sleep(rest)
        return output

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


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first dimension of the first tensor."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].shape[0]
    leaves: list[Any] = []
    walk((args, kwargs), leaves, [], [])
    return int(leaves[0].shape[0])
