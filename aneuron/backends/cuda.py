"""NVIDIA GPUs, through PyTorch's CUDA.

Lives here: a model's copy on a device, the way of a batch there and back, which errors of CUDA are whose. Must not be
here: who runs when.
"""

import copy
import hashlib
import io
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from aneuron.backends import Done, Fault
from aneuron.backends.copies import own_dtype
from aneuron.backends.cpu import inputs_taken, open_model
from aneuron.backends.exported import Inputs, check_movable, explained, load_program, module_on
from aneuron.backends.exported import is_program as is_exported
from aneuron.backends.files import is_program
from aneuron.backends.precision import Precision, arguments_of, cast, precision_of
from aneuron.backends.timer import Length, Timer
from aneuron.backends.torchscript import load_script
from aneuron.backends.unwarned import unwarned
from aneuron.errors import DeviceError
from aneuron.tensors.nested import mapped

# Codes of cudaError_t, and what CUDA says of them; PyTorch before 2.8 gives the text only. Of these CUDA's manual says
# that all further work in the process returns the same error, and that the process must be terminated.
_FATAL = {
    4: "driver shutting down",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
}
_CORE = {
    46: "busy or unavailable",  # another process has it for itself
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error",
    999: "unknown error",
}


class CudaBackend:
    """Runs the model on CUDA devices, the weights on each of them once, if the model can be saved.

    `cores_per_device`: cores made of one device, each with a queue and threads of its own: core `i` is on device
    `i // cores_per_device`, as PyTorch numbers those that `CUDA_VISIBLE_DEVICES` leaves it. `staging_bytes`: how many
    bytes of a batch's inputs and outputs together may go by pinned memory, for each batch in flight; a tensor that does
    not fit any more goes by an ordinary copy. (PyTorch keeps pinned memory for the next batch, in blocks rounded up to
    powers of two.)

    A module is copied to the device as it is when it is loaded, and left alone itself. Cores of one device share a copy
    while the module is the same in all that `torch.save` would save; one that it cannot save (for a lambda in it, say)
    is copied for each core, and each length of `buckets`. A ScriptModule is saved and loaded there, with the constants
    that `torch.jit.trace` has put into it. (A graph that makes tensors on a device of its own must have been traced on
    a GPU.) An exported program is brought there by PyTorch's pass for that (`move_to_device_pass`, from 2.7 on),
    constants and devices in its graph included. Any other callable is called with tensors on the device, which is the
    current one, and must have its weights there itself. The model runs under `torch.inference_mode()`, on a stream for
    each batch in flight; several may run at once, so its `forward` must not write to itself.

    Cores offer `submit`: one thread for each device launches what batches need, another one asks for all devices
    whether it is done. A `forward` that takes a while, or waits for the device (`.item()`, say), runs in a thread
    beside it. With `submits=False` a thread launches and waits for each batch in flight.

    `dtype` (`torch.float16` or `torch.bfloat16`, mostly), `outputs` and `min_cosine` are as for `CpuBackend`. Modules
    are cast before they are copied to the device, inputs there; a callable has its weights itself, in `dtype`. While
    the model is compared with full precision, both are on the device.

    `torch.OutOfMemoryError` counts as an input's fault: the batch runs again in halves. After an error that ends CUDA
    for the process, a device-side assert for one, every call fails with `CoreFailed`: restart the process.
    Raises `DeviceError` in a process that was forked from one that had begun to use CUDA.

        >>> import torch
        >>> backend = CudaBackend(cores_per_device=2, staging_bytes=1 << 24)
        >>> len(backend.cores()) == 2 * torch.cuda.device_count()
        True
    """

    name = "cuda"
    recoverable = True
    loads_scripts = True

    def __init__(
        self,
        cores_per_device: int = 1,
        staging_bytes: int = 1 << 26,
        submits: bool = True,
        *,
        dtype: torch.dtype | None = None,
        outputs: Literal["as called", "as computed"] = "as called",
        min_cosine: float | None = None,
    ) -> None:
        for name, value, least in (("cores_per_device", cores_per_device, 1), ("staging_bytes", staging_bytes, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an int of at least {least}")
        if not isinstance(submits, bool):
            raise ValueError(f"submits={submits!r}: expected True or False")
        self.cores_per_device = cores_per_device
        self.staging_bytes = staging_bytes
        self.submits = submits
        self.computes_in = precision_of(dtype, outputs, min_cosine)
        self._slots = _Slots(staging_bytes)

    def __reduce__(self) -> tuple[Any, ...]:  # pinned memory stays with its process
        given = (self.cores_per_device, self.staging_bytes, self.submits)
        return partial(type(self), **arguments_of(self.computes_in)), given

    def __repr__(self) -> str:
        more = "" if self.submits else ", submits=False"
        more += "".join(f", {name}={value!r}" for name, value in arguments_of(self.computes_in).items())
        return f"CudaBackend(cores_per_device={self.cores_per_device}, staging_bytes={self.staging_bytes}{more})"

    def cores(self) -> Sequence[int]:
        """So many of every device that PyTorch sees; touches none of them."""
        return range(torch.cuda.device_count() * self.cores_per_device)

    def report(self) -> dict[str, object]:
        """What there is, why, and what is missing; touches no device."""
        devices = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        lacks = []
        if devices:
            why = f"{devices} device{'s' * (devices != 1)}, PyTorch {torch.__version__}"
        elif torch.version.cuda is None:
            why = f"PyTorch {torch.__version__} is built without CUDA"
            lacks.append("a PyTorch with CUDA: https://pytorch.org/get-started/locally/")
        else:
            why = f"PyTorch {torch.__version__} finds no device"
            lacks.append("a visible NVIDIA GPU and its driver: see what nvidia-smi says")
        if visible is not None:
            why += f", CUDA_VISIBLE_DEVICES={visible!r}"
        return {"found": devices > 0, "cores": len(self.cores()), "why": why, "lacks": lacks}

    def load(self, model: Any, core_id: int, batch_size: int | None) -> "CudaCore":
        """Copy the model to the core's device, unless another core has it there."""
        if torch.cuda._is_in_bad_fork():
            raise DeviceError(_FORKED)
        device = torch.device("cuda", core_id // self.cores_per_device)
        return (SubmittingCudaCore if self.submits else CudaCore)(model, device, self._slots, self.computes_in)

    def inputs_of(self, model: Any) -> Inputs | None:
        """What an exported program takes."""
        return inputs_taken(model)

    def classify(self, error: BaseException) -> Fault:
        """By the code of CUDA's error, or by its text.

        Whatever CUDA does not name as its own error is the input's: the device has been waited for since, and would
        have said so. That goes for the states of its libraries, too (CUBLAS_STATUS_ALLOC_FAILED).
        """
        text = str(error)
        if "CUDA error" in text:  # also inside what TorchScript makes of it
            code = getattr(error, "error_code", None)
            for table, fault in ((_FATAL, Fault.FATAL), (_CORE, Fault.CORE)):
                if code in table or any(known in text for known in table.values()):
                    return fault
        return Fault.FATAL if isinstance(error, DeviceError) or "in forked subprocess" in text else Fault.INPUT


class CudaCore:
    """A model on a device."""

    concurrent = True

    def __init__(self, model: Any, device: torch.device, slots: "_Slots", precision: Precision | None = None) -> None:
        with torch.cuda.device(device):
            self._copy: _Copy | None = _copy_to(device, model, None if precision is None else precision.dtype)
            torch.cuda.current_stream(device).synchronize()  # those that will run it are other ones
        self._given = model if precision is not None else None  # to be compared with
        self._precision = precision
        self._device = device
        self._slots = slots
        self._process = os.getpid()
        self._length = Length()  # of launches

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy the batch to the device, run the model, copy its output back, all on one stream.

        The thread sleeps until all of it is done: also after an error, when a copy may still be reading.
        """
        slot = self._slot()
        # The device first: the stream alone would leave by way of device 0, and make a context there.
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(slot.stream):
            try:
                return self._launch(slot, args, kwargs)
            finally:
                slot.wait()
                self._slots.give(slot)

    def _slot(self) -> "_Slot":
        if os.getpid() != self._process:
            raise DeviceError(_FORKED)
        return self._slots.take(self._device)

    def _launch(self, slot: "_Slot", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin with all that a batch needs, on the slot's stream, which is the current one."""
        assert self._copy is not None
        begin, computed = time.monotonic(), time.thread_time()
        slot.begin()
        args, kwargs = mapped((args, kwargs), slot.to_device)
        if self._precision is None:
            output = self._copy.module(*args, **kwargs)
        else:
            output = self._precision.call(self._copy.module, self._copy.own_dtype, args, kwargs)
        output = mapped(output, slot.to_host)
        self._length.add(time.monotonic() - begin, time.thread_time() - computed)
        return output

    def full(self) -> "CudaCore":
        """The same in the model's own dtype, on the device beside it."""
        return CudaCore(self._given, self._device, self._slots)

    def close(self) -> None:
        """Let the weights go."""
        self._copy = self._given = None


@dataclass(slots=True)
class _Flight:
    """A submission on its way."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: Done
    slot: "_Slot | None" = None
    begin: float = 0.0
    output: Any = None
    error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """What the device says goes before what the host has made of it."""
        if self.error is not None:
            error.__context__ = self.error
        self.output, self.error = None, error

    def end(self) -> None:
        """Say that it is done."""
        output, error = self.output, self.error
        self.output = self.error = None  # an error's traceback holds a frame, and that this
        self.done(output, error)


class SubmittingCudaCore(CudaCore):
    """One that nobody waits in: a thread launches for all cores of a device, another asks for all whether it is done.

    The model's own Python may take milliseconds, and wait for the device: the event loop does not run it.
    """

    def __init__(self, model: Any, device: torch.device, slots: "_Slots", precision: Precision | None = None) -> None:
        super().__init__(model, device, slots, precision)
        self._context = copy_context()  # that of the load: what the model sees
        self._launcher = _launchers.setdefault(device, Timer(f"aneuron-{device}"))
        self._took: deque[float] = deque(maxlen=8)  # seconds, from the launch to the end

    def submit(self, args: tuple[Any, ...], kwargs: dict[str, Any], done: Done) -> None:
        """Hand a batch to the thread that launches. CUDA is not touched here."""
        if os.getpid() != self._process:
            raise DeviceError(_FORKED)
        flight = _Flight(args, kwargs, done)
        self._launcher.at(time.monotonic(), partial(self._begin, flight), self, self._length.notable)

    def _begin(self, flight: _Flight) -> None:
        flight.begin = time.monotonic()
        try:
            flight.slot = slot = self._slot()
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(slot.stream):
                try:
                    flight.output = self._context.copy().run(self._launch, slot, flight.args, flight.kwargs)
                except BaseException as error:
                    flight.fail(error)
                slot.record()  # also after an error: a copy may still be reading
            flight.args, flight.kwargs = (), {}
            soonest = flight.begin + 0.9 * min(self._took, default=0.0)
            _events.at(soonest, partial(self._look, flight), self)
        except BaseException as error:  # CUDA's own: the device answers no more, or there is no thread to ask it
            flight.fail(error)
            flight.end()

    def _look(self, flight: _Flight) -> None:
        """Whether the device has done all of it; if not, look again, soon where it has not been long."""
        if self._copy is None or flight.slot is None:  # closed: nobody waits
            return
        now = time.monotonic()
        try:
            over = flight.slot.is_over()
        except BaseException as error:
            flight.fail(error)
        else:
            if not over:
                pause = min(max((now - flight.begin) / 16, 5e-5), 5e-4)
                _events.at(now + pause, partial(self._look, flight), self)
                return
            self._took.append(now - flight.begin)
            self._slots.give(flight.slot)
        flight.end()

    def close(self) -> None:
        """Let the weights go; what is still in flight was given up."""
        self._launcher.drop(self)
        _events.drop(self)
        super().close()


_launchers: dict[torch.device, Timer] = {}  # by device
_events = Timer("aneuron-cuda-events")  # asks for all devices


class _Slot:
    """What a batch in flight has on a device: a stream, an event to wait for, and leave to pin so many bytes.

    Tensors live and die on the one stream, which PyTorch's allocator of device memory counts on; that of pinned memory
    waits for the copies that use it, whoever drops it first.
    """

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.device = device
        # Without `blocking` the thread would wait by spinning.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._staging_bytes = self._room = staging_bytes

    def begin(self) -> None:
        """Nothing is pinned yet."""
        self._room = self._staging_bytes

    def record(self) -> None:
        """What the device was given so far is to be waited for."""
        self._done.record(self.stream)

    def wait(self) -> None:
        """Sleep until the device has done all that it was given."""
        self.record()
        self._done.synchronize()

    def is_over(self) -> bool:
        """Whether the device has done what it had been given when it was recorded; raises what went wrong there."""
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def to_device(self, leaf: torch.Tensor) -> torch.Tensor:
        """Begin to copy an input."""
        if self._fits(leaf):
            leaf = leaf.pin_memory()
        return leaf.to(self.device, non_blocking=True)  # one that is not pinned has been read when this returns

    def to_host(self, leaf: torch.Tensor) -> torch.Tensor:
        """Begin to copy an output; it is there after `wait`."""
        if not leaf.is_cuda:
            return leaf
        if leaf.device != self.device or leaf.layout is not torch.strided or leaf.is_nested or not self._fits(leaf):
            self.wait()
            return leaf.cpu()
        # What is left to do on the host after a copy would be done before its end: see that there is nothing.
        host = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu", pin_memory=True)
        return host.copy_(leaf.resolve_conj().resolve_neg(), non_blocking=True)

    def _fits(self, leaf: torch.Tensor) -> bool:
        """Take room for a tensor, if there is enough."""
        if leaf.nbytes > self._room:
            return False
        self._room -= leaf.nbytes
        return True


class _Slots:
    """The slots of all devices that no batch is using: the last one that was given back goes first."""

    def __init__(self, staging_bytes: int) -> None:
        self._staging_bytes = staging_bytes
        self._free: dict[torch.device, list[_Slot]] = {}

    def take(self, device: torch.device) -> _Slot:
        try:
            return self._free[device].pop()
        except LookupError:
            return _Slot(device, self._staging_bytes)

    def give(self, slot: _Slot) -> None:
        self._free.setdefault(slot.device, []).append(slot)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Copy:
    """A model on a device."""

    module: Any
    own_dtype: torch.dtype = torch.float32  # before it was cast


_lock = threading.Lock()  # around the copies
_copies: "weakref.WeakValueDictionary[tuple[object, ...], _Copy]" = weakref.WeakValueDictionary()


def _copy_to(device: torch.device, model: Any, dtype: torch.dtype | None) -> _Copy:
    """A model on a device: the copy that is there already, if it was made of what the model now is."""
    if dtype is not None and isinstance(model, (str, os.PathLike)) and is_program(model):
        model = load_program(model)  # to be cast before it is brought there: as a module it cannot be copied whole
    if not isinstance(model, torch.nn.Module) and not is_exported(model):
        opened = open_model(model, device)
        if dtype is None or opened is model:  # a callable, which has its weights itself
            return _Copy(explained(opened))
        model = opened
    with _lock:
        key = (device, dtype, *_content(model))
        found = _copies.get(key)
        if found is None:
            found = _copies[key] = _Copy(explained(_copied(model, device, dtype), model), own_dtype(model))
        return found


def _content(model: Any) -> tuple[object, ...]:
    """Equal for modules, and exported programs, that are the same in all that can be saved, down to the last weight.

    Nothing less will do: a write to `.data`, or to an attribute, leaves no trace but itself. What cannot be saved is
    like nothing else.
    """
    digest = _Digest()
    try:
        if isinstance(model, torch.jit.ScriptModule):
            digest.write(model.save_to_buffer())
        else:
            torch.save(model, digest)
    except Exception:
        return (object(),)
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    return (digest.hash.digest(), *map(type, parts))  # a class may have been written anew, under its name


class _Digest(io.BytesIO):
    """A file that keeps a hash of what is written to it, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def _copied(model: Any, device: torch.device, dtype: torch.dtype | None) -> torch.nn.Module:
    if is_exported(model):
        return cast(module_on(model, device), dtype)
    if not isinstance(model, torch.jit.ScriptModule):
        check_movable(model, device)
        with unwarned():
            return cast(copy.deepcopy(model), dtype).to(device)
    return cast(load_script(io.BytesIO(model.save_to_buffer()), map_location=device), dtype)


_FORKED = (
    "this process was forked from one that had begun to use CUDA, which does not survive a fork: start processes by "
    "'spawn', or load the model after the fork only"
)
