"""The optional half of a backend, read once.

Lives here: what a backend may have beside the methods of `aneuron.Backend`, its default, and the check of its type.
Must not be here: what follows from it.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from aneuron.backends.precision import Precision

_A_BOOL = "True or False"
_A_COUNT = "an int of at least 1"
_A_METHOD = "a method, or None for none"
_A_PRECISION = "an aneuron.backends.precision.Precision, or None"


def _unknown(model: Any) -> None:
    return None


def _same(core_id: int) -> int:
    return core_id


@dataclass(frozen=True, slots=True)
class Traits:
    """What a backend says of itself beside what it must have; what it does not say is as here. `Backend` explains."""

    cuts_batches: bool = False
    loads_scripts: bool = False
    probes: bool = True
    inline: bool = False
    wants_example: bool = False
    preferred_rows: int = 32
    cores_per_device: int | None = None
    """Cores made of one CUDA device; None: the backend has no CUDA devices."""
    computes_in: Precision | None = None
    """The dtype that its cores compute in, where that is not the model's own."""
    compiled_rows: Callable[[Any], int | None] = _unknown
    inputs_of: Callable[[Any], Any] = _unknown
    global_id: Callable[[int], int | None] = _same
    workers: Callable[[str], Any] | None = None
    """What a lane uses in place of threads, by the name that they would have; None: threads."""


_RULES = dict.fromkeys(("cuts_batches", "loads_scripts", "probes", "inline", "wants_example"), _A_BOOL)
_RULES |= dict.fromkeys(("preferred_rows", "cores_per_device"), _A_COUNT)
_RULES |= {"computes_in": _A_PRECISION}
_RULES |= dict.fromkeys(("compiled_rows", "inputs_of", "global_id", "workers"), _A_METHOD)


def traits_of(backend: Any) -> Traits:
    """Read the optional half of a backend. Raises `ValueError` for what is of the wrong type.

    A property may have to look for a package or a device: read once, at start, and keep the answer.

        >>> from aneuron import CpuBackend, CudaBackend
        >>> traits_of(CpuBackend()).loads_scripts, traits_of(CudaBackend(cores_per_device=2)).cores_per_device
        (True, 2)
    """
    found = {}
    for field in fields(Traits):
        assert field.default is not MISSING
        rule, value = _RULES[field.name], getattr(backend, field.name, field.default)
        if value is None and rule is not _A_BOOL and field.name != "preferred_rows":
            value = field.default
        elif not _fits(value, rule):
            name = getattr(backend, "name", type(backend).__name__)
            raise ValueError(f"the {name} backend has {field.name}={value!r}: expected {rule}")
        found[field.name] = value
    return Traits(**found)


def _fits(value: Any, rule: str) -> bool:
    if rule is _A_METHOD:
        return callable(value)
    if rule is _A_PRECISION:
        return isinstance(value, Precision)
    if rule is _A_BOOL:
        return isinstance(value, bool)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
