"""FastAPI on uvicorn, uvloop and httptools: with aneuron, or with something else behind the same handler."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response

from benchmarks import servers


def application(net: Any, **options: Any) -> FastAPI:
    """The app, whose handler gets what it awaits by the dependency `net`."""
    app = FastAPI(**options)

    @app.post("/predict")
    async def predict(request: Request, model: Annotated[Any, Depends(net)]) -> Response:
        y = await model(servers.tensor(await request.body()))
        return Response(y.numpy().tobytes(), media_type=servers.MEDIA_TYPE)

    return app


def with_aneuron() -> FastAPI:
    from aneuron.web import starlette as web

    model = servers.product()
    app = application(web.get("net"), lifespan=web.lifespan(net=model))
    web.install(app, shed={"/predict": "net"}, net=model)
    return app


def with_other() -> FastAPI:
    behind = servers.other()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with servers.running(behind):
            yield

    async def net() -> Any:
        return behind.call

    return application(net, lifespan=lifespan)


def made() -> FastAPI:
    """The app that was asked for; in each worker."""
    return with_aneuron() if servers.WHAT == "aneuron" else with_other()


if __name__ == "__main__":
    app = "benchmarks.servers.fastapi_app:made" if servers.WORKERS > 1 else made
    uvicorn.run(app, factory=True, workers=servers.WORKERS, port=servers.PORT, loop="uvloop", http="httptools",
                access_log=False, log_level="warning")  # fmt: skip
