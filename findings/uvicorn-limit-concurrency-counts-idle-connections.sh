#!/usr/bin/env bash
# uvicorn's `--limit-concurrency` counts connections, idle ones too: two silent clients close a server with a limit of 2.
# Library: uvicorn 0.54.0, Python 3.11.
# Guess: it counts requests in flight.
# Happens: connections that are open and ask nothing (keep-alive pools, probes, a load balancer's spares) use the limit
#   up; every request is then 503, health checks included, without Retry-After, while no request runs.
# Who meets it: whoever uses it as backpressure for a model behind a proxy that keeps connections open.
# Seen: limit 2, 2 idle connections: 503, Retry-After None; none idle: 200
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'uvicorn==0.54.0'

cat >"$dir/check.py" <<'PY'
import http.client
import socket
import subprocess
import time
from pathlib import Path

Path("app.py").write_text('''
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
''')
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = ["venv/bin/uvicorn", "app:app", "--port", str(port), "--limit-concurrency", "2", "--lifespan", "off"]


def get():
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/livez", headers={"connection": "close"})
    answer = connection.getresponse()
    return answer.status, answer.headers["retry-after"]


process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
try:
    for _ in range(300):
        try:
            free = get()
            break
        except OSError:
            time.sleep(0.1)
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    full = get()  # accepted after the two
finally:
    process.terminate()
    process.wait(20)
print("none idle:", free, "two idle:", full)
assert free == (200, None) and full == (503, None)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
