"""A bare handler that awaits aneuron's model, on each HTTP server that `aneuron serve` might have chosen.

Lives here: the same handler for ASGI, RSGI and aiohttp, without a framework's routing, and how each server is started.
Each cancels its call when the client leaves, as `aneuron serve` must. Must not be here: clients, timing.
"""

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import torch

from benchmarks import servers

model = servers.product()
HEADERS = [("content-type", servers.MEDIA_TYPE)]


async def answer(body: bytes) -> bytes:
    y: torch.Tensor = await model(servers.tensor(body))
    return y.numpy().tobytes()


def _freeze() -> None:
    """As aneuron's integrations do after the start, and `aneuron serve`."""
    gc.collect()
    gc.freeze()


# ASGI.


async def asgi(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    watch = asyncio.ensure_future(_cancel_when_left(receive, asyncio.current_task()))
    try:
        y = await answer(body)
    finally:
        watch.cancel()
    length = (b"content-length", b"%d" % len(y))
    await send({"type": "http.response.start", "status": 200, "headers": [_ASGI_HEADER, length]})
    await send({"type": "http.response.body", "body": y})


_ASGI_HEADER = (b"content-type", servers.MEDIA_TYPE.encode())


async def _lifespan(receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    await receive()
    await model.start()
    _freeze()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await model.aclose()
    await send({"type": "lifespan.shutdown.complete"})


async def _cancel_when_left(receive: Callable[[], Awaitable[Any]], task: "asyncio.Task[Any] | None") -> None:
    await receive()
    if task is not None:
        task.cancel()


# RSGI.


class Rsgi:
    """The first request starts the model: what Granian calls before is no coroutine."""

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        body = await protocol()
        watch = asyncio.ensure_future(_cancel_when_left(protocol.client_disconnect, asyncio.current_task()))
        try:
            y = await answer(body)
        finally:
            watch.cancel()
        protocol.response_bytes(200, HEADERS, y)


rsgi = Rsgi()


# aiohttp.


async def of_aiohttp(request: Any) -> Any:
    from aiohttp import web

    return web.Response(body=await answer(await request.read()), content_type=servers.MEDIA_TYPE)


async def _aiohttp(routed: bool, protocol: bool) -> None:
    from aiohttp import web

    from aneuron.web.v2 import aiohttp as v2
    from aneuron.web.v2.models import Models

    runner: Any
    async with model:
        _freeze()
        if routed:
            app = web.Application()
            if protocol:
                app.add_routes(v2.routes(net=model))
            else:
                app.router.add_post("/predict", of_aiohttp)
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        else:
            handler: Any = v2.V2(Models(v2.routes, {"net": model})) if protocol else of_aiohttp
            runner = web.ServerRunner(web.Server(handler, access_log=None, handler_cancellation=True))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", servers.PORT, backlog=2048).start()
        await asyncio.Event().wait()


def _granian(interface: str) -> None:
    from granian.constants import Interfaces, Loops
    from granian.log import LogLevels
    from granian.server import Server

    Server(
        f"benchmarks.servers.raw_app:{interface}", port=servers.PORT, interface=Interfaces(interface), workers=1,
        loop=Loops.uvloop, backlog=2048, log_level=LogLevels.warning, websockets=False,
    ).serve()  # fmt: skip


async def _embedded(interface: str) -> None:
    from granian.constants import Interfaces
    from granian.server.embed import Server

    made = Server(
        asgi if interface == "asgi" else rsgi, port=servers.PORT, interface=Interfaces(interface), backlog=2048,
        log_enabled=False, websockets=False,
    )  # fmt: skip
    await made.serve()


def v2_asgi() -> Any:
    """The Open Inference Protocol without a router."""
    from aneuron.web.v2 import starlette as v2
    from aneuron.web.v2.models import Models

    protocol = v2.V2(Models(v2.routes, {"net": model}))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (asgi if scope["type"] == "lifespan" else protocol)(scope, receive, send)

    return app


def main(server: str) -> None:
    import uvloop

    if server == "v2-uvicorn":
        import uvicorn

        uvicorn.run(v2_asgi(), port=servers.PORT, loop="uvloop", http="httptools", access_log=False,
                    log_level="warning")  # fmt: skip
    elif server == "uvicorn":
        import uvicorn

        uvicorn.run(asgi, port=servers.PORT, loop="uvloop", http="httptools", access_log=False, log_level="warning")
    elif "aiohttp" in server:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(_aiohttp(server.endswith("app"), server.startswith("v2")))
    elif server.startswith("embedded"):
        uvloop.run(_embedded(server.partition("-")[2]))
    else:
        _granian(server.partition("-")[2])


if __name__ == "__main__":
    main(servers.setting("server"))
