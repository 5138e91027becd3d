"""What finds cores, loads the model on one, and runs it: the protocols, and how a backend and its cores are chosen.

Lives here: `Backend`, `Core`, `SubmittingCore`, `Fault`, `device_ids`, what "auto" means. Must not be here: asyncio,
queues, who runs when.
"""

import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from aneuron.backends.exported import is_program
from aneuron.backends.traits import traits_of
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
    """The model, loaded on one core. All its methods are called in worker threads of this core.

    One that needs no thread to wait for it has `submit` besides: `aneuron.backends.SubmittingCore`.
    """

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


Done = Callable[[Any, BaseException | None], None]
"""How a submission ends: `done(output, None)`, or `done(None, error)`."""


@runtime_checkable
class SubmittingCore(Core, Protocol):
    """A core that is handed a batch and says later that it is done: the lane needs no thread to wait for it.

    The event loop hands batches over, and takes results, itself; what would hold it up is done in a thread of the core:
    copies of a quarter of a megabyte or more. `aneuron.testing.check_backend` checks a core for what follows.

    It has `execute` as well: for warm-up, for further executions that show which outputs have rows, and where
    `context=` or an observer is to be around the model. Threads may be there while submissions are in flight, if it is
    `concurrent`.

    A complete one, with a backend; a thread stands for the device's own way to say that it is done::

        >>> import threading, torch, aneuron
        >>> class EchoCore:
        ...     concurrent = True
        ...
        ...     def __init__(self, model):
        ...         self.model = model
        ...
        ...     def execute(self, args, kwargs):
        ...         return self.model(*args, **kwargs)
        ...
        ...     def submit(self, args, kwargs, done):
        ...         threading.Thread(target=self.run, args=(args, kwargs, done), daemon=True).start()
        ...
        ...     def run(self, args, kwargs, done):
        ...         output = error = None
        ...         try:
        ...             with torch.no_grad():
        ...                 output = self.execute(args, kwargs)
        ...         except Exception as raised:
        ...             error = raised
        ...         done(output, error)
        ...
        ...     def close(self):
        ...         pass
        >>> class EchoBackend:
        ...     name = "echo"
        ...     recoverable = True
        ...
        ...     def cores(self):
        ...         return [0, 1]
        ...
        ...     def load(self, model, core_id, batch_size):
        ...         return EchoCore(model)
        ...
        ...     def classify(self, error):
        ...         return aneuron.Fault.INPUT
        >>> from aneuron.testing import check_backend
        >>> check_backend(EchoBackend())
    """

    def submit(self, args: tuple[Any, ...], kwargs: dict[str, Any], done: Done) -> None:
        """Begin with one batch and return; `done` is called when its output is there, or when it has failed.

        *Where.* Called on the thread of the event loop, which must not wait: enqueue, in microseconds. The model's own
        Python does not belong there. That thread's state is to be left as it is: torch's modes, the current device and
        stream. Nobody has switched gradients off there: the core does, in whichever thread it computes, and enters the
        context (`contextvars`) there in which `load` was called.

        *Once.* `done` is called exactly once: from any thread, also before `submit` returns, but with no lock held that
        `submit`, `execute` or `close` takes. It returns soon, and does not raise. If `submit` itself raises, `done` is
        not called. An error that comes either way goes to `Backend.classify`, as one of `execute` does.

        *Several.* If the core is `concurrent`, as many submissions are in flight as the lane has slots, and they may
        end in any order; else one, and no `execute` with it.

        *Memory.* Inputs are as for `execute`; they stay as they are until `done` is called, also if the submission is
        given up. The output is a result of its own: the core does not write to it again while anybody holds it.

        *Given up.* With `exec_timeout` the runtime may wait no longer: the core has failed. `done` may come later, to
        no effect, or never. `close` is called when nothing is in flight but what was given up, and `done` need not be
        called after it.
        """
        ...


@runtime_checkable
class PolledCore(SubmittingCore, Protocol):
    """A submitting core whose completions are read from a file descriptor, an eventfd say, by the event loop.

    For devices that can write to one: no thread is needed on either side. Loops that watch no descriptors (Windows'
    proactor) cannot serve it.
    """

    completions: int
    """Readable while something has completed; of this core alone. It stays open until `close`."""

    def complete(self) -> None:
        """Read the descriptor empty, and call `done` of all that has completed. Called on the thread of the event loop
        when `completions` is readable; does not block, and must not raise.
        """
        ...


