"""TorchScript files.

Lives here: loading one, without the warning that it is deprecated. Must not be here: which device, which core, what is
kept.
"""

import threading
import warnings
from typing import Any

import torch

_thread = threading.local()


def load_script(file: Any, **settings: Any) -> torch.nn.Module:
    """`torch.jit.load`, without its warning: users are told of TorchScript's end when they make a file, not here."""
    if not warnings.filters or warnings.filters[0][2] is not _OfOurLoads:  # adding it anew takes it away for a moment
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is ", _OfOurLoads)
    _thread.loading = True
    try:
        return torch.jit.load(file, **settings)  # type: ignore[no-any-return,no-untyped-call]
    finally:
        _thread.loading = False


class _WhileWeLoad(type):
    def __subclasscheck__(cls, category: type) -> bool:
        return getattr(_thread, "loading", False)


class _OfOurLoads(Warning, metaclass=_WhileWeLoad):
    """The category of whatever a thread warns of while it loads a file for us, and of nothing else.

    Filters are the process's, and `warnings.catch_warnings` in a thread changes them for all, and leaves them changed
    where two overlap. A filter of this category can stay: it means nobody else's warnings.
    """
