"""What all web frameworks share: the table of errors, deadlines, health, lifecycle, what a handler is given."""

import ast
import asyncio
import contextlib
import gc
import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from puppets import row, scenario

import aneuron
from aneuron import (
    AsyncDataParallel,
    Closed,
    CoreFailed,
    DeadlineExceeded,
    InputModified,
    OutputError,
    QueueFull,
    ShapeError,
    Timing,
)
from aneuron.testing import PuppetBackend, settle
from aneuron.web.deadlines import MalformedTimeout, deadline
from aneuron.web.health import Health
from aneuron.web.lifecycle import frozen, serving
from aneuron.web.problems import TABLE, problem_of
from aneuron.web.views import RequestView, server_timing, view_of

ERRORS = [
    thing
    for name in aneuron.__all__
    if isinstance(thing := getattr(aneuron, name), type) and issubclass(thing, Exception)
]


# Errors.


def test_every_public_error_is_in_the_table_and_nothing_else():
    assert set(TABLE) == set(ERRORS)


STATUS = {
    ShapeError: 422, QueueFull: 503, DeadlineExceeded: 504, Closed: 503, CoreFailed: 500, OutputError: 500,
    InputModified: 500,
}  # fmt: skip


@pytest.mark.parametrize(("error", "status"), STATUS.items())
def test_the_statuses_are_those_of_the_issue(error, status):
    assert problem_of(error("why")).status == status


@pytest.mark.parametrize("error", ERRORS)
def test_a_problem_is_what_rfc_9457_asks_for(error):
    said = problem_of(error("why"))
    members = json.loads(said.body)
    assert said.headers["Content-Type"] == "application/problem+json"
    assert members["type"] == "about:blank"
    assert members["status"] == said.status
    assert members["error"] == error.__name__
    assert {"title", "detail"} <= members.keys()
    assert (members["detail"] == "why") is (error in (ShapeError, QueueFull, DeadlineExceeded))


@pytest.mark.parametrize("error", [ValueError("a secret"), TimeoutError("a secret"), KeyError("a secret")])
def test_other_exceptions_say_nothing(error):
    said = problem_of(error)
    assert said.status == 500
    assert b"secret" not in said.body


def test_an_error_that_the_table_does_not_know_is_answered_as_the_nearest_that_it_does():
    class NoHealthyCores(CoreFailed):
        retry_after = 2.5

    said = problem_of(NoHealthyCores("why"))
    assert (said.status, said.headers["Retry-After"]) == (500, "3")
    assert json.loads(said.body)["error"] == "CoreFailed"


