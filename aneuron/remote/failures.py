"""Exceptions on their way to another process.

Lives here: what becomes of one that pickle does not take. Must not be here: who gets it.
"""

import pickle
import traceback
from typing import Any

from aneuron.engine.failures import carried, text


def pickled(error: BaseException) -> bytes:
    """An exception as bytes: itself, with its cause, notes and the place where it was raised; else its text.

    >>> restored(pickled(ValueError("no such row")))
    ValueError('no such row')
    """
    error = carried(error)
    place = "".join(traceback.format_exception(error)) if error.__traceback__ is not None else ""
    cause = error.__cause__
    for each in (error, RuntimeError(f"{text(error)} (of a {type(error).__qualname__}, which cannot be pickled)")):
        for reason in (cause, None if cause is None else RuntimeError(text(cause))):
            try:
                found = pickle.dumps((each, reason, place))
                if type(pickle.loads(found)[0]) is not type(each):
                    continue
            except Exception:
                continue
            return found
    return pickle.dumps((RuntimeError(text(error)), None, place))


def restored(data: Any) -> BaseException:
    """The exception; where it was raised is a note."""
    error, cause, place = pickle.loads(data)
    assert isinstance(error, BaseException)
    if cause is not None:
        error.__cause__ = cause
    if place:
        error.add_note(f"raised in an engine:\n{place.rstrip()}")
    return error
