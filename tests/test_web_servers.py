"""Real servers, real sockets: clients that leave, bad input, shutdown."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ports import free_port

pytestmark = pytest.mark.xdist_group("servers")  # they are started once
HERE = Path(__file__).parent
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "web_apps:app", "--log-level", "warning", "--port"],
    "hypercorn": ["-m", "hypercorn", "web_apps:app", "--bind"],
    "granian": ["-m", "granian", "--interface", "asgi", "--log-level", "warning", "web_apps:app", "--port"],
    "aiohttp": ["web_apps.py"],
}


class Server:
    """A server in a process of its own."""

    def __init__(self, kind, log):
        self.port = free_port()
        self.kind = kind
        self.log = log
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        where = f"127.0.0.1:{self.port}" if kind == "hypercorn" else str(self.port)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *SERVERS[kind], where],
                cwd=HERE,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # some have workers
            )

    def client(self):
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        url = f"http://127.0.0.1:{self.port}"
        return httpx.AsyncClient(base_url=url, timeout=60, limits=bounds, verify=False)  # or it reads certificates

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def started(self):
        async with asyncio.timeout(600), self.client() as client:  # not reached, unless it hangs
            while True:
                assert self.process.poll() is None, self.log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async def switch(self, *states):
        async with self.client() as client:
            for to in states:
                assert (await client.post(f"/switch/{to}")).status_code == 200

    async def state(self, **expected):
        """The state of the server, when it is as expected."""
        state = {}
        try:
            async with asyncio.timeout(60), self.client() as client:
                while not state or any(state[name] != value for name, value in expected.items()):
                    state = (await client.get("/state")).json()
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{expected} was waited for in vain: {state}") from None
        return state

    async def serves(self):
        """Whether it answers, and has forgotten all that was before."""
        async with self.client() as client:
            answer = await client.post("/predict", json={"row": [21.0]})
        assert (answer.status_code, answer.json()) == (200, [42.0])
        await self.state(outstanding=0, tasks=0)

    def stop(self):
        """As a supervisor does it; whatever is left is killed."""
        try:
            self.process.send_signal(signal.SIGTERM)
            return self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    running = {}
    with contextlib.ExitStack() as stack:  # all are stopped, whatever one of them does
        for kind in SERVERS:  # side by side: they take seconds
            running[kind] = Server(kind, folder / f"{kind}.log")
            stack.callback(running[kind].stop)
        yield running


@pytest.fixture(params=SERVERS)
async def server(request, servers):
    one = servers[request.param]
    await one.started()
    await one.switch("open", "forgotten")
    return one


def post(value, length=None):
    body = json.dumps({"row": [value]}).encode()
    head = (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


async def status(reader):
    """Status and body of an answer on a bare connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return int(head.split()[1]), await reader.readexactly(int(length[1])) if length else b""


# Clients that leave.


async def test_clients_that_leave_while_queued_cost_nothing(server):
    before = await server.state()
    await server.switch("closed")
    stay, leave = range(40), range(100, 160)
    async with server.client() as client:

        def ask(value):
            return asyncio.create_task(client.post("/predict", json={"row": [value]}))

        staying = [ask(0)]
        await server.state(executed=[0.0])  # the only core is taken
        staying += [ask(value) for value in stay[1:20]]
        leaving = [ask(value) for value in leave]
        staying += [ask(value) for value in stay[20:]]
        await server.state(accepted=before["accepted"] + 100)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        left = await server.state(cancelled=before["cancelled"] + 60, outstanding=40)
        assert left["executed"] == [0.0]
        await server.switch("open")
        answers = await asyncio.gather(*staying)
    assert [answer.status_code for answer in answers] == [200] * 40
    assert [answer.json() for answer in answers] == [[2.0 * value] for value in stay]
    after = await server.state(outstanding=0, tasks=0)
    assert sorted(after["executed"]) == [float(value) for value in stay]
    assert "Traceback" not in server.log.read_text()


async def test_a_client_that_is_half_closed_has_left(server):
    """It goes on reading, which no server can tell; the guide has the table."""
    before = await server.state()
    await server.switch("closed")
    first = await server.connect()
    first[1].write(post(0))
    await server.state(executed=[0.0])  # the only core is taken
    reader, writer = await server.connect()
    writer.write(post(1))
    await server.state(outstanding=2)
    writer.write_eof()
    await server.state(cancelled=before["cancelled"] + 1, outstanding=1)
    await server.switch("open")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 499") if server.kind == "hypercorn" else not answer
    assert (await status(first[0]))[0] == 200
    assert (await server.state(outstanding=0, tasks=0))["executed"] == [0.0]
    for each in (writer, first[1]):
        each.close()
    await server.serves()


@pytest.mark.parametrize("stage", ["connected", "head", "body", "executing", "answered"])
async def test_a_client_may_leave_at_every_stage(server, stage):
    before = await server.state()
    if stage == "executing":
        await server.switch("closed")
    whole = b"GET /numbers HTTP/1.1\r\nHost: x\r\n\r\n" if stage == "answered" else post(7)
    sent = {"connected": 0, "head": 30, "body": whole.find(b"\r\n\r\n") + 8}.get(stage, len(whole))
    connections = [await server.connect() for _ in range(20)]
    for _, writer in connections:
        writer.write(whole[:sent])
    if stage == "executing":
        await server.state(accepted=before["accepted"] + 20)
    elif stage == "answered":
        await asyncio.gather(*(reader.readexactly(5000) for reader, _ in connections))
    for _, writer in connections:
        writer.transport.abort()
    if stage == "executing":
        await server.state(cancelled=before["cancelled"] + 20)
        await server.switch("open")
    await server.serves()
    after = await server.state()
    assert after["executed"] == ([7.0, 21.0] if stage == "executing" else [21.0])


