"""The double of the legacy torch_neuron (Inf1), which `torch.neuron` is too. What it models: ../../README.md."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[3]))  # a process of its own may have only this package's directory

from doubles import data_parallel, placement, tracing

__all__ = ["DataParallel", "experimental", "trace"]
__version__ = "1.13.1.2.11.0"


def trace(
    func: Any,
    example_inputs: Any,
    dynamic_batch_size: bool = False,
    compiler_args: Sequence[str] = (),
    **unused: Any,
) -> Any:
    traced = tracing.compile_model(func, example_inputs, inline_weights=True, flags=compiler_args)
    return tracing.dynamic_batch(traced, dynamic_batch_size)


class DataParallel(data_parallel.DataParallel):
    always_copies = True

    def __init__(self, model: Any, device_ids: Sequence[int | str] | None = None, dim: int = 0) -> None:
        super().__init__(model, device_ids, dim)


experimental = ModuleType("torch_neuron.experimental")
sys.modules[experimental.__name__] = experimental
for _function in placement.NAMES:
    setattr(experimental, _function.__name__, _function)

tracing.install()
torch.classes.neuron.Runtime = placement.Runtime
torch.neuron = sys.modules[__name__]
