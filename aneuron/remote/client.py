"""A model in engines, as the process that calls it knows it: calls out to engines, results back, each call ended once.

Lives here: which of a call's rows are where, and what follows when an engine dies. Must not be here: which engine is
best (routing.py), how values cross (wire.py), links (engines.py), who starts engines (supervisor.py).
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from types import SimpleNamespace
from typing import Any

from aneuron.engine.admission import Phase
from aneuron.engine.failures import carried
from aneuron.engine.futures import Futures
from aneuron.engine.run import SLOW_DRAIN
from aneuron.errors import Closed, CoreFailed, InputModified, NoHealthyCores, QueueFull
from aneuron.program import Settings
from aneuron.remote import messages
from aneuron.remote.engines import Engines, Flight
from aneuron.remote.frames import Kind
from aneuron.remote.messages import OBSERVED, PIECE, TIMED, UNLESS_BEGUN, WITH_TERMS
from aneuron.remote.packing import Opened
from aneuron.remote.routing import Standing, choose, spread
from aneuron.remote.sums import added
from aneuron.remote.supervision import FAILED
from aneuron.remote.wire import Source, Wire
from aneuron.sched.call import NEVER, Call, Limit
from aneuron.sched.scheduler import Rules
from aneuron.stats import Counters, Statistics, Timing
from aneuron.tensors.outputs import Output
from aneuron.tensors.rows import MODIFIED, Parts, base_of, sliced, version_of

logger = logging.getLogger("aneuron")

NONE = 0.0, NEVER  # the timeout of a call without one, and what is left of it
_CALL, _pack = Kind.CALL, messages.CALL.pack
DEATHS = 2  # engines that may die while they execute a call's rows, before these are blamed


class _Spread:
    """A call whose rows are with several engines, or were: what of its result is there."""

    def __init__(self) -> None:
        self.flights: list[Flight] = []  # without an answer
        self.generations: set[int] = set()
        self.guard = Lock()  # around `parts`: two pieces may be copied at once
        self.parts: Parts | None = None
        self.whole = False  # it was spread before, over engines that had different models: it goes to one

    def of(self, output: Output, rows: int) -> Parts:
        """Where the rows are put; outputs must be like the first. In any thread."""
        with self.guard:
            if self.parts is None:
                self.parts = Parts(rows, output)
            return self.parts


class RemoteRun:
    """A model that is loaded in the engines of a pool: to its lifecycle and its calls, a run like any other.

    On the loop. What a run has several objects for is one here: there are no lanes.
    """

    def __init__(
        self,
        engines: Engines,
        key: int,
        rules: Rules,
        sizes: Mapping[int, Any],
        dim: int,
        counters: Counters,
        settings: Settings,
    ) -> None:
        self.dispatcher = engines
        self.loop, self.thread, self.clock = engines.loop, engines.thread, engines.loop.time
        self.context = engines.context
        self.key = key
        self.sizes = sizes
        self.counters = counters
        self.scheduler = SimpleNamespace(rules=rules)
        self.admission = self.recovery = self
        self.futures = Futures(self.loop, self.clock, counters, self._discard, engines.guard)
        self.phase = Phase.LOADING
        self.why_closed = "the model is closed or closing; start() opens it again when aclose() has returned"
        self._dim, self._settings = dim, settings
        # In the order of coming; any of them may leave.
        self._homeless: dict[Flight, None] = {}  # wait for an engine
        self._suspects: dict[Flight, None] = {}  # an engine has died of them, maybe: each is alone of its kind in one
        self._outcomes: list[tuple[Call, Any]] = []  # of what is being read
        self._turn = 0
        self._said: dict[str, Any] = {}  # settings that the engines have
        self._leaving: asyncio.Task[None] | None = None

    # For lifecycle.py and calls.py.

    @property
    def rules(self) -> Rules:
        """How calls are cut."""
        return self.scheduler.rules  # type: ignore[no-any-return]

    @property
    def serving(self) -> bool:
        """Whether calls are accepted."""
        return self.phase is Phase.SERVING

    @property
    def in_service(self) -> int:
        """Cores that serve."""
        return self.dispatcher.in_service

    def serve(self) -> None:
        """Accept calls."""
        self.phase = Phase.SERVING
        self.dispatcher.add(self)

    def follow(self, settings: Settings) -> None:
        """Have the engines serve as is set by now. From any thread."""
        self.dispatcher.call_loop(partial(self._follow, settings))

    def settled_with(self, settings: Settings) -> None:
        """The engines have been told of these when they loaded the model."""
        self._said = _changeable(settings)

    def _follow(self, settings: Settings) -> None:
        now = _changeable(settings)
        changed = {name: value for name, value in now.items() if self._said.get(name) != value}
        self._said = now
        rules = self.rules
        packing = rules.packing and settings.packing
        self.scheduler.rules = replace(
            rules, split_size=settings.split_size, max_pending=settings.room, packing=packing
        )
        if changed and self.phase is not Phase.STOPPED:
            self.dispatcher.later(
                self.dispatcher.supervision.change(self.key, **changed), f"{', '.join(changed)} was not changed"
            )

    def refuse(self, why: str | None = None) -> None:
        """Refuse new calls."""
        if self.phase is Phase.SERVING:
            self.phase, self.why_closed = Phase.DRAINING, why or self.why_closed

    async def drain(self) -> None:
        """Refuse new calls, finish those accepted, and leave the engines."""
        self.refuse()
        slow = self.loop.call_later(
            SLOW_DRAIN, lambda: logger.warning(
                "closing has taken %g s; %d calls have not ended", SLOW_DRAIN, len(self.futures.calls)
            )
        )  # fmt: skip
        try:
            await asyncio.shield(self.futures.drained())
            await self.dispatcher.refresh()
            await self._leave()
        finally:
            slow.cancel()

    async def _leave(self) -> None:
        self.stop()
        await self.left()
        if self.dispatcher.stopped:
            await self.dispatcher.gone()

    async def left(self) -> None:
        """Wait until the engines have closed the model, if they were told to."""
        if self._leaving is not None:
            await asyncio.wait({self._leaving})

    def abort(self) -> None:
        """Fail what no engine has begun with, and leave the engines when the rest has ended."""
        if self.phase is Phase.STOPPED:
            return
        self.refuse()
        closed = "the model was closed before it ran this call"
        calls = [call for call in self.futures.calls if not self._has_begun(call)]
        self.futures.end([(call, Closed(closed)) for call in calls], failed=True)
        for call in self.futures.calls:
            for flight in _flights(call):
                self.dispatcher.cancel(flight, UNLESS_BEGUN)
        if not self.futures.calls:
            self.stop()
            return
        self.futures.drained().add_done_callback(lambda _: self.stop())

    def _has_begun(self, call: Call) -> bool:
        return all(flight.engine is not None and flight.engine.begun(flight) for flight in _flights(call))

    def stop(self) -> None:
        """Begin nothing more."""
        if self.phase is Phase.STOPPED:
            return
        self.phase, engines = Phase.STOPPED, self.dispatcher
        engines.remove(self)
        if not engines.stopped and not engines.loop.is_closed():
            self._leaving = engines.later(engines.supervision.unload(self.key), "a model was not closed in its engines")

    def crash(self, why: str) -> None:
        """A bug of ours: end everything."""
        self.phase, self.why_closed = Phase.STOPPED, why
        with suppress(BaseException):
            self.dispatcher.remove(self)
        calls = list(self.futures.calls)
        for call in calls:
            call.bound = call.rows
        self.futures.end([(call, Closed(why)) for call in calls], failed=True)

    def forget(self, why: str) -> None:
        """Be in a process that was forked."""
        self.phase, self.why_closed, self.thread = Phase.STOPPED, why, 0

    # In by the door.

    def admit(self, call: Call, timeout: Limit | None = None) -> "asyncio.Future[Any]":
        """Admit a call; its future. Who stops waiting for that before the call is settled must withdraw it."""
        self._check_open()
        future = self.futures.accept(call, self.clock())
        if timeout is not None:
            self.futures.time(call, timeout)
        if call.trace is not None:
            call.trace.admitted, call.trace.clock = call.admitted, self.clock
        try:
            self._place(call)
        except Exception as error:
            self.futures.end([(call, error)], failed=True)
        return future

    def check(self, rows: int) -> None:
        """Raise what a call of so many rows is refused with now, as far as the engines have said how much waits."""
        self._check_open()
        bound = self._settings.room
        if bound is None or self._settings.by_positions:
            return
        engines = [engine for engine in self.dispatcher.engines if engine.serves]
        waiting = sum(engine.waiting for engine in engines)
        if waiting + rows > bound and waiting:
            self.counters.refused += 1
            rate = sum(each.standing.cores / each.standing.seconds for each in engines if each.standing.seconds)
            raise QueueFull(
                f"no room for {rows} rows: {waiting} wait in the engines and max_pending={bound}; try again later, or "
                "raise max_pending",
                (waiting + rows - bound) / rate if rate else None,
            )

    def _check_open(self) -> None:
        if self.phase is not Phase.SERVING:
            raise Closed(self.why_closed)
        if not self.dispatcher.in_service:
            raise self._none_left()

    def _none_left(self) -> NoHealthyCores:
        states = self.dispatcher.supervision.engines
        said = ", ".join(f"engine {state.index} {state.state}" for state in states)
        coming = any(state.state != FAILED for state in states)
        then = "they are started again" if coming else "restart the process"
        return NoHealthyCores(f"no engine serves: {said}; {then}", retry_after=1.0 if coming else None)

    # Out to engines.

    def _place(self, call: Call) -> None:
        """Give a call's rows to engines."""
        standings, rows, before = self.dispatcher.standings, call.rows, call.origin
        self._turn += 1
        if rows == 1 or len(standings) == 1 or (isinstance(before, _Spread) and before.whole):
            self._place_whole(call, choose(standings, rows, self._turn))
            return
        rules = self.rules
        piece = call.cut.piece or max(self._sizes(call.bucket), default=0) or max(1, -(-rows // rules.cores))
        shares = spread(standings, rows, piece, self._turn, even=not rules.packing)
        if len(shares) <= 1:
            self._place_whole(call, shares[0].engine if shares else None)
            return
        call.origin = found = _Spread()
        found.flights = [Flight(self, call, share.start, share.stop) for share in shares]
        for flight, share in zip(list(found.flights), shares, strict=True):
            self._send(flight, share.engine)

    def _place_whole(self, call: Call, index: int | None) -> None:
        call.origin = flight = Flight(self, call, 0, call.rows)
        if index is None:
            self._homeless[flight] = None
        else:
            self._send(flight, index)

    def _sizes(self, bucket: int) -> Sequence[int]:
        sizes = self.sizes.get(bucket)
        return sizes.sizes if sizes is not None else ()

    def _send(self, flight: Flight, index: int) -> None:
        """Send rows to an engine. What it raises is for the call."""
        engine, call = self.dispatcher.engines[index], flight.call
        assert engine.wire is not None, "it serves"
        flags, trace = 0, call.trace
        if trace is not None:
            flags |= TIMED if trace.observer is None else TIMED | OBSERVED
        rows = flight.stop - flight.start
        if rows != call.rows:
            flags |= PIECE
            value: Any = sliced(call, flight.start, flight.stop, self._dim)
        else:
            value = ((call.leaves[0],), {}) if call.template is None else call.template
        terms = None
        if call.terms is not None:
            flags |= WITH_TERMS
            terms = tuple(call.terms)
        timeout, rest = NONE
        if call.timer is not None:
            timeout, rest = getattr(call.limit, "whole", call.limit), call.deadline - self.clock()
        number = self.dispatcher.number(flight, engine)
        try:
            large = engine.wire.send(_CALL, number, flags, _pack(self.key, timeout, rest), value, terms)
            if large is not None:
                failed, check = partial(self._unsent, flight, number), partial(self._check_sent, flight, number)
                engine.wire.send_large(large, failed, check)
        except BaseException:
            self.dispatcher.forget_flight(flight)
            raise

    def _check_sent(self, flight: Flight, number: int) -> None:
        """What was copied may be sent, if anybody waits for it, and it is what was passed."""
        call = flight.call
        if call.settled or flight.engine is None or flight.number != number:
            raise _Left
        _check_unmodified(call)

    def _unsent(self, flight: Flight, number: int, error: BaseException) -> None:
        """What was to be sent cannot be."""
        if flight.number == number and not isinstance(error, _Left):
            self.dispatcher.forget_flight(flight)
            self.failed(flight, error)
            self.end()

    def _discard(self, call: Call) -> None:
        """A call has ended before its rows were back: nobody waits for them."""
        for flight in _flights(call):
            self.dispatcher.cancel(flight)
            self.dispatcher.forget_flight(flight)
            self._homeless.pop(flight, None)
            self._suspects.pop(flight, None)
            if flight.died and self._suspects:  # another may have its place, when all that end now have
                self.loop.call_soon(self.dispatcher.guard, self.go_on)
        call.origin = None

    # Back from engines.

    def answered(self, flight: Flight, wire: Wire, source: Source, generation: int, timing: Timing | None) -> None:
        """Rows have their results: `wire` makes them of the source, in a thread if they are large."""
        if isinstance(source, Opened):
            arrived = partial(self._arrived_later, flight, generation, timing)
            wire.elsewhere(partial(self._taken, flight, wire, source), arrived)
            return
        try:
            self._arrived(flight, self._taken(flight, wire, source), generation, timing)
        except Exception as error:
            self.failed(flight, error)

    def _taken(self, flight: Flight, wire: Wire, source: Source) -> Any:
        """The result of a whole call; of a piece, what is copied to its place in that. In a thread, if it is large."""
        call, found = flight.call, flight.call.origin
        if not isinstance(found, _Spread):
            return wire.value(source, True)
        if call.cut.shared:
            output = Output(wire.value(source, False), flight.rows, self._dim)
            found.of(output, call.rows).place(flight.start, output, output.leaves, 0, flight.rows, found.guard)
        else:
            output = Output(wire.value(source, True), None, self._dim, base_of(call))
            found.of(output, call.rows).append(flight.start, output)
        return output

    def _arrived_later(
        self, flight: Flight, generation: int, timing: Timing | None, value: Any, error: BaseException | None
    ) -> None:
        try:
            if error is not None:
                raise carried(error)
            self._arrived(flight, value, generation, timing)
        except Exception as failure:  # what does not fit together, too, is the call's
            self.failed(flight, failure)
        self.end()

    def _arrived(self, flight: Flight, value: Any, generation: int, timing: Timing | None) -> None:
        """Rows are back."""
        call = flight.call
        if call.settled:
            return
        if timing is not None and call.trace is not None:
            _note(call, timing, self.clock())
        found = call.origin
        if isinstance(found, _Spread):
            found.generations.add(generation)
            found.flights.remove(flight)
            if found.flights:
                return
            if len(found.generations) > 1:  # a swap came between: it is one model's, wholly
                self._again_whole(call)
                return
            assert found.parts is not None
            if not call.cut.shared:
                found.parts.join(value)
            value = found.parts.result
        call.bound = call.rows
        call.origin = None
        self._outcomes.append((call, value))

    def _again_whole(self, call: Call) -> None:
        again = _Spread()
        again.whole = True
        call.origin = again
        try:
            _check_unmodified(call)
            self._place(call)
        except Exception as error:
            self.futures.end([(call, error)], failed=True)

    def failed(self, flight: Flight, error: BaseException, refused: bool = False) -> None:
        """Rows have no result, but an error. What an engine has refused counts as such here, too."""
        call = flight.call
        if not call.settled:
            self.futures.end([(call, carried(error))], failed=True)
            if refused and call.settled:
                self.counters.accepted -= 1
                self.counters.failed -= 1
                self.counters.refused += isinstance(error, QueueFull)

    def end(self) -> None:
        """All of a read is handled: end its calls together."""
        outcomes, self._outcomes = self._outcomes, []
        if outcomes:
            self.futures.end(outcomes)
        if self._suspects or self._homeless:
            self.go_on()

    # When an engine dies.

    def lost(self, flights: Sequence[Flight], error: BaseException) -> None:
        """An engine has died with these: they run once more, elsewhere; those that it was executing with care."""
        for flight in flights:
            call = flight.call
            if call.settled:
                continue
            if len(flight.died) >= DEATHS:
                failure = CoreFailed(
                    f"engines {' and '.join(map(str, flight.died))} died while they executed these rows, which are "
                    "not tried on another; see the log for how they ended"
                )
                failure.__cause__ = error
                self.futures.end([(call, failure)], failed=True)
                continue
            try:
                _check_unmodified(call)
            except InputModified as modified:
                self.futures.end([(call, modified)], failed=True)
                continue
            (self._suspects if flight.died else self._homeless)[flight] = None
        self.go_on()

    def go_on(self) -> None:
        """An engine has come, or become free: what waits for one may go."""
        for flight in list(self._homeless):
            if not self._try(flight, self._homeless, self.dispatcher.standings):
                break
        for flight in list(self._suspects):
            free = [
                None if engine.suspect is not None else standing
                for engine, standing in zip(self.dispatcher.engines, self.dispatcher.standings, strict=True)
            ]
            if not self._try(flight, self._suspects, free):
                break
        if (self._homeless or self._suspects) and self.dispatcher.hopeless:
            flights = [*self._homeless, *self._suspects]
            self._homeless.clear()
            self._suspects.clear()
            self.futures.end([(flight.call, self._none_left()) for flight in flights], failed=True)

    def _try(self, flight: Flight, queue: "dict[Flight, None]", standings: Sequence[Standing | None]) -> bool:
        """Send what waits to an engine; whether there was one."""
        index = choose(standings, flight.rows, self._turn)
        if index is None:
            return False
        if flight in queue:  # else it has left with another that could not be sent
            del queue[flight]
            try:
                self._send(flight, index)
            except Exception as error:
                self.failed(flight, error)
        return True

    # Numbers.

    def statistics(self) -> Statistics:
        """The frozen snapshot of now, from any thread: this process's calls, and what the engines have said last."""
        engines = self.dispatcher
        now = [each.statistics[self.key] for each in engines.engines if self.key in each.statistics]
        own = self.counters.snapshot(sum(each.calls.waiting for each in now), 0)
        past = engines.past.get(self.key)
        return added(own, now, [] if past is None else [past])

    def closed(self) -> Statistics:
        """The same when the engines were left."""
        seen = self.statistics()
        cores = tuple(replace(core, state="closed", in_flight=0) for core in seen.cores)
        return replace(seen, cores=cores, waiting_rows=0, waiting_work=0)


class _Left(Exception):
    """Nobody waits for it any more."""


def _flights(call: Call) -> list[Flight]:
    """What of a call has no answer yet."""
    found = call.origin
    return list(found.flights) if isinstance(found, _Spread) else [] if found is None else [found]


def _check_unmodified(call: Call) -> None:
    if version_of(call.leaves) != call.version:
        raise InputModified(MODIFIED)


def _changeable(settings: Settings) -> dict[str, Any]:
    """What may be set while a model is served."""
    return {
        "split_size": settings.split_size,
        "max_pending": settings.max_pending,
        "packing": settings.packing,
    }


def _note(call: Call, timing: Timing, now: float) -> None:
    """Note how a call was run in an engine, as if it had run here: the way to and fro counts as waiting."""
    started = call.admitted + timing.queued + max(0.0, now - call.admitted - timing.total)
    call.trace.note(timing.core, started, started + timing.device, timing.batch_rows, timing.padded_rows, timing.why)
