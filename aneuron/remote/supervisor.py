"""Engines started, watched and started again, with the same models on all of them.

Lives here: when an engine is started and given up, what each must have loaded, a swap on all of them. Must not be here:
calls, which go from clients to engines beside it (client.py, server.py), what an engine is (engine.py).
"""

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aneuron.errors import Closed, CoreFailed, DeviceError
from aneuron.remote.control import ChannelLost
from aneuron.remote.division import Share
from aneuron.remote.processes import Processes
from aneuron.remote.sources import Source
from aneuron.remote.starting import Begin, check_guarded, check_main, of_program, packed
from aneuron.remote.supervision import (
    DRAINING,
    FAILED,
    READY,
    RESTARTING,
    STARTING,
    EngineState,
    Plan,
    Spawned,
    Spawner,
)
from aneuron.remote.together import all_of, each_of

logger = logging.getLogger("aneuron")

SOONEST, LATEST = 0.1, 30.0  # seconds until an engine is started again, doubled with each time
LASTS = 60.0  # seconds of service after which they begin anew
TRIES = 5  # starts that fail, after which an engine counts as failed, though it is tried further
LEAVES = 5.0  # seconds that an engine which was told to end has for it
DRAINS = 30.0  # seconds that one which is to be started again has for its calls
LOOKS = 1.0  # seconds between two looks whether an engine's loop runs
HANGS = 5.0  # seconds beyond `exec_timeout`, and the least of that, after which it counts as hung


@dataclass
class _Model:
    """A model that all engines are to have."""

    source: Source
    given: dict[str, bytes]
    exec_timeout: float | None
    generation: int = 0

    def __post_init__(self) -> None:
        self.changed: dict[str, bytes] = {}  # settings, since it was given
        self.leaving = False
        self.lock = asyncio.Lock()  # one change at a time


class _Engine:
    """One engine, and its successors."""

    def __init__(self, index: int, share: Share) -> None:
        self.share = share
        self.state = EngineState(index, None, 0, STARTING, share.ids)
        self.spawned: Spawned | None = None
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why it must be replaced
        self.loaded: dict[int, int] = {}  # generations of models, by key
        self.lost: frozenset[int] = frozenset()  # cores, for good
        self.absent = 0  # cores that have not loaded a model, and are among the lost
        self.busy = 0  # requests that may hold the interpreter for long
        self.life: asyncio.Task[None] | None = None
        self.since = 0.0  # when it was ready

    def break_(self, why: str) -> None:
        """It must be replaced."""
        _break(self.broken, why)

    async def ask(self, name: str, *args: Any) -> Any:
        """A request that may take long, and the interpreter with it. Raises `CoreFailed` if the engine ends, or must
        be replaced.
        """
        self.busy += 1
        try:
            assert self.spawned is not None
            return await self.spawned.channel.request(name, *args)
        except ChannelLost:
            spawned = self.spawned
            how = await _how(spawned) if spawned is not None else "has ended"
            raise CoreFailed(
                f"engine {self.state.index} (pid {self.state.pid}) {how} while it was asked to {name}",
                self.share.ids[0],
            ) from None
        except Exception as error:
            if not self.broken.done():
                raise
            raise CoreFailed(  # it closes its models, and says so to whoever loads one
                f"engine {self.state.index} (pid {self.state.pid}) {self.broken.result()}, and is replaced, while it "
                f"was asked to {name}",
                self.share.ids[0],
            ) from error
        finally:
            self.busy -= 1


