"""Turns between the models on a pool: a simulation of lanes that pull, without a loop, a clock or a thread."""

import heapq
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aneuron.sched.call import Call, Terms
from aneuron.sched.filling import Retry
from aneuron.sched.scheduler import Rules, Scheduler
from aneuron.sched.shares import Shares
from aneuron.sched.sizes import Cover

pytestmark = pytest.mark.core

SIZE = 4  # rows of a full batch


class Lanes:
    """Lanes that execute one batch at a time and pull the next when that has ended. `seconds` is what one takes."""

    def __init__(self, lanes=1, slots=1, lead=None, known=True):
        self.shares, self.now, self.known = Shares(), 0.0, known
        self.lanes, self.lead = lanes, lead
        self.shares.slots.resize([slots] * lanes, [lead] * lanes)
        self.models = {}  # by scheduler: the name, seconds of an execution, calls that are to be there at least
        self.ends = []  # when what executes ends
        self.counter = itertools.count()
        self.had = {}  # seconds of each model
        self.log = []  # who has begun
        self.behind = [[] for _ in range(lanes)]  # bound to a lane that executes
        self.executing = [None] * lanes

    def add(self, name, seconds, weight=1.0, saturated=True, estimate=None, model=None, **rules):
        settings = {"split_size": None, "packing": True, "max_pending": None} | rules
        own = Rules(cores=self.lanes, batch_size=SIZE, preferred=SIZE, **settings)
        expected = seconds if estimate is None else estimate
        scheduler = Scheduler(
            own, {0: Cover([SIZE])}, lambda lane, rows, bucket: expected if self.known else 0.0, self.shares.slots
        )
        self.models[scheduler] = name, seconds, saturated
        self.had[name] = 0.0
        self.shares.add(scheduler, weight, model)
        return scheduler

    def call(self, scheduler, rows=1, priority=0.0):
        made = Call(rows, "a", scheduler.rules.cut(rows), Terms(priority))
        made.admitted = self.now
        scheduler.arrivals.append(made)
        return made

    def saturate(self, scheduler, saturated=True):
        self.models[scheduler] = *self.models[scheduler][:2], saturated

    def _fill(self):
        for scheduler, (_, _, saturated) in self.models.items():
            while saturated and scheduler.waiting_rows + len(scheduler.arrivals) * SIZE < 4 * SIZE * self.lanes:
                self.call(scheduler, SIZE)

    def _begin(self, lane, batch):
        name, seconds, _ = self.models[batch.scheduler]
        self.executing[lane] = batch
        self.log.append((self.now, name))
        heapq.heappush(self.ends, (self.now + seconds, next(self.counter), lane, self.now))

    def bind(self):
        self._fill()
        for lane, batch in self.shares.bind(self.now).batches:
            if self.executing[lane] is None:
                self._begin(lane, batch)
            else:
                self.behind[lane].append(batch)

    def step(self):
        """Until the next end of an execution."""
        self.now, _, lane, began = heapq.heappop(self.ends)
        batch, self.executing[lane] = self.executing[lane], None
        self.shares.slots.release(lane, self.now, batch)
        self.shares.took(batch, self.now - began)
        self.had[self.models[batch.scheduler][0]] += self.now - began
        self._fill()
        following = self.behind[lane].pop(0) if self.behind[lane] else self.shares.pull(lane, self.now)
        if following is not None:
            self._begin(lane, following)
        self.bind()

    def run(self, executions):
        self.bind()
        for _ in range(executions):
            self.step()

    def since(self, before):
        return {name: seconds - before.get(name, 0.0) for name, seconds in self.had.items()}


def check_shares(had, weights, within=0.05):
    seconds, all_weights = sum(had.values()), sum(weights.values())
    for name, weight in weights.items():
        due = weight / all_weights
        assert had[name] / seconds == pytest.approx(due, rel=within), (name, had, weights)


WEIGHTS = st.lists(st.floats(0.5, 8.0), min_size=2, max_size=4)


@given(weights=WEIGHTS, data=st.data(), lanes=st.sampled_from([1, 2, 3, 8]), known=st.booleans(), staged=st.booleans())
@settings(max_examples=10)
def test_saturated_models_share_the_seconds_by_weight(weights, data, lanes, known, staged):
    # Of 2,000 executions the shortest share has at least 40 a lane, so that one more or less is within 5 %.
    times = data.draw(st.lists(st.floats(0.001, 0.003), min_size=len(weights), max_size=len(weights)))
    pool = Lanes(lanes, slots=2 if staged else 1, lead=math.inf if staged else None, known=known)
    for index, (weight, seconds) in enumerate(zip(weights, times, strict=True)):
        pool.add(str(index), seconds, weight)
    pool.run(2000)
    check_shares(pool.had, {str(index): weight for index, weight in enumerate(weights)})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lanes", [1, 2, 24])
