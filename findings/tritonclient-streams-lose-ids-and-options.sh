#!/usr/bin/env bash
# Two things that streams of tritonclient's gRPC clients lose: whose an error is, and an option of the other client.
#
# Version: tritonclient 2.73.0, grpcio 1.85.3, Python 3.11
# Guess: an error in a stream says which request it is of, as answers do, by its id, which the server sends with it; and
#   the request of `stream_infer` of the asyncio client takes what `async_stream_infer` of the other one takes
# Behaviour: ModelStreamInferResponse has an error and a response with the id; where there is an error the clients pass
#   `None` for the response, and an exception without the id: of several requests in a stream nobody can say which failed.
#   `enable_empty_final_response` is an argument of the synchronous client, and sends a parameter; in the asyncio client's
#   request the same key is taken and ignored.
# Seen: result None, no id in the exception; parameter sent by the synchronous client only
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check 'tritonclient[grpc]==2.73.0' grpcio==1.85.3

cat >"$dir/check.py" <<'PY'
import asyncio
import queue

import grpc
import numpy as np
import tritonclient.grpc as sync
import tritonclient.grpc.aio as aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

sent = []


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    async def ModelStreamInfer(self, requests, context):
        async for request in requests:
            sent.append(sorted(request.parameters))
            answer = service_pb2.ModelInferResponse(model_name="net", id=request.id)
            yield service_pb2.ModelStreamInferResponse(error_message="no", infer_response=answer)


def row():
    made = sync.InferInput("x", [1], "FP32")
    made.set_data_from_numpy(np.zeros(1, np.float32))
    return made


def by_sync(address):
    client, ready = sync.InferenceServerClient(address), queue.Queue()
    client.start_stream(lambda result, error: ready.put((result, error)))
    client.async_stream_infer("net", [row()], request_id="seven", enable_empty_final_response=True)
    seen = ready.get(timeout=20)
    client.stop_stream()
    return seen


async def by_aio(address):
    async def requests():
        yield {"model_name": "net", "inputs": [row()], "request_id": "seven", "enable_empty_final_response": True}

    async with aio.InferenceServerClient(address) as client:
        return [each async for each in client.stream_infer(requests())][0]


async def main():
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    seen = [await asyncio.to_thread(by_sync, address), await by_aio(address)]
    await server.stop(0)
    said = [(result is None, "seven" in f"{error!r} {error} {vars(error)}") for result, error in seen]
    print("result is None, id in the error:", said, "parameters sent:", sent)
    assert said == [(True, False), (True, False)]
    assert sent == [["triton_enable_empty_final_response"], []]


asyncio.run(main())
PY
"$dir/venv/bin/python" "$dir/check.py"
