#!/usr/bin/env bash
# Two gRPC servers take the same port, without an error, and each gets some of the requests.
#
# Version: grpcio 1.85.3 (grpc.aio), Python 3.11, Linux
# Guess: the second `add_insecure_port` of an address that is in use raises, as every other server of Python's does
# Behaviour: it returns the port and serves: on Linux gRPC sets SO_REUSEPORT by default, and the kernel deals connections
#   out among the processes, or servers of one, that have it. A second copy of a service, of another version or with
#   another model, started by mistake, answers part of the clients. With the option ("grpc.so_reuseport", 0) the second
#   raises RuntimeError.
# Seen: both listen on one port: True; of 40 connections both answered some; with the option: RuntimeError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.85.3

cat >"$dir/check.py" <<'PY'
import asyncio

import grpc


class Says(grpc.GenericRpcHandler):
    def __init__(self, word):
        self.word = word

    def service(self, details):
        async def answer(request, context):
            return self.word

        return grpc.unary_unary_rpc_method_handler(answer)


async def server(word, port, options=()):
    made = grpc.aio.server(options=options)
    made.add_generic_rpc_handlers((Says(word),))
    port = made.add_insecure_port(f"127.0.0.1:{port}")
    await made.start()
    return made, port


async def main():
    one, port = await server(b"one", 0)
    two, same = await server(b"two", port)
    answers = set()
    for _ in range(40):
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            answers.add(await channel.unary_unary("/x/y")(b""))
    await one.stop(0)
    await two.stop(0)
    alone = (("grpc.so_reuseport", 0),)
    one, port = await server(b"one", 0, alone)
    try:
        await server(b"two", port, alone)
        refused = None
    except RuntimeError as error:
        refused = type(error).__name__
    await one.stop(0)
    print("both listen on one port:", port is not None and same is not None, "answered:", sorted(answers), "with the option:", refused)
    assert answers == {b"one", b"two"}
    assert refused == "RuntimeError"


asyncio.run(main())
PY
GRPC_VERBOSITY=NONE "$dir/venv/bin/python" "$dir/check.py"
