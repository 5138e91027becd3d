"""What torch warns of while it does something for us that its users cannot change.

Lives here: keeping such a warning from being shown, in one thread. Must not be here: what is done.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# TorchScript's end, and that of quantized tensors, are said to users when they make them; the others, of torch 2.13,
# are about its own code.
_OURS = (
    r"`torch\.jit\.(load|save|trace|trace_method)` is |`isinstance\(treespec, LeafSpec\)` is deprecated"
    r"|TypedStorage is deprecated|torch\.quantize_per_tensor, torch\.quantize_per_channel and other"
)

_thread = threading.local()


@contextmanager
def unwarned() -> Iterator[None]:
    """Show none of these warnings of the calling thread meanwhile."""
    if not warnings.filters or warnings.filters[0][2] is not _OfOurs:  # adding it anew takes it away for a moment
        warnings.filterwarnings("ignore", _OURS, _OfOurs)
    _thread.ours = True
    try:
        yield
    finally:
        _thread.ours = False


class _WhileOurs(type):
    def __subclasscheck__(cls, category: type) -> bool:
        return getattr(_thread, "ours", False)


class _OfOurs(Warning, metaclass=_WhileOurs):
    """The category of whatever a thread warns of while it is `unwarned`, and of nothing else.

    Filters are the process's, and `warnings.catch_warnings` in a thread changes them for all, and leaves them changed
    where two overlap. A filter of this category can stay: it means nobody else's warnings.
    """
