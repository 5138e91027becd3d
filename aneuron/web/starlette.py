"""Models in a Starlette or FastAPI application.

Lives here: ASGI. Must not be here: what another framework needs as well (the files beside this one).

    app = FastAPI(lifespan=lifespan(net=model))
    install(app, net=model)

    @app.post("/predict")
    async def predict(request: Request, row: list[float], net: Annotated[RequestView, Depends(get("net"))]):
        y = await cancel_on_disconnect(request, net(torch.tensor([row])))
        return y[0].tolist()
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Host, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from aneuron import AneuronError, AsyncDataParallel
from aneuron.web.checks import (
    check_body,
    check_flags,
    check_models,
    check_same,
    drain_time,
    guarded,
    nowhere,
    time_allowed,
)
from aneuron.web.deadlines import MalformedTimeout, deadline
from aneuron.web.health import Health
from aneuron.web.lifecycle import frozen, serving
from aneuron.web.problems import Problem, log, logger, problem, problem_of
from aneuron.web.views import RequestView, Timings, server_timing, view_of

T = TypeVar("T")
AppLifespan = Callable[[Any], AbstractAsyncContextManager[Any]]

# In the scope of a request, and of those of mounted applications.
_MODELS, _DEADLINE, _TIMINGS, _MOST = "aneuron.models", "aneuron.deadline", "aneuron.timings", "aneuron.most"
_ASKS = (b"x-request-timeout-ms", b"grpc-timeout")


def lifespan(
    app_lifespan: AppLifespan | None = None,
    /,
    *,
    drain_timeout: float | None = 25.0,
    freeze: bool = True,
    **models: AsyncDataParallel,
) -> AppLifespan:
    """A lifespan that starts the models, and drains them at the end: `FastAPI(lifespan=lifespan(net=model))`.

    app_lifespan: the application's own. It runs inside: it finds the models started, and may use them until its end.
        Its state is passed on.
    drain_timeout: seconds that the models may take to finish what they have accepted; then calls that still wait get
        `Closed`. None: no bound. Servers call the end of the lifespan when the requests are answered, or given up.
    freeze: whether `gc.freeze()` is called after the start (undone at the end): the garbage collector need not walk
        the modules that were imported and the models again and again, which makes the slowest answers of a busy
        process faster. Choose False if the application frees much of what it has at the start.

    A model that fails to start fails the start of the application; those started before it are closed. Raises at once
    TypeError and ValueError for what is no model and for options that cannot be meant, and when the application starts
    ValueError where the same model has another name in `install`, or the same name another model.
    """
    check_models(lifespan, models)
    check_flags(freeze=freeze)
    drain_timeout = drain_time(drain_timeout)
    if app_lifespan is not None and (isinstance(app_lifespan, AsyncDataParallel) or not callable(app_lifespan)):
        raise TypeError(
            f"lifespan({app_lifespan!r:.80}): expected the application's own lifespan, or models by name: "
            "lifespan(net=model)"
        )

    @asynccontextmanager
    async def manager(app: Any) -> AsyncIterator[Any]:
        for each in _applications(app):
            check_same(models, each.state.aneuron.models if _is_installed(each) else {})
        async with serving(models, lambda: drain_timeout):
            if app_lifespan is None:
                with frozen(freeze):
                    yield None
                return
            async with app_lifespan(app) as state:
                with frozen(freeze):
                    yield state

    return manager


def install(
    app: Starlette,
    *,
    server_timing: bool = False,
    max_timeout: float | None = None,
    max_body: int | None = None,
    shed: Mapping[str, str] | None = None,
    **models: AsyncDataParallel,
) -> None:
    """Put models into an application, before it starts: `get(name)`, answers to errors, `/livez`, `/readyz`, deadlines.

    server_timing: whether answers say in a `Server-Timing` header how their calls were run.
    max_timeout: seconds that a request may have for its calls, and each call of a websocket; see
        `deadline_middleware`.
    max_body: bytes that a request's body may have; longer ones get 413. It is the application's own `max_body_size`,
        which None leaves as it is; a route may have another.
    shed: paths, and the name of the model that their requests need: `shed={"/predict": "net"}`. While that model has no
        room for another row (`max_pending`), they get their 503 before the application sees them and before their
        bodies are read, for half the cost: a flood leaves the server time for those that it has accepted. Paths are
        compared as they are, without parameters; `OPTIONS` passes. That some route answers each of them is checked
        when the application starts, since routes may be added until then: `LookupError`.

    Middleware that is added before it sees neither what is shed nor `/livez` and `/readyz`: add it (CORS, say) after.

    Errors of aneuron become problem details (RFC 9457) by the table in `aneuron.web.problems`. Every other exception
    that nobody handles becomes a 500 that says nothing; its text is in the server's log. A handler of `Exception`
    that the application has already is left alone. Mounted applications find the models, the table and the deadlines
    too; servers do not run their lifespans, so that what they need is started by the outermost.

    A model that nothing has started when the application has, is started by its first call; a warning in the log says
    so, as does `/readyz`. Raises at once, also `RuntimeError` for a second `install`: what can be known by then.
    """
    if not isinstance(app, Starlette):
        raise TypeError(f"install({app!r:.80}): expected a Starlette or FastAPI application, then models by name")
    check_models(install, models)
    check_flags(server_timing=server_timing)
    check_body(max_body)
    most, doors = time_allowed("max_timeout", max_timeout), guarded(shed, models)
    if _is_installed(app):
        raise RuntimeError("models are installed in this application already; name all of them in one install()")
    if max_body is not None and not hasattr(app, "max_body_size"):
        raise RuntimeError(f"max_body={max_body} needs Starlette 1.6 or newer, which bounds bodies")
    health = Health(models, "no lifespan has started it; make the application with lifespan=lifespan(name=model)")
    app.add_middleware(_middleware(health, most, doors, server_timing))  # raises if it has started
    app.state.aneuron = health
    if max_body is not None:
        app.max_body_size = max_body
    _answer_by_the_table(app)
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def start(app: Starlette) -> AsyncIterator[Any]:
        async with serve(app) as state:
            _begin(app, health, doors)
            yield state

    app.router.lifespan_context = start


def _answer_by_the_table(app: Starlette) -> None:
    """Handlers for the errors that the application has none for. They take effect until its first request."""
    own = app.exception_handlers
    own.setdefault(AneuronError, _on_error)
    own.setdefault(ClientDisconnect, _on_left)
    if 500 not in own:
        own.setdefault(Exception, _on_fault)


def _begin(app: Starlette, health: Health, shed: Mapping[str, AsyncDataParallel]) -> None:
    """The application has started, or its first request has come: check what could be no earlier."""
    for path in shed:
        if not _has_route(app.routes, {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}):
            raise nowhere(path)
    for each in _applications(app):
        _answer_by_the_table(each)
    if asleep := health.asleep():
        logger.warning("%s: %s. Until then the first call starts it.", ", ".join(asleep), health.advice)
    health.begun = True


def _applications(app: Any) -> Iterator[Starlette]:
    """An application and those that are mounted in it, as far as it is known what is."""
    if isinstance(app, Starlette):
        yield app
    for route in getattr(app, "routes", None) or ():
        inner = getattr(route, "app", None)
        if isinstance(route, (Host, Mount)):
            yield from _applications(getattr(route, "_base_app", inner))  # of Mount: without its own middleware


def _has_route(routes: Sequence[BaseRoute], scope: Scope) -> bool:
    """Whether a path leads anywhere; into what is mounted as far as it says which routes it has."""
    for route in routes:
        match, child = (Match.FULL, scope) if isinstance(route, Host) else route.matches(dict(scope))
        if match is not Match.NONE:
            inner = route.routes if isinstance(route, (Host, Mount)) else None
            if not inner or _has_route(inner, {**scope, **child}):
                return True
    return False


def drain(app: Starlette) -> None:
    """Turn `/readyz` to 503, for good: no new requests, please. Those that come are served as before.

    So does what the routes of `aneuron.web.v2.starlette` say of readiness.
    For a preStop hook, some seconds before SIGTERM: load balancers learn of it while the server still listens. Call it
    from a route of the application's own, or from a signal handler.
    """
    _health(app).draining = True


def is_draining(scope: Scope) -> bool:
    """Whether `drain` was called for the application that a request is for, if there is one."""
    app = scope.get("app")
    return app is not None and _is_installed(app) and _health(app).draining


@dataclass(frozen=True)
class Dependency:
    """What `get` returns; equal for equal names, so that it may be a key of `app.dependency_overrides`."""

    name: str

    async def __call__(self, connection: HTTPConnection) -> RequestView:
        """The model's view for this request."""
        scope = connection.scope
        if (handlers := scope.get("starlette.exception_handlers")) is not None:  # a mounted application's own, maybe
            handlers[0].setdefault(AneuronError, _on_error)
        return view_of(self.name, scope.get(_MODELS, {}), scope.get(_DEADLINE), scope.get(_TIMINGS), scope.get(_MOST))


