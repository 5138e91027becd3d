"""Deployments on a cluster of this machine, in the mode that the environment says: `make ray` runs both.

Not in the environment of the other tests: Ray is large, and a cluster takes ten seconds to start. What Serve does by
itself is waited for by what can be seen of it, and no test takes more than LIMIT.
"""

import asyncio
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is an environment of its own: make ray")

import torch
from ports import free_port
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

import aneuron.ray
from aneuron import (
    AsyncDataParallel,
    Closed,
    CpuBackend,
    DeadlineExceeded,
    QueueFull,
    Rows,
    ShapeError,
    SimulatedBackend,
)
from aneuron.web.starlette import get, install

ROOT = pathlib.Path(__file__).parents[1]
PORT = free_port()
LIMIT = 180  # seconds
NUMBERS = count(1)
ONE_LOOP = os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED") == "1"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("ray"),
    pytest.mark.asyncio(loop_scope="module"),  # of one loop: Serve keeps a handle for the loop it was first used on
]


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.stack([x[:, 0] * self.factor, torch.full_like(x[:, 0], os.getpid())], 1)


def make(factor=2.0, max_pending=None, service_time=0.005):
    backend = SimulatedBackend(cores=1, service_time=service_time)
    example = torch.zeros(1, 1)
    return AsyncDataParallel(
        Scale(factor).eval(), backend=backend, batch_size=8, example_inputs=example, max_pending=max_pending
    )


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(
        num_cpus=8,
        num_gpus=2,
        resources={"neuron_cores": 8},
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": paths, "ANEURON_PURE": os.environ.get("ANEURON_PURE", "")}},
    )
    serve.start(http_options={"port": PORT})
    yield
    with suppress(RuntimeError):  # of one loop: a handle wants the loop that it was used on, which has gone
        serve.shutdown()
    ray.shutdown()


@pytest.fixture(autouse=True)
def limited():
    """A test that hangs fails, with the traceback of where."""

    def over(number, frame):
        raise TimeoutError(f"the test has taken {LIMIT} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)


async def until(happens):
    """Wait for what others bring about: `happens` says whether they have."""
    async with asyncio.timeout(LIMIT / 2):
        while not (seen := await happens() if inspect.iscoroutinefunction(happens) else happens()):
            await asyncio.sleep(0.05)
    return seen


def run(deployment, *args, **kwargs):
    """A handle of a new application: over one that runs Serve may say that it is ready while the old one answers."""
    name = f"app{next(NUMBERS)}"
    return serve.run(deployment.bind(*args, **kwargs), name=name, route_prefix=f"/{name}")


@pytest.fixture(autouse=True)
def tidy():
    yield
    _get_global_client().delete_apps(list(serve.status().applications), blocking=False)


def http(path, body=None, headers=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def flood(path):
    with ThreadPoolExecutor(48) as threads:
        return list(threads.map(lambda _: http(path, [3.0]), range(48)))


def row(value):
    return np.array([[value]], dtype="float32")


class Load:
    """Callers that call one time after the other, until it is left; and what they got."""

    def __init__(self, call, callers=16):
        self._call, self._callers, self._leaving = call, callers, False
        self.factors, self.pids, self.errors = Counter(), Counter(), []
        self.last = {}  # factor, by pid

    async def _one(self, number):
        while not self._leaving:
            try:
                y = await self._call(row(number + 1.0))
            except Exception as error:
                self.errors.append(error)
                await asyncio.sleep(0)
            else:
                factor, pid = y[0, 0].item() / (number + 1.0), int(y[0, 1])
                self.factors[factor] += 1
                self.pids[pid] += 1
                self.last[pid] = factor

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._one(number)) for number in range(self._callers)]
        return self

    async def __aexit__(self, kind, error, trace):
        self._leaving = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), LIMIT / 2)


async def test_handles_and_views_answer_and_raise():
    handle = run(aneuron.ray.deployment(make))
    net = aneuron.ray.view(handle)
    assert (await net(row(3.0)))[0, 0] == 6
    assert (await handle.remote(row(3.0)))[0, 0] == 6
    _, timing = await net.options(priority=1, tenant="acme").timed(row(3.0))
    assert timing.batch_rows == 1
    for bad in ([1.0, 2.0], [[1.0]], "text", None, np.zeros((0, 1), "float32")):
        with pytest.raises(ShapeError, match=r"no tensor among its inputs|an empty batch|example_inputs"):
            await net(bad)
        with pytest.raises(ShapeError, match=r"no tensor among its inputs|an empty batch|example_inputs"):
            await handle.remote(bad)
    with pytest.raises(DeadlineExceeded):
        await net.options(timeout=0.0)(row(1.0))
    status, _, body = http(f"/{handle.app_name}")
    assert (status, b"answers handles, not HTTP" in body) == (404, True)


