"""What real clients of the Open Inference Protocol see: `python v2_clients.py triton|kserve PORTS`, JSON on its output.

A cell is a client and what it does; "ok", or what went wrong. Each client has the same interface here, so that all do
the same; a client that cannot do something says "unsupported" and why.
"""

import asyncio
import contextlib
import json
import sys
import traceback
import urllib.request

import ml_dtypes
import numpy as np

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BF16": ml_dtypes.bfloat16, "BYTES": object,
}  # fmt: skip


# What clients say that refuse something themselves.
REFUSALS = (
    "BF16 inputs must be sent as binary",
    "Sending FP16 data via JSON is not supported",
    "invalid input datatype",
)


class Unsupported(Exception):
    """The client itself refuses it."""


def sample(datatype, rows=2):
    if datatype == "BYTES":
        return np.array([b"one", "zw\u00f6lf".encode()][:rows], dtype=object)
    if datatype == "BOOL":
        return np.array([[True, False, True]] * rows).reshape(rows, 3)
    kind = np.dtype(NUMPY[datatype])
    top = np.iinfo(kind).max if kind.kind in "iu" else 1.5
    low = np.iinfo(kind).min if kind.kind in "iu" else -2.0
    return np.array([[low, top, 1]] * rows, dtype=kind).reshape(rows, 3)


class TritonHttp:
    name = "triton http"

    def __init__(self, ports):
        import tritonclient.http as module

        self.module, self.ports = module, ports
        self.client = module.InferenceServerClient(
            f"127.0.0.1:{ports['starlette']}", concurrency=50, network_timeout=60
        )

    def inputs(self, arrays, datatypes, binary):
        made = []
        for name, array in arrays.items():
            one = self.module.InferInput(name, list(array.shape), datatypes[name])
            one.set_data_from_numpy(array, binary_data=binary)
            made.append(one)
        return made

    async def infer(self, model, arrays, datatypes, binary=True, compression=None, outputs=None, request_id=""):
        wanted = [self.module.InferRequestedOutput(name, binary_data=binary) for name in outputs or ()]
        result = self.client.infer(
            model, self.inputs(arrays, datatypes, binary), outputs=wanted or None, request_id=request_id,
            request_compression_algorithm=compression, response_compression_algorithm=compression,
        )  # fmt: skip
        return self.read(result, request_id)

    def read(self, result, request_id):
        response = result.get_response()
        assert response.get("id", "") == request_id, response
        return {each["name"]: result.as_numpy(each["name"]) for each in response["outputs"]}

    async def ready(self, model):
        return self.client.is_server_live() and self.client.is_server_ready() and self.client.is_model_ready(model)

    async def described(self, model):
        client = self.client
        shared = client.get_model_metadata(model), client.get_model_config(model)
        return *shared, client.get_inference_statistics(model), client.get_model_repository_index()

    async def load(self, model):
        self.client.load_model(model)

    async def streamed(self):
        raise Unsupported("streams are gRPC's")

    async def shared_memory(self):
        self.client.register_system_shared_memory("region", "/region", 16)

    async def cancelled(self):
        import gevent

        waiting = gevent.spawn(self.client.infer, "slow", self.inputs({"input0": sample("FP32", 1)}, FP32, True))
        gevent.sleep(0.05)
        waiting.kill()
        self.client.close()
        self.client = self.module.InferenceServerClient(f"127.0.0.1:{self.ports['starlette']}", concurrency=50)

    async def many(self, count):
        asked = [
            (row, self.client.async_infer("FP32", self.inputs({"input0": row}, FP32, True))) for row in rows_of(count)
        ]
        for row, result in asked:
            assert (result.get_result().as_numpy("output0") == row).all()

    def status(self, error):
        return str(error.status())

    async def close(self):
        self.client.close()


