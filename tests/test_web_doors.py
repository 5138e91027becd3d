"""What the front doors refuse: typos, values, names and paths that cannot be meant; models that nothing starts."""

import logging
from contextlib import asynccontextmanager

import httpx
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fastapi import APIRouter, FastAPI
from puppets import scenario
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Host, Mount, Route, Router

import aneuron.web.aiohttp
from aneuron import AsyncDataParallel
from aneuron.testing import PuppetBackend
from aneuron.web import console
from aneuron.web.metrics import Collector
from aneuron.web.starlette import deadline_middleware, install, lifespan
from aneuron.web.tracing import instrument

NAN = float("nan")


def puppet():
    return AsyncDataParallel(torch.neg, batch_size=1, backend=PuppetBackend(cores=1))


def into_fastapi(**given):
    return install(FastAPI(), **given)


def into_aiohttp(**given):
    return aneuron.web.aiohttp.setup(web.Application(), **given)


DOORS = {
    "install": into_fastapi,
    "setup": into_aiohttp,
    "lifespan": lifespan,
    "Collector": Collector,
    "instrument": instrument,
    "console.app": console.app,
    "console.routes": lambda **given: console.routes("/console", **given),
}
APPLICATIONS = [into_fastapi, into_aiohttp]


@pytest.mark.parametrize(
    ("door", "typo", "meant"),
    [
        ("install", "max_timout", "max_timeout"),
        ("install", "sheds", "shed"),
        ("setup", "drain_timout", "drain_timeout"),
        ("setup", "max_timout", "max_timeout"),
        ("lifespan", "drain_timout", "drain_timeout"),
        ("lifespan", "freze", "freeze"),
    ],
)
def test_a_typo_is_no_model(door, typo, meant):
    with pytest.raises(TypeError, match=rf"{door}\({typo}=3.0\): there is no such option; do you mean {meant}=\?"):
        DOORS[door](net=puppet(), **{typo: 3.0})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("value", [3, None, torch.neg, AsyncDataParallel])
def test_what_is_no_model_is_refused(door, value):
    with pytest.raises(TypeError, match=r"foo=.*: expected an aneuron.AsyncDataParallel, under the name"):
        DOORS[door](net=puppet(), foo=value)


def test_an_option_of_another_door_is_named_as_such():
    with pytest.raises(TypeError, match=r"lifespan\(max_timeout=3.0\): .*lifespan has no such option; it has drain_"):
        lifespan(net=puppet(), max_timeout=3.0)
    with pytest.raises(ValueError, match=r"lifespan\(shed=...\): that is the name of an option"):
        lifespan(shed=puppet())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["", " ", "a\nb", 'a"b', "a\\b"])
def test_a_name_can_be_shown(door, name):
    with pytest.raises(ValueError, match="a model's name has printable characters"):
        DOORS[door](**{name: puppet()})


@pytest.mark.parametrize("door", DOORS)
def test_a_model_has_one_name(door):
    model = puppet()
    with pytest.raises(ValueError, match=r"\(net=..., other=...\): they are one and the same model"):
        DOORS[door](net=model, other=model)


@pytest.mark.parametrize("door", [*APPLICATIONS, lambda max_timeout, net: deadline_middleware(max_timeout)])
@pytest.mark.parametrize("value", [-1, 0, 0.0, NAN, float("inf"), True, False, "3", "3s", (3,), 10**400])
def test_a_time_is_a_number_of_seconds(door, value):
    with pytest.raises(ValueError, match=r"max_(timeout|seconds)=.*seconds"):
        door(max_timeout=value, net=puppet())


@pytest.mark.parametrize("door", [into_aiohttp, lifespan])
@pytest.mark.parametrize("value", [-1, NAN, float("inf"), True, "3"])
def test_a_drain_takes_seconds(door, value):
    with pytest.raises(ValueError, match=r"drain_timeout=.*: expected seconds"):
        door(drain_timeout=value, net=puppet())


@pytest.mark.parametrize("value", [-1, 0, 1.5, True, "1M", NAN])
def test_a_body_has_bytes(value):
    with pytest.raises(ValueError, match=r"max_body=.*: expected an int of bytes"):
        into_fastapi(max_body=value, net=puppet())


