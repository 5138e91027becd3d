"""Models in aiohttp applications, with aiohttp's own test server: real sockets."""

import asyncio
import contextlib
import gc
import logging
import threading

import pytest
import torch
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

from aneuron import AsyncDataParallel, CpuBackend
from aneuron.web.aiohttp import drain, get, setup
from aneuron.web.problems import TABLE, problem_of


class Gated:
    """A model that notes its rows and, while closed, holds them."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.rows = []

    def __call__(self, x):
        self.rows += x[:, 0].tolist()
        assert self.gate.wait(60.0)
        return -x


@pytest.fixture
def gated():
    net = Gated()
    yield net
    net.gate.set()


def model_of(net, **settings):
    return AsyncDataParallel(net, batch_size=1, backend=CpuBackend(cores=1), num_workers=1, **settings)


async def predict(request):
    y = await get(request, "net")(torch.tensor([await request.json()]))
    return web.json_response(y.tolist())


def app_with(model, *routes, **settings):
    app = web.Application()
    setup(app, net=model, **settings)
    app.router.add_post("/predict", predict)
    for path, handler in routes:
        app.router.add_get(path, handler)
    return app


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


# Errors.


@pytest.mark.parametrize("error", [*TABLE, ValueError])
async def test_errors_are_answered_by_the_table(error, caplog):
    async def fail(request):
        raise error("a secret of the device")

    app = web.Application()
    setup(app)
    app.router.add_get("/", fail)
    async with TestClient(TestServer(app)) as client:
        answer = await client.get("/")
        said = problem_of(error("a secret of the device"))
        assert answer.status == said.status
        assert await answer.read() == said.body
        assert answer.headers.items() >= said.headers.items()
    assert ("a secret of the device" in caplog.text) is (said.status == 500)


async def test_the_application_s_own_answers_pass():
    async def conflict(request):
        raise web.HTTPConflict

    app = web.Application()
    setup(app)
    app.router.add_get("/", conflict)
    async with TestClient(TestServer(app)) as client:
        assert (await client.get("/")).status == 409
        assert (await client.get("/nowhere")).status == 404


# Overload.


async def test_what_would_be_refused_is_refused_before_its_body_is_read(gated):
    model = model_of(gated, max_pending=1)
    app = app_with(model, shed={"/predict": "net"})
    async with TestClient(TestServer(app)) as client:
        gated.gate.clear()
        first = asyncio.create_task(client.post("/predict", json=[1.0]))
        await until(lambda: gated.rows)
        second = asyncio.create_task(client.post("/predict", json=[2.0]))
        await until(lambda: model.statistics().waiting_rows)
        answer = await client.post("/predict", data=b"not JSON: it would be a 500")
        assert (answer.status, (await answer.json())["error"]) == (503, "QueueFull")
        assert int(answer.headers["Retry-After"]) >= 1
        gated.gate.set()
        assert [(await each).status for each in (first, second)] == [200, 200]
    with pytest.raises(LookupError, match="no model 'nett' is installed"):
        setup(web.Application(), shed={"/predict": "nett"}, net=model)


# Calls.


async def test_calls_deadlines_timing_and_health(gated):
    model = model_of(gated)
    async with TestClient(TestServer(app_with(model, server_timing=True, max_timeout=60.0))) as client:
        assert (await client.get("/readyz")).status == 200
        answer = await client.post("/predict", json=[1.0])
        assert (answer.status, await answer.json()) == (200, [[-1.0]])
        metrics = [metric.split(";")[0] for metric in answer.headers["Server-Timing"].split(", ")]
        assert metrics == ["queue", "device", "total", "core", "batch", "closed"]

        gated.gate.clear()
        for headers in ({"X-Request-Timeout-Ms": "20"}, {"grpc-timeout": "20m"}):
            answer = await client.post("/predict", json=[2.0], headers=headers)
            assert answer.status == 504
            assert (await answer.json())["error"] == "DeadlineExceeded"
            assert "Server-Timing" not in answer.headers
        gated.gate.set()

        answer = await client.post("/predict", json=[3.0], headers={"grpc-timeout": "soon"})
        assert answer.status == 400
        assert (await answer.json())["detail"].startswith("grpc-timeout: 'soon'; expected")

        drain(client.server.app)
        answer = await client.get("/readyz")
        assert (answer.status, (await answer.json())["status"]) == (503, "draining")
        assert (await client.get("/livez")).status == 200
        assert (await client.post("/predict", json=[4.0])).status == 200
    assert not model.ready


async def test_the_server_bounds_what_the_client_does_not(gated):
    async with TestClient(TestServer(app_with(model_of(gated), max_timeout=0.02))) as client:
        gated.gate.clear()
        assert (await client.post("/predict", json=[1.0])).status == 504
        gated.gate.set()


async def test_models_serve_applications_below(gated):
    inner = web.Application()
    inner.router.add_post("/predict", predict)
    app = app_with(model_of(gated))
    app.add_subapp("/inner", inner)
    async with TestClient(TestServer(app)) as client:
        answer = await client.post("/inner/predict", json=[1.0])
        assert await answer.json() == [[-1.0]]
        assert "Server-Timing" not in answer.headers


async def test_a_model_that_is_not_there_is_an_error_in_the_log(gated, caplog):
    async def wrong(request):
        return get(request, "nett")

    async with TestClient(TestServer(app_with(model_of(gated), ("/wrong", wrong)))) as client:
        answer = await client.get("/wrong")
        assert answer.status == 500
        assert "nett" not in await answer.text()
    assert "no model 'nett' is installed in this app: there is 'net'" in caplog.text


# Life and death.


async def test_readiness_ends_and_calls_are_finished_when_the_server_stops(gated):
    model = model_of(gated)
    app = app_with(model)
    states = []

    async def report(app):
        states.append((await probe(app), model.ready))

    async def probe(app):
        route = next(route for route in app.router.routes() if route.resource.canonical == "/readyz")
        request = type("Request", (), {"config_dict": app})
        return (await route.handler(request)).status

    app.on_shutdown.append(report)  # the server waits for its handlers after that
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    async with ClientSession() as session:

        async def ask(value):
            async with session.post(f"http://127.0.0.1:{port}/predict", json=[value]) as answer:
                return answer.status, await answer.json()

        gated.gate.clear()
        asking = [asyncio.create_task(ask(float(n))) for n in range(20)]
        await until(lambda: model.statistics().calls.accepted == 20)
        stopping = asyncio.create_task(runner.cleanup())
        await until(lambda: states)
        gated.gate.set()
        assert await asyncio.gather(*asking) == [(200, [[-float(n)]]) for n in range(20)]
        await stopping
    assert states == [(503, True)]
    assert not model.ready


async def test_a_model_that_fails_to_start_fails_the_start():
    class Broken(CpuBackend):
        def load(self, model, core_id, batch_size):
            raise OSError("no such file")

    good, bad = model_of(torch.neg), AsyncDataParallel(torch.neg, backend=Broken(cores=1))
    app = web.Application()
    setup(app, good=good, bad=bad)
    runner = web.AppRunner(app)
    with pytest.raises(OSError, match="no such file"):
        await runner.setup()
    assert not good.ready
    await runner.cleanup()


@pytest.mark.usefixtures("freezing")
@pytest.mark.parametrize("freeze", [True, False])
async def test_the_garbage_collector_is_spared_while_it_serves(gated, freeze):
    async with TestClient(TestServer(app_with(model_of(gated), freeze=freeze))):
        assert (gc.get_freeze_count() > 0) is freeze
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("told", ["runner", "application"])
async def test_a_client_that_leaves_takes_its_call_along(gated, told, caplog):
    model = model_of(gated)
    arguments = {"handler_args": {"handler_cancellation": True}} if told == "application" else {}
    app = web.Application(**arguments)
    setup(app, net=model)
    app.router.add_post("/predict", predict)
    runner = web.AppRunner(app, **({"handler_cancellation": True} if told == "runner" else {}))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    gated.gate.clear()
    async with ClientSession() as session:
        asking = [
            asyncio.create_task(session.post(f"http://127.0.0.1:{port}/predict", json=[float(n)])) for n in range(9)
        ]
        await until(lambda: model.statistics().calls.accepted == 9 and gated.rows)
        first = int(gated.rows[0])
        for task in asking[:first] + asking[first + 1 :]:
            task.cancel()
        await until(lambda: model.statistics().calls.cancelled == 8)
        gated.gate.set()
        answer = await asking[first]
        assert await answer.json() == [[-float(first)]]
    assert gated.rows == [float(first)]
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*asking)
    await runner.cleanup()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("cancellation", [True, False])
async def test_a_client_that_leaves_while_it_sends_is_no_error(gated, caplog, cancellation):
    model = model_of(gated)
    ends = []

    async def read(request):
        ends.append("reads")
        try:
            return web.json_response(await request.json())
        except BaseException:
            ends.append("ended")
            raise

    app = app_with(model)
    app.router.add_post("/read", read)
    runner = web.AppRunner(app, handler_cancellation=cancellation)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    _, writer = await asyncio.open_connection("127.0.0.1", site._server.sockets[0].getsockname()[1])
    writer.write(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n[1")
    await until(lambda: ends == ["reads"])
    writer.transport.abort()
    await until(lambda: ends == ["reads", "ended"])
    await runner.cleanup()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
