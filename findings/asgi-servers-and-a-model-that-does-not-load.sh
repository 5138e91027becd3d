#!/usr/bin/env bash
# Servers serve an app whose lifespan raises; of one that reports a failed startup hypercorn exits with 0.
# Library: uvicorn 0.54.0, hypercorn 0.18.0, granian 2.8.9, Python 3.11. The app is plain ASGI.
# Guess: an exception while starting stops the server; a failed startup ends it with a code other than 0.
# Happens: an exception is taken for "this app has no lifespan": all three accept requests, without the model
#   (uvicorn's `--lifespan on` refuses). After `lifespan.startup.failed`, which Starlette sends, the codes are 3, 0 and 1:
#   a supervisor sees a hypercorn that could not load its model as one that ended well.
# Who meets it: ASGI wrappers written by hand around a framework; Kubernetes jobs and systemd's Restart=on-failure.
# Seen: raises: 200, 200, 200; reports: exit 3 (uvicorn), 0 (hypercorn), 1 (granian)
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'uvicorn==0.54.0' 'hypercorn==0.18.0' 'granian==2.8.9'

cat >"$dir/check.py" <<'PY'
import http.client
import os
import socket
import subprocess
import time
from pathlib import Path

Path("app.py").write_text('''
import os

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        if os.environ["STARTUP"] == "raises":
            raise RuntimeError("the model cannot be loaded")
        await send({"type": "lifespan.startup.failed", "message": "the model cannot be loaded"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
''')


def start(server, startup):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = {
        "uvicorn": ["app:app", "--port", port],
        "hypercorn": ["app:app", "--bind", "127.0.0.1:" + port],
        "granian": ["--interface", "asgi", "--port", port, "app:app"],
    }[server]
    process = subprocess.Popen(
        ["venv/bin/" + server, *arguments], env=os.environ | {"STARTUP": startup}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    return process, int(port)


def status(port):
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            return connection.getresponse().status
        except OSError:
            time.sleep(0.1)


for server, code in (("uvicorn", 3), ("hypercorn", 0), ("granian", 1)):
    process, port = start(server, "raises")
    try:
        answered = status(port)
    finally:
        process.terminate()
        process.wait(20)
    process, port = start(server, "reports")
    try:
        ended = process.wait(60)
    finally:
        process.kill()
    print(server, "raises:", answered, "reports: exit", ended)
    assert (answered, ended) == (200, code)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
