"""A model as one request sees it: with the request's deadline, and noted for its answer.

Lives here: what a handler awaits, the `Server-Timing` header. Must not be here: a web framework.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Self

from aneuron import AsyncDataParallel, Timing, View
from aneuron.options import Model, Options
from aneuron.sched.call import Limit

Timings = list[tuple[str, Timing]]

_NOTED = 10  # calls that an answer tells of: a header has its limits


class _OfRequest(Limit):
    """What a request's deadline leaves to a call."""

    __slots__ = ("own",)
    own: Limit | None  # the call's own timeout, which is later

    def __str__(self) -> str:
        own = "" if self.own is None else f"; the call's own {self.own} is longer"
        return f"the request's deadline ({float(self):.3g} s were left{own})"


class RequestView(View):
    """A model on the terms of one request; what `get` hands to a handler. To be called like the model.

    Its calls have what is left of the request's time, if that is bounded, and raise `DeadlineExceeded`. They are for
    the time of the request, on its event loop. Of a `timeout` in `options` and the request's deadline, the earlier
    holds.
    """

    __slots__ = ("_deadline", "_most", "_name", "_timings")

    def __init__(
        self,
        name: str,
        model: Model,
        deadline: float | None = None,
        timings: Timings | None = None,
        options: Options = Options(),  # noqa: B008  # it is frozen
        most: float | None = None,
    ) -> None:
        super().__init__(model, options)
        self._name = name
        self._deadline = deadline  # in the loop's time
        self._most = most  # seconds for each call, where there is no deadline for all: a websocket has no end
        self._timings = timings

    def __call__(self, *inputs: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Run the model on the inputs' rows. To be awaited."""
        if self._timings is not None:
            return self._result(inputs, kwargs)
        return self._model._call(inputs, kwargs, self._terms, self._limit())

    async def _result(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result, _ = await self.timed(*inputs, **kwargs)
        return result

    async def timed(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Timing]:
        """The same, and how the call was run."""
        result, timing = await super().timed(*inputs, **kwargs)
        if self._timings is not None and len(self._timings) < _NOTED:
            self._timings.append((self._name, timing))
        return result, timing

    def _with(self, options: Options) -> Self:
        return type(self)(self._name, self._model, self._deadline, self._timings, options, self._most)

    def _limit(self) -> Limit | None:
        """Of the call's own timeout and what is left of the request's time, the shorter."""
        own, left = self._options.timeout, self._most
        if self._deadline is not None:
            left = max(0.0, self._deadline - asyncio.get_running_loop().time())
        if left is None:
            return own
        if own is not None and own <= left:
            return own
        limit = _OfRequest(left)
        limit.own = own
        return limit

    def __repr__(self) -> str:
        return f"<{self._name} for one request: {super().__repr__()}>"


def view_of(
    name: str,
    models: Mapping[str, AsyncDataParallel],
    deadline: float | None,
    timings: Timings | None,
    most: float | None = None,
) -> RequestView:
    """The view of the model that was installed under a name."""
    return RequestView(name, installed(name, models), deadline, timings, most=most)


def installed(name: str, models: Mapping[str, AsyncDataParallel]) -> AsyncDataParallel:
    """The model that was installed under a name."""
    if name not in models:
        there = ", ".join(map(repr, models)) or "none at all"
        raise LookupError(f"no model {name!r} is installed in this app: there is {there}; see install() or setup()")
    return models[name]


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