@runtime_checkable
class ReducedCore(Core, Protocol):
    """A core that computes in another dtype than the model has, of a backend with `computes_in`."""

    def full(self) -> Core:
        """The same model on the same core, computed in its own dtype. It executes the example twice, once for each
        model and start, for `min_cosine` and the log, and is closed after that. Called in a worker thread.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """What finds cores and loads models on them. One object may serve several models.

    A backend may have besides:

    - `preferred_rows`: the rows that calls are packed up to where the model takes any number (32 where there is none);
    - `compiled_rows(model)`: the rows that a model was compiled for, None if it cannot tell;
    - `inputs_of(model)`: what an exported program takes (`aneuron.backends.exported.Inputs`), None for other models;
    - `cuts_batches = True`: every model is compiled for a number of rows, and where nobody knows which, its cores cut
      and pad what they are given. Calls are not packed then, and `load` is told by a keyword `dynamic_batching` whether
      cores may do so;
    - `loads_scripts = True`: a path names a TorchScript file, compiled for the rows of `example_inputs`; else it may
      name anything, and takes any number of rows unless `batch_size` or `compiled_rows` says otherwise;
    - `wants_example = True`: it makes something of a model for which inputs are needed, and `load` is told by a keyword
      `example` what they are: the positional and keyword arguments of an execution, None where there are no
      `example_inputs`;
    - `probes = False`: its cores execute callers' rows only; which outputs have rows is then taken from their shapes,
      as with `check_rows=False`;
    - `inline = True`: its cores take microseconds, and callers' batches may be executed on the thread of the event loop
      itself, which stands still meanwhile; `submit` is not used. It is never found out: a core that was fast so far
      may not stay so. `exec_timeout` cannot end what stands still with it;
    - `computes_in`: an `aneuron.backends.precision.Precision`, where cores compute in another dtype than the model has:
      their results are compared with full precision's at warm-up, and its rounding counts as such. They have `full`
      then: `aneuron.backends.ReducedCore`;
    - `global_id(core_id)`: the machine's number of a core, None if it cannot tell (the id itself where there is none).

    One of the wrong type is a `ValueError`. Cores may have `submit` besides: `aneuron.backends.SubmittingCore`.

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
        """Load what the user gave as the model on a core; blocking, in a worker thread of that core.

        Called once for each core and compiled shape, the shapes of one core after each other, the cores in the order
        of the ids; loads of several models may run at once. `batch_size` is the number of rows in every `execute`,
        None if it varies. What it raises puts the core out of service, or ends the start where too few are left
        (`min_cores`): cores that are loaded by then are closed. Called again, while others serve, for a core that
        failed, where the backend is `recoverable`.
        """
        ...

    def classify(self, error: BaseException) -> Fault:
        """Whom to blame for what `Core.execute` raised."""
        ...


class DeviceId(NamedTuple):
    """A core as the user wrote it: an int or "nc:#" is the id of a core, "cuda:#" the number of a device."""

    number: int
    device: bool = False


def parse_device_ids(device_ids: Iterable[int | str] | None) -> list[DeviceId] | None:
    """The cores that the user named, in the user's order. What needs no device is checked here."""
    if device_ids is None:
        return None
    if isinstance(device_ids, (str, bytes)) or not isinstance(device_ids, Iterable):
        raise DeviceError(
            f"device_ids={device_ids!r}: expected a list such as [0, 1] or ['nc:0', 'nc:1'], or None for all"
        )
    given = list(device_ids)
    ids = [_parse_id(value) for value in given]
    if not ids:
        raise DeviceError("device_ids=[] names no core; name one at least, or pass None for all that this process sees")
    twice = sorted({each for each in ids if ids.count(each) > 1})
    if twice:
        several = ", and backend=CudaBackend(cores_per_device=2) makes two of a device" if twice[0].device else ""
        raise DeviceError(
            f"device_ids={given} names {[each.number for each in twice]} more than once; each core is loaded once"
            f"{several}"
        )
    return ids


