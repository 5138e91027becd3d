"""Engines that are no processes: on the loop of the process that calls them, for tests in virtual time.

Lives here: what stands for a process that is spawned, and killed. Must not be here: anything that engines in processes
do otherwise: all else is the same code.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aneuron.pool import Pool
from aneuron.remote.control import Channel, Handler, pair_in_memory
from aneuron.remote.division import Share
from aneuron.remote.engine import Engine
from aneuron.remote.link import End, ends
from aneuron.remote.server import Server
from aneuron.remote.starting import Begin
from aneuron.remote.supervision import Plan
from aneuron.remote.supervisor import Supervisor


class VirtualEngines(Supervisor):
    """The supervision of a pool's engines, which are all in this process: what `PuppetBackend` uses with `processes`.

    `spawned[i]` is the engine with that index, or its successor: `kill()` ends it as SIGKILL ends a process.
    """

    virtual = True

    def __init__(self, plan: Plan, backend: Any) -> None:
        self.spawned: dict[int, VirtualEngine] = {}
        self.fail_to_start = 0  # so many starts
        self._backend = backend
        super().__init__(plan, self)

    def spawn(
        self, index: int, share: Share, handlers: Mapping[str, Handler], on_lost: Callable[[Exception], None]
    ) -> "VirtualEngine":
        """Start one."""
        if self.fail_to_start:
            self.fail_to_start -= 1
            raise OSError("this engine was to fail to start")
        self.spawned[index] = engine = VirtualEngine(self._backend, index, handlers, on_lost)
        return engine


class VirtualEngine(Engine):
    """An engine on this loop, and what its supervisor holds of it."""

    _pids = 1000

    def __init__(
        self, backend: Any, index: int, handlers: Mapping[str, Handler], on_lost: Callable[[Exception], None]
    ) -> None:
        super().__init__(Server, self._leave)
        VirtualEngine._pids += 1
        loop = asyncio.get_running_loop()
        self.pid: int | None = VirtualEngine._pids
        self.index = index
        self.ended: asyncio.Future[str] = loop.create_future()
        self.channel: Channel
        self.channel, self._inside = pair_in_memory(loop, (handlers, self.handlers()), (on_lost, None))
        self.tell = self._inside.tell
        self._backend = backend
        self._links: list[End] = []

    async def begin(self, begin: Begin) -> None:
        """Make the pool of the engine's cores, and what serves."""
        pool = Pool(list(begin.share.local), self._backend)
        self._served = Server(pool, begin.share.ids, begin.total, begin.num_workers, inline=True)
        self._served.on_state = lambda state: self.tell("state", state)
        self._server = self._served

    def connect(self, end: Any = None) -> Any:
        """A link, or what one is made of: this is asked by the supervisor, and then by the engine's side."""
        if end is None:
            ours, theirs = ends()
            self._links.append(theirs)
            return ours, theirs
        self.server.connect(end)
        return None

    def kill(self) -> None:
        """End it at once: nothing of it happens any more."""
        if self.ended.done():
            return
        for link in self._links:
            link.cut()
        self._inside.close()
        if self._server is not None:
            self._served.crash("this engine was killed")
            for served in self._served.models.values():  # what waits for cores that a process takes along
                swap = [served._next[1]] if served._next is not None else []
                for task in (*swap, *served.life.retired.values()):
                    task.cancel()
        self.ended.set_result("was killed by SIGKILL")

    def _leave(self) -> None:
        if not self.ended.done():
            for link in self._links:
                link.cut()
            self._inside.close()
            self.ended.set_result("has ended with status 0")
