"""The live page: what lies between two samples, the stream over real servers, the page in a real browser."""

import asyncio
import contextlib
import functools
import json
import re
import shutil
import socket
from importlib.resources import files
from pathlib import Path

import aiohttp
import pytest
import torch
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from selenium import webdriver

from aneuron import AsyncDataParallel, Pool, SimulatedBackend, cli
from aneuron.stats import SECONDS, CoreCounters, Counters, Tally
from aneuron.web import console

pytestmark = pytest.mark.xdist_group("browser")  # it is started once
PAGE = files("aneuron.web").joinpath("console.html").read_text("utf-8")
PICTURES = Path(__file__).parents[1] / "build" / "console"


class Counted(AsyncDataParallel):
    """A model that knows how often it was sampled."""

    samples = 0

    def statistics(self):
        self.samples += 1
        return super().statistics()


def model(cores=2, service_time=0.002):
    backend = SimulatedBackend(cores=cores, service_time=service_time)
    return Counted(torch.neg, batch_size=8, backend=backend)


async def until(condition, what="it"):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


# What lies between two samples.


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((4, 0, 0, 0), 0.5, 0.5),
        ((4, 0, 0, 0), 1.0, 1.0),
        ((0, 10, 0, 0), 0.5, 1.5),
        ((0, 10, 0, 0), 0.99, 1.99),
        ((5, 0, 5, 0), 0.5, 1.0),
        ((5, 0, 5, 0), 0.75, 3.5),
        ((0, 0, 1, 0), 0.5, 3.5),
        ((0, 0, 0, 3), 0.5, 5.0),
        ((1, 0, 0, 99), 0.99, 5.0),
    ],
)
def test_a_quantile_is_read_from_the_buckets(counts, share, value):
    assert console.quantile((1.0, 2.0, 5.0), counts, share) == (None if value is None else pytest.approx(value))


@given(st.lists(st.floats(1e-6, 49.0), min_size=1, max_size=300), st.sampled_from([0.5, 0.99]))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values, share):
    tally = Tally(SECONDS)
    tally.add_all(values)
    read = console.quantile(SECONDS, tally.snapshot().counts, share)
    true = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    bucket = [bound for bound in (0.0, *SECONDS) if bound < true][-1], min(bound for bound in SECONDS if bound >= true)
    assert bucket[0] <= read <= bucket[1] * (1 + 1e-9)


class Machine:
    """Counters of a model that does what a test says."""

    def __init__(self, cores=2):
        self.counters = Counters()
        self.history = console.History()
        for core in range(cores):
            self.add_core(core)

    def add_core(self, core):
        counters = self.counters.cores[core] = CoreCounters(core, None)
        counters.state = "ready"

    def execute(self, core, batches, rows, padded, seconds, why="full", total=0.03):
        for _ in range(batches):
            self.counters.cores[core].executed(rows, padded, seconds)
            self.counters.closed_because[why] += 1
            self.counters.accepted += rows
            self.counters.completed += rows
            self.counters.total_seconds.add_all([total] * rows)

    def look(self, at, waiting=0):
        return self.history.add(console.Sample(at, True, self.counters.snapshot(waiting, 2 * waiting)))


def test_the_first_sample_has_numbers_but_no_rates():
    machine = Machine()
    machine.execute(0, batches=3, rows=8, padded=0, seconds=0.1)
    machine.counters.accepted += 7
    curves, rest = machine.look(100.0, waiting=7)
    assert curves == {"calls_per_second": None, "waiting": 7, "p50": None, "p99": None, "utilisation": [None, None]}
    assert rest["calls"]["completed"] == 24
    assert rest["waiting_rows"] == 14
    assert rest["seconds"] == 0.0
    assert rest["lanes"][0] == {
        "id": 0, "state": "ready", "in_flight": 0, "batches": 3, "errors": 0, "rows_per_batch": None, "fill": None,
    }  # fmt: skip


