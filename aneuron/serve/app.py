"""The service: models started, served over HTTP and gRPC, drained.

Lives here: what happens in which order from the start to the end. Must not be here: the protocol (`aneuron.web.v2`),
what is asked for (config.py), how models are made (loading.py).
"""

import asyncio
import errno
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
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
from aneuron.web.aiohttp import Handler, give_time, report
from aneuron.web.deadlines import MalformedTimeout
from aneuron.web.health import Health
from aneuron.web.lifecycle import frozen, serving
from aneuron.web.metrics import Collector
from aneuron.web.problems import problem
from aneuron.web.v2.aiohttp import V2
from aneuron.web.v2.errors import Refused
from aneuron.web.v2.models import Models

BACKLOG = 2048
LAST = 0.1  # seconds to end in for what has nothing to answer: connections without a request, models without calls
INFINITY = float("inf")
Listening = Callable[[int, int | None], None]  # is told the ports of HTTP and gRPC


class Service:
    """Models on one event loop, from their start to their end."""

    def __init__(self, server: ServerSettings, made: Sequence[Made]) -> None:
        self._settings = server
        self._models: dict[str, AsyncDataParallel] = {each.name: each.model for each in made}
        self._signatures = {each.name: each.signature for each in made if each.signature is not None}
        self._token = security.token_of(server)
        self._reloading = Reloading(made)
        self._health = Health(self._models)
        try:
            self._served = Models(Service, self._models, self._signatures, self._load)
        except ValueError as error:  # what the protocol has no words for
            raise ConfigError(f"models.{error}") from error
        self._protocol = V2(self._served, server.max_body)
        self._elsewhere: Any = None  # the handler of all other requests
        self._starting: asyncio.Task[Any] | None = None  # that may be cancelled
        self._serving = False
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()  # nobody is to be told before
        self._until: float | None = None  # when what was accepted is to be answered
        self._asked = 0  # requests of the protocol that are not answered
        self._answered = asyncio.Event()  # one of them, or there is less time for them
        self._busy: set[Any] = set()  # connections on which there is a request
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listening: Listening = lambda http, grpc: None) -> None:
        """Serve until `stop`; then answer what was accepted, and return.

        Raises `ConfigError` where there is nothing to listen on, what a model's start raises, and `CancelledError`
        where it is stopped before it serves.
        """
        self._starting = asyncio.current_task()
        async with AsyncExitStack() as stack:
            try:
                tls = security.tls_of(self._settings)
                bound = stack.enter_context(bind(self._settings))
                await stack.enter_async_context(serving(self._models, self._left))
                stack.enter_context(frozen(True))
                runner = await self._http(stack, bound, tls)
                grpc, grpc_port = await self._grpc(stack)
            finally:
                self._starting = None
            port = bound.getsockname()[1]
            self._serving = True
            logger.info("listening on %s", " and ".join(_addresses(self._settings, port, grpc_port)))
            listening(port, grpc_port)
            await self._stopping.wait()
            await self._announce(grpc)
            await self._drain(runner, grpc)
        for name, model in self._models.items():
            calls = model.statistics().calls
            logger.info("%s: ended; %d calls completed, %d failed", name, calls.completed, calls.failed)

    async def _announce(self, grpc: Any) -> None:
        """Say that the service is to be sent no more, and serve until that is known."""
        self._health.draining = self._served.draining = True
        if grpc is not None:
            grpc.drain()
        logger.info("draining: not ready from now on")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._at_once.wait(), self._settings.drain_delay)

    async def _drain(self, runner: web.AppRunner, grpc: Any) -> None:
        """Let nobody in any more, and answer those that have asked, while there is time: that is for all together."""
        self._end_within(self._settings.drain_timeout)
        for each in list(runner.sites):
            await each.stop()
        for _ in range(3):  # what was read begins: the connection is woken, starts a task, that comes to `_front`
            await asyncio.sleep(0)
        assert runner.server is not None
        for connection in runner.server.connections:
            if connection not in self._busy:  # aiohttp reads no more of what it closes, not the rest of a body either
                connection.close()
        await asyncio.gather(self._answer(), *(() if grpc is None else (grpc.aclose(self._left()),)))

    async def _answer(self) -> None:
        while self._asked:
            self._answered.clear()
            try:
                async with asyncio.timeout_at(self._until):
                    await self._answered.wait()
            except TimeoutError:
                logger.warning("%d requests were not answered in time", self._asked)
                return

    def _end_within(self, seconds: float | None) -> None:
        """Leave what was accepted so many seconds; what was said before is only ever shortened."""
        until = INFINITY if seconds is None else asyncio.get_running_loop().time() + max(LAST, seconds)
        if until < (INFINITY if self._until is None else self._until):
            self._until = until
            self._answered.set()  # who waits looks again

    def _left(self) -> float | None:
        """Seconds for what was accepted."""
        now, seconds = asyncio.get_running_loop().time(), self._settings.drain_timeout
        left = seconds if self._until is None else self._until - now
        return None if left is None else max(LAST, left)

    def stop(self, at_once: bool = False) -> None:
        """Drain, and end. Before it serves: end now. A second time: refuse what waits, and do not wait for clients."""
        if at_once or self._stopping.is_set():
            self._at_once.set()
        if self._starting is not None:
            self._starting.cancel()
        elif self._stopping.is_set():
            for model in self._models.values():
                self._do(model.abort())
            self._end_within(0.0)
        else:
            for task in self._tasks:
                task.cancel()  # nobody needs another model any more
        self._stopping.set()

    def reload(self) -> None:
        """Have all models loaded anew, if that is allowed."""
        if not self._settings.allow_load:
            logger.warning("SIGHUP: models are not loaded anew without --allow-load")
        elif self._serving and not self._stopping.is_set():
            self._do(self._reloading.load_all())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Nobody waits for it: what it raises is for the log. The loop itself refers to tasks only weakly."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_coro(), exc_info=error)

    def obey_signals(self) -> None:
        """SIGTERM drains, so does Ctrl-C without telling anybody before, SIGHUP has models loaded anew."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGINT, self.stop, True)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    # What is served.

    async def _http(self, stack: AsyncExitStack, bound: socket.socket, tls: ssl.SSLContext | None) -> web.AppRunner:
        runner = web.AppRunner(
            self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=LAST
        )  # fmt: skip
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        assert runner.server is not None
        # The protocol's paths need no router: that takes more time than the rest of a request.
        self._elsewhere, runner.server.request_handler = runner.server.request_handler, self._front
        await web.SockSite(runner, bound, ssl_context=tls, backlog=BACKLOG).start()
        return runner

    async def _grpc(self, stack: AsyncExitStack) -> tuple[Any, int | None]:
        server = self._settings
        if server.grpc is None:
            return None, None
        from aneuron.web.v2.grpc import GrpcServer

        guards = () if self._token is None else (security.grpc_guard(self._token),)
        models: dict[str, Any] = dict(self._models)
        grpc = GrpcServer(
            signatures=self._signatures, max_body=server.max_body, max_timeout=server.max_timeout, load=self._load,
            interceptors=guards, **models,
        )  # fmt: skip
        stack.push_async_callback(grpc.aclose, LAST)
        try:
            return grpc, await grpc.listen(f"{_host(server)}:{server.grpc}", security.grpc_credentials(server))
        except OSError as error:
            raise ConfigError(f"server.grpc = {server.grpc}: {error}") from None

    def _application(self) -> web.Application:
        """What is not the protocol."""
        server, models = self._settings, dict[str, Any](self._models)
        app = web.Application(client_max_size=server.max_body)
        app.router.add_get("/livez", _reporting(self._health.live))
        app.router.add_get("/readyz", _reporting(self._health.ready))
        for path in ("/v2", "/v2/{rest:.*}"):
            app.router.add_route("*", path, self._timed)  # where aiohttp has to do something before: `_front` says what
        if server.metrics:
            registry = CollectorRegistry()
            registry.register(Collector(**models))
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
            app.router.add_get("/metrics", make_aiohttp_handler(registry))
        if server.console:
            app.add_routes(console.routes("/console", **models))
        return app

    async def _front(self, request: web.BaseRequest) -> web.StreamResponse:
        """All requests come in here: the token, who is waited for, and whose connection ends."""
        self._busy.add(request.protocol)
        try:
            if security.of_protocol(request.path) and self._lets_in(request):
                return await self._counted(request)
            response: web.StreamResponse
            response = await self._elsewhere(request) if self._lets_in(request) else _refused(request)
            self._end_connection(response)
            return response
        finally:
            self._busy.discard(request.protocol)

    async def _counted(self, request: web.BaseRequest) -> web.StreamResponse:
        """A request of the protocol, from its head to when all of its answer is written."""
        self._asked += 1
        try:
            # A client that waits for `100 Continue` gets it from aiohttp's application.
            response = await (self._elsewhere if "Expect" in request.headers else self._timed)(request)
            self._end_connection(response)
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:  # the client has left, and nobody reads the answer
            return web.Response(status=499)
        finally:
            self._asked -= 1
            self._answered.set()
        return response

    def _end_connection(self, response: web.StreamResponse) -> None:
        if self._stopping.is_set() and not response.prepared:
            response.force_close()  # the client's next request is another server's

    async def _timed(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            give_time(request, self._settings.max_timeout)
        except MalformedTimeout as error:
            return web.json_response({"error": str(error)}, status=400)
        return await self._protocol(request)

    def _lets_in(self, request: web.BaseRequest) -> bool:
        if self._token is None or security.is_open(request.method, request.path):
            return True
        return self._token.is_in(request.headers.get("Authorization"))

    async def _load(self, name: str) -> None:
        if not self._settings.allow_load:
            raise Refused(403, "models are not loaded on request here: start aneuron serve with --allow-load")
        loading = asyncio.ensure_future(self._reloading.load(name))
        self._tasks.add(loading)  # which `stop` cancels; what it raises the client is told
        loading.add_done_callback(self._tasks.discard)
        try:
            await loading
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise  # the client has left
            raise Refused(503, f"the service ends; model {name!r} was not loaded") from None


def _reporting(ask: Callable[[], tuple[int, bytes]]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return report(*ask())

    return handler


def bind(server: ServerSettings) -> socket.socket:
    """The socket of HTTP; raises `ConfigError` where that port or gRPC's cannot be had."""
    http = _bound(server.host, "http", server.http)
    try:
        if server.grpc:
            _bound(server.host, "grpc", server.grpc).close()
    except BaseException:
        http.close()
        raise
    return http


def _bound(host: str, key: str, port: int) -> socket.socket:
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
        why = error.strerror or error
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"server.host = {host!r}: cannot listen there: {why}; expected an address or a name of this machine, "
                "as 127.0.0.1, or 0.0.0.0 for all"
            ) from None
        raise ConfigError(
            f"server.{key} = {port}: cannot listen on {host}: {why}; choose another port (0 takes any that is free)"
        ) from None
    return bound


def _host(server: ServerSettings) -> str:
    """As it is written before a port."""
    return f"[{server.host}]" if ":" in server.host else server.host


def _addresses(server: ServerSettings, http: int, grpc: int | None) -> list[str]:
    secure = "s" if server.tls_cert is not None else ""
    return [f"{name}{secure}://{_host(server)}:{port}" for name, port in (("http", http), ("grpc", grpc)) if port]


def _refused(request: web.BaseRequest) -> web.Response:
    """401, in the words of whoever is asked."""
    text = "the token is expected: Authorization: Bearer TOKEN"
    headers = {"WWW-Authenticate": security.CHALLENGE}
    if security.of_protocol(request.path):
        return web.json_response({"error": text}, status=401, headers=headers)
    said = problem(401, text)
    return web.Response(status=401, body=said.body, headers={**said.headers, **headers})