@pytest.mark.parametrize(
    ("seconds", "header"), [(None, "1"), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")]
)
def test_retry_after_is_in_whole_seconds_rounded_up(seconds, header):
    assert problem_of(QueueFull("full", seconds)).headers["Retry-After"] == header


def test_errors_that_do_not_say_when_have_no_retry_after():
    assert "Retry-After" not in problem_of(Closed("closed")).headers


# Deadlines.


@pytest.mark.parametrize(
    ("headers", "most", "expected"),
    [
        ({}, None, None),
        ({}, 5.0, 105.0),
        ({"x-request-timeout-ms": "250"}, None, 100.25),
        ({"x-request-timeout-ms": " 0.5 "}, None, 100.0005),
        ({"x-request-timeout-ms": "0"}, 5.0, 100.0),
        ({"x-request-timeout-ms": "6000"}, 5.0, 105.0),
        ({"grpc-timeout": "2H"}, None, 7300.0),
        ({"grpc-timeout": "2M"}, None, 220.0),
        ({"grpc-timeout": "2S"}, 5.0, 102.0),
        ({"grpc-timeout": "200m"}, 5.0, 100.2),
        ({"grpc-timeout": "99999999u"}, None, 199.999999),
        ({"grpc-timeout": "1n"}, None, 100.000000001),
        ({"grpc-timeout": "2S", "x-request-timeout-ms": "1000"}, None, 101.0),
    ],
)
def test_the_deadline_is_what_the_client_asks_for_up_to_the_most(headers, most, expected):
    assert deadline(headers, 100.0, most) == (None if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize("value", ["", "soon", "-1", "+1", "1e3", "nan", "inf", "1" * 13, "1_0", "٣", "0x10", "1,5"])
def test_milliseconds_that_are_none_are_refused(value):
    with pytest.raises(MalformedTimeout, match=r"X-Request-Timeout-Ms: .*expected milliseconds"):
        deadline({"x-request-timeout-ms": value}, 100.0, None)


@pytest.mark.parametrize("value", ["", "S", "1", "1s", "-1S", "1.5S", "999999999S", "1SS", "1 S", "٣S"])
def test_grpc_timeouts_that_are_none_are_refused(value):
    with pytest.raises(MalformedTimeout, match=r"grpc-timeout: .*expected up to 8 digits"):
        deadline({"grpc-timeout": value}, 100.0, None)


@given(st.text(max_size=30), st.text(max_size=12), st.sampled_from([None, 0.0, 5.0]))
def test_whatever_a_client_sends_is_a_time_or_malformed(milliseconds, grpc, most):
    headers = {"x-request-timeout-ms": milliseconds, "grpc-timeout": grpc}
    with contextlib.suppress(MalformedTimeout):
        assert 100.0 <= deadline(headers, 100.0, most) <= 100.0 + (1e9 if most is None else most)


# What a handler is given.


@scenario
async def test_the_calls_of_a_request_share_its_time():
    backend = PuppetBackend(cores=1)
    loop = asyncio.get_running_loop()
    async with AsyncDataParallel(torch.neg, backend=backend) as model:
        net = RequestView("net", model, deadline=loop.time() + 10.0)
        await asyncio.sleep(9.0)  # before it calls, the handler does something else
        with pytest.raises(DeadlineExceeded, match=r"^the request's deadline \(1 s were left\) has passed; allow"):
            await net(row(2))
        assert loop.time() == pytest.approx(10.0)
        await asyncio.sleep(5.0)
        with pytest.raises(DeadlineExceeded, match=r"^the request's deadline \(0 s were left\) has passed"):
            await net(row(3))
        assert loop.time() == pytest.approx(15.0)
        backend[0].release()


@pytest.mark.parametrize(("timeout", "allowed"), [(4.0, 4.0), (20.0, 10.0), (None, 10.0)])
@scenario
async def test_of_a_timeout_and_the_deadline_the_earlier_holds(timeout, allowed):
    backend = PuppetBackend(cores=1)
    loop = asyncio.get_running_loop()
    async with AsyncDataParallel(torch.neg, backend=backend) as model:
        net = RequestView("net", model, deadline=loop.time() + 10.0).options(timeout=timeout)
        with pytest.raises(DeadlineExceeded):
            await net(row())
        assert loop.time() == pytest.approx(allowed)
        backend[0].release()


@scenario
async def test_a_request_s_terms_reach_the_queue():
    backend = PuppetBackend(cores=1)
    async with AsyncDataParallel(torch.neg, batch_size=1, backend=backend, num_workers=1) as model:
        net = RequestView("net", model)
        tasks = [asyncio.ensure_future(net.options(priority=p)(row(p))) for p in (0, 1, 2, 3)]
        await settle()
        for _ in tasks:
            backend[0].release()
            await settle()
        await asyncio.gather(*tasks)
        assert [args[0][0, 0].item() for args, _ in backend[0].executed] == [3.0, 2.0, 1.0, 0.0]


async def test_without_a_deadline_the_call_is_the_model_s_own():
    class Model:
        def _call(self, *what):
            return what

    assert RequestView("net", Model())(1, b=2) == ((1,), {"b": 2}, None, None)


async def test_the_view_maps_and_times_like_the_model():
    async with AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(cores=1)) as model:
        timings = []
        net = RequestView("net", model, asyncio.get_running_loop().time() + 60.0, timings)
        assert [y.item() async for y in net.map(torch.full((1, 1), float(n)) for n in range(3))] == [0.0, -1.0, -2.0]
        _, timing = await net.timed(torch.ones(1, 1))
        assert isinstance(timing, Timing)
        await net(torch.ones(1, 1))
        assert [name for name, _ in timings] == ["net", "net"]
        assert timings[0][1] is timing
        for _ in range(20):
            await net(torch.ones(1, 1))
        assert len(timings) == 10  # a header has its limits


def test_a_model_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(LookupError, match="no model 'nett' is installed in this app: there is 'net', 'other'"):
        view_of("nett", {"net": object(), "other": object()}, None, None)


def test_server_timing_is_a_list_of_metrics():
    timing = Timing(0.001, 0.002, 0.0035, core=7, batch_rows=5, padded_rows=3, why="full")
    metrics = [metric.split(";") for metric in server_timing([("net", timing), ("b", timing)]).split(", ")]
    assert [metric[0] for metric in metrics] == ["queue", "device", "total", "core", "batch", "closed"] * 2
    assert metrics[2] == ["total", "dur=3.500", 'desc="net"']
    assert metrics[3] == ["core", 'desc="7"']


# Health.


class Counted:
    def __init__(self, *states, ready=True):
        self.ready = ready
        self.cores = [type("Core", (), {"state": state}) for state in states]

    def statistics(self):
        return self


@pytest.mark.parametrize(
    ("models", "live", "ready"),
    [
        ([Counted("ready", "ready")], 200, 200),
        ([Counted("ready", "failed")], 200, 200),
        ([Counted("failed", "failed", ready=False)], 503, 503),
        ([Counted("loading", "failed", ready=False)], 200, 503),
        ([Counted("closed", "closed", ready=False)], 200, 503),
        ([Counted(ready=False)], 200, 503),  # not started
        ([Counted("ready"), Counted("failed", ready=False)], 503, 503),
        ([Counted("ready"), Counted(ready=False)], 200, 503),
        ([], 200, 200),
    ],
)
def test_health_is_that_of_all_models_and_cores(models, live, ready):
    health = Health({f"net{n}": model for n, model in enumerate(models)})
    assert health.live()[0] == live
    assert health.ready()[0] == ready


def test_draining_ends_readiness_not_life():
    health = Health({"net": Counted("ready")})
    health.draining = True
    assert health.ready() == (503, b'{"status": "draining", "models": {"net": "draining"}}')
    assert health.live() == (200, b'{"status": "live", "models": {"net": "live"}}')


@scenario
async def test_readiness_ends_when_closing_begins():
    backend = PuppetBackend(cores=1)
    model = AsyncDataParallel(torch.neg, backend=backend)
    health = Health({"net": model})
    assert health.ready()[0] == 503
    async with model:
        assert health.ready()[0] == 200
        call = asyncio.ensure_future(model(row()))
        await settle()
        closing = asyncio.create_task(model.aclose())
        await settle()
        assert health.ready()[0] == 503
        assert not call.done()
        backend[0].release()
        await asyncio.gather(call, closing)
    assert health.ready()[0] == 503


@scenario
async def test_an_internal_error_ends_life_until_the_model_is_started_again(monkeypatch):
    backend = PuppetBackend(cores=2)
    model = AsyncDataParallel(torch.neg, backend=backend)
    health = Health({"net": model})
    await model.start()
    monkeypatch.setattr(model._life.run.dispatcher, "clock", lambda: 1 / 0)
    with pytest.raises(Closed, match="internal error"):
        await model(row())
    await settle()
    assert (health.live()[0], health.ready()[0]) == (503, 503)
    await model.aclose()
    await model.start()
    assert (health.live()[0], health.ready()[0]) == (200, 200)
    await model.aclose()
    assert health.live()[0] == 200


# Lifecycle.


@scenario
async def test_models_are_started_and_drained():
    backend = PuppetBackend(cores=1)
    model = AsyncDataParallel(torch.neg, backend=backend)
    async with serving({"net": model}, lambda: 60.0):
        assert model.ready
        call = asyncio.ensure_future(model(row(1)))
        await settle()
        asyncio.get_running_loop().call_later(50.0, backend[0].release)
    assert not model.ready
    assert (await call).tolist() == [[-1.0, -1.0]]


@scenario
async def test_a_drain_that_takes_too_long_is_cut_short_and_logged():
    backend = PuppetBackend(cores=1)
    model = AsyncDataParallel(torch.neg, batch_size=1, backend=backend, num_workers=1)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("aneuron.web").addHandler(handler)
    try:
        async with serving({"net": model}, lambda: 60.0):
            calls = [asyncio.ensure_future(model(row())) for _ in range(3)]
            await settle()
        assert asyncio.get_running_loop().time() == pytest.approx(60.0)
    finally:
        logging.getLogger("aneuron.web").removeHandler(handler)
    assert [record.getMessage() for record in records] == [
        "net did not finish its calls within 60 s; those that waited were refused"
    ]
    backend[0].release()
    assert [type(error) for error in await asyncio.gather(*calls, return_exceptions=True)].count(Closed) >= 2


class Broken:
    name, recoverable = "broken", False

    def cores(self):
        return [0]

    def load(self, model, core_id, batch_size):
        raise OSError("no such file")

    def classify(self, error):
        return aneuron.Fault.INPUT


async def test_a_model_that_fails_to_start_closes_those_before_it():
    good = AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(cores=1))
    bad = AsyncDataParallel(torch.neg, backend=Broken())
    with pytest.raises(OSError, match="no such file") as caught:
        async with serving({"good": good, "bad": bad}, lambda: 60.0):
            pytest.fail("it has not started")
    assert "while the model 'bad' was started" in caught.value.__notes__
    assert not good.ready
    await good.start()
    await good.aclose()


async def test_an_error_of_the_application_drains_too():
    model = AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(cores=1))
    with pytest.raises(KeyError):
        async with serving({"net": model}, lambda: 60.0):
            raise KeyError("the application's")
    assert not model.ready


@pytest.mark.usefixtures("freezing")
def test_what_is_there_is_frozen_and_thawed():
    before = gc.get_freeze_count()
    with frozen(False):
        assert gc.get_freeze_count() == before
    with frozen(True):
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0


# Imports.


@pytest.mark.parametrize(
    ("file", "framework"),
    [("starlette", {"starlette"}), ("aiohttp", {"aiohttp"})]
    + [(shared, set()) for shared in ("__init__", "problems", "deadlines", "views", "health", "lifecycle")],
)
def test_a_file_imports_its_own_framework_only(file, framework):
    tree = ast.parse((Path(aneuron.__file__).parent / "web" / f"{file}.py").read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name.partition(".")[0] for name in found} & {"starlette", "fastapi", "aiohttp"} == framework
