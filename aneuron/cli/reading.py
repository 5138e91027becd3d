"""What the user names on the command line: a model, its inputs, lists of numbers.

Lives here: how it is read, and how it is written in Python again. Must not be here: real inputs (calls.py), what runs a
model. What cannot be read is an `argparse.ArgumentTypeError`, which argparse turns into a message and exit status 2.
"""

import importlib
import inspect
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_RAISED = (Exception, SystemExit)  # by what is the user's; a module may end the program while it is imported


@dataclass(frozen=True)
class Written:
    """A value, the Python expression that makes it, and the import that the expression needs. `calls`: of real inputs
    all, of which the value is the first.
    """

    value: Any
    text: str
    needs: str = ""
    calls: Sequence[Any] = field(default=(), repr=False)


def model(text: str) -> Written:
    """A TorchScript or `.pt2` file by its path, or `module:attribute`: a model, or what makes one without arguments."""
    if os.path.exists(text):
        return Written(os.path.abspath(text), repr(text))
    if not is_name(text):
        raise ArgumentTypeError(
            f"{text!r} is neither a file nor of the form module:attribute, as nets:encoder is for `encoder` in nets.py"
        )
    return value(text)


def value(text: str) -> Written:
    """A model by its name, `module:attribute`, put into `eval()`; or what makes one without arguments, called."""
    found, name, path = attribute(text)
    written = path
    if makes_a_model(found):
        try:
            found, written = found(), f"{path}()"
        except _RAISED as error:
            raise ArgumentTypeError(f"{text!r} makes no model: {type(error).__name__}: {error}") from error
    if not callable(found) and not isinstance(found, (str, os.PathLike, Mapping)):
        raise ArgumentTypeError(f"{text!r} is {found!r:.80}: expected a model, or what makes one")
    if isinstance(found, Mapping):
        for each in found.values():
            _into_eval(each)
    elif _into_eval(found):
        written = f"{written}.eval()"
    return Written(found, written, f"from {name} import {path.partition('.')[0]}")


def _into_eval(model: Any) -> bool:
    """Whether it was put into `eval()`: a module that was in training."""
    if not isinstance(model, torch.nn.Module) or not model.training:
        return False
    try:
        model.eval()
    except NotImplementedError:  # an exported program's module cannot be told: its mode was fixed
        return False
    return True


def is_name(text: str) -> bool:
    """Whether it is of the form `module:attribute`."""
    name, _, path = text.partition(":")
    return bool(path) and all(part.isidentifier() for part in name.split("."))


def attribute(text: str) -> tuple[Any, str, str]:
    """What `module:attribute` names, the module, and the attribute."""
    name, _, path = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except _RAISED as error:
        raise ArgumentTypeError(f"{text!r}: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    for each in path.split("."):
        if not hasattr(found, each):
            raise ArgumentTypeError(f"{text!r}: there is no {each!r} in {name!r}")
        found = getattr(found, each)
    return found, name, path


def makes_a_model(value: Any) -> bool:
    """Whether it is called without arguments; a model takes one at least."""
    if isinstance(value, (type, torch.nn.Module)) or not callable(value):
        return isinstance(value, type)
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return False
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)


_SHAPE = re.compile(r"(?P<shape>\d+(x\d+)*)(:(?P<dtype>\w+)(:(?P<low>-?\d+)-(?P<high>-?\d+))?)?")