class TritonHttpAio(TritonHttp):
    name, server = "triton http.aio", "starlette"

    def __init__(self, ports):
        import tritonclient.http.aio as module

        self.module, self.ports = module, ports
        self.client = module.InferenceServerClient(f"127.0.0.1:{ports[self.server]}", conn_limit=200)

    async def infer(self, model, arrays, datatypes, binary=True, compression=None, outputs=None, request_id=""):
        wanted = [self.module.InferRequestedOutput(name, binary_data=binary) for name in outputs or ()]
        result = await self.client.infer(
            model, self.inputs(arrays, datatypes, binary), outputs=wanted or None, request_id=request_id,
            request_compression_algorithm=compression, response_compression_algorithm=compression,
        )  # fmt: skip
        return self.read(result, request_id)

    async def ready(self, model):
        client = self.client
        return await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready(model)

    async def described(self, model):
        client = self.client
        shared = await client.get_model_metadata(model), await client.get_model_config(model)
        return *shared, await client.get_inference_statistics(model), await client.get_model_repository_index()

    async def load(self, model):
        await self.client.load_model(model)

    async def shared_memory(self):
        await self.client.register_system_shared_memory("region", "/region", 16)

    async def cancelled(self):
        await cancel(self.infer("slow", {"input0": sample("FP32", 1)}, FP32))

    async def many(self, count):
        await all_at_once(self, count)

    async def close(self):
        await self.client.close()


class TritonHttpAioOnAiohttp(TritonHttpAio):
    name, server = "triton http.aio, aiohttp", "aiohttp"


class TritonGrpc(TritonHttp):
    name = "triton grpc"

    def __init__(self, ports):
        import tritonclient.grpc as module

        self.module, self.ports = module, ports
        self.client = module.InferenceServerClient(f"127.0.0.1:{ports['grpc']}")

    def inputs(self, arrays, datatypes, binary):
        if not binary:
            raise Unsupported("gRPC has no JSON")
        made = []
        for name, array in arrays.items():
            one = self.module.InferInput(name, list(array.shape), datatypes[name])
            one.set_data_from_numpy(array)
            made.append(one)
        return made

    def request(self, arrays, datatypes, binary, compression, outputs, request_id):
        wanted = [self.module.InferRequestedOutput(name) for name in outputs or ()]
        made = {"inputs": self.inputs(arrays, datatypes, binary), "outputs": wanted or None, "request_id": request_id}
        return made | ({"compression_algorithm": compression} if compression else {})

    async def infer(self, model, arrays, datatypes, binary=True, compression=None, outputs=None, request_id=""):
        request = self.request(arrays, datatypes, binary, compression, outputs, request_id)
        return self.read(self.client.infer(model, **request), request_id)

    def read(self, result, request_id):
        response = result.get_response()
        assert response.id == request_id, response
        return {each.name: result.as_numpy(each.name) for each in response.outputs}

    async def described(self, model):
        client, json = self.client, {"as_json": True}
        config = client.get_model_config(model, **json)["config"]
        index = client.get_model_repository_index(**json)["models"]
        return client.get_model_metadata(model, **json), config, client.get_inference_statistics(model, **json), index

    async def cancelled(self):
        inputs = self.inputs({"input0": sample("FP32", 1)}, FP32, True)
        context = self.client.async_infer("slow", inputs, lambda result, error: None)
        await asyncio.sleep(0.05)
        context.cancel()

    async def many(self, count):
        import queue

        ready, wanted = queue.Queue(), {}
        for number, row in enumerate(rows_of(count)):
            wanted[str(number)] = row
            self.client.async_infer(
                "FP32", self.inputs({"input0": row}, FP32, True), lambda result, error: ready.put((result, error)),
                request_id=str(number),
            )  # fmt: skip
        for _ in range(count):
            result, error = ready.get(timeout=60)
            assert error is None, error
            assert (result.as_numpy("output0") == wanted.pop(result.get_response().id)).all()

    async def streamed(self):
        import queue

        ready = queue.Queue()
        self.client.start_stream(lambda result, error: ready.put((result, error)))
        for number in range(3):
            inputs = self.inputs({"input0": sample("FP32", 1)}, FP32, True)
            self.client.async_stream_infer(
                "slow" if number == 0 else "FP32", inputs, request_id=str(number), enable_empty_final_response=True
            )
        self.client.async_stream_infer("nobody", inputs, request_id="3")
        answers = check_streamed([ready.get(timeout=30) for _ in range(4)])
        assert all(each.parameters["triton_final_response"].bool_param for each in answers)


