"""Models in Starlette and FastAPI applications, without a server in between."""

import asyncio
import contextlib
import gc
import warnings
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
import httpx
import pytest
import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from puppets import check_sum, row, scenario
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.routing import Mount, Route

import aneuron
from aneuron import AneuronError, AsyncDataParallel, Closed, QueueFull
from aneuron.testing import PuppetBackend, settle
from aneuron.web.problems import TABLE, problem_of
from aneuron.web.starlette import cancel_on_disconnect, deadline_middleware, drain, get, install, lifespan
from aneuron.web.views import RequestView

Net = Annotated[RequestView, Depends(get("net"))]


def puppet(**settings):
    backend = PuppetBackend(cores=1)
    return AsyncDataParallel(torch.neg, batch_size=1, backend=backend, **settings), backend


def client_of(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def app_with(model, **settings):
    app = FastAPI()
    install(app, net=model, **settings)

    @app.post("/predict")
    async def predict(body: list[float], net: Net):
        return (await net(torch.tensor([body]))).tolist()

    return app


# Errors.


@pytest.mark.parametrize("error", [*TABLE, ValueError])
@pytest.mark.parametrize("kind", [Starlette, FastAPI])
async def test_errors_are_answered_by_the_table(kind, error):
    async def fail(request: Request):
        raise error("why")

    app = kind(routes=[Route("/", fail)])
    install(app)
    async with client_of(app) as client:
        answer = await client.get("/")
    said = problem_of(error("why"))
    assert answer.status_code == said.status
    assert answer.content == said.body
    assert {name.title(): value for name, value in answer.headers.items()}.items() >= said.headers.items()


@pytest.mark.parametrize(
    ("error", "logged"), [(aneuron.CoreFailed, True), (aneuron.OutputError, True), (Closed, False)]
)
async def test_faults_of_the_server_are_logged_and_refusals_are_not(error, logged, caplog):
    async def fail(request: Request):
        raise error("the device's own words")

    app = Starlette(routes=[Route("/", fail)])
    install(app)
    async with client_of(app) as client:
        answer = await client.get("/")
    assert "words" not in answer.text
    assert ("the device's own words" in caplog.text) is logged


async def test_a_model_s_own_exception_is_raised_on_for_the_server_to_log():
    async def fail(request: Request):
        raise ValueError("a secret")

    app = Starlette(routes=[Route("/", fail)])
    install(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(ValueError, match="a secret"):
            await client.get("/")


async def test_handlers_of_the_application_s_own_are_left_alone():
    async def own(request, error):
        return JSONResponse({"own": type(error).__name__}, 418)

    async def fail(request: Request):
        raise {"mine": KeyError, "full": QueueFull, "shape": aneuron.ShapeError}[request.path_params["what"]]("why")

    app = Starlette(routes=[Route("/{what}", fail)], exception_handlers={Exception: own, ValueError: own})
    install(app)
    app.add_exception_handler(QueueFull, own)
    async with client_of(app) as client:
        assert (await client.get("/mine")).json() == {"own": "KeyError"}
        assert (await client.get("/full")).json() == {"own": "QueueFull"}
        assert (await client.get("/shape")).status_code == 422  # the nearest handler, though it is a ValueError


@pytest.mark.parametrize(("error", "code"), [(QueueFull, 1013), (Closed, 1013), (aneuron.ShapeError, 1011)])
def test_a_websocket_is_closed_with_a_code(error, code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient, WebSocketDisconnect

    app = FastAPI()
    install(app, net=AsyncDataParallel(torch.neg), max_timeout=1.0)

    @app.websocket("/")
    async def talk(websocket: aneuron.web.starlette.WebSocket, net: Net):
        assert isinstance(net, RequestView)
        await websocket.accept()
        raise error("why")

    with TestClient(app).websocket_connect("/") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert closed.value.code == code


# What a handler is given.


async def test_a_fake_takes_a_model_s_place_in_tests():
    model, _ = puppet()
    app = app_with(model)

    async def fake(x):
        return x + 1

    app.dependency_overrides[get("net")] = lambda: fake
    async with client_of(app) as client:
        assert (await client.post("/predict", json=[1.0])).json() == [[2.0]]
    assert model.statistics().calls.accepted == 0


@scenario
async def test_starlette_asks_without_depends_also_below_a_mount():
    model, backend = puppet()

    async def predict(request):
        net = await get("net")(request)
        return JSONResponse((await net(row(1))).tolist())

    app = Starlette(routes=[Mount("/inner", app=Starlette(routes=[Route("/predict", predict)]))])
    install(app, net=model)
    async with model, client_of(app) as client:
        asking = asyncio.create_task(client.get("/inner/predict"))
        await settle(30)
        backend[0].release()
        assert (await asking).json() == [[-1.0, -1.0]]


async def test_a_model_that_is_not_installed_is_an_error_that_says_so():
    app = Starlette()
    scope = {"type": "http", "app": app, "headers": []}
    with pytest.raises(LookupError, match=r"no model 'net' is installed .*; see install\(\)"):
        await get("net")(HTTPConnection(scope))
    with pytest.raises(RuntimeError, match=r"call aneuron.web.starlette.install\(app, ...\) first"):
        drain(app)


@scenario
async def test_the_document_of_the_api_names_neither_models_nor_health():
    model, _ = puppet()
    async with client_of(app_with(model)) as client:
        document = (await client.get("/openapi.json")).json()
    assert list(document["paths"]) == ["/predict"]
    assert [*document["paths"]["/predict"]["post"]] == ["summary", "operationId", "requestBody", "responses"]


# Deadlines.


@pytest.mark.parametrize(
    ("headers", "most", "status", "seconds"),
    [
        ({"X-Request-Timeout-Ms": "2500"}, None, 504, 2.5),
        ({"grpc-timeout": "3S"}, 10.0, 504, 3.0),
        ({"grpc-timeout": "1H"}, 10.0, 504, 10.0),
        ({}, 10.0, 504, 10.0),
        ({}, None, 200, 100.0),
        ({"X-Request-Timeout-Ms": "soon"}, 10.0, 400, 0.0),
    ],
)
@scenario
async def test_the_time_that_a_client_allows_bounds_the_call(headers, most, status, seconds):
    model, backend = puppet()
    loop = asyncio.get_running_loop()
    async with model, client_of(app_with(model, max_timeout=most)) as client:
        loop.call_later(100.0, lambda: backend[0].executing and backend[0].release())
        answer = await client.post("/predict", json=[1.0], headers=headers)
        assert answer.status_code == status
        assert loop.time() == pytest.approx(seconds)
        if status == 400:
            assert answer.json()["detail"].startswith("X-Request-Timeout-Ms: 'soon'; expected milliseconds")
        elif status == 504:
            assert answer.json()["error"] == "DeadlineExceeded"
            backend[0].release()


@pytest.mark.parametrize(("outer", "inner"), [(2.0, 5.0), (5.0, 2.0), (None, 2.0), (2.0, None)])
@scenario
async def test_of_two_deadlines_the_earlier_holds(outer, inner):
    model, backend = puppet()
    app = app_with(model, max_timeout=inner)
    app.add_middleware(deadline_middleware(outer))
    async with model, client_of(app) as client:
        assert (await client.post("/predict", json=[1.0])).status_code == 504
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)
        backend[0].release()


# Overload.


@scenario
async def test_what_would_be_refused_is_refused_before_its_body_is_read():
    model, backend = puppet(max_pending=1)
    app = app_with(model, shed={"/predict": "net"})
    received, sent = [], []
    scope = {"type": "http", "method": "POST", "path": "/api/predict", "root_path": "/api", "headers": []}

    async def receive():
        received.append(scope)
        return {"type": "http.request", "body": b"[1.0]", "more_body": False}

    async def send(message):
        sent.append(message)

    async with model, client_of(app) as client:
        asking = [asyncio.create_task(client.post("/predict", json=[1.0])) for _ in range(2)]
        await settle(50)
        await app(scope, receive, send)
        assert (sent[0]["status"], received) == (503, [])
        assert (b"retry-after", b"1") in sent[0]["headers"]
        answer = await client.post("/predict", json=[1.0])
        assert (answer.status_code, answer.json()["error"]) == (503, "QueueFull")
        assert model.statistics().calls.refused == 2
        assert (await client.get("/docs")).status_code == 200
        assert (await client.options("/predict")).status_code == 405  # as ever: it needs no room
        for _ in asking:
            backend[0].release()
            await settle(20)
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]


def test_a_path_is_shed_for_a_model_that_is_installed():
    with pytest.raises(LookupError, match=r"no model 'nett' is installed .* there is 'net'"):
        install(FastAPI(), shed={"/predict": "nett"}, net=puppet()[0])


# How an answer was made.


@scenario
async def test_answers_tell_how_they_were_made_if_asked_to():
    model, backend = puppet()
    quiet = app_with(model)
    async with model, client_of(app_with(model, server_timing=True)) as client, client_of(quiet) as other:
        asking = [asyncio.create_task(one.post("/predict", json=[1.0])) for one in (client, other)]
        for _ in asking:
            await settle(50)
            backend[0].release()
        timed, plain = await asyncio.gather(*asking)
        refused = await client.post("/predict", json="x")
    assert plain.headers.get("server-timing") is None
    assert (refused.status_code, refused.headers.get("server-timing")) == (422, None)  # it called nothing
    metrics = [metric.split(";")[0] for metric in timed.headers["server-timing"].split(", ")]
    assert metrics == ["queue", "device", "total", "core", "batch", "closed"]
    assert 'core;desc="0", batch;desc="1+0 rows", closed;desc="' in timed.headers["server-timing"]


# Health.


@scenario
async def test_health_has_routes_that_no_other_hides():
    model, _ = puppet()

    async def everything(request):
        return JSONResponse({}, 418)

    app = Starlette(routes=[Route("/{path:path}", everything)])
    install(app, net=model)
    async with client_of(app) as client:
        assert (await client.get("/readyz")).status_code == 503
        async with model:
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (200, "ready")
            assert answer.headers["cache-control"] == "no-store"
            assert (await client.head("/livez")).status_code == 200
            drain(app)
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (503, "draining")
            assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/else")).status_code == 418
        assert (await client.post("/livez")).status_code == 405  # the application's answer, which takes no POST
    transport = httpx.ASGITransport(app, root_path="/")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/livez")).status_code == 200
    async with client_of(Starlette(routes=[Mount("/inner", app=app)])) as client:
        assert (await client.get("/inner/livez")).status_code == 200
        assert (await client.get("/livez")).status_code == 404


# Lifespan.


@scenario
async def test_the_application_s_lifespan_runs_inside_and_its_state_is_passed_on():
    model, _ = puppet()
    seen = []

    @asynccontextmanager
    async def own(app):
        seen.append(("start", app, model.ready))
        yield {"index": 42}
        seen.append(("end", app, model.ready))

    app = FastAPI(lifespan=lifespan(own, net=model))
    async with app.router.lifespan_context(app) as state:
        assert state == {"index": 42}
        assert model.ready
    assert seen == [("start", app, True), ("end", app, True)]
    assert not model.ready


@scenario
async def test_an_application_that_fails_to_start_closes_its_models():
    model, _ = puppet()

    @asynccontextmanager
    async def own(app):
        raise OSError("no index")
        yield

    manager = lifespan(own, net=model)(None)
    with pytest.raises(OSError, match="no index"):
        async with manager:
            pytest.fail("it has not started")
    assert not model.ready


@scenario
async def test_an_application_can_be_started_again():
    model, _ = puppet()
    manager = lifespan(net=model)
    for _ in range(2):
        async with manager(None) as state:
            assert state is None
            assert model.ready
        assert not model.ready


# Clients that leave.


class Wire:
    """The server's side of one request, by hand."""

    def __init__(self, app, *chunks, path="/"):
        self.messages = asyncio.Queue()
        self.sent = []
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80),
            "scheme": "http", "state": {},
        }  # fmt: skip
        for chunk in chunks:
            self.chunk(chunk, more=chunk is not chunks[-1])
        self.task = asyncio.create_task(app(self.scope, self.messages.get, self.send))

    def chunk(self, body, more):
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self):
        self.messages.put_nowait({"type": "http.disconnect"})

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None


