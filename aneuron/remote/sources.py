"""A model on its way into an engine: the path of a file, an import string, or what pickle takes.

Lives here: what is carried, where its weights lie meanwhile, how it is told from another. Must not be here: sockets,
processes, what a model is made of on a core (backends/).
"""

import ctypes
import hashlib
import importlib
import inspect
import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aneuron.backends.exported import is_program
from aneuron.backends.torchscript import Script, held, released
from aneuron.remote.control import Fd
from aneuron.remote.memory import nameless
from aneuron.remote.starting import names_main

_IMPORT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)
INSTEAD = (
    "pass the path of a file, an import string 'module:attribute' of a module or of a function that makes it, or what "
    "is defined at the top level of a module that can be imported"
)


@dataclass(frozen=True)
class Source:
    """What was given as a model, in a form that another process can open.

    `given`: a path, an import string, or None for what lies in `saved`; or a mapping of these, as models by size are
    given. `saved` is a file in memory with all modules together, so that what they share stays shared: a process that
    opens it maps the weights, which exist once for all. It is to be held by who may have to open it again.
    """

    given: Any
    saved: Fd | None = None
    needs_main: bool = False  # what was pickled is defined in the program itself
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of paths, when it was made: size, mtime
    fingerprint: str = ""
    text: str = ""  # for messages

    @classmethod
    def of(cls, model: Any, *, fingerprint: bool = False) -> "Source":
        """Read what the user gave. Reads all weights: not for the loop's thread.

        fingerprint: whether it will be compared with another process's.

        Raises `TypeError` for what cannot be pickled.
        """
        files: dict[str, tuple[int, int]] = {}
        modules: dict[Any, Any] = {}

        def read(key: Any, each: Any) -> Any:
            if isinstance(each, (str, os.PathLike)):
                return _located(os.fspath(each), files)
            modules[key] = each
            return None

        if isinstance(model, Mapping):
            given: Any = {key: read(key, each) for key, each in model.items()}
        else:
            given = read(None, model)
        saved, needs_main = _save(modules) if modules else (None, False)
        mark = _fingerprint((given, files, held(modules))) if fingerprint else ""
        return cls(given, saved, needs_main, files, mark, " ".join(repr(model).split())[:80])

    def open(self) -> Any:
        """The model, in the process that is to run it. Runs what it was pickled to, or its import string names.

        Raises `ValueError` for a file that was replaced meanwhile, and for an import string that names nothing.
        """
        for path, stamp in self.files.items():
            if _stamp(path) != stamp:
                raise ValueError(
                    f"model={path!r}: the file was replaced since the model was given; the engines would serve "
                    "different ones. Write a new file under another name, and swap to that"
                )
        modules = _read(self.saved) if self.saved is not None else {}

        def opened(key: Any, each: Any) -> Any:
            if each is None:
                return modules[key]
            return _imported(each) if is_import(each) and each not in self.files else each

        if isinstance(self.given, Mapping):
            return {key: opened(key, each) for key, each in self.given.items()}
        return opened(None, self.given)


def is_import(given: Any) -> bool:
    """Whether what was given as a model is an import string, "module:attribute".

    >>> is_import("nets.small:make"), is_import("models/net.pt"), is_import("net.pt")
    (True, False, False)
    """
    return isinstance(given, str) and _IMPORT.fullmatch(given) is not None and not os.path.exists(given)


# Paths.


def _located(path: str, files: dict[str, tuple[int, int]]) -> str:
    """A path that means the same elsewhere; what names no file is left to the backend."""
    if not os.path.exists(path):
        return path
    path = os.path.abspath(path)
    files[path] = _stamp(path)
    return path


def _stamp(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


# Import strings.


def _imported(text: str) -> Any:
    """What an import string names, or makes."""
    name, _, attributes = text.partition(":")
    try:
        found: Any = importlib.import_module(name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model={text!r}: {type(error).__name__}: {error}; an import string is 'module:attribute', looked for on "
            "the sys.path of the program"
        ) from error
    return found() if is_factory(found) else found


def is_factory(found: Any) -> bool:
    """Whether what an import string names makes the model: a class, or a function that is callable without arguments.

    >>> is_factory(torch.nn.ReLU), is_factory(lambda size=8: ...), is_factory(lambda x: x), is_factory(torch.nn.ReLU())
    (True, True, False, False)
    """
    if isinstance(found, type):
        return True
    if not callable(found) or isinstance(found, (torch.nn.Module, torch.jit.ScriptFunction)) or is_program(found):
        return False
    try:
        parameters = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):
        return False  # of C, as torch.neg is
    return all(
        each.kind is each.VAR_KEYWORD or (each.default is not each.empty and each.kind is not each.VAR_POSITIONAL)
        for each in parameters
    )