def test_rates_are_those_of_the_last_seconds():
    machine = Machine()
    machine.execute(0, batches=50, rows=8, padded=0, seconds=0.1)  # before anybody looked
    machine.look(100.0)
    machine.execute(0, batches=10, rows=6, padded=2, seconds=0.05, total=0.03)
    machine.execute(1, batches=2, rows=8, padded=0, seconds=0.25, why="core_idle", total=0.3)
    curves, rest = machine.look(102.0)
    assert curves["calls_per_second"] == (60 + 16) / 2.0
    assert curves["utilisation"] == [25, 25]
    assert 0.025 < curves["p50"] <= 0.05
    assert 0.25 < curves["p99"] <= 0.5
    assert [lane["fill"] for lane in rest["lanes"]] == [75, 100]
    assert [lane["rows_per_batch"] for lane in rest["lanes"]] == [6.0, 8.0]
    assert [lane["batches"] for lane in rest["lanes"]] == [60, 2]
    assert rest["closed_because"] == {"full": 10, "core_idle": 2, "delay": 0, "signature": 0, "drain": 0}
    for second in range(103, 110):  # nothing more comes
        curves, rest = machine.look(float(second))
    assert curves == {"calls_per_second": 0.0, "waiting": 0, "p50": None, "p99": None, "utilisation": [0, 0]}
    assert rest["lanes"][0]["fill"] is None
    assert rest["closed_because"]["full"] == 10  # in the last minutes
    assert rest["quantiles"]["total"][0] is not None


def test_the_minutes_pass():
    machine = Machine()
    machine.look(0.0)
    machine.execute(0, batches=5, rows=8, padded=0, seconds=0.1)
    for second in range(1, 301):
        _, rest = machine.look(float(second))
    assert rest["seconds"] == 300.0
    assert rest["closed_because"]["full"] == 5
    _, rest = machine.look(301.0)
    assert rest["seconds"] == 300.0
    assert rest["closed_because"]["full"] == 0
    assert rest["quantiles"]["total"] == [None, None]


def test_after_a_time_in_which_nobody_looked_there_are_no_rates_at_first():
    machine = Machine()
    machine.look(0.0)
    machine.execute(0, batches=5, rows=8, padded=0, seconds=0.1)
    curves, rest = machine.look(60.0)
    assert curves["calls_per_second"] is None
    assert rest["closed_because"]["full"] == 5  # of the last minute, as it says
    assert rest["seconds"] == 60.0
    _, rest = machine.look(5000.0)
    assert rest["closed_because"]["full"] == 0
    assert rest["seconds"] == 0.0


def test_a_core_is_never_more_than_busy():
    machine = Machine(cores=1)
    machine.look(0.0)
    machine.execute(0, batches=1, rows=8, padded=0, seconds=20.0)  # begun long before
    assert machine.look(1.0)[0]["utilisation"] == [100]


def test_a_core_that_appears_counts_from_nothing():
    machine = Machine(cores=1)
    machine.look(0.0)
    machine.add_core(1)
    machine.execute(1, batches=2, rows=4, padded=4, seconds=0.25)
    curves, rest = machine.look(1.0)
    assert curves["utilisation"] == [0, 50]
    assert rest["lanes"][1]["fill"] == 50


# The stream.


def parse(stream):
    """The fields of each event, with data read from JSON."""
    events = []
    for block in stream.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


async def viewed(feed, seen="", events=3):
    """The first events of a stream; then the viewer leaves."""
    stream = b""
    async with contextlib.aclosing(feed.events(seen)) as chunks:
        async for chunk in chunks:
            stream += chunk
            if len(parse(stream)) >= events:
                break
    return parse(stream)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(console, "PERIOD", 0.05)


@pytest.mark.usefixtures("quick")
async def test_many_viewers_share_one_sampler_and_without_viewers_there_is_none():
    net = model()
    feed = console.Feed({"net": net})
    seen = await asyncio.gather(*(viewed(feed, events=6) for _ in range(9)))
    assert len({tuple(event["id"] for event in events) for events in seen}) == 1
    assert net.samples == 6
    assert feed.viewers == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await asyncio.sleep(0.3)
    assert net.samples == 6


