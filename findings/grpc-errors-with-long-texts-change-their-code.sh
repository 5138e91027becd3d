#!/usr/bin/env bash
# A gRPC error with a long text reaches the client as another error, one that says: the server is full, come again.
# Library: grpcio 1.85.3, Python 3.11.
# Guess (from memory, before the first run): context.abort(INVALID_ARGUMENT, text of 20 KB) reaches the client as
#   INVALID_ARGUMENT, with the text, whole or cut.
# Happens: the text travels in the trailing metadata, of which a client takes 8 KB, and refuses more than 16 KB: the call
#   ends with RESOURCE_EXHAUSTED and "received metadata size exceeds hard limit", the server's code and text are lost.
# Who meets it: servers that put what they were given, a shape, a traceback, into the text; clients that repeat
#   RESOURCE_EXHAUSTED. Cut the text, or grpc.max_metadata_size at the client.
# Seen: 1,000 and 7,000 characters INVALID_ARGUMENT; 20,000 RESOURCE_EXHAUSTED; asyncio and threaded server alike
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'grpcio==1.85.3'

cat >"$dir/check.py" <<'PY'
import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc

METHOD = "/a.B/C"


async def abort(request, context):
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x" * int(request))


def abort_sync(request, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x" * int(request))


def serving(server, handler):
    handlers = {"C": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", handlers),))
    return f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"


def ask(address, size):
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(METHOD)(str(size).encode(), timeout=20)
        except grpc.RpcError as error:
            return error.code().name, len(error.details()), error.details()[:60]


async def main():
    aio = grpc.aio.server()
    sync = grpc.server(ThreadPoolExecutor(2))
    servers = {"aio": serving(aio, abort), "sync": serving(sync, abort_sync)}
    await aio.start()
    sync.start()
    seen = {}
    for name, address in servers.items():
        for size in (1_000, 7_000, 20_000):
            seen[name, size] = await asyncio.to_thread(ask, address, size)
            print(name, size, *seen[name, size])
    await aio.stop(None)
    sync.stop(None).wait()
    for (_, size), (code, length, text) in seen.items():
        assert (code, length) == ("INVALID_ARGUMENT", size) if size < 8_000 else code == "RESOURCE_EXHAUSTED", code
        assert size < 8_000 or "metadata size exceeds" in text


asyncio.run(main())
PY
"$dir/venv/bin/python" "$dir/check.py"
