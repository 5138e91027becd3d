"""NeuronCores: models traced with torch_neuronx, or torch_neuron on Inf1, and TorchNeuron's native device.

Lives here: `NeuronBackend`, and how a core runs a batch. Must not be here: which cores there are (cores.py), placing a
model (placement.py, native.py), what an error means (faults.py).
"""

import os
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from aneuron.backends import Fault
from aneuron.backends.neuron import cores, faults, machine, native, placement
from aneuron.backends.neuron.cores import Found, Package
from aneuron.backends.neuron.faults import Kind, Repeated
from aneuron.errors import DeviceError

# Placement goes by a default of the whole process, and loads that run at once race in the runtime.
_loading = threading.Lock()
BACK_OFF = tuple(0.001 * 2**k for k in range(9))  # seconds; about half a second in all, while the core's queue is full

_NO_DEVICE = (
    "there is no /dev/neuron*: this is no Inf or Trn instance, the driver is missing, or the container is not given "
    "the devices"
)
_CUT = (
    "the Neuron package cuts and pads (on Inf1: if it was traced with dynamic_batch_size=True), and calls do not share "
    "runs; pass batch_size=, what the model was traced with, or {batch_size: model}"
)
_RECOMPILED = "it is compiled for each new number, which takes minutes; pass batch_size="


