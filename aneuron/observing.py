"""Who is told how calls run: `timed()`, and an observer.

Lives here: what is noted of a call, and what an observer must have. Must not be here: who tells (parallel.py and
engine/run.py do), a library for traces (web/tracing.py).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from aneuron.sched.call import Chunk
from aneuron.stats import Timing


class Observer(Protocol):
    """What `AsyncDataParallel.observe` takes: two methods, each of which gives a context manager.

    They are on the way of every call: they must return at once, and must neither raise nor swallow an exception. What
    they raise, the calls raise. For what happened on the whole, `AsyncDataParallel.statistics` costs calls nothing.

        >>> import asyncio, contextlib, torch, aneuron
        >>> class Printer:
        ...     def call(self, timing):
        ...         return contextlib.nullcontext("a call")
        ...     def batch(self, calls, *, core, rows, padded_rows, why):
        ...         print(calls, rows, padded_rows, why)
        ...         return contextlib.nullcontext()
        >>> async def main():
        ...     async with aneuron.AsyncDataParallel(torch.neg, batch_size=8) as model:
        ...         model.observe(Printer())
        ...         await model(torch.ones(3, 2))
        >>> asyncio.run(main())
        [('a call', 3)] 3 5 core_idle
    """

    def call(self, timing: Callable[[], Timing]) -> AbstractContextManager[Any]:
        """Around a call, in its caller's task, from before its inputs are looked at; left with what ends the call.

        What it gives on entering stands for the call in `batch`. `timing()` says how the call was run, once it has its
        result. A call with an error or a cancellation has none.
        """

    def batch(
        self, calls: Sequence[tuple[Any, int]], *, core: int, rows: int, padded_rows: int, why: str
    ) -> AbstractContextManager[Any]:
        """Around an execution, in the thread that executes it; left with the model's exception, if it raises one.

        calls: what stands for each call in it, and how many of its rows; those that began before there was an observer
            are left out. The others are as in `Timing`: the core's id, rows of all callers, rows that were added, and
            why there were not more.
        """


class Trace:
    """Where the executions of a call are noted, for its `Timing`, and for who observes it."""

    __slots__ = ("admitted", "clock", "core", "ended", "observer", "padded", "rows", "started", "token", "why")

    admitted: float
    clock: Callable[[], float]

    def __init__(self) -> None:
        self.started: float | None = None
        self.ended = 0.0
        self.core = self.rows = self.padded = 0
        self.why = ""
        self.observer: Observer | None = None
        self.token: Any = None  # what stands for the call

    def note(self, core: int, started: float, ended: float, rows: int, padded: int, why: str) -> None:
        """Note an execution."""
        self.started = started if self.started is None else min(self.started, started)
        if ended >= self.ended:
            self.core, self.ended, self.rows, self.padded, self.why = core, ended, rows, padded, why

    def timing(self) -> Timing:
        """What there is to say about a call that has its result, now."""
        now, admitted = self.clock(), self.admitted
        started = self.started if self.started is not None else now
        device = max(0.0, self.ended - started)
        return Timing(started - admitted, device, now - admitted, self.core, self.rows, self.padded, self.why)


def is_observed(chunks: Iterable[Chunk]) -> bool:
    """Whether somebody puts something around an execution of those chunks."""
    return any(call.trace is not None and call.trace.observer is not None for call, _, _ in chunks)


def observed(chunks: Iterable[Chunk], core: int, rows: int, padded_rows: int, why: str) -> AbstractContextManager[Any]:
    """What an observer puts around an execution of those chunks; nothing, if none of their calls has one."""
    observer: Observer | None = None
    calls: list[tuple[Any, int]] = []
    for call, start, stop in chunks:
        trace: Trace | None = call.trace
        if trace is not None and trace.observer is not None:
            if trace.observer is not observer:  # replaced by another, from this call on
                observer, calls = trace.observer, []
            calls.append((trace.token, stop - start))
    if observer is None:
        return nullcontext()
    return observer.batch(calls, core=core, rows=rows, padded_rows=padded_rows, why=why)
