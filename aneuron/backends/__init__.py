"""What finds cores, loads the model on one, and runs it: the protocols, and how a backend and its cores are chosen.

Lives here: `Backend`, `Core`, `Fault`, `device_ids`. Must not be here: asyncio, queues, who runs when.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from aneuron.errors import DeviceError


class Fault(Enum):
    """Whom an exception of `Core.execute` is to be blamed on."""

    INPUT = "input"
    """The rows, or the model: the call gets the exception, the core goes on."""
    CORE = "core"
    """The core: the calls get `CoreFailed`."""
    FATAL = "fatal"
    """The process: no core of it will work again."""


@runtime_checkable
class Core(Protocol):
    """The model, loaded on one core. All its methods are called in worker threads of this core."""

    concurrent: bool
    """False: one thread at a time is in `execute` (the lane sees to it). True: as many as the lane has slots, for a
    core that overlaps copies with computing or has a lock of its own around what cannot overlap."""

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model on one batch and return its output when it is there.

        Tensors come as dense host tensors of the compiled size, and go as host tensors; the output may live in
        memory that the next `execute` on the same thread overwrites (it is copied out before). Gradients are off in
        the calling thread. Release the GIL while the device works. Exceptions go to `Backend.classify`.
        """
        ...

    def close(self) -> None:
        """Free the core. Called once, when no `execute` is running; may block."""
        ...


@runtime_checkable
class Backend(Protocol):
    """What finds cores and loads models on them. One object may serve several models.

    A backend may have an attribute `preferred_rows`: the rows that calls are packed up to where the model takes any
    number (32 where there is none).

    A complete one, for a model that is a plain function::

        class InlineCore:
            concurrent = False

            def __init__(self, model):
                self.model = model

            def execute(self, args, kwargs):
                return self.model(*args, **kwargs)

            def close(self):
                pass

        class InlineBackend:
            name = "inline"
            recoverable = True

            def cores(self):
                return [0, 1]

            def load(self, model, core_id, batch_size):
                return InlineCore(model)

            def classify(self, error):
                return aneuron.Fault.INPUT

    `aneuron.testing.check_backend(InlineBackend())` checks whatever of this can be checked from outside.
    """

    name: str
    """For messages."""
    recoverable: bool
    """Whether loading a core again can mend it."""

    def cores(self) -> Sequence[int]:
        """The ids of the cores that this process sees, zero-based and rising; claims none of them if it can."""
        ...

    def load(self, model: Any, core_id: int, batch_size: int | None) -> Core:
        """Load what the user gave as the model on a core; called once a core, in the order of the ids, blocking, in a
        worker thread. `batch_size` is the number of rows in every `execute`, None if it varies. What it raises ends
        the start; cores that are loaded by then are closed.
        """
        ...

    def classify(self, error: BaseException) -> Fault:
        """Whom to blame for what `Core.execute` raised."""
        ...


def parse_device_ids(device_ids: Iterable[int | str] | None) -> list[int] | None:
    """The core ids that the user wrote as ints or "nc:#", in the user's order. What needs no device is checked here."""
    if device_ids is None:
        return None
    if isinstance(device_ids, (str, bytes)) or not isinstance(device_ids, Iterable):
        raise DeviceError(
            f"device_ids={device_ids!r}: expected a list such as [0, 1] or ['nc:0', 'nc:1'], or None for all"
        )
    ids = [_parse_id(value) for value in device_ids]
    if not ids:
        raise DeviceError("device_ids=[] names no core; name one at least, or pass None for all that this process sees")
    twice = sorted({core for core in ids if ids.count(core) > 1})
    if twice:
        raise DeviceError(f"device_ids={ids} names {twice} more than once; each core is loaded once")
    return ids


def _parse_id(value: Any) -> int:
    match = re.fullmatch(r"nc:(\d+)", value, re.ASCII) if isinstance(value, str) else None
    try:
        core = int(match[1]) if match else operator.index(value)
    except (TypeError, ValueError):
        core = -1
    if core < 0 or isinstance(value, bool):
        raise DeviceError(f"device id {value!r}: expected an int from 0 or 'nc:#' such as 'nc:0'") from None
    return core


def choose_cores(backend: Backend, ids: list[int] | None) -> list[int]:
    """The cores to load on: those asked for, or all. Raises `DeviceError` for one that this process does not see."""
    seen = list(backend.cores())
    if not seen:
        raise DeviceError(f"the {backend.name} backend sees no cores in this process")
    missing = [core for core in ids or () if core not in seen]
    if missing:
        raise DeviceError(
            f"device ids {missing} are outside the cores that this process sees: {len(seen)} of the {backend.name} "
            f"backend, ids {seen[0]} to {seen[-1]}. Ids count from zero within the process, whatever the machine's own "
            "numbers of the cores are"
        )
    return seen if ids is None else ids


def choose_backend(backend: str | Backend) -> Backend:
    """The backend that `backend=` means."""
    from aneuron.backends.cpu import CpuBackend

    if backend in ("auto", "cpu"):
        return CpuBackend()
    if isinstance(backend, (str, type)) or not isinstance(backend, Backend):
        raise ValueError(
            f"backend={backend!r}: expected 'auto', 'cpu', or an object with the methods of aneuron.Backend"
        )
    return backend
