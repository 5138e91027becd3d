"""Prometheus: the names, that they agree with `statistics()`, that a parser takes them, and two real servers."""

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import replace

import httpx
import prometheus_client
import pytest
import torch
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from puppets import call, check_sum, release_all, row, scenario

from aneuron import AsyncDataParallel, Pool, QueueFull
from aneuron.stats import CoreCounters, Counters, Histogram
from aneuron.testing import PuppetBackend, run, settle
from aneuron.web.metrics import Collector

PID = str(os.getpid())

# The names of a dashboard: to rename one breaks it. With their labels beside model and pid.
NAMES = {
    "aneuron_ready": set(),
    "aneuron_requests_total": {"outcome"},
    "aneuron_queue_items": set(),
    "aneuron_queue_rows": set(),
    "aneuron_queue_work": set(),
    "aneuron_inflight_requests": set(),
    "aneuron_inflight_batches": {"core"},
    "aneuron_batch_close_total": {"why"},
    "aneuron_batch_padding_rows_total": {"core"},
    "aneuron_batches_total": {"core"},
    "aneuron_rows_total": {"core"},
    "aneuron_core_busy_seconds_total": {"core"},
    "aneuron_core_errors_total": {"core"},
    "aneuron_core_state": {"core", "state"},
    "aneuron_core_global_id": {"core"},
    "aneuron_core_service_seconds": {"core"},
    **{
        f"aneuron_{name}_{part}": {"le"} if part == "bucket" else set()
        for name in ("queue_seconds", "device_seconds", "request_seconds", "batch_rows", "event_loop_lag_seconds")
        for part in ("bucket", "count", "sum")
    },
}

# Those of models that share a pool, besides.
OF_POOLS = {f"aneuron_pool_{name}" for name in ("weight", "inflight_batches", "queue_rows", "busy_seconds_total")}


def page(**models):
    """The samples as an OpenMetrics parser understands the page, by name and labels."""
    registry = CollectorRegistry()
    registry.register(Collector(**models))
    return samples(generate_latest(registry).decode())


def samples(text):
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(found, name, model="net", pid=PID, **labels):
    return found["aneuron_" + name, frozenset({"model": model, "pid": pid, **labels}.items())]


def puppets(cores=1, **settings):
    backend = PuppetBackend(cores)
    return backend, AsyncDataParallel(torch.neg, backend=backend, batch_size=4, **settings)


def check_agrees(found, statistics):
    """Every number of the snapshot is on the page."""
    calls = statistics.calls
    for outcome in ("completed", "failed", "cancelled", "refused"):
        assert value(found, "requests_total", outcome=outcome) == getattr(calls, outcome)
    assert value(found, "queue_items") == calls.waiting
    assert value(found, "inflight_requests") == calls.running
    assert value(found, "queue_rows") == statistics.waiting_rows
    for why, count in statistics.closed_because.items():
        assert value(found, "batch_close_total", why=why) == count
    for core in statistics.cores:
        name = str(core.id)
        assert value(found, "batches_total", core=name) == core.batches
        assert value(found, "rows_total", core=name) == core.rows
        assert value(found, "batch_padding_rows_total", core=name) == core.padded_rows
        assert value(found, "core_busy_seconds_total", core=name) == core.busy_seconds
        assert value(found, "core_errors_total", core=name) == core.errors
        assert value(found, "inflight_batches", core=name) == core.in_flight
        if core.service_seconds is not None:  # where nothing has succeeded yet there is no line
            assert value(found, "core_service_seconds", core=name) == core.service_seconds
        assert value(found, "core_global_id", core=name) == core.global_id
        assert value(found, "core_state", core=name, state=core.state) == 1
    for name, histogram in (
        ("queue_seconds", statistics.queue_seconds),
        ("device_seconds", statistics.device_seconds),
        ("request_seconds", statistics.total_seconds),
        ("batch_rows", statistics.batch_rows),
        ("event_loop_lag_seconds", statistics.loop_lag_seconds),
    ):
        assert value(found, f"{name}_sum") == histogram.sum
        assert value(found, f"{name}_count") == value(found, f"{name}_bucket", le="+Inf") == sum(histogram.counts)
        for index, bound in enumerate(histogram.bounds):
            assert value(found, f"{name}_bucket", le=str(float(bound))) == sum(histogram.counts[: index + 1])