def inputs(text: str) -> Written:
    """A `.pt` file with what a call is given, or the shape of one tensor: `1x3x224x224`, `1x128:int64:0-30000`."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        return _file(text)
    shape = tuple(int(size) for size in match["shape"].split("x"))
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype) or dtype.is_complex:
        raise ArgumentTypeError(f"{text!r}: {match['dtype']!r} is no dtype of real numbers, as float32 and int64 are")
    if 0 in shape:
        raise ArgumentTypeError(f"{text!r}: every size must be at least 1, the first is the example's rows")
    low, high = int(match["low"] or 0), int(match["high"] or 1)
    if high < low:
        raise ArgumentTypeError(f"{text!r}: the range of values ends before it begins")
    try:
        value = _filled(shape, dtype, low, high, match["low"] is not None)
    except RuntimeError as error:  # of dtypes that have a name, and no elements: int7
        raise ArgumentTypeError(f"{text!r}: torch makes no such tensor: {str(error).partition(chr(10))[0]}") from error
    sizes = ", ".join(map(str, shape))
    fill = f"full(({sizes},), {low}" if low else f"zeros({sizes}"
    kind = "" if dtype is torch.float32 and not low else f", dtype={dtype}"
    return Written(value, f"torch.{fill}{kind})", "import torch")


def _filled(shape: tuple[int, ...], dtype: torch.dtype, low: int, high: int, ranged: bool) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.randint(low, high + 1, shape).to(dtype)
    return (torch.rand(shape) * (high - low) + low if ranged else torch.randn(shape)).to(dtype)


def _file(text: str) -> Written:
    if not os.path.exists(text):
        raise ArgumentTypeError(
            f"{text!r} is neither a file nor a shape such as 1x3x224x224, 1x128:int64 or 1x128:int64:0-30000, nor of "
            "the form module:attribute"
        )
    try:
        value = torch.load(text, weights_only=True)
    except Exception as error:
        raise ArgumentTypeError(f"{text!r} cannot be loaded with weights_only=True: {error}") from error
    if not isinstance(value, (torch.Tensor, tuple, dict)):
        raise ArgumentTypeError(
            f"{text!r} holds a {type(value).__name__}; expected a tensor, a tuple of positional inputs, or a dict of "
            "keyword inputs"
        )
    return Written(value, f"torch.load({text!r}, weights_only=True)", "import torch")


def together(given: list[Written]) -> Written:
    """Several inputs as one example: a tuple."""
    if len(given) == 1:
        return given[0]
    if any(each.calls for each in given):
        raise ArgumentTypeError("real inputs are whole calls, and stand alone: give one file, or one module:attribute")
    if not all(isinstance(each.value, torch.Tensor) for each in given):
        raise ArgumentTypeError("several inputs must be a tensor each; put a tuple or dict into one file")
    return Written(tuple(each.value for each in given), f"({', '.join(each.text for each in given)})", given[0].needs)


def numbers(choice: str = "") -> Callable[[str], list[int | None]]:
    """A reader of lists such as 1,2,4; the word `choice` in them means None."""

    def read(text: str) -> list[int | None]:
        items = [item.strip() for item in text.split(",")]
        if not all(re.fullmatch(r"0*[1-9]\d*", item, re.ASCII) or (choice and item == choice) for item in items):
            also = f", or {choice!r}" if choice else ""
            raise ArgumentTypeError(f"{text!r}: expected whole numbers of at least 1 with commas between them{also}")
        return list(dict.fromkeys(None if item == choice else int(item) for item in items))

    return read


def dtypes(text: str) -> list[str]:
    """Names of floating dtypes: bfloat16,float16."""
    names = [name.strip() for name in text.split(",")]
    known = ("bfloat16", "float16", "float32", "float64")
    if unknown := [name for name in names if name not in known]:
        raise ArgumentTypeError(f"{text!r}: {unknown[0]!r} is none of {', '.join(known)}")
    return list(dict.fromkeys(names))


def cosine(text: str) -> float:
    """A number up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 2.0
    if not -1.0 <= value <= 1.0:
        raise ArgumentTypeError(f"{text!r}: expected a number up to 1, such as 0.99")
    return value


def count(text: str) -> int:
    """One whole number of at least 1."""
    (number,) = numbers()(text) if "," not in text else (None,)
    if number is None:
        raise ArgumentTypeError(f"{text!r}: expected one whole number of at least 1")
    return number


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r}: expected seconds, more than 0")
    return value


def service_times(text: str) -> dict[int, float]:
    """Seconds by batch size: 1:0.001,8:0.006."""
    return {count(size): seconds(time) for size, _, time in (item.partition(":") for item in text.split(","))}
