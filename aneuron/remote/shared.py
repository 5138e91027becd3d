"""Engines for several processes: what each of these has in place of a supervisor.

Lives here: `Shared`, which asks a keeper, and starts one where there is none. Must not be here: what the keeper does
(keeper.py), how it is found (meeting.py).
"""

import asyncio
import contextlib
import logging
import pickle
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aneuron.errors import Closed, CoreFailed
from aneuron.remote.control import Channel, ChannelLost, Fd, Handler, SocketChannel
from aneuron.remote.keeper import Told, told
from aneuron.remote.meeting import Meeting
from aneuron.remote.processes import SERVER
from aneuron.remote.sources import Source
from aneuron.remote.starting import check_guarded, check_main, command, of_program, packed
from aneuron.remote.supervision import RESTARTING, EngineState, Plan
from aneuron.remote.supervisor import LATEST, SOONEST, unpacked_facts

logger = logging.getLogger("aneuron")


@dataclass
class _Loaded:
    """A model that this process uses, for another keeper."""

    source: Source
    given: dict[str, bytes]
    said: dict[str, Told]
    exec_timeout: float | None
    min_cores: int | None
    changed: dict[str, bytes] = field(default_factory=dict)


class Shared:
    """The engines of all processes of this user that say the same name; started by the first of them.

    If their keeper dies, whoever notices starts another. A `Supervision`, on the loop that starts it.
    """

    shared = True

    def __init__(
        self, name: str, plan: Plan, linger: float = 5.0, server: str = SERVER, folder: str | None = None
    ) -> None:
        self._name, self._linger, self._server, self._folder = name, linger, server, folder
        self._program = of_program()
        self._plan = replace(plan, program=self._program)
        self._said: dict[str, Told] = {}
        self._models: dict[int, _Loaded] = {}
        self._channel: Channel | None = None
        self._meeting: Meeting | None = None
        self._there: asyncio.Future[None] | None = None  # a keeper
        self._again: asyncio.Task[None] | None = None
        self._closed = False
        self._begun = 0  # incarnations of all keepers before
        self.engines: Sequence[EngineState] = []
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have a function called after each change of `engines`; returns what ends that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    # A keeper.

    async def start(self) -> None:
        """Find the engines, or start them. Raises `ValueError` for other arguments than they run with."""
        check_guarded()
        self._closed, self._models = False, {}
        self._there = asyncio.get_running_loop().create_future()
        self._meeting = Meeting(self._name, self._folder)
        self._said = await asyncio.to_thread(self._tell)
        try:
            await self._join()
        except BaseException:
            self._leave()
            raise
        self._there.set_result(None)

    def _tell(self) -> dict[str, Told]:
        plan = self._plan
        ids = [core for share in plan.shares for core in share.ids]
        said = told({
            "processes": len(plan.shares), "device_ids": ids, "backend": pickle.loads(plan.backend),
            "num_workers": plan.num_workers, "linger": self._linger,
        })  # fmt: skip
        said["cores"] = told({"": plan.shares})[""]  # as the environment has them
        return said

    async def _join(self) -> None:
        """Be a client of a keeper; of another one, if it dies just then."""
        for last in (False, False, True):
            channel = self._channel = await self._find_keeper()
            try:
                states = await channel.request("join", self._plan, self._linger, self._said)
            except ChannelLost:
                if last or self._closed:
                    raise
            else:
                self._hear(states)
                return

    async def _find_keeper(self) -> Channel:
        """Find a keeper, or start one."""
        sock = None
        while sock is None:
            if (meeting := self._meeting) is None:
                raise Closed("the pool is closed")
            async with meeting.locked():
                sock = meeting.join() or self._start_keeper()
        handlers: dict[str, Handler] = {"engines": self._hear, "swapped": self._swapped}
        channel = SocketChannel(sock, asyncio.get_running_loop(), handlers, lambda _: self._lost(channel))
        return channel

    def _start_keeper(self) -> socket.socket | None:
        """Its first client's connection: what is sent waits until it is there. Under the lock."""
        meeting = self._meeting
        assert meeting is not None
        with meeting.open() as listener:
            try:
                process = subprocess.Popen(
                    command(
                        "aneuron.remote.keeper", f"aneuron keeper of {self._name}", listener.fileno(), self._server,
                        meeting.folder, meeting.name,
                    ),
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            except BaseException:
                meeting.remove()
                raise
            threading.Thread(target=process.wait, name="aneuron-keeper", daemon=True).start()
            return meeting.join()

    def _hear(self, states: Sequence[EngineState]) -> None:
        """What the keeper says of its engines."""
        self.engines = [replace(each, incarnation=each.incarnation + self._begun) for each in states]
        for callback in list(self._subscribers):
            callback()

    def _lost(self, channel: Channel) -> None:
        """The keeper has died, and its engines with it."""
        if channel is not self._channel or self._closed or self._there is None or not self._there.done():
            return
        self._begun = max([each.incarnation for each in self.engines], default=self._begun)
        why = "the keeper of the engines has died; another is started"
        logger.warning("%s", why)
        self._there = asyncio.get_running_loop().create_future()
        states = [
            replace(each, pid=None, state=RESTARTING, cores=(), error=why, incarnation=each.incarnation - self._begun)
            for each in self.engines
        ]
        self._again = asyncio.ensure_future(self._rejoin())
        self._hear(states)

    async def _rejoin(self) -> None:
        """Find or start another keeper, and have it load what this process uses."""
        delay = SOONEST
        while True:
            try:
                await self._join()
                assert self._channel is not None
                for key, model in list(self._models.items()):
                    await self._load(self._channel, key, model)
                    if model.changed:
                        await self._channel.request("change", key, model.changed)
                break
            except Exception as error:
                logger.warning("the engines could not be started again: %s; next try in %.1f s", error, delay)
                if self._channel is not None:
                    self._channel.close()
                await asyncio.sleep(delay)
                delay = min(2 * delay, LATEST)
        assert self._there is not None
        self._there.set_result(None)
        if self._channel.lost is not None:  # meanwhile
            self._lost(self._channel)

    async def _ask(self, name: str, *args: Any) -> Any:
        """A request to the keeper that is there; to the next one, if it dies meanwhile."""
        while True:
            if self._closed or self._there is None:
                raise Closed("the pool is closed")
            await asyncio.shield(self._there)
            assert self._channel is not None
            try:
                return await self._channel.request(name, *args)
            except ChannelLost:
                await asyncio.sleep(0)  # `_lost` is told first

    # Models.

    async def load(
        self, key: int, source: Source, given: Mapping[str, Any], min_cores: int | None = None
    ) -> dict[int, Any]:
        """Load a model on every engine, unless others have. Raises what a start of it raises."""
        if source.needs_main:
            check_main(self._program, f"model={source.text}")
        said = await asyncio.to_thread(told, {**given, "min_cores": min_cores})
        model = _Loaded(source, packed(given, self._program), said, given.get("exec_timeout"), min_cores)
        facts = await self._ask("load", key, *_of(model))
        self._models[key] = model
        return unpacked_facts(facts)

    async def _load(self, channel: Channel, key: int, model: _Loaded) -> None:
        await channel.request("load", key, *_of(model))

    async def swap(self, key: int, source: Source) -> dict[int, Any]:
        """Serve another model in its place, for all processes."""
        facts = await self._ask("swap", key, source)
        self._swapped(key, source)
        return unpacked_facts(facts)

    def _swapped(self, key: int, source: Source) -> None:
        if key in self._models:
            self._models[key].source = source

    async def change(self, key: int | None, **settings: Any) -> None:
        """Serve with other settings, for all processes."""
        data = packed(settings, self._program)
        if key is not None and key in self._models:
            self._models[key].changed |= data
        await self._ask("change", key, data)

    async def unload(self, key: int) -> None:
        """Use a model no more; it is closed some time after the last process has left it."""
        if self._models.pop(key, None) is not None and not self._closed:
            await self._ask("unload", key)

    async def connect(self, engine: int) -> socket.socket:
        """A link to an engine. Raises `CoreFailed` if it is not ready."""
        if self._there is None or not self._there.done() or self._channel is None:
            raise CoreFailed("the keeper of the engines has died; another is started", 0)
        try:
            fd: Fd = await self._channel.request("connect", engine)
        except ChannelLost as error:
            raise CoreFailed(f"the keeper of the engines has died ({error})", 0) from None
        return socket.socket(fileno=fd.detach())

    # The end.

    async def aclose(self, drain: bool = True) -> None:
        """Leave; the engines end some time after the last process has left. Calls are ended before."""
        self.abandon()

    def abandon(self) -> None:
        """Leave at once."""
        self._closed = True
        if self._again is not None and not self._again.done():
            with contextlib.suppress(RuntimeError):  # its loop is closed
                self._again.cancel()
        self._leave()

    def _leave(self) -> None:
        channel, self._channel, meeting, self._meeting = self._channel, None, self._meeting, None
        if channel is not None and not channel.close_with_loop():
            channel.close()
        if meeting is not None:
            meeting.close()


def _of(model: _Loaded) -> tuple[Any, ...]:
    return model.source, model.given, model.said, model.exec_timeout, model.min_cores
