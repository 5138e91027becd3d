"""Engines that are processes: real sockets, shared memory, signals. Few, for each start takes seconds."""

import asyncio
import gc
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from worker_that_stops import shared

import aneuron
from aneuron import AsyncDataParallel, Pool, SimulatedBackend

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix sockets with descriptors")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def closures(x: torch.Tensor) -> object:
    """What no pickle takes."""
    return [lambda: None for _ in x]


def children() -> set[int]:
    found = set()
    for each in os.listdir("/proc"):
        if each.isdigit():
            try:
                fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(each))
    return found


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_calls_of_all_sizes_through_engines_that_are_killed() -> None:
    before = children()

    async def main() -> None:
        pool = Pool(backend=SimulatedBackend(cores=4, service_time=0.002), processes=2)
        async with AsyncDataParallel(Net().eval(), pool=pool, batch_size=8) as model:
            large = torch.rand(64, 16, 1024)  # 4 MiB
            assert torch.equal(await model(large), 2 * large)
            pids = [engine.pid for engine in pool.statistics().engines]
            assert children() - before == set(pids)

            async def caller(index: int) -> None:
                for turn in range(30):
                    rows = 1 + (index + turn) % 11
                    x = torch.full((rows, 16), float(index)) + torch.rand(rows, 16)
                    assert torch.equal(await model(x), 2 * x)
                    if index == 0 and turn == 10:
                        os.kill(pids[0], signal.SIGKILL)
                    if index == 1 and turn % 10 == 0:
                        assert torch.equal(await model(large), 2 * large)

            await asyncio.gather(*[caller(index) for index in range(24)])
            counts = model.statistics().calls
            assert (counts.failed, counts.cancelled, counts.waiting, counts.running) == (0, 0, 0, 0)
            while [engine.state for engine in pool.statistics().engines] != ["ready", "ready"]:
                await asyncio.sleep(0.05)
            assert pool.statistics().engines[0].pid not in pids
            assert torch.equal(await model(large), 2 * large)
            async with AsyncDataParallel(closures, pool=pool, batch_size=1, check_rows=False) as other:
                with pytest.raises(TypeError, match=r"output.* cannot be sent to another process"):
                    await other(torch.ones(1, 2))
            assert torch.equal(await model(torch.ones(1, 16)), torch.full((1, 16), 2.0))

    asyncio.run(main())
    assert children() <= before


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_is_left_of_engines_on_a_loop_that_went_without_closing_them() -> None:
    before, had = children(), descriptors()

    async def main() -> AsyncDataParallel:
        model = AsyncDataParallel(Net().eval(), pool=Pool(backend=aneuron.CpuBackend(cores=1), processes=1))
        assert torch.equal(await model(torch.ones(1, 2)), torch.full((1, 2), 2.0))
        waiting = [asyncio.ensure_future(model(torch.ones(1, 2))) for _ in range(10)]
        await asyncio.sleep(0)
        for each in waiting:
            each.cancel()
        return model

    model = asyncio.run(main())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del model
        gc.collect()
    for _ in range(200):
        if children() <= before:
            break
        time.sleep(0.05)
    assert children() <= before
    assert descriptors() <= had + 2  # a loop's own, which the interpreter may keep for a while


def aborts(x: torch.Tensor) -> torch.Tensor:
    """For a negative row as an assertion in a driver does."""
    if (x < 0).any():
        os.abort()
    return 2 * x


def test_ten_thousand_calls_outlive_their_engine_and_a_row_that_aborts_two_is_blamed() -> None:
    """Nobody else is harmed."""

    async def main() -> None:
        pool = Pool(backend=SimulatedBackend(cores=2, service_time=0.001), processes=2)
        async with AsyncDataParallel(aborts, pool=pool, batch_size=32) as model:
            rows = torch.arange(10_000.0)[:, None]
            calls = [asyncio.ensure_future(model(rows[index : index + 1])) for index in range(10_000)]
            await asyncio.sleep(0)
            pid = pool.statistics().engines[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert torch.equal(torch.cat(await asyncio.gather(*calls)), 2 * rows)
            while [engine.state for engine in pool.statistics().engines] != ["ready", "ready"]:
                await asyncio.sleep(0.05)
            with pytest.raises(aneuron.CoreFailed, match="died while they executed these rows"):
                await model(torch.tensor([[-1.0]]))

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_that_is_stopped_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had sent is executed; its answers wait for it, as much as it had asked for."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    program = [sys.executable, str(Path(__file__).with_name("worker_that_stops.py")), "name"]

    def resident(pid: int | None) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def main() -> None:
        worker = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
        assert worker.stdout is not None
        try:
            async with shared("name") as model:
                assert await worker.stdout.readline() == b"called\n"
                worker.send_signal(signal.SIGSTOP)
                (engine,) = model.pool.statistics().engines
                before = resident(engine.pid)
                for value in range(300):
                    x = torch.full((1, 4), float(value))
                    assert torch.equal(await model(x), x)
                assert resident(engine.pid) - before < 512 << 20
                worker.send_signal(signal.SIGCONT)
                assert await worker.stdout.readline() == b"answered\n"
                assert await worker.wait() == 0
                assert torch.equal(await model(x), x)
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()

    asyncio.run(main())