def writes():
    def model(x, objects):
        x.add_(1)
        for each in objects:
            each += 1
        return x

    return AsyncDataParallel(model, backend=SimulatedBackend(cores=1, service_time=0.0), check_rows=False)


async def test_a_model_may_write_to_what_it_gets():
    net = aneuron.ray.view(run(aneuron.ray.deployment(writes)))
    for size in (1, 100_000):
        y = await net(np.zeros((1, size), "float32"), Rows([np.zeros(size)]))
        assert torch.equal(y, torch.ones(1, size))


async def test_one_of_two_replicas_is_killed_under_load():
    handle = run(aneuron.ray.deployment(make, num_replicas=2), service_time=0.02)
    async with Load(aneuron.ray.view(handle)) as views, Load(handle.remote, callers=4) as plain:
        await until(lambda: len(views.pids) == len(plain.pids) == 2)
        victim = int((await handle.remote(row(1.0)))[0, 1])
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(views.pids) == 3)  # the one in its place answers
    assert set(views.factors) == set(plain.factors) == {2.0}
    assert views.errors == []
    assert len(plain.errors) <= 4, plain.errors  # those that it had


async def test_a_replica_is_killed_while_a_map_is_under_way():
    net = aneuron.ray.view(run(aneuron.ray.deployment(make, num_replicas=2), max_pending=16, service_time=0.02))
    pids = Counter()
    elements = (row(number + 1.0) for number in range(400))
    async with net.options(timeout=60.0).map(elements, limit=64) as results:
        number = 0
        async for y in results:
            number += 1
            assert y[0, 0].item() == 2 * number
            pids[int(y[0, 1])] += 1
            if number == 100:
                os.kill(pids.most_common(1)[0][0], signal.SIGKILL)
    assert number == 400
    assert len(pids) >= 2


async def test_a_call_that_is_cancelled_leaves_the_queue_of_its_replica():
    handle = run(aneuron.ray.deployment(make), service_time=0.3)
    net, figures = aneuron.ray.view(handle), handle.options(method_name="record_autoscaling_stats").remote
    await net(row(1.0))
    calls = [asyncio.create_task(net(row(1.0))) for _ in range(64)]

    async def waiting():
        return (await figures())["waiting_rows"] >= 8

    async def nobody():
        return (await figures())["calls"] == 0

    await until(waiting)
    for call in calls:
        call.cancel()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(end, (torch.Tensor, asyncio.CancelledError)) for end in ends)
    await until(nobody)
    assert (await net(row(3.0)))[0, 0] == 6


rolling = aneuron.ray.deployment(make).bind()


async def deploy(app, factor, replicas, argument="factor"):
    """As `serve deploy` does it: `serve.run` gives each deployment a new version, and so replaces all replicas."""
    config = {"user_config": {argument: factor}} if factor else {}
    make = {"name": "make", "num_replicas": replicas} | config
    said = {"name": app, "route_prefix": f"/{app}", "import_path": "test_ray_serve:rolling", "deployments": [make]}
    schema = ServeDeploySchema.model_validate({"applications": [said]})
    await asyncio.to_thread(lambda: _get_global_client().deploy_apps(schema))


async def running(app):
    """The replicas of `make` that run."""
    found = (await asyncio.to_thread(serve.status)).applications.get(app)
    assert found is None or found.status != "DEPLOY_FAILED", found
    return found.deployments["make"].replica_states.get("RUNNING", 0) if found and found.deployments else 0


async def test_another_user_config_swaps_the_models_and_loses_no_call():
    await deploy("rolling", 3.0, replicas=2)

    async def up():
        return await running("rolling") == 2

    await until(up)
    handle = serve.get_app_handle("rolling")
    async with Load(aneuron.ray.view(handle)) as seen:
        await until(lambda: len(seen.pids) == 2)
        await deploy("rolling", 5.0, replicas=2)
        await until(lambda: set(seen.last.values()) == {5.0})
        await deploy("rolling", None, replicas=2)
        await until(lambda: set(seen.last.values()) == {2.0})
    assert [(await handle.remote(row(1.0)))[0, 0].item() for _ in range(8)] == [2.0] * 8
    assert seen.errors == []
    assert set(seen.factors) == {2.0, 3.0, 5.0}
    assert len(seen.pids) == 2  # the same processes


