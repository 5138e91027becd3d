"""What the tests put through the doubles, and what they ask of them."""

import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from doubles.compiled import models

X = torch.rand(2, 3)
Pair = namedtuple("Pair", "a b")


class Net(nn.Module):
    """Any function as a module."""

    def __init__(self, answer=lambda x: x * 2 + 1):
        super().__init__()
        self.answer = answer

    def forward(self, *args):
        return self.answer(*args)


def saved(traced: Any, folder: Path, name: str = "net.pt") -> str:
    torch.jit.save(traced, str(folder / name))
    return str(folder / name)


def cores_of(module: Any) -> list[int]:
    """The process's numbers of the cores that a module is loaded on, part by part."""
    return [core for model in models(module) for core in model.cores]


def fails_in_torchscript(text: str = "", pattern: str = "") -> Any:
    """As a traced module raises: the frame first, the text as the last line."""
    frame = r"(?s)^The following operation failed in the TorchScript interpreter\..*\nRuntimeError: "
    return pytest.raises(RuntimeError, match=frame + (pattern or re.escape(text)) + r"\n?$")


def quiet(call: Callable[..., Any], *inputs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*inputs)
