"""Engines and keepers as real processes: what they cost, and that nothing is left of them, whoever dies first."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aneuron import CpuBackend
from aneuron.errors import DeviceError
from aneuron.remote.processes import Processes
from aneuron.remote.sources import Source
from aneuron.remote.supervision import Plan
from aneuron.remote.supervisor import Supervisor

TESTS = Path(__file__).parent
PATH = {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(24 << 18))  # 24 MiB

    def forward(self, x):
        return x + self.weight[:2]


def runs(pid):
    """Whether a process is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def gone(pids):
    async with asyncio.timeout(60):
        while any(map(runs, pids)):
            await asyncio.sleep(0.02)


async def asked(supervision, engine, *what):
    sock = await supervision.connect(engine)

    def ask():
        with sock, sock.makefile("rw") as file:
            file.write(json.dumps(what) + "\n")
            file.flush()
            return json.loads(file.readline())

    return await asyncio.to_thread(ask)


async def ready(supervisor):
    changed = asyncio.Event()
    stop = supervisor.subscribe(changed.set)
    while not all(engine.state == "ready" for engine in supervisor.engines):
        changed.clear()
        await changed.wait()
    stop()


@ON_LINUX
async def test_engines_have_their_share_and_one_copy_of_the_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr("aneuron.remote.supervisor.LEAVES", 0.2)
    supervisor = Supervisor(Plan.of(CpuBackend(cores=3), [0, 1, 2], 2, 5), Processes("stand_in:StandIn"))
    await supervisor.start()
    pids = [engine.pid for engine in supervisor.engines]
    try:
        source = await asyncio.to_thread(Source.of, Wide())
        await supervisor.load(0, source, {"context": torch.inference_mode})
        what = await asked(supervisor, 0, "what")
        assert (what["pid"], what["ids"], what["total"], what["workers"]) == (pids[0], [0, 1], 3, 5)
        assert what["environ"] == {"NEURON_RT_VISIBLE_CORES": None, "CUDA_VISIBLE_DEVICES": "7"}
        for engine in (0, 1):  # each reads all weights
            await asked(supervisor, engine, "memory", 0)
        memory = await asked(supervisor, 1, "memory", 0)
        assert memory["sum"] == 24 << 18
        assert memory["Pss_Shmem"] < 16 << 10  # half of it
        stopped = pids[0]
        os.kill(stopped, signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)
        while supervisor.engines[1].incarnation == 1 or supervisor.engines[1].state != "ready":
            await asyncio.sleep(0.02)
        assert await asked(supervisor, 1, "run", 0, [1.0, 2.0]) == [2.0, 3.0]
        pids.append(supervisor.engines[1].pid)
    finally:
        await supervisor.aclose(drain=False)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # reaped, too


@ON_LINUX
async def test_a_start_that_is_cancelled_or_fails_leaves_no_process(monkeypatch):
    plan = Plan.of(CpuBackend(cores=2), [0, 1], 2, None)
    spawned = []
    spawn = Processes.spawn

    def spy(*args):
        spawned.append(spawn(*args))
        return spawned[-1]

    monkeypatch.setattr(Processes, "spawn", spy)
    start = asyncio.ensure_future(Supervisor(plan, Processes("stand_in:StandIn")).start())
    while len(spawned) < 2:
        await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: "/bin/false")
    with pytest.raises(DeviceError, match=r"engine \d \(pid \d+\) has ended with status 1 before it was ready"):
        await Supervisor(plan, Processes("stand_in:StandIn")).start()
    assert len(spawned) == 4
    assert not any(os.path.exists(f"/proc/{each.pid}") for each in spawned)


class Client:
    """`engines_client.py`, in a process of its own."""

    def __init__(self, folder, name):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(TESTS / "engines_client.py"), name],
            env={**os.environ, **PATH, "XDG_RUNTIME_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self):
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def end(self):
        """It ends by itself when its input has. Its output does not: engines that outlive it write there too."""
        self.process.stdin.close()
        assert self.process.wait() == 0

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def clients(tmp_path):
    made = []

    def client(name):
        made.append(Client(tmp_path, name))
        return made[-1]

    yield client
    for each in made:
        each.kill()


@ON_LINUX
async def test_nothing_is_left_of_shared_engines_whoever_dies(tmp_path, clients):
    one, other = clients("a/name"), clients("a/name")
    pids = one.read()
    assert other.read() == pids
    assert [one.ask(0), other.ask(1)] == [[2.0, 4.0]] * 2
    (keeper,) = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
    assert keeper not in (one.process.pid, other.process.pid)
    one.end()  # without closing anything
    assert other.ask(1) == [2.0, 4.0]
    os.kill(other.process.pid, signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    other.kill()
    await gone([*pids, keeper])
    assert os.listdir(tmp_path / "aneuron") == []
