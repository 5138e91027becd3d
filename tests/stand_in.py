"""In place of what serves the models of an engine: it keeps what it is told, and answers lines over a link."""

import asyncio
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import torch


def rollup():
    with open("/proc/self/smaps_rollup") as file:
        return {line.split(":")[0]: int(line.split()[1]) for line in file if line.endswith("kB\n")}


class StandIn:
    def __init__(self, pool, ids, total, num_workers=None):
        self.pool, self.ids, self.total, self.num_workers = pool, ids, total, num_workers
        self.models, self.given, self.prepared, self.generation = {}, {}, {}, {}
        self.on_state = lambda state: None

    async def load(self, key, source, given, generation=0):
        model = await asyncio.to_thread(source.open)
        if given.get("fails") in self.ids:
            raise ValueError(f"core {given['fails']} does not load")
        if given.get("dies") in self.ids:
            os.kill(os.getpid(), signal.SIGKILL)
        if given.get("waits"):
            await asyncio.sleep(3600)
        self.models[key], self.given[key], self.generation[key] = model, dict(given), generation
        return SimpleNamespace(loaded=len(self.ids), pid=os.getpid())

    async def prepare(self, key, source, generation):
        self.prepared[key] = await asyncio.to_thread(source.open), generation

    async def commit(self, key, generation):
        model, found = self.prepared.pop(key)
        assert found == generation
        self.models[key], self.generation[key] = model, generation

    async def discard(self, key, generation):
        self.prepared.pop(key, None)

    async def change(self, key, **settings):
        self.given.setdefault(key, {}).update(settings)

    async def unload(self, key):
        self.models.pop(key, None)

    def connect(self, end):
        threading.Thread(target=self._serve, args=(end, asyncio.get_running_loop()), daemon=True).start()

    def _serve(self, end, loop):
        with end, end.makefile("rw") as file:
            for line in file:
                name, *args = json.loads(line)
                file.write(json.dumps(getattr(self, f"answer_{name}")(loop, *args)) + "\n")
                file.flush()

    def answer_what(self, loop):
        environ = {name: os.environ.get(name) for name in ("NEURON_RT_VISIBLE_CORES", "CUDA_VISIBLE_DEVICES")}
        return {
            "pid": os.getpid(), "ids": self.ids, "total": self.total, "workers": self.num_workers,
            "backend": repr(self.pool), "models": {key: str(model)[:60] for key, model in self.models.items()},
            "given": {str(key): repr(given) for key, given in self.given.items()}, "environ": environ,
            "generation": self.generation,
            "loop": type(loop).__module__,
        }  # fmt: skip

    def answer_run(self, loop, key, values):
        with torch.inference_mode():
            return self.models[key](torch.tensor(values)).tolist()

    def answer_memory(self, loop, key):
        with torch.inference_mode():
            total = sum(float(each.sum()) for each in self.models[key].parameters())
        return {"sum": total, **rollup()}

    def answer_lose(self, loop, *ids):
        loop.call_soon_threadsafe(self.on_state, {"lost": list(ids), "in_service": len(self.ids) - len(ids)})

    def answer_hang(self, loop):
        loop.call_soon_threadsafe(time.sleep, 3600)

    async def drain(self):
        self.models.clear()

    def abort(self):
        self.models.clear()
