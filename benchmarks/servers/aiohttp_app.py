"""aiohttp on uvloop: with aneuron, or with something else behind the same handler."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import uvloop
from aiohttp import web

from benchmarks import servers


def application(net: Callable[[web.Request], Any]) -> web.Application:
    """The app, whose handler gets what it awaits from `net`."""

    async def predict(request: web.Request) -> web.Response:
        y = await net(request)(servers.tensor(await request.read()))
        return web.Response(body=y.numpy().tobytes(), content_type=servers.MEDIA_TYPE)

    app = web.Application()
    app.router.add_post("/predict", predict)
    return app


def with_aneuron() -> web.Application:
    from aneuron.web import aiohttp as integration

    app = application(lambda request: integration.get(request, "net"))
    integration.setup(app, shed={"/predict": "net"}, net=servers.product())
    return app


def with_other() -> web.Application:
    behind = servers.other()

    async def context(app: web.Application) -> AsyncIterator[None]:
        async with servers.running(behind):
            yield

    app = application(lambda request: behind.call)
    app.cleanup_ctx.append(context)
    return app


if __name__ == "__main__":
    app = with_aneuron() if servers.WHAT == "aneuron" else with_other()
    web.run_app(
        app, host="127.0.0.1", port=servers.PORT, loop=uvloop.new_event_loop(), access_log=None, print=None,
        handler_cancellation=True, backlog=2048,
    )  # fmt: skip
