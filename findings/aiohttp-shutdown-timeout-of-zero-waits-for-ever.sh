#!/usr/bin/env bash
# aiohttp's `shutdown_timeout=0` means for ever, and every other value is waited for twice while a handler hangs.
# Library: aiohttp 3.14.5, Python 3.11.
# Guess: 0: handlers are cancelled at once; 0.5: after half a second.
# Happens: the time is given to a context manager that takes 0 for no bound (so 0.001 ends a thousandth later, 0 never);
#   and cleanup waits it once for the handler, and once more before it cancels that.
# Who meets it: servers that are to end at once (tests, a second Ctrl-C, a supervisor's grace period that is spent), and
#   grace periods that were computed from shutdown_timeout.
# Seen: shutdown_timeout=0.001: cleanup ended; 0: it waits still after 2 s; 0.5: it took 1.0 s
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'aiohttp==3.14.5'

cat >"$dir/check.py" <<'PY'
import asyncio
import contextlib

import aiohttp
from aiohttp import web


async def cleanup(seconds):
    """How long `cleanup` takes while a handler hangs; None: longer than 2 s."""
    loop = asyncio.get_running_loop()
    hangs, begun = loop.create_future(), asyncio.Event()

    async def predict(request):
        begun.set()
        await hangs
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/predict", predict)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=seconds)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]

    async def ask():
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/predict"):
                pass

    client = asyncio.ensure_future(ask())
    await begun.wait()
    began = loop.time()
    ending = asyncio.ensure_future(runner.cleanup())
    await asyncio.wait([ending], timeout=2)
    took = loop.time() - began if ending.done() else None
    if not hangs.done():
        hangs.set_result(None)
    await asyncio.wait([ending, client])
    print(f"shutdown_timeout={seconds}: " + ("it waits still after 2 s" if took is None else f"{took:.1f} s"))
    return took


async def main():
    short, none, half = [await cleanup(seconds) for seconds in (0.001, 0, 0.5)]
    assert short is not None and short < 0.5
    assert none is None
    assert half is not None and 0.9 < half < 1.9


asyncio.run(main())
PY
"$dir/venv/bin/python" -W ignore "$dir/check.py"
