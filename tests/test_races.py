"""What threads do to one another, with real ones: the lanes', those that read and change, those that call."""

import asyncio
import collections
import functools
import itertools
import os
import random
import sys
import threading

import pytest
import torch
from anyio.from_thread import start_blocking_portal
from puppets import scenario

from aneuron import AsyncDataParallel, CpuBackend, DeadlineExceeded, Pool, QueueFull
from aneuron.testing import PuppetBackend, settle

pytestmark = pytest.mark.core

PATIENCE = 60.0  # seconds after which a test that hangs is over


def rows_of(count, value=0.0):
    return torch.full((count, 2), value, dtype=torch.float64) + torch.arange(count).unsqueeze(1)


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_was_stolen_is_not_executed_where_it_was_prepared_as_well():
    """The thread that has prepared it waits for its core meanwhile, and then finds it gone."""
    gates = {value: threading.Event() for value in (1.0, 2.0, 3.0)}
    began = {}  # the cores, by value

    def gated(x):
        value = x[0, 0].item()
        if value in gates:
            began.setdefault(value, []).append(int(threading.current_thread().name.partition("/")[0][-1]))
            gates[value].wait(PATIENCE)
        return -x

    def large(value):
        return torch.full((4, 1 << 16), value)

    async with AsyncDataParallel(gated, batch_size=4, num_workers=4, backend=CpuBackend(cores=2)) as model:
        await asyncio.gather(*[model(large(0.0)) for _ in range(20)])  # copying them takes long: threads prepare ahead
        lanes = model._life.run.dispatcher.board.lanes
        calls = []
        for value in gates:
            calls.append(asyncio.ensure_future(model(large(value))))
            await until(lambda value=value: value in began or any(lane.staged for lane in lanes))
        (behind,) = [index for index, lane in enumerate(lanes) if lane.staged]
        first, other = sorted((1.0, 2.0), key=lambda value: began[value] != [behind])
        gates[other].set()
        await until(lambda: 3.0 in began)
        gates[first].set()
        await calls[int(first) - 1]
        await model(large(0.0))  # by the thread that had prepared what was stolen, or after it
        gates[3.0].set()
        assert [(await each)[0, 0].item() for each in calls] == [-1.0, -2.0, -3.0]
    assert began == {first: [behind], other: [1 - behind], 3.0: [1 - behind]}


# What is set while something else happens.


class Setting(PuppetBackend):
    """Whose threads set what they are told to, to another value each time: when they are made, and when they grow."""

    def __init__(self, **settings):
        super().__init__(cores=2, **settings)
        self.numbers = itertools.count(3)
        self.set = lambda number: None

    def workers(self, name):
        self.set(next(self.numbers))
        workers = super().workers(name)
        workers.grow = lambda threads: self.set(next(self.numbers))
        return workers


@scenario
async def test_max_pending_that_is_set_at_the_moment_of_a_start_or_swap_counts():
    backend = Setting()
    model = AsyncDataParallel(torch.neg, backend=backend, batch_size=1)
    backend.set = lambda number: setattr(model, "max_pending", number)
    await model.start()
    assert model._life.run.rules.max_pending == model.max_pending > 3
    before = model.max_pending
    await model.swap(torch.abs)
    assert model._life.run.rules.max_pending == model.max_pending > before
    await model.aclose()


@scenario
async def test_num_workers_that_is_set_at_the_moment_of_a_start_counts():
    backend = Setting()
    pool = Pool(backend=backend)
    model = AsyncDataParallel(torch.neg, pool=pool)

    def before_it_is_there(number):
        if pool._dispatcher is None:
            pool.num_workers = number

    backend.set = before_it_is_there
    await model.start()
    await settle()
    assert sum(pool.statistics().slots) == pool.num_workers > 3
    await model.aclose()


@scenario
async def test_of_two_threads_that_set_num_workers_the_last_one_counts_whichever_the_loop_hears_first(monkeypatch):
    async with AsyncDataParallel(torch.neg, backend=PuppetBackend(cores=1)) as model:
        heard = []
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "call_soon", heard.append)
            model.num_workers = 4
            model.num_workers = 6
        for callback in reversed(heard):
            callback()
        assert sum(model.pool.statistics().slots) == model.num_workers == 6


@pytest.mark.parametrize("name", ["max_pending", "split_size"])
@scenario
async def test_of_two_threads_that_set_a_setting_at_once_the_last_one_counts(name):
    """One of them is interrupted between setting it and looking who serves."""
    async with AsyncDataParallel(torch.neg, backend=PuppetBackend(cores=1)) as model:
        life, interrupted = model._life, []
        kind, run = type(life), life.run

        class Interrupted(kind):
            @property
            def run(self):
                if not interrupted:
                    interrupted.append(True)
                    setattr(model, name, 7)
                return run

        life.__class__ = Interrupted
        setattr(model, name, 5)
        life.__class__ = kind
        assert interrupted
        assert getattr(model, name) == getattr(run.rules, name) == 7


# Eight threads at once.

SECONDS = float(os.environ.get("STRESS_SECONDS", "2"))
SIZE = 8  # rows, as compiled
Record = collections.namedtuple("Record", "answers errors cancels")


def double(x):
    return 2 * x + 1


class Seen:
    """What snapshots of one model may not do: lose a call, go back, count half of an execution."""

    def __init__(self, model):
        self.model, self.before = model, ()

    def look(self):
        now = self.model.statistics()
        calls = now.calls
        assert calls.accepted == sum([calls.completed, calls.failed, calls.cancelled, calls.waiting, calls.running]), (
            calls
        )
        assert min(vars_of(calls)) >= 0, calls
        assert now.waiting_rows >= 0
        rising = [calls.accepted, calls.completed, calls.failed, calls.cancelled, calls.refused]
        for core in now.cores:
            assert core.rows + core.padded_rows == SIZE * core.batches, core
            assert core.in_flight >= 0
            rising += [core.batches, core.rows, core.busy_seconds, core.errors]
        for each in (now.batch_rows, now.queue_seconds, now.device_seconds, now.total_seconds):
            rising += [sum(each.counts), *each.counts]
        rising += now.closed_because.values()
        assert all(before <= after for before, after in zip(self.before, rising, strict=False)), (self.before, rising)
        self.before = rising
        return now


