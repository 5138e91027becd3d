"""A live page of what the cores do: `app` for Starlette and FastAPI, `routes` for aiohttp.

Lives here: samples of `statistics()`, what lies between two of them, the stream of it. Must not be here: what it looks
like (console.html), a task or thread that samples while nobody looks.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib.resources import files
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

from anyio import move_on_after

from aneuron import AsyncDataParallel, Statistics
from aneuron.web.checks import check_models

if TYPE_CHECKING:
    from aiohttp import web
    from starlette.applications import Starlette
    from starlette.types import Send

PERIOD = 1.0  # seconds from one sample to the next
LATELY = 5.0  # seconds that rates and the curves' quantiles are taken over
MINUTES = 300.0  # seconds that the curves show
VIEWERS = 32  # at a time; one of them costs what one number a second for each core costs to send
# A stream ends after so many seconds and the page asks for what follows: servers wait for open connections when they
# stop, and have no way to tell an endless one about it.
STREAM = 5.0

PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
}
STREAM_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Type": "text/event-stream",
    "X-Accel-Buffering": "no",  # nginx would keep events until it has enough of them
}


def app(**models: AsyncDataParallel) -> "Starlette":
    """The console of these models, to be mounted in a Starlette or FastAPI application.

    It shows each model under its name: what its cores do, with whom it shares them, how many calls wait and how long
    they take, why batches closed; of the last five minutes, as far as somebody watched. It neither starts nor closes
    models, shows no inputs or results, and does nothing while no page is open. At most 32 pages are served at a time; a
    page that is open delays the server's end by at most five seconds. With several worker processes, a page shows one
    of them.

    It says how busy a service is and how much it fails: mount it where only those may look who should. FastAPI's
    dependencies do not apply to what is mounted; a middleware of the mount does:
    `Mount("/console", app=console.app(net=model), middleware=[...])`.

    Raises ValueError without models, and TypeError for anything else than an `AsyncDataParallel`.

        >>> import torch, aneuron
        >>> from fastapi import FastAPI
        >>> from aneuron.web import console
        >>> model = aneuron.AsyncDataParallel(torch.nn.ReLU().eval())
        >>> service = FastAPI()
        >>> service.mount("/console", console.app(net=model))
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    check_models(app, models)
    feed, page = Feed(models), _page()

    class Stream(StreamingResponse):
        def __init__(self, seen: str) -> None:
            super().__init__((), headers=STREAM_HEADERS)
            self.seen = seen

        async def stream_response(self, send: "Send") -> None:
            with move_on_after(2 * STREAM):  # of who does not read: it would be a viewer for good
                async with aclosing(feed.events(self.seen)) as self.body_iterator:
                    await super().stream_response(send)

    async def show(request: Request) -> Response:
        return Response(page, headers=PAGE_HEADERS, media_type="text/html")

    async def stream(request: Request) -> Response:
        return Stream(request.headers.get("Last-Event-ID", ""))

    return Starlette(routes=[Route("/", show), Route("/events", stream)])


def routes(path: str, /, **models: AsyncDataParallel) -> "list[web.RouteDef]":
    """The same for aiohttp: what is at that path and below it.

    What `app` says holds here too. A middleware of the application, or of a sub-application, says who may look.

        >>> import torch, aneuron
        >>> from aiohttp import web
        >>> from aneuron.web import console
        >>> model = aneuron.AsyncDataParallel(torch.nn.ReLU().eval())
        >>> service = web.Application()
        >>> _ = service.add_routes(console.routes("/console", net=model))
    """
    from aiohttp import web

    check_models(routes, models)
    feed, page = Feed(models), _page()

    async def show(request: web.Request) -> web.Response:
        return web.Response(body=page, headers=PAGE_HEADERS, content_type="text/html", charset="utf-8")

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        await response.prepare(request)
        with move_on_after(2 * STREAM):
            async with aclosing(feed.events(request.headers.get("Last-Event-ID", ""))) as events:
                async for event in events:
                    await response.write(event)
        return response

    path = path.rstrip("/")
    places = [path, f"{path}/"] if path else ["/"]
    return [*(web.get(place, show) for place in places), web.get(f"{path}/events", stream, allow_head=False)]


def _page() -> bytes:
    return files("aneuron.web").joinpath("console.html").read_bytes()


# What lies between two samples.


@dataclass(frozen=True, slots=True)
class Sample:
    """One model at one time, in seconds of a clock that never goes back."""

    at: float
    ready: bool
    statistics: Statistics
    pool_busy: float = 0.0  # seconds that the executions of all models on its pool have taken


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """What `share` of the observations do not exceed, if they are spread evenly within their bucket; None without any.

    `counts` as in the histograms of `statistics()`; those above the last bound count as equal to it.
    """
    rank = share * sum(counts)
    below, lower = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below, lower = below + count, bound
    return bounds[-1] if any(counts) else None


def quantiles(name: str, earlier: Statistics, later: Statistics) -> list[float | None]:
    """The median and the 99th percentile of what the histogram of that name has counted in between."""
    before, after = getattr(earlier, name), getattr(later, name)
    counts = [new - old for old, new in zip(before.counts, after.counts, strict=True)]
    return [quantile(after.bounds, counts, share) for share in (0.5, 0.99)]


def curves(earlier: Sample, later: Sample) -> dict[str, Any]:
    """What the curves show of the time between two samples; `utilisation` in per cent, one number for each core."""
    old, new, seconds = earlier.statistics, later.statistics, later.at - earlier.at
    before = {core.id: core.busy_seconds for core in old.cores}
    median, slow = quantiles("total_seconds", old, new)
    return {
        "calls_per_second": (new.calls.completed - old.calls.completed) / seconds if seconds else None,
        "waiting": new.calls.waiting,
        "p50": median,
        "p99": slow,
        # An execution is counted when it ends: a long one may seem to have taken more than the time in between.
        "utilisation": [
            round(100 * min(1.0, (core.busy_seconds - before.get(core.id, 0.0)) / seconds)) if seconds else None
            for core in new.cores
        ],
    }


