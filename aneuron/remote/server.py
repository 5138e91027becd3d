"""An engine's side of its clients' calls: models that are served here, calls in, results back.

Lives here: what an engine does with each frame, and what it tells its clients of itself. Must not be here: the process
(engine.py), how values cross (wire.py), who runs when (the models' own pool decides, as in any process).
"""

import asyncio
import logging
import mmap
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aneuron.engine.dispatcher import Dispatcher, in_a_thread
from aneuron.engine.failures import text
from aneuron.errors import Closed, CoreFailed
from aneuron.lifecycle import Lifecycle
from aneuron.observing import Trace
from aneuron.parallel import AsyncDataParallel
from aneuron.pool import Pool
from aneuron.remote import messages
from aneuron.remote.failures import pickled
from aneuron.remote.frames import Frame, Kind
from aneuron.remote.messages import LEAVING, OBSERVED, PIECE, REASONS, REFUSED, TIMED, UNLESS_BEGUN, WITH_TERMS
from aneuron.remote.routing import room
from aneuron.remote.sources import Source
from aneuron.remote.wire import BARE, Wire, copiers
from aneuron.sched.call import NEVER, Call, Chunk, Limit, Rest, Terms
from aneuron.sched.room import Work
from aneuron.signature import TensorSpec
from aneuron.stats import CoreStatistics, Statistics, Timing

logger = logging.getLogger("aneuron")

TELL = 0.05  # seconds between two statistics that clients are sent, at least
_RESULT = Kind.RESULT
MUCH = 64 << 20  # bytes that a client has not read, beyond which nothing is read from it


@dataclass(frozen=True)
class Facts:
    """What a client must know of a model that is loaded in an engine."""

    batch_size: int | None
    preferred: int
    most: int | None
    sizes: Mapping[int, Sequence[int]]  # by bucket, where it is compiled
    packing: bool
    loaded: int  # cores of the engine that serve it
    outputs: tuple[TensorSpec, ...] | None = None


