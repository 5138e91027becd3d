"""The way in of a call, and its end.

Lives here: what each call goes through, from its inputs to its result, on the loop thread; how many calls are enough.
Must not be here: arguments and their meaning (parallel.py), starting and closing (lifecycle.py), the lanes (engine/).
"""

import asyncio
import sys
import warnings
from collections.abc import Hashable
from threading import get_ident
from typing import Any

from aneuron.engine.run import Run
from aneuron.errors import ShapeError
from aneuron.lifecycle import Lifecycle
from aneuron.observing import Observer, Trace
from aneuron.program import Settings
from aneuron.sched.call import Call, Cut, Limit, Terms
from aneuron.sched.grouping import FORESIGHT
from aneuron.sched.scheduler import Rules
from aneuron.tensors.signature import list_of_rows, measure


class Calls:
    """Calls of one model."""

    def __init__(self, life: Lifecycle, settings: Settings) -> None:
        self.observer: Observer | None = None
        self._life, self._settings = life, settings
        self._dim, self._buckets = settings.dim, settings.buckets
        self._example = example = settings.example
        self._lengths = example.lengths if example is not None else None
        self._known = example.names if example is not None else ()
        self._checked: Hashable = None  # the signature of the last call that was found to fit
        self._warned_of_list = False

    async def call(
        self,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None = None,
        timeout: Limit | None = None,
        trace: Trace | None = None,
    ) -> Any:
        """One call, to its end."""
        if self.observer is not None and (trace is None or trace.observer is None):
            return await self._observed(self.observer, inputs, kwargs, terms, timeout, trace or Trace())
        life = self._life
        call = self.measured(inputs, kwargs)
        run = life.run
        if run is None or run.thread != get_ident() or not run.loop.is_running():
            if timeout is None:
                run = await life.started()
            else:
                run, timeout = await life.started_within(timeout)
        future = self.admit(run, call, inputs, kwargs, terms, timeout, trace)
        try:
            return await future
        finally:
            if not call.settled:
                run.futures.withdraw(call)
            del future  # an exception's traceback holds this frame

    def measured(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call as data, if its inputs fit."""
        example = self._example
        call = measure(inputs, kwargs, self._dim, self._buckets, self._lengths, self._known)
        if example is not None and call.signature is not self._checked and self._life.program.compiled:
            example.check(call, inputs, kwargs)
            self._checked = call.signature
        return call

    def admit(
        self,
        run: Run,
        call: Call,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None,
        timeout: Limit | None,
        trace: Trace | None,
    ) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must withdraw it."""
        program = self._life.program
        if program.inputs is not None:
            program.check(call.signature, inputs, kwargs)
        rules = run.scheduler.rules
        if rules.batch_size is None or rules.split_size is not None or not rules.packing:
            call.cut = self._cut(call, rules)
        if call.structure and call.rows > 1 and not self._warned_of_list:
            self._look_for_list(call, rules, inputs, kwargs)
        call.terms, call.trace = terms, trace
        return run.admission.admit(call, timeout)

    async def _observed(
        self,
        observer: Observer,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None,
        timeout: Limit | None,
        trace: Trace,
    ) -> Any:
        with observer.call(trace.timing) as trace.token:
            trace.observer = observer
            return await self.call(inputs, kwargs, terms, timeout, trace)

    async def outstanding(self) -> int:
        """One-row calls that keep every core busy: two batches for each, as far as the second has room to wait."""
        rules = (await self._life.started()).rules
        kinds = len(self._buckets.sizes) if self._buckets is not None else 1  # each fills batches of its own
        kinds = min(kinds, FORESIGHT)
        busy = (rules.batch_size or rules.preferred) * kinds * rules.cores
        longest = self._buckets.sizes[-1] if self._settings.by_positions and self._buckets is not None else 1
        return busy + min(busy, max(1, (self._settings.room or busy * longest) // longest))

    def _cut(self, call: Call, rules: Rules) -> Cut:
        """How a call will be cut, where that is not anywhere."""
        run, program = self._life.run, self._life.program
        sizes = run.sizes[call.bucket].sizes if run is not None and run.sizes else [program.batch_size or 0]
        cut = rules.cut(call.rows, sizes[-1])
        if rules.packing and rules.split_size is None:
            return cut
        pieces = cut.count(call.rows)
        if not rules.packing:
            even = call.rows == cut.piece * pieces and (rules.split_size is not None or pieces == rules.cores)
            if program.batch_size and not (even and cut.piece in sizes):
                compiled = " or ".join(map(str, sizes))
                raise ShapeError(
                    f"{call.rows} rows / {rules.cores} cores != {compiled} compiled rows: with dynamic batching off "
                    f"the rows of a call, divided by the cores, must be those that the model was compiled for"
                    + (f" (split_size={rules.split_size})" if rules.split_size else "")
                )
            most = min(call.rows, cut.piece + bool(cut.longer))
            if not program.batch_size and not program.takes.holds(most):
                raise ShapeError(
                    f"{call.rows} rows / {rules.cores} cores = {most}: with dynamic batching off that must be what the "
                    f"model was exported for, {program.takes} rows"
                )
        if pieces % rules.cores and (rules.split_size is not None or not self._settings.packing):
            warnings.warn(
                f"the cores are not fully used: {call.rows} rows in {pieces} pieces on {rules.cores} cores",
                stacklevel=_level_of_the_caller(),
            )
        if not rules.packing:
            call.signature = (None, call.signature)  # apart from calls that share batches
        return cut

    def _look_for_list(self, call: Call, rules: Rules, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn once of a list that is given whole to each piece of a call, and looks as if it had an entry a row."""
        cut = call.cut.count(call.rows) > 1 or call.rows > (rules.batch_size or call.rows)
        name = list_of_rows(inputs, kwargs, call.rows) if cut else None
        if name is not None:
            self._warned_of_list = True
            warnings.warn(
                f"{name} is a list of {call.rows} entries, as many as the call has rows; the call is cut into pieces, "
                "and each is given the whole list. If it has an entry for each row pass aneuron.Rows(...), if not "
                "aneuron.Shared(...) or a tuple",
                stacklevel=_level_of_the_caller(),
            )


def _level_of_the_caller() -> int:
    """The `stacklevel` of a warning of whoever calls this that points to code outside of this file, compiled or not."""
    frame, level = sys._getframe(), 0
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame, level = frame.f_back, level + 1
    return max(1, level)
