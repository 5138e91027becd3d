"""`aneuron serve` on real sockets, and as a process with signals."""

import asyncio
import base64
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import types
from pathlib import Path

import aiohttp
import grpc
import pytest
import torch
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

import aneuron
from aneuron.serve.app import LAST, Service
from aneuron.serve.config import ConfigError, settings_of
from aneuron.serve.loading import make
from aneuron.testing import PuppetBackend, settle
from aneuron.web import lifecycle
from aneuron.web.v2.grpc import GrpcServer
from aneuron.web.v2.messages import message

ROOT = Path(__file__).parents[1]
NETS = """
import torch
import aneuron

FACTOR = {factor}

class Scale(torch.nn.Module):
    def forward(self, x):
        return x * FACTOR

net = Scale().eval()
backend = aneuron.SimulatedBackend(cores=2, service_time=0.005)

def make():
    return Scale().eval()
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Writes the module of the models with another factor."""

    def write(factor):
        (tmp_path / "serve_nets.py").write_text(NETS.format(factor=factor))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python knows a file by its second and size
    write(2)
    yield write
    sys.modules.pop("serve_nets", None)


NET = {"model": "serve_nets:net", "example_inputs": "1x2", "batch_size": 8}


class Running:
    """A service in this process, and a client of it."""

    def __init__(self, service, task, ports, session):
        self.service, self.task, self.session = service, task, session
        self.port, self.grpc_port = ports

    async def ask(self, path, method="GET", **options):
        async with self.session.request(method, path, **options) as response:
            return response.status, await response.read()

    async def infer(self, value, name="net"):
        tensor = {"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [value, value]}
        status, body = await self.ask(f"/v2/models/{name}/infer", "POST", json={"inputs": [tensor]})
        return status, json.loads(body)["outputs"][0]["data"][0] if status == 200 else json.loads(body)["error"]

    @contextlib.asynccontextmanager
    async def stub(self, method):
        """A raw method of the gRPC service: bytes to bytes."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            yield channel.unary_unary(f"/inference.GRPCInferenceService/{method}")


@contextlib.asynccontextmanager
async def serving(models=None, pools=None, made=None, **server):
    settings = settings_of({"server": {"http": 0, **server}, "models": models or {"net": NET}, "pools": pools or {}})
    service = Service(settings.server, make(settings) if made is None else made)
    listening = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(service.run(lambda *ports: listening.set_result(ports)))
    await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
    if not listening.done():
        await task
    ports = listening.result()
    scheme = "http" if "tls_cert" not in server else "https"
    try:
        async with aiohttp.ClientSession(f"{scheme}://127.0.0.1:{ports[0]}") as session:
            yield Running(service, task, ports, session)
    except BaseException:
        task.cancel()  # whatever it waits for
        await asyncio.wait([task])
        raise
    if not service._stopping.is_set():
        service.stop(at_once=True)
    await task


# What is served.


async def test_one_service_has_the_protocol_probes_metrics_and_console(nets):
    async with serving() as running:
        for path in ("/livez", "/readyz", "/v2/health/ready", "/v2/models/net"):
            assert (await running.ask(path))[0] == 200
        assert await running.infer(3.0) == (200, 6.0)
        _, metrics = await running.ask("/metrics")
        assert re.search(rb'aneuron_requests_total\{model="net",outcome="completed",pid="\d+"\} 1.0', metrics)
        assert b"process_resident_memory_bytes" in metrics
        status, page = await running.ask("/console")
        assert (status, page[:9].lower()) == (200, b"<!doctype")
        assert (await running.ask("/elsewhere"))[0] == 404


@pytest.mark.usefixtures("freezing")
async def test_the_garbage_collector_is_spared_while_it_serves(nets):
    async with serving():
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


async def test_who_waits_for_100_continue_gets_it(nets):
    body = json.dumps({"inputs": [{"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]}]}).encode()
    async with serving() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = "POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        writer.write((head % len(body)).encode())
        assert b" 100 " in await reader.readline()
        writer.write(body)
        assert await reader.readline() == b"\r\n"
        assert b" 200 " in await reader.readline()
        writer.close()


async def test_requests_have_deadlines(nets):
    backend = PuppetBackend(cores=1)
    async with serving(made=[puppets(backend)], max_timeout=0.01) as running:
        assert (await running.ask("/v2/models/net", headers={"X-Request-Timeout-Ms": "soon"}))[0] == 400
        first = asyncio.ensure_future(running.infer(1.0))
        while not running.service._models["net"].statistics().calls.running:
            await asyncio.sleep(0.001)
        assert (await running.infer(1.0))[0] == 504
        backend[0].release()
        await first


async def test_what_is_switched_off_is_not_there(nets):
    async with serving(metrics=False, console=False) as running:
        assert [(await running.ask(path))[0] for path in ("/metrics", "/console")] == [404, 404]


async def test_two_models_on_one_pool_over_http_and_grpc(nets):
    pools = {"cores": {"backend": "serve_nets:backend"}}
    models = {"a": {**NET, "pool": "cores"}, "b": {**NET, "model": "serve_nets:make", "pool": "cores", "weight": 3.0}}
    async with serving(models, pools, grpc=0) as running:
        assert await running.infer(1.0, "a") == await running.infer(1.0, "b") == (200, 2.0)
        async with running.stub("ServerReady") as ready:
            assert await ready(b"") == b"\x08\x01"
        a, b = running.service._models.values()
        assert a.pool is b.pool


async def test_large_bodies_are_refused_before_they_are_read(nets):
    async with serving(max_body=1000) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
        assert b" 413 " in await reader.readline()
        writer.close()
        assert await running.infer(3.0) == (200, 6.0)


async def test_each_start_and_the_address_are_a_line_in_the_log(nets, caplog):
    caplog.set_level("INFO", "aneuron")
    async with serving() as running:
        pass
    said = [record.getMessage() for record in caplog.records if record.name == "aneuron.serve"]
    assert said == [
        f"listening on http://127.0.0.1:{running.port}",
        "draining: not ready from now on",
        "net: ended; 0 calls completed, 0 failed",
    ]
    assert len(re.findall(r"net: started in [\d.]+ s", caplog.text)) == 1


def test_a_service_on_uvloop(nets):
    uvloop = pytest.importorskip("uvloop")

    async def main():
        async with serving(grpc=0, drain_delay=0) as running:
            assert await running.infer(3.0) == (200, 6.0)
            running.service.stop()
            await ended(running)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_models_in_a_process_of_their_own(nets):
    pools = {"cores": {"backend": {"name": "cpu", "cores": 1}, "processes": 1}}
    models = {name: {**NET, "pool": "cores"} for name in "ab"}
    async with serving(models, pools, allow_load=True) as running:
        assert [len(model.statistics().cores) for model in running.service._models.values()] == [1, 1]
        assert await running.infer(1.0, "b") == (200, 2.0)
        assert (await running.ask("/v2/repository/models/b/load", "POST"))[0] == 200
        nets(3)  # which the process has imported: it would go on with what it has
        status, body = await running.ask("/v2/repository/models/b/load", "POST")
        assert (status, "start the service again" in json.loads(body)["error"]) == (400, True)
        assert await running.infer(1.0, "b") == (200, 2.0)


# Who may do what.

OPEN = ["/livez", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/net", "/v2/models/net/ready"]
GUARDED = ["/metrics", "/console", "/console/events", "/v2/models/net/config", "/v2/models/net/stats",
           "/v2/models/stats", "/elsewhere", "/v2/models%2Fnet%2Fconfig", "/v2/models/net%2Fstats"]  # fmt: skip


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("secret\n")
    return str(path)


async def test_all_but_probes_and_inference_need_the_token(nets, token_file):
    async with serving(token_file=token_file, allow_load=True) as running:
        for path in OPEN:
            assert (await running.ask(path))[0] == 200
        assert await running.infer(3.0) == (200, 6.0)
        for path in GUARDED:
            status, body = await running.ask(aiohttp.client.URL(path, encoded=True))
            assert status == 401, path
            assert "error" in json.loads(body) or not path.startswith("/v2")
        for path in ("/v2/repository/index", "/v2/repository/models/net/load", "/v2/repository%2Findex"):
            assert (await running.ask(aiohttp.client.URL(path, encoded=True), "POST"))[0] == 401
        right = {"Authorization": "Bearer secret"}
        in_a_browser = {"Authorization": "Basic " + base64.b64encode(b"anyone:secret").decode()}
        assert (await running.ask("/metrics", headers=right))[0] == 200
        assert (await running.ask("/v2/repository/index", "POST", headers=right))[0] == 200
        assert (await running.ask("/console", headers=in_a_browser))[0] == 200
        for wrong in ("Bearer secre", "Bearer", "secret", "Basic secret", "Basic !", "Bearer s\u00e9cret"):
            assert (await running.ask("/metrics", headers={"Authorization": wrong}))[0] == 401


async def test_the_token_over_grpc(nets, token_file):
    async with serving(token_file=token_file, grpc=0) as running:
        async with running.stub("ServerLive") as live:
            assert await live(b"") == b"\x08\x01"
        async with running.stub("RepositoryIndex") as index:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await index(b"")
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert b"net" in await index(b"", metadata=[("authorization", "Bearer secret")])


@pytest.mark.parametrize("text", ["", "two words", "caf\u00e9"])
def test_a_token_that_cannot_be_sent(nets, tmp_path, text):
    (tmp_path / "token").write_text(text)
    settings = settings_of({"server": {"token_file": "token"}, "models": {"net": NET}})
    with pytest.raises(ConfigError, match=r"server.token_file = 'token': expected one line"):
        Service(settings.server, make(settings))


def test_a_token_file_that_is_not_there(nets):
    settings = settings_of({"server": {"token_file": "nowhere"}, "models": {"net": NET}})
    with pytest.raises(ConfigError, match=r"server.token_file = 'nowhere': it cannot be read: No such file"):
        Service(settings.server, make(settings))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
async def test_tls_over_http_and_grpc(nets, tmp_path):
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-keyout", "key.pem", "-out", "cert.pem"], check=True, capture_output=True)
    async with serving(tls_cert="cert.pem", tls_key="key.pem", grpc=0) as running:
        trusting = ssl.create_default_context(cafile="cert.pem")
        assert (await running.ask("/readyz", ssl=trusting))[0] == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await running.ask("/readyz")
        credentials = grpc.ssl_channel_credentials((tmp_path / "cert.pem").read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{running.grpc_port}", credentials) as channel:
            assert await channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"") == b"\x08\x01"
    (tmp_path / "key.pem").write_text("none")
    with pytest.raises(ConfigError, match=r"server.tls_cert = 'cert.pem', .*: expected a certificate in PEM"):
        async with serving(tls_cert="cert.pem", tls_key="key.pem"):
            pass


# Loading anew.


async def test_nothing_is_loaded_anew_unless_it_is_allowed(nets):
    async with serving() as running:
        nets(3)
        status, body = await running.ask("/v2/repository/models/net/load", "POST")
        assert status == 403
        assert "--allow-load" in json.loads(body)["error"]
        running.service.reload()  # as SIGHUP does
        await settle()
        assert await running.infer(1.0) == (200, 2.0)


async def test_a_post_swaps_under_load_and_no_call_is_lost(nets, caplog):
    caplog.set_level("INFO", "aneuron.serve")
    models = {"net": {**NET, "backend": "serve_nets:backend"}}
    async with serving(models, allow_load=True) as running:
        seen, going = [], True

        async def client(value):
            while going:
                seen.append((value, await running.infer(value)))

        async with asyncio.TaskGroup() as group:
            for value in range(1, 17):
                group.create_task(client(float(value)))
            nets(3)
            assert (await running.ask("/v2/repository/models/net/load", "POST"))[0] == 200
            assert await running.infer(1.0) == (200, 3.0)
            going = False
        assert {status for _, (status, _) in seen} == {200}
        assert {answer / value for value, (_, answer) in seen} <= {2.0, 3.0}
    assert any(re.fullmatch(r"net: swapped for serve_nets:net in [\d.]+ s", r.getMessage()) for r in caplog.records)


async def test_a_file_is_read_again(nets, tmp_path):
    def save(factor):
        script = torch.jit.trace(lambda x: x * factor, torch.ones(1, 2))
        script.save(str(tmp_path / "new.pt"))
        os.replace(tmp_path / "new.pt", tmp_path / "net.pt")

    save(2)
    async with serving({"net": {**NET, "model": "net.pt", "batch_size": 1}}, allow_load=True) as running:
        save(5)
        assert (await running.ask("/v2/repository/models/net/load", "POST"))[0] == 200
        assert await running.infer(1.0) == (200, 5.0)


BROKEN = [
    "FACTOR = 3\nraise OSError('the weights are gone')",
    "FACTOR = 3\nraise SystemExit(3)",
    "FACTOR = 3\nnet = 3",
    "FACTOR = 3\nimport torch\nnet = torch.sum",
]


@pytest.mark.parametrize("text", BROKEN)
async def test_what_cannot_be_loaded_leaves_the_old_model(nets, tmp_path, text):
    async with serving(allow_load=True) as running:
        (tmp_path / "serve_nets.py").write_text(text)
        status, body = await running.ask("/v2/repository/models/net/load", "POST")
        assert status == 400
        assert "serves as before" in json.loads(body)["error"]
        assert await running.infer(1.0) == (200, 2.0)
        assert (await running.ask("/v2/repository/models/other/load", "POST"))[0] == 404


async def test_why_a_model_was_not_loaded_is_a_line_and_the_log_has_the_rest(nets, tmp_path, caplog):
    async with serving(allow_load=True) as running:
        (tmp_path / "serve_nets.py").write_text("raise OSError('gone\\nFile /srv/secret.py, line 3')")
        _, body = await running.ask("/v2/repository/models/net/load", "POST")
        assert json.loads(body)["error"].endswith("OSError: gone")
        caplog.clear()
        running.service.reload()  # as SIGHUP does
        while not caplog.records:
            await asyncio.sleep(0.001)
    record = caplog.records[0]
    assert record.getMessage().startswith("net: not loaded anew, serves as before: ConfigError: models.net.model")
    assert record.exc_info


@pytest.fixture
def gate(nets, tmp_path, monkeypatch):
    """The module of the models is written so that its import stops at a gate: `begun`, and goes on at `go`."""
    gate = types.ModuleType("serve_gate")
    gate.begun, gate.go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "serve_gate", gate)

    def write():
        nets(5)
        path = tmp_path / "serve_nets.py"
        path.write_text(
            "FACTOR = 5\nimport serve_gate\nserve_gate.begun.set()\nserve_gate.go.wait(60)\n" + path.read_text()
        )

    gate.write = write
    yield gate
    gate.go.set()


async def test_a_load_whose_client_has_left_changes_nothing_and_the_next_one_is_whole(gate):
    async with serving(allow_load=True) as running:
        gate.write()
        first = asyncio.ensure_future(running.ask("/v2/repository/models/net/load", "POST"))
        assert await asyncio.to_thread(gate.begun.wait, 60.0)
        first.cancel()
        await asyncio.wait([first])
        while running.service._asked:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(running.ask("/v2/repository/models/net/load", "POST"))
        for _ in range(5):
            assert await running.infer(1.0) == (200, 2.0)
        assert not second.done()
        gate.go.set()
        assert (await second)[0] == 200
        assert await running.infer(1.0) == (200, 5.0)


async def test_a_load_that_hangs_does_not_hold_up_the_end(gate, caplog):
    models = {"a": NET, "b": {**NET, "model": "serve_nets:make"}}
    async with serving(models, allow_load=True) as running:
        gate.write()
        running.service.reload()  # as SIGHUP does
        assert await asyncio.to_thread(gate.begun.wait, 60.0)
        (thread,) = [each for each in threading.enumerate() if each.name == "aneuron load"]
        assert thread.daemon  # nor that of the process
        running.service.stop(at_once=True)
        await ended(running)
        gate.go.set()
        await asyncio.to_thread(thread.join)
        await settle()
    assert not running.service._tasks
    assert "swapped" not in caplog.text


async def test_a_load_by_request_that_hangs_does_not_hold_up_the_end_either(gate):
    async with serving(allow_load=True, drain_delay=0, drain_timeout=None) as running:
        gate.write()
        asked = asyncio.ensure_future(running.ask("/v2/repository/models/net/load", "POST"))
        assert await asyncio.to_thread(gate.begun.wait, 60.0)
        running.service.stop()
        await ended(running)
        assert (await asked)[0] == 503
        gate.go.set()


async def test_requests_of_grpc_have_no_more_time_than_others(nets):
    backend = PuppetBackend(cores=1)
    request = message("ModelInferRequest")(model_name="net", raw_input_contents=[bytes(8)])
    request.inputs.add(name="input0", datatype="FP32", shape=[1, 2])
    async with serving(made=[puppets(backend)], grpc=0, max_timeout=0.0001) as running:
        async with running.stub("ModelInfer") as infer:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await infer(request.SerializeToString())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_model_that_brings_its_own_arguments_says_how_it_could_be_loaded_anew(nets, tmp_path):
    with (tmp_path / "serve_nets.py").open("a") as file:
        file.write("served = aneuron.AsyncDataParallel(net, example_inputs=torch.ones(1, 2))\n")
    async with serving({"net": {"model": "serve_nets:served"}}, allow_load=True) as running:
        status, body = await running.ask("/v2/repository/models/net/load", "POST")
        assert (status, "name in its place the torch module" in json.loads(body)["error"]) == (400, True)


# Starting and ending.


@pytest.mark.parametrize("key", ["http", "grpc"])
async def test_a_port_in_use_is_told_before_anything_is_loaded(nets, key):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = settings_of({"server": {"http": 0, key: port}, "models": {"net": NET}})
        made = make(settings)
        with pytest.raises(ConfigError, match=rf"server.{key} = {port}: cannot listen on 127.0.0.1: Address already"):
            await Service(settings.server, made).run()
        assert not made[0].model.statistics().cores


async def test_an_address_of_another_machine(nets):
    with pytest.raises(ConfigError, match=r"server.host = '192.0.2.1': cannot listen there: Cannot assign"):
        async with serving(host="192.0.2.1"):
            pass


async def test_a_host_that_nobody_knows(nets, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match=r"server.host = 'no.such': cannot listen there: .* expected an address"):
        async with serving(host="no.such"):
            pass


async def test_a_model_that_does_not_start_ends_those_that_have(nets, tmp_path):
    with (tmp_path / "serve_nets.py").open("a") as file:
        file.write("def refuses(x):\n    raise OSError('no device')\n")
    models = {"net": NET, "other": {**NET, "model": "serve_nets:refuses"}}
    settings = settings_of({"server": {"http": 0}, "models": models})
    made = make(settings)
    with pytest.raises(OSError, match="no device") as error:
        await Service(settings.server, made).run()
    assert error.value.__notes__[-1] == "while the model 'other' was started"
    assert not made[0].model.ready


async def test_who_is_stopped_before_it_serves_ends_at_once(nets, tmp_path):
    with (tmp_path / "serve_nets.py").open("a") as file:
        file.write("slow = aneuron.SimulatedBackend(cores=1, load_time=0.2)\n")
    settings = settings_of({"server": {"http": 0}, "models": {"net": {**NET, "backend": "serve_nets:slow"}}})
    service = Service(settings.server, make(settings))
    task = asyncio.ensure_future(service.run())
    await settle()
    service.stop()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_readiness_goes_first_then_what_was_accepted_is_answered(nets):
    backend = PuppetBackend(cores=1)
    async with serving(made=[puppets(backend)], drain_delay=1000.0, grpc=0) as running:
        model = running.service._models["net"]
        call = asyncio.ensure_future(running.infer(1.0))
        while not model.statistics().calls.running:
            await asyncio.sleep(0.001)
        running.service.stop()
        await settle()
        for path, expected in READINESS:
            async with running.session.get(path) as response:  # it still listens
                assert response.status == expected, path
                assert response.headers["Connection"] == "close"
        async with running.stub("ServerReady") as server, running.stub("ModelReady") as one:
            assert await server(b"") == await one(b"\x0a\x03net") == b""
        assert b"draining" in (await running.ask("/v2/repository/index", "POST"))[1]
        running.service._at_once.set()  # as if the delay were over
        while await listens(running.port):
            await asyncio.sleep(0.01)
        assert not call.done()
        backend[0].release()
        assert await call == (200, -1.0)


READINESS = [("/readyz", 503), ("/v2/health/ready", 503), ("/v2/models/net/ready", 503), ("/livez", 200)]


async def test_who_connects_while_the_door_closes_does_not_hold_up_the_end(nets, monkeypatch):
    close_idle = web.Server.pre_shutdown

    def connect_and_close_idle(server):  # the connection is made in the iteration in which the idle ones are ended
        server().connection_made(UnusedTransport())
        close_idle(server)

    monkeypatch.setattr(web.Server, "pre_shutdown", connect_and_close_idle)
    async with serving(drain_delay=0, drain_timeout=None) as running:
        running.service.stop()
        await ended(running)


class UnusedTransport(asyncio.Transport):
    """Of a connection on which nothing comes."""

    def is_closing(self):
        return False

    def close(self):
        pass


async def ended(running):
    async with asyncio.timeout(60):  # not reached, unless it hangs
        await asyncio.wait([running.task])


async def test_who_looks_at_the_console_does_not_hold_up_the_end(nets):
    async with serving(drain_delay=0, drain_timeout=None) as running:
        events = await running.session.get("/console/events")
        assert await events.content.readline()
        running.service.stop()
        await ended(running)
        events.close()


@pytest.mark.parametrize("rest_comes", [True, False])
async def test_a_body_that_is_still_coming_when_the_door_closes_is_waited_for(nets, rest_comes):
    body = json.dumps({"inputs": [{"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]}]}).encode()
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with serving(drain_delay=0, drain_timeout=None) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head + body[:20])
        while not running.service._asked:
            await asyncio.sleep(0.001)
        running.service.stop()
        while await listens(running.port):
            await asyncio.sleep(0.001)
        if rest_comes:
            writer.write(body[20:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        else:
            running.service.stop()  # a second signal: clients are not waited for
        await ended(running)
        writer.close()


@contextlib.asynccontextmanager
async def half_a_request(running):
    """One whose rest does not come."""
    _, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    while not running.service._asked:
        await asyncio.sleep(0.001)
    yield
    writer.close()


async def test_a_second_signal_before_the_door_closes_is_remembered(nets):
    async with serving(drain_delay=1000.0, drain_timeout=None) as running, half_a_request(running):
        running.service.stop()
        await settle()
        running.service.stop()  # while it is still told that nothing more is to be sent
        await ended(running)


async def test_a_second_signal_while_the_models_close_is_for_them_alone(nets):
    backend = PuppetBackend(cores=1)
    (one,) = made = [puppets(backend)]
    async with serving(made=made, drain_delay=0, drain_timeout=None) as running:
        calls = [asyncio.ensure_future(one.model(torch.ones(1, 2))) for _ in range(9)]  # of the program's own
        await settle()
        running.service.stop()
        while one.model.ready:  # no request is waited for; it closes
            await asyncio.sleep(0.001)
        running.service.stop()
        while not all(call.done() for call in calls):
            backend[0].release()
            await settle()
        await ended(running)


async def test_what_was_read_before_the_door_closed_is_answered(nets):
    body = json.dumps({"inputs": [{"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]}]}).encode()
    request = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with serving(drain_delay=1000.0, drain_timeout=None) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"}}")  # it is connected
        (connection,) = [each for each in gc.get_objects() if isinstance(each, RequestHandler) and each.transport]
        running.service.stop()
        await settle()
        connection.data_received(request)  # in the iteration in which the delay ends
        running.service._at_once.set()
        assert b" 200 " in await reader.readline()
        writer.close()


@pytest.mark.parametrize("seconds", [0, 0.2])
async def test_an_execution_that_hangs_does_not_outlast_the_drain(nets, monkeypatch, seconds):
    given = []
    drain = lifecycle._drain
    monkeypatch.setattr(lifecycle, "_drain", lambda name, model, left: given.append(left) or drain(name, model, left))
    backend = PuppetBackend(cores=1)
    async with serving(made=[puppets(backend)], drain_delay=0, drain_timeout=seconds, grpc=0) as running:
        over_http = asyncio.ensure_future(running.infer(1.0))
        over_grpc = asyncio.ensure_future(infer_by_grpc(running))
        model = running.service._models["net"]
        while model.statistics().calls.waiting + model.statistics().calls.running < 2:
            await asyncio.sleep(0.001)
        running.service.stop()
        await ended(running)
        assert given == [LAST]  # what HTTP and gRPC have had is not to be had again
        assert not model.ready
        backend[0].release()
        assert isinstance((await asyncio.gather(over_http, return_exceptions=True))[0], aiohttp.ClientError)
        assert isinstance((await asyncio.gather(over_grpc, return_exceptions=True))[0], grpc.aio.AioRpcError)


async def infer_by_grpc(running):
    request = message("ModelInferRequest")(model_name="net", raw_input_contents=[bytes(8)])
    request.inputs.add(name="input0", datatype="FP32", shape=[1, 2])
    async with running.stub("ModelInfer") as infer:
        return await infer(request.SerializeToString())


async def test_a_signal_while_a_start_that_failed_is_cleaned_up_leaves_no_model_open(nets, monkeypatch):
    (one,) = made = [puppets(PuppetBackend(cores=1))]
    service = Service(settings_of({"server": {"http": 0, "grpc": 0}, "models": {"net": NET}}).server, made)

    async def listen(server, address, credentials):
        assert one.model.ready
        for turn in range(20):  # in whatever the end waits for
            asyncio.get_running_loop().call_later(turn / 100, service.stop)
        raise OSError("in use by now")

    monkeypatch.setattr(GrpcServer, "listen", listen)
    with pytest.raises(ConfigError, match=r"server.grpc = 0: in use by now"):
        await service.run()
    assert not one.model.ready


async def test_what_raises_at_the_end_leaves_no_model_open(nets, monkeypatch):
    async def stop(site):
        await stopped(site)
        raise OSError("no")

    stopped = web.SockSite.stop
    monkeypatch.setattr(web.SockSite, "stop", stop)
    made = [puppets(PuppetBackend(cores=1))]
    with pytest.raises(OSError, match="no"):
        async with serving(made=made):
            pass
    assert not made[0].model.ready


async def test_a_second_signal_refuses_what_waits(nets):
    backend = PuppetBackend(cores=1)
    async with serving(made=[puppets(backend)], drain_delay=1000.0) as running:
        model = running.service._models["net"]
        calls = [asyncio.ensure_future(running.infer(1.0)) for _ in range(20)]
        while model.statistics().calls.waiting + model.statistics().calls.running < 20:
            await asyncio.sleep(0.001)
        running.service.stop()
        running.service.stop()
        await settle()  # what waits is refused before the core is free
        backend[0].release()
        answers = await asyncio.gather(*calls)
        assert {status for status, _ in answers} <= {200, 503}
        assert 503 in {status for status, _ in answers}


def puppets(backend):
    """A model whose cores execute when they are told to."""
    model = aneuron.AsyncDataParallel(torch.neg, backend=backend, batch_size=1, num_workers=1, check_rows=False)
    (one,) = make(settings_of({"models": {"net": NET}}))
    signature = aneuron.Signature((aneuron.TensorSpec("input0", torch.float32, (-1, 2)),))
    return type(one)("net", "test", model, signature, one.reload)


async def listens(port):
    try:
        (await asyncio.open_connection("127.0.0.1", port))[1].close()
    except OSError:
        return False
    return True


# As a process.


@contextlib.asynccontextmanager
async def process(tmp_path, *arguments):
    """`aneuron serve` with these arguments, its log so far, and its URL."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-m", "aneuron", "serve", *arguments, "--http", "0",
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    log = []

    async def read():
        async for line in started.stderr:
            log.append(line.decode())

    reading = asyncio.ensure_future(read())
    try:
        async with asyncio.timeout(300):  # not reached, unless it hangs
            while not (found := re.search(r"listening on (http://\S+)", "".join(log))):
                assert not reading.done(), "".join(log)
                await asyncio.sleep(0.02)
            yield started, log, found[1]
            await reading
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        await reading


async def clients(url, number, seen, going):
    """Ask until nobody answers, or `going` ends; note what came."""

    async def client(session, value):
        tensor = {"name": "input0", "shape": [1, 2], "datatype": "FP32", "data": [value, value]}
        while going():
            try:
                async with session.post(f"{url}/v2/models/net/infer", json={"inputs": [tensor]}) as response:
                    answer = await response.json()
                seen.append((value, response.status, answer.get("outputs", [{}])[0].get("data", [None])[0]))
            except aiohttp.ClientConnectorError:
                return  # it listens no more
            except aiohttp.ClientConnectionError as error:
                seen.append((value, type(error).__name__, None))

    connector = aiohttp.TCPConnector(limit=number)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for value in range(1, number + 1):
            group.create_task(client(session, float(value)))


MODEL = ("serve_nets:net", "--set", 'example_inputs="1x2"', "--set", "batch_size=8", "--set",
         'backend="serve_nets:backend"', "--set", "server.drain_delay=0.3")  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
async def test_sigterm_under_load_loses_no_accepted_request(nets, tmp_path):
    async with process(tmp_path, *MODEL) as (server, log, url):
        seen = []
        load = asyncio.ensure_future(clients(url, 32, seen, lambda: True))
        while len(seen) < 200:
            await asyncio.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        await load
        assert await server.wait() == 0
    answered = [(value, answer) for value, status, answer in seen if status == 200]
    assert all(answer == 2 * value for value, answer in answered)
    # The kernel resets who has connected and was not let in any more: they have no call.
    assert {status for _, status, _ in seen} <= {200, "ClientOSError", "ServerDisconnectedError"}, log
    assert f"net: ended; {len(answered)} calls completed, 0 failed" in "".join(log)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
async def test_sighup_under_load_swaps_and_loses_none(nets, tmp_path):
    async with process(tmp_path, *MODEL, "--allow-load") as (server, log, url):
        seen = []
        load = asyncio.ensure_future(clients(url, 32, seen, lambda: server.returncode is None and not done))
        done = False
        while len(seen) < 100:
            await asyncio.sleep(0.01)
        nets(3)
        server.send_signal(signal.SIGHUP)
        while "net: swapped for serve_nets:net" not in "".join(log):
            await asyncio.sleep(0.01)
        after = len(seen) + 32  # those that are under way
        while len(seen) < after + 100:
            await asyncio.sleep(0.01)
        done = True
        await load
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert {status for _, status, _ in seen} == {200}
    assert {answer / value for value, _, answer in seen} == {2.0, 3.0}
    assert {answer / value for value, _, answer in seen[after:]} == {3.0}
    assert f"net: ended; {len(seen)} calls completed, 0 failed" in "".join(log)


@pytest.mark.parametrize(("arguments", "said"), [
    (["nope.toml"], "'nope.toml' cannot be read: No such file or directory; expected a file of settings"),
    (["bad.toml"], "server.htp = 1: there is no such key; do you mean http?"),
    (["serve_nets:net", "--set", "batch_sise=8"], "models.net.batch_sise = 8: there is no such key; do you mean"),
    (["serve_nets:net"], "models.net.example_inputs is missing: nothing says what the model takes"),
    (["a.toml", "b.toml"], "one file has all settings"),
    (["nope:net", "--grpc", "PORT"], "server.grpc = PORT: cannot listen on 127.0.0.1: Address already in use"),
])  # fmt: skip
def test_the_command_says_what_is_wrong_in_one_line(nets, tmp_path, capsys, arguments, said):
    from aneuron.cli import main

    (tmp_path / "bad.toml").write_text("[server]\nhtp = 1\n[models.net]\nmodel = 'serve_nets:net'\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments, said = [each.replace("PORT", port) for each in arguments], said.replace("PORT", port)
        assert main(["serve", "--http", "0", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aneuron serve:")]
    assert len(errors) == 1
    assert said in errors[0]


def test_an_argument_of_a_model_is_no_flag(capsys):
    from aneuron.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["serve", "net.pt", "--backend", "cpu"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: aneuron serve")
    assert "unrecognized arguments: --backend cpu; what a model is told is said by --set KEY=VALUE" in said


@pytest.mark.parametrize(("error", "traces"), [("OSError", True), ("aneuron.DeviceError", False)])
def test_a_model_that_does_not_start_is_named_in_the_line_that_says_so(nets, tmp_path, caplog, error, traces):
    from aneuron.cli import main

    with (tmp_path / "serve_nets.py").open("a") as file:
        file.write(f"def refuses(x):\n    raise {error}('no device')\n")
    assert main(["serve", "--http", "0", "serve_nets:refuses", "--set", 'example_inputs="1x2"']) == 1
    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert re.fullmatch(r"not served: no device \(.*while the model 'refuses' was started\)", record.getMessage())
    assert bool(record.exc_info) == traces


def test_sigterm_while_modules_are_imported_ends_as_ctrl_c_does(nets, tmp_path, caplog):
    from aneuron.cli import main

    (tmp_path / "serve_nets.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    )
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["serve", "--http", "0", "serve_nets:net"]) == 130
    assert "ended by a signal, before it served" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