def bridged(handler, middleware=None):
    app = Starlette(routes=[Route("/", handler, methods=["POST"])])
    if middleware is not None:
        app.add_middleware(BaseHTTPMiddleware, dispatch=middleware)
    install(app)
    return app


async def settled():
    """No task but the test's is left."""
    await settle(20)
    return asyncio.all_tasks() == {asyncio.current_task()}


async def passing(request, call_next):
    return await call_next(request)


async def reading(request, call_next):
    await request.body()
    return await call_next(request)


MIDDLEWARE = [None, passing, reading]


@pytest.mark.parametrize("middleware", MIDDLEWARE)
@scenario
async def test_the_bridge_keeps_the_body(middleware):
    model, backend = puppet()

    async def handler(request):
        y = await cancel_on_disconnect(request, model(row(1)))
        return JSONResponse([y.tolist(), await request.json(), (await request.body()).decode()])

    async with model:
        wire = Wire(bridged(handler, middleware), b'{"a"', b": 1}")
        await settle(50)
        backend[0].release()
        await wire.task
        assert wire.status == 200
        assert wire.sent[1]["body"] == b'[[[-1.0,-1.0]],{"a":1},"{\\"a\\": 1}"]'
        assert await settled()


@pytest.mark.parametrize("middleware", MIDDLEWARE)
@pytest.mark.parametrize("read", [True, False])
@scenario
async def test_the_bridge_cancels_what_its_client_does_not_wait_for(middleware, read):
    model, backend = puppet(num_workers=1)
    errors = []

    async def handler(request):
        if read:
            await request.json()
        try:
            return JSONResponse((await cancel_on_disconnect(request, model(row(2)))).tolist())
        except ClientDisconnect as error:
            errors.append(error)
            raise

    async with model:
        first = asyncio.ensure_future(model(row(1)))
        await settle()
        wire = Wire(bridged(handler, middleware), b"[1]")
        await settle(50)
        assert model.statistics().waiting_rows == 1
        wire.leave()
        await settle(50)
        assert model.statistics().waiting_rows == 0
        assert model.statistics().calls.cancelled == 1
        backend[0].release()
        await first
        await wire.task
        assert len(errors) == 1
        assert wire.status == 499
        assert len(backend[0].executed) == 1
        assert await settled()
        check_sum(model)