@pytest.mark.usefixtures("quick")
async def test_who_comes_later_gets_the_curves_so_far_and_who_comes_again_what_is_missing():
    feed = console.Feed({"net": model()})
    first = await viewed(feed, events=5)
    later = await viewed(feed, events=6)
    assert [event["id"] for event in later[:5]] == [event["id"] for event in first]
    assert ["models" in event["data"] for event in later] == [False] * 4 + [True] * 2
    assert [event["data"]["curves"] for event in later[:5]] == [event["data"]["curves"] for event in first]
    again = await viewed(feed, seen=first[2]["id"], events=4)
    assert [event["id"] for event in again[:3]] == [event["id"] for event in later[3:6]]
    assert "models" in again[-1]["data"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "seen", ["", "-", "nonsense", "0123abcd-2", "{run}-", "{run}-x", "{run}-²", "{run}-" + "9" * 5000]
)
async def test_who_saw_something_else_gets_everything(seen):
    feed = console.Feed({"net": model()})
    first = await viewed(feed, events=3)
    run = first[0]["id"].partition("-")[0]
    assert [event["id"] for event in (await viewed(feed, seen.format(run=run), 3))] == [e["id"] for e in first]


async def test_a_stream_ends_so_that_a_server_can(monkeypatch):
    monkeypatch.setattr(console, "PERIOD", 0.01)
    monkeypatch.setattr(console, "STREAM", 0.05)
    feed = console.Feed({"net": model()})
    async with asyncio.timeout(60):
        stream = b"".join([chunk async for chunk in feed.events("")])
    assert stream.startswith(b"retry: 250\n\n")
    assert len(parse(stream)) > 1
    assert feed.viewers == 0


@pytest.mark.usefixtures("quick")
async def test_viewers_are_bounded(monkeypatch):
    monkeypatch.setattr(console, "VIEWERS", 2)
    feed = console.Feed({"net": model()})
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            events = await stack.enter_async_context(contextlib.aclosing(feed.events("")))
            await anext(events)
        refused = [chunk async for chunk in feed.events("")]
        assert refused == [b"retry: 10000\nevent: full\ndata: 2\n\n"]
    assert len(await viewed(feed)) == 3


@pytest.mark.parametrize("make", [console.app, lambda **models: console.routes("/console", **models)])
def test_what_is_no_model_is_refused_when_it_is_mounted(make):
    with pytest.raises(ValueError, match="a console of no models"):
        make()
    with pytest.raises(TypeError, match=r"net=<built-in method neg.*expected an aneuron.AsyncDataParallel"):
        make(net=torch.neg)


# Servers.


