#!/usr/bin/env bash
# A float array's buffer as a chunk of a StreamingResponse: hypercorn sends it, granian sends nothing, uvicorn breaks the
# message off.
# Library: starlette 1.10.0, uvicorn 0.54.0, hypercorn 0.18.0, granian 2.8.9, numpy 2.4.6, Python 3.11.
# Guess (from memory, noted after a first look): 16 bytes from all; Starlette's annotation allows memoryview, and `Response(x.data)` does work everywhere.
# Happens: len() of such a memoryview is 4, its elements, not its 16 bytes. uvicorn announces a chunk of 4 and the client
#   raises IncompleteRead; granian answers 200 with an empty body, without an error. `x.tobytes()` or
#   `x.data.cast("B")` are right.
# Who meets it: endpoints that stream embeddings or audio as raw float32.
# Seen: uvicorn IncompleteRead, hypercorn 16, granian 0; cast to bytes: 16, 16, 16
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'starlette==1.10.0' 'uvicorn==0.54.0' 'hypercorn==0.18.0' 'granian==2.8.9' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import http.client
import socket
import subprocess
import time
from pathlib import Path

Path("app.py").write_text('''
import numpy as np
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

x = np.ones(4, np.float32)


async def floats(request):
    return StreamingResponse(iter([x.data]))


async def cast(request):
    return StreamingResponse(iter([x.data.cast("B")]))


async def whole(request):
    return Response(x.data)


app = Starlette(routes=[Route("/" + handler.__name__, handler) for handler in (floats, cast, whole)])
''')


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    try:
        return len(connection.getresponse().read())
    except http.client.IncompleteRead as error:
        return type(error).__name__


seen = {}
for server in ("uvicorn", "hypercorn", "granian"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "uvicorn": ["app:app", "--port", str(port)],
        "hypercorn": ["app:app", "--bind", f"127.0.0.1:{port}"],
        "granian": ["--interface", "asgi", "--port", str(port), "app:app"],
    }[server]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(["venv/bin/" + server, *arguments], stdout=quiet, stderr=quiet)
    try:
        for _ in range(300):
            try:
                get(port, "/whole")
                break
            except OSError:
                time.sleep(0.1)
        seen[server] = [get(port, path) for path in ("/floats", "/cast", "/whole")]
    finally:
        process.terminate()
        process.wait(20)
    print(server, "floats", seen[server][0], "cast to bytes", seen[server][1], "not streamed", seen[server][2])
assert seen == {"uvicorn": ["IncompleteRead", 16, 16], "hypercorn": [16] * 3, "granian": [0, 16, 16]}
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
