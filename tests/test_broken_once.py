"""Cases that broke the scheduler or the lanes once, each with a test that was seen to fail."""

import asyncio
import random
import threading

import pytest
import torch
from puppets import call, release_all, row, scenario
from test_fairness import BATCH, Cores, History, admit, batches, next_batch, scheduler, steps
from test_terms import fate, now, puppets

from aneuron import AsyncDataParallel, SimulatedBackend
from aneuron.testing import PuppetBackend, PuppetWorkers, settle

# 1. A large call that is late at the head of the order, before another tenant's or another line's: deque.remove raises,
#    and every call of the model is failed with Closed.


def test_a_late_large_head_is_dropped_and_the_next_starts():
    s = scheduler(1, service=lambda rows: 1.0)
    late, fine = admit(s, 20, tenant="a", deadline=0.5), admit(s, 20, tenant="b")
    assert s.bind(0.0)[1].chunks == [(fine, 0, 8)]
    assert s.late == [late]


@scenario
async def test_a_late_large_call_does_not_close_the_model():
    _, model = puppets(1, service_time=1.0, batch_size=8)
    async with model:
        await model(row(0, rows=8))
        busy = call(model, 0, rows=8)
        await asyncio.sleep(0.5)
        calls = [model.options(tenant="a", timeout=3.2)(row(1, rows=20)), model.options(tenant="b")(row(2, rows=20))]
        assert await asyncio.gather(*map(fate, calls)) == ["DeadlineExceeded", "answer"]
        await busy


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_with_deadlines_on_large_calls(seed):
    History(seed, large_deadlines=True).finish()


# 1b. A level can be in the heap of levels twice with the same key; then a batch that another level starts is filled
#     from it twice, and where calls are in pieces (batch_size=None, split_size) the same rows are taken twice. What is
#     counted is wrong from there on, and a caller may wait for ever.


def test_rows_are_not_taken_twice():
    s = scheduler(8, sizes=())
    admit(s, 1, "z", priority=-1000.0)  # there are several levels
    for number in range(2):
        admit(s, 48, "a", now=float(number))
    for _ in range(3):  # they take turns, and the key of their level goes up and down
        next_batch(s, 2.0)
    admit(s, 1, "a", now=2.5, priority=2.0)
    chunks = next_batch(s, 3.0).chunks
    assert len(set(chunks)) == len(chunks)
    assert s.waiting_rows == sum(call.rows - call.bound for call in s.calls())


@scenario
async def test_nobody_waits_for_ever():
    pick = random.Random(2)
    _, model = puppets(8, batch_size=None, service_time=1.0)
    async with model:
        tasks = []
        for n in range(150):
            rows = pick.choice([1, 1, 2, 3, 48, 100])
            terms = {"priority": pick.choice([0, 1, 2, -2]), "tenant": pick.choice([None, "a"])}
            tasks.append(call(model.options(**terms), n, rows))
            if pick.random() < 0.3:
                await asyncio.sleep(pick.choice([0.1, 0.5, 1]))
        _, waiting = await asyncio.wait(tasks, timeout=1000)
        for task in waiting:
            task.cancel()
        assert not waiting


# 2. What is learned from one slow execution is never unlearned, because everything is refused from then on.


@scenario
async def test_a_slow_first_execution_does_not_refuse_everything_for_ever():
    times = iter([2.0])
    _, model = puppets(1, service_time=lambda rows: next(times, 0.005))
    view = model.options(timeout=1.0)
    async with model:
        fates = []
        for _ in range(20):
            fates.append(await fate(view(row())))
            await asyncio.sleep(1)
    assert fates[-1] == "answer"


@scenario
async def test_one_hiccup_does_not_refuse_everything_for_ever():
    """The core is fast again, and idle; `slack` has learned the ten seconds."""
    times = iter([0.005] * 9 + [10.0])
    _, model = puppets(1, service_time=lambda rows: next(times, 0.005))
    view = model.options(timeout=1.0)
    async with model:
        fates = []
        for _ in range(60):
            fates.append(await fate(view(row())))
            await asyncio.sleep(1)
    assert fates[-1] == "answer"


def test_slack_alone_refuses_nothing_on_an_untrained_estimate():
    s = scheduler(1)
    s.slack = 1.0
    fine = admit(s, deadline=0.5)
    assert next_batch(s).chunks[0][0] is fine


# 3. An idle lane that is slow, or thought to be, drops calls that an idle fast one would serve.


def test_a_slow_idle_lane_does_not_drop_what_an_idle_fast_one_can_serve():
    s = scheduler(2)
    s._estimate = lambda lane, rows, bucket: (1.0, 0.01)[lane]
    fine = admit(s, deadline=0.5)
    assert not s.hopeless(fine, 0.0)
    assert s.bind(0.0)[0] == 1
    assert s.late == []


class OneSlowCore(PuppetBackend):
    def workers(self, name):
        return PuppetWorkers(lambda rows: 1.0 if name == "aneuron-core-0" else 0.01)


