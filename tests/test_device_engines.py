"""Engines that each have some of a machine's accelerators: real processes, on the doubles."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import doubles
import pytest
import torch
from fake_cuda import FakeCuda

from aneuron import AsyncDataParallel, CudaBackend, Pool
from aneuron.backends.neuron import NeuronBackend

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def told(pool, name):
    """A variable in the environment of each engine."""
    found = []
    for engine in pool.statistics().engines:
        environ = Path(f"/proc/{engine.pid}/environ").read_bytes().decode().split("\0")
        found.append(dict(each.partition("=")[::2] for each in environ if each).get(name))
    return found


def numbers(pool):
    return [tuple(engine.cores) for engine in pool.statistics().engines]


async def until(true):
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


async def test_24_neuron_cores_in_4_engines_of_which_one_loses_a_core(tmp_path, monkeypatch):
    """Its engine is drained and started again, with the same cores, while the others serve; nobody notices."""
    root = tmp_path / "machine"
    doubles.build(root, cores=24, cores_per_chip=2)
    (root / "lose").write_text("8")
    monkeypatch.setenv("DOUBLE_NEURON_DIR", str(root))
    monkeypatch.setenv("DOUBLE_NEURON_SERVICE_TIME", "0.005")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    x, states, cores = torch.ones(2, 2), set(), set()
    with doubles.neuronx(cores=24, dir=str(root)):
        async with Pool(backend=NeuronBackend(root=root), processes=4) as pool:
            settings = {"pool": pool, "batch_size": 2, "example_inputs": x}
            async with AsyncDataParallel("engine_models:on_neuron", **settings) as model:
                mine = [tuple(range(start, start + 6)) for start in (0, 6, 12, 18)]
                visible = ["0-5", "6-11", "12-17", "18-23"]
                assert (numbers(pool), told(pool, "NEURON_RT_VISIBLE_CORES")) == (mine, visible)

                async def caller():
                    while pool.statistics().engines[1].restarts == 0 or not cores.issuperset(range(24)):
                        y, timing = await model.timed(x)
                        assert torch.equal(y, x)
                        cores.add(timing.core)
                        states.add(tuple(engine.state for engine in pool.statistics().engines))

                async with asyncio.timeout(60):
                    await asyncio.gather(*[caller() for _ in range(48)])
                await until(lambda: all(engine.state == "ready" for engine in pool.statistics().engines))
                assert ("ready", "draining", "ready", "ready") in states
                assert all((first, *rest) == ("ready",) * 3 for first, _, *rest in states)
                assert [engine.restarts for engine in pool.statistics().engines] == [0, 1, 0, 0]
                assert (numbers(pool), told(pool, "NEURON_RT_VISIBLE_CORES")) == (mine, visible)
                assert cores == set(range(24))
                seen = model.statistics()
                assert [(core.id, core.global_id) for core in seen.cores] == [(core, core) for core in range(24)]
                assert (seen.calls.failed, seen.calls.cancelled) == (0, 0)


async def test_cuda_devices_in_2_engines_of_which_one_is_killed(monkeypatch):
    """Each sees its own, two cores on each; the double says nothing of memory, contexts, or devices that fail."""
    FakeCuda(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    async with (
        Pool(backend=CudaBackend(cores_per_device=2), processes=2) as pool,
        AsyncDataParallel("engine_models:on_cuda", pool=pool, batch_size=2) as model,
    ):
        for turn in range(2):
            assert told(pool, "CUDA_VISIBLE_DEVICES") == ["7,5", "3,1"]
            assert numbers(pool) == [(0, 1, 2, 3), (4, 5, 6, 7)]
            x = torch.randn(64, 2)
            assert torch.equal(await model(x), torch.relu(x))
            if not turn:
                await until(lambda: all(core.batches for core in model.statistics().cores))
                os.kill(pool.statistics().engines[1].pid, signal.SIGKILL)
                await until(lambda: pool.statistics().engines[1].restarts and pool.statistics().engines[1].pid)
                await until(lambda: pool.statistics().engines[1].state == "ready")
