"""OpenTelemetry: what is a child of what, what is linked, what spans say. With the SDK and its in-memory exporter."""

import asyncio
import socket
import subprocess
import sys
import textwrap

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from opentelemetry import baggage, context, trace
from opentelemetry.propagate import extract, inject
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import SpanKind, StatusCode
from puppets import call, release_all, row, scenario

from aneuron import AsyncDataParallel, CoreFailed, CpuBackend, DeadlineExceeded, Fault, QueueFull, ShapeError
from aneuron.testing import PuppetBackend, settle
from aneuron.web.tracing import instrument


class Traced:
    """A tracer of its own, and what has been exported."""

    def __init__(self, sampler=ALWAYS_ON):
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def spans(self, name=None):
        return [span for span in self._exporter.get_finished_spans() if name is None or span.name == name]

    def instrumented(self, net=torch.neg, cores=1, service_time=1.0, batch_size=4, **settings):
        backend = PuppetBackend(cores, service_time, faults={OSError: Fault.CORE})
        model = AsyncDataParallel(net, backend=backend, batch_size=batch_size, **settings)
        instrument(self.provider, net=model)
        return model

    def one(self, name):
        (span,) = self.spans(name)
        return span


def linked(batch):
    """The spans that a batch is linked to, and how many of their rows it has."""
    return {link.context.span_id: link.attributes["aneuron.rows"] for link in batch.links}


def is_child(span, parent):
    return span.parent is not None and span.parent.span_id == parent.context.span_id


@scenario
async def test_a_call_is_below_the_request_and_its_batch_stands_apart():
    traced = Traced()
    async with traced.instrumented() as model:
        with traced.tracer.start_as_current_span("request") as current:
            await model(row(1))
            assert trace.get_current_span() is current
    request, own, batch = traced.one("request"), traced.one("call net"), traced.one("batch net")
    assert is_child(own, request)
    assert batch.parent is None
    assert batch.context.trace_id != own.context.trace_id
    assert [link.context for link in batch.links] == [own.context]
    assert own.status.status_code is batch.status.status_code is StatusCode.UNSET
    assert own.kind is batch.kind is SpanKind.INTERNAL
    assert own.start_time <= batch.start_time <= batch.end_time <= own.end_time


@scenario
async def test_what_spans_say():
    traced = Traced()
    async with traced.instrumented() as model:
        busy = call(model, rows=4)
        await settle()
        await asyncio.sleep(0.25)
        await model(row(1, rows=3))
        await busy
    where = {"aneuron.model": "net", "aneuron.core": 0, "aneuron.batch_rows": 3, "aneuron.padded_rows": 1}
    where["aneuron.why"] = "core_idle"
    assert dict(traced.spans("batch net")[1].attributes) == where
    times = {"aneuron.queue_seconds": 0.75, "aneuron.device_seconds": 1.0}
    assert dict(traced.spans("call net")[1].attributes) == where | times
    assert {span.instrumentation_scope.name for span in traced.spans()} == {"aneuron"}


@scenario
async def test_calls_of_several_requests_share_one_batch_span():
    traced = Traced()
    async with traced.instrumented() as model:

        async def handler(n):
            with traced.tracer.start_as_current_span(f"request {n}"):
                await model(row(n, rows=n))

        await asyncio.gather(handler(1), handler(2))
    calls = traced.spans("call net")
    assert len({span.context.trace_id for span in calls}) == 2
    assert all(is_child(own, traced.one(f"request {n}")) for n, own in enumerate(calls, 1))
    assert linked(traced.one("batch net")) == {own.context.span_id: n for n, own in enumerate(calls, 1)}


@scenario
async def test_a_call_over_several_batches_is_linked_by_each():
    traced = Traced()
    async with traced.instrumented(cores=2) as model:
        await model(row(1, rows=9))
    own = traced.one("call net").context.span_id
    batches = traced.spans("batch net")
    assert sorted(linked(batch)[own] for batch in batches) == [1, 4, 4]
    assert len({batch.context.trace_id for batch in batches}) == 3
    assert {batch.attributes["aneuron.core"] for batch in batches} == {0, 1}


@scenario
async def test_the_model_s_error_is_in_its_call_and_in_the_batches_that_met_it():
    def picky(x):
        if (x == 3).any():
            raise LookupError("three")
        return -x

    traced = Traced()
    async with traced.instrumented(picky) as model:
        await asyncio.gather(*(model(row(n)) for n in range(4)), return_exceptions=True)
    *good, bad = sorted(traced.spans("call net"), key=lambda span: span.status.status_code is StatusCode.ERROR)
    assert [span.status.status_code for span in good] == [StatusCode.UNSET] * 3
    failed = [span for span in traced.spans("batch net") if span.status.status_code is StatusCode.ERROR]
    assert len(failed) == 3  # four rows, two, one
    for span in (bad, *failed):
        assert span.attributes["error.type"] == "LookupError"
        (event,) = span.events
        assert (event.name, event.attributes["exception.message"]) == ("exception", "three")
    assert [linked(span).keys() for span in failed][-1] == {bad.context.span_id}
    assert [span.attributes["aneuron.why"] for span in failed] == ["full", "rerun", "rerun"]
    assert len(traced.spans("batch net")) == 5
    assert not any("error.type" in span.attributes for span in good)


