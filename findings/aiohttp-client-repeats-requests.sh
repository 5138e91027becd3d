#!/usr/bin/env bash
# aiohttp's client sends a GET, PUT or DELETE again by itself when a kept connection drops without an answer.
# Library: aiohttp 3.14.5, httpx 0.28.1, Python 3.11.
# Guess: ServerDisconnectedError, and the caller decides; httpx does so.
# Happens: for idempotent methods on a connection that was used before, the request is repeated once on a new connection.
#   A server that fails while it computes (or closes to shed load) gets the work twice, and the client sees one slow
#   success. POST is not repeated.
# Who meets it: GET or PUT endpoints that run a model; counts of requests that do not match those of the callers.
# Seen: GET, PUT, DELETE arrived 2 times, status 200; POST 1 time, ServerDisconnectedError; httpx GET 1 time, error
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'aiohttp==3.14.5' 'httpx==0.28.1'

cat >"$dir/check.py" <<'PY'
import asyncio

import aiohttp
import httpx

arrived = []


async def serve(reader, writer):
    for number in (1, 2):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        arrived.append(head.split()[1].decode())
        if number == 2:  # fails on its second request, before any answer
            break
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    seen = {}
    for method in ("GET", "PUT", "DELETE", "POST"):
        arrived.clear()
        async with aiohttp.ClientSession() as session:
            async with session.get(url + "/first") as answer:
                await answer.read()
            try:
                async with session.request(method, url + "/model") as answer:
                    seen[method] = arrived.count("/model"), answer.status
            except aiohttp.ServerDisconnectedError:
                seen[method] = arrived.count("/model"), "error"
    arrived.clear()
    async with httpx.AsyncClient() as client:
        await client.get(url + "/first")
        try:
            await client.get(url + "/model")
        except httpx.RemoteProtocolError:
            seen["httpx GET"] = arrived.count("/model"), "error"
    server.close()
    print(seen)
    assert seen == {
        "GET": (2, 200), "PUT": (2, 200), "DELETE": (2, 200), "POST": (1, "error"), "httpx GET": (1, "error")
    }


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
