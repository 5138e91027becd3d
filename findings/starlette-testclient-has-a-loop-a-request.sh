#!/usr/bin/env bash
# Starlette's (and FastAPI's) TestClient without `with` runs every request on an event loop of its own.
# Library: starlette 1.10.0, httpx2 2.16.2, Python 3.11.
# Guess: one client has one event loop in the background; without `with` only the lifespan is left out.
# Happens: each request starts a new loop, in a new thread, and closes it: what binds itself to the loop of the first
#   request (a model, a queue, a connection pool) fails in the second one. Inside `with` all share one loop.
# Who meets it: tests of handlers that hold an asyncio object: the first request passes, the second one fails.
# Seen: without `with` 2 loops for 2 requests; with it 1
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'starlette==1.10.0' 'httpx2==2.16.2'

cat >"$dir/check.py" <<'PY'
import asyncio

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

loops = []


async def predict(request):
    loops.append(asyncio.get_running_loop())
    return Response()


client = TestClient(Starlette(routes=[Route("/", predict)]))
client.get("/"), client.get("/")
without = len({id(loop) for loop in loops})
loops.clear()
with client:
    client.get("/"), client.get("/")
print("without `with`", without, "loops, with it", len({id(loop) for loop in loops}))
assert without == 2 and len({id(loop) for loop in loops}) == 1
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