def test_executions_of_very_different_length_share_by_seconds_not_by_number(known, lanes):
    pool = Lanes(lanes, known=known)
    pool.add("short", 0.001)
    pool.add("long", 0.05)
    pool.run(2000)
    began = pool.now
    before = dict(pool.had)
    while pool.now < began + (200 if lanes < 24 else 30) * 0.05:  # 100 of the long ones at least
        pool.step()
    check_shares(pool.since(before), {"short": 1.0, "long": 1.0})


@pytest.mark.parametrize("estimate", [0.0001, 0.1])
def test_what_was_expected_wrongly_is_corrected_when_a_batch_ends(estimate):
    pool = Lanes(2)
    pool.add("wrong", 0.002, estimate=estimate)
    pool.add("right", 0.002)
    pool.run(2000)
    check_shares(pool.had, {"wrong": 1.0, "right": 1.0})


def test_what_was_bound_and_never_began_costs_nothing():
    pool = Lanes()
    a, b = pool.add("a", 1.0), pool.add("b", 1.0)
    pool.bind()
    for _ in range(5):
        (batch,) = pool.shares.slots.bound[0]
        batch.scheduler.recall(0, batch)
        pool.shares.took(batch, 0.0)
        assert {account.tag for account in pool.shares.accounts} == {0.0}
        pool.shares.bind(pool.now)
    assert {a, b} == set(pool.models)


@given(weight=st.floats(0.1, 10.0), known=st.booleans(), lanes=st.sampled_from([1, 4]))
@settings(max_examples=10)
def test_what_an_idle_model_leaves_is_the_others_at_once_and_it_is_owed_nothing(weight, known, lanes):
    pool = Lanes(lanes, known=known)
    pool.add("a", 0.002)
    pool.add("b", 0.003)
    c = pool.add("c", 0.002, weight, saturated=False)
    pool.run(1000)
    check_shares(pool.had, {"a": 1.0, "b": 1.0})
    assert pool.had["c"] == 0.0
    assert sum(pool.had.values()) >= lanes * (pool.now - 0.003), "a core was idle while somebody waited"
    before = dict(pool.had)
    pool.saturate(c)
    pool.run(1500)
    had = pool.since(before)
    share = weight / (2 + weight)
    assert had["c"] / sum(had.values()) == pytest.approx(share, abs=0.05 * share + 4 * lanes / 1500)


def test_after_a_time_when_nobody_waited_all_are_equal():
    """The only one that was busy has had more, and owes nothing: nobody else wanted it."""
    pool = Lanes()
    a, b = pool.add("a", 1.0, saturated=False), pool.add("b", 1.0, saturated=False)
    for _ in range(100):
        pool.call(a)
        pool.bind()
        pool.step()
    pool.saturate(a)
    pool.saturate(b)
    pool.log.clear()
    pool.run(10)
    assert abs(sum(1 if name == "a" else -1 for _, name in pool.log)) <= 2


def light_call(pool, light):
    """How long a call of one row waits that comes now."""
    first, came = len(pool.log), pool.now
    pool.call(light)
    pool.bind()
    while not (began := [at for at, name in pool.log[first:] if name == "light"]):
        pool.step()
    return began[0] - came


@given(
    times=st.tuples(st.floats(0.001, 0.02), st.floats(0.001, 0.02), st.floats(0.0001, 0.02)),
    weights=st.tuples(st.floats(0.2, 8.0), st.floats(0.2, 8.0), st.floats(0.2, 8.0)),
    lanes=st.sampled_from([1, 2, 5]),
    how=st.sampled_from([(True, False), (False, False), (True, True)]),
    pauses=st.lists(st.integers(5, 40), min_size=3, max_size=8),
)
@settings(max_examples=20)
def test_a_light_call_waits_for_one_execution_of_each_saturated_model_at_most(times, weights, lanes, how, pauses):
    """Light is who asks for less than its share. Where a batch is bound while another executes, for both of these."""
    known, staged = how
    pool = Lanes(lanes, slots=2 if staged else 1, lead=math.inf if staged else None, known=known)
    pool.add("a", times[0], weights[0])
    pool.add("b", times[1], weights[1])
    light = pool.add("light", times[2], weights[2], saturated=False)
    pool.run(100)
    for pause in pauses:
        for _ in range(pause):
            pool.step()
        a, b, own = (account.tag for account in pool.shares.accounts)
        if own > min(a, b):
            continue
        waited = light_call(pool, light)
        assert waited <= (2 * max(times) if staged else times[0] + times[1]) + 1e-9


def test_a_call_that_is_alone_is_not_passed_over_for_full_batches_on_lanes_that_are_never_idle():
    pool = Lanes(1, slots=2, lead=math.inf)
    pool.add("a", 1.0)
    light = pool.add("light", 1.0, saturated=False)
    pool.run(5)
    pool.call(light)
    pool.run(4)
    assert "light" in [name for _, name in pool.log[-4:]]


def test_without_others_full_batches_a_call_waits_for_company_on_a_busy_lane():
    pool = Lanes(1, slots=2, lead=math.inf)
    a, b = pool.add("a", 1.0, saturated=False), pool.add("b", 1.0, saturated=False)
    for scheduler in (a, a, b, b):
        pool.call(scheduler)
        pool.bind()
    assert not pool.behind[0]
    assert (a.waiting_rows, b.waiting_rows) == (1, 2)


