"""The programs in README.md and docs/ run as printed."""

import asyncio
import contextlib
import re
import runpy
import socket
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda

from aneuron.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
PROGRAM = re.compile(r"<!-- program: (.+?) -->\n```python\n(.*?)```", re.DOTALL)
FITS, LONG = [1, 2, 3, 4], [1, 2, 3, 4, 5]  # as the tutorial's curl sends them: whole numbers
FOUND = [found for text in PAGES.values() for found in PROGRAM.findall(text)]
PROGRAMS = dict(FOUND)


def test_every_program_has_a_name_of_its_own_and_is_run():
    assert len(PROGRAMS) == len(FOUND) == sum(text.count("```python") for text in PAGES.values()) >= 25


@contextlib.contextmanager
def machine_of(name, monkeypatch):
    """What the program is written for, and the file that it serves."""
    if name == "cuda":
        FakeCuda(monkeypatch, devices=1)
    yield


def names_of(name: str) -> dict:
    """What a program has defined when it has run."""
    names: dict = {"__name__": "program"}
    exec(compile(PROGRAMS[name], f"program: {name}", "exec"), names)
    return names


# These have tests of their own.
APART = {"flask", "django", "engines", "neuron, traced", "neuron, native", "v2 client", "ray", "ray http"}


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - APART))
def test_the_program(name, monkeypatch, tmp_path):
    if name == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    with machine_of(name, monkeypatch):
        names_of(name)


def test_the_web_handler_answers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastapi.testclient import TestClient
    names = names_of("fastapi")
    for _ in range(2):  # two test clients, one module-level model
        with TestClient(names["app"]) as client:
            check_predict(client)


def check_predict(asker) -> None:
    """A handler takes a row of four numbers, and refuses one of five."""
    answer, wrong = asker.post("/predict", json=FITS), asker.post("/predict", json=LONG)
    assert (answer.status_code, len(answer.json())) == (200, 2)
    assert (wrong.status_code, wrong.json()["error"]) == (422, "ShapeError")


@pytest.mark.parametrize("name", ["starlette", "sync handler"])
def test_other_handlers_answer_and_refuse(name):
    with client(name) as asker:
        check_predict(asker)
        assert asker.get("/readyz").status_code == 200


def test_engines_import_the_file_that_starts_them(tmp_path, capsys):
    file = tmp_path / "service.py"
    file.write_text(PROGRAMS["engines"])
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out.count(" ready ") == 2


def run_alone(name: str, then: str) -> None:
    """Run a program and what comes after it in a process of its own: frameworks are set up once in each."""
    pytest.importorskip(name)
    program = PROGRAMS[name].split("\nif __name__")[0] + textwrap.dedent(then)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_flask_answers_and_refuses():
    run_alone(
        "flask",
        """
        from concurrent.futures import ThreadPoolExecutor

        def ask(row):
            answer = app.test_client().post("/predict", json=row)
            return answer.status_code, len(answer.get_json())

        def check():
            with ThreadPoolExecutor(8) as threads:
                assert list(threads.map(ask, [[1, 2, 3, 4]] * 8)) == [(200, 2)] * 8
            answer = app.test_client().post("/predict", json=[1, 2, 3, 4, 5])
            assert (answer.status_code, answer.get_json()["error"]) == (422, "ShapeError")

        serve(check)
        """,
    )


def test_django_answers_and_refuses():
    run_alone(
        "django",
        """
        from starlette.testclient import TestClient

        with TestClient(app) as client:
            assert client.get("/readyz").status_code == 200
            assert len(client.post("/predict", json=[1, 2, 3, 4]).json()) == 2
            answer = client.post("/predict", json=[1, 2, 3, 4, 5])
            assert (answer.status_code, answer.json()["error"]) == (422, "ShapeError")
            late = client.post("/predict", json=[1] * 4, headers={"X-Request-Timeout-Ms": "0"})
            assert (late.status_code, late.json()["error"]) == (504, "DeadlineExceeded")
        """,
    )


def client(name: str):
    """A client of the application of a program, while its lifespan runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.testclient import TestClient
    return TestClient(names_of(name)["app"])


def test_the_handler_for_bytes_answers_and_refuses():
    rows = torch.rand(3, 4)
    with client("fastapi bytes") as asker:
        answer = asker.post("/rows", content=rows.numpy().tobytes())
        assert torch.frombuffer(bytearray(answer.content), dtype=torch.float32).shape == (6,)
        assert asker.post("/rows", content=b"").status_code == asker.post("/rows", content=bytes(17)).status_code == 422
        assert asker.post("/rows", content=bytes(2**20 + 16)).status_code == 413


async def test_the_aiohttp_program_answers_and_refuses():
    from aiohttp.test_utils import TestClient, TestServer

    async with TestClient(TestServer(names_of("aiohttp")["app"])) as asker:
        answer, wrong = [await asker.post("/predict", json=row) for row in (FITS, LONG)]
        assert (answer.status, len(await answer.json())) == (200, 2)
        assert (wrong.status, (await wrong.json(content_type=None))["error"]) == (422, "ShapeError")
        assert (await asker.get("/readyz")).status == 200


async def test_the_protocol_is_served_and_asked(capsys):
    pytest.importorskip("tritonclient.http")
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        asks = PROGRAMS["v2 client"].replace("8000", str(listening.getsockname()[1]))
        server = uvicorn.Server(uvicorn.Config(names_of("v2")["app"], log_level="warning"))
        serving = asyncio.create_task(server.serve([listening]))
        await asyncio.to_thread(exec, compile(asks, "program: v2 client", "exec"), {})
        server.should_exit = True
        await serving
    assert capsys.readouterr().out.startswith("[[")


def test_a_declared_model_says_what_was_declared():
    with client("v2 declared") as asker:
        assert asker.get("/v2/models/net").json()["inputs"][0]["name"] == "pixels"


def test_the_models_of_the_tutorial_are_tuned(monkeypatch, tmp_path, capsys):
    """As printed, with turns that are too short to say anything."""
    (tmp_path / "nets.py").write_text(PROGRAMS["nets"])
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^\$ aneuron (tune .+)", PAGES["docs/tutorial.md"], re.MULTILINE)
    try:
        assert main([*command.split(), "--backend", "cpu", "--seconds", "0.01", "--no-plot"]) == 0
    finally:
        sys.modules.pop("nets", None)
    assert "from nets import encoder" in capsys.readouterr().out


def test_the_parameter_table_names_every_parameter_in_order():
    import inspect

    from aneuron import AsyncDataParallel

    table = re.findall(r"^\| `(\w+)` \|", PAGES["docs/reference/parameters.md"], re.MULTILINE)
    assert table == list(inspect.signature(AsyncDataParallel).parameters)