@pytest.mark.parametrize(
    ("door", "name"),
    [(into_fastapi, "server_timing"), (into_aiohttp, "server_timing"), (into_aiohttp, "freeze"), (lifespan, "freeze")],
)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_flag_is_true_or_false(door, name, value):
    with pytest.raises(TypeError, match=f"{name}=.*: expected True or False"):
        door(net=puppet(), **{name: value})


@pytest.mark.parametrize("door", APPLICATIONS)
@pytest.mark.parametrize(
    ("shed", "error", "says"),
    [
        ({"predict": "net"}, ValueError, "shed={'predict': ...}: a path begins with a slash"),
        ({3: "net"}, ValueError, "shed={3: ...}"),
        ({"/rows/{id}": "net"}, ValueError, "without any parameters"),
        ({"/predict?a=1": "net"}, ValueError, "without any parameters"),
        ({"/predict": "nett"}, LookupError, "no model 'nett' is installed"),
        ("/predict", TypeError, "expected paths and the names of models"),
    ],
)
def test_what_is_shed_is_a_path_for_a_model(door, shed, error, says):
    with pytest.raises(error) as caught:
        door(shed=shed, net=puppet())
    assert says in str(caught.value)


def test_an_application_comes_first():
    with pytest.raises(TypeError, match="expected a Starlette or FastAPI application"):
        install(puppet())
    with pytest.raises(TypeError, match=r"expected an aiohttp.web.Application"):
        aneuron.web.aiohttp.setup(FastAPI())
    with pytest.raises(TypeError, match=r"expected the application's own lifespan, or models by name: lifespan\(net"):
        lifespan(puppet())


def test_models_are_installed_once():
    app, other = FastAPI(), web.Application()
    install(app, net=puppet())
    with pytest.raises(RuntimeError, match="in this application already; name all of them in one install"):
        install(app, ranker=puppet())
    aneuron.web.aiohttp.setup(other, net=puppet())
    with pytest.raises(RuntimeError, match="in this application already; name all of them in one setup"):
        aneuron.web.aiohttp.setup(other, ranker=puppet())


def test_a_refused_install_leaves_the_application_as_it_was():
    app = FastAPI()
    with pytest.raises(ValueError, match="max_timeout=-1"):
        install(app, net=puppet(), max_timeout=-1)
    assert not app.user_middleware
    install(app, net=puppet())


# Paths that are shed, when the application starts.


async def hello(request):
    return JSONResponse("hello")


def routed(app):
    """An application with a route of every kind, added after the models are."""
    app.router.routes.append(Route("/plain", hello, methods=["GET"]))
    app.router.routes.append(Route("/rows/{id}", hello))
    app.router.routes.append(Mount("/v1", app=Starlette(routes=[Route("/deep", hello)])))
    app.router.routes.append(Mount("/any", app=opaque))
    app.router.routes.append(Host("api.example.org", app=Router([Route("/hosted", hello)])))
    if isinstance(app, FastAPI):
        router = APIRouter(prefix="/inner")
        router.add_api_route("/included", lambda: 1, methods=["POST"])
        app.include_router(router, prefix="/outer")
    return app


async def opaque(scope, receive, send):
    await JSONResponse("opaque")(scope, receive, send)


FOUND = ["/plain", "/rows/3", "/v1/deep", "/any/thing", "/hosted"]
LOST = ["/plian", "/plain/", "/rows", "/v1/shallow", "/v1", "/deep"]


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
@pytest.mark.parametrize("path", [*FOUND, "/outer/inner/included"])
@scenario
async def test_a_path_that_a_route_answers_may_be_shed(kind, path):
    if path.startswith("/outer") and kind is Starlette:
        return
    model = puppet()
    app = kind(lifespan=lifespan(net=model))
    install(app, net=model, shed={path: "net"})
    async with app.router.lifespan_context(routed(app)):
        pass


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
@pytest.mark.parametrize("path", [*LOST, "/outer/included"])
@scenario
async def test_a_path_that_no_route_answers_fails_the_start(kind, path):
    model = puppet()
    app = kind(lifespan=lifespan(net=model))
    install(app, net=model, shed={path: "net"})
    with pytest.raises(LookupError, match=rf"shed=\{{'{path}': ...\}}: no route of the application has that path"):
        async with app.router.lifespan_context(routed(app)):
            pytest.fail("it has started")
    assert not model.ready