@contextlib.asynccontextmanager
async def served(application, port=0):
    """A real uvicorn on this loop: its port."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        async with asyncio.timeout(60):
            await task


@contextlib.asynccontextmanager
async def served_by_aiohttp(application):
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]
    finally:
        async with asyncio.timeout(60):
            await runner.cleanup()


def in_starlette(**models):
    application = FastAPI()
    application.mount("/console", console.app(**models))
    return served(application)


def in_aiohttp(**models):
    application = web.Application()
    application.add_routes(console.routes("/console", **models))
    return served_by_aiohttp(application)


FRAMEWORKS = pytest.mark.parametrize("framework", [in_starlette, in_aiohttp])


@FRAMEWORKS
async def test_the_page_and_what_is_not_there(framework):
    async with framework(net=model()) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        for path in ("/console", "/console/"):
            async with client.get(path) as answer:
                assert answer.status == 200
                assert answer.content_type == "text/html"
                assert await answer.text() == PAGE
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        for method, path, status in [
            ("HEAD", "/console/", 200), ("POST", "/console/", 405), ("POST", "/console/events", 405),
            ("GET", "/console/nothing", 404), ("GET", "/console/events/", 404), ("GET", "/events", 404),
        ]:  # fmt: skip
            async with client.request(method, path, allow_redirects=path != "/console/events/") as answer:
                assert answer.status in (status, 307) if path == "/console/events/" else answer.status == status


@FRAMEWORKS
@pytest.mark.usefixtures("quick")
async def test_who_leaves_costs_nothing_from_then_on(framework):
    net = model()
    async with framework(net=net) as port:
        before = asyncio.all_tasks()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /console/events HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"200" in head.splitlines()[0]
        assert b"content-type: text/event-stream" in head.lower()
        async with asyncio.timeout(60):
            while net.samples < 3:
                assert await reader.read(1000)
        writer.transport.abort()
        await until(lambda: not asyncio.all_tasks() - before)
        samples = net.samples
        await asyncio.sleep(0.3)
        assert net.samples == samples


@FRAMEWORKS
async def test_an_open_page_does_not_keep_the_server_from_ending(framework, monkeypatch):
    monkeypatch.setattr(console, "STREAM", 0.5)
    async with framework(net=model()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /console/events HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"data: ")
    writer.close()  # the server has ended before the client; else `served` would have raised


@pytest.mark.usefixtures("quick")
async def test_who_does_not_read_does_not_stay(monkeypatch):
    monkeypatch.setattr(console, "STREAM", 0.1)
    net, sent = model(), asyncio.Event()

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            sent.set()
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/events", "root_path": "", "headers": [], "query_string": b""}
    async with asyncio.timeout(60):
        await console.app(net=net)(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)
    assert sent.is_set()


@pytest.mark.usefixtures("quick")
async def test_models_on_a_pool_say_with_whom_they_share_it():
    pool = Pool(backend=SimulatedBackend(cores=2, service_time=0.002))
    a, b, hidden = (AsyncDataParallel(torch.neg, pool=pool, weight=weight) for weight in (3.0, 1.0, 1.0))
    alone = model()
    feed = console.Feed({"a": a, "b": b, "alone": alone})
    async with pool, alone:
        for each in (a, b, hidden):
            await each.start()
        feed._sample(1.0)
        await asyncio.gather(a(torch.ones(1, 1)), b(torch.ones(1, 1)))
        await until(lambda: all(share.busy_seconds for share in pool.statistics().models[:2]))
        feed._sample(2.0)
        shown = json.loads(feed._newest.split(b"data: ")[1])["models"]
    assert shown["a"]["pool"] == {"weight": 3.0, "with": ["b"], "unnamed": 1}
    assert shown["b"]["pool"] == {"weight": 1.0, "with": ["a"], "unnamed": 1}
    assert shown["alone"]["pool"] == {"weight": 1.0, "with": [], "unnamed": 0}
    assert 20 <= shown["a"]["busy_share"] <= 80
    assert shown["alone"]["busy_share"] is None


# The page.


def test_the_page_needs_nothing_from_elsewhere():
    assert set(re.findall(r"https?:[^\"' )]+", PAGE)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|<link(?! rel=\"icon\" href=\"data:)|\bsrc=|url\(|innerHTML", PAGE)


def luminance(color):
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme):
    blocks = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)
    colors = {name: luminance(color) for name, color in re.findall(r"--(\w+): #(\w+);", blocks[scheme == "dark"])}
    assert len(colors) == 12
    grounds = {colors.pop("ground"), colors.pop("surface")}
    colors.pop("line")
    for name, color in colors.items():
        for ground in grounds:
            low, high = sorted((color, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name}: WCAG 2.2 asks for 4.5:1"


# A browser.


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class Browser:
    """A headless Chromium; every question to it is asked in a thread, while the loop serves the page."""

    def __init__(self, profile):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (*QUIET.split(), f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def __getattr__(self, name):
        return functools.partial(asyncio.to_thread, getattr(self.driver, name))

    @contextlib.asynccontextmanager
    async def on(self, port, width=1440, height=900, scheme="light"):
        """The page, live; left at the end, without errors."""
        await self.shape(width, height, scheme)
        await self.get("about:blank")
        await self.get_log("browser")  # what an earlier test has left there is not this one's
        await self.get(f"http://127.0.0.1:{port}/console/")
        await self.until(STATUS, "live".__eq__)
        yield
        errors = [entry for entry in await self.get_log("browser") if entry["level"] == "SEVERE"]
        await self.get("about:blank")
        assert not errors

    async def shape(self, width, height, scheme):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    async def until(self, script, condition):
        """What the script says, once it is right."""
        async with asyncio.timeout(60):
            while not condition(said := await self.execute_script(script)):
                await asyncio.sleep(0.05)
            return said

    async def picture(self, name):
        PICTURES.mkdir(parents=True, exist_ok=True)
        assert await self.save_screenshot(str(PICTURES / name))


STATUS = "return document.querySelector('#status').textContent"
NUMBERS = """
const model = document.querySelector('[data-model=net]');
const all = (selector, read) => [...model.querySelectorAll(selector)].map(read);
const texts = (selector) => all(selector, (element) => element.textContent);
return {
  ...Object.fromEntries(all('[data-of]', (element) => [element.dataset.of, element.textContent])),
  states: texts('.lane .state'),
  busy: texts('.lane .busy'),
  fill: texts('.lane .fill'),
  batches: texts('.lane .batches'),
  why: Object.fromEntries(all('.why li', (item) => [item.dataset.why, item.lastChild.textContent])),
  shares: texts('.why b'),
  times: texts('.times [data-of=total] td'),
  curve: model.querySelector('path').getAttribute('d')?.length ?? 0,
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


def number(text):
    return int(text.split()[0].replace(",", ""))


def seconds(text):
    value, unit = text.split()
    return float(value) * {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]


@contextlib.asynccontextmanager
async def load(net, callers):
    """Callers that call again and again; at the end all have their answers."""
    calling = True

    async def caller():
        while calling:
            await net(torch.ones(1, 4))

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
        try:
            yield
        finally:
            calling = False


@FRAMEWORKS
async def test_the_numbers_move_and_agree_with_the_statistics(framework, browser):
    models = {"net": model(cores=4, service_time=0.01), "<b>&amp;": model()}
    net = models["net"]
    async with net, framework(**models) as port, browser.on(port):
        assert (await browser.execute_script(NUMBERS))["completed"] == "0"
        async with load(net, callers=52):
            some = await browser.until(NUMBERS, lambda shown: number(shown["completed"]) > 0 and shown["curve"] > 30)
            # Not each sample has them all: what runs is what runs at that instant.
            await browser.until(NUMBERS, lambda shown: number(shown["completed"]) > number(some["completed"]))
            await browser.until(NUMBERS, lambda shown: number(shown["calls_per_second"]) > 0)
            await browser.until(NUMBERS, lambda shown: number(shown["running"]) > 0)
            await browser.until(NUMBERS, lambda shown: any(number(busy) > 0 for busy in shown["busy"]))
            await browser.until(NUMBERS, lambda shown: shown["curve"] > some["curve"])
            await browser.picture(f"{framework.__name__}-light.png")
            await browser.shape(1440, 900, "dark")
            await browser.picture(f"{framework.__name__}-dark.png")
        now = net.statistics()
        shown = await browser.until(NUMBERS, lambda shown: number(shown["completed"]) == now.calls.completed)
        for fate in ("completed", "failed", "cancelled", "refused", "running"):
            assert number(shown[fate]) == getattr(now.calls, fate)
        assert (number(shown["waiting"]), number(shown["waiting_rows"])) == (now.calls.waiting, now.waiting_rows)
        assert shown["states"] == [core.state for core in now.cores] == ["ready"] * 4
        assert [number(text) for text in shown["batches"]] == [core.batches for core in now.cores]
        assert {why: number(count) for why, count in shown["why"].items()} == now.closed_because
        batches = sum(now.closed_because.values())
        for share, count in zip(shown["shares"], now.closed_because.values(), strict=True):
            assert abs(number(share) - 100 * count / batches) <= 0.5
        total = now.total_seconds
        for text, share in zip(shown["times"], (0.5, 0.99), strict=True):  # three digits of it
            assert seconds(text) == pytest.approx(console.quantile(total.bounds, total.counts, share), rel=0.006)
        names = "return [...document.querySelectorAll('h2')].map((heading) => heading.innerHTML)"
        assert await browser.execute_script(names) == ["net", "&lt;b&gt;&amp;amp;"]


async def test_the_page_says_with_whom_cores_are_shared(browser):
    pool = Pool(backend=SimulatedBackend(cores=2, service_time=0.01))
    encoder, reranker = (AsyncDataParallel(torch.neg, pool=pool, batch_size=8, weight=weight) for weight in (2.0, 1.0))
    script = "return [...document.querySelectorAll('.pool')].map((line) => line.textContent)"
    async with pool, in_starlette(encoder=encoder, reranker=reranker, alone=model()) as port, browser.on(port):
        await encoder.start()
        async with load(encoder, callers=40), load(reranker, callers=40):
            first, second, third = await browser.until(script, lambda shown: "% of" in "".join(shown[:1]))
            await browser.picture("pool.png")
            info = await asyncio.to_thread(cli.info.served, f"http://127.0.0.1:{port}/console")
        lines = cli.info.pools(info)
        assert lines[0] == "cores 0, 1"
        assert re.fullmatch(r"  encoder +weight 2( +\d+ % of the busy time)?", lines[1])
        assert lines[2].startswith("  reranker              weight 1")
        assert lines[3:] == ["cores not started", "  alone                 weight 1"]
        assert re.fullmatch(r"shared with reranker; weight 2; \d+ % of their busy time", first)
        assert second.startswith("shared with encoder; weight 1")
        assert third == ""


CLIPPED = """
const elements = [...document.querySelectorAll('header, .name, .panel, .panel *, .lane, .lane div:not(.more)')];
return elements.filter((element) => element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
  .map((element) => element.outerHTML.slice(0, 200));
"""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("width", "height", "scheme"), [(1440, 1500, "light"), (380, 900, "dark")])
async def test_sixty_four_cores_can_be_read(width, height, scheme, browser):
    async with (
        model(cores=64, service_time=0.02) as net,
        in_starlette(net=net) as port,
        load(net, callers=700),
        browser.on(port, width, height, scheme),
    ):
        shown = await browser.until(NUMBERS, lambda shown: "%" in shown["fill"][-1] and shown["curve"] > 300)
        await browser.picture(f"64-cores-{width}-{scheme}.png")
        assert len(shown["states"]) == 64
        assert await browser.execute_script(CLIPPED) == []
        assert await browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