@scenario
async def test_ten_thousand_departures_leave_nothing_behind():
    model, backend = puppet(num_workers=1)

    async def handler(request):
        return JSONResponse((await cancel_on_disconnect(request, model(row(2)))).tolist())

    async def wave():
        wires = [Wire(app, b"[1]") for _ in range(1000)]
        await settle(30)
        assert model.statistics().calls.waiting + model.statistics().calls.running == 1001
        for wire in wires:
            wire.leave()
        await asyncio.gather(*(wire.task for wire in wires))

    app = bridged(handler)
    async with model:
        first = asyncio.ensure_future(model(row(1)))  # the core is taken, all others wait
        await settle()
        await wave()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(9):
            await wave()
        gc.collect()
        assert len(gc.get_objects()) - before < 1000
        assert model.statistics().calls.cancelled == 10_000
        assert asyncio.all_tasks() == {asyncio.current_task(), first}
        backend[0].release()
        await first
        assert len(backend[0].executed) == 1


@scenario
async def test_a_client_that_leaves_while_it_sends_never_calls():
    model, _ = puppet()

    async def handler(request):
        return JSONResponse((await cancel_on_disconnect(request, model(row(2)))).tolist())

    async with model:
        wire = Wire(bridged(handler))
        wire.chunk(b"[1", more=True)
        await settle()
        wire.leave()
        await wire.task
        assert wire.status == 499
        assert model.statistics().calls.accepted == 0
        assert await settled()


