#!/usr/bin/env bash
# Under a BaseHTTPMiddleware (also `@app.middleware("http")` of FastAPI) `await request.is_disconnected()` stays False.
# Library: starlette 1.10.0, uvicorn 0.54.0, Python 3.11.
# Guess: it becomes True when the client has left, as without the middleware.
# Happens: is_disconnected() looks only at what is there at once; the middleware's wrapped `receive` needs a turn of the
#   loop first, so it never has anything. Awaiting `request.receive()` in a task of its own does see the disconnect.
# Who meets it: handlers that poll between the steps of a long computation: they compute for clients that have left, as
#   soon as anybody adds a logging middleware.
# Seen: without middleware: seen; with it: never seen in 2 s of polling, by receive: seen
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'starlette==1.10.0' 'uvicorn==0.54.0'

cat >"$dir/check.py" <<'PY'
import http.client
import subprocess
import time
from pathlib import Path

Path("app.py").write_text('''
import asyncio
import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Route


async def poll(request):
    await request.body()
    Path("entered").touch()
    for _ in range(100):
        if await request.is_disconnected():
            Path("poll").write_text("seen")
            return Response()
        await asyncio.sleep(0.02)
    Path("poll").write_text("never")
    return Response()


async def wait(request):
    await request.body()
    Path("entered").touch()
    message = await asyncio.wait_for(request.receive(), 10)
    Path("wait").write_text("seen" if message["type"] == "http.disconnect" else message["type"])
    return Response()


async def passes(request, call_next):
    return await call_next(request)


app = Starlette(routes=[Route("/poll", poll, methods=["POST"]), Route("/wait", wait, methods=["POST"])])
if os.path.exists("middleware"):
    app.add_middleware(BaseHTTPMiddleware, dispatch=passes)
''')


def leave(port, name):
    for _ in range(300):
        try:
            client = http.client.HTTPConnection("127.0.0.1", port)
            client.request("POST", "/" + name, body=b"x")
            break
        except OSError:
            time.sleep(0.1)
    while not Path("entered").exists():
        time.sleep(0.01)
    client.close()
    while not (Path(name).exists() and Path(name).read_text()):
        time.sleep(0.01)
    Path("entered").unlink()
    return Path(name).read_text()


def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


seen = {}
for middleware in (False, True):
    if middleware:
        Path("middleware").touch()
    port, quiet = free_port(), subprocess.DEVNULL
    server = subprocess.Popen(["venv/bin/uvicorn", "app:app", "--port", str(port)], stdout=quiet, stderr=quiet)
    try:
        seen[middleware] = [leave(port, name) for name in ("poll", "wait")]
    finally:
        server.terminate()
        server.wait(20)
    Path("poll").unlink(), Path("wait").unlink()
    print("middleware", middleware, "is_disconnected:", seen[middleware][0], "receive:", seen[middleware][1])
assert seen == {False: ["seen", "seen"], True: ["never", "seen"]}
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
