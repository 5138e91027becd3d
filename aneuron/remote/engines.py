"""The engines of a pool, as a process that uses them knows them: links, what each has to do, which serve.

Lives here: a link to each engine, frames in, what is known of engines; to the pool, this is in the place of the lanes.
Must not be here: calls (client.py), which engine is best (routing.py), processes (supervisor.py, keeper.py).
"""

import asyncio
import logging
import mmap
import os
import pickle
import struct
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from contextvars import copy_context
from functools import partial
from threading import get_ident
from typing import Any, Protocol

from aneuron.engine.dispatcher import FORKED
from aneuron.engine.failures import text
from aneuron.errors import CoreFailed
from aneuron.remote import messages
from aneuron.remote.failures import restored
from aneuron.remote.frames import Frame, Kind
from aneuron.remote.memory import nameless
from aneuron.remote.messages import REASONS, TIMED
from aneuron.remote.routing import Standing
from aneuron.remote.sums import added, share
from aneuron.remote.supervision import FAILED, READY, Supervision
from aneuron.remote.wire import BOARD, Source, Wire, copiers
from aneuron.sched.call import Call
from aneuron.stats import Counters, EngineStatistics, PoolStatistics, Statistics, Timing

logger = logging.getLogger("aneuron")

NOTHING = Counters().snapshot(0, 0)
PATIENCE = 1.0  # seconds that an engine has to say how it is, and until a link is tried again


class Flight:
    """Rows of a call on their way through an engine."""

    __slots__ = ("call", "died", "engine", "number", "run", "start", "stop")

    def __init__(self, run: "Calling", call: Call, start: int, stop: int) -> None:
        self.run, self.call, self.start, self.stop = run, call, start, stop
        self.died: tuple[int, ...] = ()  # engines, while they executed it
        self.engine: Engine | None = None  # that has it
        self.number = 0

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


class Calling(Protocol):
    """A model's calls, as the links know them."""

    key: int

    def answered(self, flight: Flight, wire: Wire, source: Source, generation: int, timing: Timing | None) -> None:
        """Rows have their results: `wire` makes them of the source."""

    def failed(self, flight: Flight, error: BaseException, refused: bool = False) -> None:
        """Rows have none, but an error; `refused`: they were never accepted."""

    def lost(self, flights: Sequence[Flight], error: BaseException) -> None:
        """An engine has died with these; those that it was executing have it among `died`."""

    def go_on(self) -> None:
        """An engine has come, or has become free: what waits for one may go."""

    def end(self) -> None:
        """All of a read is handled."""

    def crash(self, why: str) -> None:
        """A bug of ours: end everything."""

    def forget(self, why: str) -> None:
        """Be in a process that was forked."""

    def stop(self) -> None:
        """Begin nothing more."""


