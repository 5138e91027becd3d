"""A model on other terms: with a timeout, a priority, a tenant.

Lives here: what may be asked for. Must not be here: what becomes of it (scheduler.py).
"""

from collections.abc import Coroutine, Hashable
from math import isfinite
from numbers import Real
from typing import Any, Protocol

from aneuron.bulk import Map
from aneuron.stats import Timing
from aneuron.waiting import Terms


class Model(Protocol):
    """What a view is of."""

    async def _run(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms | None, timeout: float | None
    ) -> Any: ...

    async def _timed(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms | None, timeout: float | None
    ) -> tuple[Any, Timing]: ...

    def _map(
        self,
        source: Any,
        terms: Terms | None,
        timeout: float | None,
        ordered: bool,
        limit: int | None,
        return_exceptions: bool,
    ) -> Map[Any]: ...


class View:
    """A model on other terms; what `AsyncDataParallel.options` returns."""

    __slots__ = ("_model", "_terms", "_timeout")

    def __init__(
        self, model: Model, timeout: float | None = None, priority: float = 0.0, tenant: Hashable = None
    ) -> None:
        self._model = model
        self._timeout = None if timeout is None else seconds("timeout", timeout)
        if not _is_finite(priority):
            raise ValueError(f"priority={priority!r:.80}: expected a finite number; 0 is usual, negative is background")
        try:
            hash(tenant)
        except TypeError:
            raise TypeError(f"tenant={tenant!r:.80} is not hashable; pass a name, a number or a tuple") from None
        self._terms = Terms(float(priority), tenant) if priority or tenant is not None else None

    def __call__(self, *inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Run the model on the inputs' rows. To be awaited."""
        return self._model._run(inputs, kwargs, self._terms, self._timeout)

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run."""
        return await self._model._timed(inputs, kwargs, self._terms, self._timeout)

    def map(
        self, source: Any, *, ordered: bool = True, limit: int | None = None, return_exceptions: bool = False
    ) -> Map[Any]:
        """Run the model on each element of a source; see `AsyncDataParallel.map`. The timeout is each element's."""
        return self._model._map(source, self._terms, self._timeout, ordered, limit, return_exceptions)

    def __repr__(self) -> str:
        priority, tenant, _ = self._terms or Terms()
        return f"{self._model!r}.options(timeout={self._timeout}, priority={priority:g}, tenant={tenant!r})"


def seconds(name: str, value: float) -> float:
    """A checked number of seconds."""
    if not _is_finite(value) or value < 0:
        raise ValueError(f"{name}={value!r:.80}: expected seconds, 0 or more and finite")
    return float(value)


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