@scenario
async def test_calls_of_every_fate_are_on_the_page():
    backend, model = puppets(max_pending=3)
    async with model:
        failing = call(model, 0, rows=4)
        await settle()
        backend[0].release(ValueError("no"))
        await asyncio.wait([failing])
        running = call(model, 1, rows=2)
        await settle()
        await asyncio.sleep(0.03)
        waiting, leaving = call(model, 2, rows=2), call(model, 3)
        await settle()
        with pytest.raises(QueueFull):
            await model(row(4))
        leaving.cancel()
        await settle()
        found, calls = page(net=model), check_sum(model)
        assert (calls.failed, calls.cancelled, calls.refused, calls.waiting, calls.running) == (1, 1, 1, 1, 1)
        check_agrees(found, model.statistics())
        assert value(found, "ready") == 1
        assert value(found, "core_state", core="0", state="failed") == 0
        assert value(found, "inflight_batches", core="0") == 1
        await release_all(backend, running, waiting)
        found = page(net=model)
        check_agrees(found, model.statistics())
        assert value(found, "requests_total", outcome="completed") == 2
        assert value(found, "batch_padding_rows_total", core="0") == 4


@scenario
async def test_the_names_and_their_labels():
    backend, model = puppets(cores=2)
    async with model:
        await release_all(backend, call(model, rows=8))
        names = {}
        for name, labels in page(net=model):
            names.setdefault(name, set()).update(dict(labels))
        assert names == {name: labels | {"model", "pid"} for name, labels in NAMES.items()}


@scenario
async def test_labels_are_bounded_whatever_is_called():
    backend, model = puppets()
    async with model:
        await release_all(backend, call(model))
        before = set(page(net=model))
        calls = [asyncio.ensure_future(model.options(tenant=f"t{n}", priority=n)(row(n, n + 1))) for n in range(20)]
        calls.append(call(model, float("nan")))
        await release_all(backend, *calls)
        assert set(page(net=model)) == before


@scenario
async def test_counters_go_on_after_a_restart():
    backend, model = puppets()
    for runs in (1, 2):
        async with model:
            await release_all(backend, call(model, rows=3))
        found = page(net=model)
        assert value(found, "requests_total", outcome="completed") == runs
        assert value(found, "rows_total", core="0") == 3 * runs
        assert value(found, "core_state", core="0", state="closed") == 1
        assert value(found, "ready") == 0


def test_a_model_that_has_not_started_is_on_the_page():
    found = page(net=AsyncDataParallel(torch.neg))
    assert value(found, "ready") == value(found, "queue_items") == value(found, "request_seconds_count") == 0
    assert not any("core" in dict(labels) for _, labels in found)


@scenario
async def test_a_core_that_did_not_load_is_in_quarantine():
    backend = PuppetBackend(2, load_error=(1, MemoryError("full")))
    async with AsyncDataParallel(torch.neg, backend=backend, min_cores=1) as model:
        found = page(net=model)
        assert value(found, "core_state", core="1", state="quarantined") == 1
        assert value(found, "core_errors_total", core="1") == 1


@scenario
async def test_models_stand_side_by_side():
    backend, one = puppets()
    other = AsyncDataParallel(torch.neg)
    async with one:
        await release_all(backend, call(one))
        found = page(one=one, other=other)
        assert value(found, "requests_total", "one", outcome="completed") == 1
        assert value(found, "requests_total", "other", outcome="completed") == 0


def of_pools(found):
    return {(name, *sorted(dict(labels).items())) for name, labels in found if name.startswith("aneuron_pool")}


