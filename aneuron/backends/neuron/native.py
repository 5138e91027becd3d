"""TorchNeuron, the native device: eager or compiled PyTorch models on `neuron:i`.

Lives here: loading such a model, compiling it, running it and waiting for it. Must not be here: traced models
(placement.py).

The device: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/torch/about-pytorch-neuron.html, its compiler:
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/torch/compile/reference-torch-compile.html.
"""

import copy
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch

from aneuron.backends.neuron.faults import cause
from aneuron.backends.neuron.placement import is_neuron
from aneuron.tensors.nested import fill, walk

_ONE_PROGRAM = (
    "aneuron: torch.compile(backend='neuron', fullgraph=True) makes one program of the whole forward, for fixed "
    "shapes: no .item(), no `if` on the values of a tensor, no shapes that depend on values. NeuronBackend() without "
    "compile=True runs it operation by operation"
)


def load(device: Any, model: Any, core_id: int, compiled: bool) -> "NativeModel":
    """A copy of the model on a core. `device` is `torch.neuron`."""
    if is_neuron(model):
        raise ValueError(
            "the model was traced with torch_neuronx (up to 2.9), and the one installed here has a native device "
            "instead; pass the module that was traced, or install the package that it was traced with"
        )
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model={model!r:.80}: the native device takes an nn.Module, not TorchScript, nor a function")
    module = copy.deepcopy(model).to(f"neuron:{core_id}")
    return NativeModel(device, Programs(module) if compiled else module, core_id)


class Programs:
    """A module, compiled for every shape that it is called with: at its first call with it, which takes minutes.

    torch keeps what it compiles with the code that it is compiled from, and takes eight programs of a code (256 from
    all calls of `torch.compile`): too few for a module whose copies on all cores have one code. So every program has
    its own.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program for these shapes. A `RuntimeError` of compiling has a note."""
        kwargs = dict(sorted(kwargs.items()))  # one program for all orders of them
        key = _key((args, kwargs))
        program = self._programs.get(key)
        if program is not None:
            return program(*args, **kwargs)
        program = torch.compile(_with_own_code(self._module), backend="neuron", fullgraph=True, dynamic=False)
        try:
            output = program(*args, **kwargs)
        except RuntimeError as error:
            if cause(error) is None:
                error.add_note(_ONE_PROGRAM)
            raise
        self._programs[key] = program
        return output


def _key(value: Any) -> Hashable:
    """Equal for calls that one program answers: the shapes and dtypes of their tensors, and all else."""
    leaves: list[Any] = []
    key: list[Any] = []
    walk(value, leaves, key, [])
    return *key, *((leaf.shape, leaf.dtype) for leaf in leaves)


def _with_own_code(module: torch.nn.Module) -> Callable[..., Any]:
    def program(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return FunctionType(program.__code__.replace(), program.__globals__, None, None, program.__closure__)


class NativeModel:
    """A model on the device, to be called with host tensors and from any thread. Returns host tensors."""

    def __init__(self, device: Any, model: Any, core_id: int) -> None:
        self._device, self._model, self._core_id = device, model, core_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and wait for it without the GIL."""
        self._device.set_device(self._core_id)  # the current device is a thread's
        try:
            args, kwargs = _on((args, kwargs), f"neuron:{self._core_id}")
            output = self._model(*args, **kwargs)
        finally:
            # Operations return before they are done. After an error, too: their failure is not the next caller's.
            self._device.current_stream().record_event().synchronize()
        return _on(output, "cpu")


def _on(value: Any, device: str) -> Any:
    """A structure with its tensors on a device. A host tensor that is sent may be written to at once."""
    leaves: list[Any] = []
    walk(value, leaves, [], [])
    moved = [
        leaf.to(device, non_blocking=device != "cpu") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    ]
    return fill(value, iter(moved))
