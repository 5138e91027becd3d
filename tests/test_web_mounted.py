"""Routes of mounted applications: the same table of errors, models and deadlines, for requests and websockets."""

import asyncio
import json
import warnings
from typing import Annotated

import httpx
import pytest
import torch
from fastapi import APIRouter, Depends, FastAPI
from puppets import row, scenario
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Host, Mount, Route
from starlette.websockets import WebSocket

import aneuron
from aneuron import AsyncDataParallel
from aneuron.testing import PuppetBackend, settle
from aneuron.web.problems import TABLE, problem_of
from aneuron.web.starlette import get, install
from aneuron.web.views import RequestView

Net = Annotated[RequestView, Depends(get("net"))]


def puppet(**settings):
    backend = PuppetBackend(cores=1)
    return AsyncDataParallel(torch.neg, batch_size=1, backend=backend, **settings), backend


class Wrapper:
    """Somebody's middleware around a whole application, which nobody can look into."""

    def __init__(self, app):
        self._inner = app

    async def __call__(self, scope, receive, send):
        await self._inner(scope, receive, send)


def below(app, error=None, how="mount"):
    """An application below another, and the path that it has there."""
    inner = FastAPI()

    @inner.get("/")
    async def predict(net: Net):
        if error is not None:
            raise error
        return (await net(row(1))).tolist()

    @inner.websocket("/talk")
    async def talk(websocket: WebSocket, net: Net):
        await websocket.accept()
        if error is not None:
            raise error
        await websocket.send_json((await net(row(1))).tolist())

    if how == "mount":
        app.mount("/v1", inner)
    elif how == "twice":
        middle = Starlette(routes=[Mount("/v1", app=inner)])
        app.mount("/deep", middle)
        return "/deep/v1"
    elif how == "middleware":
        app.router.routes.append(Mount("/v1", app=inner, middleware=[Middleware(Wrapper)]))
    elif how == "wrapped":
        app.mount("/v1", Wrapper(inner))
    elif how == "host":
        app.router.routes.append(Host("test", app=Starlette(routes=[Mount("/v1", app=inner)])))
    elif how == "router":
        router = APIRouter()
        router.mount("/v1", inner)
        app.include_router(router)
    return "/v1"


HOWS = ["mount", "twice", "middleware", "wrapped", "host", "router"]


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("error", TABLE)
async def test_errors_of_ours_are_answered_by_the_table(how, error):
    app = FastAPI()
    install(app, net=puppet()[0])
    path = below(app, error("why"), how)
    async with client_of(app) as client:
        answer = await client.get(f"{path}/")
    said = problem_of(error("why"))
    assert (answer.status_code, answer.content) == (said.status, said.body)
    assert {name.title(): value for name, value in answer.headers.items()}.items() >= said.headers.items()


async def test_one_without_get_has_the_table_too():
    async def fail(request):
        raise aneuron.QueueFull("full", 3.0)

    app = Starlette(routes=[Mount("/v1", app=Starlette(routes=[Route("/", fail)]))])
    install(app)
    async with client_of(app) as client:
        answer = await client.get("/v1/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


async def test_what_is_the_application_s_own_stays():
    async def own(request, error):
        return JSONResponse("mine", 418)

    app = FastAPI()
    install(app, net=puppet()[0])
    path = below(app, aneuron.QueueFull("full"))
    app.routes[-1].app.add_exception_handler(aneuron.AneuronError, own)
    async with client_of(app) as client:
        assert (await client.get(f"{path}/")).status_code == 418


@pytest.mark.parametrize("how", ["mount", "twice", "host"])
async def test_other_exceptions_say_nothing(how):
    app = FastAPI()
    install(app, net=puppet()[0])
    path = below(app, ValueError("a secret"), how)
    async with client_of(app) as client:
        answer = await client.get(f"{path}/")
    assert (answer.status_code, answer.json()) == (500, json.loads(problem_of(ValueError("a secret")).body))


@pytest.mark.parametrize("how", HOWS)
@scenario
async def test_models_and_deadlines_reach_down(how):
    model, backend = puppet()
    app = FastAPI()
    install(app, net=model, max_timeout=3.0)
    path = below(app, how=how)
    async with model, client_of(app) as client:
        answer = await client.get(f"{path}/")
        assert (answer.status_code, answer.json()["error"]) == (504, "DeadlineExceeded")
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        backend[0].release()
        await settle()
        asking = asyncio.create_task(client.get(f"{path}/"))
        await settle(50)
        backend[0].release()
        assert (await asking).json() == [[-1.0, -1.0]]


async def talked(app, path):
    """What a websocket is sent, until the end."""
    sent, received = [], asyncio.Queue()
    received.put_nowait({"type": "websocket.connect"})
    scope = {
        "type": "websocket", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": [(b"host", b"test")], "subprotocols": [], "scheme": "ws", "server": ("test", 80),
        "client": ("test", 1),
    }  # fmt: skip

    async def send(message):
        sent.append(message)

    await app(scope, received.get, send)
    return sent


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("error", "code"), [(aneuron.QueueFull, 1013), (aneuron.ShapeError, 1011)])
async def test_websockets_are_closed_with_a_code(how, error, code):
    app = FastAPI()
    install(app, net=puppet()[0])
    path = below(app, error("why"), how)
    sent = await talked(app, f"{path}/talk")
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    assert sent[1]["code"] == code


@pytest.mark.parametrize("how", HOWS)
@scenario
async def test_calls_of_websockets_have_a_bound(how):
    model, backend = puppet()
    app = FastAPI()
    install(app, net=model, max_timeout=3.0)
    path = below(app, how=how)
    async with model:
        sent = await talked(app, f"{path}/talk")
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        assert (sent[-1]["type"], sent[-1]["code"]) == ("websocket.close", 1011)
        backend[0].release()
        await settle()


def test_a_websocket_of_a_mounted_application_answers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient
    app = FastAPI()
    model = AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(cores=1))
    app.router.lifespan_context = aneuron.web.starlette.lifespan(net=model)
    install(app, net=model)
    path = below(app)
    with TestClient(app) as client, client.websocket_connect(f"{path}/talk") as socket:
        assert socket.receive_json() == [[-1.0, -1.0]]
