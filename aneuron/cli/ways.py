"""Ways to serve a model: the backend with its dtype, cores and threads, and what is done about lengths.

Lives here: which ways there are on this machine, one axis after the other, why others are not tried, how each is
written. Must not be here: measuring (trials.py), arguments (tune.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import aneuron

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Way:
    """How a model is served, but for sizes and slots. `cores` and `threads`: None for what the backend has."""

    backend: str
    cores: int | None = None
    threads: int | None = None
    dtype: str | None = None  # None: the model's own
    buckets: aneuron.Buckets | None = None

    @property
    def lengths(self) -> str:
        """What is done about them, in words for a table."""
        if self.buckets is None:
            return "as they are"
        return "free" if self.buckets.free else "buckets " + ",".join(map(str, self.buckets.sizes))

    def settings(self) -> dict[str, Any]:
        """The arguments of `AsyncDataParallel`."""
        found: dict[str, Any] = {} if self.backend == "auto" else {"backend": self.backend}
        if self.backend in _MADE:
            found = {"backend": _MADE[self.backend](self)}
        if self.cores and self.backend not in VIRTUAL:
            found["device_ids"] = range(self.cores)
        return found if self.buckets is None else {**found, "buckets": self.buckets}

    def written(self) -> list[str]:
        """The same in Python."""
        return [f"{name}={_written(value)}" for name, value in self.settings().items()]


Untried = dict[Way, str]  # and why


def _dtype(way: Way) -> torch.dtype | None:
    return getattr(torch, way.dtype) if way.dtype else None


_MADE: dict[str, Callable[[Way], Any]] = {
    "cpu": lambda way: aneuron.CpuBackend(way.cores, way.threads, dtype=_dtype(way)),
    "cuda": lambda way: aneuron.CudaBackend(dtype=_dtype(way)),
    "openvino": lambda way: aneuron.OpenVinoBackend(
        way.cores, way.threads, precision="bf16" if way.dtype == "bfloat16" else "f32"
    ),
    "onnx": lambda way: aneuron.OnnxBackend(way.cores, way.threads),
}
VIRTUAL = ("cpu", "openvino", "onnx")  # cores are so many as are asked for


def cpus() -> int:
    """As many as this process may use."""
    return len(aneuron.CpuBackend().cores())


def first(backend: str, model: Any, cores: int | None) -> Way:
    """The way that is tried first: the model in its own dtype, on what "auto" means for it here."""
    if backend == "auto":
        backend = _automatic(model)
        if backend in VIRTUAL and cores is not None and cores > cpus():
            raise ValueError(
                f"--cores {cores}: outside the cores that this process sees, {cpus()}; with --backend {backend} there "
                "are as many as are asked for"
            )
    dtype = "float32" if backend == "openvino" else None
    if backend not in VIRTUAL or cores is not None:
        return Way(backend, cores, dtype=dtype)
    return Way(backend, cpus(), 1, dtype)


def is_module(model: Any) -> bool:
    """Whether it is one that can be looked into, in Python."""
    return isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def plain(way: Way, model: Any) -> Way:
    """What answers are compared with: the model on one core, in its own dtype, where it came from."""
    converted = way.backend == "openvino" and isinstance(model, torch.nn.Module)
    return Way("cpu" if converted else way.backend, 1)


def _automatic(model: Any) -> str:
    """What "auto" means where that leaves a choice of ways, else "auto"."""
    if isinstance(model, str) and model.endswith((".onnx", ".xml")):
        return "onnx" if model.endswith(".onnx") and _found(aneuron.OnnxBackend()) else "openvino"
    if not isinstance(model, (str, torch.nn.Module)):
        return "cpu" if not isinstance(model, torch.export.ExportedProgram) else "auto"
    if _found(aneuron.NeuronBackend()):
        return "auto"
    return "cuda" if _found(aneuron.CudaBackend()) else "cpu"


def _found(backend: Any) -> bool:
    return bool(backend.report()["found"])


def by_length(way: Way, dim: int, lengths: Sequence[int]) -> list[Way]:
    """Calls of equal length together; four buckets, each for a quarter of the calls; any length."""
    known = sorted(lengths)
    quarters = [known[-(-len(known) * part // 4) - 1] for part in (1, 2, 3)]
    sizes = sorted({min(-(-size // 8) * 8, known[-1]) for size in quarters} | {known[-1]})
    choices = (aneuron.Buckets(dim=dim, sizes=sizes), aneuron.Buckets(dim=dim, max=known[-1]))
    return [way, *(replace(way, buckets=buckets) for buckets in choices)]


def by_engine(way: Way, model: Any, asked: str, dtypes: Sequence[str] | None) -> tuple[list[Way], Untried]:
    """Other dtypes and other backends; those that nothing here runs natively are tried only if they are named."""
    untried: Untried = {}
    named = dtypes or HALF
    if way.backend == "cpu":
        found = [replace(way, dtype=dtype) for dtype in named if isinstance(model, (str, torch.nn.Module))]
        if asked == "auto" and isinstance(model, torch.nn.Module):
            found += _openvino(way, named)
    elif way.backend == "cuda":
        found = [replace(way, dtype=dtype) for dtype in named]
    elif way.backend == "openvino":
        found = _openvino(way, named)
    else:
        found = _openvino(way, named) if way.backend == "onnx" and asked == "auto" else []
    for each in found:
        if each.backend == "openvino" and not _found(aneuron.OpenVinoBackend()):
            untried[each] = "OpenVINO is not installed: pip install 'aneuron[openvino]'"
        elif each.backend in VIRTUAL and each.dtype in HALF and dtypes is None and not _native(each.dtype):
            untried[each] = f"this CPU has no instructions for it (--dtypes {each.dtype} tries it)"
    return [way, *(each for each in found if each not in untried and each != way)], untried


def _openvino(way: Way, dtypes: Sequence[str]) -> list[Way]:
    half = [replace(way, backend="openvino", dtype="bfloat16")] if "bfloat16" in dtypes else []
    return [replace(way, backend="openvino", dtype="float32"), *half]


def _native(dtype: str) -> bool:
    precision = aneuron.CpuBackend(dtype=getattr(torch, dtype)).computes_in
    return precision is not None and precision.native is True


def by_cores(way: Way, cores: int | None, number: int) -> list[Way]:
    """CPUs divided into cores of one thread, into one core with all, and midway; not where the user said how many."""
    if way.backend not in VIRTUAL or cores is not None:
        return [way]
    middle = 1 << (number.bit_length() // 2)
    split = dict.fromkeys((way.cores, 1, middle) if number >= 4 else (way.cores, 1))
    return [replace(way, cores=each, threads=number // each) for each in split if each is not None]


def _written(value: Any) -> str:
    if isinstance(value, aneuron.Buckets):
        which = f"max={value.max}" if value.free else f"sizes={value.sizes}"
        return f"aneuron.Buckets(dim={value.dim}, {which})"
    return repr(value) if isinstance(value, (str, range)) else f"aneuron.{value!r}"
