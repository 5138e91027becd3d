"""A process of test_neuron_processes.py: answers each list of device ids by the cores that a model on them ran on."""

import asyncio
import importlib
import json
import os
import sys
import warnings


def run(pipe, package, path, environ):
    """Until it is killed. `package` is found in the folder `path`; the environment is as given, before it is read."""
    for name in list(os.environ):
        if name.startswith(("NEURON", "DOUBLE")):
            del os.environ[name]
    os.environ |= environ
    sys.path.insert(0, path)
    warnings.simplefilter("ignore")
    Answers(importlib.import_module(package)).give(pipe)


class Answers:
    def __init__(self, package):
        import torch
        from doubles import machine

        from aneuron.backends.neuron import NeuronBackend

        torch.set_num_threads(1)
        self.machine, self.x = machine, torch.ones(1, 2)
        self.net = package.trace(torch.nn.ReLU().eval(), self.x)
        self.backend = NeuronBackend(root=os.environ["DOUBLE_NEURON_DIR"])

    def give(self, pipe):
        pipe.send((len(self.backend.cores()), self.machine.visible))
        while True:
            ids = pipe.recv()
            try:
                pipe.send(self.forked() if ids == "fork" else self.used(ids))
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")

    def used(self, ids):
        self.machine.executions.clear()
        asyncio.run(self.use(ids))
        return sorted({execution.core for execution in self.machine.executions})

    async def use(self, ids):
        import torch

        from aneuron import AsyncDataParallel

        x = self.x
        async with AsyncDataParallel(self.net, ids, backend=self.backend, batch_size=1, example_inputs=x) as model:
            assert torch.equal(await model(x), x)

    def forked(self):
        core = self.backend.load(self.net, 0, 1)
        ours, childs = os.pipe()
        if not os.fork():
            texts = []
            for use in (
                lambda: core.execute((self.x,), {}),
                lambda: self.backend.load(self.net, 0, 1),
                self.backend.cores,
            ):
                try:
                    use()
                    texts.append("nothing")
                except RuntimeError as error:
                    texts.append(str(error))
            os.write(childs, json.dumps(texts).encode())
            os._exit(0)
        os.wait()
        return json.loads(os.read(ours, 10_000))
