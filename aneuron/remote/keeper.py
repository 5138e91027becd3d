"""Engines for several processes: the process that supervises them for those that say the same name.

Lives here: `Keeper`, what it is asked, when it ends. Must not be here: how processes find it (meeting.py), what they
have in place of a supervisor (shared.py), calls, which go to engines directly.

The keeper runs no code of users and opens no model: what is theirs passes through it as bytes. It is started by the
first that comes, outlives it, and ends `linger` seconds after the last one has left.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from aneuron.errors import Closed
from aneuron.remote.control import Channel, Fd, SocketChannel
from aneuron.remote.meeting import Meeting, check_peer
from aneuron.remote.processes import Processes
from aneuron.remote.sources import Source, digest
from aneuron.remote.starting import outlive_signals
from aneuron.remote.supervision import EngineState, Plan, Spawner
from aneuron.remote.supervisor import Supervisor

COMES = 30.0  # seconds that a keeper waits for who has started it


class Told(NamedTuple):
    """An argument as it is compared, and shown where it differs."""

    digest: str
    text: str


def told(given: Mapping[str, Any]) -> dict[str, Told]:
    """Arguments, to be compared with those of another process."""
    return {name: Told(digest(value), f"{value!r:.80}") for name, value in given.items()}


def differing(ours: Mapping[str, Told], theirs: Mapping[str, Told]) -> list[str]:
    """Which arguments of `theirs` are not as in `ours`, with both values.

    >>> differing({"linger": Told("a", "5.0")}, {"linger": Told("b", "1.0")})
    ['linger=1.0 here and 5.0 there']
    """
    nothing = Told("", "not given")
    return [
        f"{name}={theirs.get(name, nothing).text} here and {ours.get(name, nothing).text} there"
        for name in {**ours, **theirs}
        if ours.get(name, nothing).digest != theirs.get(name, nothing).digest
    ]


@dataclass(eq=False)
class _Model:
    """A model, and who uses it."""

    first: Told  # what it was loaded from
    now: Told  # what serves, after swaps
    given: dict[str, Told]
    users: set["_Client"] = field(default_factory=set)
    loading: "asyncio.Task[dict[int, bytes]] | None" = None
    waiters: int = 0
    facts: dict[int, bytes] = field(default_factory=dict)
    leaving: "asyncio.TimerHandle | asyncio.Task[None] | None" = None

    def same(self, told: Told) -> bool:
        """Whether another process has the same model; also one that has not heard of a swap."""
        return told.digest in (self.first.digest, self.now.digest)


class _Client:
    """A process that uses the engines."""

    def __init__(self, keeper: "Keeper", sock: socket.socket) -> None:
        self._keeper = keeper
        handlers: dict[str, Callable[..., Any]] = {
            "join": partial(keeper.join, self),
            "load": partial(keeper.load, self),
            "swap": partial(keeper.swap, self),
            "change": keeper.change,
            "unload": partial(keeper.unload, self),
            "connect": keeper.connect,
        }
        self.joined = False
        self.channel: Channel = SocketChannel(sock, asyncio.get_running_loop(), handlers, lambda _: keeper.forget(self))


class Keeper:
    """Supervises engines for whoever joins. On the loop of its process."""

    def __init__(self, listener: socket.socket, meeting: Meeting, spawner: Spawner) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._listener, self._meeting, self._spawner = listener, meeting, spawner
        self._clients: set[_Client] = set()
        self._models: dict[int, _Model] = {}
        self._told: dict[str, Told] | None = None
        self._supervisor: Supervisor | None = None
        self._starting: asyncio.Task[None] | None = None
        self._linger = COMES
        self._leaving: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)
        self._look_for_users()

    @property
    def supervisor(self) -> Supervisor:
        """What has the engines."""
        assert self._supervisor is not None, "who asks has joined"
        return self._supervisor

    # Who comes and goes.

    def _accept(self) -> bool:
        """Let in who waits; whether anybody did."""
        came = False
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return came
            try:
                check_peer(sock)
            except PermissionError:
                sock.close()
                continue
            self._clients.add(_Client(self, sock))
            came = True

    def forget(self, client: _Client) -> None:
        """It has gone."""
        self._clients.discard(client)
        for key in list(self._models):
            self.unload(client, key)
        self._look_for_users()

    def _look_for_users(self) -> None:
        """End some time after the last has left."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if not any(client.joined for client in self._clients) and not self.ended.done():
            wait = self._linger if self._supervisor is not None else COMES
            self._leaving = asyncio.get_running_loop().call_later(wait, self._leave)

    def _leave(self) -> None:
        """Nobody has come meanwhile: end, unless somebody does just now."""
        self._leaving = None
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        async with self._meeting.locked():
            if self._accept() or any(client.joined for client in self._clients):
                self._look_for_users()
                return
            self._meeting.remove()
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
        if not self.ended.done():
            self.ended.set_result(None)

    async def aclose(self) -> None:
        """End the engines."""
        for client in list(self._clients):
            client.channel.close()
        if self._supervisor is not None:
            await self._supervisor.aclose(drain=False)

    # What is asked.

    async def join(self, client: _Client, plan: Plan, linger: float, said: Mapping[str, Told]) -> list[EngineState]:
        """Use the engines, which are started for the first. Raises `ValueError` for other arguments than that had."""
        if self._told is None or (not any(each.joined for each in self._clients) and differing(self._told, said)):
            self._replace(plan, linger, dict(said))
        elif found := differing(self._told, said):
            raise ValueError(
                f"the engines of this share= run with other arguments: {'; '.join(found)}. All processes that share "
                "them must say the same, or another name"
            )
        client.joined = True
        self._look_for_users()
        try:
            assert self._starting is not None
            await asyncio.shield(self._starting)
        except BaseException:
            client.joined = False
            self._look_for_users()
            raise
        return list(self.supervisor.engines)

    def _replace(self, plan: Plan, linger: float, said: dict[str, Told]) -> None:
        """Start engines; in place of those that nobody uses any more."""
        old, before = self._supervisor, self._starting
        self._told, self._linger, self._models = said, linger, {}
        supervisor = self._supervisor = Supervisor(plan, self._spawner)

        async def start() -> None:
            if before is not None:
                before.cancel()
                await asyncio.wait({before})
            if old is not None:
                await old.aclose(drain=False)
            try:
                await supervisor.start()
            except BaseException:
                self._told = None  # the next one tries again
                raise
            supervisor.subscribe(self._say)

        self._starting = asyncio.ensure_future(start())
        self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _say(self) -> None:
        states = list(self.supervisor.engines)
        for client in self._clients:
            if client.joined:
                client.channel.tell("engines", states)

    async def load(
        self, client: _Client, key: int, source: Source, given: dict[str, bytes], said: dict[str, Told],
        exec_timeout: float | None, min_cores: int | None,
    ) -> dict[int, bytes]:  # fmt: skip
        """Load a model, unless it is. Raises `ValueError` for another one, or other arguments, than others have."""
        told = Told(source.fingerprint, source.text)
        model = self._models.get(key)
        unused = model is not None and not model.users and not model.waiters
        if model is not None and unused and (not model.same(told) or differing(model.given, said)):
            await self._unload(key, model)  # of those that have left
            model = self._models.get(key)
        if model is None:
            model = self._models[key] = _Model(told, told, said)
            loading = self.supervisor.load_packed(key, source, given, exec_timeout, min_cores)
            model.loading = asyncio.ensure_future(loading)
        found = [] if model.same(told) else [f"model={told.text} here and {model.now.text} there, or of other weights"]
        if found := found + differing(model.given, said):
            raise ValueError(
                f"the model runs with other arguments in the engines of this share=: {'; '.join(found)}. All processes "
                "that share them must say the same; new weights come by swap()"
            )
        await self._loaded(key, model)
        model.users.add(client)
        if client not in self._clients:  # it has gone meanwhile
            self.unload(client, key)
        if model.leaving is not None:
            model.leaving.cancel()
            model.leaving = None
        return model.facts

    async def _loaded(self, key: int, model: _Model) -> None:
        """Wait for a load; the last that waits takes it along when it goes."""
        if model.loading is None:
            return
        task, model.waiters = model.loading, model.waiters + 1
        try:
            model.facts = await asyncio.shield(task)
            model.loading = None
        except BaseException:
            if self._models.get(key) is model and (task.done() or model.waiters == 1):
                del self._models[key]
            if model.waiters == 1:
                task.cancel()
                await asyncio.wait({task})
            raise
        finally:
            model.waiters -= 1

    async def swap(self, client: _Client, key: int, source: Source) -> dict[int, bytes]:
        """Serve another model for all, unless it serves already."""
        model = self._model(key)
        if source.fingerprint != model.now.digest:
            facts = await self.supervisor.swap_packed(key, source)
            model.now, model.facts = Told(source.fingerprint, source.text), facts
            for each in self._clients:
                if each is not client and each in model.users:
                    each.channel.tell("swapped", key, source)
        return model.facts

    async def change(self, key: int | None, settings: dict[str, bytes]) -> None:
        """Serve with other settings, for all."""
        await self.supervisor.change_packed(key, settings)

    def unload(self, client: _Client, key: int) -> None:
        """One does not use it any more; some time after the last it is closed."""
        model = self._models.get(key)
        if model is None or client not in model.users:
            return
        model.users.discard(client)
        if not model.users:
            model.leaving = asyncio.get_running_loop().call_later(self._linger, self._unused, key, model)

    def _unused(self, key: int, model: _Model) -> None:
        model.leaving = asyncio.ensure_future(self._unload(key, model))

    async def _unload(self, key: int, model: _Model) -> None:
        if self._models.get(key) is model and not model.users:
            del self._models[key]
            await self.supervisor.unload(key)

    def _model(self, key: int) -> _Model:
        try:
            return self._models[key]
        except KeyError:
            raise Closed("the model is closed") from None

    async def connect(self, engine: int) -> Fd:
        """A link to an engine."""
        sock: socket.socket = await self.supervisor.connect(engine)
        return Fd(sock.detach())


def main(listener: str, server: str, folder: str, name: str) -> None:
    """Keep engines until nobody needs them."""
    outlive_signals()
    asyncio.run(_keep(socket.socket(fileno=int(listener)), Meeting.at(folder, name), server))
    os._exit(0)  # nothing is left to tidy up, which takes long with torch


async def _keep(listener: socket.socket, meeting: Meeting, server: str) -> None:
    keeper = Keeper(listener, meeting, Processes(server, meeting))
    try:
        await keeper.ended
    finally:
        await keeper.aclose()
