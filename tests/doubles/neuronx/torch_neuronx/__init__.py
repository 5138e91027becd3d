"""The double of torch_neuronx: put the directory above this one on sys.path. What it models: ../../README.md."""

import sys
from pathlib import Path
from types import ModuleType

import torch

sys.path.append(str(Path(__file__).parents[3]))  # a process of its own may have only this package's directory

from doubles import placement, tracing
from doubles.data_parallel import DataParallel
from doubles.hardware import machine
from doubles.tracing import async_load, dynamic_batch, lazy_load, move_trace_to_device, replace_weights, trace

__all__ = [
    "DataParallel",
    "async_load",
    "dynamic_batch",
    "experimental",
    "lazy_load",
    "move_trace_to_device",
    "replace_weights",
    "trace",
]
__version__ = "2.9.0.2.15.0"

tracing.install()
torch.classes.neuron.Runtime = placement.Runtime

experimental = ModuleType("torch_neuronx.experimental")
experimental.placement = ModuleType("torch_neuronx.experimental.placement")
sys.modules.update({module.__name__: module for module in (experimental, experimental.placement)})
_where = {
    "top": sys.modules[__name__],
    "experimental": experimental,
    "experimental.placement": experimental.placement,
}[machine.config.placement]
for _function in placement.NAMES:
    setattr(_where, _function.__name__, _function)
