"""TorchScript: files, and models on their way to another process.

Lives here: loading a file, without the warning that it is deprecated, and what pickle takes in place of a script. Must
not be here: which device, which core, what is kept.
"""

import copy
import importlib
import io
import sys
from collections.abc import Mapping
from typing import Any

import torch

from aneuron.backends.exported import Saved, is_program
from aneuron.backends.unwarned import unwarned

CLASSES = "torch_neuronx", "torch_neuron"  # packages without which torch.jit.load does not know what they have traced


def load_script(file: Any, **settings: Any) -> torch.nn.Module:
    """`torch.jit.load`, without its warning: users are told of TorchScript's end when they make a file, not here."""
    with unwarned():
        return torch.jit.load(file, **settings)  # type: ignore[no-any-return,no-untyped-call]


class Script:
    """Holds a script, which can be copied but not pickled: it is pickled as `torch.jit.save` writes it."""

    def __init__(self, script: Any) -> None:
        self.held = script

    def __deepcopy__(self, memo: dict[int, Any]) -> "Script":
        return Script(copy.deepcopy(self.held, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        with unwarned():
            torch.jit.save(self.held, file)
        return _read, (file.getvalue(), [name for name in CLASSES if name in sys.modules])


def _read(saved: bytes, packages: list[str]) -> Script:
    for name in packages:
        importlib.import_module(name)
    return Script(load_script(io.BytesIO(saved)))


def held(model: Any) -> Any:
    """What the user gave as the model, with its scripts and exported programs held for pickle."""
    if isinstance(model, Mapping):
        return {key: held(each) for key, each in model.items()}
    if is_program(model):
        return Saved(model)
    return Script(model) if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)) else model


def released(model: Any) -> Any:
    """The opposite of `held`."""
    if isinstance(model, Mapping):
        return {key: released(each) for key, each in model.items()}
    return model.held if isinstance(model, (Script, Saved)) else model
