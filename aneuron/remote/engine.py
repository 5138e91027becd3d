"""An engine: a process with some of a pool's cores, which serves the models of its supervisor to that one's clients.

Lives here: how the process begins and ends, what its supervisor can ask of it. Must not be here: calls (server.py),
when it is started, and again (supervisor.py).

It ends when its supervisor does, whatever it is doing: a thread of its own sees the socket hang up, and where the
interpreter is held, which keeps that thread from running, Linux kills it some seconds later (`die_with`). On other
systems such a process stays until the model gives the interpreter back.
"""

import asyncio
import importlib
import os
import pickle
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aneuron.backends import aoti
from aneuron.pool import Pool
from aneuron.remote.control import Fd, SocketChannel
from aneuron.remote.meeting import tidy
from aneuron.remote.sources import Source
from aneuron.remote.starting import Begin, die_with, names_main, outlive_signals, prepare, prepare_main, unpacked


class Serving(Protocol):
    """What serves the models of an engine."""

    on_state: Callable[[dict[str, Any]], None]

    def __init__(self, pool: Pool, ids: Sequence[int], total: int, num_workers: int | None = None) -> None: ...

    async def load(self, key: int, source: Source, given: Mapping[str, Any], generation: int = 0) -> Any:
        """Load a model, and say what clients must know of it."""

    async def prepare(self, key: int, source: Source, generation: int) -> Any:
        """Load what is to take its place."""

    async def commit(self, key: int, generation: int) -> None:
        """Serve that."""

    async def discard(self, key: int, generation: int) -> None:
        """Forget it; also if there is none."""

    async def change(self, key: int | None, **settings: Any) -> None:
        """Serve with other settings."""

    async def unload(self, key: int) -> None:
        """Close a model; also one that is not there."""

    def connect(self, end: Any) -> None:
        """Serve a client, by its socket."""

    async def drain(self) -> None:
        """Finish what was accepted."""

    def abort(self) -> None:
        """End what has not begun."""


class Engine:
    """What a supervisor can ask of an engine: the handlers of its channel. On the engine's loop."""

    def __init__(self, make: Callable[..., Serving], leave: Callable[[], object]) -> None:
        self.tell: Callable[..., None] = lambda *_: None  # the supervisor
        self._make, self._leave = make, leave
        self._server: Serving | None = None
        self._program: Mapping[str, Any] = {}
        self._main: asyncio.Future[None] | None = None  # once it is needed

    @property
    def server(self) -> Serving:
        """What serves, once it is there."""
        assert self._server is not None, "the supervisor says first what the engine has"
        return self._server

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """What answers, by the names of the requests."""
        return {
            "begin": self.begin,
            "load": self.load,
            "prepare": self.prepare,
            "commit": lambda key, generation: self.server.commit(key, generation),
            "discard": lambda key, generation: self.server.discard(key, generation),
            "change": self.change,
            "unload": lambda key: self.server.unload(key),
            "connect": self.connect,
            "drain": lambda: self.server.drain(),
            "ping": lambda: None,
            "end": self.end,
        }

    async def begin(self, begin: Begin) -> None:
        """Make the pool of the engine's cores, and what serves."""
        prepare(begin.program)
        aoti.serve_here(len(begin.share.local))
        self._program = begin.program
        backend = begin.backend
        if isinstance(backend, bytes):
            await self._need(names_main(backend))
            backend = pickle.loads(backend)
        pool = Pool(list(begin.share.local), backend)
        self._server = self._make(pool, begin.share.ids, begin.total, begin.num_workers)
        self._server.on_state = lambda state: self.tell("state", state)

    async def load(self, key: int, source: Source, given: Mapping[str, bytes], generation: int) -> tuple[int, bytes]:
        """Load a model; how many cores have it, and what clients must know of it."""
        await self._need(source.needs_main or any(map(names_main, given.values())))
        return _packed(await self.server.load(key, source, unpacked(given), generation))

    async def prepare(self, key: int, source: Source, generation: int) -> tuple[int, bytes]:
        """Load what is to take its place."""
        await self._need(source.needs_main)
        return _packed(await self.server.prepare(key, source, generation))

    async def change(self, key: int | None, settings: Mapping[str, bytes]) -> None:
        """Serve with other settings."""
        await self._need(any(map(names_main, settings.values())))
        await self.server.change(key, **unpacked(settings))

    def connect(self, end: Any) -> None:
        """Serve a client."""
        self.server.connect(socket.socket(fileno=end.detach()) if isinstance(end, Fd) else end)

    def end(self) -> None:
        """Leave, now."""
        if self._server is not None:
            self._server.abort()
        self._leave()

    async def _need(self, main: bool) -> None:
        """Import what is defined in the program itself, if need be; once."""
        if main and self._main is None:
            self._main = asyncio.ensure_future(asyncio.to_thread(prepare_main, self._program))
        if main and self._main is not None:
            await asyncio.shield(self._main)


def _packed(facts: Any) -> tuple[int, bytes]:
    return facts.loaded, pickle.dumps(facts)


# The process.


def main(control: str, parent: str, server: str, loop: str, folder: str, name: str) -> None:
    """Serve until the supervisor says that it is enough, or is gone.

    control: number of the socket to the supervisor. parent: its process. server: what serves, "module:attribute".
    loop: "uvloop", or "asyncio". folder, name: the socket that a keeper leaves if it dies; "" for other supervisors.
    """
    die_with(int(parent))
    outlive_signals()
    sock = socket.socket(fileno=int(control))
    threading.Thread(target=_end_with, args=(os.dup(sock.fileno()), folder, name), daemon=True).start()
    module, _, name = server.partition(":")
    make = getattr(importlib.import_module(module), name)
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if loop == "uvloop":
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(sock, make))


async def _serve(sock: socket.socket, make: Callable[..., Serving]) -> None:
    loop = asyncio.get_running_loop()
    left: asyncio.Future[None] = loop.create_future()  # cancelled when the supervisor says so
    engine = Engine(make, left.cancel)
    channel = SocketChannel(sock, loop, engine.handlers())  # the watchdog sees to its end
    engine.tell = channel.tell
    await asyncio.wait({left})
    channel.close()


def _end_with(control: int, folder: str, name: str) -> None:
    """End when the supervisor has."""
    poll = select.poll()
    poll.register(control, 0)  # what hangs up is told of whatever is asked for
    while not poll.poll():
        pass
    if folder:
        tidy(folder, name)
    os._exit(1)
