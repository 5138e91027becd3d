#!/usr/bin/env bash
# A handler of aiohttp's server finds "Content-Encoding: gzip" on a body that is no longer compressed.
#
# Version: aiohttp 3.14.5 (server), Python 3.11
# Guess: what the headers say holds for the body that the handler reads, as in ASGI servers; or what was decompressed has
#   lost the header
# Behaviour: the server has decompressed the body (gzip and deflate), and Content-Encoding and Content-Length are those of
#   what came over the wire. A handler that heeds the header, as one must that speaks a protocol with compressed requests
#   on any other server, fails on every such request; one that bounds bodies by Content-Length bounds the wrong number.
#   `handler_args={"auto_decompress": False}` of the application turns it off.
# Seen: header gzip, Content-Length of what was sent, body as before compression
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check aiohttp==3.14.5

cat >"$dir/check.py" <<'PY'
import asyncio
import gzip

from aiohttp import ClientSession, web

PLAIN = b"tensor " * 1000
SENT = gzip.compress(PLAIN)


async def handler(request):
    body = await request.read()
    headers = request.headers
    return web.json_response([headers["Content-Encoding"], int(headers["Content-Length"]), len(body)])


async def asked(**options):
    app = web.Application(**options)
    app.router.add_post("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession() as session:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        async with session.post(url, data=SENT, headers={"Content-Encoding": "gzip"}) as response:
            seen = await response.json()
    await runner.cleanup()
    return seen


by_default = asyncio.run(asked())
off = asyncio.run(asked(handler_args={"auto_decompress": False}))
print("header, length that it says, length of the body:", by_default, "turned off:", off)
assert by_default == ["gzip", len(SENT), len(PLAIN)]
assert off == ["gzip", len(SENT), len(SENT)]
PY
"$dir/venv/bin/python" "$dir/check.py"
