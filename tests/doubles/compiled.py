"""Compiled models: what `trace` makes, what a file of one holds, and what happens when one is loaded and called.

A traced module is a real ScriptModule. Its graph calls `neuron::forward_v2(inputs, model)`; `model` is a buffer of
bytes that holds the compiled shapes and the CPU graph that answers in the device's place. What is loaded on cores hangs
on the buffer's own tensor object, so a deepcopy and a load from a file begin without cores.

Must not be here: which core (placement.py), which process has it (hardware.py).
"""

import contextlib
import ctypes
import io
import itertools
import os
import pickle
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from doubles.hardware import Core, Execution, failure, log, machine, not_loaded
from doubles.nesting import rebuild, tensors

DYNAMIC, LAZY, ASYNC = range(3)  # options, one byte each at the head of the buffer
MAGIC = b"NEFF"
HEAD = 3 + len(MAGIC)
unpatched_load = torch.jit.load

_creating = threading.Lock()
_library = torch.library.Library("neuron", "FRAGMENT")
_library.define("forward_v2(Tensor[] inputs, Tensor model) -> Tensor[]")


def _forward(inputs: list[torch.Tensor], model: torch.Tensor) -> list[torch.Tensor]:
    """The op. An error travels as text in the last output, so that `checked` raises it like a C++ op would."""
    device = device_side(model)
    try:
        outputs, error = device.run(inputs), ""
    except Exception as raised:
        outputs, error = [torch.empty(0)] * device.outputs, str(raised) or type(raised).__name__
    return [*outputs, torch.tensor([ord(character) for character in error], dtype=torch.int64)]


_library.impl("forward_v2", _forward, "CompositeExplicitAutograd")


