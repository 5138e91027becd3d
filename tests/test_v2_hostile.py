"""The Open Inference Protocol before people who mean no good, and at its end."""

import asyncio
import contextlib
import json

import aiohttp
import grpc
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from starlette.applications import Starlette
from starlette.testclient import TestClient as StarletteClient

import aneuron
from aneuron.testing import PuppetBackend, settle
from aneuron.web import aiohttp as of_aiohttp
from aneuron.web import starlette as of_starlette
from aneuron.web.v2 import grpc as over_grpc
from aneuron.web.v2 import http
from aneuron.web.v2 import starlette as v2_starlette
from aneuron.web.v2.aiohttp import routes
from aneuron.web.v2.errors import Refused
from aneuron.web.v2.grpc import GrpcServer
from aneuron.web.v2.messages import SERVICE, message
from aneuron.web.v2.models import Models
from aneuron.web.v2.requests import Inference, Terms

REQUEST = {"inputs": [{"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]}


def net(model=None, **options):
    defaults = {"backend": "cpu", "example_inputs": torch.zeros(1, 2)}
    return aneuron.AsyncDataParallel(model or torch.nn.ReLU().eval(), **defaults | options)


def asked(name="net", request_id=""):
    made = message("ModelInferRequest")(model_name=name, id=request_id, raw_input_contents=[bytes(8)])
    made.inputs.add(name="input0", datatype="FP32", shape=[1, 2])
    return made.SerializeToString()


@contextlib.asynccontextmanager
async def over_http(model):
    app = web.Application()
    app.add_routes(routes(net=model))
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with model, aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield session
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def method(server, name="ModelInfer", stream=False):
    address = f"127.0.0.1:{await server.listen('127.0.0.1:0')}"
    async with grpc.aio.insecure_channel(address) as channel:
        yield (channel.stream_stream if stream else channel.unary_unary)(f"/{SERVICE}/{name}")


async def test_who_drains_an_application_is_not_ready_by_the_protocol_either():
    one, other = net(), net()  # of a loop each
    by_aiohttp, by_starlette = (
        web.Application(),
        Starlette(routes=v2_starlette.routes(net=other), lifespan=of_starlette.lifespan(net=other)),
    )
    of_aiohttp.setup(by_aiohttp, net=one)
    by_aiohttp.add_routes(routes(net=one))
    of_starlette.install(by_starlette, net=other)
    async with TestClient(TestServer(by_aiohttp)) as session:
        with StarletteClient(by_starlette) as client:
            for path in ("/v2/health/ready", "/v2/models/net/ready"):
                assert (await session.get(path)).status == client.get(path).status_code == 200
            of_aiohttp.drain(by_aiohttp)
            of_starlette.drain(by_starlette)
            for path in ("/v2/health/ready", "/v2/models/net/ready"):
                assert (await session.get(path)).status == client.get(path).status_code == 503
            assert (await session.post("/v2/models/net/infer", json=REQUEST)).status == 200


async def test_what_is_not_compressed_is_the_clients_fault_with_aiohttp_too():
    async with over_http(net()) as session:
        for coding in ("gzip", "deflate"):
            headers = {"Content-Encoding": coding}
            async with session.post("/v2/models/net/infer", data=b"no such thing", headers=headers) as response:
                assert response.status == 400


async def test_a_model_that_loses_a_connection_of_its_own_is_a_fault_like_any():
    def lost(x):
        if x.any():
            raise ConnectionResetError("to some database")
        return x

    async with over_http(net(lost)) as session, session.post("/v2/models/net/infer", json=REQUEST) as response:
        assert (response.status, await response.json()) == (500, {"error": "The model could not answer."})


@pytest.mark.parametrize("name", ["ModelInfer", "ModelMetadata", "RepositoryModelLoad"])
async def test_what_is_no_message_is_the_clients_fault(name):
    async with net() as model, GrpcServer(net=model) as server, method(server, name) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"no {name}Request" in caught.value.details()


async def test_what_is_no_message_ends_no_other_of_its_stream():
    streamed = message("ModelStreamInferResponse")
    async with net() as model, GrpcServer(net=model) as server, method(server, "ModelStreamInfer", True) as call:
        answers = call(iter([asked(request_id="1"), b"\xff\xff\xff", asked(request_id="2")]))
        found = [streamed.FromString(each) async for each in answers]
    assert sorted((each.infer_response.id, bool(each.error_message)) for each in found) == [
        ("", True), ("1", False), ("2", False),
    ]  # fmt: skip


class Context:
    def time_remaining(self):
        return None


async def test_of_a_client_that_reads_nothing_nothing_more_is_read(monkeypatch):
    monkeypatch.setattr(over_grpc, "_STREAMED", 4)
    read = []

    async def requests():
        for number in range(20):
            read.append(number)
            yield asked()

    async with net() as model:
        answers = over_grpc._Handlers(Models(GrpcServer, {"net": model}))._stream(requests(), Context())
        first = await anext(answers)
        while model.statistics().calls.completed < 4:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert first is not None
        assert len(read) == 5  # the fifth waits for room
        assert len([each async for each in answers]) == 19


async def test_a_server_that_closes_answers_what_it_has():
    backend = PuppetBackend(cores=1)
    model = net(backend=backend, example_inputs=None, batch_size=1)
    one = aneuron.TensorSpec("input0", torch.float32, (-1, 2))
    async with (
        model,
        GrpcServer(net=model, signatures={"net": aneuron.Signature((one,))}) as server,
        method(server) as call,
    ):
        waiting = asyncio.ensure_future(call(asked()))
        core = backend[0]
        while core.executing is None:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(server.aclose())
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not waiting.done()
        core.release()
        assert await waiting
        await closing


async def test_one_server_listens_once():
    async with net() as model, GrpcServer(net=model) as server:
        await server.listen("127.0.0.1:0")
        with pytest.raises(RuntimeError, match="listens already"):
            await server.listen("127.0.0.1:0")


async def test_much_work_is_a_threads(monkeypatch):
    """By what there is to read and to write, whatever it is made of."""
    seen = []
    inline = http.aside

    async def aside(function):
        seen.append(function)
        return await inline(function)

    monkeypatch.setattr(http, "aside", aside)
    texts = net(lambda texts: texts, example_inputs=aneuron.Rows(["a", "b"]))
    many = {"name": "input0", "shape": [8], "datatype": "BYTES", "data": ["0123456789" * 5_000] * 8}
    async with over_http(texts) as session:
        async with session.post("/v2/models/net/infer", data=json.dumps({"inputs": [many]})) as response:
            assert response.status == 200
        assert len(seen) == 2
        few = {"inputs": [many | {"shape": [2], "data": ["a", "b"]}]}
        async with session.post("/v2/models/net/infer", json=few) as response:
            assert (await response.json())["outputs"][0]["data"] == ["a", "b"]
        assert len(seen) == 2  # no more of them


@contextlib.asynccontextmanager
async def filled(model, backend):
    """While it has no room for a call."""
    calls = [asyncio.ensure_future(model(torch.zeros(1, 2))) for _ in range(2)]
    await settle()
    yield
    while not all(call.done() for call in calls):
        backend[0].release()
        await settle()


async def test_a_full_queue_is_said_before_a_large_body_is_read():
    backend = PuppetBackend(cores=1)
    model = net(backend=backend, batch_size=1, max_pending=1)
    async with over_http(model) as session, filled(model, backend):
        reader, writer = await asyncio.open_connection(session._base_url.host, session._base_url.port)
        writer.write(b"POST /v2/models/net/infer HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000\r\n\r\n")
        said = await reader.readuntil(b"\r\n\r\n")  # of the body not a byte has been sent
        writer.close()
    assert said.startswith(b"HTTP/1.1 503")
    assert b"retry-after" in said.lower()


async def test_a_full_queue_is_said_before_a_large_body_is_read_by_starlette():
    sent = []

    async def receive():
        raise AssertionError("of the body nothing is to be read")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v2/models/net/infer"}
    scope["headers"] = [(b"content-length", b"1000000")]
    backend = PuppetBackend(cores=1)
    model = net(backend=backend, batch_size=1, max_pending=1)
    async with model, filled(model, backend):
        await v2_starlette.V2(Models(routes, {"net": model}))(scope, receive, send)
    assert sent[0]["status"] == 503


async def test_a_whole_input_is_each_callers_own():
    class Adds(torch.nn.Module):
        def forward(self, x, k):
            return x + k.sum()

    model = net(Adds().eval(), example_inputs=(torch.zeros(1, 2), aneuron.Shared(torch.zeros(2))), max_delay=0.05)

    def body(k):
        x = {"name": "input0", "datatype": "FP32", "shape": [2, 2], "data": [1, 1, 1, 1]}
        return {"inputs": [x, {"name": "input1", "datatype": "FP32", "shape": [2], "data": [k, k]}]}

    async with over_http(model) as session:
        answers = await asyncio.gather(*[session.post("/v2/models/net/infer", json=body(k)) for k in (1, 2, 3)])
        found = [(await answer.json())["outputs"][0]["data"] for answer in answers]
    assert found == [[1.0 + 2 * k] * 4 for k in (1, 2, 3)]


async def test_the_first_answer_has_the_names_of_the_others():
    class Names(torch.nn.Module):
        def forward(self, x):
            return {"a": x, "b": -x}

    said = (aneuron.TensorSpec("b", torch.float32, (-1, 2)), aneuron.TensorSpec("a", torch.float32, (-1, 2)))
    model = net(Names().eval())
    served = Models(routes, {"net": model}, {"net": aneuron.Signature(model.signature.inputs, said)}).find("net")
    asked_for = Inference("", [torch.ones(1, 2)], False, None, False, Terms())
    try:
        answers = [
            [(each.name, each.value.tolist()) for each in await served.infer(asked_for, model)] for _ in range(2)
        ]
        assert answers[0] == answers[1]
    finally:
        await model.aclose()


def test_what_strangers_write_into_headers_is_not_kept():
    for number in range(50):
        long = f"{number}{'x' * 100_000}"
        http.read_head({"accept-encoding": long}.get, 100)
        for name in ("content-encoding", "content-length", "inference-header-content-length"):
            with pytest.raises(Refused):
                http.read_head({name: long}.get, 100)
    before = http._head.cache_info().currsize
    http.read_head({"accept-encoding": f"gzip, br, {before}"}.get, 100)
    assert http._head.cache_info().currsize == before
