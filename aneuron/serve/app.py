"""The service: models started, served over HTTP and gRPC, drained.

Lives here: what happens in which order from the start to the end. Must not be here: the protocol (`aneuron.web.v2`),
what is asked for (config.py), how models are made (loading.py).
"""

import asyncio
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.aiohttp import make_aiohttp_handler

from aneuron import AsyncDataParallel
from aneuron.serve import security
from aneuron.serve.config import ConfigError, ServerSettings
from aneuron.serve.loading import Made
from aneuron.serve.reloading import Reloading, logger
from aneuron.web import console
from aneuron.web.aiohttp import Handler, drain, setup
from aneuron.web.metrics import Collector
from aneuron.web.problems import problem
from aneuron.web.v2.aiohttp import routes

BACKLOG = 2048
LET_IN = 0.1  # seconds within which who has connected has begun to ask
Listening = Callable[[int, int | None], None]  # is told the ports of HTTP and gRPC


class Service:
    """Models on one event loop, from their start to their end."""

    def __init__(self, server: ServerSettings, made: Sequence[Made]) -> None:
        self._settings = server
        self._made = made
        self._models: dict[str, AsyncDataParallel] = {each.name: each.model for each in made}
        self._signatures = {each.name: each.signature for each in made if each.signature is not None}
        self._token = security.token_of(server)
        self._reloading = Reloading(made)
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()  # nobody is to be told before
        self._task: asyncio.Task[Any] | None = None
        self._serving = False
        self._tasks: set[asyncio.Future[Any]] = set()

    async def run(self, listening: Listening = lambda http, grpc: None) -> None:
        """Serve until `stop`; then answer what was accepted, and return.

        Raises `ConfigError` where there is nothing to listen on, what a model's start raises, and `CancelledError`
        where it is stopped before it serves.
        """
        server, self._task = self._settings, asyncio.current_task()
        tls = security.tls_of(server)
        bound = bind("http", server.host, server.http)
        try:
            if server.grpc:  # in use it is in use before minutes of loading, too
                bind("grpc", server.host, server.grpc).close()
            app = self._application()
            await self._serve(app, bound, tls, listening)
        finally:
            bound.close()

    async def _serve(
        self, app: web.Application, bound: socket.socket, tls: ssl.SSLContext | None, listening: Listening
    ) -> None:
        server = self._settings
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=10**9 if server.drain_timeout is None else server.drain_timeout,
        )
        grpc: Any = None
        try:
            await runner.setup()  # starts the models
            site = web.SockSite(runner, bound, ssl_context=tls, backlog=BACKLOG)
            await site.start()
            port, grpc_port = bound.getsockname()[1], None
            if server.grpc is not None:
                grpc = self._grpc()
                grpc_port = await _listen(grpc, server)
            self._serving = True
            logger.info("listening on %s", " and ".join(_addresses(server, port, grpc_port)))
            listening(port, grpc_port)
            await self._stopping.wait()
            drain(app)
            logger.info("draining: not ready from now on")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._at_once.wait(), server.drain_delay)
        finally:
            for each in list(runner.sites):
                await each.stop()  # nobody is let in any more
            # aiohttp ignores what a connection sends that begins while it ends the idle ones, and waits for it until
            # `drain_timeout`: those that were let in last begin before that, and are answered.
            await asyncio.sleep(LET_IN)
            if grpc is not None:
                await grpc.aclose(server.drain_timeout)
            await runner.cleanup()  # answers what it has, closes the models
        for name, model in self._models.items():
            calls = model.statistics().calls
            logger.info("%s: ended; %d calls completed, %d failed", name, calls.completed, calls.failed)

    def stop(self, at_once: bool = False) -> None:
        """Drain, and end. Before it serves: end now. A second time: refuse what waits, and do not wait for clients."""
        if at_once or self._stopping.is_set():
            self._at_once.set()
        if not self._serving and self._task is not None:
            self._task.cancel()
        elif self._stopping.is_set():
            self._keep(asyncio.gather(*(model.abort() for model in self._models.values())))
        self._stopping.set()

    def reload(self) -> None:
        """Have all models loaded anew, if that is allowed."""
        if not self._settings.allow_load:
            logger.warning("SIGHUP: models are not loaded anew without --allow-load")
        elif self._serving:
            self._keep(asyncio.ensure_future(self._reloading.load_all()))

    def _keep(self, future: "asyncio.Future[Any]") -> None:
        """The loop itself refers to tasks only weakly."""
        self._tasks.add(future)
        future.add_done_callback(self._tasks.discard)

    def obey_signals(self) -> None:
        """SIGTERM drains, so does Ctrl-C without telling anybody before, SIGHUP has models loaded anew."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGINT, self.stop, True)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    # What is served.

    def _application(self) -> web.Application:
        server = self._settings
        models: dict[str, Any] = dict(self._models)
        app = web.Application(middlewares=[self._front()], client_max_size=server.max_body)
        app.cleanup_ctx.append(self._started)
        setup(app, max_timeout=server.max_timeout, drain_timeout=server.drain_timeout, **models)
        try:
            app.add_routes(routes(signatures=self._signatures, max_body=server.max_body, load=self._load, **models))
        except ValueError as error:  # what the protocol has no words for
            raise ConfigError(f"models.{error}") from error
        if server.metrics:
            registry = CollectorRegistry()
            registry.register(Collector(**models))
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
            app.router.add_get("/metrics", make_aiohttp_handler(registry))
        if server.console:
            app.add_routes(console.routes("/console", **models))
        return app

    @property
    def _load(self) -> Any:
        return self._reloading.load if self._settings.allow_load else None

    def _grpc(self) -> Any:
        from aneuron.web.v2.grpc import GrpcServer

        models: dict[str, Any] = dict(self._models)
        guards = () if self._token is None else (security.grpc_guard(self._token),)
        return GrpcServer(
            signatures=self._signatures, max_body=self._settings.max_body, load=self._load, interceptors=guards,
            **models,
        )  # fmt: skip

    def _front(self) -> Any:
        """Before all handlers: the token, and what is other while the service drains."""

        @web.middleware
        async def front(request: web.Request, handler: Handler) -> web.StreamResponse:
            response: web.StreamResponse
            if self._token is not None and not self._lets_in(request):
                response = _refused(request)
            elif self._stopping.is_set() and request.path == "/v2/health/ready":
                response = web.Response(status=503)
            else:
                response = await handler(request)
            if self._stopping.is_set() and not response.prepared:
                response.force_close()  # the client's next request is another server's
            return response

        return front

    def _lets_in(self, request: web.Request) -> bool:
        assert self._token is not None
        # The path that the protocol's handler sees: a slash written as %2F is one there, and none in request.path.
        rest = request.match_info.get("rest")
        path = request.path if rest is None else f"/v2/{rest}"
        return security.is_open(request.method, path) or self._token.is_in(request.headers.get("Authorization"))

    async def _started(self, app: web.Application) -> AsyncIterator[None]:
        """Start the models one after the other, with a line in the log each; `setup` closes them."""
        try:
            for each in self._made:
                began = time.monotonic()
                try:
                    await each.model.start()
                except Exception as error:
                    error.add_note(f"while the model {each.name!r} was started, from {each.source}")
                    raise
                cores, took = len(each.model.statistics().cores), time.monotonic() - began
                logger.info("%s: started %s on %d cores in %.1f s", each.name, each.source, cores, took)
        except BaseException:
            await asyncio.gather(*(each.model.abort() for each in self._made))
            raise
        yield


def bind(key: str, host: str, port: int) -> socket.socket:
    """A socket of that address; raises `ConfigError` where it cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"server.{key} = {port}: cannot listen on {host}: {error.strerror or error}; choose another port (0 takes "
            "any that is free), or an address of this machine"
        ) from None
    return bound


async def _listen(grpc: Any, server: ServerSettings) -> int:
    host = f"[{server.host}]" if ":" in server.host else server.host
    try:
        port: int = await grpc.listen(f"{host}:{server.grpc}", security.grpc_credentials(server))
    except OSError as error:
        raise ConfigError(f"server.grpc = {server.grpc}: {error}") from None
    return port


def _addresses(server: ServerSettings, http: int, grpc: int | None) -> list[str]:
    host = f"[{server.host}]" if ":" in server.host else server.host
    secure = "s" if server.tls_cert is not None else ""
    return [f"http{secure}://{host}:{http}", *([] if grpc is None else [f"grpc{secure}://{host}:{grpc}"])]


def _refused(request: web.Request) -> web.Response:
    """401, in the words of whoever is asked."""
    text = "the token is expected: Authorization: Bearer TOKEN"
    headers = {"WWW-Authenticate": security.CHALLENGE}
    if request.path.startswith("/v2"):
        return web.json_response({"error": text}, status=401, headers=headers)
    said = problem(401, text)
    return web.Response(status=401, body=said.body, headers={**said.headers, **headers})
