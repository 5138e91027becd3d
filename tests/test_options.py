"""Views: chained options, tenants of any make, whose deadline an error names."""

import asyncio
import gc
import weakref

import pytest
import torch
from puppets import check_sum, row, scenario

import aneuron
from aneuron import AsyncDataParallel, DeadlineExceeded
from aneuron.names import _known, name_of
from aneuron.testing import PuppetBackend, settle
from aneuron.web.views import RequestView


def puppet(**settings):
    backend = PuppetBackend(cores=1)
    return AsyncDataParallel(torch.neg, batch_size=1, backend=backend, num_workers=1, **settings), backend


# Chained options.


def the_view():
    return AsyncDataParallel(torch.neg).options()


@pytest.mark.parametrize("make", [the_view, lambda: RequestView("net", AsyncDataParallel(torch.neg))])
async def test_what_was_said_before_holds(make):
    view = make().options(tenant="acme").options(priority=-1).options(timeout=2.0)
    assert "timeout=2.0, priority=-1, tenant='acme'" in repr(view)
    again = view.options()
    assert repr(again) == repr(view)
    changed = view.options(timeout=None, tenant=None)
    assert "timeout=None, priority=-1, tenant=None" in repr(changed)
    assert "timeout=2.0, priority=-1, tenant='acme'" in repr(view)  # it stays what it was
    assert type(changed) is type(make())


@pytest.mark.parametrize(
    ("said", "error"),
    [({"timeout": -1}, ValueError), ({"priority": float("nan")}, ValueError), ({"priority": None}, ValueError),
     ({"tenant": []}, TypeError)],
)  # fmt: skip
def test_each_link_is_checked(said, error):
    with pytest.raises(error, match=f"{next(iter(said))}="):
        the_view().options(tenant="acme").options(**said)


@scenario
async def test_chained_terms_reach_the_queue():
    model, backend = puppet()
    async with model:
        first = asyncio.ensure_future(model(row(0)))
        await settle()
        net = RequestView("net", model).options(tenant="acme")
        tasks = [asyncio.ensure_future(net.options(priority=p)(row(p))) for p in (1, 2)]
        tasks.append(asyncio.ensure_future(model.options(priority=5).options(tenant="other").options()(row(3))))
        await settle()
        for _ in range(4):
            backend[0].release()
            await settle()
        await asyncio.gather(first, *tasks)
        assert [args[0][0, 0].item() for args, _ in backend[0].executed] == [0.0, 3.0, 2.0, 1.0]


def test_views_maps_and_the_parts_of_statistics_are_public():
    for name in ("View", "Map", "CallStatistics", "CoreStatistics", "Histogram"):
        assert name in aneuron.__all__
        assert getattr(aneuron, name).__module__ == "aneuron"
    assert isinstance(AsyncDataParallel(torch.neg).options(), aneuron.View)
    assert isinstance(RequestView("net", AsyncDataParallel(torch.neg)), aneuron.View)


# Tenants of any make.


class Evil(Exception):
    pass


class Hashless:
    def __hash__(self):
        raise Evil("hash")


class Incomparable:
    """All of one hash, which an int has too, and none equal to anything."""

    def __hash__(self):
        return 5

    def __eq__(self, other):
        raise Evil("eq")


class Fickle:
    """Fails after so many questions, as what is asked over a network may."""

    def __init__(self, good):
        self.good = good

    def _ask(self):
        self.good -= 1
        if self.good < 0:
            raise Evil("gone")

    def __hash__(self):
        self._ask()
        return 5

    def __eq__(self, other):
        self._ask()
        return self is other


TENANTS = [
    lambda: Hashless(),
    lambda: Incomparable(),
    lambda: (1, Incomparable()),
    *(lambda good=good: Fickle(good) for good in range(6)),
]


@pytest.mark.parametrize("make", TENANTS)
@scenario
async def test_a_tenant_that_cannot_be_compared_fails_its_own_call(make):
    """Whatever it does, nobody else notices: not those before it, beside it, or after it."""
    model, backend = puppet(max_pending=100)
    ended = {"good": 0, "evil": 0}

    async def call(kind, tenant):
        try:
            await model.options(tenant=tenant, priority=1)(row(2))
        except Evil:
            assert kind == "evil"
        ended[kind] += 1

    async with model:
        kept = [make() for _ in range(8)]
        tasks = []
        for tenant in kept:
            for kind, name in (("evil", tenant), ("good", 5.0), ("good", "acme"), ("evil", tenant), ("good", None)):
                tasks.append(asyncio.create_task(call(kind, name)))
        await settle()
        tasks[6].cancel()
        await settle()
        while not all(task.done() for task in tasks):
            assert backend[0].executing
            backend[0].release()
            await settle()
        assert ended == {"good": 23, "evil": 16}
        assert model.ready
        check_sum(model)


