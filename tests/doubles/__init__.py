"""Doubles of the Neuron packages, for tests without the hardware: README.md says what they model.

`with doubles.neuronx(cores=4) as machine:` has `import torch_neuronx` find the double, on a machine of its own.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doubles.hardware import Config, Machine, build, machine

HERE = Path(__file__).parent
__all__ = ["Config", "build", "machine", "neuron", "neuronx"]
PACKAGES = ("torch_neuronx", "torch_neuron")


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


@contextlib.contextmanager
def _installed(flavour: str, config: dict[str, Any]) -> Iterator[Machine]:
    import torch  # here, for processes that only need the machine

    from doubles import tracing

    machine.reset(Config(**config))
    sys.path.insert(0, str(HERE / flavour))
    _forget()
    try:
        yield machine
    finally:
        sys.path.remove(str(HERE / flavour))
        _forget()
        tracing.uninstall()
        if "doubles.device" in sys.modules:
            sys.modules["doubles.device"].uninstall()
        vars(torch.classes.neuron).pop("Runtime", None)
        vars(torch).pop("neuron", None)
        machine.reset(Config())


def neuronx(**config: Any) -> contextlib.AbstractContextManager[Machine]:
    """torch_neuronx up to 2.9, which traces; arguments are those of `Config`."""
    return _installed("neuronx", config)


def neuron(**config: Any) -> contextlib.AbstractContextManager[Machine]:
    """The legacy torch_neuron, which `torch.neuron` is too; an inf1.xlarge unless told otherwise."""
    return _installed("neuron", {"cores_per_chip": 4, "family": "inf1", **config})


@contextlib.contextmanager
def native(**config: Any) -> Iterator[Machine]:
    """TorchNeuron, torch_neuronx 2.14.3; it is there without an import, as the real one is.

    Needs `doubles.device.available`.
    """
    with _installed("native", {"cores_per_chip": 8, "lnc": 2, "cores": 8, "family": "trn2", **config}) as machine:
        importlib.import_module("torch_neuronx")
        yield machine