def lanes(earlier: Sample, later: Sample) -> list[dict[str, Any]]:
    """What the lanes show beside their curve; `fill`: how many of a hundred executed rows were callers' rows."""
    before = {core.id: core for core in earlier.statistics.cores}
    shown = []
    for core in later.statistics.cores:
        old = before.get(core.id)
        batches, rows, padded = (
            getattr(core, name) - getattr(old, name, 0) for name in ("batches", "rows", "padded_rows")
        )
        shown.append(
            {
                "id": core.id,
                "state": core.state,
                "in_flight": core.in_flight,
                "batches": core.batches,
                "errors": core.errors,
                "rows_per_batch": round(rows / batches, 1) if batches else None,
                "fill": round(100 * rows / (rows + padded)) if rows else None,
            }
        )
    return shown


def busy_share(earlier: Sample, later: Sample) -> int | None:
    """How many per cent of what all models on its pool have taken of the cores the model has."""
    own = sum(core.busy_seconds for core in later.statistics.cores)
    own -= sum(core.busy_seconds for core in earlier.statistics.cores)
    all_of_them = later.pool_busy - earlier.pool_busy
    return round(100 * min(1.0, max(0.0, own / all_of_them))) if all_of_them > 0 else None


class History:
    """The samples of one model's last minutes, and what follows from them."""

    def __init__(self) -> None:
        self._lately: deque[Sample] = deque()
        self._minutes: deque[Sample] = deque()  # without the cores, which would be most of it

    def add(self, sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the curves and the rest of the page show from now on.

        A span begins with the oldest sample in it: after a time in which nobody looked there are no rates at first.
        """
        self._lately.append(sample)
        self._minutes.append(replace(sample, statistics=replace(sample.statistics, cores=())))
        for samples, span in ((self._lately, LATELY), (self._minutes, MINUTES)):
            while sample.at - samples[0].at > span + PERIOD / 2:
                samples.popleft()
        new, old, first = sample.statistics, self._minutes[0].statistics, self._lately[0]
        calls = new.calls
        return curves(first, sample), {
            "ready": sample.ready,
            "calls": {name: getattr(calls, name) for name in calls.__dataclass_fields__},
            "waiting_rows": new.waiting_rows,
            "lanes": lanes(first, sample),
            "busy_share": busy_share(first, sample),
            "seconds": sample.at - self._minutes[0].at,  # what the rest is about
            "closed_because": {
                why: count - old.closed_because.get(why, 0) for why, count in new.closed_because.items()
            },
            "quantiles": {
                name: quantiles(f"{name}_seconds", old, new) for name in ("queue", "device", "total", "loop_lag")
            },
        }


# The stream.


class Event(NamedTuple):
    """What a sample has added to the curves, as it is sent to a page that opens later."""

    number: int
    at: float
    encoded: bytes


class Feed:
    """The events of one console. The viewers themselves sample: who wakes first takes the one that all of them send."""

    def __init__(self, models: Mapping[str, AsyncDataParallel]) -> None:
        if not models:
            raise ValueError("a console of no models; name them: console.app(net=model)")
        self._models = {name: (model, History()) for name, model in models.items()}
        self._run = token_hex(4)  # numbers of another process mean nothing here
        self._past: deque[Event] = deque()
        self._newest = b""
        self._number = 0
        self._due = 0.0
        self.viewers = 0

    async def events(self, seen: str) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one viewer, from the one after `seen` (its Last-Event-ID) on; see `STREAM`."""
        if self.viewers >= VIEWERS:
            yield b"retry: 10000\nevent: full\ndata: %d\n\n" % VIEWERS
            return
        self.viewers += 1
        try:
            yield b"retry: 250\n\n"
            sent, end = self._last_of(seen), time.monotonic() + STREAM
            while (now := time.monotonic()) < end:
                if now >= self._due:
                    self._sample(now)
                if sent < self._number:
                    missing = [event.encoded for event in self._past if sent < event.number < self._number]
                    sent = self._number
                    yield b"".join((*missing, self._newest))
                await asyncio.sleep(self._due - time.monotonic())
        finally:
            self.viewers -= 1

    def _last_of(self, seen: str) -> int:
        run, _, number = seen.partition("-")
        try:
            return int(number) if run == self._run else 0
        except ValueError:
            return 0

    def _sample(self, now: float) -> None:
        self._due = now + PERIOD
        self._number += 1
        past, rest = {}, {}
        for name, (model, history) in self._models.items():
            models = model.pool.statistics().models
            busy = sum(share.busy_seconds for share in models)
            past[name], rest[name] = history.add(Sample(now, model.ready, model.statistics(), busy))
            others = [other for other, (each, _) in self._models.items() if each.pool is model.pool and other != name]
            unnamed = max(0, len(models) - 1 - len(others))
            rest[name]["pool"] = {"weight": model.weight, "with": others, "unnamed": unnamed}
        self._newest = self._encode({"at": now, "curves": past, "models": rest, "process": os.getpid()})
        while self._past and now - self._past[0].at > MINUTES:
            self._past.popleft()
        self._past.append(Event(self._number, now, self._encode({"at": now, "curves": past})))

    def _encode(self, data: dict[str, Any]) -> bytes:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        return f"id: {self._run}-{self._number}\ndata: {text}\n\n".encode()