class Engine:
    """One engine, and the link to it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.wire: Wire | None = None  # None while it does not serve
        self.incarnation = -1  # of what the link is to
        self.draining = False  # it is sent nothing more
        self.connecting: asyncio.Task[None] | None = None
        self.told: asyncio.Event = asyncio.Event()  # it has said how it is
        self.flights: dict[int, Flight] = {}  # by their numbers, in the order of sending
        self.standing = Standing(0, 0)
        self.suspect: Flight | None = None  # one of these, that an engine has died of
        self.board: mmap.mmap | None = None
        self.rows = 0  # of flights
        # As it has said last:
        self.others = 0  # rows of other clients
        self.waiting = 0  # rows, of all clients
        self.statistics: dict[int, Statistics] = {}
        self.pool: PoolStatistics | None = None
        self.observed: dict[int, ExitStack] = {}  # executions that somebody is told of

    @property
    def serves(self) -> bool:
        """Whether it takes calls."""
        return self.wire is not None and not self.draining

    def begun(self, flight: Flight) -> bool:
        """Whether it has begun to execute something."""
        return self.board is not None and self.board[flight.number % messages.BEGUN] != 0


class Engines:
    """Those of a pool, from its start to its close. On the loop of the pool."""

    def __init__(self, supervision: Supervision, backend: Any, traits: Any, held: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()
        self.context = copy_context()
        self.supervision = supervision
        self.backend, self.traits = backend, traits
        self.held = held
        self.coming = 0
        self.forked = self.stopped = False
        self.runs: list[Any] = []
        self.engines: list[Engine] = []
        self.standings: list[Standing | None] = []  # what is known of those that serve
        self.in_service = 0  # cores
        self.threads = None if getattr(supervision, "virtual", False) else copiers()  # there are none in virtual time
        self.past: dict[int, Statistics] = {}  # of engines that have died, by model
        self.num_workers: int | None = None
        self._numbers = 0
        self._ending: asyncio.Task[None] | None = None
        self._touched: dict[Any, None] = {}  # runs that a read has answers of
        _all.add(self)

    @property
    def core_ids(self) -> Sequence[int]:
        """The numbers of all cores."""
        return [core for state in self.supervision.engines for core in state.cores]

    @property
    def slots(self) -> int:
        """How many batches may be in flight."""
        return self.num_workers or sum(sum(each.pool.slots) for each in self.engines if each.pool is not None)

    @property
    def hopeless(self) -> bool:
        """Whether no engine can be started any more, as far as was tried."""
        return all(state.state == FAILED for state in self.supervision.engines)

    def _look(self) -> None:
        """Which engines serve, and how many cores, has changed, maybe."""
        self.standings = [engine.standing if engine.serves else None for engine in self.engines]
        self.in_service = sum(standing.cores for standing in self.standings if standing is not None)

    # Links.

    async def open(self) -> None:
        """Start them, or find them. What is loaded on them is asked for after that."""
        await self.supervision.start()
        self.engines = [Engine(state.index) for state in self.supervision.engines]
        self.supervision.subscribe(self._changed)

    async def connected(self) -> None:
        """Wait until there is a link to each engine that serves."""
        self._changed()
        while tasks := [each.connecting for each in self.engines if each.connecting is not None]:
            await asyncio.wait(tasks)
        if not any(each.wire for each in self.engines):
            raise CoreFailed("there is no link to any engine; the log says why")

    async def refresh(self) -> None:
        """Have the engines say what they have done, up to now; not for long."""
        asked = [engine for engine in self.engines if engine.wire is not None]
        for engine in asked:
            engine.told.clear()
            assert engine.wire is not None
            engine.wire.send_bytes(Kind.HELLO, 0, b"")
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for engine in asked:
                    await engine.told.wait()

    def _changed(self) -> None:
        """Engines have come, or are to be left alone."""
        if self.stopped:
            return
        for state, engine in zip(self.supervision.engines, self.engines, strict=True):
            if state.state == READY and engine.incarnation != state.incarnation:
                engine.incarnation = state.incarnation
                engine.connecting = self.loop.create_task(self._connect(engine), name="aneuron link")
            engine.draining = state.state != READY
            if state.state == FAILED:
                self.loop.call_soon(self.go_on)  # what waits, if it waits for nothing, is told
        self._look()

    async def _connect(self, engine: Engine) -> None:
        try:
            end = await self.supervision.connect(engine.index)
            self._lose(engine, None)
            wire = Wire(
                end,
                self.loop,
                partial(self._guarded_frames, engine),
                partial(self._lose, engine),
                "input",
                self.threads,
            )
            wire.send_bytes(Kind.HELLO, 0, b"")
            fd = nameless("begun")
            try:
                os.ftruncate(fd, messages.BEGUN)
                engine.board = mmap.mmap(fd, messages.BEGUN)
                wire.send_fd(Kind.SEGMENT, fd, BOARD)
            finally:
                os.close(fd)
            state = self.supervision.engines[engine.index]
            engine.incarnation = state.incarnation
            engine.standing = Standing(len(state.cores), 0)
            engine.others = engine.waiting = 0
            engine.told.clear()
            engine.wire = wire
            self._look()
            await engine.told.wait()  # `_lose` sets it too
        except Exception as error:
            logger.warning("there is no link to engine %d: %s", engine.index, text(error))
            engine.incarnation = -1
            self.loop.call_later(PATIENCE, self._changed)
        finally:
            engine.connecting = None
        self.go_on()

    def _lose(self, engine: Engine, error: BaseException | None) -> None:
        """The link to an engine is gone: it has died, or was ended."""
        wire, engine.wire = engine.wire, None
        if wire is None:
            return
        engine.told.set()
        engine.incarnation = -1
        self.loop.call_later(PATIENCE, self._changed)  # if it lives, there may be another link
        wire.close()
        flights, engine.flights = list(engine.flights.values()), {}
        for flight in flights:
            flight.engine = None
            if engine.begun(flight):
                flight.died += (engine.index,)
        engine.board = None  # which holds a descriptor
        engine.rows, engine.suspect, engine.waiting, engine.standing = 0, None, 0, Standing(0, 0)
        self._look()
        for key, statistics in engine.statistics.items():
            before = self.past.get(key)
            self.past[key] = statistics if before is None else added(NOTHING, [], [before, statistics])
        engine.statistics, engine.pool = {}, None
        failure = CoreFailed(f"engine {engine.index} has died" + (f": {text(error)}" if error is not None else ""))
        for stack in engine.observed.values():
            _leave(stack, failure)
        engine.observed.clear()
        for run in list(self.runs):
            own = [flight for flight in flights if flight.run is run]
            if own:
                self.guard(partial(run.lost, own, failure))

    # Out.

    def number(self, flight: Flight, engine: Engine) -> int:
        """Note that an engine is to have a flight; the number that it has there."""
        self._numbers += 1
        flight.engine, flight.number = engine, self._numbers
        engine.flights[self._numbers] = flight
        rows = flight.stop - flight.start
        engine.rows += rows
        engine.standing.rows += rows
        if flight.died:
            engine.suspect = flight
        if engine.board is not None:
            engine.board[self._numbers % messages.BEGUN] = 0
        return self._numbers

    def forget_flight(self, flight: Flight) -> None:
        """An engine has answered a flight, or is not to."""
        engine, flight.engine = flight.engine, None
        if engine is None or engine.flights.pop(flight.number, None) is None:
            return
        rows = flight.stop - flight.start
        engine.rows -= rows
        engine.standing.rows -= rows
        if engine.suspect is flight:
            engine.suspect = None

    def cancel(self, flight: Flight, flags: int = 0) -> None:
        """Nobody waits for a flight."""
        if flight.engine is not None and flight.engine.wire is not None:
            flight.engine.wire.send_bytes(Kind.CANCEL, flags, b"", flight.number)

    # In.

    def _guarded_frames(self, engine: Engine, frames: list[Frame]) -> None:
        try:
            self._frames(engine, frames)
        except BaseException as error:
            self.crash(error)

    def _frames(self, engine: Engine, frames: list[Frame]) -> None:
        for frame in frames:
            kind = frame.kind
            if kind == Kind.RESULT:
                self._result(engine, frame)
            elif kind == Kind.ERROR:
                flight = engine.flights.get(frame.id)
                if flight is not None:
                    self.forget_flight(flight)
                    self._touched[flight.run] = None
                    error = restored(frame.body)
                    if frame.flags & messages.LEAVING:  # of which nobody has told us yet
                        engine.draining = True
                        self._look()
                        flight.run.lost([flight], error)
                    else:
                        flight.run.failed(flight, error, bool(frame.flags & messages.REFUSED))
            elif kind == Kind.REPORT:
                self._report(engine, frame)
            elif kind in (Kind.BEGIN, Kind.END):
                self._observed(engine, frame)
        touched, self._touched = self._touched, {}
        for run in touched:
            run.end()

    def _result(self, engine: Engine, frame: Frame) -> None:
        flight, wire = engine.flights.get(frame.id), engine.wire
        assert wire is not None
        body, flags, at, timing = frame.body, frame.flags, messages.RESULT.size, None
        (generation,) = messages.RESULT.unpack_from(body)
        if flags & TIMED:
            queued, device, total, core, rows, padded, why = messages.TIMING.unpack_from(body, at)
            timing = Timing(queued, device, total, core, rows, padded, REASONS[why])
            at += messages.TIMING.size
        source = wire.source(body[at:], flags)
        if flight is None:  # it was cancelled meanwhile
            return
        self.forget_flight(flight)
        run = flight.run
        self._touched[run] = None
        run.answered(flight, wire, source, generation, timing)

    def _report(self, engine: Engine, frame: Frame) -> None:
        if not frame.flags:
            engine.others, cores, seconds, engine.waiting = messages.REPORT.unpack(frame.body)
            standing = engine.standing
            standing.rows, standing.seconds = engine.others + engine.rows, seconds
            if cores != standing.cores:
                standing.cores = cores
                self._look()
                self.loop.call_soon(self.go_on)  # for what waits it may be the first
            return
        engine.statistics, engine.pool = pickle.loads(frame.body)
        engine.told.set()

    def _observed(self, engine: Engine, frame: Frame) -> None:
        number, core, rows, padded, why = messages.BATCH.unpack_from(frame.body)
        rest = frame.body[messages.BATCH.size :]
        if frame.kind == Kind.END:
            stack = engine.observed.pop(number, None)
            error = restored(rest) if frame.flags else None
            if stack is not None:
                _leave(stack, error)
            return
        count = len(rest) // 12
        numbers = struct.unpack_from(f"<{'QI' * count}", rest)
        by_observer: dict[Any, list[tuple[Any, int]]] = {}
        for flight_number, own in zip(numbers[::2], numbers[1::2], strict=True):
            flight = engine.flights.get(flight_number)
            trace = flight.call.trace if flight is not None else None
            if trace is not None and trace.observer is not None:
                by_observer.setdefault(trace.observer, []).append((trace.token, own))
        stack = ExitStack()
        engine.observed[number] = stack
        try:
            for observer, calls in by_observer.items():
                stack.enter_context(observer.batch(calls, core=core, rows=rows, padded_rows=padded, why=REASONS[why]))
        except Exception:
            logger.exception("an observer has raised; the calls go on")

    def go_on(self) -> None:
        """What waits for an engine may have one."""
        for run in list(self.runs):
            self.guard(run.go_on)

    # For the pool, and the models' lifecycles.

    def call_loop(self, callback: Callable[[], Any]) -> None:
        """Have the loop call. From any thread."""
        with suppress(RuntimeError):  # the loop is closed, nobody waits
            self.loop.call_soon_threadsafe(callback)

    def guard(self, callback: Callable[[], None]) -> None:
        """Call; what it raises closes the pool."""
        try:
            callback()
        except BaseException as error:
            self.crash(error)

    def crash(self, error: BaseException) -> None:
        """A bug of ours must not leave anybody waiting."""
        logger.critical("the links to the engines failed and are closed; please report this", exc_info=error)
        why = f"the model was closed by an internal error ({text(error)}); please report it. aclose(), then start()"
        for run in list(self.runs):
            run.crash(why)
        with suppress(BaseException):
            self.stop()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error

    def resize(self, num_workers: int) -> None:
        """Let so many batches be in flight, in all engines together."""
        self.num_workers = num_workers
        self.later(self.supervision.change(None, num_workers=num_workers), "num_workers was not changed")

    def later(self, work: Any, what: str) -> "asyncio.Task[Any]":
        """Do something in a task; what it raises is logged."""
        task = self.loop.create_task(work, name="aneuron change")
        _tasks.add(task)

        def ended(task: "asyncio.Task[Any]") -> None:
            _tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("%s: %s", what, text(error))

        task.add_done_callback(ended)
        return task

    def add(self, run: Any) -> None:
        """A model is served."""
        self.runs.append(run)

    def remove(self, run: Any) -> None:
        """A model has left."""
        with suppress(ValueError):
            self.runs.remove(run)
        self.stop_if_unused()

    def stop_if_unused(self) -> None:
        """End the engines where no model needs them any more."""
        if not self.runs and not self.held and not self.coming:
            self.stop()

    def stop(self) -> None:
        """Leave the engines; those of nobody else end."""
        if self.stopped:
            return
        self.stopped = True
        if self.threads is not None:
            self.threads.shutdown(wait=False)
        for engine in self.engines:
            wire, engine.wire = engine.wire, None
            if engine.connecting is not None:
                engine.connecting.cancel()
            if wire is not None:
                with suppress(Exception):
                    wire.send_bytes(Kind.BYE, 0, b"")
                wire.close()
            engine.board = None
        if self.loop.is_closed():
            self.supervision.abandon()
            return
        self._ending = self.loop.create_task(self.supervision.aclose(), name="aneuron engines end")

    async def gone(self) -> None:
        """Wait until they have ended, if they were told to."""
        if self._ending is not None:
            await asyncio.shield(self._ending)

    def join(self) -> None:
        """There are no threads to wait for."""

    def statistics(self) -> PoolStatistics:
        """The pool's, and each engine's. From any thread."""
        pools = [each.pool for each in self.engines if each.pool is not None]
        engines = tuple(
            EngineStatistics(
                state.index, state.pid, state.state, tuple(state.cores), max(0, state.incarnation - 1), engine.rows,
                engine.others, engine.waiting,
            )
            for state, engine in zip(self.supervision.engines, self.engines, strict=True)
        )  # fmt: skip
        models = list(zip(*[pool.models for pool in pools], strict=False))
        return PoolStatistics(
            tuple(self.core_ids),
            tuple(slot for pool in pools for slot in pool.slots),
            tuple(batches for pool in pools for batches in pool.in_flight),
            tuple(map(share, models)),
            engines,
        )

    def forget(self) -> None:
        """Be in a process that was forked: the links are the parent's."""
        self.forked, self.thread = True, 0
        for run in self.runs:
            run.forget(FORKED)


def _leave(stack: ExitStack, error: BaseException | None) -> None:
    """An execution has ended that somebody is told of."""
    try:
        stack.__exit__(type(error) if error is not None else None, error, None)
    except Exception as raised:
        if raised is not error:
            logger.exception("an observer has raised; the calls go on")


_tasks: set["asyncio.Task[Any]"] = set()
_all: "weakref.WeakSet[Engines]" = weakref.WeakSet()


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
