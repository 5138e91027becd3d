#!/usr/bin/env bash
# context.time_remaining() of a call without a deadline: None in the asyncio server, a number in the other one.
# Library: grpcio 1.85.3, Python 3.11.
# Guess (from memory, before the first run): None in both, as the docstring of both says.
# Happens: the threaded server takes the time now from a deadline that is the largest number of seconds: 9.2e18, where its
#   docstring promises None.
# Who meets it: servers that pass the deadline on: `if remaining is None` never holds, and
#   `lock.acquire(timeout=remaining)` raises OverflowError.
# Seen: with 20 s both 19.99; without aio None, threads 9.223372035058849e+18; threading.Lock().acquire: OverflowError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'grpcio==1.85.3'

cat >"$dir/check.py" <<'PY'
import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

seen = {}


async def remaining(request, context):
    seen["aio", request] = context.time_remaining()
    return b""


def remaining_sync(request, context):
    seen["sync", request] = context.time_remaining()
    return b""


def serving(server, handler):
    handlers = {"C": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", handlers),))
    return f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"


def ask(address):
    with grpc.insecure_channel(address) as channel:
        channel.unary_unary("/a.B/C")(b"20 s", timeout=20)
        channel.unary_unary("/a.B/C")(b"none")


async def main():
    aio, sync = grpc.aio.server(), grpc.server(ThreadPoolExecutor(2))
    servers = serving(aio, remaining), serving(sync, remaining_sync)
    await aio.start()
    sync.start()
    for address in servers:
        await asyncio.to_thread(ask, address)
    await aio.stop(None)
    sync.stop(None).wait()
    for which, value in seen.items():
        print(*which, value)
    assert seen["aio", b"none"] is None
    assert seen["sync", b"none"] > 1e18
    try:
        threading.Lock().acquire(timeout=seen["sync", b"none"])
    except OverflowError as error:
        print("OverflowError:", error)
    else:
        raise SystemExit("a lock takes it for a timeout")


asyncio.run(main())
PY
"$dir/venv/bin/python" "$dir/check.py"
