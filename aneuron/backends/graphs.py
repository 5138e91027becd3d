"""What the runtimes of graphs have in common, OpenVINO and ONNX Runtime: a model that says itself what it takes.

Lives here: declared inputs and what a call gives for them, the rows that they fix, one loaded graph for several cores,
how a missing package is said. Must not be here: a runtime's own names, devices, who runs when.
"""

import importlib.metadata
import importlib.util
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from aneuron.backends.cpu import CpuBackend
from aneuron.errors import ShapeError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Input:
    """What a graph says of one of its inputs."""

    name: str
    type: str  # in the runtime's words
    dtype: torch.dtype | None  # None: torch has no such type
    shape: tuple[int | None, ...] | None  # None: any number of dims, or of elements along one

    def __str__(self) -> str:
        sizes = "any shape" if self.shape is None else str(tuple(each or "any" for each in self.shape)).replace("'", "")
        return f"{self.name!r}: {self.dtype or self.type} {sizes}"

    def tensor(self, value: Any) -> torch.Tensor:
        """What a call gives, as a tensor that fits; a number stands for an input that has one element.

        Raises `ShapeError`: runtimes cast silently, or say in many words what does not fit.
        """
        if isinstance(value, (bool, int, float)) and self._takes(value):
            return torch.full([1] * len(self.shape or ()), value, dtype=self.dtype)
        if not isinstance(value, torch.Tensor):
            raise ShapeError(f"{value!r:.80} is given for {self}; pass a tensor")
        shape, declared = tuple(value.shape), self.shape
        if value.dtype != self.dtype:
            raise ShapeError(f"a tensor of dtype {value.dtype} is given for {self}; pass x.to({self.dtype})")
        if declared is not None and (
            len(shape) != len(declared) or any(of not in (None, have) for have, of in zip(shape, declared, strict=True))
        ):
            raise ShapeError(f"a tensor of shape {shape} is given for {self}")
        return value

    def _takes(self, number: bool | int | float) -> bool:
        if self.dtype is None or self.shape is None or any(size not in (None, 1) for size in self.shape):
            return False
        if isinstance(number, bool) or self.dtype is torch.bool:
            return isinstance(number, bool) and self.dtype is torch.bool
        return isinstance(number, int) or self.dtype.is_floating_point


def bind(inputs: Sequence[Input], args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """A tensor for each input: positional arguments in the order of the inputs, the others by name.

    Raises `ShapeError`.
    """
    names = [each.name for each in inputs]
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys() or given.keys() | kwargs.keys() != set(names):
        said = [f"{len(args)} by position"] * bool(args) + [repr(name) for name in kwargs]
        raise ShapeError(f"the model takes {listed(inputs)}; this call gives {', '.join(said) or 'none'}")
    given |= kwargs
    return [each.tensor(given[each.name]) for each in inputs]


def listed(inputs: Sequence[Input]) -> str:
    """Inputs in words."""
    return f"{len(inputs)} input{'s' * (len(inputs) != 1)} ({'; '.join(map(str, inputs))})"


def rows_of(inputs: Sequence[Input]) -> int | None:
    """The rows that a graph was made for: those that all its inputs have along their first dim."""
    first = {each.shape[0] if each.shape else None for each in inputs if each.shape != ()}
    return first.pop() if len(first) == 1 else None


def named(outputs: Sequence[Any], names: Sequence[str]) -> Any:
    """What a call gets: the output if there is one, else all of them by name."""
    return outputs[0] if len(outputs) == 1 else dict(zip(names, outputs, strict=True))


class VirtualCores:
    """Virtual cores of this machine's CPUs, as many and with as many threads as those of `CpuBackend`."""

    package: str  # that is imported
    extra: str  # that installs it
    title: str  # what it is called
    name: str

    def __init__(self, cores: int | None, threads_per_core: int | None) -> None:
        self._cpu = CpuBackend(cores, threads_per_core)

    def cores(self) -> Sequence[int]:
        """As many as were asked for. Raises `ModuleNotFoundError` where the package is missing, saying which."""
        if not is_installed(self.package):
            raise ModuleNotFoundError(f"backend={self.name!r} needs {self.title}: {self._install}", name=self.package)
        return self._cpu.cores()

    def report(self) -> dict[str, object]:
        """What there is, why, and what is missing; imports nothing."""
        if not is_installed(self.package):
            why, lacks = f"{self.title} is not installed", [f"{self.title}: {self._install}"]
            return {"found": False, "cores": 0, "why": why, "lacks": lacks}
        cpu = self._cpu.report()
        return {**cpu, "why": f"{self.title}{_version(self.package)}; {cpu['why']}"}

    @property
    def _install(self) -> str:
        return f"pip install 'aneuron[{self.extra}]'"


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> str:
    try:
        return f" {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # of another distribution: onnxruntime-gpu
        return ""


def file_identity(model: str | os.PathLike[str]) -> Hashable:
    """Equal for files that have not changed: the one at a path, and that of its weights if it is OpenVINO's."""
    path = os.path.abspath(os.fspath(model))
    files = [os.stat(each) for each in (path, os.path.splitext(path)[0] + ".bin") if os.path.exists(each)]
    return path, *((file.st_mtime_ns, file.st_size) for file in files)


class Unreadable(ValueError):
    """A model that a runtime cannot load: another core could not either."""

    def __init__(self, model: Any, title: str, error: Exception, hint: str) -> None:
        what = os.fspath(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
        super().__init__(f"model={what!r}: {title} cannot load it{hint}: {str(error).strip()}")


class Held(Generic[T]):
    """A graph that is loaded, and whose it is."""

    def __init__(self, graph: T) -> None:
        self.graph = graph
        self.users: set[Hashable] = set()


class Sharing(Generic[T]):
    """What is loaded, by what it was made of. Weights are there once for as many cores as load them in turn.

    A core that comes again for what it has already gets another one: it is another start, or a swap, and a file or a
    module may have changed since.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: weakref.WeakValueDictionary[Hashable, Held[T]] = weakref.WeakValueDictionary()

    def take(self, key: Hashable, user: Hashable, load: Callable[[], T]) -> Held[T]:
        """What another user has loaded, or what `load` makes. One is loaded at a time."""
        with self._lock:
            found = self._latest.get(key)
            if found is None or user in found.users:
                found = self._latest[key] = Held(load())
            found.users.add(user)
            return found

    def leave(self, held: Held[T], user: Hashable) -> None:
        """A user is done with it."""
        with self._lock:
            held.users.discard(user)