class Server:
    """The models of an engine, for its clients. On the engine's loop."""

    def __init__(
        self, pool: Pool, ids: Sequence[int], total: int, num_workers: int | None = None, inline: bool = False
    ) -> None:
        self.threads = None if inline else copiers()  # on a virtual loop there are none
        self.models: dict[int, _Served] = {}
        self.clients: set[_Client] = set()
        self.rows = 0  # of all clients that are not answered
        self.leaving = False  # it was told to drain
        self.on_state: Callable[[dict[str, Any]], None] = lambda _: None
        self.ids = tuple(ids)
        self._pool, self._total = pool, total
        self._loop = asyncio.get_running_loop()
        self._answering: list[_Client] = []  # that have answers to send
        self._telling: asyncio.TimerHandle | None = None
        self._seconds = 0.0  # of a core, for a row, when it was told last
        self._state: dict[str, Any] = {}
        if num_workers is not None:
            pool.num_workers = room(num_workers, len(ids), total)

    # Models.

    async def load(self, key: int, source: Source, given: Mapping[str, Any], generation: int = 0) -> Facts:
        """Load a model on the engine's cores; raises what a start raises."""
        if key in self.models:
            return self.models[key].facts()
        net = await self._opened(source)
        model = AsyncDataParallel(net, pool=self._pool, **self._own(given))
        served = _Served(self, key, model, generation)
        await model.start()
        self.models[key] = served
        served.follow()
        dispatcher = self._pool.dispatcher
        if isinstance(dispatcher, Dispatcher):
            dispatcher.changed, dispatcher.answer = self._cores_changed, self._answer
        self.tell()
        return served.facts()

    async def prepare(self, key: int, source: Source, generation: int) -> Facts:
        """Load what is to be served in place of a model, beside it, as far as that goes without serving it."""
        served = self.models[key]
        await served.prepare(await self._opened(source), generation)
        return served.facts()

    async def commit(self, key: int, generation: int) -> None:
        """Serve what was prepared, from the next call on; returns when the one before has ended."""
        await self.models[key].commit(generation)
        self.tell()

    async def discard(self, key: int, generation: int) -> None:
        """Forget what was prepared."""
        if key in self.models:
            await self.models[key].discard(generation)

    async def change(self, key: int | None, **settings: Any) -> None:
        """Serve with other settings; the pool's where no model is named."""
        if key is None:
            self._pool.num_workers = room(settings["num_workers"], len(self.ids), self._total)
            return
        if key not in self.models:
            return  # it has been closed meanwhile
        model = self.models[key].model
        if not settings.pop("packing", True):
            model.disable_dynamic_batching()
        for name, value in self._own(settings).items():
            setattr(model, name, value)

    async def unload(self, key: int) -> None:
        """Close a model."""
        served = self.models.pop(key, None)
        if served is not None:
            await served.close()

    async def _opened(self, source: Source) -> Any:
        return await in_a_thread(source.open, getattr(self._pool.chosen, "workers", None))

    def _own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A model's arguments, with what of its bounds is this engine's."""
        own = dict(given)
        bound = own.get("max_pending")
        if isinstance(bound, Work):
            own["max_pending"] = Work(positions=room(bound.positions, len(self.ids), self._total))
        elif bound is not None:
            own["max_pending"] = room(bound, len(self.ids), self._total)
        if own.get("min_cores") is not None:
            own["min_cores"] = 1  # how many there must be in all engines together, who starts them looks
        return own

    # Clients.

    def connect(self, end: Any) -> None:
        """Serve a client by its end of a link."""
        self.clients.add(_Client(self, end, self._loop))
        self.say()

    def served(self, key: int) -> "_Served":
        """A model that is served."""
        try:
            return self.models[key]
        except KeyError:
            raise Closed("the model is closed in this engine; start() opens it again") from None

    async def drain(self) -> None:
        """Finish the calls that were accepted, and close all models: clients may take others elsewhere."""
        self.leaving = True
        for served in list(self.models.values()):
            await served.close()
        await self._pool.aclose()
        for client in list(self.clients):
            client.leave()

    def abort(self) -> None:
        """End at once what has not begun."""
        for client in list(self.clients):
            client.leave()
        for served in self.models.values():
            served.life.abort()

    def gather(self) -> Dispatcher | None:
        """What is to be let go when a read was handled, if all calls of this iteration are in it."""
        dispatcher = self._pool.dispatcher if len(self.clients) == 1 else None
        return dispatcher if isinstance(dispatcher, Dispatcher) and dispatcher.hold() else None

    def answer_soon(self, client: "_Client") -> None:
        """A client has answers to send: with all that end now, whose calls the lanes are ending."""
        if not self._answering and not getattr(self._pool.dispatcher, "handing", False):
            self._loop.call_soon(self._answer)
        self._answering.append(client)

    def _answer(self) -> None:
        answering, self._answering = self._answering, []
        for client in answering:
            client.answer_all()

    # Numbers of cores: the engine's own count from 0, clients know others.

    def number(self, core: int) -> int:
        """The number that clients know a core by."""
        dispatcher = self._pool.dispatcher
        own = list(dispatcher.core_ids) if dispatcher is not None else []
        return self.ids[own.index(core)] if core in own else core

    def numbered(self, core: CoreStatistics) -> CoreStatistics:
        """A core's statistics, by that number."""
        return replace(core, id=self.number(core.id))

    def timing(self, timing: Timing) -> bytes:
        """How a call was run, for its client."""
        return messages.TIMING.pack(
            timing.queued, timing.device, timing.total, self.number(timing.core), timing.batch_rows,
            timing.padded_rows, REASONS.index(timing.why),
        )  # fmt: skip

    def failure(self, error: BaseException) -> bytes:
        """An error, for its client."""
        if isinstance(error, CoreFailed) and error.core is not None:
            error.core = self.number(error.core)
        return pickled(error)

    def send_soon(self, to: Mapping["_Client", list[int]], kind: Kind, about: tuple[int, ...], error: Any) -> None:
        """Tell clients of an execution. From any thread."""
        head = messages.BATCH.pack(*about)
        failure = b"" if error is None else pickled(error)

        def send() -> None:
            for client, calls in to.items():
                pairs = struct.pack(f"<{'QI' * (len(calls) // 2)}", *calls) if kind == Kind.BEGIN else failure
                client.wire.send_bytes(kind, bool(failure), head + pairs)

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(send)

    def crash(self, why: str) -> None:
        """Be gone, as a process that was killed is: for tests, where it is none."""
        for client in list(self.clients):
            client.vanish()
        if self._telling is not None:
            self._telling.cancel()
        dispatcher = self._pool.dispatcher
        if dispatcher is not None:
            for run in list(dispatcher.runs):
                run.crash(why)
            dispatcher.stop()
        for served in self.models.values():
            served.life.run = None

    # What is told.

    def _cores_changed(self) -> None:
        self._loop.call_soon(self.say)  # whoever says so has not done yet

    def tell(self) -> None:
        """Have the clients told, soon, of what has changed."""
        if self._telling is None:
            self._telling = self._loop.call_later(TELL, self.say)

    def say(self) -> None:
        """Tell all clients what was done up to now."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        said = {key: served.statistics() for key, served in self.models.items()}
        if self._look_at_cores(said.values()):
            self.on_state(self._state)
        self._seconds = self._seconds_of_a_row()
        frame = pickle.dumps((said, self._pool.statistics()))
        for client in list(self.clients):
            client.wire.send_bytes(Kind.REPORT, 1, frame)
            client.report()

    def _look_at_cores(self, said: Iterable[Statistics]) -> bool:
        """Look which cores serve, and which never will; whether that has changed."""
        serves, lost = set(self.ids), set()
        for statistics in said:
            for core in statistics.cores:
                if core.state not in ("ready", "suspect"):
                    serves.discard(core.id)
                if core.state == "failed":
                    lost.add(core.id)
        state = {"lost": sorted(lost), "in_service": len(serves) if self.models else 0}
        changed, self._state = state != self._state, state
        return changed

    def busy(self, own: int) -> tuple[int, int, float, int]:
        """How busy the engine is, for a client that has so many rows here: what a REPORT says."""
        cores, waiting = len(self.ids), 0
        for served in self.models.values():
            run = served.life.run
            if run is not None:
                waiting += run.scheduler.waiting_rows
                cores = min(cores, run.recovery.in_service)
        return self.rows - own, cores, self._seconds, waiting

    def _seconds_of_a_row(self) -> float:
        work = [core.work() for served in self.models.values() for core in served.model_cores()]
        rows, seconds = sum(each[0] for each in work), sum(each[1] for each in work)
        return seconds / rows if rows else 0.0


class _Served:
    """A model that is served here, and which of its generations that is."""

    def __init__(self, server: Server, key: int, model: AsyncDataParallel, generation: int) -> None:
        self.model = model
        self.key = key
        self.life: Lifecycle = model._life
        self.calls = model._calls
        self.generation = generation
        self._server = server
        self._run: Any = None
        self._next: tuple[int, asyncio.Task[None], asyncio.Future[None]] | None = None
        self._observer = _Observer(server)

    def follow(self) -> None:
        """Note the run that serves now."""
        run = self.life.run
        if run is not self._run and run is not None:
            self._run = run
            run.tell_begun(_note_begun)

    def facts(self) -> Facts:
        """What clients must know of it."""
        run, program = self.life.run, self.life.program
        if run is None:
            raise Closed("the model was closed while it was being loaded, or swapped")
        rules = run.rules
        serving = [health.serves for health in run.recovery.health]
        return Facts(
            program.batch_size, rules.preferred, program.takes.most,
            {bucket: list(sizes.sizes) for bucket, sizes in run.sizes.items()} if program.batch_size else {},
            rules.packing, sum(serving), self.life.signature().outputs,
        )  # fmt: skip

    # A swap, in two steps.

    async def prepare(self, net: Any, generation: int) -> None:
        """Load another beside it."""
        loop = asyncio.get_running_loop()
        loaded, go = loop.create_future(), loop.create_future()

        async def wait() -> None:
            loaded.set_result(None)
            await go
            self.generation = generation

        task = loop.create_task(self.life.swap(net, wait), name=f"aneuron swap {self.key}")
        self._next = generation, task, go
        try:
            await asyncio.wait({task, loaded}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            await self.discard(generation)
            raise
        if task.done():
            self._next = None
            await task

    async def commit(self, generation: int) -> None:
        """Serve it."""
        if self._next is None or self._next[0] != generation:
            raise RuntimeError(f"generation {generation} of model {self.key} was not prepared")
        (_, task, go), self._next = self._next, None
        if not go.done():
            go.set_result(None)
        await task

    async def discard(self, generation: int) -> None:
        """Forget it."""
        if self._next is None or self._next[0] != generation:
            return
        (_, task, _), self._next = self._next, None
        task.cancel()
        with suppress(BaseException):
            await task

    async def close(self) -> None:
        """Finish its calls, and let go of what was to take its place."""
        if self._next is not None:
            await self.discard(self._next[0])
        await self.model.aclose()

    # Calls.

    def admit(self, reply: "_Reply", flags: int, inputs: Any, terms: Any, limit: Limit | None) -> None:
        """Admit a client's call; raises what a call is refused with."""
        run = self.life.run
        if run is None:
            raise Closed("the model is closed in this engine; start() opens it again")
        if run is not self._run:
            self.follow()
        trace = Trace() if flags & (TIMED | OBSERVED) else None
        if trace is not None and flags & OBSERVED:
            trace.observer, trace.token = self._observer, (reply.client, reply.number)
        args, kwargs = inputs
        call = self.calls.measured(args, kwargs)
        call.origin = reply.client.board, reply.number % messages.BEGUN
        call.future = reply
        reply.run, reply.generation = run, self.generation
        reply.client.enter(reply, call)
        self.calls.admit(run, call, args, kwargs, Terms(*terms) if terms else None, limit, trace)

    def withdraw(self, call: Call) -> None:
        """Its client does not wait for a call any more."""
        for run in (self.life.run, *self.life.retired):
            if run is not None and call in run.futures.calls:
                run.futures.withdraw(call)
                return

    def marked(self, output: Any, reply: "_Reply") -> Any:
        """An output of some of a larger call's rows, with marks in it that say how it is joined with the others'."""
        return reply.run.marked(output, reply.call) if reply.call.cut.shared else output

    # Numbers.

    def model_cores(self) -> Any:
        """The counters of its cores."""
        return self.life.counters.cores.values()

    def statistics(self) -> Statistics:
        """Its statistics, with the cores' numbers that clients know."""
        seen = self.model.statistics()
        return replace(seen, cores=tuple(self._server.numbered(core) for core in seen.cores))


