"""The HTTP benchmark runs, with real servers and clients, and notices wrong answers. Nothing depends on how fast."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("aiohttp")
from aiohttp import web

ROOT = Path(__file__).parents[1]
needs_wrk = pytest.mark.skipif(
    shutil.which("wrk") is None or not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux and wrk"
)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("http", "processes", "rows", "table", "timing", "wrk")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


@asynccontextmanager
async def served(answer):
    """The port of a server whose answer to a row is `answer(row)`: bytes, or a status."""

    async def predict(request):
        got = await answer(torch.frombuffer(bytearray(await request.read()), dtype=torch.float32))
        return web.Response(status=got) if isinstance(got, int) else web.Response(body=got)

    app = web.Application()
    app.router.add_post("/predict", predict)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def right(x):
    return (x * 2 + 1).numpy().tobytes()


class Answers:
    """Ways to answer; each is wrong in its own way, but for the first two."""

    def __init__(self):
        self.calls, self.held = 0, None

    async def right(self, x):
        return right(x)

    async def refuses_every_third(self, x):
        self.calls += 1
        return 503 if self.calls % 3 == 0 else right(x)

    async def breaks_once(self, x):
        self.calls += 1
        return 500 if self.calls == 40 else right(x)

    async def a_little_off_once(self, x):
        self.calls += 1
        return right(x + (1e-3 if self.calls == 40 else 0))

    async def short(self, x):
        return right(x)[:32]

    async def the_same_for_all(self, x):
        self.held = right(x) if self.held is None else self.held
        return self.held

    async def swapped(self, x):
        """Two callers at a time get each other's answers."""
        if self.held is None:
            self.held = (x, asyncio.get_running_loop().create_future())
            try:
                async with asyncio.timeout(1.0):  # nobody else comes
                    return right(await self.held[1])
            except TimeoutError:
                self.held = None
                return right(x)
        (other, waiting), self.held = self.held, None
        waiting.set_result(x)
        return right(other)


@needs_wrk
async def test_the_client_counts_what_it_sees(benchmarks):
    async with served(Answers().right) as port:
        seen = await benchmarks.wrk.load(f"http://127.0.0.1:{port}/predict", 8, 1)
    assert seen.answers_per_second > 0
    assert all(latency > 0 for latency in seen.latencies)
    assert (seen.refused, seen.failed) == (0, 0)
    async with served(Answers().refuses_every_third) as port:
        seen = await benchmarks.wrk.load(f"http://127.0.0.1:{port}/predict", 8, 1)
    assert seen.failed == 0
    assert len(seen.latencies) / 2 == pytest.approx(seen.refused, abs=16)
    async with served(Answers().breaks_once) as port:
        assert (await benchmarks.wrk.load(f"http://127.0.0.1:{port}/predict", 8, 1)).failed == 1


@needs_wrk
@pytest.mark.parametrize("wrong", ["a_little_off_once", "short", "the_same_for_all"])
async def test_the_client_notices_wrong_answers(benchmarks, wrong):
    async with served(getattr(Answers(), wrong)) as port:
        with pytest.raises(benchmarks.timing.WrongAnswer):
            await benchmarks.wrk.load(f"http://127.0.0.1:{port}/predict", 8, 1)


@pytest.mark.parametrize("wrong", ["a_little_off_once", "short", "the_same_for_all", "swapped"])
async def test_a_server_that_gives_wrong_answers_is_not_measured(benchmarks, wrong):
    server = benchmarks.processes.Server("none", {})
    async with served(Answers().right) as port:
        server.url = f"http://127.0.0.1:{port}/predict"
        await server.wait_until_right()
    async with served(getattr(Answers(), wrong)) as port:
        server.url = f"http://127.0.0.1:{port}/predict"
        with pytest.raises(ExceptionGroup) as caught:
            await server.wait_until_right()
    assert caught.group_contains(benchmarks.timing.WrongAnswer)


def one_more(benchmarks, port):
    return benchmarks.wrk.refusals(f"http://127.0.0.1:{port}/predict")


async def test_one_more_caller_times_refusals_and_checks_answers(benchmarks, monkeypatch):
    monkeypatch.setattr(benchmarks.wrk, "NOW_AND_THEN", 0.0)
    answers = Answers()
    async with served(answers.refuses_every_third) as port, aclosing(one_more(benchmarks, port)) as refusals:
        times = [await anext(refusals) for _ in range(5)]
    assert answers.calls == 15
    assert all(took > 0 for took in times)
    async with served(Answers().a_little_off_once) as port, aclosing(one_more(benchmarks, port)) as refusals:
        with pytest.raises(benchmarks.timing.WrongAnswer):
            await anext(refusals)


