"""A model on other terms: with a timeout, a priority, a tenant.

Lives here: what may be asked for, and that what was asked for before holds until it is said anew. Must not be here:
what becomes of it (sched/scheduler.py).
"""

from collections.abc import Callable, Coroutine, Hashable
from typing import Any, NamedTuple, Protocol, Self

from aneuron.arguments import is_finite, seconds
from aneuron.map.window import Map
from aneuron.names import name_of
from aneuron.observing import Trace
from aneuron.sched.call import Limit, Terms
from aneuron.stats import Timing


class Model(Protocol):
    """What a view is of."""

    @property
    def _call(self) -> Callable[..., Coroutine[Any, Any, Any]]:
        """One call, to its end: its positional and keyword inputs, terms, timeout and trace."""

    @property
    def _outstanding(self) -> Callable[[], Coroutine[Any, Any, int]]:
        """How many one-row calls keep every core busy."""


class _AsBefore:
    """The default of what need not be said again; None says something."""

    def __repr__(self) -> str:
        return "<as before>"


AS_BEFORE: Any = _AsBefore()


class Options(NamedTuple):
    """What was asked for, checked."""

    timeout: Limit | None = None
    priority: float = 0.0
    tenant: Hashable = None

    def changed(self, timeout: float | None, priority: float, tenant: Hashable) -> "Options":
        """With what is said now; the rest as before."""
        if timeout is AS_BEFORE:
            timeout = self.timeout
        if priority is AS_BEFORE:
            priority = self.priority
        if not is_finite(priority):
            raise ValueError(f"priority={priority!r:.80}: expected a finite number; 0 is usual, negative is background")
        return Options(
            None if timeout is None else Limit(seconds("timeout", timeout)),
            float(priority),
            self.tenant if tenant is AS_BEFORE else _tenant(tenant),
        )

    def terms(self) -> Terms | None:
        """As the scheduler takes them; None for the usual ones."""
        return Terms(self.priority, self.tenant) if self.priority or self.tenant is not None else None


class View:
    """A model on other terms, to be called like it; what `AsyncDataParallel.options` returns."""

    __slots__ = ("_model", "_options", "_terms")

    def __init__(self, model: Model, options: Options) -> None:
        self._model, self._options, self._terms = model, options, options.terms()

    def __call__(self, *inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Run the model on the inputs' rows. To be awaited."""
        return self._model._call(inputs, kwargs, self._terms, self._options.timeout)

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run."""
        trace = Trace()
        result = await self._model._call(inputs, kwargs, self._terms, self._limit(), trace)
        return result, trace.timing()

    def map(
        self, source: Any, *, ordered: bool = True, limit: int | None = None, return_exceptions: bool = False
    ) -> Map[Any]:
        """Run the model on each element of a source; see `AsyncDataParallel.map`. The timeout is each element's."""
        model, terms = self._model, (self._terms or Terms())._replace(yields=True)

        def call(*inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
            return model._call(inputs, kwargs, terms, self._limit())

        bound = model._outstanding if limit is None else limit
        return Map(call, source, ordered=ordered, limit=bound, return_exceptions=return_exceptions)

    def _limit(self) -> Limit | None:
        """The time that a call has which is made now."""
        return self._options.timeout

    def options(
        self, timeout: float | None = AS_BEFORE, priority: float = AS_BEFORE, tenant: Hashable = AS_BEFORE
    ) -> Self:
        """The same view with other terms, see `AsyncDataParallel.options`; what is not said stays as it is.

        >>> import torch, aneuron
        >>> acme = aneuron.AsyncDataParallel(torch.neg).options(timeout=2.0, tenant="acme")
        >>> acme.options(priority=-1)
        <AsyncDataParallel not started, 'auto', batch_size=None>.options(timeout=2.0, priority=-1, tenant='acme')
        """
        return self._with(self._options.changed(timeout, priority, tenant))

    def _with(self, options: Options) -> Self:
        return type(self)(self._model, options)

    def __repr__(self) -> str:
        timeout, priority, tenant = self._options
        return f"{self._model!r}.options(timeout={timeout!r}, priority={priority:g}, tenant={tenant!r})"


def _tenant(tenant: Hashable) -> Hashable:
    try:
        return None if tenant is None else name_of(tenant)
    except TypeError:
        raise TypeError(f"tenant={tenant!r:.80} is not hashable; pass a name, a number or a tuple") from None