@scenario
async def test_one_slow_core_does_not_fail_every_call_with_a_deadline():
    async with AsyncDataParallel(torch.neg, backend=OneSlowCore(2), batch_size=4) as model:
        await asyncio.gather(*(model(row(n, rows=4)) for n in range(2)))  # both are known
        view = model.options(timeout=0.5)
        assert [await fate(view(row(0, rows=4))) for _ in range(20)] == ["answer"] * 20


# 4. When a lane should end is wrong after a batch has moved away, or has ended early: calls are dropped
#    for nothing, and the next batch is bound too late.


def test_a_batch_that_was_taken_over_no_longer_counts_for_the_lane_it_left():
    s = scheduler(2, slots=2, service=lambda rows: 1.0)
    admit(s, 3 * BATCH)
    bound = [s.bind(0.0) for _ in range(3)]
    assert [lane for lane, _ in bound] == [0, 1, 0]
    s.slots.release(1, 0.9)
    s.slots.move(bound[2][1], 0, 1, 0.9)  # lane 0 executes its first to 1.0, lane 1 the third to 1.9
    fine = admit(s, BATCH, deadline=2.5, now=0.9)
    lane, batch = s.bind(0.9)
    assert (lane, batch.chunks[0][0], batch.due) == (0, fine, 2.0)


def test_a_batch_that_ends_early_brings_forward_what_comes_after():
    s = scheduler(1, slots=2, service=lambda rows: 1.0)
    admit(s, 2 * BATCH)
    s.bind(0.0)
    s.bind(0.0)
    s.slots.release(0, 0.1)  # the second executes from here on, to 1.1
    fine = admit(s, BATCH, deadline=2.5, now=0.1)
    assert s.bind(0.1)[1].chunks[0][0] is fine
    assert s.late == []


# 5. A timeout does not bound the start, although it is "from the call to its result".


def test_a_timeout_bounds_the_start_too():
    loading = threading.Event()

    class Slow(SimulatedBackend):
        def load(self, *args):
            loading.wait(120)
            return super().load(*args)

    async def main():
        model = AsyncDataParallel(torch.neg, backend=Slow(1))
        task = asyncio.ensure_future(model.options(timeout=0.01)(row()))
        try:
            await asyncio.wait({task}, timeout=60)
            assert task.done()
        finally:
            loading.set()
            await asyncio.wait({task})
            await model.aclose()

    asyncio.run(main())


# 6. Costs that grow with what waits.


def test_admission_does_not_look_at_every_other_priority():
    """`_new_flow` re-keys all levels each time: 4,000 priorities take 4 s, 100,000 most of an hour."""
    s = scheduler(1)
    for number in range(2000):
        admit(s, priority=float(number + 1))
    assert steps(lambda: admit(s, priority=0.5)) < 500


def test_binding_does_not_look_at_every_other_signature():
    """All flows of one tenant have its tag: each batch makes every entry stale, and the next one mends them all."""
    s = scheduler(1)
    for number in range(2000):
        admit(s, 1, number)
    next_batch(s)
    assert steps(lambda: next_batch(s)) < 1000


def test_the_heap_of_levels_does_not_grow_with_the_batches():
    s = scheduler(1)
    for number in range(5):
        admit(s, 10**7, "l", float(number), tenant=number)
    for step in range(3000):
        admit(s, 1, "l", 5 + step / 100, priority=1.0)
        next_batch(s, 5 + step / 100)
    assert len(s._queue._urgent) < 50


# 7. Many priorities, or few with stale entries: only the first sixteen entries of the heap of levels fill a batch.


def test_rows_of_any_level_fill_a_batch():
    s = scheduler(1)
    for number in range(80):
        admit(s, priority=float(number % 59) - 30 + number / 1000)
    assert [batch.rows for batch in batches(s, 10)] == [BATCH] * 10


def test_a_busy_lane_gets_full_batches_only_with_many_priorities():
    s = scheduler(1, slots=2)
    admit(s, BATCH)
    s.bind(0.0)
    for number in range(80):
        admit(s, priority=float(number % 59) - 30 + number / 1000)
    reasons = set()
    while (bound := s.bind(0.0)) is not None and s.waiting_rows:
        reasons.add(bound[1].reason)
        s.slots.release(0, 0.0)
    assert reasons == {"full"}


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_of_tenants_and_large_calls_in_many_levels(seed):
    History(seed, both=True).finish()


# 8. Charging the padding changes who heads a level, and its key is not lowered: a less urgent level goes first.


class Heads(History):
    """Only looks who is at the head."""

    def come(self):
        self.priorities, self.tenants, self.signatures = [0.0, 1.0, -2.0], [None, "a", "b"], "abcdefgh"
        super().come()

    def begin(self, lane, batch):
        self.bound.update({one: stop - start for one, start, stop in batch.chunks})
        Cores.begin(self, lane, batch)


@pytest.mark.parametrize("seed", [76, 237, 758])
def test_padding_that_is_charged_does_not_hide_an_older_head(seed):
    Heads(seed, both=True).finish()