async def test_a_page_that_pauses_costs_nothing_and_one_that_lost_its_server_finds_it_again(browser, monkeypatch):
    monkeypatch.setattr(console, "STREAM", 0.5)
    monkeypatch.setattr(console, "PERIOD", 0.1)
    net = model()
    curve = "return document.querySelector('path').getAttribute('d')"
    pause = "document.querySelector('#pause').click()"
    application = FastAPI()
    application.mount("/console", console.app(net=net))
    async with served(application) as port:
        before = asyncio.all_tasks()
        await browser.shape(1440, 900, "light")
        await browser.get(f"http://127.0.0.1:{port}/console/")
        drawn = await browser.until(curve, lambda d: d is not None and d.count("L") > 3)
        await browser.execute_script(pause)
        assert await browser.execute_script(STATUS) == "paused"
        await until(lambda: not asyncio.all_tasks() - before)
        samples = net.samples
        await asyncio.sleep(0.5)
        assert net.samples == samples
        await browser.execute_script(pause)
        drawn = await browser.until(curve, lambda d: d.count("L") > drawn.count("L"))
        times = [float(x) for x in re.findall(r"[ML](\S+)", drawn)]
        assert times == sorted(times)  # a page that comes again is sent what it has already
        assert await browser.execute_script(STATUS) == "live"
    await browser.until(STATUS, "no answer; trying again".__eq__)
    samples, net.samples = net.samples, 0
    application = FastAPI()
    application.mount("/console", console.app(net=net))  # numbers its events anew
    async with served(application, port):
        await browser.until(STATUS, "live".__eq__)
        assert net.samples < samples
        await browser.get("about:blank")
    await browser.get_log("browser")  # it said that there was no server
