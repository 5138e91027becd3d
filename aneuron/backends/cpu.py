"""Virtual cores on the CPU: the embedded default, and what a laptop has.

Lives here: loading a model for this process, threads within an operation. Must not be here: who runs when.
"""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from aneuron.backends import Fault, cpus
from aneuron.backends.copies import own
from aneuron.backends.exported import Inputs, explained, inputs_of, is_module, load_program, module_on
from aneuron.backends.exported import is_program as is_exported
from aneuron.backends.files import check_script, is_program
from aneuron.backends.torchscript import load_script

T = TypeVar("T")

_lock = threading.Lock()  # around the process's number of threads, and the files that are loaded
_loaded: "weakref.WeakValueDictionary[tuple[object, ...], torch.nn.Module]" = weakref.WeakValueDictionary()


def open_model(model: Any, device: torch.device | str = "cpu") -> Any:
    """What to call: the model itself, what an exported program computes, or what the file at this path holds, once for
    all cores: TorchScript or an exported program.
    """
    if is_exported(model):
        return module_on(model, device)
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = os.path.abspath(os.fspath(model))
    file = os.stat(path)
    key = (device, path, file.st_mtime_ns, file.st_size)
    with _lock:
        module = _loaded.get(key)
        if module is None:
            module = _loaded[key] = _read(path, device)
        return module


def _read(path: str, device: torch.device | str) -> torch.nn.Module:
    if is_program(path):
        return module_on(load_program(path), device)
    check_script(path)
    return load_script(path, map_location=device).eval()


def inputs_taken(model: Any) -> Inputs | None:
    """What an exported program takes, which is loaded for that if it is a file; None for all else."""
    path = isinstance(model, (str, os.PathLike))
    if is_exported(model) or is_module(model) or (path and is_program(model)):
        return inputs_of(open_model(model))
    return None


class CpuBackend:
    """Runs the model on virtual cores, all in this process: a copy of its modules and buffers on each, one copy of the
    weights.

    `cores`: how many; None means as many as there are CPUs available to the process, by its affinity, PYTHON_CPU_COUNT
    (from Python 3.13 on) and the quotas of its cgroups, rounded up: `aneuron info` says why. `threads_per_core`: those
    within one operation; None divides torch's number of threads (`torch.get_num_threads()`) among the cores. It holds
    in the worker threads only; the rest of the process keeps its setting. Many one-thread cores favour throughput,
    `CpuBackend(cores=1)` the latency of a lone call.

    The model runs under `torch.inference_mode()`. What its `forward` keeps on itself is the core's own; the user's
    module is not run, and its buffers and attributes can change without being noticed. Its parameters are those that
    serve: a `load_state_dict()` into it shows at once, in the middle of executions too, and so does what is copied over
    a file that weights were mapped from (`torch.load(mmap=True)`, safetensors). Use `swap` for new weights, and write
    a new file under another name.

    A bound method, a partial, an object and a closure that hold a module are copied like one. What cannot be copied (it
    holds a lock, or a hook whose closure reaches it, or reaches a module by a global name) runs one execution at a
    time, on all cores together; a warning says why. Any other callable is called by several cores at once.

    An exported program is read once for all cores, in evaluation or training mode as it was exported, with buffers and
    constants for each. No two are read at once in a process: `torch.export.load` cannot.

    Where each virtual core has one thread, the rows of a batch do not see how many neighbours they have.

        >>> import torch, asyncio, aneuron
        >>> model = aneuron.AsyncDataParallel(torch.nn.ReLU().eval(), backend=aneuron.CpuBackend(cores=2))
        >>> async def main():
        ...     async with model:
        ...         return await model(torch.tensor([[-1.0, 2.0]]))
        >>> asyncio.run(main())
        tensor([[0., 2.]])
    """

    name = "cpu"
    recoverable = True
    loads_scripts = True
    preferred_rows = 32

    def __init__(self, cores: int | None = None, threads_per_core: int | None = None) -> None:
        for name, value in (("cores", cores), ("threads_per_core", threads_per_core)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected an int of at least 1, or None to choose")
        self._cores = cores or cpus.available().number
        self._threads_per_core = threads_per_core

    def __repr__(self) -> str:
        return f"CpuBackend(cores={self._cores}, threads_per_core={self._threads_per_core})"

    def cores(self) -> Sequence[int]:
        """As many as were asked for."""
        return range(self._cores)

    def report(self) -> dict[str, object]:
        """What there is, why, and what is missing."""
        return {"found": True, "cores": self._cores, "why": cpus.available().why, "lacks": []}

    def load(self, model: Any, core_id: int, batch_size: int | None) -> "CpuCore":
        """A copy of what is to be loaded, a file once for all cores."""
        with _lock:
            threads = self._threads_per_core or max(1, self._threads() // self._cores)
        return CpuCore(open_model(model), threads)

    def inputs_of(self, model: Any) -> Inputs | None:
        """What an exported program takes."""
        return inputs_taken(model)

    def _threads(self) -> int:
        """Threads for all cores together: torch counts CPUs, and knows nothing of a quota."""
        threads, here = _in_a_new_thread(torch.get_num_threads), cpus.available()
        return min(threads, here.number) if here.limited else threads

    def classify(self, error: BaseException) -> Fault:
        """A CPU does not fail alone: whatever the model raises is about its input."""
        return Fault.INPUT


class CpuCore:
    """One virtual core."""

    concurrent = False

    def __init__(self, model: Any, threads: int) -> None:
        self._given = model  # of a file: what the next core is to share
        self._model: Any = explained(own(model), model)
        self._threads = threads
        self._local = threading.local()

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model."""
        if not hasattr(self._local, "limited"):
            self._local.limited = True
            limit_threads(self._threads)
        with torch.inference_mode():
            return self._model(*args, **kwargs)

    def close(self) -> None:
        """Let the weights go."""
        self._model = self._given = None


def limit_threads(threads: int) -> None:
    """Use `threads` threads within operations that the calling thread starts, and in no other thread.

    `torch.set_num_threads` sets the calling thread's number and the one that threads yet to come start with, the
    process's; that is put back. A thread takes up the process's number at its first operation, which would undo an
    earlier setting: hence the question first.
    """
    with _lock:
        process = _in_a_new_thread(torch.get_num_threads)
        torch.get_num_threads()
        torch.set_num_threads(threads)
        _in_a_new_thread(torch.set_num_threads, process)


def _in_a_new_thread(fn: Callable[..., T], *args: Any) -> T:
    answer: list[T] = []
    thread = threading.Thread(target=lambda: answer.append(fn(*args)), daemon=True)
    thread.start()
    thread.join()
    return answer[0]
