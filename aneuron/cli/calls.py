"""Real inputs: a file of calls as JSON, one a line, or what a Python iterable yields.

Lives here: reading them, that they are alike, how long they are. Must not be here: made-up inputs (reading.py), what
runs a model. What cannot be read is an `argparse.ArgumentTypeError` that says where it stands.
"""

import inspect
import json
import math
import os
import traceback
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from typing import Any

import torch

from aneuron.cli import reading
from aneuron.cli.reading import Written

MOST = 512  # calls that are read: enough to tell ways apart
LITERAL = 1000  # numbers that are written in a constructor

_TAKES = "expected a tensor, a tuple of positional inputs, or a dict of keyword inputs, each with its rows first"


def inputs(text: str) -> Written:
    """A `.jsonl` file, `module:attribute`, or what `reading.inputs` takes."""
    if text.endswith((".jsonl", ".ndjson")):
        return _of_lines(text)
    if ":" in text and reading.is_name(text) and not os.path.exists(text):
        return _of_python(text)
    return reading.inputs(text)


def tensors(call: Any) -> Iterator[torch.Tensor]:
    """Those of a call, in order."""
    if isinstance(call, torch.Tensor):
        yield call
    elif isinstance(call, (dict, tuple, list)):
        for each in call.values() if isinstance(call, dict) else call:
            yield from tensors(each)


def rows(call: Any) -> int:
    """Rows of a call; one that has no tensor is one."""
    first = next(tensors(call), None)
    return 1 if first is None else first.shape[0]


def lengths(calls: Sequence[Any]) -> tuple[int, list[int]] | None:
    """The first dimension but that of the rows where calls differ in size, and the size of each there."""
    shapes = [[tuple(tensor.shape) for tensor in tensors(call)] for call in calls]
    differ = {
        dim
        for place in zip(*shapes, strict=True)
        for dim in range(1, len(place[0]))
        if len({shape[dim] for shape in place}) > 1
    }
    if not differ:
        return None
    dim = min(differ)
    return dim, [next(shape[dim] for shape in call if len(shape) > dim) for call in shapes]


# JSON.


