"""A model as one request sees it: with the request's deadline, and noted for its answer.

Lives here: what a handler awaits, the `Server-Timing` header. Must not be here: a web framework.
"""

import asyncio
from collections.abc import Awaitable, Hashable, Iterable, Mapping
from typing import Any

from aneuron import AsyncDataParallel, Timing

Timings = list[tuple[str, Timing]]

_NOTED = 10  # calls that an answer tells of: a header has its limits


class RequestView:
    """A model on the terms of one request; what `get` hands to a handler. To be called like the model.

    Its calls have what is left of the request's time, if that is bounded, and raise `DeadlineExceeded`. They are for
    the time of the request, on its event loop.
    """

    __slots__ = ("_deadline", "_model", "_name", "_priority", "_tenant", "_timeout", "_timings")

    def __init__(
        self, name: str, model: AsyncDataParallel, deadline: float | None = None, timings: Timings | None = None
    ) -> None:
        self._name = name
        self._model = model
        self._deadline = deadline  # in the loop's time
        self._timings = timings
        self._timeout: float | None = None
        self._priority = 0.0
        self._tenant: Hashable = None

    def __call__(self, *inputs: Any, **kwargs: Any) -> Awaitable[Any]:
        """Run the model on the inputs' rows. To be awaited."""
        if self._timings is not None:
            return self._result(inputs, kwargs)
        result: Awaitable[Any] = self._bound()(*inputs, **kwargs)
        return result

    async def _result(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result, _ = await self.timed(*inputs, **kwargs)
        return result

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run."""
        result, timing = await self._bound().timed(*inputs, **kwargs)
        if self._timings is not None and len(self._timings) < _NOTED:
            self._timings.append((self._name, timing))
        return result, timing

    def map(self, source: Any, **settings: Any) -> Any:
        """Run the model on each element of a source; see `AsyncDataParallel.map`. Not noted in `Server-Timing`."""
        return self._bound().map(source, **settings)

    def options(self, timeout: float | None = None, priority: float = 0.0, tenant: Hashable = None) -> "RequestView":
        """The view on further terms, see `AsyncDataParallel.options`; of `timeout` and the deadline, the earlier."""
        view = RequestView(self._name, self._model, self._deadline, self._timings)
        view._timeout, view._priority, view._tenant = timeout, priority, tenant
        return view

    def _bound(self) -> Any:  # the model, or a view of it
        timeout = self._timeout
        if self._deadline is not None:
            left = max(0.0, self._deadline - asyncio.get_running_loop().time())
            timeout = left if timeout is None else min(left, timeout)
        if timeout is None and not self._priority and self._tenant is None:
            return self._model
        return self._model.options(timeout, self._priority, self._tenant)

    def __repr__(self) -> str:
        return f"<{self._name} for one request: {self._model!r}>"


def view_of(
    name: str, models: Mapping[str, AsyncDataParallel], deadline: float | None, timings: Timings | None
) -> RequestView:
    """The view of the model that was installed under a name."""
    return RequestView(name, installed(name, models), deadline, timings)


def installed(name: str, models: Mapping[str, AsyncDataParallel]) -> AsyncDataParallel:
    """The model that was installed under a name."""
    if name not in models:
        there = ", ".join(map(repr, models)) or "none at all"
        raise LookupError(f"no model {name!r} is installed in this app: there is {there}; see install() or setup()")
    return models[name]


def guarded(shed: Mapping[str, str] | None, models: Mapping[str, AsyncDataParallel]) -> dict[str, AsyncDataParallel]:
    """By path, the model without which a request need not come in."""
    return {path: installed(name, models) for path, name in (shed or {}).items()}


def server_timing(timings: Iterable[tuple[str, Timing]]) -> str:
    """The value of a `Server-Timing` header: milliseconds, and in words where and in what company a call ran.

    >>> server_timing([("net", Timing(0.0125, 0.005, 0.018, core=3, batch_rows=6, padded_rows=2, why="core_idle"))])
    'queue;dur=12.500, device;dur=5.000, total;dur=18.000;desc="net", core;desc="3", batch;desc="6+2 rows", \
closed;desc="core_idle"'
    """
    return ", ".join(
        f"queue;dur={t.queued * 1e3:.3f}, device;dur={t.device * 1e3:.3f}, total;dur={t.total * 1e3:.3f};"
        f'desc="{name}", core;desc="{t.core}", batch;desc="{t.batch_rows}+{t.padded_rows} rows", closed;desc="{t.why}"'
        for name, t in timings
    )
