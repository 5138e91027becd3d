"""NVIDIA GPUs, through PyTorch's CUDA.

Lives here: a model's copy on a device, the way of a batch there and back, which errors of CUDA are whose. Must not be
here: who runs when.
"""

import copy
import hashlib
import io
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aneuron.backends import Fault
from aneuron.backends.cpu import open_model
from aneuron.backends.torchscript import load_script
from aneuron.errors import DeviceError
from aneuron.tensors.nested import fill, walk

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
    is copied for each core, and each length of `buckets`. A ScriptModule is saved and
    loaded there, with the constants that `torch.jit.trace` has put into it. (A graph that makes tensors on a device of
    its own must have been traced on a GPU.) Any other callable is called with tensors on the device, which is the
    current one, and must have its weights there itself. The model runs under `torch.inference_mode()`, on a stream for
    each worker thread; several run it at once, so its `forward` must not write to itself.

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

    def __init__(self, cores_per_device: int = 1, staging_bytes: int = 1 << 26) -> None:
        for name, value, least in (("cores_per_device", cores_per_device, 1), ("staging_bytes", staging_bytes, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an int of at least {least}")
        self.cores_per_device = cores_per_device
        self.staging_bytes = staging_bytes
        self._slots = _Slots(staging_bytes)

    def __reduce__(self) -> tuple[Any, ...]:  # pinned memory stays with its process
        return type(self), (self.cores_per_device, self.staging_bytes)

    def __repr__(self) -> str:
        return f"CudaBackend(cores_per_device={self.cores_per_device}, staging_bytes={self.staging_bytes})"

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
        with torch.cuda.device(device):
            copied = _copy_to(device, model)
            torch.cuda.current_stream(device).synchronize()  # those that will run it are other ones
        return CudaCore(copied, device, self._slots)

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

    def __init__(self, copied: "_Copy", device: torch.device, slots: "_Slots") -> None:
        self._copy: _Copy | None = copied
        self._device = device
        self._slots = slots
        self._process = os.getpid()

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy the batch to the device, run the model, copy its output back, all on the calling thread's stream.

        The thread sleeps until all of it is done: also after an error, when a copy may still be reading.
        """
        if os.getpid() != self._process:
            raise DeviceError(_FORKED)
        assert self._copy is not None
        slot = self._slots.on(self._device)
        # The device first: the stream alone would leave by way of device 0, and make a context there.
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(slot.stream):
            slot.begin()
            try:
                args, kwargs = _moved((args, kwargs), slot.to_device)
                return _moved(self._copy.module(*args, **kwargs), slot.to_host)
            finally:
                slot.wait()

    def close(self) -> None:
        """Let the weights go."""
        self._copy = None


class _Slot:
    """What a worker thread has on a device: a stream, an event to wait for, and leave to pin so many bytes.

    Tensors live and die on the one stream, which PyTorch's allocator of device memory counts on; that of pinned memory
    waits for the copies that use it, whoever drops it first.
    """

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        # Without `blocking` the thread would wait by spinning.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._staging_bytes = self._room = staging_bytes

    def begin(self) -> None:
        """Nothing is pinned yet."""
        self._room = self._staging_bytes

    def wait(self) -> None:
        """Sleep until the device has done all that it was given."""
        self._done.record(self.stream)
        self._done.synchronize()

    def to_device(self, leaf: torch.Tensor) -> torch.Tensor:
        """Begin to copy an input."""
        if self._fits(leaf):
            leaf = leaf.pin_memory()
        return leaf.to(self._device, non_blocking=True)  # one that is not pinned has been read when this returns

    def to_host(self, leaf: torch.Tensor) -> torch.Tensor:
        """Begin to copy an output; it is there after `wait`."""
        if not leaf.is_cuda:
            return leaf
        if leaf.device != self._device or leaf.layout is not torch.strided or leaf.is_nested or not self._fits(leaf):
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


class _Slots(threading.local):
    """The calling thread's slots. They belong to the thread, not to a core: it may serve one for each shape."""

    def __init__(self, staging_bytes: int) -> None:
        self._staging_bytes = staging_bytes
        self._by_device: dict[torch.device, _Slot] = {}

    def on(self, device: torch.device) -> _Slot:
        if device not in self._by_device:
            self._by_device[device] = _Slot(device, self._staging_bytes)
        return self._by_device[device]


def _moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A structure with its tensors moved."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    return fill(value, iter([move(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Copy:
    """A model on a device."""

    module: Any


_lock = threading.Lock()  # around the copies
_copies: "weakref.WeakValueDictionary[tuple[object, ...], _Copy]" = weakref.WeakValueDictionary()


def _copy_to(device: torch.device, model: Any) -> _Copy:
    """A model on a device: the copy that is there already, if it was made of what the model now is."""
    if not isinstance(model, torch.nn.Module):
        return _Copy(open_model(model, device))
    with _lock:
        key = (device, *_content(model))
        found = _copies.get(key)
        if found is None:
            found = _copies[key] = _Copy(_copied(model, device))
        return found


def _content(model: torch.nn.Module) -> tuple[object, ...]:
    """Equal for modules that are the same in all that can be saved, down to the last weight and attribute.

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
    return (digest.hash.digest(), *map(type, model.modules()))  # a class may have been written anew, under its name


class _Digest(io.BytesIO):
    """A file that keeps a hash of what is written to it, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def _copied(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    if not isinstance(model, torch.jit.ScriptModule):
        return copy.deepcopy(model).to(device)
    return load_script(io.BytesIO(model.save_to_buffer()), map_location=device)


_FORKED = (
    "this process was forked from one that had begun to use CUDA, which does not survive a fork: start processes by "
    "'spawn', or load the model after the fork only"
)