def _checked(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    error = outputs.pop()
    if error.numel() > 0:
        codes: list[int] = error.tolist()
        text = "".join([chr(code) for code in codes])
        return [torch._functional_assert_async(torch.zeros(1), text, error)]  # raises `text`
    return outputs


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is")  # wherever this is imported
    checked = torch.jit.script(_checked)


@dataclass
class Compiled:
    """What the compiler knows about a model."""

    graph: bytes  # TorchScript, for the CPU
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    inputs: Any  # their nesting
    first: list[int]  # for each input, the first that was the same tensor in the example
    outputs: int  # tensors
    weights: list[str]  # names, where they are not part of the model
    cores: int  # that one replica needs
    lnc: int
    family: str


class Model:
    """The device's side of one traced module. `run` is called without the GIL being needed by anyone else's run."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._replicas: list[Replica] = []
        self.buffer_size = buffer.numel()
        self._options = buffer.untyped_storage()  # not the buffer itself, nor a view of it: it has to be able to end
        self.compiled: Compiled = pickle.loads(bytes(buffer[HEAD:].numpy()))
        self.outputs = self.compiled.outputs
        self.wish = (-1, -1)  # start, count: where it goes when it is loaded at last
        self.weights_on: int | None = None
        self.failed: BaseException | None = None  # an asynchronous load
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._loader: threading.Thread | None = None

    def __del__(self) -> None:
        for replica in self._replicas:
            replica.free()

    def option(self, which: int) -> bool:
        return bool(self._options[which])

    @property
    def cores(self) -> list[int]:
        """The process's numbers of the cores that it is loaded on."""
        return [machine.start().index(core.id) for replica in self._replicas for core in replica.cores]

    def on_jit_load(self) -> None:
        """What happens in `torch.jit.load`: the model goes where the process's default says, unless it is lazy."""
        self.wish = machine.default
        if self.option(ASYNC):
            self._loader = threading.Thread(target=self._load_behind, daemon=True)
            self._loader.start()
        elif not self.option(LAZY):
            self.place(*self.wish, gil=machine.config.jit_load_holds_gil)

    def _load_behind(self) -> None:
        try:
            self.place(*self.wish)
        except Exception as error:
            self.failed = error

    def place(self, start: int, count: int, gil: bool = False) -> None:
        """Unload, and load on `count` cores from `start`; -1: the least used, as many as one replica needs."""
        machine.start()
        with self._lock:
            for replica in self._replicas:
                replica.free()
                _pass(machine.config.unload_time, gil)
            self._replicas = []
            self._place(start, count, gil)

    def _place(self, start: int, count: int, gil: bool) -> None:
        self._check_compiler()
        cores = [machine.core(i) for i in range(len(machine.start()))]
        width = self.compiled.cores
        size = width if count == -1 else count
        if start == -1:
            starts = range(max(1, len(cores) - size + 1))
            start = min(starts, key=lambda at: sum(core.models for core in cores[at : at + size]))
        if size < width or start < 0 or start + size > len(cores):
            raise not_loaded(9)
        for at in range(start, start + size // width * width, width):
            _pass(machine.config.load_time * width, gil)
            try:
                self._replicas.append(Replica(self, cores[at : at + width]))
            except RuntimeError:
                while self._replicas:
                    self._replicas.pop().free()
                raise

    def _check_compiler(self) -> None:
        family, lnc = self.compiled.family, self.compiled.lnc
        if family != machine.config.family and os.environ.get("NEURON_RT_ALLOW_LEGACY_NEFF", "FALSE") == "FALSE":
            raise not_loaded(10)
        if lnc != machine.lnc:
            log(
                "nrt_load Mismatch detected between Runtime configuration and NEFF: "
                f"compiled with lnc={lnc}, NEURON_LOGICAL_NC_CONFIG={machine.lnc}"
            )
            raise not_loaded(2)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One call: as many device runs as its rows need. The replicas take turns, one call each."""
        machine.start()
        if self._loader:
            self._loader.join()
        if self.failed:
            raise self.failed
        compiled = self.compiled
        values, weights = inputs[: len(compiled.shapes)], inputs[len(compiled.shapes) :]
        batches = list(self._batches(values))
        with self._lock:
            if not self._replicas:
                self._place(*self.wish, gil=False)
        replica = self._replicas[next(self._turns) % len(self._replicas)]
        local = machine.start().index(replica.cores[0].id)
        if weights and self.weights_on is None:
            machine.slow_copies += 1
        elif weights and self.weights_on != local:
            raise RuntimeError(
                f"Tensor input{len(values)} allocated on vnc {self.weights_on} "
                f"must be allocated on same vnc as model ({local})"
            )
        pieces = [replica.run(batch, weights, rows, local) for batch, rows in batches]
        return pieces[0] if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _batches(self, values: Sequence[torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], int]]:
        """Inputs of the compiled shapes, and the rows in each that a caller gave."""
        compiled = self.compiled
        dynamic = self.option(DYNAMIC)
        if dynamic and len({value.shape[:1] for value in values}) > 1:
            raise RuntimeError("Inconsistent batch sizes found on inputs")
        for i, (value, shape, dtype) in enumerate(zip(values, compiled.shapes, compiled.dtypes, strict=True)):
            size = tuple(value.shape)
            fits = dynamic and len(size) == len(shape) > 0 and size[0] > 0 and size[1:] == shape[1:]
            if size != shape and not fits:
                raise RuntimeError(f"Incorrect shape of input {i}: received {list(size)}, expected {list(shape)}")
            if value.dtype != dtype:
                raise RuntimeError(f"Incorrect type of input {i}: received {value.dtype}, expected {dtype}")
        if not dynamic:
            yield list(values), values[0].shape[0] if values and values[0].dim() else 1
            return
        rows, batch = values[0].shape[0], compiled.shapes[0][0]
        for begin in range(0, rows, batch):
            cut = [value[begin : begin + batch] for value in values]
            missing = batch - len(cut[0])
            if missing:
                cut = [torch.cat([value, value.new_zeros((missing, *value.shape[1:]))]) for value in cut]
            yield cut, batch - missing


class Replica:
    """A model on its cores: one, but for a model that was compiled for more."""

    def __init__(self, model: Model, cores: list[Core]) -> None:
        self._size = model.buffer_size // len(cores)
        self._compiled = model.compiled
        self._batch = model.compiled.shapes[0][0] if model.compiled.shapes and model.compiled.shapes[0] else 1
        with _device_modes():
            self._graph = unpatched_load(io.BytesIO(model.compiled.graph))
        self.cores = cores
        with machine.loading:
            for core in cores:
                if core.load_fails or core.used + self._size > machine.config.memory:
                    raise not_loaded(core.load_fails or 4)
            for core in cores:
                core.used += self._size
                core.models += 1
                core.loads += 1

    def free(self) -> None:
        for core in self.cores:
            core.used -= self._size
            core.models -= 1
            core.unloads += 1

    def run(
        self, inputs: list[torch.Tensor], weights: Sequence[torch.Tensor], rows: int, local: int
    ) -> list[torch.Tensor]:
        """One device run of exactly the compiled shapes; blocks without the GIL, one at a time on a core."""
        config = machine.config
        _pass(config.copy_time)
        with contextlib.ExitStack() as turns:
            for core in self.cores:
                turns.enter_context(core.turn)
            end = time.monotonic() + config.service_time
            machine.executions.append(Execution(self.cores[0].id, local, rows))
            for core in self.cores:
                core.strike()
            outputs = self._answer(inputs, weights)
            _pass(end - time.monotonic())
        if any(output.is_floating_point() and output.isnan().any() for output in outputs):
            raise failure(1003)
        if rows < self._batch:
            outputs = [output[:rows] for output in outputs]
        return [output.clone() for output in outputs]

    def _answer(self, inputs: list[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        compiled = self._compiled
        with _device_modes():
            if weights:
                self._graph.load_state_dict(dict(zip(compiled.weights, weights, strict=True)), strict=False)
            args = rebuild(compiled.inputs, [inputs[i] for i in compiled.first])
            try:
                return tensors(self._graph(*args))
            except Exception as error:
                raise failure(1006 if "index out of range" in str(error) else 1002) from error


@contextlib.contextmanager
def _device_modes() -> Iterator[None]:
    """A device knows nothing of the calling thread's modes."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _pass(seconds: float, gil: bool = False) -> None:
    """Let time pass, without the GIL or, as `torch.jit.load` does, with it."""
    if seconds > 0 and gil:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    elif seconds > 0:
        time.sleep(seconds)


def device_side(buffer: torch.Tensor) -> Any:
    """What hangs on this buffer: torch keeps its Python object as long as the tensor lives, and copies none of it."""
    with _creating:
        if not hasattr(buffer, "_device_side"):
            buffer._device_side = Model(buffer)
        return buffer._device_side


def parts(module: Any) -> list[torch.jit.ScriptModule]:
    """The traced parts of a module, in its order; none in a module that is not traced for Neuron."""
    return [each for each in module.modules() if isinstance(each, torch.jit.ScriptModule) and _is_part(each)]


def _is_part(module: torch.jit.ScriptModule) -> bool:
    buffer = dict(module.named_buffers(recurse=False)).get("model")
    if buffer is None or buffer.dtype != torch.uint8 or buffer.dim() != 1:
        return False
    return bytes(buffer[3:HEAD].tolist()) == MAGIC


def models(module: Any) -> list[Model]:
    return [device_side(part.model) for part in parts(module)]