# 9. A full kind that has lost rows to a cancellation still passes a held head, with a partial batch.


def test_only_full_batches_pass_a_head_that_is_held():
    s = scheduler(2, max_delay=1.0)
    admit(s, BATCH)
    s.bind(0.0)
    others = [admit(s, 1, "x") for _ in range(BATCH)]
    admit(s, 1, "a", priority=5.0)
    for other in others[2:]:
        s.discard(other)
    assert s.bind(0.0) is None


def test_signatures_that_were_full_once_are_let_go():
    s = scheduler(1, max_delay=1.0)
    for number in range(1000):
        s.discard(admit(s, BATCH, number))
    assert len(s._delay._full) < 100


# 10. pull() does not know of the lead: a worker of a lane with two threads binds its second batch at once. (`bind`
#     says "as late as useful", and pull "by the rules of bind".)


@pytest.mark.parametrize("lead", [None, 0.1])
def test_a_worker_binds_no_earlier_than_the_loop(lead):
    s = scheduler(1, slots=2, lead=lead, service=lambda rows: 1.0)
    admit(s, 2 * BATCH)
    s.bind(0.0)
    assert s.bind(0.0) is None
    assert s.pull(0, 0.0) is None


# 11. With tenants a small call that was cut goes to the end of the round: the second of a hundred calls of five rows
#     ends last, after 51 batches. (Bound of the design: 2 x (p / batch + 1) = 3.)


def test_a_small_call_that_was_cut_does_not_wait_for_a_whole_round():
    s = scheduler(1)
    calls = [admit(s, 5, tenant=number) for number in range(100)]
    taken = 0
    while calls[1].bound < calls[1].rows:
        next_batch(s)
        taken += 1
    assert taken <= 2 * ((5 + 4) / BATCH + 1)


# 12. A large call of lower priority blocks all smaller ones once it has waited for its handicap: its age grows while it
#     is served, so that the two lines no longer take turns: priority=-1 makes a bulk job worse for the others.


def test_a_large_background_call_does_not_block_small_ones():
    s = scheduler(4)
    cores = Cores(s)
    waits = []

    def come():
        waits.append((admit(s, 1, now=cores.now), cores.now))

    cores.at(0.0, lambda: admit(s, 100_000, "a", priority=-1.0))
    for step in range(50):
        cores.at(2.0 + step / 10, come)
    cores.run(until=7.5)
    started = {call: time for time, _, batch in cores.batches for call, _, _ in batch.chunks}
    assert all(call in started and started[call] - came <= 0.05 for call, came in waits)


# 13. A tenant is hashable, and its comparison raises: every call of the model fails with Closed.


class Column:
    """As expressions of query builders are: hashable, and == makes another one, which has no truth."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise TypeError("the truth of an expression is not defined")


@scenario
async def test_a_tenant_that_cannot_be_compared_fails_nobody_else():
    _, model = puppets(service_time=1.0)
    async with model:
        fates = await asyncio.gather(fate(model(row())), fate(model.options(tenant=Column())(row())))
    assert fates[0] == "answer"


# 14. Smaller ones.


@pytest.mark.parametrize("terms", [{"timeout": 10**400}, {"priority": 10**400}, {"priority": -(10**400)}])
def test_numbers_beyond_floats_are_refused_like_infinity(terms):
    with pytest.raises(ValueError, match="finite"):  # an OverflowError today
        AsyncDataParallel(torch.neg).options(**terms)


@scenario
async def test_the_reason_of_what_was_held_is_delay_whatever_the_clock():
    """`until <= now` and `now - admitted >= hold` round differently: "core_idle" at a clock of 0.1."""
    _, model = puppets(2, service_time=1.0, max_delay=0.01)
    async with model:
        busy = call(model)
        await asyncio.sleep(0.1)
        _, timing = await model.timed(row())
        assert timing.why == "delay"
        await busy


@scenario
async def test_a_lane_without_slots_takes_nothing_over():
    backend, model = puppets(2, concurrent=True)
    async with model:
        calls = [call(model, n) for n in range(16)]
        await settle()
        model.num_workers = 1
        await settle()
        backend[1].release()
        await settle()
        backend[1].release()  # the last that was bound to it
        await settle()
        executes = backend[1].executing
        await release_all(backend, *calls)
        assert executes is None
    assert now() == 0


@scenario
async def test_a_waiting_call_with_a_timeout_costs_little_more_than_one_without():
    import gc
    import tracemalloc

    backend, model = puppets(1, num_workers=1)
    async with model:
        first = call(model, 0, rows=4)
        await settle()
        view, x = model.options(timeout=3600.0), row(1)
        gc.collect()
        tracemalloc.start()
        tasks = [asyncio.ensure_future(view(x)) for _ in range(10_000)]
        await settle()
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for task in tasks:
            task.cancel()
        await settle()
        await release_all(backend, first)
        assert size / 10_000 < 2200  # the timer is 0.3 kB of it