class TritonGrpcAio(TritonGrpc):
    name = "triton grpc.aio"

    def __init__(self, ports):
        import tritonclient.grpc.aio as module

        self.module, self.ports = module, ports
        self.client = module.InferenceServerClient(f"127.0.0.1:{ports['grpc']}")

    async def infer(self, model, arrays, datatypes, binary=True, compression=None, outputs=None, request_id=""):
        request = self.request(arrays, datatypes, binary, compression, outputs, request_id)
        return self.read(await self.client.infer(model, **request), request_id)

    ready, load, close = TritonHttpAio.ready, TritonHttpAio.load, TritonHttpAio.close
    cancelled, many, shared_memory = TritonHttpAio.cancelled, TritonHttpAio.many, TritonHttpAio.shared_memory

    async def described(self, model):
        client, json = self.client, {"as_json": True}
        config = (await client.get_model_config(model, **json))["config"]
        index = (await client.get_model_repository_index(**json))["models"]
        statistics = await client.get_inference_statistics(model, **json)
        return await client.get_model_metadata(model, **json), config, statistics, index

    async def streamed(self):
        async def requests():
            for number in range(4):
                model = ("slow", "FP32", "FP32", "nobody")[number]
                inputs = self.inputs({"input0": sample("FP32", 1)}, FP32, True)
                yield {"model_name": model, "inputs": inputs, "request_id": str(number)}

        check_streamed([each async for each in self.client.stream_infer(requests())])


def check_streamed(answers):
    """Those that are ready first come first, and an error is one of them."""
    ids = [result.get_response().id for result, error in answers if error is None]
    errors = [str(error) for _, error in answers if error is not None]
    assert sorted(ids) == ["0", "1", "2"], ids
    assert ids[-1] == "0", ids
    assert len(errors) == 1, errors
    assert "nobody" in errors[0], errors
    return [result.get_response() for result, error in answers if error is None]