async def test_a_server_that_does_not_start_says_why(benchmarks, monkeypatch):
    monkeypatch.setattr(benchmarks.http, "servers", lambda *given: {"one": benchmarks.processes.Server("none", {})})
    contenders = benchmarks.http.servers()
    async with benchmarks.http.started(contenders) as fails:
        assert "No module named none" in fails["one"]


def seen_of(benchmarks, scene, **rates):
    def turn(rate):
        more = {"MB": 100.0, "failed": 0, "refused": 0.0, "refused p50": 1.0, "refused p99": 2.0}
        return benchmarks.timing.Turn(rate, latencies=[0.0066], more=more)

    return scene, benchmarks.timing.Seen({name: [turn(rate)] for name, rate in rates.items()}, {"mosec": "no"}, [0.005])


def test_each_goal_is_held_against_the_right_one(benchmarks):
    apps = {"FastAPI floor": 100.0, "FastAPI aneuron": 91.0, "FastAPI executor": 10.0, "aiohttp aneuron": 89.0}
    apps |= {"aiohttp floor": 100.0, "LitServe": 50.0}
    scenes = [seen_of(benchmarks, scene, **apps) for scene in ("1", "32", "256")]
    scenes.append(seen_of(benchmarks, "overload", **{"FastAPI aneuron": 390.0}))
    scenes[-1][1].sleeps[0] = 0.02
    rows = {(row.name, row.unit): row for row in benchmarks.http.compared(scenes)}
    kept = {key: (row.kept(row.must), row.kept(row.goal)) for key, row in rows.items()}
    assert kept["FastAPI,    32", "answers/s"] == (True, False)  # 91 % of the floor, not twice LitServe
    assert kept["FastAPI,   256", "answers/s"] == (True, True)  # 1.3 times
    assert kept["aiohttp,   256", "answers/s"] == (False, False)
    assert kept["aiohttp,   256, > mosec", "answers/s"] == (None, None)  # mosec is out
    assert kept["FastAPI,     1", "p50 ms"][0] is False  # 1.6 ms above
    assert kept["FastAPI, overload", "answers/s"][0] is True
    assert kept["FastAPI, overload", "p99 ms"][0] is True
    assert ("aiohttp, overload", "answers/s") not in kept
    text = benchmarks.http.everything(scenes)
    assert sum("mosec  " in line and line.endswith("fails") for line in text.splitlines()) == 4
    assert max(map(len, benchmarks.table.table(list(rows.values())).splitlines())) <= 150


@needs_wrk
def test_the_command_line_measures_real_servers(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("uvloop")
    command = [
        sys.executable,
        "-m",
        "benchmarks.http",
        "--quick",
        "--only",
        "FastAPI",
        "aiohttp",
        "--behind",
        "aneuron",
    ]
    command += ["--connections", "8", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "http.json").read_text())
    assert set(data["seen"]["8"]) == {"FastAPI aneuron", "aiohttp aneuron"}, done.stdout
    for (turn,) in data["seen"]["8"].values():
        assert turn["answers/s"] > 0
        assert turn["MB"] > 10
        assert turn["failed"] == turn["refused"] == 0
    assert (tmp_path / "http.txt").read_text() == done.stdout


@needs_wrk
def test_the_servers_of_serve_are_measured(tmp_path):
    for needed in ("granian", "uvloop"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "benchmarks.serving", "--only", "aiohttp", "granian RSGI", "--connections", "8"]
    command += ["--seconds", "1", "--repetitions", "1", "--results", str(tmp_path / "seen.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())["seen"]["8"]
    assert set(seen) == {"aiohttp", "granian RSGI"}, done.stdout
    assert all(turn["answers/s"] > 0 and turn["us of CPU"] > 0 for (turn,) in seen.values())
    assert "| 8 | granian RSGI |" in done.stdout


PEERS = {
    "litserve": """
from benchmarks.servers.litserve_app import Api
api = Api(max_batch_size=8, batch_timeout=0.01)
api.pre_setup(None)
api.setup("cpu")
batch = api.batch([api.decode_request(body) for body in bodies])
assert [api.encode_response(row).body for row in api.unbatch(api.predict(batch))] == right
""",
    "mosec": """
from benchmarks.servers.mosec_app import Inference
worker = Inference()
assert [worker.serialize(row) for row in worker.forward([worker.deserialize(body) for body in bodies])] == right
""",
}


def test_the_peers_compute_the_same():
    """In a process of its own, since they set logging and the ways of multiprocessing; without their servers."""
    programs = [program for peer, program in PEERS.items() if importlib.util.find_spec(peer)]
    if not programs:
        pytest.skip("neither LitServe nor mosec is installed")
    rows = "import torch\nrows = torch.rand(3, 16)\nbodies = [row.numpy().tobytes() for row in rows]\n"
    program = rows + "right = [(row * 2 + 1).numpy().tobytes() for row in rows]\n" + "".join(programs)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
