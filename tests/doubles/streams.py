"""The native device's time: one queue of launches for each core, and `torch.neuron`, the module around them.

A launch is computed on the CPU at once, but it ends when the device would have ended it: until then a non-blocking copy
to the host has not arrived, and a fault has not been noticed. Must not be here: tensors (device.py).
"""

import contextlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from doubles.hardware import Execution, machine

# Its errors have no number of the status but for those that it has no words for.
WORDS = {
    1: "Non-specific failure",
    2: "Invalid NEFF, instruction, or input",
    3: "Invalid handle",
    4: "Failed to allocate resource",
    5: "Operation timed out",
    6: "Hardware failure",
    7: "Execution input queue full",
    9: "Not enough NCs for loading NEFF",
    10: "Unsupported NEFF version",
    11: "Failed to allocate host memory",
    13: "NRT not initialized",
    14: "NRT already closed",
    15: "Accessed an empty Queue",
    1002: "Invalid input to exec()",
    1003: "Execution completed with numerical errors (NaN)",
    1004: "Execution completed with errors",
    1005: "Neuron core busy/locked by another model/process",
    1006: "one or more indirect memcopies and/or embedding updates are out of bound",
    1100: "Collective operation pending",
    1200: "Stuck in collectives op (missing notification(s)). Possibly caused by a hardware error on another worker",
    1201: "An HBM encountered an unrepairable uncorrectable error and produced incorrect results",
    1202: "An on-chip memory of Neuron Core encountered a parity error and produced incorrect results.",
    1203: "A DMA engine encountered an unrecoverable error",
    1204: "Software notification queue overflow",
    1205: "HBM repairable uncorrectable error",
    1206: "EFA network proxy failure",
}


def execution_error(operation: str, status: int) -> RuntimeError:
    """What the failure of a launch looks like; the stack trace is empty unless it is asked for."""
    words = WORDS.get(status, f"Unknown status (status: {status})")
    return RuntimeError(
        f"NRT Execution error occurred on Neuron for operation={operation}\n"
        f'error message="NRT EXECUTION FAILED: Async execution error: seq_id=7, {words}"\npython stack trace=\n'
    )


def falls_back(operation: str) -> bool:
    """Whether what fails on the device runs on the CPU: never a compiled graph, unless that is asked for."""
    if operation == "graph":
        return os.environ.get("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION", "1") == "0"
    return os.environ.get("TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS") != "1"


class Queue:
    """The launches of one core, in order."""

    def __init__(self, local: int) -> None:
        self.local = local
        self.launched = 0  # launches so far: what an event remembers
        self._ended = 0
        self.until = 0.0  # when the last launch ends
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._lock = threading.Lock()  # around the members
        self._ending = threading.Lock()  # around the end of launches, which may block
        self._error: RuntimeError | None = None

    def launch(self, operation: str, rows: int) -> None:
        core = machine.core(self.local)
        machine.executions.append(Execution(core.id, self.local, rows))
        self._put(machine.config.service_time, lambda: self._end(operation))
        if os.environ.get("NEURON_LAUNCH_BLOCKING") == "1" or os.environ.get("TORCH_NEURONX_ENABLE_ASYNC_NRT") == "0":
            self.synchronize()

    def deliver(self, copy: Callable[[], None]) -> None:
        """A copy to the host that nobody waits for yet."""
        self._put(machine.config.copy_time, copy)

    def _put(self, seconds: float, end: Callable[[], None]) -> None:
        with self._lock:
            self.until = max(self.until, time.monotonic()) + seconds
            self._waiting.append((self.until, end))
            self.launched += 1

    def _end(self, operation: str) -> None:
        core = machine.core(self.local)
        try:
            core.strike()
        except RuntimeError as error:
            if not core.poison and falls_back(operation):
                machine.fallbacks += 1
            else:
                (status,) = re.findall(r"status=(\d+)", str(error))
                self._error = self._error or execution_error(operation, int(status))

    def synchronize(self, mark: int | None = None) -> None:
        """Wait until the first `mark` launches have ended, without the GIL. Raises what went wrong since the last."""
        mark = self.launched if mark is None else mark
        while self._ended < mark:
            with self._ending:  # for one launch, so that who waits for an earlier one gets on before who waits for more
                if self._ended < mark:
                    at, end = self._waiting[0]
                    time.sleep(max(0.0, at - time.monotonic()))
                    end()
                    with self._lock:
                        self._waiting.popleft()
                        self._ended += 1
        with self._lock:
            error, self._error = self._error, None
        if error:
            raise error

    def query(self, mark: int | None = None) -> bool:
        """Whether they have ended. Never blocks, but for a fault that does."""
        mark = self.launched if mark is None else mark
        with self._lock:
            ended = mark <= self._ended or list(self._waiting)[mark - self._ended - 1][0] <= time.monotonic()
        if ended:
            self.synchronize(mark)
        return ended


