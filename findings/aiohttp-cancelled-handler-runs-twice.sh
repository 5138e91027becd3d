#!/usr/bin/env bash
# An aiohttp handler that ends with CancelledError drops the connection without an answer or a log line, and aiohttp's
# client then sends the GET again: the model runs twice, the caller sees a broken connection.
# Library: aiohttp 3.14.5, Python 3.11.
# Guess: 500 and a traceback in the log, as for any other exception (and as uvicorn does); one run.
# Happens: the server takes the error for the client's own departure and closes the socket silently. On a connection that
#   was used before, the client repeats idempotent requests once.
# Who meets it: a handler that awaits a call which somebody else cancels: a batcher that is aborted or shut down.
# Seen: handler ran 2 times for one GET, ServerDisconnectedError, 0 log lines; RuntimeError instead: 500, 1 run, logged
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'aiohttp==3.14.5'

cat >"$dir/check.py" <<'PY'
import asyncio
import logging

import aiohttp
from aiohttp import web

runs = []
logged = []


class Lines(logging.Handler):
    def emit(self, record):
        logged.append(record)


async def first(request):
    return web.Response()


async def predict(request):
    runs.append(1)
    if request.path == "/broken":
        raise RuntimeError("broken")
    call = asyncio.get_running_loop().create_future()
    call.cancel()  # what an aborted batcher does with the calls that it still has
    return await call


async def main():
    app = web.Application()
    app.add_routes([web.get("/first", first), web.get("/predict", predict), web.get("/broken", predict)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    logging.getLogger("aiohttp").addHandler(Lines())
    seen = {}
    for path in ("/predict", "/broken"):
        runs.clear(), logged.clear()
        async with aiohttp.ClientSession() as session:
            async with session.get(url + "/first") as answer:
                await answer.read()
            try:
                async with session.get(url + path) as answer:
                    outcome = answer.status
            except aiohttp.ServerDisconnectedError as error:
                outcome = type(error).__name__
        seen[path] = outcome, len(runs), len(logged)
        print(path, outcome, "runs", len(runs), "log lines", len(logged))
    await runner.cleanup()
    assert seen == {"/predict": ("ServerDisconnectedError", 2, 0), "/broken": (500, 1, 1)}


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
