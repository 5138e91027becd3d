"""Models in an aiohttp application.

Lives here: what is aiohttp's. Must not be here: what another framework needs as well (the files beside this one).

    app = web.Application()
    setup(app, net=model)
    app.router.add_post("/predict", predict)  # y = await get(request, "net")(x)
    web.run_app(app, handler_cancellation=True)
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from yarl import URL

from aneuron import AsyncDataParallel, View
from aneuron.web.checks import check_flags, check_models, drain_time, guarded, nowhere, time_allowed
from aneuron.web.deadlines import MalformedTimeout, deadline
from aneuron.web.health import Health
from aneuron.web.lifecycle import frozen, serving
from aneuron.web.problems import Problem, logger, problem, problem_of
from aneuron.web.views import RequestView, Timings, view_of
from aneuron.web.views import server_timing as timing_header

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HEALTH: web.AppKey[Health] = web.AppKey("aneuron.engine.health", Health)
# A request's deadline and timings are under this key: a typed one as of aiohttp 3.14, which warns of strings.
_TERMS: Any = web.RequestKey("aneuron.terms", tuple) if hasattr(web, "RequestKey") else "aneuron.terms"


def setup(
    app: web.Application,
    *,
    server_timing: bool = False,
    max_timeout: float | None = None,
    drain_timeout: float | None = 25.0,
    freeze: bool = True,
    shed: Mapping[str, str] | None = None,
    **models: AsyncDataParallel,
) -> None:
    """Put models into an application, which starts and drains them: `get`, errors, `/livez`, `/readyz`, deadlines.

    A client that leaves is noticed only by servers that are told to: `web.run_app(app, handler_cancellation=True)`,
    `web.AppRunner(app, handler_cancellation=True)`, or, under a server of others' making,
    `web.Application(handler_args={"handler_cancellation": True})`. Then its handler is cancelled, and so is its call.

    server_timing: whether answers say in a `Server-Timing` header how their calls were run.
    max_timeout: seconds that a request may have for its calls, also one that does not ask. The client asks with
        `X-Request-Timeout-Ms: 250` or `grpc-timeout: 250m`; malformed ones get 400.
    drain_timeout: seconds that the models may take at the end to finish what they have accepted; None: no bound.
    freeze: whether `gc.freeze()` is called after the start (undone at the end), see `aneuron.web.starlette.lifespan`.
    shed: paths, and the name of the model that their requests need: `shed={"/predict": "net"}`. While that model has no
        room for another row (`max_pending`), they get their 503 before their handlers are called and their bodies read:
        a flood leaves the server time for those that it has accepted. Paths are compared with `request.path`, as they
        are; `OPTIONS` passes. That some route answers each of them is checked when the application starts:
        `LookupError`.

    Errors of aneuron become problem details (RFC 9457) by the table in `aneuron.web.problems`, every other exception
    but aiohttp's own answers a 500 that says nothing; its text is in the log. How large a body may be is aiohttp's
    `client_max_size`, 1 MiB by default. All of it holds for sub-applications too. Raises at once TypeError and
    ValueError for what is no model and for options that cannot be meant, `RuntimeError` for a second `setup`.
    """
    if not isinstance(app, web.Application):
        raise TypeError(f"setup({app!r:.80}): expected an aiohttp.web.Application, then models by name")
    check_models(setup, models)
    check_flags(server_timing=server_timing, freeze=freeze)
    most, drain_timeout = time_allowed("max_timeout", max_timeout), drain_time(drain_timeout)
    doors = guarded(shed, models)
    if _HEALTH in app:
        raise RuntimeError("models are in this application already; name all of them in one setup()")
    health = app[_HEALTH] = Health(models)

    async def live(app: web.Application) -> AsyncIterator[None]:
        for path in doors:
            if not await _has_route(app, path):
                raise nowhere(path)
        async with serving(models, lambda: drain_timeout):
            with frozen(freeze):
                yield

    async def stop(app: web.Application) -> None:
        health.draining = True

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        timings: Timings | None = [] if server_timing else None
        try:
            if request.path in doors and request.method != "OPTIONS":
                doors[request.path].check_admission()
            give_time(request, most, timings)
            response = await handler(request)
        except MalformedTimeout as error:
            response = _response(problem(400, str(error)))
        except web.HTTPException:
            raise
        except Exception as error:
            response = _answer(request, error)
        if timings and not response.prepared:
            response.headers.add("Server-Timing", timing_header(timings))
        return response

    app.cleanup_ctx.append(live)
    app.on_shutdown.append(stop)
    app.middlewares.append(middleware)
    app.router.add_get("/livez", _livez)
    app.router.add_get("/readyz", _readyz)


async def _has_route(app: web.Application, path: str) -> bool:
    """Whether a path leads anywhere, by some method."""
    asked: Any = SimpleNamespace(method="POST", path=path, rel_url=URL(path), headers={})
    found = await app.router.resolve(asked)
    if not isinstance(found.http_exception, web.HTTPNotFound):
        return True
    below: list[Any] = [resource.get_info() for resource in app.router.resources()]
    of_domains = [info["app"] for info in below if "app" in info and "prefix" not in info]
    return any([await _has_route(each, path) for each in of_domains])


def get(request: web.Request, name: str) -> RequestView:
    """The installed model, on the terms of the request.

    `net = get(request, "net")`, and then `y = await net(x)`.
    """
    return view_of(name, request.config_dict[_HEALTH].models, *request.get(_TERMS, (None, None)))


def of_request(request: web.BaseRequest, name: str, model: AsyncDataParallel) -> View | AsyncDataParallel:
    """A model on the terms of one request, as `get` hands it out, installed or not; itself where there are none."""
    until, timings = request.get(_TERMS, (None, None))
    return model if until is None and timings is None else RequestView(name, model, until, timings)


def drain(app: web.Application) -> None:
    """Turn `/readyz` to 503, for good: no new requests, please. Those that come are served as before.

    So does what the routes of `aneuron.web.v2.aiohttp` say of readiness.
    For a preStop hook, some seconds before SIGTERM: load balancers learn of it while the server still listens.
    """
    app[_HEALTH].draining = True


def is_draining(request: web.Request) -> bool:
    """Whether `drain` was called for the application that a request is for."""
    health = request.config_dict.get(_HEALTH)
    return health is not None and health.draining


def give_time(request: web.BaseRequest, most: float | None, timings: Timings | None = None) -> None:
    """Note on a request how long its calls may take, and where to note how they were run. Raises `MalformedTimeout`."""
    outer, _ = request.get(_TERMS, (None, None))  # of an application around this one
    until = deadline(request.headers, asyncio.get_running_loop().time(), most)
    request[_TERMS] = until if outer is None else outer if until is None else min(until, outer), timings


async def _livez(request: web.Request) -> web.Response:
    return report(*request.config_dict[_HEALTH].live())


async def _readyz(request: web.Request) -> web.Response:
    return report(*request.config_dict[_HEALTH].ready())


def report(status: int, body: bytes) -> web.Response:
    """What a supervisor is told."""
    return web.Response(
        status=status, body=body, content_type="application/json", headers={"Cache-Control": "no-store"}
    )


def _response(said: Problem) -> web.Response:
    return web.Response(status=said.status, body=said.body, headers=said.headers)


def _answer(request: web.Request, error: Exception) -> web.Response:
    if isinstance(error, ConnectionError) and (request.transport is None or request.transport.is_closing()):
        return web.Response(status=499)  # the client left while it sent; nobody is there to read it
    said = problem_of(error)
    if said.status == 500:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return _response(said)