def test_who_cannot_use_a_lane_is_owed_nothing_for_it():
    """While one core is out of service for a model the others have it; back in service it gets its share, no more."""
    pool = Lanes(2)
    a = pool.add("a", 1.0, weight=9.0)
    pool.add("b", 1.0)
    a.out = {0}
    pool.run(200)
    assert pool.had["a"] == pytest.approx(pool.had["b"], abs=2)
    a.out = set()
    before = dict(pool.had)
    pool.run(200)
    check_shares(pool.since(before), {"a": 9.0, "b": 1.0}, within=0.2)


# Levels.


def order(pool, count):
    pool.log.clear()
    pool.bind()
    while len(pool.log) < count:
        pool.step()
    return [name for _, name in pool.log[:count]]


def test_priorities_are_compared_across_models():
    pool = Lanes()
    a, b = pool.add("a", 0.001, saturated=False), pool.add("b", 0.001, saturated=False)
    for _ in range(3):
        pool.call(a, SIZE)
    for _ in range(3):
        pool.call(b, SIZE, priority=1.0)
    assert order(pool, 6) == ["b", "b", "b", "a", "a", "a"]


def test_a_second_of_waiting_is_worth_a_unit_of_priority_across_models():
    pool = Lanes()
    a, b = pool.add("a", 0.001, saturated=False), pool.add("b", 0.001, saturated=False)
    for _ in range(2):
        pool.call(a, SIZE)
    pool.now = 1.5
    for _ in range(2):
        pool.call(b, SIZE, priority=1.0)
    assert order(pool, 4) == ["a", "a", "b", "b"]


def test_what_is_run_again_comes_at_the_level_of_its_call():
    pool = Lanes()
    a, b = pool.add("a", 0.001, saturated=False), pool.add("b", 0.001, saturated=False)
    pool.call(a, SIZE)
    pool.bind()
    (batch,) = pool.shares.slots.bound[0]
    a.rerun(batch, batch.chunks, Retry())
    pool.call(b, SIZE, priority=1.0)
    assert order(pool, 2) == ["b", "a"]
    pool.call(a, SIZE)
    pool.bind()
    (batch,) = pool.shares.slots.bound[0]
    a.rerun(batch, batch.chunks, Retry())
    pool.call(a, SIZE, priority=2.0)
    pool.call(b, SIZE, priority=1.0)
    assert order(pool, 3) == ["a", "a", "b"]  # what waits behind it is more urgent


def test_whoever_went_first_for_its_priority_does_not_hold_up_those_that_come_back():
    pool = Lanes()
    first = pool.add("first", 1.0, weight=0.01, saturated=False)
    pool.add("a", 1.0)
    light = pool.add("light", 1.0, saturated=False)
    for _ in range(20):
        pool.call(first, SIZE, priority=100.0)
    pool.run(20)
    assert pool.had["first"] >= 19
    pool.now += 0.5
    pool.call(light)
    assert "light" in order(pool, 3)
    assert pool.had["a"] < 5


# Who is there.


def test_two_runs_of_one_model_have_one_share():
    """As while a swap goes on: what the old one still serves is charged to the model."""
    pool, model = Lanes(), object()
    pool.add("old", 0.002, model=model)
    pool.add("new", 0.002, model=model)
    pool.add("other", 0.002, model=object())
    pool.run(2000)
    assert pool.had["other"] / sum(pool.had.values()) == pytest.approx(0.5, rel=0.05)
    first, _ = pool.shares.accounts
    assert (first.model, first.busy) == (model, pytest.approx(pool.had["old"] + pool.had["new"]))


def test_a_model_that_has_left_takes_its_share_with_it_and_a_late_end_harms_nobody():
    pool = Lanes()
    a = pool.add("a", 0.002)
    b = pool.add("b", 0.002)
    pool.run(100)
    del pool.models[b]
    pool.shares.remove(b)
    assert [account.weight for account in pool.shares.accounts] == [1.0]
    pool.models[b] = "b", 0.002, False  # what it executes
    pool.had["b"] = 0.0
    before = dict(pool.had)
    pool.run(100)
    assert pool.since(before)["b"] <= 0.0021
    assert pool.shares.shares[0].scheduler is a


def test_a_newcomer_starts_where_the_others_are():
    pool = Lanes(3)
    pool.add("a", 0.001)
    pool.run(1000)
    before = dict(pool.had)
    pool.add("b", 0.001)
    pool.run(1000)
    check_shares(pool.since(before), {"a": 1.0, "b": 1.0})


def test_a_model_that_is_swapped_keeps_its_place_among_the_others():
    pool = Lanes()
    old = pool.add("old", 1.0, model="a")
    pool.add("other", 1.0, model="b")
    pool.add("third", 1.0, model="c")
    pool.add("new", 1.0, model="a")
    assert [account.model for account in pool.shares.accounts] == ["a", "b", "c"]
    pool.shares.remove(old)
    assert [account.model for account in pool.shares.accounts] == ["a", "b", "c"]