async def test_without_a_lifespan_the_first_request_tells():
    app = Starlette(routes=[Route("/plain", hello)])
    install(app, net=puppet(), shed={"/plian": "net"})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(LookupError, match="no route of the application has that path"):
            await client.get("/plain")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/plain", True), ("/rows/3", True), ("/v1/deep", True), ("/hosted", True),
        ("/plian", False), ("/rows", False), ("/v1/shallow", False), ("/deep", False),
    ],
)  # fmt: skip
async def test_aiohttp_knows_its_paths_when_it_starts(path, found):
    app, inner, hosted = web.Application(), web.Application(), web.Application()
    aneuron.web.aiohttp.setup(app, net=AsyncDataParallel(torch.neg), shed={path: "net"})
    app.router.add_get("/plain", hello)
    app.router.add_post("/rows/{id}", hello)
    inner.router.add_post("/deep", hello)
    hosted.router.add_post("/hosted", hello)
    app.add_subapp("/v1", inner)
    app.add_domain("api.example.org", hosted)
    runner = web.AppRunner(app)
    if found:
        await runner.setup()
    else:
        with pytest.raises(LookupError, match=rf"'{path}': ...\}}: no route"):
            await runner.setup()
    await runner.cleanup()


# Models that nothing starts, or that are not the same.


ADVICE = "no lifespan has started it; make the application with lifespan=lifespan(name=model)"


@pytest.mark.parametrize("served_with_lifespan", [True, False])
@scenario
async def test_a_model_that_nothing_started_is_said_once(served_with_lifespan, caplog):
    app = Starlette(routes=[Route("/plain", hello)])
    model = puppet()
    install(app, net=model)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(3):
                await client.get("/plain")
            return await client.get("/readyz"), await client.get("/livez")

    if served_with_lifespan:
        async with app.router.lifespan_context(app):
            ready, live = await ask()
    else:
        ready, live = await ask()
    assert (ready.status_code, live.status_code) == (503, 200)
    assert ready.json() == {"status": "never started", "models": {"net": "never started"}, "detail": ADVICE}
    said = [record for record in caplog.records if record.name == "aneuron.web"]
    assert [record.getMessage() for record in said] == [f"net: {ADVICE}. Until then the first call starts it."]
    assert said[0].levelno == logging.WARNING
    async with model:
        assert (await ask())[0].json() == {"status": "ready", "models": {"net": "ready"}}
    assert (await ask())[0].json() == {"status": "not ready", "models": {"net": "not ready"}}  # it was closed


@scenario
async def test_a_model_that_the_application_starts_itself_is_no_matter(caplog):
    model = puppet()

    @asynccontextmanager
    async def own(app):
        async with model:
            yield

    app = Starlette(lifespan=own)
    install(app, net=model)
    async with app.router.lifespan_context(app):
        assert model.ready
    assert not caplog.records


@scenario
async def test_a_model_has_the_same_name_in_lifespan_and_install():
    model, other = puppet(), puppet()
    app = FastAPI(lifespan=lifespan(encoder=model))
    install(app, net=model)
    with pytest.raises(ValueError, match=r"lifespan\(encoder=...\) is installed as net"):
        async with app.router.lifespan_context(app):
            pytest.fail("it has started")
    app = FastAPI(lifespan=lifespan(net=other))
    install(app, net=model)
    with pytest.raises(ValueError, match=r"lifespan\(net=...\) and install\(net=...\) are two models"):
        async with app.router.lifespan_context(app):
            pytest.fail("it has started")


@scenario
async def test_a_model_of_the_lifespan_alone_is_for_mounted_applications_and_one_of_install_alone_is_said(caplog):
    net, ranker, lonely = puppet(), puppet(), puppet()
    inner = FastAPI()
    install(inner, ranker=ranker)
    app = FastAPI(lifespan=lifespan(net=net, ranker=ranker))
    install(app, net=net, lonely=lonely)
    app.mount("/v1", inner)
    async with app.router.lifespan_context(app):
        assert net.ready
        assert ranker.ready
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["lonely"]


async def test_aiohttp_starts_what_it_is_given_also_below(caplog):
    app, inner = web.Application(), web.Application()
    aneuron.web.aiohttp.setup(inner, net=AsyncDataParallel(torch.neg))
    app.add_subapp("/v1", inner)
    async with TestClient(TestServer(app)) as client:
        assert (await client.get("/v1/readyz")).status == 200
    assert not [record for record in caplog.records if record.name == "aneuron.web"]