class NeuronBackend:
    """Runs traced models on the NeuronCores of this process, a copy on each.

    The model is what `torch_neuronx.trace` made (or `torch.neuron.trace`, on Inf1): its file's path, the module, or
    a module that holds traced parts. Give the path: a file is loaded straight onto each core. Of a module each core
    gets a copy, which takes host memory; the module itself stays as it is and where it is, and one that
    `torch.jit.load` has put on a core takes memory there for as long as somebody holds it. A core that is closed frees
    its copy. A module without a graph for NeuronCores, or one compiled for several cores at once, is refused.

    Where TorchNeuron is installed (torch-neuronx 2.13 and later, for Trn2 and Trn3), which has a native device and no
    `trace`, the model is a plain `nn.Module`, copied to `neuron:i`. With `compile` it is compiled there by
    `torch.compile(backend="neuron", fullgraph=True, dynamic=False)`: a program for each shape, at the first run with
    it, which takes minutes and holds the interpreter for part of that. Give `example_inputs`, so that all shapes are
    compiled when the model starts. A `forward` that is not one graph, or a compilation that fails, raises. Without
    `compile` it runs operation by operation, and operations that the device has not run on the CPU without a word; set
    TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS=1, or those that fail on the device do, too.

    torch_neuron, the package for Inf1, was last published for PyTorch 1.13, which is older than aneuron's (2.4): it is
    supported as its documentation has it, and tested on a double only.

    Cores are counted from zero among those of this process: NEURON_RT_VISIBLE_CORES ("3", "3-6", "3,4,5") or
    NEURON_RT_NUM_CORES, else all, which then no other process can have. Set them before the first model is loaded: the
    runtime reads them once, and keeps its cores until the process ends. It does not survive a fork; start processes
    with the spawn method, or load after the fork.

    Say how many rows the model was compiled for, by `batch_size=`, by a mapping `{8: model}`, or by the config.json
    that optimum-neuron writes beside the file. Otherwise `torch_neuronx.dynamic_batch` cuts and pads on the core:
    calls are then not packed, and a warning says so. A row's result does not depend on its neighbours, but it may
    differ in the last digits between models compiled for different rows. A model that computes across rows gives other
    answers when its batch is cut: let it have whole batches (`set_dynamic_batching=False`).

    A core that fails is lost until the process is restarted (`recoverable` is False). Set NEURON_RT_EXEC_TIMEOUT
    (seconds) well above the longest run, not below: a run that exceeds it costs the core. `torch.jit.load` stops the
    interpreter while it loads: load before serving, or trace with `torch_neuronx.lazy_load`.

    Loading raises `DeviceError`, with the likely cause, where the cores cannot be had or do not hold the model;
    `ValueError` or `FileNotFoundError` for what is no traced model.

    Written from the documentation of the SDK up to 2.33, and tested on doubles of both packages; which one serves which
    instance is in docs/guides/aws.md:
    https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-trace.html,
    .../api-torch-neuronx-core-placement.html, .../api-torch-neuronx-async-lazy-load.html,
    https://awsdocs-neuron.readthedocs-hosted.com/en/latest/torch/compile/reference-torch-compile.html, and
    https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/guides/configuration-guide.html.

        >>> backend = NeuronBackend()
        >>> backend.classify(RuntimeError("Failed to execute the model status=1003 message=Numerical Error"))
        <Fault.INPUT: 'input'>
    """

    name = "neuron"
    recoverable = False
    loads_scripts = True

    def __init__(self, compile: bool = False, *, root: str | os.PathLike[str] = "/") -> None:
        self._compile = compile
        self._root = os.fspath(root)  # where dev/neuron*, sysfs and neuron-ls are
        self._warned: set[int | str] = set()
        self._seen: tuple[dict[str, str], int] | None = None

    def __repr__(self) -> str:
        return f"NeuronBackend({'compile=True' if self._compile else ''})"

    @property
    def cuts_batches(self) -> bool:
        """Whether models are compiled for a number of rows: all but those of the native device."""
        return cores.package().kind != cores.NATIVE

    def cores(self) -> Sequence[int]:
        """Those that the environment, or the machine, says this process has. The runtime is asked, which claims them,
        only where neither does. Raises `DeviceError` where there are none, or no Neuron package.
        """
        cores.check_fork()
        settings = cores.settings()
        if self._seen is None or self._seen[0] != settings:
            self._seen = settings, self._count()
        return range(self._seen[1])

    def _count(self) -> int:
        here = self._package()
        environ = cores.frozen_environment()
        number, why = cores.count(self._root, environ)
        if number is None:
            try:
                number, why = cores.ask(here), "the Neuron runtime sees none"
            except Exception as error:
                raise self._explained(error, "the Neuron runtime does not start") from error
        if not number:
            raise DeviceError(f"this process has no NeuronCore: {why}")
        return number

    def _package(self) -> Package:
        here = cores.package()
        if here.kind == cores.NONE:
            raise DeviceError(here.problem if machine.chips(self._root) else f"{here.problem}, and {_NO_DEVICE}")
        return here

    def global_id(self, core_id: int) -> int | None:
        """The machine's number of a core; None where the runtime chose the cores (NEURON_RT_NUM_CORES), or where this
        container has not all chips of the machine and no NEURON_RT_VISIBLE_CORES.
        """
        return cores.global_id(core_id, cores.frozen_environment(), self._root)

    def compiled_rows(self, model: Any) -> int | None:
        """The rows that a file was compiled for, as the config.json of optimum-neuron beside it says; or None."""
        return placement.compiled_rows(model)

    def load(self, model: Any, core_id: int, batch_size: int | None, dynamic_batching: bool = True) -> "NeuronCore":
        """Put the model on a core, one load at a time in the process.

        Without a `batch_size`, and with `dynamic_batching`, the core cuts and pads batches itself. Models that were
        traced to load lazily, or in the background, do so; what goes wrong there is raised by the first run.
        """
        cores.check_fork()
        cores.check_environment()
        here = self._package()
        cut = batch_size is None and dynamic_batching
        call: Any
        try:
            with _loading:
                if here.kind == cores.NATIVE:
                    call = native.load(here.module, model, core_id, self._compile)
                else:
                    call = placement.load(here, model, core_id, cut)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the copy, and with it the device's memory
            cause = faults.cause(error)
            if cause is not None and cause.kind is not Kind.FATAL:
                cores.note_start()
            if cause is None and not isinstance(error, RuntimeError):
                raise  # it is not about the core
            raise self._explained(error, f"core {core_id} could not load the model") from error
        cores.note_start()
        if cut and here.kind != cores.NATIVE:
            self._warn_once(model, _CUT)
        elif batch_size is None and self._compile and here.kind == cores.NATIVE:
            self._warn_once(model, _RECOMPILED)
        return NeuronCore(call, core_id, concurrent=here.kind != cores.NATIVE)

    def _warn_once(self, model: Any, text: str) -> None:
        key = os.fspath(model) if isinstance(model, (str, os.PathLike)) else id(model)
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"it is not known how many rows the model was compiled for: {text}", stacklevel=2)

    def _explained(self, error: BaseException, what: str) -> DeviceError:
        """An error of loading with its likely cause."""
        cause = faults.cause(error)
        text = f"{what}: {faults.last_line(error)}"
        why = cause.advice if cause is not None else ""
        if cause is not None and cause.name in ("not initialized", "no device", "EXEC_NC_BUSY"):
            taken = cores.taken_by(self._root, cores.frozen_environment())
            if taken:
                why = f"{taken}. Stop them, or divide the cores of the machine: {cores.DIVIDE}"
            elif not machine.chips(self._root):
                why = _NO_DEVICE
        return DeviceError(f"{text}; {why}" if why else text)

    def classify(self, error: BaseException) -> Fault:
        """By the runtime's status code, or the text, anywhere in the error or its causes, if they are `RuntimeError`
        or `torch.jit.Error`: other types are the model's own.

        INPUT: 2, 3, 1002, 1003, 1006, wrong arguments, whatever the model itself raises, and a file of another
        version (10). CORE: 5, 6, 101, 1004, 12xx, and a core that cannot be had (9, 1005); also what is nobody's
        fault (1, out of memory, a full queue, network, unknown codes) when it happens twice in a row on one core: the
        first time it is the call's. FATAL: 13, 14, a runtime that does not start, or has been forked.
        """
        return faults.classify(error)

    def found(self) -> Found:
        """What a look at the machine finds, without claiming a core."""
        return cores.found(self._root)

    def report(self) -> dict[str, object]:
        """The same for `aneuron info`: found, cores, why, lacks, and which models it takes."""
        found = self.found()
        return {
            "found": found.cores > 0 and found.package != cores.NONE,
            "cores": found.cores,
            "why": f"{found.why} ({found.package})" if found.package != cores.NONE else found.why,
            "lacks": list(found.lacks),
            "takes": "modules" if found.package == cores.NATIVE else "traced models",
        }