class Supervisor:
    """Starts a pool's engines, and keeps them: a `Supervision`, on the loop that starts it."""

    shared = False

    def __init__(self, plan: Plan, spawner: "Spawner | None" = None) -> None:
        self._plan = plan
        self._program = of_program() if plan.program is None else plan.program
        self._spawner = Processes() if spawner is None else spawner
        self._engines: list[_Engine] = []
        self._models: dict[int, _Model] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._changed: dict[str, bytes] = {}  # settings of the pool, since it was planned
        self._closed = False
        self._draining: asyncio.Lock | None = None  # one engine at a time

    @property
    def engines(self) -> Sequence[EngineState]:
        """What is known of each."""
        return [engine.state for engine in self._engines]

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have a function called after each change of `engines`; returns what ends that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    async def start(self) -> None:
        """Start them; raises `DeviceError` if one cannot be."""
        check_guarded()
        self._closed, self._models, self._draining = False, {}, asyncio.Lock()
        self._engines = [_Engine(index, share) for index, share in enumerate(self._plan.shares)]
        try:
            await all_of([self._up(engine) for engine in self._engines])
        except BaseException:
            self._closed = True
            await asyncio.shield(self._kill())
            raise
        for engine in self._engines:
            engine.since = asyncio.get_running_loop().time()
            self._set(engine, READY)
            engine.life = asyncio.ensure_future(self._life(engine))

    # One engine.

    def _set(self, engine: _Engine, state: str, **more: Any) -> None:
        if state == READY:
            cores = tuple(core for core in engine.share.ids if core not in engine.lost)
            more = {"cores": cores, "error": None}
        engine.state = replace(engine.state, state=state, **more)
        for callback in list(self._subscribers):
            try:
                callback()
            except Exception:
                logger.exception("what was to hear of engine %d has failed", engine.state.index)

    async def _up(self, engine: _Engine) -> None:
        """Start it, without models."""
        index, loop = engine.state.index, asyncio.get_running_loop()
        engine.broken, engine.loaded, engine.lost, engine.absent = loop.create_future(), {}, frozenset(), 0
        broken = engine.broken
        handlers = {"state": partial(self._told, engine, broken)}
        spawned = engine.spawned = self._spawner.spawn(index, engine.share, handlers, partial(_break, broken))
        spawned.ended.add_done_callback(partial(_break, broken))
        engine.state = replace(
            engine.state, pid=spawned.pid, incarnation=engine.state.incarnation + 1, cores=engine.share.ids
        )
        plan = self._plan
        begin = Begin(self._program, plan.backend, engine.share, self._total, plan.num_workers)
        try:
            await spawned.channel.request("begin", begin)
            if self._changed:
                await spawned.channel.request("change", None, self._changed)
        except ChannelLost:
            raise DeviceError(
                f"engine {index} (pid {spawned.pid}) {await _how(spawned)} before it was ready; what it has "
                "written is above"
            ) from None

    def _told(self, engine: _Engine, broken: "asyncio.Future[str]", state: Mapping[str, Any]) -> None:
        """What an engine says of its cores."""
        if broken is not engine.broken or broken.done():
            return
        lost = frozenset(state.get("lost", ()))
        new, engine.lost = lost - engine.lost, lost
        if new and engine.state.state == READY:
            self._set(engine, READY)
            if len(lost) > engine.absent:
                engine.break_(f"has lost core{'s' * (len(new) > 1)} {', '.join(map(str, sorted(new)))} for good")

    async def _life(self, engine: _Engine) -> None:
        """Keep an engine, or say that it is not kept any more."""
        try:
            await self._live(engine)
        except asyncio.CancelledError:
            if not self._closed:  # the loop ends without closing them, and nobody would watch them
                self.abandon()
            raise
        except Exception as error:
            logger.exception("engine %d is not watched any more", engine.state.index)
            await self._end(engine)
            self._set(engine, FAILED, pid=None, cores=(), error=f"a bug: {type(error).__name__}: {error}")

    async def _live(self, engine: _Engine) -> None:
        """Replace an engine, and its successors, whenever one must be."""
        delay, failures = SOONEST, 0
        loop = asyncio.get_running_loop()
        while True:
            watch = asyncio.ensure_future(self._watch(engine))
            try:
                why = await asyncio.shield(engine.broken)
            finally:
                watch.cancel()
            if self._closed:
                return
            if failures == 0 and loop.time() - engine.since > LASTS:
                delay = SOONEST
            why = await self._put_down(engine, why)
            while True:
                state = FAILED if failures >= TRIES else RESTARTING
                logger.warning("engine %d %s; it is started again in %.1f s", engine.state.index, why, delay)
                self._set(engine, state, pid=None, cores=(), error=why)
                await asyncio.sleep(LATEST if state == FAILED else delay)
                delay = min(2 * delay, LATEST)
                try:
                    await self._up(engine)
                    await self._catch_up(engine)
                except Exception as error:
                    failures += 1
                    why = f"could not be started again ({type(error).__name__}: {error})"
                    await self._end(engine)
                else:
                    break
            failures = 0
            logger.info("engine %d serves again, as process %s", engine.state.index, engine.state.pid)

    async def _put_down(self, engine: _Engine, why: str) -> str:
        """End an engine that must be replaced; if it still runs, when it has finished its calls. Returns what became
        of it, in words.
        """
        spawned = engine.spawned
        assert spawned is not None
        pid, state = engine.state.pid, engine.state
        if spawned.channel.lost is None and not spawned.ended.done():
            assert self._draining is not None
            async with self._draining:
                self._set(engine, DRAINING, error=why)
                logger.warning("engine %d (pid %s) %s: it finishes its calls and is replaced", state.index, pid, why)
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(DRAINS):
                        await spawned.channel.request("drain")
                await self._end(engine)
        elif spawned.channel.lost is not None or spawned.ended.done():
            why = await _how(spawned)
        await self._end(engine)
        return f"(pid {pid}) {why}"

    async def _end(self, engine: _Engine) -> None:
        """Kill it, and see it gone."""
        spawned, engine.spawned = engine.spawned, None
        if spawned is not None:
            spawned.kill()
            spawned.channel.close()
            await asyncio.shield(spawned.ended)

    async def _catch_up(self, engine: _Engine) -> None:
        """Load what all engines have; ready if nothing is missing."""
        while True:
            for key in [key for key in engine.loaded if key not in self._models]:
                del engine.loaded[key]
                await engine.ask("unload", key)
            for key, model in list(self._models.items()):
                async with model.lock:
                    if self._models.get(key) is model and engine.loaded.get(key) != model.generation:
                        await self._load_on(engine, key, model, again=True)
            if engine.broken.done():
                raise CoreFailed(f"engine {engine.state.index} {engine.broken.result()}", engine.share.ids[0])
            current = engine.loaded == {key: model.generation for key, model in self._models.items()}
            if current and not any(model.lock.locked() for model in self._models.values()):  # in the middle of a swap
                engine.since = asyncio.get_running_loop().time()
                self._set(engine, READY)
                return

    async def _load_on(self, engine: _Engine, key: int, model: _Model, again: bool = False) -> Any:
        """Load a model on one engine, or what serves in its place by now; `again`: on the cores that still can."""
        generation = model.generation
        if key in engine.loaded:
            facts = await engine.ask("prepare", key, model.source, generation)
            await engine.ask("commit", key, generation)
        else:
            given = {**model.given, "min_cores": pickle.dumps(1)} if again else model.given
            facts = await engine.ask("load", key, model.source, given, generation)
            engine.absent = max(engine.absent, len(engine.share.ids) - facts[0])
            if model.changed:
                await engine.ask("change", key, model.changed)
        engine.loaded[key] = generation
        return facts

    async def _watch(self, engine: _Engine) -> None:
        """Give an engine up whose loop does not answer, where models say how long an execution may take."""
        while True:
            await asyncio.sleep(LOOKS)
            limits = [model.exec_timeout for model in self._models.values()]
            if not limits or None in limits or engine.spawned is None:
                continue
            limit = max(HANGS, *[each for each in limits if each is not None]) + HANGS
            answer = asyncio.ensure_future(engine.spawned.channel.request("ping"))
            waited = 0.0  # while this process ran: it may have been stopped itself
            try:
                while not (await asyncio.wait({answer}, timeout=LOOKS))[0]:
                    waited = 0.0 if engine.busy or engine.state.state != READY else waited + LOOKS
                    if waited >= limit:
                        engine.spawned.kill()
                        engine.break_(f"did not answer for {waited:.0f} s, and was killed")
                        return
            finally:
                answer.cancel()
            if answer.done() and not answer.cancelled() and answer.exception() is not None:
                return

    # Models.

    def _ready(self) -> list[_Engine]:
        """The engines that serve; those that are being replaced load what there is by then."""
        if self._closed or not self._engines:
            raise Closed("the pool is closed")
        found = [engine for engine in self._engines if engine.state.state == READY]
        if not found:
            state = self._engines[0].state
            raise CoreFailed(
                f"no engine is ready: engine {state.index} {state.error or state.state}; they are started again",
                self._engines[0].share.ids[0],
            )
        return found

    async def load(
        self, key: int, source: Source, given: Mapping[str, Any], min_cores: int | None = None
    ) -> dict[int, Any]:
        """Load a model on every engine. Raises what a start of it raises; no engine has it then.

        min_cores: how many cores must load it, in all engines together; None: all.
        """
        exec_timeout = given.get("exec_timeout")
        return unpacked_facts(
            await self.load_packed(key, source, packed(given, self._program), exec_timeout, min_cores)
        )

    async def load_packed(
        self, key: int, source: Source, given: dict[str, bytes], exec_timeout: float | None, min_cores: int | None
    ) -> dict[int, bytes]:
        """The same, of arguments that are pickled; so is what it says, by engine."""
        if source.needs_main:
            check_main(self._program, f"model={source.text}")
        if (old := self._models.get(key)) is not None:
            if not old.leaving:
                raise RuntimeError(f"there is a model {key} already")
            async with old.lock:
                pass
        engines = self._ready()
        if min_cores is not None and min_cores > self._total:
            raise DeviceError(f"min_cores={min_cores}, and there are {self._total} cores to start on")
        model = self._models[key] = _Model(source, given, exec_timeout)
        try:
            async with model.lock:
                return await self._load_on_all(engines, key, model, min_cores)
        except BaseException:
            self._models.pop(key, None)
            for engine in engines:
                engine.loaded.pop(key, None)
                if engine.spawned is not None:
                    engine.spawned.channel.tell("unload", key)
            raise

    async def _load_on_all(
        self, engines: list[_Engine], key: int, model: _Model, min_cores: int | None
    ) -> dict[int, bytes]:
        loads = [self._load_on(engine, key, model) for engine in engines]
        answers = await (all_of(loads) if min_cores is None else each_of(loads))
        facts: dict[int, bytes] = {}
        errors: list[tuple[_Engine, BaseException]] = []
        loaded = 0
        for engine, answer in zip(engines, answers, strict=True):
            if isinstance(answer, BaseException):
                errors.append((engine, answer))
            else:
                loaded += answer[0]
                facts[engine.state.index] = answer[1]
        if errors and loaded < (min_cores or 0):
            raise errors[0][1]
        for engine, error in errors:  # it is tried again, as a core is that does not load
            engine.break_(f"could not load the model ({type(error).__name__}: {error})")
        return facts

    async def swap(self, key: int, source: Source) -> dict[int, Any]:
        """Serve another model in its place, on all engines; if that fails, the old one serves on all.

        An engine that ends while it serves the new one already is replaced, and has the new one.
        """
        return unpacked_facts(await self.swap_packed(key, source))

    async def swap_packed(self, key: int, source: Source) -> dict[int, bytes]:
        """The same; what it says is pickled."""
        if source.needs_main:
            check_main(self._program, f"model={source.text}")
        model = self._model(key)
        async with model.lock:
            engines, generation = self._ready(), model.generation + 1
            try:
                facts = await all_of([engine.ask("prepare", key, source, generation) for engine in engines])
            except BaseException:
                for engine in engines:
                    if engine.spawned is not None:
                        engine.spawned.channel.tell("discard", key, generation)
                raise
            model.source, model.generation = source, generation
            for engine in engines:
                engine.loaded[key] = generation
            answers = await asyncio.shield(each_of([engine.ask("commit", key, generation) for engine in engines]))
            for engine, answer in zip(engines, answers, strict=True):
                if isinstance(answer, BaseException):
                    engine.break_(f"could not serve the new model ({type(answer).__name__}: {answer})")
            return {engine.state.index: each[1] for engine, each in zip(engines, facts, strict=True)}

    async def change(self, key: int | None, **settings: Any) -> None:
        """Serve with other settings; of the pool, where no model is named."""
        await self.change_packed(key, packed(settings, self._program))

    async def change_packed(self, key: int | None, settings: dict[str, bytes]) -> None:
        """The same, of settings that were pickled."""
        if key is None:
            self._changed |= settings
        else:
            self._model(key).changed |= settings
        for engine in self._engines:  # one that is being started has them already, or gets them now
            if engine.spawned is not None and (key is None or key in engine.loaded):
                engine.spawned.channel.tell("change", key, settings)

    async def unload(self, key: int) -> None:
        """Close a model; also one that is not there."""
        model = self._models.get(key)
        if model is None or model.leaving:
            return
        model.leaving = True
        async with model.lock:
            if self._models.pop(key, None) is None:
                return
            engines = [engine for engine in self._engines if engine.loaded.pop(key, None) is not None]
            await each_of([engine.ask("unload", key) for engine in engines if engine.spawned is not None])

    def _model(self, key: int) -> _Model:
        try:
            return self._models[key]
        except KeyError:
            raise Closed("the model is closed") from None

    @property
    def _total(self) -> int:
        return sum(len(share.ids) for share in self._plan.shares)

    # Clients.

    async def connect(self, engine: int) -> Any:
        """One end of a socket pair, whose other end the engine has. Raises `CoreFailed` if it is not ready."""
        it = self._engines[engine]
        if it.spawned is None or it.state.state != READY:
            raise CoreFailed(f"engine {engine} is {it.state.state}: {it.state.error}", it.share.ids[0])
        ours, theirs = it.spawned.connect()
        await it.ask("connect", theirs)
        return ours

    # The end.

    async def aclose(self, drain: bool = True) -> None:
        """End the engines, when they have finished what they have accepted, or at once. If cancelled, at once."""
        self._closed = True
        try:
            await self._stop_living()
            await each_of([self._leave(engine, drain) for engine in self._engines])
        except GeneratorExit:  # its loop has gone
            self.abandon()
            raise
        except BaseException:
            await asyncio.shield(self._kill())
            raise
        await self._kill()

    async def _leave(self, engine: _Engine, drain: bool) -> None:
        spawned = engine.spawned
        if spawned is None or spawned.channel.lost is not None:
            return
        if drain:
            await spawned.channel.request("drain")
        spawned.channel.tell("end")
        await asyncio.wait({spawned.ended}, timeout=LEAVES)

    async def _stop_living(self) -> None:
        lives = [engine.life for engine in self._engines if engine.life is not None]
        for life in lives:
            life.cancel()
        if lives:
            await asyncio.wait(lives)

    async def _kill(self) -> None:
        """End all of them, and see them gone."""
        self.abandon()
        await self._stop_living()
        await each_of([self._end(engine) for engine in self._engines])
        self._engines, self._models = [], {}

    def abandon(self) -> None:
        """End them at once, without a loop; from any thread."""
        self._closed = True
        for engine in self._engines:
            if (spawned := engine.spawned) is not None:
                spawned.kill()
                spawned.channel.close_with_loop()


def unpacked_facts(facts: Mapping[int, bytes]) -> dict[int, Any]:
    """What engines say of a model, by engine."""
    return {engine: pickle.loads(data) for engine, data in facts.items()}


def _break(broken: "asyncio.Future[str]", why: Any) -> None:
    if not broken.done():
        broken.set_result(str(why))


async def _how(spawned: Spawned) -> str:
    """How an engine has ended, whose socket has hung up."""
    done, _ = await asyncio.wait({spawned.ended}, timeout=LEAVES)
    if not done:
        spawned.kill()
        await asyncio.shield(spawned.ended)
        return "has closed its socket, and was killed"
    return spawned.ended.result()