def vars_of(record):
    return [getattr(record, name) for name in record.__dataclass_fields__]


class Stress:
    """Two models on a pool, called and changed from everywhere for a while."""

    def __init__(self, portal):
        self.portal = portal
        self.pool = Pool(backend=CpuBackend(cores=2))
        make = functools.partial(AsyncDataParallel, double, pool=self.pool, batch_size=SIZE, example_inputs=rows_of(1))
        self.models = [make(max_pending=64), make(weight=2.0)]
        self.records = {model: Record([], [], []) for model in self.models}
        self.over = threading.Event()
        self.failed = []
        self.turns = collections.Counter()

    # On the loop.

    async def call(self, model, rng, numbers):
        """One call, on some terms; it is answered rightly, refused, late, or cancelled."""
        x = rows_of(rng.choice((1, 1, 1, 2, 3, 8, 20)), next(numbers))
        record = self.records[model]
        timeout = rng.choice((None, None, None, 10.0, 0.0005))
        call = model.options(timeout=timeout, priority=rng.choice((0, 0, 1)), tenant=rng.choice((None, "a", "b")))
        try:
            y = await call(x)
        except (QueueFull, DeadlineExceeded) as error:
            record.errors.append(error.args)
        except asyncio.CancelledError:
            record.cancels.append(None)
            raise
        else:
            assert torch.equal(y, double(x))
            record.answers.append(None)

    async def caller(self, seed):
        rng, numbers = random.Random(seed), itertools.count(seed * 1e6)
        while not self.over.is_set():
            await self.call(rng.choice(self.models), rng, numbers)
            await asyncio.sleep(0)
            self.turns["caller"] += 1

    async def swap(self):
        while not self.over.is_set():
            await self.models[1].swap(double)
            await asyncio.sleep(0.02)
            self.turns["swap"] += 1

    # In threads.

    def read(self, rng):
        seen = [Seen(model) for model in self.models]
        busy = [0.0, 0.0]
        while not self.over.is_set():
            for each in seen:
                each.look()
            pool = self.pool.statistics()
            assert min((*pool.slots, *pool.in_flight, 0)) == 0
            assert all(share.waiting_rows >= 0 and share.in_flight >= 0 for share in pool.models)
            now = [share.busy_seconds for share in pool.models]
            assert all(before <= after for before, after in zip(busy, now, strict=True)), (busy, now)
            busy = now
            self.turns["read"] += 1
            self.over.wait(rng.random() * 1e-3)

    def change(self, rng):
        model = self.models[0]
        while not self.over.is_set():
            self.pool.num_workers = rng.randint(1, 6)
            model.max_pending = rng.choice((None, 8, 32, 64))
            model.split_size = rng.choice((None, None, 1, 4))
            rng.choice(self.models).num_workers = rng.randint(1, 6)
            self.turns["change"] += 1
            self.over.wait(0.0005)

    def ask(self, rng):
        numbers = itertools.count(rng.randint(1000, 2000) * 1e6)
        while not self.over.is_set():
            model = rng.choice(self.models)
            if rng.random() < 0.8:
                self.portal.call(self.call, model, rng, numbers)
            else:
                call = self.portal.start_task_soon(self.call, model, rng, numbers)
                self.over.wait(rng.random() * 1e-2)
                call.cancel()
            self.turns["ask"] += 1

    def guarded(self, work, seed):
        try:
            work(random.Random(seed))
        except BaseException as error:
            self.failed.append(error)
            self.over.set()

    async def main(self):
        """The loop's part: eight threads, and callers beside."""
        async with self.pool:
            await asyncio.gather(*[model.start() for model in self.models])
            jobs = [self.read, self.read, self.change, self.change, self.ask, self.ask, self.ask, self.ask]
            threads = [threading.Thread(target=self.guarded, args=each) for each in zip(jobs, range(8), strict=True)]
            for thread in threads:
                thread.start()
            callers = [asyncio.ensure_future(self.caller(seed)) for seed in range(12)]
            tasks = [*callers, asyncio.ensure_future(self.swap())]
            await asyncio.wait(tasks, timeout=SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            self.over.set()
            async with asyncio.timeout(PATIENCE):  # nobody waits for ever
                await asyncio.gather(*tasks)
                for thread in threads:
                    await asyncio.to_thread(thread.join)


@pytest.fixture
def hasty():
    """Threads that are interrupted wherever they can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_eight_threads_that_read_change_and_call_find_no_wrong_number_and_lose_no_call(hasty):
    """`STRESS_SECONDS=30` makes it search for longer."""
    with start_blocking_portal() as portal:
        stress = Stress(portal)
        portal.call(stress.main)
    assert stress.failed == []
    for model, record in stress.records.items():
        calls = Seen(model).look().calls
        assert (calls.waiting, calls.running) == (0, 0)
        answers, errors, cancels = map(len, record)
        assert answers
        assert answers <= calls.completed <= answers + cancels
        assert errors <= calls.failed + calls.refused <= errors + cancels
        assert calls.cancelled <= cancels
        assert calls.accepted + calls.refused <= answers + errors + cancels
    assert set(stress.turns) == {"caller", "swap", "read", "change", "ask"}
    print(stress.turns, [tuple(map(len, record)) for record in stress.records.values()])