async def test_a_user_config_that_cannot_be_followed_says_why_and_the_next_one_is():
    await deploy("garbage", 3.0, replicas=1)

    async def up():
        return await running("garbage") == 1

    def said():
        return serve.status().applications["garbage"].deployments["make"].message

    await until(up)
    await deploy("garbage", 5.0, replicas=1, argument="factr")
    await until(lambda: "unexpected keyword argument 'factr'" in said())
    await deploy("garbage", 5.0, replicas=1)
    net = aneuron.ray.view(serve.get_app_handle("garbage"))
    assert (await net.options(timeout=LIMIT / 2)(row(1.0)))[0, 0] == 5


def web(model):
    from fastapi import Depends, FastAPI

    app = FastAPI()
    install(app, net=model)
    net_of = Depends(get("net"))

    @app.post("/predict")
    async def predict(value: list[float], net=net_of) -> list[float]:
        return (await net(torch.tensor([value])))[0].tolist()

    return app


def test_an_ingress_in_the_replica_answers_errors():
    app = run(aneuron.ray.deployment(make, ingress=web), max_pending=8, service_time=0.3).app_name
    status, _, body = http(f"/{app}/predict", [3.0])
    assert (status, json.loads(body)[:1]) == (200, [6.0])
    assert http(f"/{app}/predict", [])[0] == 422
    assert http(f"/{app}/readyz")[0] == 200
    status, _, body = http(f"/{app}/predict", [3.0], {"X-Request-Timeout-Ms": "50"})
    assert (status, json.loads(body)["error"]) == (504, "DeadlineExceeded")
    answers = flood(f"/{app}/predict")
    refused = [headers["Retry-After"] for status, headers, _ in answers if status == 503]
    assert {status for status, _, _ in answers} == {200, 503}
    assert all(int(seconds) >= 1 for seconds in refused)


def test_a_front_answers_the_errors_of_handles():
    from fastapi import FastAPI

    app = FastAPI()
    aneuron.ray.answer_errors(app)

    @serve.deployment(max_ongoing_requests=256)
    @serve.ingress(app)
    class Front:
        def __init__(self, net):
            self.handle, self.net = net, aneuron.ray.view(net)

        @app.post("/view")
        async def view(self, value: list[float], timeout: float = 30.0) -> list[float]:
            return (await self.net.options(timeout=timeout)(np.array([value], "float32")))[0].tolist()

        @app.post("/plain")
        async def plain(self, value: list[float]) -> list[float]:
            return (await self.handle.remote(np.array([value], "float32")))[0].tolist()

    pressed = aneuron.ray.deployment(make, backpressure_config={"status_code": 429, "retry_after_s": 1})
    app = run(Front, pressed.bind(max_pending=8, service_time=0.3)).app_name
    assert http(f"/{app}/view?timeout=0", [3.0])[0] == 504
    for path in (f"/{app}/view", f"/{app}/plain"):
        assert json.loads(http(path, [3.0])[2])[0] == 6.0
        status, _, body = http(path, [])
        assert (status, "Traceback" in body.decode()) == (422, False)
        answers = flood(path)
        assert {status for status, _, _ in answers} == {200, 429}
        assert all(int(headers["Retry-After"]) >= 1 for status, headers, _ in answers if status == 429)


def broken():
    return AsyncDataParallel("there-is-no-such-file.pt", backend="cpu")


@pytest.mark.parametrize("factory", [broken, lambda: 1 / 0])
def test_a_replica_whose_start_fails_says_why(factory):
    with pytest.raises(RuntimeError):
        run(aneuron.ray.deployment(factory, name="Broken", max_constructor_retry_count=1))
    (failed,) = [app for app in serve.status().applications.values() if app.status == "DEPLOY_FAILED"]
    said = failed.deployments["Broken"].message
    assert "there-is-no-such-file.pt" in said or "division by zero" in said


def environment():
    def model(x):
        names = ("NEURON_RT_VISIBLE_CORES", "CUDA_VISIBLE_DEVICES")
        return [[os.environ.get(name, "") for name in names] + [len(CpuBackend().cores())] for _ in range(len(x))]

    return AsyncDataParallel(model, backend=SimulatedBackend(cores=1, service_time=0.0), check_rows=False, batch_size=4)


