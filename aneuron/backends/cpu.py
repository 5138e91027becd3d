"""Virtual cores on the CPU: the embedded default, and what a laptop has.

Lives here: loading a model for this process, threads within an operation. Must not be here: who runs when.
"""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from aneuron.backends import Fault, cpus
from aneuron.backends.aoti import Package, package_at
from aneuron.backends.copies import own, own_dtype
from aneuron.backends.exported import Inputs, explained, inputs_of, is_module, load_program, module_on
from aneuron.backends.exported import is_program as is_exported
from aneuron.backends.files import check_script, is_package, is_program
from aneuron.backends.precision import Precision, arguments_of, is_native, precision_of
from aneuron.backends.torchscript import load_script

T = TypeVar("T")

_lock = threading.Lock()  # around the process's number of threads, and the files that are loaded
_loaded: "weakref.WeakValueDictionary[tuple[object, ...], Any]" = weakref.WeakValueDictionary()


def open_model(model: Any, device: torch.device | str = "cpu") -> Any:
    """What to call: the model itself, what an exported program computes, or what the file at this path holds, once for
    all cores: TorchScript, an exported program or, in an engine, an AOTInductor package.
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


def _read(path: str, device: torch.device | str) -> Any:
    if is_program(path):
        return module_on(load_program(path), device)
    if is_package(path) and torch.device(device).type == "cpu":
        return package_at(path)
    check_script(path)
    return load_script(path, map_location=device).eval()


def inputs_taken(model: Any) -> Inputs | None:
    """What an exported program takes, which is loaded for that if it is a file, also one in a package of what was
    compiled of it; None for all else.
    """
    path = isinstance(model, (str, os.PathLike))
    if path and is_package(model):
        return open_model(model).inputs  # type: ignore[no-any-return]
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

    An AOTInductor package runs in the engines of a `Pool(processes=)` only, one in a process, loaded once for all its
    cores, with its checks of inputs on. A run holds the interpreter: give each core an engine. How many rows it takes
    `batch_size` says, or `example_inputs`; one that was compiled for several may stand for each size that calls are to
    be padded to, as `{2: path, 8: path}`.

    `dtype`: compute in `torch.bfloat16`, `float16`, `float32` or `float64`, whatever the model is in. Floating inputs,
    parameters and buffers are cast; integers and complex numbers stay. There is one cast copy of the parameters for all
    cores, of what they are when the core loads: for new ones use `swap`. Results come back in the widest floating dtype
    among the call's inputs, or where there is none (token ids) in that of the parameters given; with `outputs="as
    computed"` they stay in `dtype`. What the model itself returns in another dtype stays in that.

    The first core executes `example_inputs` both ways before the model is ready, real ones tell most: the log has the
    cosine of results with those in full precision (of each output as one vector, the smallest) and the largest
    deviation, and a warning with both times where `dtype` is slower, or the CPU has no instructions for it (AMX and
    AVX-512 BF16 are some, on Arm BF16). `min_cosine`: below it the start, or a `swap`, ends with a `ValueError`, and so
    it does without `example_inputs`. A model that cannot run in `dtype` (its `forward` makes float32 tensors, an
    operation has no kernel) is a `ValueError` that says what to do.

    PyTorch's bfloat16 and float16 kernels on CPUs keep some 0.8 MB for each new number of rows and shape of a layer:
    bound them with `batch_size` and `buckets`.

    What a row's result depends on beside the row: in float32, where each core has one thread, `batch_size` is given and
    the row is padded to the same length, nothing, to the last bit. At another length, number of rows or threads the
    last bits may differ; in bfloat16 and float16 they may with any company.

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

    def __init__(
        self,
        cores: int | None = None,
        threads_per_core: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        outputs: Literal["as called", "as computed"] = "as called",
        min_cosine: float | None = None,
    ) -> None:
        for name, value in (("cores", cores), ("threads_per_core", threads_per_core)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected an int of at least 1, or None to choose")
        self._cores = cores or cpus.available().number
        self._threads_per_core = threads_per_core
        self.computes_in = precision_of(dtype, outputs, min_cosine, is_native)

    def __repr__(self) -> str:
        more = "".join(f", {name}={value!r}" for name, value in arguments_of(self.computes_in).items())
        return f"CpuBackend(cores={self._cores}, threads_per_core={self._threads_per_core}{more})"

    def cores(self) -> Sequence[int]:
        """As many as were asked for."""
        return range(self._cores)

    def report(self) -> dict[str, object]:
        """What there is, why, and what is missing."""
        return {"found": True, "cores": self._cores, "why": cpus.available().why, "lacks": []}

    def load(self, model: Any, core_id: int, batch_size: int | None) -> "CpuCore":
        """A copy of what is to be loaded, a file once for all cores."""
        opened = open_model(model)
        if self.computes_in is not None and isinstance(opened, Package):
            raise ValueError(
                f"model={model!r} is an AOTInductor package, which computes in what it was compiled for: leave dtype= "
                "out, and compile the program in that dtype"
            )
        return CpuCore(opened, self.threads(), self.computes_in)

    def threads(self) -> int:
        """Threads within an operation of each core: torch counts CPUs, and knows nothing of a quota."""
        if self._threads_per_core is not None:
            return self._threads_per_core
        with _lock:
            threads, here = _in_a_new_thread(torch.get_num_threads), cpus.available()
        return max(1, (min(threads, here.number) if here.limited else threads) // self._cores)

    def inputs_of(self, model: Any) -> Inputs | None:
        """What an exported program takes."""
        return inputs_taken(model)

    def classify(self, error: BaseException) -> Fault:
        """A CPU does not fail alone: whatever the model raises is about its input."""
        return Fault.INPUT


class CpuCore:
    """One virtual core."""

    concurrent = False

    def __init__(self, model: Any, threads: int, precision: Precision | None = None) -> None:
        self._given = model  # of a file: what the next core is to share
        self._model: Any = explained(own(model, None if precision is None else precision.dtype), model)
        self._precision = precision
        self._own_dtype = own_dtype(model) if precision is not None else None
        self._threads = threads
        self._local = threading.local()

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model."""
        if not hasattr(self._local, "limited"):
            self._local.limited = True
            limit_threads(self._threads)
        with torch.inference_mode():
            if self._own_dtype is None or self._precision is None:
                return self._model(*args, **kwargs)
            return self._precision.call(self._model, self._own_dtype, args, kwargs)

    def full(self) -> "CpuCore":
        """The same in the model's own dtype."""
        return CpuCore(self._given, self._threads)

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