def _of_lines(path: str) -> Written:
    read: list[tuple[str, Any]] = []  # where it stands, and the call
    try:
        with open(path, "rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for number, line in islice(lines, MOST):
                where = f"{path}, line {number}"
                read.append((where, _call(line, where)))
    except OSError as error:
        raise ArgumentTypeError(f"{path!r} cannot be read: {error.strerror}") from error
    if not read:
        raise ArgumentTypeError(f"{path!r} is empty: expected one call a line, as JSON")
    _promote([call for _, call in read])
    calls = _alike(read)
    return Written(calls[0], _literal(calls[0]), "import torch", calls)


def _call(line: bytes, where: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{where} is no JSON: {error}: {line.strip()[:60]!r}") from error
    if isinstance(value, list):
        return [_tensor(value, where)]  # in a list until dtypes are known
    if not isinstance(value, dict) or not value:
        raise ArgumentTypeError(
            f"{where} is {line.strip()[:60].decode()}: expected a list of numbers, or an object of named inputs"
        )
    return {name: _named(each, f"{where}, {name!r}") for name, each in value.items()}


def _named(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return _tensor(value, where)
    if isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise ArgumentTypeError(f"{where} is {value!r:.60}: expected a list of numbers, or a number, a string, or null")
    return value


def _tensor(value: list[Any], where: str) -> torch.Tensor:
    """A flat list is one row; a nested one has its rows first."""
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ArgumentTypeError(f"{where}: expected numbers, in nested lists of equal length: {error}") from error
    if not tensor.numel():
        raise ArgumentTypeError(f"{where} has an empty list: expected one number at least")
    if not torch.isfinite(tensor).all():
        raise ArgumentTypeError(f"{where} has a number that float32 cannot hold, or NaN")
    return tensor[None] if tensor.ndim == 1 else tensor


def _promote(read: list[Any]) -> None:
    """Give an input the same dtype in all calls: `[1, 2]` among lists of floats is one of them."""
    for name in {name for call in read for name in (call if isinstance(call, dict) else [0])}:
        having = [call for call in read if (name in call if isinstance(call, dict) else name == 0)]
        having = [call for call in having if isinstance(call[name], torch.Tensor)]
        if having:
            dtype = reduce(torch.promote_types, (call[name].dtype for call in having))
            for call in having:
                call[name] = call[name].to(dtype)


def _literal(value: Any) -> str:
    """A call in Python; of one that is large its shapes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_literal(each)}" for name, each in value.items()) + "}"
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() > LITERAL:
        return f"torch.ones({', '.join(map(str, value.shape))}, dtype={value.dtype})"
    return f"torch.tensor({value.tolist()}, dtype={value.dtype})"


# Python.


def _of_python(text: str) -> Written:
    value, name, path = reading.attribute(text)
    written = f"{name}.{path}"
    if isinstance(value, (torch.Tensor, str, Mapping)):
        raise ArgumentTypeError(
            f"{text!r} is a {type(value).__name__}: expected a generator function or an iterable of calls; put a lone "
            "call into a list"
        )
    if inspect.isroutine(value) or isinstance(value, type) or not _iterable(value):
        if not callable(value):
            raise ArgumentTypeError(f"{text!r} is {value!r:.80}: expected a generator function or an iterable of calls")
        written += "()"
        try:
            value = value()
        except Exception as error:
            raise ArgumentTypeError(f"{text!r} yields nothing: {_told(error)}") from error
    read: list[tuple[str, Any]] = []
    wrapped = "{}"
    if hasattr(value, "__aiter__") or not _iterable(value):
        raise ArgumentTypeError(f"{text!r} makes a {type(value).__name__}: expected a plain generator, or an iterable")
    try:
        for number, each in enumerate(islice(value, MOST), 1):
            wrapped = wrapped if read else _wrapped(each)
            read.append((f"{text}, call {number}", _owned(_taken(each, f"{text}, call {number}"))))
    except ArgumentTypeError:
        raise
    except Exception as error:
        raise ArgumentTypeError(f"{text!r} failed after {len(read)} calls: {_told(error)}") from error
    if not read:
        raise ArgumentTypeError(f"{text!r} yields nothing: expected calls")
    calls = _alike(read)
    return Written(calls[0], wrapped.format(f"next(iter({written}))"), f"import {name}", calls)


def _wrapped(call: Any) -> str:
    """What makes an example of a call, in Python."""
    if isinstance(call, Mapping) and not isinstance(call, dict):
        return "dict({})"
    return "tuple({})" if isinstance(call, list) else "torch.as_tensor({})" if _is_array(call) else "{}"


def _is_array(value: Any) -> bool:
    """Whether it is NumPy's, which need not be there."""
    return hasattr(value, "__array_interface__") and bool(value.shape)


def _iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


def _taken(call: Any, where: str) -> Any:
    """What a call takes, as a tensor, a tuple or a dict."""
    if isinstance(call, (torch.Tensor, tuple)) or _is_array(call):
        return call
    if isinstance(call, Mapping):
        return dict(call)
    if isinstance(call, list) and call and all(isinstance(each, torch.Tensor) or _is_array(each) for each in call):
        return tuple(call)  # as a `DataLoader` makes them
    raise ArgumentTypeError(f"{where} is {call!r:.60}, a {type(call).__name__}; {_TAKES}")


def _owned(value: Any) -> Any:
    """The same in memory of its own: a generator may write over what it has yielded."""
    if isinstance(value, torch.Tensor) or _is_array(value):
        return torch.as_tensor(value).detach().clone()
    if isinstance(value, dict):
        return {name: _owned(each) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_owned, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_owned, value))
    return value


def _told(error: BaseException) -> str:
    """An error, with the file and line where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


# Both.


def _alike(read: list[tuple[str, Any]]) -> list[Any]:
    """The calls. Raises for those that are unlike the first, and those whose tensors disagree about their rows."""
    calls = [call[0] if isinstance(call, list) else call for _, call in read]
    first = _form(calls[0])
    for (where, _), call in zip(read, calls, strict=True):
        if (form := _form(call)) != first:
            raise ArgumentTypeError(f"{where} has {form}; the first has {first}: every call takes the same inputs")
        if any(0 in tensor.shape for tensor in tensors(call)):
            raise ArgumentTypeError(f"{where} has an empty tensor: every size must be at least 1")
        sizes = [tensor.shape[0] if tensor.ndim else 0 for tensor in tensors(call)]
        if len(set(sizes)) != 1 or not sizes[0]:
            raise ArgumentTypeError(
                f"{where}: its tensors have {', '.join(map(str, sizes)) or 'no'} rows; every tensor of a call has as "
                "many, one at least, in its first dimension"
            )
    if isinstance(calls[0], dict):
        return [{name: call[name] for name in calls[0]} for call in calls]  # in one order
    return calls


def _form(call: Any) -> str:
    """What calls that are alike have in common, in words."""
    if isinstance(call, torch.Tensor):
        return f"{call.dtype} of {call.ndim} dimensions".replace("torch.", "")
    if isinstance(call, dict):
        return "{" + ", ".join(f"{name}: {_form(call[name])}" for name in sorted(call, key=str)) + "}"
    if isinstance(call, (tuple, list)):
        return "(" + ", ".join(map(_form, call)) + ")"
    return "another argument"
