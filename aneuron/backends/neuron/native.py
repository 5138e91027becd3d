"""TorchNeuron, the native device: eager or compiled PyTorch models on `neuron:i`.

Lives here: loading such a model, running it and waiting for it. Must not be here: traced models (placement.py).

The device: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/frameworks/torch/pytorch-native-overview.html.
"""

import copy
from typing import Any

import torch

from aneuron.backends.neuron.placement import is_neuron
from aneuron.tensors.nested import fill, walk


def load(device: Any, model: Any, core_id: int, compiled: bool) -> "NativeModel":
    """A copy of the model on a core. `device` is `torch.neuron`."""
    if is_neuron(model):
        raise ValueError(
            "the model was traced with torch_neuronx (SDK up to 2.31), and the one installed here has a native device "
            "instead; pass the module that was traced, or install the SDK that it was traced with"
        )
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model={model!r:.80}: the native device takes an nn.Module, not TorchScript, nor a function")
    call: Any = copy.deepcopy(model).to(f"neuron:{core_id}")
    if compiled:
        call = torch.compile(call, backend="neuron", dynamic=False)
    return NativeModel(device, call, core_id)


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
