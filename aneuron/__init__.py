"""aneuron: await a PyTorch model that runs on many cores.

This is the front door; what is not exported here may move.
"""

import aneuron._native  # noqa: F401 - first: it decides what the others are imported from
from aneuron.backends import Backend, Core, Fault
from aneuron.backends.cpu import CpuBackend
from aneuron.backends.cuda import CudaBackend
from aneuron.backends.neuron import NeuronBackend
from aneuron.backends.onnx import OnnxBackend
from aneuron.backends.openvino import OpenVinoBackend
from aneuron.backends.simulated import SimulatedBackend
from aneuron.errors import (
    AneuronError,
    Closed,
    CoreFailed,
    DeadlineExceeded,
    DeviceError,
    InputModified,
    NoHealthyCores,
    OutputError,
    QueueFull,
    ShapeError,
)
from aneuron.map.window import Map
from aneuron.observing import Observer
from aneuron.options import View
from aneuron.parallel import AsyncDataParallel
from aneuron.pool import Pool
from aneuron.sched.room import Work
from aneuron.signature import Signature, TensorSpec
from aneuron.stats import (
    CallStatistics,
    CoreStatistics,
    EngineStatistics,
    Histogram,
    PoolStatistics,
    ShareStatistics,
    Statistics,
    Timing,
)
from aneuron.tensors.buckets import Buckets
from aneuron.tensors.marked import Rows, Shared

__all__ = [
    "AneuronError",
    "AsyncDataParallel",
    "Backend",
    "Buckets",
    "CallStatistics",
    "Closed",
    "Core",
    "CoreFailed",
    "CoreStatistics",
    "CpuBackend",
    "CudaBackend",
    "DeadlineExceeded",
    "DeviceError",
    "EngineStatistics",
    "Fault",
    "Histogram",
    "InputModified",
    "Map",
    "NeuronBackend",
    "NoHealthyCores",
    "Observer",
    "OnnxBackend",
    "OpenVinoBackend",
    "OutputError",
    "Pool",
    "PoolStatistics",
    "QueueFull",
    "Rows",
    "ShapeError",
    "ShareStatistics",
    "Shared",
    "Signature",
    "SimulatedBackend",
    "Statistics",
    "TensorSpec",
    "Timing",
    "View",
    "Work",
]

for _name in __all__:
    globals()[_name].__module__ = "aneuron"  # tracebacks say aneuron.QueueFull
