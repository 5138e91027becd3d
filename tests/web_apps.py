"""The same application on FastAPI and on aiohttp, for servers in processes of their own (test_web_servers.py).

Its model notes the rows that it executes, and holds them while the gate is closed.
"""

import asyncio
import math
import os
import sys
import threading
from typing import Annotated

import pydantic
import torch
from aiohttp import web
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse

import aneuron.web.aiohttp
import aneuron.web.starlette
from aneuron import AsyncDataParallel, CpuBackend
from aneuron.web.starlette import cancel_on_disconnect, get, install, lifespan
from aneuron.web.views import RequestView

LIMIT = 100_000  # bytes of a body
PACKAGE = os.path.join(os.path.dirname(aneuron.__file__), "")  # what else a folder named aneuron holds is not ours

gate = threading.Event()
gate.set()
executed: list[float] = []


def double(x):
    executed.extend(x[:, 0].tolist())
    assert gate.wait(60.0)
    if (x == 666).any():
        raise ValueError("a secret of the model")
    return x * 2


model = AsyncDataParallel(
    double, batch_size=1, backend=CpuBackend(cores=1), num_workers=1, example_inputs=torch.zeros(1, 1)
)


class Body(pydantic.BaseModel):
    row: list[float]


def state():
    """What a test asks for, to know how far things are."""
    calls = model.statistics().calls
    with open("/proc/self/statm") as memory:
        pages = int(memory.read().split()[1])
    ours = [task for task in asyncio.all_tasks() if task.get_coro().cr_code.co_filename.startswith(PACKAGE)]
    return {
        "accepted": calls.accepted,
        "cancelled": calls.cancelled,
        "outstanding": calls.waiting + calls.running,
        "executed": [value for value in executed if math.isfinite(value)],  # JSON has no others
        "tasks": len(ours),
        "resident": pages * 4096,
    }


def switch(app, to):
    if to == "open":
        gate.set()
    elif to == "opening":
        asyncio.get_running_loop().call_later(1.0, gate.set)
    elif to == "closed":
        gate.clear()
    elif to == "forgotten":
        executed.clear()
    elif to == "draining":
        (aneuron.web.aiohttp if isinstance(app, web.Application) else aneuron.web.starlette).drain(app)
    return {}


async def numbers():
    for n in range(1000):
        yield b"%d " % n * 1000
        await asyncio.sleep(0.001)


# FastAPI.

app = FastAPI(lifespan=lifespan(net=model))
install(app, max_body=LIMIT, server_timing=True, net=model)


@app.post("/predict")
async def predict(request: Request, body: Body, net: Annotated[RequestView, Depends(get("net"))]) -> list[float]:
    y = await cancel_on_disconnect(request, net(torch.tensor([body.row])))
    return y[0].tolist()


@app.get("/numbers")
async def show_numbers():
    return StreamingResponse(numbers())


@app.get("/state")
async def show_state():
    return state()


@app.post("/switch/{to}")
async def do_switch(request: Request, to: str):
    return switch(request.app, to)


# aiohttp.


async def aiohttp_predict(request: web.Request):
    try:
        body = Body.model_validate_json(await request.read())
    except pydantic.ValidationError:
        raise web.HTTPUnprocessableEntity from None
    y = await aneuron.web.aiohttp.get(request, "net")(torch.tensor([body.row]))
    return web.json_response(y[0].tolist())


async def aiohttp_numbers(request: web.Request):
    response = web.StreamResponse()
    await response.prepare(request)
    async for chunk in numbers():
        await response.write(chunk)
    return response


async def aiohttp_state(request: web.Request):
    return web.json_response(state())


async def aiohttp_switch(request: web.Request):
    return web.json_response(switch(request.app, request.match_info["to"]))


def main():
    served = web.Application(client_max_size=LIMIT)
    aneuron.web.aiohttp.setup(served, server_timing=True, net=model)
    served.router.add_post("/predict", aiohttp_predict)
    served.router.add_get("/numbers", aiohttp_numbers)
    served.router.add_get("/state", aiohttp_state)
    served.router.add_post("/switch/{to}", aiohttp_switch)
    web.run_app(served, host="127.0.0.1", port=int(sys.argv[1]), handler_cancellation=True, print=None)


if __name__ == "__main__":
    main()