@scenario
async def test_models_that_share_a_pool_have_its_numbers_each_once():
    pool = Pool(backend=PuppetBackend(1, service_time=0.05), num_workers=1)
    one, other = (AsyncDataParallel(torch.neg, pool=pool, batch_size=4, weight=weight) for weight in (3.0, 1.0))
    before = page(one=one, other=other)  # as many series as later
    assert value(before, "pool_weight", "one", pool="one+other") == 3
    assert value(before, "pool_busy_seconds_total", "other", pool="one+other") == 0
    for _ in range(2):  # a counter goes on after a restart
        async with one, other:
            running = call(one, 0, rows=4)
            await settle()
            waiting = call(other, 1, rows=3)
            await settle()
            await asyncio.sleep(0.03)
            found = page(one=one, other=other)
            assert of_pools(found) == of_pools(before)
            assert {name for name, *_ in of_pools(found)} == OF_POOLS
            assert len(of_pools(found)) == 2 * len(OF_POOLS)
            for name, model, weight, in_flight, rows in (("one", one, 3, 1, 0), ("other", other, 1, 0, 3)):
                assert value(found, "pool_weight", name, pool="one+other") == weight
                assert value(found, "pool_inflight_batches", name, pool="one+other") == in_flight
                assert value(found, "pool_queue_rows", name, pool="one+other") == rows
                busy = sum(core.busy_seconds for core in model.statistics().cores)
                assert value(found, "pool_busy_seconds_total", name, pool="one+other") == busy
            shares = pool.statistics().models
            assert [(each.weight, each.in_flight, each.waiting_rows) for each in shares] == [(3, 1, 0), (1, 0, 3)]
            await asyncio.gather(running, waiting)
    assert value(page(one=one, other=other), "pool_busy_seconds_total", "one", pool="one+other") == pytest.approx(0.1)


def test_pools_are_told_apart_and_a_model_with_one_of_its_own_has_nothing_of_them():
    first, second = Pool(), Pool()
    models = {
        name: AsyncDataParallel(torch.neg, pool=pool) for name, pool in zip("abcd", (first, second) * 2, strict=True)
    }
    alone, only = AsyncDataParallel(torch.neg), AsyncDataParallel(torch.neg, pool=Pool())
    found = of_pools(page(alone=alone, **models, only=only))
    assert {dict(labels)["model"]: dict(labels)["pool"] for _, *labels in found} == {
        **dict.fromkeys("ac", "a+c"),
        **dict.fromkeys("bd", "b+d"),
    }
    registry = CollectorRegistry()
    registry.register(Collector(alone=alone, only=only))
    assert "pool" not in generate_latest(registry).decode()  # not so much as a title
    guest = AsyncDataParallel(torch.neg, pool=alone.pool)
    assert {dict(labels)["pool"] for _, *labels in of_pools(page(alone=alone))} == {"alone"}
    assert guest.pool is alone.pool


def a_model(statistics):
    class Fixed(AsyncDataParallel):
        ready = True

        def statistics(self):
            return statistics

    return Fixed(torch.neg)


def test_histograms_are_cumulative():
    histogram = Histogram((0.25, 1.0, 2.5), (3, 0, 2, 1), 9.5)
    found = page(net=a_model(replace(Counters().snapshot(0, 0), queue_seconds=histogram)))
    buckets = {le: value(found, "queue_seconds_bucket", le=le) for le in ("0.25", "1.0", "2.5", "+Inf")}
    assert buckets == {"0.25": 3, "1.0": 3, "2.5": 5, "+Inf": 6}
    assert (value(found, "queue_seconds_count"), value(found, "queue_seconds_sum")) == (6, 9.5)


def test_a_model_may_start_while_another_thread_scrapes():
    counters = Counters()

    class Core(CoreCounters):
        def snapshot(self, in_flight):
            counters.cores.setdefault(1, CoreCounters(1, 1))  # as a start does
            return super().snapshot(in_flight)

    counters.cores[0] = Core(0, 0)
    assert value(page(net=a_model(counters.snapshot(0, 0))), "core_state", core="0", state="loading") == 1