def _parse_id(value: Any) -> DeviceId:
    match = re.fullmatch(r"(nc|cuda):(\d+)", value, re.ASCII) if isinstance(value, str) else None
    try:
        number = int(match[2]) if match else operator.index(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or isinstance(value, bool):
        raise DeviceError(
            f"device id {value!r}: expected an int from 0 or 'nc:#' such as 'nc:0' (for a CUDA device 'cuda:#')"
        ) from None
    return DeviceId(number, match is not None and match[1] == "cuda")


def check_ids(backend: Backend, named: list[DeviceId] | None) -> None:
    """Raise `DeviceError` for CUDA devices of a backend that has none."""
    for each in named or ():
        if each.device and traits_of(backend).cores_per_device is None:
            raise DeviceError(
                f"device id 'cuda:{each.number}' with the {backend.name} backend, which has no CUDA devices; name its "
                "cores by ints or 'nc:#', or pass backend='cuda'"
            )


def choose_cores(backend: Backend, named: list[DeviceId] | None) -> list[int]:
    """The cores to load on: those asked for, or all. Raises `DeviceError` for one that this process does not see."""
    seen = list(backend.cores())
    if not seen:
        raise DeviceError(f"the {backend.name} backend sees no cores in this process")
    check_ids(backend, named)
    ids = None if named is None else [core for each in named for core in _cores_of(backend, each)]
    if ids is not None and len(set(ids)) < len(ids):
        raise DeviceError(
            f"device_ids name cores more than once: {ids}, with 'cuda:#' as all cores of a device; each is loaded once"
        )
    missing = [core for core in ids or () if core not in seen]
    if missing:
        raise DeviceError(
            f"device ids {missing} are outside the cores that this process sees: {len(seen)} of the {backend.name} "
            f"backend, ids {seen[0]} to {seen[-1]}. Ids count from zero within the process, whatever the machine's own "
            "numbers of the cores are"
        )
    return seen if ids is None else ids


def _cores_of(backend: Backend, named: DeviceId) -> Sequence[int]:
    """The ids of the cores that the user named by one of `device_ids`."""
    if not named.device:
        return (named.number,)
    each = traits_of(backend).cores_per_device
    assert each is not None, "`check_ids` has seen to it"
    return range(named.number * each, (named.number + 1) * each)


def choose_backend(backend: str | Backend) -> Backend | None:
    """The backend that `backend=` means; None for "auto", which is chosen at start."""
    if backend == "auto":
        return None
    if backend in _NAMES:
        return _named(backend)
    if isinstance(backend, (str, type)) or not isinstance(backend, Backend):
        raise ValueError(
            f"backend={backend!r}: expected 'auto', {', '.join(map(repr, _NAMES))}, or an object with the methods of "
            "aneuron.Backend"
        )
    return backend


_NAMES = "neuron", "cuda", "cpu", "openvino", "onnx"


def _named(name: str) -> Backend:
    from aneuron.backends.cpu import CpuBackend
    from aneuron.backends.cuda import CudaBackend
    from aneuron.backends.neuron import NeuronBackend
    from aneuron.backends.onnx import OnnxBackend
    from aneuron.backends.openvino import OpenVinoBackend

    classes = NeuronBackend, CudaBackend, CpuBackend, OpenVinoBackend, OnnxBackend
    backend: Backend = dict(zip(_NAMES, classes, strict=True))[name]()
    return backend


def check_models(backend: Backend, models: Iterable[Any]) -> None:
    """Raise `DeviceError` for models traced for NeuronCores where they are to run elsewhere."""
    from aneuron.backends.neuron.placement import is_neuron

    if backend.name in ("cpu", "cuda", "openvino") and any(is_neuron(model) for model in models):
        raise DeviceError(
            f"the model was traced for NeuronCores, and the {backend.name} backend cannot run it; pass "
            "backend='neuron' on a machine that has some, or the module that was traced"
        )


def automatic(models: Iterable[Any]) -> Backend:
    """The backend that "auto" means for these models on this machine: neuron if this process has NeuronCores, else
    cuda if there is a device, else cpu. Claims none of them; may block.

    An OpenVINO file runs on openvino, an ONNX file on onnx, or on openvino if only that is installed.
    A plain callable runs on cpu: it may do anything. So does an AOTInductor package. A module that was traced for
    NeuronCores runs nowhere else, and one that was not is not quietly run elsewhere where there are NeuronCores: their
    backend says what to do.
    """
    from aneuron.backends.files import graph_in, is_package
    from aneuron.backends.neuron import NeuronBackend
    from aneuron.backends.neuron.placement import is_neuron

    given = list(models)
    if graphs := {graph_in(model) for model in given} - {None}:
        return _named(_runtime_of(graphs))
    found = NeuronBackend().found()
    if any(is_neuron(model) for model in given):
        if not found.cores:
            raise DeviceError(
                f"the model was traced for NeuronCores, and this process has none: {found.why}"
                + "".join(f"; {each}" for each in found.lacks)
            )
        return _named("neuron")
    if not all(isinstance(model, (torch.nn.Module, str, os.PathLike)) or is_program(model) for model in given):
        return _named("cpu")
    if any(isinstance(model, (str, os.PathLike)) and is_package(model) for model in given):
        return _named("cpu")
    if found.cores:
        return _named("neuron")
    return _named("cuda" if torch.cuda.is_available() else "cpu")


def _runtime_of(graphs: set[str | None]) -> str:
    """What runs files of these kinds."""
    from aneuron.backends.graphs import is_installed

    if "openvino" in graphs:
        return "openvino"
    for name, package in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        if is_installed(package):
            return name
    raise ModuleNotFoundError(
        "the model is an ONNX file, and neither ONNX Runtime nor OpenVINO is installed: pip install 'aneuron[onnx]' or "
        "'aneuron[openvino]'"
    )