@pytest.mark.parametrize(
    ("asked", "neuron", "gpus"),
    [({"neuron_cores": 2}, 2, 0), ({"num_gpus": 1}, 0, 1), ({"num_cpus": 2}, 0, 0), ({}, 0, 0)],
)
async def test_a_replica_sees_what_it_was_given(asked, neuron, gpus):
    net = aneuron.ray.view(run(aneuron.ray.deployment(environment, **asked)))
    ((cores, devices, cpus),) = await net(torch.ones(1, 1))
    assert len([each for each in cores.split(",") if each]) == neuron
    assert len([each for each in devices.split(",") if each]) == gpus
    assert cpus == min(asked.get("num_cpus", 1), len(os.sched_getaffinity(0)))


def dying():
    backend = SimulatedBackend(cores=1, service_time=0.0, faults=[SimulatedBackend.fault("fatal", core=0, execution=3)])
    return AsyncDataParallel(Scale(2.0).eval(), backend=backend, batch_size=8, check_rows=False)


async def test_a_replica_that_has_lost_its_cores_is_replaced():
    deployment = aneuron.ray.deployment(dying, health_check_period_s=0.2, graceful_shutdown_wait_loop_s=0.1)
    net = aneuron.ray.view(run(deployment))
    first = int((await net(row(1.0)))[0, 1])

    async def replaced():
        with suppress(aneuron.AneuronError):
            return int((await net.options(timeout=5.0)(row(1.0)))[0, 1]) != first

    await until(replaced)


def by_waiting_rows(context):
    """Two replicas as soon as one has been seen to have rows waiting."""
    told = context.aggregated_metrics.get("waiting_rows", {})
    return (2 if any(value > 0 for value in told.values()) else context.current_num_replicas), {}


async def test_an_autoscaling_policy_finds_the_figures():
    deployment = aneuron.ray.deployment(
        make,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "metrics_interval_s": 0.2,
            "look_back_period_s": 1.0,
            "upscale_delay_s": 0.1,
            "policy": {"policy_function": by_waiting_rows},
        },
    )
    handle = run(deployment, service_time=0.1)

    async def two():
        return await running(handle.app_name) == 2

    async with Load(aneuron.ray.view(handle), callers=64) as seen:
        await until(two)
    assert seen.errors == []


async def test_what_was_accepted_is_answered_at_the_end():
    handle = run(aneuron.ray.deployment(make), service_time=0.5)
    net, figures = aneuron.ray.view(handle), handle.options(method_name="record_autoscaling_stats").remote
    await net(row(1.0))
    calls = [asyncio.create_task(net(row(1.0))) for _ in range(24)]

    async def accepted():
        return (await figures())["calls"] == 24

    await until(accepted)
    await asyncio.to_thread(serve.delete, handle.app_name)
    assert [y[0, 0].item() for y in await asyncio.gather(*calls)] == [2.0] * 24
    with pytest.raises(Closed, match="is not served"):
        await net.options(timeout=LIMIT / 2)(row(1.0))


async def test_what_serve_refuses_itself_is_queue_full():
    handle = run(aneuron.ray.deployment(make, max_ongoing_requests=1, max_queued_requests=1), service_time=0.3)
    net = aneuron.ray.view(handle)
    answers = await asyncio.gather(*(net(row(1.0)) for _ in range(12)), return_exceptions=True)
    refused = [each for each in answers if isinstance(each, Exception)]
    assert refused
    assert {type(each) for each in refused} == {QueueFull}
    assert all(each.retry_after == 1.0 for each in refused)


PROGRAMS = dict(
    re.findall(r"<!-- program: (.+?) -->\n```python\n(.*?)```", (ROOT / "docs/guides/ray.md").read_text(), re.DOTALL)
)


def names_of(program):
    names = {"__name__": "program"}  # not to be found: what it defines goes by value, as that of a script
    exec(compile(PROGRAMS[program], program, "exec"), names)
    return names


def test_the_programs_of_the_guide_run():
    assert set(PROGRAMS) == {"ray", "ray http"}
    names_of("ray")
    names_of("ray http")
    assert json.loads(http("/net/predict", [1.0, 1.0])[2]) == [0.5, 0.5]
    assert http("/net/predict", [1.0], {"X-Request-Timeout-Ms": "0"})[0] == 504


def test_the_example_runs():
    path = ROOT / "examples" / "ray_service.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, path, str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT - 10)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "query 3: documents" in done.stdout
