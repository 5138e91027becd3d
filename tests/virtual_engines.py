"""Engines that are started on the test's own loop, without processes, and that serve nothing."""

import asyncio
from types import SimpleNamespace

from aneuron.remote.control import pair_in_memory
from aneuron.remote.engine import Engine
from aneuron.remote.sources import Source


class Virtual:
    """Starts engines on this loop. `engines[i]` is the engine with that index, or its successor."""

    def __init__(self):
        self.engines = {}
        self.started = []  # indices, in order
        self.fail = {}  # so many starts of an engine
        self.model_fails = {}  # what a load of a model raises, by engine
        self.kill_on = None  # a request, during which an engine ends, and which
        self.slow = 0.0  # seconds of a load
        self.cannot_load = set()  # cores
        self.link = lambda index: (f"ours {index}", f"theirs {index}")

    def spawn(self, index, share, handlers, on_lost):
        if self.fail.get(index, 0):
            self.fail[index] -= 1
            raise OSError("no more processes")
        self.started.append(index)
        self.engines[index] = engine = VirtualEngine(self, index, handlers, on_lost)
        return engine


class VirtualEngine(Engine):
    def __init__(self, spawner, index, handlers, on_lost):
        super().__init__(lambda *args: Served(spawner, index, self, *args), self.leave)
        loop = asyncio.get_running_loop()
        self.spawner, self.index, self.pid = spawner, index, 1000 + len(spawner.started)
        self.ended = loop.create_future()
        self.hangs = False
        asked = {name: self.holding(handler) for name, handler in self.handlers().items()}
        self.channel, self.inside = pair_in_memory(loop, (handlers, asked), (on_lost, None))
        self.tell = self.inside.tell

    def holding(self, handler):
        async def held(*args):
            if self.hangs:
                await asyncio.Event().wait()
            answer = handler(*args)
            return await answer if asyncio.iscoroutine(answer) else answer

        return held

    def connect(self, end=None):
        if end is None:
            return self.spawner.link(self.index)
        if not isinstance(end, str):
            end.close()
        return None

    def leave(self, how="has ended with status 0"):
        if not self.ended.done():
            self.inside.close()
            self.ended.set_result(how)

    def kill(self):
        self.leave("was killed by SIGKILL")


class Served:
    def __init__(self, spawner, index, engine, pool, ids, total, num_workers):
        self.spawner, self.index, self.engine = spawner, index, engine
        self.ids, self.total, self.num_workers = ids, total, num_workers
        self.models, self.settings, self.prepared = {}, {}, {}
        self.drained = self.aborted = False
        self.draining = 0.0

    async def asked(self, what):
        if self.spawner.kill_on == (what, self.index):
            self.spawner.kill_on = None
            self.engine.kill()
            await asyncio.sleep(0)
        await asyncio.sleep(self.spawner.slow)
        if error := self.spawner.model_fails.get((what, self.index)):
            raise error

    async def load(self, key, source, given, generation=0):
        await self.asked("load")
        self.models[key], self.settings[key] = (source.text, generation), dict(given)
        return SimpleNamespace(loaded=len(set(self.ids) - self.spawner.cannot_load), of=self.index)

    async def prepare(self, key, source, generation):
        await self.asked("prepare")
        self.prepared[key] = source.text, generation
        return SimpleNamespace(loaded=len(self.ids), of=self.index)

    async def commit(self, key, generation):
        await self.asked("commit")
        assert self.prepared[key][1] == generation
        self.models[key] = self.prepared.pop(key)

    async def discard(self, key, generation):
        self.prepared.pop(key, None)

    async def change(self, key, **settings):
        self.settings.setdefault(key, {}).update(settings)

    async def unload(self, key):
        self.models.pop(key, None)

    async def drain(self):
        await asyncio.sleep(self.draining)
        self.drained = True

    def abort(self):
        self.aborted = True


def source(text):
    return Source(None, text=text)
