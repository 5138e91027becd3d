"""Checked numbers among the arguments of what users make."""

from math import isfinite
from numbers import Real
from typing import Any


def count(name: str, value: int | None) -> int | None:
    """A checked number of rows, cores or batches; None leaves it to the package."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r}: expected an int of at least 1, or None to leave it to aneuron")
    return value


def weight(value: float) -> float:
    """A checked share of a pool."""
    if not is_finite(value) or value <= 0:
        raise ValueError(f"weight={value!r:.80}: expected a finite number above 0; 2.0 is twice the share of 1.0")
    return float(value)


def seconds(name: str, value: float) -> float:
    """A checked number of seconds."""
    if not is_finite(value) or value < 0:
        raise ValueError(f"{name}={value!r:.80}: expected seconds, 0 or more and finite")
    return float(value)


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