@scenario
async def test_our_own_errors_are_named_as_the_front_door_names_them():
    traced = Traced()
    backend = PuppetBackend(1, faults={OSError: Fault.CORE})
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=4, example_inputs=row(rows=4), max_pending=4)
    instrument(traced.provider, net=model)
    async with model:
        with pytest.raises(ShapeError):
            await model(torch.ones(1, 5))
        broken = call(model, rows=4)
        await settle()
        waiting = call(model.options(timeout=1.0), rows=4)
        await settle()
        with pytest.raises(QueueFull):
            await model(row(rows=4))
        with pytest.raises(DeadlineExceeded):
            await waiting
        backend[0].release(OSError("gone"))
        with pytest.raises(CoreFailed):
            await broken
    spans = traced.spans("call net")
    types = ["aneuron.ShapeError", "aneuron.QueueFull", "aneuron.DeadlineExceeded", "aneuron.CoreFailed"]
    assert [span.attributes["error.type"] for span in spans] == types
    assert all(span.status.status_code is StatusCode.ERROR for span in spans)
    assert traced.one("batch net").attributes["error.type"] == "OSError"


@scenario
async def test_a_cancelled_call_says_so_and_is_no_error():
    traced = Traced()
    async with traced.instrumented() as model:
        running = call(model, rows=4)
        await settle()
        waiting = call(model, 1)
        await settle()
        for task in (waiting, running):
            task.cancel()
        await asyncio.wait([waiting, running])
    for span in traced.spans("call net"):
        assert dict(span.attributes) == {"aneuron.model": "net", "aneuron.cancelled": True}
        assert span.status.status_code is StatusCode.UNSET
        assert not span.events
    assert len(traced.spans("call net")) == 2
    assert linked(traced.one("batch net")) == {traced.spans("call net")[1].context.span_id: 4}


@scenario
async def test_map_s_calls_are_below_whoever_reads_the_results():
    traced = Traced()

    async def source():
        for n in range(3):
            yield row(n)

    async with traced.instrumented() as model:
        with traced.tracer.start_as_current_span("request"):
            assert len([y async for y in model.map(source())]) == 3
    assert [is_child(span, traced.one("request")) for span in traced.spans("call net")] == [True] * 3


@scenario
async def test_two_models_have_spans_of_their_own_names():
    traced = Traced()
    one, other = (AsyncDataParallel(torch.neg, backend=PuppetBackend(1, 1.0)) for _ in range(2))
    instrument(traced.provider, one=one, other=other)
    async with one, other:
        await asyncio.gather(one(row()), other(row()))
    assert {span.name for span in traced.spans()} == {"call one", "call other", "batch one", "batch other"}
    assert traced.one("batch other").attributes["aneuron.model"] == "other"


# Sampling.


@scenario
async def test_a_batch_is_linked_to_sampled_calls_only():
    traced, silent = Traced(), Traced(ALWAYS_OFF)
    traced.provider.sampler = ParentBased(ALWAYS_ON)
    async with traced.instrumented() as model:

        async def handler(source):
            with source.tracer.start_as_current_span("request"):
                await model(row())

        await asyncio.gather(handler(silent), handler(traced), handler(silent))
        assert linked(traced.one("batch net")) == {traced.one("call net").context.span_id: 1}
        await asyncio.gather(handler(silent), handler(silent))
        assert len(traced.spans("batch net")) == 1


class Linked(Sampler):
    """Roots that have links, and no others."""

    def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, links=None, trace_state=None):
        sampler = ALWAYS_ON if links else ALWAYS_OFF
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self):
        return "Linked"


@scenario
async def test_a_sampler_can_keep_the_batches_of_sampled_calls():
    requests, traced = Traced(), Traced(ParentBased(Linked()))
    async with traced.instrumented() as model:
        await model(row())  # without a request: a root without links
        with requests.tracer.start_as_current_span("request"):
            await model(row())
    assert linked(traced.one("batch net")) == {traced.one("call net").context.span_id: 1}


# Threads.


