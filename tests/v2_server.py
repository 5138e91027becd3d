"""A server of the Open Inference Protocol, for clients in other processes; says its ports, ends with its input.

Models: one for each datatype that returns what it gets, `two` with two inputs and two outputs, `slow`.
"""

import asyncio
import json
import socket
import sys
import threading

import torch
import uvicorn
from aiohttp import web
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import aneuron
from aneuron.web.v2.aiohttp import routes as aiohttp_routes
from aneuron.web.v2.datatypes import BYTES, TABLE
from aneuron.web.v2.grpc import GrpcServer
from aneuron.web.v2.starlette import routes


def same(x):
    return x


def two(ids, mask):
    return {"sum": ids + mask, "texts": [f"{row.tolist()}" for row in ids]}


def models():
    """By name; `close` waits for the largest to end."""
    pool = aneuron.Pool(device_ids=[0], backend="cpu")
    found = {}
    for datatype in TABLE.values():
        example = aneuron.Rows([b"a", b"b"]) if datatype is BYTES else torch.ones(2, 3).to(datatype.dtype)
        found[datatype.name] = aneuron.AsyncDataParallel(same, pool=pool, example_inputs=example)
    long = torch.ones(2, 2, dtype=torch.long)
    found["two"] = aneuron.AsyncDataParallel(two, pool=pool, example_inputs={"ids": long, "mask": long})
    found["slow"] = aneuron.AsyncDataParallel(
        torch.nn.Identity().eval(),
        backend=aneuron.SimulatedBackend(cores=1, service_time=0.2),
        batch_size=1,
        example_inputs=torch.zeros(1, 3),
    )
    return found


async def main():
    served = models()
    for model in served.values():
        await model.start()

    async def calls(request):
        return JSONResponse(served["slow"].statistics().calls.cancelled)

    loads = []

    async def load(name):
        loads.append(name)

    max_body = 1 << 20
    app = Starlette(routes=[*routes(max_body=max_body, load=load, **served), Route("/cancelled", calls)])
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve([listening]))
    other = web.Application()
    other.add_routes(aiohttp_routes(max_body=max_body, load=load, **served))
    runner = web.AppRunner(other, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    grpc = GrpcServer(max_body=max_body, load=load, **served)
    port = await grpc.listen("127.0.0.1:0")
    ports = {"starlette": listening.getsockname()[1], "aiohttp": runner.addresses[0][1], "grpc": port}
    if "tritonclient" in sys.argv:
        import tritonclient.grpc  # noqa: F401 - whose stubs have the same names
    print(json.dumps(ports), flush=True)
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(done.set)), daemon=True).start()
    await done.wait()
    await grpc.aclose(0)
    server.should_exit = True
    await serving
    await runner.cleanup()
    for model in served.values():
        await model.aclose()


if __name__ == "__main__":
    asyncio.run(main())