def test_a_state_that_came_later_is_on_the_page_too():
    async def cores():
        async with puppets()[1] as model:
            return model.statistics()

    statistics = run(cores())
    later = replace(statistics, cores=(replace(statistics.cores[0], state="suspect", global_id=None),))
    found = page(net=a_model(later))
    assert value(found, "core_state", core="0", state="suspect") == 1
    assert sum(amount for (name, _), amount in found.items() if name == "aneuron_core_state") == 1
    assert not any(name == "aneuron_core_global_id" for name, _ in found)


def test_the_process_is_that_of_the_scrape(monkeypatch):
    collector = Collector(net=AsyncDataParallel(torch.neg))  # made before the server forks its workers
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    registry = CollectorRegistry()
    registry.register(collector)
    assert registry.get_sample_value("aneuron_ready", {"model": "net", "pid": "4711"}) == 0


def test_two_collectors_of_one_registry_are_an_error_at_once():
    registry = CollectorRegistry(auto_describe=True)  # as the global one
    registry.register(Collector(one=AsyncDataParallel(torch.neg)))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Collector(other=AsyncDataParallel(torch.neg)))


def test_nothing_is_imported_where_it_is_not_asked_for():
    code = """
import sys, aneuron, aneuron.web.starlette, aneuron.web.aiohttp
print(sorted({"prometheus_client", "opentelemetry"} & sys.modules.keys()))
import aneuron.web.metrics
print(sorted({"prometheus_client", "opentelemetry"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "['prometheus_client']"]


# Real servers.


async def scrape(url, model, calls):
    """Calls while the page is scraped; what is on it at the end."""
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with httpx.AsyncClient(follow_redirects=True, timeout=60.0) as client:
        running = asyncio.gather(*(model(row(n)) for n in range(calls)))
        counts = []
        while not running.done() or len(counts) < 3:
            answer = await client.get(url, headers=headers)
            assert answer.headers["content-type"].startswith("application/openmetrics-text")
            counts.append(value(samples(answer.text), "requests_total", outcome="completed"))
        await running
        answer = await client.get(url, headers=headers)
        plain = await client.get(url)
    assert plain.headers["content-type"].startswith("text/plain")
    assert counts == sorted(counts)
    return samples(answer.text)


async def test_mounted_in_fastapi_under_uvicorn():
    registry = CollectorRegistry()
    app = FastAPI()
    app.mount("/metrics", prometheus_client.make_asgi_app(registry))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    async with AsyncDataParallel(torch.neg, batch_size=4) as model:
        registry.register(Collector(net=model))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/metrics"
            serving = asyncio.create_task(server.serve([listening]))
            try:
                found = await scrape(url, model, 200)
            finally:
                server.should_exit = True
                await serving
    assert value(found, "requests_total", outcome="completed") == 200
    assert value(found, "request_seconds_count") == 200


async def test_a_port_of_its_own_served_by_a_thread():
    registry = CollectorRegistry()
    async with AsyncDataParallel(torch.neg, batch_size=4) as model:
        registry.register(Collector(net=model))
        server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
        try:
            found = await scrape(f"http://127.0.0.1:{server.server_port}/metrics", model, 200)
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join(60.0)
    assert value(found, "requests_total", outcome="completed") == 200


async def test_a_handler_of_aiohttp():
    registry = CollectorRegistry()
    app = web.Application()
    app.router.add_get("/metrics", make_aiohttp_handler(registry))
    runner = web.AppRunner(app)
    async with AsyncDataParallel(torch.neg, batch_size=4) as model:
        registry.register(Collector(net=model))
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0]
            found = await scrape(f"http://{host}:{port}/metrics", model, 200)
        finally:
            await runner.cleanup()
    assert value(found, "requests_total", outcome="completed") == 200
