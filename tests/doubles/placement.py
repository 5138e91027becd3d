"""Which cores: `Runtime`, and the functions and contexts that place a traced module.

Must not be here: what loading does (compiled.py), how cores are taken from other processes (hardware.py).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from doubles.compiled import models
from doubles.hardware import NOT_STARTED, machine


class Runtime:
    """`torch.classes.neuron.Runtime`. Whatever asks for a number starts the runtime, and so takes the cores."""

    def initialize(self) -> None:
        machine.start()

    def unsafe_close(self) -> None:
        machine.close()

    def get_nc_count(self) -> int:
        try:
            return len(machine.start())
        except RuntimeError:
            return -1

    def get_visible_nc_count(self) -> int:
        return len(machine.start())

    def get_default_start_nc(self) -> int:
        return machine.default[0]

    def get_default_nc_count(self) -> int:
        return machine.default[1]

    def set_default_neuron_cores(self, start: int, count: int) -> None:
        machine.default = (start, count)


def _check_count(nc_count: int) -> None:
    available = Runtime().get_nc_count()
    if available == -1:
        raise RuntimeError(NOT_STARTED)
    if nc_count == 0 or nc_count < -1:
        raise ValueError(f"Invalid NeuronCore count nc_count={nc_count}: expected -1 or a positive number")
    if nc_count > available:
        raise ValueError(f"Invalid NeuronCore count nc_count={nc_count}: {available} NeuronCores are available")


def set_neuron_cores(trace: Any, start_nc: int = -1, nc_count: int = -1) -> None:
    _check_count(nc_count)
    for model in models(trace):
        model.place(start_nc, nc_count)


def set_multicore(trace: Any) -> None:
    set_neuron_cores(trace, 0, Runtime().get_visible_nc_count())


@contextlib.contextmanager
def neuron_cores_context(start_nc: int = -1, nc_count: int = -1) -> Iterator[None]:
    """Changes the default of the process, not of the thread: two at once get each other's cores."""
    _check_count(nc_count)
    runtime = Runtime()
    before = runtime.get_default_start_nc(), runtime.get_default_nc_count()
    runtime.set_default_neuron_cores(start_nc, nc_count)
    try:
        yield
    finally:
        runtime.set_default_neuron_cores(*before)


@contextlib.contextmanager
def multicore_context() -> Iterator[None]:
    with neuron_cores_context(0, Runtime().get_visible_nc_count()):
        yield


NAMES = (set_neuron_cores, set_multicore, neuron_cores_context, multicore_context)