# Modules.


def _save(modules: Mapping[Any, Any]) -> tuple[Fd, bool]:
    """A file in memory with modules, and whether what they are is defined in the program itself."""
    fd = Fd(nameless("model"))
    try:
        with open(os.dup(fd.fileno()), "wb") as file:
            torch.save(held(modules), file)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        named = next(iter(modules.values())) if len(modules) == 1 else dict(modules)
        raise TypeError(
            f"model={named!r:.80} cannot be pickled ({type(error).__name__}: {error}), and engines are processes of "
            f"their own: {INSTEAD}"
        ) from error
    with open(os.dup(fd.fileno()), "rb") as saved, zipfile.ZipFile(saved) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        needs_main = names_main(archive.read(name))
    return fd, needs_main


def _read(saved: Fd) -> Any:
    """The modules in such a file. On Linux their weights are pages of it, copied where they are written to."""
    if sys.platform == "linux":
        return released(torch.load(f"/proc/self/fd/{saved.fileno()}", mmap=True, weights_only=False))
    with open(os.dup(saved.fileno()), "rb") as file:
        file.seek(0)
        return released(torch.load(file, weights_only=False))


# Telling one from another.


def digest(value: Any) -> str:
    """The same for equal values in every process: dicts in their order, sets in any, tensors by what they hold.

    Raises what pickle raises.

        >>> digest({"a": 1, "b": {"x", "y"}}) == digest({"a": 1, "b": {"y", "x"}})
        True
        >>> digest(torch.zeros(2)) == digest(torch.ones(2))
        False
    """
    return _fingerprint(value)


def _fingerprint(value: Any) -> str:
    file = io.BytesIO()
    _Canonical(file).dump(held(value))
    return hashlib.sha256(file.getvalue()).hexdigest()


_MANGLED = re.compile(rb"[./]?___torch_mangle_\d+")
_Pickler: Any = pickle._Pickler  # in Python, which can be told what to do


class _Canonical(_Pickler):  # type: ignore[misc]
    """Pickles equal values to equal bytes: what differs otherwise is the order of sets, which strings are the same
    object, and where weights lie.
    """

    dispatch: Any = _Pickler.dispatch.copy()

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._storages: dict[int, str] = {}

    def memoize(self, obj: Any) -> None:
        if not isinstance(obj, (str, bytes, int, float)):
            super().memoize(obj)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            obj = obj._untyped_storage
        if not isinstance(obj, torch.storage.UntypedStorage):
            return None
        key = obj.data_ptr() or -id(obj)
        if key not in self._storages:
            self._storages[key] = f"{len(self._storages)} {obj.device} {_contents(obj)}"
        return self._storages[key]

    def reducer_override(self, obj: Any) -> Any:
        """A script as what is in its file, but for the numbers that torch gives to classes as it meets them."""
        if not isinstance(obj, Script):
            return NotImplemented
        saved, _ = obj.__reduce__()[1]
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            found = [
                (_MANGLED.sub(b"", name.encode()), _MANGLED.sub(b"", archive.read(name)))
                for name in archive.namelist()
                if not name.endswith((".debug_pkl", "/.data/serialization_id"))
            ]
        return list, (sorted(found),)

    def save_set(self, obj: Any) -> None:
        items = [(hashlib.sha256(repr(each).encode()).digest(), each) for each in obj]
        self.save((type(obj).__name__, [each for _, each in sorted(items, key=lambda item: item[0])]))

    dispatch[set] = dispatch[frozenset] = save_set


def _contents(storage: torch.storage.UntypedStorage) -> str:
    storage = storage.cpu()  # type: ignore[no-untyped-call]
    if not storage.nbytes():
        return ""
    return hashlib.sha256((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).hexdigest()