def _note_begun(chunks: Sequence[Chunk]) -> None:
    """Mark calls on their clients' boards. Worker thread."""
    for call, _, _ in chunks:
        if call.origin is not None:
            board, place = call.origin
            if board is not None:
                board[place] = 1


class _Reply:
    """What answers a call's client: to the model's own runtime, the call's future."""

    __slots__ = ("call", "client", "flags", "generation", "number", "run", "served")

    def __init__(self, client: "_Client", number: int, flags: int, served: _Served) -> None:
        self.client, self.number, self.flags, self.served = client, number, flags, served
        self.run: Any = None  # that it is admitted to, and which generation of the model that is
        self.generation = 0
        self.call: Call

    def done(self) -> bool:
        """Whether nobody waits: who leaves withdraws the call at once."""
        return False

    def set_result(self, output: Any) -> None:
        """The call has ended."""
        self.client.answer(self, output, None)

    def set_exception(self, error: BaseException) -> None:
        """The call has failed."""
        self.client.answer(self, None, error)

    def cancel(self) -> None:
        """The call was withdrawn, by its client or by the model."""
        self.client.answer(self, None, Closed("the model was closed in its engine before it ran this call"))


class _Client:
    """A client's calls in this engine."""

    def __init__(self, server: Server, end: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.board: mmap.mmap | None = None
        self.calls: dict[int, _Reply] = {}  # not ended, by the client's numbers
        self.rows = 0
        self._server, self._loop = server, loop
        self._answers: list[tuple[_Reply, Any, BaseException | None]] = []  # that are to be sent
        self._said: tuple[Any, ...] = ()  # how busy the engine was
        self._reporting = self._paused = self._gone = False
        self.wire = Wire(end, loop, self._frames, self._lost, "output", server.threads)

    # In.

    def _frames(self, frames: list[Frame]) -> None:
        dispatcher = self._server.gather()
        try:
            for frame in frames:
                self._frame(frame)
        finally:
            if dispatcher is not None:
                dispatcher.let_go()
        if dispatcher is not None:
            self._report()
        elif not self._reporting and not self._gone:  # what of the calls waits when they were dispatched
            self._reporting = True
            self._loop.call_soon(self._report)

    def _frame(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == Kind.CALL:
            self._call(frame)
        elif kind == Kind.CANCEL:
            self._cancel(frame.id, bool(frame.flags & UNLESS_BEGUN))
        elif kind == Kind.SEGMENT:
            self.board = mmap.mmap(frame.fd, messages.BEGUN)
            os.close(frame.fd)
        elif kind == Kind.HELLO:
            self._server.say()
        elif kind == Kind.BYE:
            self.leave()

    def _call(self, frame: Frame) -> None:
        number, flags, body, at = frame.id, frame.flags, frame.body, messages.CALL.size
        try:
            key, timeout, left = messages.CALL.unpack_from(body)
            terms = None
            if flags & WITH_TERMS:
                terms = self.wire.bare(body[at:])
                at += BARE
            inputs = self.wire.value(self.wire.source(body[at:], flags), False)  # though it be refused: it is freed
            served = self._server.served(key)
            limit = None if left == NEVER else Rest.of(Limit(timeout), timeout - left)
            served.admit(_Reply(self, number, flags, served), flags, inputs, terms, limit)
        except Exception as error:
            self._forget(number)
            self._fail(number, error, REFUSED | LEAVING if self._server.leaving else REFUSED)

    def enter(self, reply: _Reply, call: Call) -> None:
        """A call is about to be admitted: from here on it may end."""
        reply.call = call
        self.calls[reply.number] = reply
        self.rows += call.rows
        self._server.rows += call.rows

    def _cancel(self, number: int, unless_begun: bool = False) -> None:
        reply = self.calls.get(number)
        if reply is None or (unless_begun and reply.call.bound == reply.call.rows):
            return
        self._forget(number)
        reply.served.withdraw(reply.call)
        if unless_begun:
            self._fail(number, Closed("the model was closed before it ran this call"))

    def _forget(self, number: int) -> bool:
        reply = self.calls.pop(number, None)
        if reply is None:
            return False
        self.rows -= reply.call.rows
        self._server.rows -= reply.call.rows
        return True

    # Out.

    def answer(self, reply: _Reply, output: Any, error: BaseException | None) -> None:
        """A call has ended. It is answered with the others that end now, when all have: here the model's calls are
        being ended, and nothing of ours may raise.
        """
        if self._forget(reply.number):
            if not self._answers:
                self._server.answer_soon(self)
            self._answers.append((reply, output, error))

    def answer_all(self) -> None:
        """Send the answers that there are, together."""
        answers, self._answers = self._answers, []
        if self._gone or not answers:
            return
        for reply, output, error in answers:
            if error is None:
                self._answer(reply, output)
            else:
                self._fail(reply.number, error)
        self._report()
        self.wire.flush()

    def _answer(self, reply: _Reply, output: Any) -> None:
        number, flags, served = reply.number, reply.flags & (TIMED | PIECE), reply.served
        try:
            head = messages.RESULT.pack(reply.generation)
            if flags:
                if flags & TIMED:
                    head += self._server.timing(reply.call.trace.timing())
                if flags & PIECE:
                    output = served.marked(output, reply)
            large = self.wire.send(_RESULT, number, flags, head, output, soon=False)
            if large is not None:
                self.wire.send_large(large, partial(self._fail, number))
        except Exception as error:
            self._fail(number, error)

    def _fail(self, number: int, error: BaseException, flags: int = 0) -> None:
        self.wire.send_bytes(Kind.ERROR, flags, self._server.failure(error), number)

    def _report(self) -> None:
        self._reporting = False
        if not self._gone:
            self.report()
            self._server.tell()

    def report(self) -> None:
        """Tell how busy the engine is, if it is not as it was; and read on only if what was sent is read."""
        said = self._server.busy(self.rows)
        if said != self._said:
            self._said = said
            self.wire.send_bytes(Kind.REPORT, 0, messages.REPORT.pack(*said))
        if self.wire.queued > MUCH and not self._paused:
            self._paused = True
            self.wire.pause()
            self._loop.call_later(TELL, self._read_on)

    def _read_on(self) -> None:
        if self._gone:
            return
        if self.wire.queued > MUCH:
            self._loop.call_later(TELL, self._read_on)
        else:
            self._paused = False
            self.wire.resume()

    # The end.

    def _lost(self, error: Exception | None) -> None:
        if error is not None:
            logger.warning("a client of this engine was lost: %s", text(error))
        self.leave()

    def vanish(self) -> None:
        """Say nothing more."""
        self._gone, self.board = True, None
        self.calls.clear()
        self._server.clients.discard(self)
        self.wire.close()

    def leave(self) -> None:
        """Nobody waits for its calls any more."""
        if self._gone:
            return
        self.answer_all()
        self._gone, self.board = True, None
        self._server.clients.discard(self)
        for number in list(self.calls):
            self._cancel(number)
        self.wire.close()


class _Observer:
    """Has clients told of the executions of their calls that they observe."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._count = 0

    @contextmanager
    def batch(
        self, calls: Sequence[tuple[Any, int]], *, core: int, rows: int, padded_rows: int, why: str
    ) -> Iterator[None]:
        """Around an execution, in its thread."""
        self._count += 1
        by_client: dict[_Client, list[int]] = {}
        for (client, number), own in calls:
            by_client.setdefault(client, []).extend((number, own))
        about = (self._count % 2**32, self._server.number(core), rows, padded_rows, REASONS.index(why))
        self._server.send_soon(by_client, Kind.BEGIN, about, None)
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._server.send_soon(by_client, Kind.END, about, error)
            del error

    def call(self, timing: Callable[[], Timing]) -> Any:
        """Calls are observed where they are made."""
        raise NotImplementedError