class NeuronCore:
    """A model on one core. The runtime overlaps the copies of one batch with the run of another: it is concurrent.

    Not so TorchNeuron's device: operations of two threads share its one stream, and an error shows in whichever waits.
    """

    def __init__(self, model: Any, core_id: int, concurrent: bool = True) -> None:
        self.concurrent = concurrent
        self._model = model
        self._core_id = core_id
        self._pid = os.getpid()
        self._suspect = False  # the last run failed, nobody knows why

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model; copies in and out are part of it, and the GIL is released for the whole."""
        if os.getpid() != self._pid:
            cores.check_fork()
        delays = iter(BACK_OFF)
        while True:
            try:
                output = self._model(*args, **kwargs)
                self._suspect = False
                return output
            except Exception as error:
                cause = faults.cause(error)
                delay = next(delays, None) if cause is not None and cause.kind is Kind.RETRY else None
                if delay is None:
                    self._blame(error, cause)
                    raise
                time.sleep(delay)

    def _blame(self, error: Exception, cause: faults.Cause | None) -> None:
        """Say in an error what is known of it. One that is nobody's fault is the core's when it repeats."""
        if cause is None:
            return
        if cause.kind in (Kind.SUSPECT, Kind.RETRY):
            if self._suspect:
                # Without the traceback, whose frames hold the rows of all who share the batch.
                raise Repeated(
                    f"core {self._core_id} failed twice, and did not succeed in between: {faults.last_line(error)}"
                ) from error.with_traceback(None)
            self._suspect = True
        if cause.advice:
            error.add_note(f"aneuron: core {self._core_id}, {cause.name}: {cause.advice}")

    def close(self) -> None:
        """Let the model go, and with it the device's memory. The core itself stays this process's until it ends."""
        self._model = None