class KserveRest:
    name = "kserve rest"

    def __init__(self, ports):
        import kserve

        self.kserve, self.base = kserve, f"http://127.0.0.1:{ports['starlette']}"
        self.client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=60))

    def request(self, model, arrays, datatypes, binary, compression, outputs, request_id):
        if compression:
            raise Unsupported("the client cannot compress requests")
        made = []
        for name, array in arrays.items():
            one = self.kserve.InferInput(name, list(array.shape), datatypes[name])
            try:
                one.set_data_from_numpy(array, binary_data=binary)
            except Exception as error:
                raise Unsupported(f"the client refuses it: {error}") from error
            made.append(one)
        from kserve.protocol.infer_type import RequestedOutput

        wanted = [RequestedOutput(name, {"binary_data": binary}) for name in outputs or ()]
        return self.kserve.InferRequest(
            model, made, request_id or "an id", parameters=None if wanted else {"binary_data_output": binary},
            request_outputs=wanted or None,
        )  # fmt: skip

    async def infer(self, model, arrays, datatypes, binary=True, compression=None, outputs=None, request_id=""):
        request = self.request(model, arrays, datatypes, binary, compression, outputs, request_id)
        result = await self.client.infer(self.base, request, model_name=model)
        assert result.id == (request_id or "an id"), result.id
        return {each.name: each.as_numpy() for each in result.outputs}

    async def ready(self, model):
        client, base = self.client, self.base
        live = await client.is_server_live(base)
        return live and await client.is_server_ready(base) and await client.is_model_ready(base, model)

    async def described(self, model):
        raise Unsupported("the client asks for neither metadata nor statistics")

    async def load(self, model):
        raise Unsupported("the client cannot load models")

    async def shared_memory(self):
        raise Unsupported("the client has no shared memory")

    async def streamed(self):
        raise Unsupported("the client has no streams")

    async def cancelled(self):
        await cancel(self.infer("slow", {"input0": sample("FP32", 1)}, FP32))

    async def many(self, count):
        others = [KserveRest({"starlette": self.base.rpartition(":")[2]}) for _ in range(10)]  # one waits on itself
        await asyncio.gather(*[all_at_once(other, count // 10) for other in others])
        for other in others:
            await other.close()

    def status(self, error):
        return str(error.response.status_code)

    async def close(self):
        await self.client.close()


class KserveGrpc(KserveRest):
    name = "kserve grpc"

    def __init__(self, ports):
        import kserve

        self.kserve = kserve
        self.client = kserve.InferenceGRPCClient(f"127.0.0.1:{ports['grpc']}")

    async def infer(self, model, arrays, datatypes, binary=True, compression=None, outputs=None, request_id=""):
        if outputs:
            raise Unsupported("the client's requests name no outputs")
        request = self.request(model, arrays, datatypes, binary, compression, None, request_id)
        request.parameters = {}
        result = await self.client.infer(request)
        assert result.id == (request_id or "an id"), result.id
        return {each.name: each.as_numpy() for each in result.outputs}

    async def ready(self, model):
        client = self.client
        return await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready(model)

    async def many(self, count):
        await all_at_once(self, count)

    def status(self, error):
        return str(error.code())


FP32 = {"input0": "FP32"}


def rows_of(count):
    return [np.array([[number, 0, -number]], dtype=np.float32) for number in range(count)]


async def cancel(awaitable):
    task = asyncio.ensure_future(awaitable)
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def all_at_once(client, count):
    rows = rows_of(count)
    answers = await asyncio.gather(*[client.infer("FP32", {"input0": row}, FP32) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        assert (answer["output0"] == row).all(), (row, answer)


async def status_of(client, awaitable):
    """What the client says of a request that is not answered."""
    try:
        return await awaitable
    except Unsupported:
        raise
    except Exception as error:
        return client.status(error)


async def refused(client, statuses, model, arrays, datatypes):
    assert await status_of(client, client.infer(model, arrays, datatypes)) in statuses


def equal(datatype, given, answer, binary):
    if datatype == "BYTES":
        decoded = [each if isinstance(each, bytes) else each.encode() for each in answer.tolist()]
        assert decoded == given.tolist(), answer
        return
    assert answer.shape == given.shape, (answer.shape, given.shape)
    assert (answer.astype(np.float64) == given.astype(np.float64)).all(), answer
    assert (answer == given).all(), answer


BAD = ("400", "StatusCode.INVALID_ARGUMENT")


async def of_datatype(client, datatype, binary):
    given = sample(datatype)
    answer = await client.infer(datatype, {"input0": given}, {"input0": datatype}, binary=binary)
    equal(datatype, given, answer["output0"], binary)


async def zero_rows(client, binary):
    given = np.zeros((0, 3), np.float32)
    answer = await client.infer("FP32", {"input0": given}, FP32, binary=binary)
    assert answer["output0"].shape == (0, 3), answer


async def zero_rows_of_bytes(client):
    given = np.zeros((0,), object)
    answer = await client.infer("BYTES", {"input0": given}, {"input0": "BYTES"})
    assert answer["output0"].shape == (0,), answer


async def two_inputs(client, outputs):
    ids = np.array([[1, 2], [3, 4]], dtype=np.int64)
    types = {"ids": "INT64", "mask": "INT64"}
    answer = await client.infer("two", {"mask": ids * 10, "ids": ids}, types, outputs=outputs, request_id="seven")
    assert list(answer) == (outputs or ["sum", "texts"]), answer
    assert (answer["sum"] == ids * 11).all(), answer


async def described(client):
    metadata, config, statistics, index = await client.described("two")
    assert [each["name"] for each in metadata["inputs"]] == ["ids", "mask"], metadata
    assert [each["datatype"] for each in metadata["outputs"]] == ["INT64", "BYTES"], metadata
    assert list(map(int, metadata["inputs"][0]["shape"])) == [-1, 2], metadata
    assert [each["data_type"] for each in config["output"]] == ["TYPE_INT64", "TYPE_STRING"], config
    assert statistics["model_stats"][0]["name"] == "two", statistics
    assert {each["name"]: each["state"] for each in index}["two"] == "READY", index


async def is_ready(client):
    assert await client.ready("two")


async def not_there(client):
    assert await status_of(client, client.ready("nobody")) in (False, "404", "StatusCode.NOT_FOUND")


async def cancellation(client, ports):
    before = seen(ports)
    busy = [asyncio.ensure_future(aside(ports)) for _ in range(2)]  # so that what is cancelled waits
    await asyncio.sleep(0.02)
    await client.cancelled()
    for _ in range(200):
        if seen(ports) > before:
            break
        await asyncio.sleep(0.01)
    assert seen(ports) == before + 1, (before, seen(ports))
    await asyncio.gather(*busy)


def seen(ports):
    with urllib.request.urlopen(f"http://127.0.0.1:{ports['starlette']}/cancelled") as answer:
        return json.load(answer)


async def aside(ports):
    """One request that keeps the slow model busy."""
    body = {"inputs": [{"name": "input0", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}]}
    reader, writer = await asyncio.open_connection("127.0.0.1", ports["starlette"])
    data = json.dumps(body).encode()
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + data)
    assert b"200 OK" in await reader.read()
    writer.close()


def cells(ports):
    """What every client does, by name."""
    made = {}
    for datatype in NUMPY:
        made[datatype] = lambda client, datatype=datatype: of_datatype(client, datatype, True)
        made[f"{datatype} in JSON"] = lambda client, datatype=datatype: of_datatype(client, datatype, False)
    for name in ("gzip", "deflate"):
        made[name] = lambda client, name=name: client.infer("FP32", {"input0": sample("FP32")}, FP32, compression=name)
    wide, narrow = np.zeros((1, 4), np.float32), np.zeros((3,), np.float32)
    ids, large = np.zeros((1, 2), np.int64), np.zeros((90_000, 3), np.float32)
    return made | {
        "ready": is_ready,
        "unknown model, ready": not_there,
        "described": described,
        "zero rows": lambda client: zero_rows(client, True),
        "zero rows in JSON": lambda client: zero_rows(client, False),
        "zero rows of BYTES": zero_rows_of_bytes,
        "all outputs": lambda client: two_inputs(client, None),
        "an output": lambda client: two_inputs(client, ["sum"]),
        "outputs in another order": lambda client: two_inputs(client, ["texts", "sum"]),
        "missing input": lambda client: refused(client, BAD, "two", {"ids": ids}, {"ids": "INT64"}),
        "unknown input": lambda client: refused(client, BAD, "FP32", {"x": wide[:, :3]}, {"x": "FP32"}),
        "wrong shape": lambda client: refused(client, BAD, "FP32", {"input0": wide}, FP32),
        "wrong rank": lambda client: refused(client, BAD, "FP32", {"input0": narrow}, FP32),
        "wrong datatype": lambda client: refused(client, BAD, "FP32", {"input0": ids}, {"input0": "INT64"}),
        "unknown model": lambda client: refused(
            client, ("404", "StatusCode.NOT_FOUND"), "nobody", {"input0": sample("FP32")}, FP32
        ),
        "too large": lambda client: refused(
            client, ("413", "StatusCode.RESOURCE_EXHAUSTED"), "FP32", {"input0": large}, FP32
        ),
        "load": lambda client: client.load("two"),
        "shared memory": lambda client: unsupported_there(client),
        "cancellation": lambda client: cancellation(client, ports),
        "stream": lambda client: client.streamed(),
        "1,000 at once": lambda client: client.many(1000),
    }  # fmt: skip


async def unsupported_there(client):
    assert await status_of(client, client.shared_memory()) in ("501", "StatusCode.UNIMPLEMENTED")


CLIENTS = {
    "triton": (TritonHttp, TritonHttpAio, TritonHttpAioOnAiohttp, TritonGrpc, TritonGrpcAio),
    "kserve": (KserveRest, KserveGrpc),
}


async def main(which, ports):
    """By cell, what became of it."""
    found = {}
    for kind in CLIENTS[which]:
        client = kind(ports)
        table = cells(ports)
        for name, cell in table.items():
            try:
                await cell(client)
                found[f"{kind.name}: {name}"] = "ok"
            except Exception as error:
                if not isinstance(error, Unsupported) and not any(each in str(error) for each in REFUSALS):
                    found[f"{kind.name}: {name}"] = traceback.format_exc()
                    continue
                found[f"{kind.name}: {name}"] = f"unsupported: {error}"
        await client.close()
    return found


if __name__ == "__main__":
    import importlib

    importlib.import_module("tritonclient.grpc" if sys.argv[1] == "triton" else "kserve")
    importlib.import_module("aneuron.web.v2.grpc")  # whose messages have the names of the client's
    print(json.dumps(asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))))
