#!/usr/bin/env bash
# A grpc.aio handler that ends with CancelledError sends the client no status at all.
# Library: grpcio 1.85.3, Python 3.11.
# Guess: the client gets CANCELLED (or UNKNOWN, as for any other exception) at once.
# Happens: the server takes the error for a cancellation of the RPC and closes nothing: the client waits until its own
#   deadline. A TimeoutError gives UNKNOWN at once.
# Who meets it: a handler that awaits a call which somebody else cancels: a batcher that is aborted or shut down, a task
#   group that fails. Turn it into `context.abort(UNAVAILABLE)` unless `context.cancelled()`.
# Seen: CancelledError: DEADLINE_EXCEEDED after the client's 1 s; TimeoutError: UNKNOWN at once
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'grpcio==1.85.3'

cat >"$dir/check.py" <<'PY'
import asyncio

import grpc
import grpc.aio


def same(data):
    return data


async def cancelled(request, context):
    call = asyncio.get_running_loop().create_future()
    call.cancel()  # what an aborted batcher does with the calls that it still has
    return await call


async def timed_out(request, context):
    raise TimeoutError


async def main():
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(handler, same, same)
        for name, handler in {"cancelled": cancelled, "timed_out": timed_out}.items()
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("model", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        seen = {}
        for name in handlers:
            try:
                await channel.unary_unary("/model/" + name, same, same)(b"", timeout=1.0)
            except grpc.aio.AioRpcError as error:
                seen[name] = error.code()
    await server.stop(0)
    print(*(f"{name}: {code.name}" for name, code in seen.items()))
    assert seen["cancelled"] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert seen["timed_out"] is grpc.StatusCode.UNKNOWN


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