async def test_spans_that_the_model_makes_are_below_its_batch():
    traced = Traced()

    def net(x):
        with traced.tracer.start_as_current_span("inside"):
            assert baggage.get_all() == {}  # of which of the callers?
            return -x

    model = AsyncDataParallel(net, backend=CpuBackend(cores=2), batch_size=4)
    token = context.attach(baggage.set_baggage("tenant", "acme"))
    with traced.tracer.start_as_current_span("request"):
        async with model:  # its threads are started below a span, which is not their parent
            instrument(traced.provider, net=model)
            await asyncio.gather(*(model(row(n)) for n in range(40)))
            rows = [row(n) for n in range(5)]
            assert len([y async for y in model.map(rows)]) == 5  # read in a thread
    context.detach(token)
    calls, batches = traced.spans("call net"), {span.context.span_id: span for span in traced.spans("batch net")}
    assert all(is_child(span, traced.one("request")) for span in calls)
    assert all(span.parent is None for span in batches.values())
    assert {span.parent.span_id for span in traced.spans("inside")} == set(batches)
    links = [link.context.span_id for span in batches.values() for link in span.links]
    assert sorted(links) == sorted(span.context.span_id for span in calls)
    assert len(calls) == 45


async def test_below_the_span_of_a_request_that_came_over_a_socket():
    traced = Traced()
    app = FastAPI()
    model = AsyncDataParallel(torch.neg, batch_size=4)

    @app.middleware("http")
    async def server_span(request: Request, call_next):  # as OpenTelemetry's instrumentation of a framework does
        with traced.tracer.start_as_current_span("GET /", extract(request.headers), SpanKind.SERVER):
            return await call_next(request)

    @app.get("/")
    async def predict(x: float):
        return (await model(row(x)))[0].tolist()

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    async with model:
        instrument(traced.provider, net=model)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            serving = asyncio.create_task(server.serve([listening]))
            try:
                async with httpx.AsyncClient(timeout=60.0) as client:

                    async def ask(n):
                        with traced.tracer.start_as_current_span("client"):
                            headers: dict = {}
                            inject(headers)
                            answer = await client.get(url, params={"x": n}, headers=headers)
                        assert answer.json() == [-n, -n]

                    await asyncio.gather(*(ask(n) for n in range(8)))
            finally:
                server.should_exit = True
                await serving
    clients = {span.context.span_id: span for span in traced.spans("client")}
    requests = {span.context.span_id: span for span in traced.spans("GET /")}
    calls = traced.spans("call net")
    assert len(clients) == len(requests) == len(calls) == 8
    for span in calls:
        request = requests.pop(span.parent.span_id)
        assert clients.pop(request.parent.span_id).context.trace_id == span.context.trace_id
    links = [link.context.span_id for batch in traced.spans("batch net") for link in batch.links]
    assert sorted(links) == sorted(span.context.span_id for span in calls)


# Without.


def program(text):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_provider_may_be_set_later_and_until_then_nothing_is_made():
    said = program("""
        import asyncio, sys, torch
        from aneuron import AsyncDataParallel
        from aneuron.web.tracing import instrument

        assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
        model = AsyncDataParallel(torch.neg)
        instrument(net=model)

        async def main():
            async with model:
                await model(torch.ones(1, 1))
                from opentelemetry import trace
                from opentelemetry.sdk.trace import TracerProvider
                from opentelemetry.sdk.trace.export import SimpleSpanProcessor
                from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
                exporter = InMemorySpanExporter()
                provider = TracerProvider()
                provider.add_span_processor(SimpleSpanProcessor(exporter))
                trace.set_tracer_provider(provider)
                await model(torch.ones(1, 1))
                await model(torch.ones(1, 1))
                model.observe(None)
                await model(torch.ones(1, 1))
            print(sorted(span.name for span in exporter.get_finished_spans()))

        asyncio.run(main())
    """)
    assert said == "['batch net', 'batch net', 'call net', 'call net']"


@scenario
async def test_a_model_that_is_not_instrumented_makes_no_spans():
    traced = Traced()
    backend = PuppetBackend(1)
    with traced.tracer.start_as_current_span("request"):
        async with AsyncDataParallel(torch.neg, backend=backend) as model:
            await release_all(backend, call(model))
    assert [span.name for span in traced.spans()] == ["request"]


def _three_hundred(limits):
    from opentelemetry.sdk.trace import SpanLimits

    traced = Traced()
    exporter = traced._exporter
    traced.provider = TracerProvider(span_limits=SpanLimits(max_links=limits))
    traced.provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def main():
        backend = CpuBackend(cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=300) as model:
            instrument(traced.provider, net=model)
            await asyncio.gather(*[model(torch.ones(1, 1)) for _ in range(300)])

    asyncio.run(main())
    return traced


@pytest.mark.parametrize("limit", [None, 7, 128, 300, 1000])
def test_a_batch_of_more_calls_than_a_span_may_have_links_is_linked_to_all(limit):
    traced = _three_hundred(limit)
    batches = {span.context.span_id: span for span in traced.spans("batch net")}
    further = traced.spans("batch net links")
    assert all(span.parent.span_id in batches for span in further)
    calls = {span.context.span_id for span in traced.spans("call net")}
    found = [link.context.span_id for span in (*batches.values(), *further) for link in span.links]
    assert len(calls) == len(found) == 300
    assert set(found) == calls
    assert not any(span.dropped_links for span in further)


def test_where_links_are_switched_off_there_are_no_further_spans():
    assert not _three_hundred(0).spans("batch net links")