class Api:
    """`torch.neuron`, and what torch asks of a device module."""

    def __init__(self) -> None:
        self.reset(installed=False)

    def reset(self, installed: bool) -> None:
        self._installed = installed
        self._queues: dict[int, Queue] = {}
        self._default = 0
        self._thread = threading.local()

    def queue(self, device: Any = None) -> Queue:
        """The queue of a device: the one and only stream, whatever `Stream` objects there are."""
        index = self.index(device)
        return self._queues.setdefault(index, Queue(index))

    def index(self, device: Any = None) -> int:
        if isinstance(device, str):
            device = torch.device(device)
        index = device.index if isinstance(device, torch.device) else device
        index = self.current_device() if index is None else index
        self.init()
        if not 0 <= index < self.device_count():
            raise ValueError(f"Invalid device id: {index}. Valid range is 0 to {self.device_count() - 1}")
        return int(index)

    def init(self) -> None:
        if not self._installed:
            raise RuntimeError("PyTorch is not linked with support for neuron devices")
        try:
            machine.start()
        except RuntimeError as error:
            if "NRT_STATE_CHILD" not in str(error):
                raise
            raise RuntimeError(
                "Cannot re-initialize Neuron runtime in forked subprocess. "
                "To use Neuron with multiprocessing, use the 'spawn' start method"
            ) from error

    def device_count(self) -> int:
        try:
            return machine.count()
        except RuntimeError:
            return 0

    def is_available(self) -> bool:
        return self._installed and self.device_count() > 0

    def is_initialized(self) -> bool:
        return machine.visible is not None

    def current_device(self) -> int:
        return int(getattr(self._thread, "device", self._default))

    def set_device(self, device: Any) -> None:
        """Of this thread."""
        self._thread.device = self.index(device)

    def synchronize(self, device: Any = None) -> None:
        self.queue(device).synchronize()

    def get_device_name(self, device: Any = 0) -> str:
        return str(device) if isinstance(device, torch.device) else f"neuron:{device}"

    def memory_allocated(self, device: Any = None) -> int:
        return machine.core(self.index(device)).used

    def empty_cache(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # the double computes on the CPU

    manual_seed_all = manual_seed

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_stream(self, device: Any = None) -> "Stream":
        return Stream(device)

    default_stream = current_stream

    def set_stream(self, stream: "Stream") -> None:
        pass  # there is one for each device

    @contextlib.contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        yield

    @property
    def Stream(self) -> "type[Stream]":
        return Stream

    @property
    def Event(self) -> "type[Event]":
        return Event


class Stream:
    """Each is the default stream of its device."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self._queue = api.queue(device)

    def query(self) -> bool:
        return self._queue.query()

    def synchronize(self) -> None:
        self._queue.synchronize()

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.synchronize()  # stricter than the real one, which does not wait on the host

    def wait_stream(self, stream: "Stream") -> None:
        stream.synchronize()


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._queue: Queue | None = None
        self._mark, self._at = 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._queue = (stream or api.current_stream())._queue
        self._mark, self._at = self._queue.launched, self._queue.until

    def query(self) -> bool:
        return self._queue is None or self._queue.query(self._mark)

    def synchronize(self) -> None:
        if self._queue is not None:
            self._queue.synchronize(self._mark)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of the device's time."""
        return (end._at - self._at) * 1000


api = Api()