@pytest.mark.parametrize("how", ["stream", "form"])
@scenario
async def test_a_body_that_was_read_otherwise_is_no_hindrance(how):
    model, backend = puppet()

    async def handler(request):
        if how == "stream":
            body = b"".join([chunk async for chunk in request.stream()])
        else:
            body = dict(await request.form())["a"].encode()
        y = await cancel_on_disconnect(request, model(row(2)))
        return JSONResponse([y.tolist(), body.decode()])

    async with model:
        wires = [Wire(bridged(handler)) for _ in range(2)]
        for wire in wires:
            wire.scope["headers"] = [(b"content-type", b"application/x-www-form-urlencoded")]
            wire.chunk(b"a=", more=True)
            wire.chunk(b"b", more=False)
        await settle(50)
        assert model.statistics().calls.accepted == 2
        wires[1].leave()
        await settle(50)
        backend[0].release()
        await asyncio.gather(*(wire.task for wire in wires))
        assert [wire.status for wire in wires] == [200, 499]
        assert wires[0].sent[1]["body"].endswith(b'"a=b"]' if how == "stream" else b'"b"]')
        assert await settled()


@scenario
async def test_errors_and_results_pass_the_bridge_as_they_are():
    async def raising():
        raise QueueFull("full", 7.0)

    async def handler(request):
        return JSONResponse(await cancel_on_disconnect(request, raising()))

    wire = Wire(bridged(handler), b"")
    await wire.task
    assert wire.status == 503
    assert dict(wire.sent[0]["headers"])[b"retry-after"] == b"7"
    assert await settled()