@pytest.mark.parametrize("make", [Incomparable, *(lambda good=good: Fickle(good) for good in range(2, 14))])
@pytest.mark.parametrize("wrap", [lambda key: {key: row(2)}, lambda key: ({(1, key): row(2)}, 3)])
@scenario
async def test_a_key_of_the_inputs_that_cannot_be_compared_fails_its_own_call(make, wrap):
    """The inputs' keys tell which calls may share a batch; that they do is found out with everybody's lock held."""
    backend = PuppetBackend(cores=1)

    def model(given):
        given = given[0] if isinstance(given, tuple) else given
        return next(iter(given.values())) if isinstance(given, dict) else given

    async with AsyncDataParallel(model, backend=backend, num_workers=1) as net:
        first = asyncio.ensure_future(net(row(1)))
        await settle()
        tasks = []
        for _ in range(6):
            try:
                given = wrap(make())
            except Evil:
                continue
            tasks.append(asyncio.ensure_future(net(given)))
        tasks.append(asyncio.ensure_future(net(row(3))))
        await settle()
        for _ in range(40):
            if backend[0].executing:
                backend[0].release()
            await settle()
        assert (await first).shape == (1, 2)
        assert (await asyncio.gather(*tasks[:-1], return_exceptions=True)) is not None
        assert all(task.done() for task in tasks)
        assert (tasks[-1].exception(), net.ready) == (None, True)
        check_sum(net)


def test_equal_names_are_one_however_they_are_made():
    kept = name_of((1, "a"))
    assert name_of((1.0, "a")) is kept
    assert name_of((2, "a")) is not kept
    assert name_of("acme") == "acme"


def test_one_that_compares_wrongly_is_not_taken_for_another():
    class Own(Incomparable):  # those that other tests have left have another hash
        def __hash__(self):
            return 77

    evil = Own()
    kept = name_of(evil)
    assert name_of(evil) is kept
    number = name_of(77.0)  # has its hash; that the other cannot be compared is not this one's fault
    assert number is not kept
    assert name_of(77.0) is number
    with pytest.raises(Evil, match="eq"):
        name_of(Own())


@scenario
async def test_tenants_that_have_gone_are_forgotten():
    model, backend = puppet()
    gc.collect()  # what other tests have left
    before = len(_known)

    class Name:
        pass

    async with model:
        for _ in range(200):
            name = Name()
            call = asyncio.ensure_future(model.options(tenant=name)(row(1)))
            gone = weakref.ref(name)
            del name
            await settle()
            backend[0].release()
            await call
        await settle()
        assert len(_known) - before < 70  # the queue sweeps now and then
    del model, call
    backend[0].executed.clear()
    gc.collect()
    assert gone() is None
    assert len(_known) == before


# Whose deadline it was.


@pytest.mark.parametrize(
    ("request_s", "own", "says"),
    [
        (0.05, 2.0, r"^the request's deadline \(0.05 s were left; the call's own timeout=2 s is longer\) has passed;"),
        (0.05, None, r"^the request's deadline \(0.05 s were left\) has passed;"),
        (5.0, 2.0, r"^timeout=2 s has passed;"),
        (None, 2.0, r"^timeout=2 s has passed;"),
    ],
)
@scenario
async def test_an_error_names_the_deadline_that_held(request_s, own, says):
    model, backend = puppet()
    async with model:
        deadline = None if request_s is None else asyncio.get_running_loop().time() + request_s
        net = RequestView("net", model, deadline).options(timeout=own)
        with pytest.raises(DeadlineExceeded, match=says):
            await net(row(1))
        backend[0].release()


@scenario
async def test_a_timeout_that_the_start_has_eaten_into_is_named_whole():
    model, backend = puppet()
    start = asyncio.create_task(model.start())
    loop = asyncio.get_running_loop()
    with pytest.raises(DeadlineExceeded, match=r"^timeout=2 s has passed;"):
        await model.options(timeout=2.0)(row(1))
    assert loop.time() <= 2.0
    await start
    backend[0].release()
    await model.aclose()


@scenario
async def test_the_elements_of_a_map_share_the_time_of_the_request():
    model, backend = puppet()
    loop = asyncio.get_running_loop()

    async def source():  # not one that is read in a thread: that has no virtual time
        for n in range(2):
            yield row(n)

    async with model:
        net = RequestView("net", model, loop.time() + 3.0)
        loop.call_later(2.0, backend[0].release)
        results = net.map(source(), limit=1)
        await anext(results)
        with pytest.raises(DeadlineExceeded, match=r"the request's deadline \(1 s were left\) cannot be met"):
            await anext(results)


@scenario
async def test_a_websocket_s_calls_have_each_their_time():
    model, backend = puppet()
    loop = asyncio.get_running_loop()
    async with model:
        net = RequestView("net", model, most=3.0)
        for _ in range(2):
            began = loop.time()
            with pytest.raises(DeadlineExceeded, match=r"the request's deadline \(3 s were left; the call's own"):
                await net.options(timeout=9.0)(row(1))
            assert loop.time() - began == pytest.approx(3.0)
        with pytest.raises(DeadlineExceeded, match=r"^timeout=1 s"):
            await net.options(timeout=1.0)(row(1))
        backend[0].release()


# Another loop.


async def test_the_error_of_another_loop_names_the_ways():
    async with AsyncDataParallel(torch.neg, backend=aneuron.CpuBackend(cores=1)) as model:

        def elsewhere():
            with pytest.raises(RuntimeError) as caught:
                asyncio.run(model(torch.ones(1, 1)))
            return str(caught.value)

        said = await asyncio.to_thread(elsewhere)
    for way in ("anyio.from_thread.run(model, x)", "anyio.from_thread.start_blocking_portal()", "docs/guides/web.md"):
        assert way in said
