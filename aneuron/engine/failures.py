"""Exceptions on their way to a caller.

Must not be here: who gets which (recovery.py).
"""

from concurrent.futures import CancelledError


def carried(error: BaseException) -> Exception:
    """An exception as a future can carry it to a caller.

    A future cannot carry StopIteration; CancelledError, SystemExit and KeyboardInterrupt would be taken for the
    caller's own cancellation, or end its loop.
    """
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, CancelledError)):
        return error
    wrapped = RuntimeError(f"the model raised {text(error)}")
    wrapped.__cause__ = error
    return wrapped


def text(error: BaseException) -> str:
    """An exception in words, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