def get(name: str) -> Dependency:
    """The installed model, as a dependency: `net: Annotated[RequestView, Depends(get("net"))]`.

    Without FastAPI: `net = await get("net")(request)`. In tests, `app.dependency_overrides[get("net")] = lambda: fake`.
    """
    return Dependency(name)


async def cancel_on_disconnect(request: Request, awaitable: Awaitable[T]) -> T:
    """Await something for as long as the client stays; if it leaves, cancel it and raise `ClientDisconnect`.

    The body is read first, if it has not been, and kept: `request.body()`, `json()` and `form()` work as before.
    `install` makes the exception an answer that nobody reads, and no noise in the log.
    """
    try:
        with suppress(RuntimeError):  # it was read already, as a stream or as a form
            await request.body()
    except BaseException:
        asyncio.ensure_future(awaitable).cancel()  # nobody will await it
        raise
    return await while_there(request.receive, awaitable)


async def while_there(receive: Receive, awaitable: Awaitable[T]) -> T:
    """The same where a body has been read, by whatever reads it."""
    with anyio.CancelScope() as scope:
        watch = asyncio.create_task(_cancel_when_left(receive, scope))
        try:
            return await awaitable
        finally:
            watch.cancel()
    raise ClientDisconnect


async def _cancel_when_left(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def of_request(scope: Scope, name: str, model: AsyncDataParallel) -> RequestView:
    """A model on the terms of one request, as `get` hands it out, installed or not."""
    return RequestView(name, model, scope.get(_DEADLINE), scope.get(_TIMINGS), most=scope.get(_MOST))


def deadline_middleware(max_seconds: float | None) -> Callable[[ASGIApp], ASGIApp]:
    """`app.add_middleware(deadline_middleware(5.0))`: requests have deadlines, and so have the calls of `get(name)`.

    The client asks for one with `X-Request-Timeout-Ms: 250` or, as in gRPC, `grpc-timeout: 250m`; malformed ones get
    400. `max_seconds` is the most that a request gets, also one that does not ask; None: no bound. Time counts from
    when the request's headers have arrived. A call that cannot be answered in time raises `DeadlineExceeded` (504).
    A websocket has no deadline: each of its calls gets `max_seconds`. `install` has it built in.
    """
    time_allowed("max_seconds", max_seconds)

    def wrap(app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            refusal = _give_time(scope, max_seconds) if scope["type"] == "http" else None
            if scope["type"] == "websocket":
                _bound_calls(scope, max_seconds)
            await (refusal or app)(scope, receive, send)

        return middleware

    return wrap


def _give_time(scope: Scope, max_seconds: float | None) -> Response | None:
    """Note a request's deadline in its scope; the answer to one that does not say it well."""
    asked = [each for each in scope["headers"] if each[0] in _ASKS]
    if not asked and max_seconds is None:
        return None
    now, outer = asyncio.get_running_loop().time(), scope.get(_DEADLINE)
    try:
        until = deadline(Headers(raw=asked), now, max_seconds)
    except MalformedTimeout as error:
        return _response(problem(400, str(error)))
    scope[_DEADLINE] = until if outer is None else outer if until is None else min(until, outer)
    return None


def _bound_calls(scope: Scope, max_seconds: float | None) -> None:
    """Note in a websocket's scope what each of its calls may take."""
    bounds = [most for most in (scope.get(_MOST), max_seconds) if most is not None]
    scope[_MOST] = min(bounds, default=None)


def _middleware(
    health: Health, max_timeout: float | None, shed: Mapping[str, AsyncDataParallel], timing: bool
) -> Callable[[ASGIApp], ASGIApp]:
    """All that `install` does for a request, in one: each layer costs every request some microseconds."""
    reports = {"/livez": health.live, "/readyz": health.ready}

    def at_once(scope: Scope) -> Response | None:
        """The answer to what the application need not see."""
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        if path in reports and scope["method"] in ("GET", "HEAD"):
            return _report(*reports[path]())
        try:
            if path in shed and scope["method"] != "OPTIONS":
                shed[path].check_admission()
        except AneuronError as error:
            return _response(problem_of(error))
        return _give_time(scope, max_timeout)

    def wrap(app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            if not health.begun and scope["type"] != "lifespan":  # the server, or an outer application, runs none
                _begin(scope["app"], health, shed)
            scope[_MODELS] = health.models
            answer = None
            if scope["type"] == "websocket":
                _bound_calls(scope, max_timeout)
            elif scope["type"] == "http":
                answer = at_once(scope)
                if timing:
                    send = _timed(scope, send)
            await (answer or app)(scope, receive, send)

        return middleware

    return wrap


def _timed(scope: Scope, send: Send) -> Send:
    """A `send` that adds how the request's calls were run."""
    timings: Timings = []
    scope[_TIMINGS] = timings

    async def send_timed(message: Message) -> None:
        if message["type"] == "http.response.start" and timings:
            header = (b"server-timing", server_timing(timings).encode("latin-1", "replace"))
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return send_timed


def _is_installed(app: Starlette) -> bool:
    return isinstance(getattr(app.state, "aneuron", None), Health)


def _health(app: Starlette) -> Health:
    if not _is_installed(app):
        raise RuntimeError("no models are in this app; call aneuron.web.starlette.install(app, ...) first")
    health: Health = app.state.aneuron
    return health


def _report(status: int, body: bytes) -> Response:
    return Response(body, status, {"Cache-Control": "no-store"}, "application/json")


def _response(said: Problem) -> Response:
    return Response(said.body, said.status, dict(said.headers))


async def _on_error(connection: HTTPConnection, error: Exception) -> Response | None:
    said = problem_of(error)
    log(error)
    if isinstance(connection, WebSocket):
        await connection.close(1013 if said.status == 503 else 1011)
        return None
    return _response(said)


async def _on_fault(request: Request, error: Exception) -> Response:
    return _response(problem_of(error))  # and Starlette raises it on, for the server to log


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx notes it; nobody is there to read it