@scenario
async def test_a_handler_that_is_cancelled_takes_its_call_and_its_watch_along():
    model, backend = puppet()

    async def handler(request):
        return JSONResponse((await cancel_on_disconnect(request, model(row(2)))).tolist())

    async with model:
        wire = Wire(bridged(handler), b"")
        await settle(50)
        wire.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await wire.task
        assert wire.task.cancelled()
        assert model.statistics().calls.cancelled == 1
        assert await settled()
        backend[0].release()


@scenario
async def test_a_scope_around_the_bridge_cancels_through_it():
    model, backend = puppet()

    async def handler(request):
        with anyio.move_on_after(5.0):
            await cancel_on_disconnect(request, model(row(2)))
        return JSONResponse("late")

    async with model:
        wire = Wire(bridged(handler), b"")
        await wire.task
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)
        assert wire.sent[1]["body"] == b'"late"'
        assert model.statistics().calls.cancelled == 1
        backend[0].release()
        assert await settled()


@scenario
async def test_a_result_that_is_there_is_not_lost_to_a_late_departure():
    done = asyncio.get_running_loop().create_future()

    async def handler(request):
        return JSONResponse(await cancel_on_disconnect(request, done))

    wire = Wire(bridged(handler), b"")
    await settle(50)
    done.set_result(5)
    wire.leave()
    await wire.task
    assert (wire.status, wire.sent[1]["body"]) == (200, b"5")
    assert await settled()


@scenario
async def test_the_handler_goes_on_after_a_departure_that_it_handles():
    async def handler(request):
        with contextlib.suppress(ClientDisconnect):
            await cancel_on_disconnect(request, asyncio.sleep(60))
        await asyncio.sleep(1)  # not cancelled: nothing of the scope is left
        assert not asyncio.current_task().cancelling()
        return JSONResponse("cleaned up")

    wire = Wire(bridged(handler), b"")
    await settle(50)
    wire.leave()
    await wire.task
    assert wire.sent[1]["body"] == b'"cleaned up"'


# Bodies.


@scenario
async def test_a_body_may_have_so_many_bytes():
    model, _ = puppet()
    app = app_with(model, max_body=100)
    async with client_of(app) as client:
        for content, status in [(b"{%s}" % (b" " * 98), 422), (b"{%s}" % (b" " * 99), 413)]:
            answer = await client.post("/predict", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == status
            assert model.statistics().calls.accepted == 0


def test_every_error_has_a_handler_by_its_root():
    app = Starlette()
    install(app)
    assert AneuronError in app.exception_handlers
