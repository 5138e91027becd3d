"""Deployments on a cluster of this machine, in the mode that the environment says: `make ray` runs both.

Not in the environment of the other tests: Ray is large, and a cluster takes ten seconds to start.
"""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is an environment of its own: make ray")

import torch
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

import aneuron.ray
from aneuron import AsyncDataParallel, CpuBackend, DeadlineExceeded, QueueFull, Rows, ShapeError, SimulatedBackend
from aneuron.web.starlette import get, install

ROOT = pathlib.Path(__file__).parents[1]
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
    yield
    with suppress(RuntimeError):  # of one loop: a handle wants the loop that it was used on, which has gone
        serve.shutdown()
    ray.shutdown()


def run(deployment, *args, name="app", **kwargs):
    return serve.run(deployment.bind(*args, **kwargs), name=name, route_prefix=f"/{name}")


def http(path, body=None, headers=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:8000{path}", data, {"Content-Type": "application/json", **(headers or {})}, method=method
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


async def load(net, until, callers=16, wrong=None):
    """Call until an event; the answers' factors, by how often, and the errors."""
    factors, errors, pids = {}, [], set()

    async def one(number):
        while not until.is_set():
            try:
                y = await net(row(number + 1.0))
            except Exception as error:
                errors.append(error)
            else:
                factor = y[0, 0].item() / (number + 1.0)
                factors[factor] = factors.get(factor, 0) + 1
                pids.add(int(y[0, 1]))

    await asyncio.gather(*(one(number) for number in range(callers)))
    return factors, errors, pids


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
    status, _, body = http("/app")
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
    until = asyncio.Event()
    under_load = asyncio.create_task(load(aneuron.ray.view(handle), until))
    plain = asyncio.create_task(load(handle.remote, until, callers=4))
    await asyncio.sleep(1)
    victim = int((await handle.remote(row(1.0)))[0, 1])
    os.kill(victim, signal.SIGKILL)
    await asyncio.sleep(4)
    until.set()
    factors, errors, pids = await under_load
    assert set(factors) == {2.0}
    assert errors == []
    assert len(pids) >= 2
    factors, errors, pids = await plain
    assert set(factors) == {2.0}
    assert len(errors) <= 4, errors  # those that it had


rolling = aneuron.ray.deployment(make).bind()


async def deploy(config):
    """As `serve deploy` does it: `serve.run` gives each deployment a new version, and so replaces all replicas."""
    deployments = [{"name": "make", "num_replicas": 2, "user_config": config}]
    app = {"name": "rolling", "route_prefix": "/rolling", "import_path": "test_ray_serve:rolling"}
    schema = ServeDeploySchema.model_validate({"applications": [app | {"deployments": deployments}]})
    await asyncio.to_thread(lambda: _get_global_client().deploy_apps(schema))


async def test_another_user_config_swaps_the_models_and_loses_no_call():
    serve.start()
    await deploy({"factor": 3.0})
    while True:
        await asyncio.sleep(0.5)
        app = serve.status().applications.get("rolling")
        if app is not None and app.status == "RUNNING":
            break
        assert app is None or app.status != "DEPLOY_FAILED", app
    handle = serve.get_app_handle("rolling")
    until = asyncio.Event()
    under_load = asyncio.create_task(load(aneuron.ray.view(handle), until))
    await asyncio.sleep(2)
    await deploy({"factor": 5.0})
    await asyncio.sleep(12)
    y = [(await handle.remote(row(1.0)))[0, 0].item() for _ in range(8)]
    until.set()
    factors, errors, pids = await under_load
    assert errors == []
    assert set(factors) == {3.0, 5.0}
    assert y == [5.0] * 8
    assert len(pids) == 2  # the same processes


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
    run(aneuron.ray.deployment(make, ingress=web), max_pending=8, service_time=0.3)
    status, _, body = http("/app/predict", [3.0])
    assert (status, json.loads(body)[0]) == (200, 6.0)
    assert http("/app/predict", [])[0] == 422
    assert http("/app/readyz")[0] == 200
    status, _, body = http("/app/predict", [3.0], {"X-Request-Timeout-Ms": "50"})
    assert (status, json.loads(body)["error"]) == (504, "DeadlineExceeded")
    answers = flood("/app/predict")
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
    serve.run(Front.bind(pressed.bind(max_pending=8, service_time=0.3)), name="app", route_prefix="/app")
    assert http("/app/view?timeout=0", [3.0])[0] == 504
    for path in ("/app/view", "/app/plain"):
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
        run(aneuron.ray.deployment(factory, name="Broken", max_constructor_retry_count=1), name="broken")
    said = serve.status().applications["broken"].deployments["Broken"].message
    assert "there-is-no-such-file.pt" in said or "division by zero" in said
    serve.delete("broken")


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
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if int((await net.options(timeout=5.0)(row(1.0)))[0, 1]) != first:
                break
        except aneuron.AneuronError:
            await asyncio.sleep(0.1)
    else:
        pytest.fail("it was not replaced")


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
    until = asyncio.Event()
    under_load = asyncio.create_task(load(aneuron.ray.view(handle), until, callers=64))
    for _ in range(300):
        await asyncio.sleep(0.1)
        replicas = serve.status().applications["app"].deployments["make"].replica_states
        if replicas.get("RUNNING", 0) == 2:
            break
    until.set()
    _, errors, _ = await under_load
    assert errors == []
    assert replicas.get("RUNNING", 0) == 2


async def test_what_was_accepted_is_answered_at_the_end(tmp_path):
    handle = run(aneuron.ray.deployment(make), service_time=0.5)
    net = aneuron.ray.view(handle)
    await net(row(1.0))
    calls = [asyncio.create_task(net(row(1.0))) for _ in range(24)]
    await asyncio.sleep(0.5)
    await asyncio.to_thread(serve.delete, "app")
    assert [y[0, 0].item() for y in await asyncio.gather(*calls)] == [2.0] * 24


async def test_what_serve_refuses_itself_is_queue_full():
    handle = run(aneuron.ray.deployment(make, max_ongoing_requests=1, max_queued_requests=1), service_time=0.3)
    net = aneuron.ray.view(handle)
    answers = await asyncio.gather(*(net(row(1.0)) for _ in range(12)), return_exceptions=True)
    refused = [each for each in answers if isinstance(each, Exception)]
    assert refused
    assert {type(each) for each in refused} == {QueueFull}
    assert all(each.retry_after == 1.0 for each in refused)


def test_the_example_runs():
    serve.delete("app")
    path = ROOT / "examples" / "ray_service.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    environment.pop("RAY_ADDRESS")
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "query 3: documents" in done.stdout