async def test_thousands_of_cancelled_calls_leave_no_trace(server):
    calls, wave = (4_000 if server.kind == "uvicorn" else 1_000), 250
    before = await server.state()
    resident = []
    for _ in range(calls // wave):
        await server.switch("closed")
        connections = await asyncio.gather(*(server.connect() for _ in range(wave)))
        for _, writer in connections:
            writer.write(post(1))
        await server.state(accepted=before["accepted"] + wave)
        for _, writer in connections:
            writer.transport.abort()
        await server.state(cancelled=before["cancelled"] + wave)
        await server.switch("open")
        before = await server.state(outstanding=0, tasks=0)
        resident.append(before["resident"])
    assert resident[-1] - resident[len(resident) // 4] < 10e6
    assert len(before["executed"]) <= calls // wave  # of each wave the one that held the core
    await server.serves()


# Bad input.


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        (b"", {422}),
        (b"{", {422}),
        (b"\xff\xfe\x00", {400, 422}),
        (b'{"row": "text"}', {422}),
        (b'{"row": {"a": 1}}', {422}),
        (b'{"row": [1, 2, 3]}', {422}),  # not what the model was compiled for
        (b'{"row": []}', {422}),
        (b'{"row": [NaN]}', {200, 422, 500}),  # the application's affair: a number, but not one in JSON
        (b'{"row": [1e999]}', {200, 422, 500}),
        (b'{"row": [666]}', {500}),
        (b"[" * 50_000, {400, 422}),
        (b'{"row": [1%s]}' % (b" " * 200_000), {413}),
    ],
)
async def test_bad_bodies_are_refused_and_harm_nobody(server, content, allowed):
    async with server.client() as client:
        answer, *others = await asyncio.gather(
            client.post("/predict", content=content, headers={"Content-Type": "application/json"}),
            *(client.post("/predict", json={"row": [value]}) for value in range(5)),
        )
    assert answer.status_code in allowed
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert [other.json() for other in others] == [[2.0 * value] for value in range(5)]
    await server.serves()


async def test_what_the_model_says_is_in_the_log(server):
    async with server.client() as client:
        answer = await client.post("/predict", json={"row": [666]})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {"type": "about:blank", "title": "Internal Server Error", "status": 500}
    async with asyncio.timeout(60):
        while "a secret of the model" not in server.log.read_text():  # some servers log after they have answered
            await asyncio.sleep(0.01)


async def test_huge_bodies_are_refused_before_they_are_there(server):
    reader, writer = await server.connect()
    writer.write(post(1, length=10**12) + b" " * 200_000)
    async with asyncio.timeout(60):
        assert (await status(reader))[0] == 413
    writer.transport.abort()

    async def endless():
        for _ in range(100):
            yield b" " * 10_000

    async with server.client() as client:
        try:
            answer = await client.post(
                "/predict", content=endless(), headers={"Content-Type": "application/json"}
            )  # chunked: no length to go by
            assert answer.status_code == 413
        except httpx.TransportError:
            pass  # hung up on while it still sent: it may miss the answer
    await server.serves()


async def test_slow_clients_hold_nobody_up(server):
    request = post(3)
    slow = [await server.connect() for _ in range(50)]
    for _, writer in slow:
        writer.write(request[:-5])
    await server.serves()
    for byte in (request[i : i + 1] for i in range(len(request) - 5, len(request))):
        for _, writer in slow:
            writer.write(byte)
        await server.serves()
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(status(reader) for reader, _ in slow))
    assert {(code, tuple(json.loads(body))) for code, body in answers} == {(200, (6.0,))}
    for _, writer in slow:
        writer.close()


async def test_what_is_not_http_is_refused(server):
    reader, writer = await server.connect()
    writer.write(b"\x16\x03\x01 this is no request\r\n\r\n" + b"x" * 1000)
    async with asyncio.timeout(60):
        await reader.read()  # 400, or nothing; but the end
    writer.close()
    await server.serves()


# The end: the last test of the file, as it takes the servers with it.


async def test_a_drained_server_answers_all_that_it_has_received(server):
    async with server.client() as client:
        await server.switch("draining")
        for path, code in [("/readyz", 503), ("/livez", 200)]:
            assert (await client.get(path)).status_code == code
    await server.serves()  # preStop: readiness is gone, and all that comes is still served

    before = await server.state()
    await server.switch("closed")
    connections = await asyncio.gather(*(server.connect() for _ in range(200)))
    for value, (_, writer) in enumerate(connections):
        writer.write(post(value))
    await server.state(accepted=before["accepted"] + 200)
    await server.switch("opening")  # in a while
    server.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(status(reader) for reader, _ in connections))
        later = [await late(server) for _ in range(20)]
    for _, writer in connections:
        writer.close()
    assert {code for code, _ in answers} == {200}
    assert [json.loads(body) for _, body in answers] == [[2.0 * value] for value in range(200)]
    assert set(later) <= {"refused", 503}
    assert server.process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


async def late(server):
    """What becomes of a request that comes after SIGTERM."""
    writer = None
    try:
        reader, writer = await server.connect()
        writer.write(post(1))
        return (await status(reader))[0]
    except (ConnectionError, asyncio.IncompleteReadError):
        return "refused"
    finally:
        if writer is not None:
            writer.close()
