"""Fair order on the pure scheduler: cores simulated event by event, random histories, the bounds of the design."""

import heapq
import random
import sys
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aneuron.sched.call import NEVER, Call, Terms
from aneuron.sched.scheduler import Rules, Scheduler
from aneuron.sched.sizes import Cover

pytestmark = pytest.mark.core

AT_ONCE = float("inf")
BATCH = 8
SERVICE = 0.005


def scheduler(cores=4, sizes=(BATCH,), slots=1, lead=AT_ONCE, service=None, max_delay=0.0):
    """One whose lanes take `service(rows)` seconds, and know it; unknown where that is None."""
    own = Rules(
        cores=cores,
        batch_size=max(sizes) if sizes else None,
        preferred=32,
        split_size=None,
        packing=True,
        max_pending=None,
        max_delay=max_delay,
    )
    covers = {0: Cover(sizes)} if sizes else {}
    for size in sizes if service else ():
        covers[0].learn(size, service(size))
    made = Scheduler(own, covers, lambda lane, rows, bucket: service(rows) if service else 0.0)
    made.slots.resize([slots] * cores, [lead] * cores)
    return made


def admit(target, rows=1, signature="a", now=0.0, priority=0.0, tenant=None, deadline=NEVER):
    terms = Terms(priority, tenant) if priority or tenant is not None else None
    call = Call(rows, signature, target.rules.cut(rows), terms, now, deadline)
    target.slots.timed = target.slots.timed or deadline < NEVER  # as the lanes tell it
    target.admit([call])
    return call


def next_batch(target, now=0.0):
    """The next batch of a scheduler of one core, which takes no time."""
    bound = target.bind(now)
    if bound is None:
        return None
    target.slots.release(bound[0], now)
    return bound[1]


def batches(target, number):
    return [next_batch(target) for _ in range(number)]


def stored(target):
    """Calls that are still held on to, with rows or without."""
    return sum(len(flow.calls) for kind in target._queue.kinds.values() for flow in kind.flows.values())


class Cores:
    """Cores and callers on a clock of their own. A lane that ends a batch asks for its next itself, as workers do."""

    def __init__(self, target, service=lambda rows: SERVICE):
        self.scheduler = target
        self.service = service
        self.now = 0.0
        self.events = []
        self.order = count()
        self.free_at = Counter()  # when a lane will have executed what it has
        self.batches = []  # (time, lane, batch)
        self.due = None

    def at(self, time, action):
        heapq.heappush(self.events, (time, next(self.order), action))

    def run(self, until=AT_ONCE):
        while self.events and self.events[0][0] <= until:
            self.now, _, action = heapq.heappop(self.events)
            action()
            if not self.events or self.events[0][0] > self.now:
                self.dispatch()

    def dispatch(self):
        while (bound := self.scheduler.bind(self.now)) is not None:
            self.begin(*bound)
        if self.scheduler.due is not None and self.scheduler.due > self.now:
            self.at(self.scheduler.due, lambda: None)

    def begin(self, lane, batch):
        self.batches.append((self.now, lane, batch))
        rows = batch.size or batch.rows
        end = self.free_at[lane] = max(self.now, self.free_at[lane]) + self.service(rows)
        self.at(end, lambda: self.end(lane, batch))

    def end(self, lane, batch):
        self.scheduler.slots.release(lane, self.now)
        self.ended(batch)
        following = self.scheduler.pull(lane, self.now)
        if following is not None:
            self.begin(lane, following)

    def ended(self, batch):
        """For subclasses."""


class History(Cores):
    """Random callers on random cores; checks what must hold after every event."""

    def __init__(self, seed, both=False, large_deadlines=False):
        """`both`: tenants and large calls, and many levels; `large_deadlines`: large calls with one."""
        self.random = pick = random.Random(seed)
        self.rows = [1, 1, 1, 1, 2, 3, 8, 9, 40]
        self.sizes = pick.choice([(8,), (8,), (1, 8), (1, 2, 4, 8), (4,), ()])
        self.known = pick.random() < 0.7
        self.max_delay = pick.choice([0.0, 0.0, 0.4, 2.0])
        self.lanes = pick.choice([1, 2, 4])
        self.slots = pick.choice([1, 2])
        per_row = pick.choice([0.0, 0.3])

        def service(rows):
            return 1.0 + per_row * rows

        made = scheduler(
            self.lanes, self.sizes, self.slots, AT_ONCE, service if self.known else None, max_delay=self.max_delay
        )
        super().__init__(made, service)
        self.limit = max(self.sizes, default=32)
        self.large_deadlines = large_deadlines
        self.calls = []
        self.bound = Counter()  # rows, by call
        self.gone = {}  # calls that were cancelled or late: the rows bound by then
        self.ends = {}  # when the last batch of a call will have ended
        self.tenants = pick.choice([[None], [None, "a", "b"], [None, *range(20)]])
        self.priorities = pick.choice([[0.0], [0.0, 1.0, -2.0], [0.0, 0.5, 1e9]])
        if both and pick.random() < 0.5:
            self.priorities = [n / 4 for n in range(40)]
        if not both and len(self.priorities) > 1:
            self.tenants, self.rows = [None], [1, 1, 2, 3, 8]
        self.signatures = pick.choice(["a", "aaab", "abcdefgh"])
        time = 0.0
        for _ in range(pick.randrange(5, 60)):
            time += pick.choice([0.0, 0.0, 0.1, 0.3, 1.0, 4.0])
            self.at(time, pick.choice([self.come, self.come, self.come, self.come, self.leave]))

    def come(self):
        pick = self.random
        for _ in range(pick.choice([1, 1, 3, 12])):
            rows = pick.choice(self.rows)
            may_be_late = self.large_deadlines or rows <= self.limit
            timeout = pick.choice([NEVER, NEVER, 0.5, 1.5, 3.0, 6.0]) if may_be_late else NEVER
            self.calls.append(
                admit(
                    self.scheduler,
                    rows,
                    pick.choice(self.signatures),
                    self.now,
                    pick.choice(self.priorities),
                    pick.choice(self.tenants),
                    self.now + timeout,
                )
            )

    def leave(self):
        waiting = self.live()
        if waiting:
            call = self.random.choice(waiting)
            self.scheduler.discard(call)
            self.gone[call] = self.bound[call]

    def live(self):
        return [call for call in self.calls if call.bound < call.rows]

    def waiting(self, signature):
        return sum(call.rows - call.bound for call in self.live() if call.signature == signature)

    def dispatch(self):
        super().dispatch()
        self.note_late()
        s, live = self.scheduler, self.live()
        assert s.waiting_rows == sum(call.rows - call.bound for call in live)
        assert s.waiting_calls == sum(call.bound == 0 for call in live)
        idle = [lane for lane in range(self.lanes) if not s.slots.in_flight(lane)]
        if idle and live:
            assert self.max_delay, "an idle core while rows wait"
            assert len(idle) < self.lanes, "rows are held back while no core works"
            assert min(call.admitted for call in live) + self.max_delay > self.now, "rows are held back for too long"
            assert s.due is not None, "held back, and nobody will ask again"
            assert s.due > self.now
        self.check_heads()

    def check_heads(self):
        """The heaps say the same as a look at everything that waits."""
        order = self.scheduler._queue
        heads = {}
        for kind in order.kinds.values():
            for flow in kind.flows.values():
                call = next((call for call in flow.calls if call.bound < call.rows), None)
                for twin in flow.twins if call is not None else ():
                    key = flow.level.priority, twin.line.second
                    heads.setdefault(key, []).append((twin.tenant.tag, call.sequence, call))
        firsts = {}
        for key, entries in heads.items():
            begun = [entry for entry in entries if not key[1] and entry[2].bound]  # cut by the end of a batch: goes on
            firsts[key] = [entry[2] for entry in begun] or [min(entries, key=lambda entry: entry[:2])[2]]
        head = order.head()
        assert (head is None) == (not firsts)
        if head is not None and all(len(calls) == 1 for calls in firsts.values()):
            since = {key: calls[0].since or calls[0].admitted for key, calls in firsts.items()}
            urgency = min(time - priority for (priority, _), time in since.items())
            mine = [time for (priority, _), time in since.items() if priority == head.level.priority]
            assert min(mine) - head.level.priority == urgency, "a less urgent level goes first"
        if head is not None:
            mine = [
                call for (priority, _), calls in firsts.items() if priority == head.level.priority for call in calls
            ]
            assert head.calls[0] in mine, "a tenant out of turn"

    def note_late(self):
        late, self.scheduler.late = self.scheduler.late, []
        for call in late:
            assert call.deadline < NEVER, "dropped without a deadline"
            assert call not in self.gone
            assert self.known or call.deadline < self.now + self.longest_rest(), "refused on an untrained estimate"
            self.gone[call] = self.bound[call]

    def longest_rest(self):
        return max((self.free_at[lane] - self.now for lane in range(self.lanes)), default=0.0) + 1e-9

    def begin(self, lane, batch):
        s = self.scheduler
        busy = s.slots.in_flight(lane) > 1
        signature = batch.chunks[0][0].signature
        assert s.slots.in_flight(lane) <= self.slots
        assert {call.signature for call, _, _ in batch.chunks} == {signature}
        assert batch.rows == sum(stop - start for _, start, stop in batch.chunks)
        assert 0 < batch.rows <= (batch.size or self.limit)
        assert batch.size is None or batch.size in self.sizes
        left = self.waiting(signature)
        late = {call for call in s.late if call.signature == signature}
        spreads = not self.sizes and not busy  # a piece of each call, for this lane and for others
        assert batch.reason == "full" or not left or late or spreads, "neither full nor all there is"
        assert not busy or batch.reason == "full" or late, "a busy lane gets full batches only"
        for call, start, stop in batch.chunks:
            assert call not in self.gone, "rows of a call that has left"
            assert self.bound[call] == start < stop <= call.rows, "in order, none lost, none twice"
            self.bound[call] = stop
        super().begin(lane, batch)
        if self.known and batch.expected:
            for call, start, stop in batch.chunks:
                if stop - start == call.rows:  # in one piece
                    assert self.free_at[lane] <= call.deadline + 1e-9, "a hopeless call costs device time"

    def finish(self):
        self.run()
        self.note_late()
        assert not self.scheduler.has_work()
        for call in self.calls:
            assert self.bound[call] == self.gone.get(call, call.rows)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_histories(seed):
    History(seed).finish()


def test_the_histories_reach_everything():
    reasons, late, both, shorter = set(), 0, 0, 0
    for seed in range(150):
        history = History(seed)
        history.finish()
        reasons |= {batch.reason for _, _, batch in history.batches}
        late += sum(call.deadline < NEVER for call in history.gone)
        both += len({call.terms for call in history.calls}) > 3
        shorter += len({batch.size for _, _, batch in history.batches}) > 1
    assert reasons == {"full", "core_idle", "signature", "delay"}
    assert late > 20
    assert both > 5
    assert shorter > 5


# No starvation.


class Bounds(Cores):
    """Counts for each call the batches from its coming to its last row, and what was ahead of it."""

    medium = BATCH  # rows that a call of the first line has at most there

    def __init__(self, seed, tenants=(None,), large_signatures="a", small=(1, 1, 1, 1, 2, 5, 8)):
        self.random = pick = random.Random(seed)
        super().__init__(scheduler(pick.choice([1, 2, 4])))
        self.waiting = []  # (call, rows ahead, batches before it, large calls there were meanwhile)
        self.tenants, self.large_signatures, self.small = tenants, large_signatures, small
        time = 0.0
        for _ in range(150):
            time += pick.choice([0.0, 0.0, 0.001, 0.002, 0.005])
            self.at(time, self.come)

    def come(self):
        rows = self.random.choice([*self.small, 40, 100])
        large = rows > self.medium
        ahead = sum(call.rows - call.bound for call, *_ in self.waiting if call.rows <= self.medium)
        call = admit(
            self.scheduler,
            rows,
            self.random.choice(self.large_signatures) if large else "a",
            self.now,
            tenant=self.random.choice(self.tenants) if self.tenants else object(),
        )
        others = {other for other, *_ in self.waiting if other.rows > self.medium} | ({call} if large else set())
        for *_, meanwhile in self.waiting:
            meanwhile |= others
        self.waiting.append((call, ahead, len(self.batches), set(others)))

    def begin(self, lane, batch):
        super().begin(lane, batch)
        for call, ahead, before, meanwhile in self.waiting:
            taken = len(self.batches) - before
            if call.rows <= self.medium:
                rows = ahead + max(0, call.bound - 1)  # of its own rows those that have gone ahead of the last
                assert taken <= 2 * (rows / BATCH + 1), f"a small call with {ahead} rows ahead waits {taken} batches"
            else:
                m = len(meanwhile)
                assert taken <= 4 * m * (call.rows / BATCH + 1), f"a large call among {m} waits {taken} batches"
        self.waiting = [entry for entry in self.waiting if entry[0].bound < entry[0].rows]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_small_and_large_calls_are_dispatched_within_the_bounds_of_the_design(seed):
    bounds = Bounds(seed)
    bounds.run()
    assert not bounds.waiting


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_large_calls_of_several_signatures_keep_the_bounds(seed):
    bounds = Bounds(seed, large_signatures="abc")
    bounds.run()
    assert not bounds.waiting


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_new_tenant_name_on_each_call_gains_and_loses_nothing(seed):
    bounds = Bounds(seed, tenants=(), small=[1] * 8)
    bounds.run()
    assert not bounds.waiting


def test_tenants_that_never_come_back_leave_nothing_behind():
    s = scheduler(1)
    for number in range(5000):
        admit(s, tenant=number, priority=number % 7, signature=number % 5)
        next_batch(s)
    order = s._queue
    assert sum(len(line.tenants) for level in order._levels.values() for line in level.lines) < 200
    assert sum(len(kind.flows) for kind in order.kinds.values()) < 200
    assert len(order._urgent) < 200


class Loop(Cores):
    """Callers that call again as soon as they have an answer, beside one large call."""

    def __init__(self, callers, rows=256, signature="a"):
        super().__init__(scheduler(4, slots=2, lead=SERVICE / 5, service=lambda rows: SERVICE))
        self.callers = callers
        self.large, self.large_end = None, None

        def come():
            self.large = admit(self.scheduler, rows, signature, self.now)

        for _ in range(callers):
            self.at(0.0, self.again)
        self.at(0.02, come)

    def again(self):
        if self.large_end is None or self.now < self.large_end + 0.05:
            admit(self.scheduler, 1, "a", self.now)

    def ended(self, batch):
        for call, _, stop in batch.chunks:
            if call is not self.large:
                self.again()
            elif stop == call.rows:
                self.large_end = self.now


@pytest.mark.parametrize("signature", ["a", "b"])
@pytest.mark.parametrize("callers", [64, 1024])
def test_one_large_call_beside_endless_one_row_callers_ends_within_200_ms(callers, signature):
    loop = Loop(callers, signature=signature)
    loop.run(until=2.0)
    assert loop.large_end - 0.02 <= 0.2
    full = [batch for time, _, batch in loop.batches if time < loop.large_end]
    assert sum(batch.rows for batch in full) >= 0.97 * BATCH * len(full)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_rare_signature_beside_a_saturating_one_waits_no_longer_than_its_turn(slots):
    s = scheduler(2, slots=slots)
    cores = Cores(s)
    rare = []

    def flood():
        for _ in range(4 * BATCH):
            admit(s, 1, "busy", cores.now)

    def come():
        rare.append((admit(s, 1, "rare", cores.now), len(cores.batches), s.waiting_rows - 1))

    for step in range(100):
        cores.at(step * SERVICE, flood)
    for step in range(10):
        cores.at(step * 7 * SERVICE, come)
    cores.run()
    for call, before, ahead in rare:
        at = next(i for i, (_, _, batch) in enumerate(cores.batches) if call in (chunk[0] for chunk in batch.chunks))
        assert at - before + 1 <= 2 * (ahead / BATCH + 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_medium_calls_take_no_more_from_small_ones_than_their_first_batches(seed):
    bounds = Bounds(seed, small=(1, 1, 5, 8, 9, 12, 16))  # the last ones keep the bound of the small ones
    bounds.medium = 2 * BATCH
    bounds.run()
    assert not bounds.waiting


# No step at a batch and one row.


class Callers(Cores):
    """Callers that call again as soon as they have an answer; the waits of each size. A tuple: calls made at once."""

    def __init__(self, sizes, callers, cores=4, huge=()):
        super().__init__(scheduler(cores))
        self.waits = {size: [] for size in sizes}
        self.open = {}  # by call: when it came, its size, and what else of it has not ended
        for size in [*sizes] * callers:
            self.at(0.0, lambda size=size: self.come(size))
        for rows, tenant in huge:
            self.at(0.0, lambda rows=rows, tenant=tenant: self.come(rows, tenant))

    def come(self, size, tenant=None):
        together = set()
        for rows in size if isinstance(size, tuple) else (size,):
            call = admit(self.scheduler, rows, now=self.now, tenant=tenant)
            together.add(call)
            self.open[call] = self.now, size, together, tenant

    def ended(self, batch):
        for call, _, stop in batch.chunks:
            if stop == call.rows:
                came, size, together, tenant = self.open.pop(call)
                together.discard(call)
                if not together:
                    self.waits.setdefault(size, []).append(self.now - came)
                    self.come(size, tenant)

    def median(self, size):
        return sorted(self.waits[size])[len(self.waits[size]) // 2]


@pytest.mark.parametrize(
    "huge", [(), [(2000, None)], [(2000, "bulk")], [(256, None)] * 8, [(256, n) for n in range(8)]]
)
@pytest.mark.parametrize(("large", "pair"), [(9, (8, 1)), (16, (8, 8)), (17, (8, 8, 1))])
@pytest.mark.parametrize("small", [1, 8])
@pytest.mark.parametrize("callers", [4, 64])
def test_a_call_a_little_over_a_batch_waits_no_longer_than_two_calls(small, large, pair, callers, huge):
    if large == 17 and len(huge) > 1:
        return  # the batch in its middle waits among the huge ones
    one, two = (Callers([small, size], callers, huge=huge) for size in (large, pair))
    one.run(until=2.0)
    two.run(until=2.0)
    assert one.median(large) <= 2 * two.median(pair)
    both = Callers([small, large, pair], callers, huge=huge)  # in one scene
    both.run(until=2.0)
    assert both.median(large) <= 2 * both.median(pair)


@pytest.mark.parametrize("many", [8, 100])
def test_one_row_calls_beside_huge_ones_are_served_within_four_service_times(many):
    cores = Callers([1], 16, huge=[(256, None)] * many)
    cores.run(until=5.0)
    assert sorted(cores.waits[1])[int(0.99 * len(cores.waits[1]))] <= 4 * SERVICE
    rows = sum(batch.rows for _, _, batch in cores.batches)
    assert rows >= 0.97 * BATCH * len(cores.batches)


# Tenants.


def rows_by_tenant(some):
    rows = Counter()
    for batch in some:
        for call, start, stop in batch.chunks:
            rows[call.terms.tenant] += stop - start
    return rows


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_waiting_tenants_get_equal_rows_whatever_the_size_of_their_calls(size):
    s = scheduler(1)
    for _ in range(400):
        admit(s, 1, tenant="ones")
    while sum(call.rows for call in s.calls() if call.terms.tenant == "other") < 400:
        admit(s, size, tenant="other")
    for _ in range(5):
        rows = rows_by_tenant(batches(s, 10))
        if size <= BATCH:
            assert abs(rows["ones"] - rows["other"]) <= 2 * BATCH
        else:  # in the other line, which has a fourth of the batches
            assert rows["other"] == 2 * BATCH or rows["other"] == 3 * BATCH


def test_a_tenant_with_ten_thousand_calls_does_not_hold_up_one_that_comes_later():
    s = scheduler(1)
    for _ in range(10_000):
        admit(s, tenant="heavy")
    batches(s, 20)
    light = [admit(s, tenant="light") for _ in range(4)]
    (batch,) = batches(s, 1)
    assert {call for call, _, _ in batch.chunks} >= set(light)


def test_a_tenant_is_owed_nothing_for_the_time_that_it_was_not_there():
    s = scheduler(1)
    admit(s, tenant="absent")
    next_batch(s)
    for _ in range(1000):
        admit(s, tenant="heavy")
    batches(s, 100)  # 800 rows
    for _ in range(200):
        admit(s, tenant="absent")
    rows = rows_by_tenant(batches(s, 20))
    assert abs(rows["absent"] - rows["heavy"]) <= 2 * BATCH


def test_a_tenants_calls_go_in_the_order_of_coming():
    s = scheduler(1)
    calls = [admit(s, tenant="ab"[n % 2]) for n in range(64)]
    gone = [call for batch in batches(s, 8) for call, _, _ in batch.chunks]
    for tenant in "ab":
        assert [call for call in gone if call.terms.tenant == tenant] == [c for c in calls if c.terms.tenant == tenant]


def test_a_tenant_that_cancels_100_000_rows_is_not_charged_and_leaves_nothing():
    s = scheduler(1)
    patient = [admit(s, tenant="patient") for _ in range(40)]
    fickle = [admit(s, tenant="fickle") for _ in range(1000)] + [admit(s, 99_000, tenant="fickle")]
    assert steps(lambda: [s.discard(call) for call in fickle]) < 20 * len(fickle)
    assert (s.waiting_rows, s.waiting_calls) == (40, 40)
    assert stored(s) < 100
    again = [admit(s, tenant="fickle") for _ in range(40)]
    gone = [call for batch in batches(s, 2) for call, _, _ in batch.chunks]
    assert len(set(gone) & set(again)) == len(set(gone) & set(patient)) == 8


def test_rows_that_are_cancelled_before_their_turn_do_not_change_others_turns():
    s, t = scheduler(1), scheduler(1)
    for target in (s, t):
        for number in range(60):
            admit(target, 1 + number % 3, tenant="abc"[number % 3])
    for _ in range(100):
        for call in [admit(s, 5, tenant=tenant) for tenant in "abcd"]:
            s.discard(call)
    assert [rows_by_tenant([next_batch(s)]) for _ in range(14)] == [rows_by_tenant([next_batch(t)]) for _ in range(14)]


def test_padded_rows_are_charged_to_the_batchs_tenants_while_others_wait():
    s = scheduler(1)
    for number in range(320):
        admit(s, 1, number % 16, tenant="scattered")
    for _ in range(320):
        admit(s, 1, "own", tenant="together")
    some = batches(s, 24)  # of sixteen signatures, of each 20 rows: 2.5 batches
    turns = Counter(batch.chunks[0][0].terms.tenant for batch in some)
    assert abs(turns["scattered"] - turns["together"]) <= 2

    s = scheduler(1)
    for number in range(100):
        admit(s, 1, number, tenant="scattered")
        admit(s, 1, "own", tenant="together")
    some = batches(s, 24)  # a batch of the one is a row and seven that are padded, of the other eight rows
    turns = Counter(batch.chunks[0][0].terms.tenant for batch in some)
    assert abs(turns["scattered"] - turns["together"]) <= 2


def test_padding_is_free_where_nobody_waits():
    s = scheduler(1)
    for _ in range(5):
        admit(s, tenant="sparse")
        next_batch(s)
    assert s._queue._levels[0.0].lines[0].time == 5


# Priority.


def test_levels_are_priority_and_a_point_for_each_second():
    s = scheduler(1, sizes=(1,))
    old = admit(s, now=0.0, priority=-2.0)
    mid = admit(s, now=1.0)
    new = admit(s, now=1.5, priority=1.0)
    assert [next_batch(s, 1.5).chunks[0][0] for _ in range(3)] == [new, mid, old]
    old = admit(s, now=0.0, priority=-2.0)
    mid = admit(s, now=2.5)
    new = admit(s, now=3.0, priority=0.25)
    assert [next_batch(s, 3.0).chunks[0][0] for _ in range(3)] == [old, mid, new]


def test_nothing_starves_below_an_endless_higher_priority():
    s = scheduler(1)
    background = admit(s, 1, "b", priority=-10.0)
    for step in range(1200):
        admit(s, 8, "a", step / 100, priority=0.0)
        batch = next_batch(s, step / 100)
        if batch.chunks[0][0] is background:
            break
    assert step / 100 == pytest.approx(10, abs=0.05)


def test_rows_of_other_levels_fill_a_batch():
    s = scheduler(1)
    high = [admit(s, priority=5.0) for _ in range(3)]
    low = [admit(s, priority=-5.0) for _ in range(2)]
    usual = [admit(s) for _ in range(5)]
    first, second = batches(s, 2)
    assert [call for call, _, _ in first.chunks][:3] == high
    assert {call for call, _, _ in first.chunks} == {*high, *usual} or len(first.chunks) == BATCH
    assert {call for call, _, _ in (*first.chunks, *second.chunks)} == {*high, *usual, *low}


def test_each_level_has_its_own_turns_of_large_and_small_calls():
    s = scheduler(1)
    admit(s, 1000, "l", priority=1.0)
    for _ in range(1000):
        admit(s, 1, "s", priority=1.0)
    for _ in range(1000):
        admit(s, 1, "z")
    signatures = [batch.chunks[0][0].signature for batch in batches(s, 16)]
    assert Counter(signatures) == {"s": 12, "l": 4}


# Late binding.


def test_the_second_batch_is_bound_shortly_before_the_first_should_end():
    s = scheduler(1, slots=2, lead=0.5, service=lambda rows: 2.0)
    admit(s, 8)
    assert s.bind(0.0) is not None
    admit(s, 8)
    assert s.bind(1.0) is None
    assert s.due == 1.5
    lane, batch = s.bind(1.5)
    assert (lane, batch.rows, batch.reason) == (0, 8, "full")
    assert batch.due == 4.0


def test_the_second_batch_is_bound_at_once_while_times_are_unknown():
    s = scheduler(1, slots=2, lead=0.5)
    admit(s, 16)
    assert s.bind(0.0) is not None
    assert s.bind(0.0) is not None


def test_the_second_batch_goes_to_the_lane_that_should_end_first():
    times = {0: 3.0, 1: 2.0, 2: 2.5}
    s = scheduler(3, slots=2)
    s._estimate = lambda lane, rows, bucket: times[lane]
    admit(s, 6 * BATCH)
    assert [s.bind(0.0)[0] for _ in range(6)] == [0, 1, 2, 1, 2, 0]
    s = scheduler(3, slots=2, lead=0.5)
    s._estimate = lambda lane, rows, bucket: times[lane]
    admit(s, 6 * BATCH)
    assert [s.bind(0.0)[0] for _ in range(3)] == [0, 1, 2]
    assert (s.bind(0.0), s.due) == (None, 1.5)
    assert s.bind(1.6)[0] == 1
    assert (s.bind(1.6), s.due) == (None, 2.0)


def test_without_a_lead_no_second_batch_is_bound():
    s = scheduler(1, slots=2, lead=None)
    admit(s, 16)
    assert s.bind(0.0) is not None
    assert s.bind(100.0) is None
    assert s.due is None
    s.slots.lead(0, 0.0)
    assert s.bind(100.0) is not None


def test_a_lane_that_takes_over_is_charged_for_it():
    s = scheduler(2, slots=2, service=lambda rows: 1.0)
    admit(s, 3 * BATCH)
    bound = [s.bind(0.0) for _ in range(3)]
    assert [lane for lane, _ in bound] == [0, 1, 0]
    s.slots.release(1, 1.0)
    s.slots.move(bound[2][1], 0, 1, 1.0)
    assert [s.slots.in_flight(lane) for lane in (0, 1)] == [1, 1]
    assert bound[2][1].due == 2.0


# Room.


def full(most=64, cores=4):
    s = scheduler(cores)
    s.rules = replace(s.rules, max_pending=most)
    return s


def knock(s, rows=1, now=0.0, **terms):
    """A call that comes: it, and who is refused for it; or None twice."""
    call = Call(rows, "a", s.rules.cut(rows), Terms(**terms), now)
    gone = s.make_room(call, now)
    if gone is None:
        return None, None
    s.admit([call])
    return call, gone


def test_a_poorer_tenant_takes_room_from_the_newest_call_of_the_richest():
    s = full(8)
    rich = [knock(s, tenant="a")[0] for _ in range(5)]
    less = [knock(s, tenant="b")[0] for _ in range(3)]
    assert None not in rich + less
    assert knock(s, tenant="a") == (None, None)
    one, gone = knock(s, tenant="b")
    assert gone == [rich[-1]]
    assert knock(s, tenant="b") == (None, None)  # it has its share
    assert knock(s, tenant="c")[1] == [one]  # of two that have as much, the newest
    assert knock(s, tenant="c")[1] == [rich[-2]]
    assert knock(s, tenant="c") == (None, None)  # as much as the others
    assert s.waiting_rows == 8
    assert rich[-1].bound == rich[-1].rows


def test_a_higher_level_takes_room_from_the_newest_call_of_the_lowest():
    s = full(4)
    calls = [knock(s, now=float(n), priority=p)[0] for n, p in enumerate((0, -5, -5, 2))]
    assert knock(s, now=4.0, priority=-4) == (None, None)  # the lowest has waited for two seconds, and is at -3
    assert knock(s, now=4.0)[1] == [calls[2]]
    assert knock(s, now=4.0, priority=1)[1] == [calls[1]]
    assert knock(s, now=4.0, priority=100, rows=3)[1] is not None
    assert s.waiting_rows <= 4


def test_who_takes_room_gets_all_of_it_or_harms_nobody():
    s = full(8)
    for _ in range(6):
        knock(s, tenant="a")
    begun = knock(s, 2, tenant="a")[0]
    before = list(s.calls())
    assert knock(s, 8, tenant="b") == (None, None)  # it would have more than the richest has
    assert list(s.calls()) == before
    assert (s.waiting_rows, s.waiting_calls) == (8, 7)
    assert knock(s, 3, tenant="b")[1] == [begun, before[5]]
    order = [call for batch in batches(s, 1) for call, _, _ in batch.chunks]
    assert [call for call in order if call.terms.tenant == "a"] == before[:5]


def test_what_has_begun_is_never_refused():
    s = full(16, cores=1)
    large = knock(s, 24, tenant="a")[0]
    assert next_batch(s).chunks[0][0] is large
    while knock(s, tenant="a")[0] is not None:
        pass
    for _ in range(40):
        _, gone = knock(s, priority=100, tenant="b")
        assert gone is None or large not in gone
    assert 0 < large.bound < large.rows


class Crowd(Cores):
    """Tenants that keep calling, however often they are refused, under `max_pending`; the rows that each is given."""

    def __init__(self, seed):
        self.random = pick = random.Random(seed)
        self.most = pick.choice([16, 64, 256])
        self.target = full(self.most, pick.choice([1, 4]))
        super().__init__(self.target)
        self.tenants = range(pick.randrange(2, 7))
        self.answers = Counter()
        self.open = Counter()
        self.known = []
        self.sizes = {tenant: pick.choice([(1,), (1,), (1, 8), (9,), (1, 40), (2000,)]) for tenant in self.tenants}
        self.callers = {tenant: pick.choice([4 * self.most, 4 * self.most, 800]) for tenant in self.tenants}
        self.sizes[0], self.callers[0] = (1,), self.most  # who has demand, and is to get half of its share
        for step in range(1200):
            self.at(step * SERVICE / 4, self.come)

    def come(self):
        pick = self.random
        for tenant in pick.sample(self.tenants, len(self.tenants)):
            for _ in range(40 if tenant else 8):
                if self.open[tenant] >= self.callers[tenant]:
                    break
                call, gone = knock(self.scheduler, pick.choice(self.sizes[tenant]), self.now, tenant=tenant)
                if call is None:
                    break
                self.known.append(call)
                self.open[tenant] += 1
                for each in gone:
                    assert not self.begun(each), "what has begun is lost"
                    self.open[each.terms.tenant] -= 1
        rest = sorted((call.rows - call.bound for call in self.scheduler.calls()), reverse=True)
        assert sum(rest[1:]) <= 2 * self.most, "one call may be larger than the room, and no more"

    def begun(self, call):
        return any(each is call for _, _, batch in self.batches[-8:] for each, _, _ in batch.chunks)

    def ended(self, batch):
        for call, start, stop in batch.chunks:
            self.answers[call.terms.tenant] += stop - start
            self.open[call.terms.tenant] -= stop == call.rows


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_tenant_gets_half_of_its_share_under_max_pending_whatever_the_others_send(seed):
    crowd = Crowd(seed)
    crowd.run()
    share = sum(crowd.answers.values()) / len(crowd.tenants)
    assert crowd.answers[0] >= share / 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_level_higher_by_100_is_never_refused_while_lower_ones_wait(seed):
    pick = random.Random(seed)
    s, now, here = full(pick.choice([1, 8, 40]), cores=pick.choice([1, 2])), 0.0, []
    for _ in range(300):
        now += pick.choice([0.0, 0.01, 0.2])
        if pick.random() < 0.15:
            bound = s.bind(now)
            if bound is not None:
                s.slots.release(bound[0], now)
        high = pick.random() < 0.3
        here = [call for call in here if call.bound < call.rows]
        lower = [call for call in here if call.terms.priority == 0 and not call.bound]
        call, gone = knock(s, 1, now, priority=100.0 * high, tenant=pick.choice("ab"))
        assert call is not None or not (high and lower), "refused while lower ones wait"
        assert not any(each.terms.priority for each in gone or ()) or high
        if call is not None:
            here.append(call)
        assert s.waiting_rows <= s.rules.max_pending


# Holding back.


def test_a_partial_batch_is_held_only_while_another_lane_executes_and_only_so_long():
    s = scheduler(2, max_delay=0.5)
    admit(s, 1, now=0.0)
    assert s.bind(0.0) is not None  # no other executes
    admit(s, 1, now=1.0)
    assert s.bind(1.0) is None
    assert s.due == 1.5
    assert s.bind(1.25) is None
    admit(s, 1, now=1.25)
    _, batch = s.bind(1.5)
    assert (batch.rows, batch.reason) == (2, "delay")


def test_a_full_batch_and_a_drain_are_not_held():
    s = scheduler(3, max_delay=0.5)
    admit(s, 1)
    s.bind(0.0)
    admit(s, 9)
    assert s.bind(0.0)[1].rows == BATCH
    assert s.bind(0.0) is None
    s.draining = True
    assert s.bind(0.0)[1].reason == "drain"


def test_full_batches_pass_a_head_that_is_held_on_idle_lanes_only():
    s = scheduler(2, slots=2, max_delay=0.5)
    admit(s, 1)
    s.bind(0.0)
    head = admit(s, 1, "held")
    for _ in range(2):
        admit(s, 8, "full")
    lane, batch = s.bind(0.0)
    assert (lane, batch.chunks[0][0].signature) == (1, "full")
    assert s.bind(0.0) is None  # the lanes execute, and get the head's only
    s.slots.release(1, 0.5)
    assert s.bind(0.5)[1].chunks[0][0] is head


def test_a_learned_hold_is_a_cores_share_of_the_service_time_and_only_where_company_comes():
    s = scheduler(4, service=lambda rows: 1.0, max_delay=None)
    admit(s, 1, now=0.0)
    s.bind(0.0)
    for step in range(1, 60):  # a row in two seconds: not worth while
        admit(s, 1, now=2.0 * step)
        lane, _ = s.bind(2.0 * step)
        s.slots.release(lane, 2.0 * step)
    now = 200.0
    held = 0
    for _ in range(400):  # ten a second, or two and a half in a quarter of the service time
        now += 0.1
        admit(s, 1, now=now)
        if s.bind(now) is None:
            held += 1
            oldest = min(call.admitted for call in s.calls())
            assert s.due == pytest.approx(oldest + 0.25)
            assert s.due > now
        elif sum(s.slots.in_flight(lane) for lane in range(4)) > 1:
            s.slots.release(next(lane for lane in range(3, -1, -1) if s.slots.in_flight(lane)), now)
    assert held > 100


def test_nothing_is_held_by_default():
    assert Rules(4, 8, 32, None, True, None).max_delay == 0.0


# Deadlines.


def test_a_call_is_hopeless_only_if_it_cannot_fit_even_alone():
    s = scheduler(4, service=lambda rows: 1.0)
    for rows, rounds in ((1, 1), (8, 1), (32, 1), (33, 2), (256, 8)):
        for slack, hopeless in ((-0.01, True), (0.01, False)):
            call = Call(rows, "a", deadline=10.0 + rounds + slack)
            assert s.hopeless(call, 10.0) is hopeless
    assert not scheduler(4).hopeless(Call(10**9, "a", deadline=10.0), 10.0)  # nothing is known


def test_hopeless_calls_are_dropped_in_passing_and_their_room_goes_to_others():
    s = scheduler(1, service=lambda rows: 1.0)
    late = [admit(s, deadline=0.5) for _ in range(20)]
    fine = [admit(s, deadline=1.5) for _ in range(8)]
    (batch,) = batches(s, 1)
    assert [call for call, _, _ in batch.chunks] == fine
    assert s.late == late
    assert s.waiting_rows == 0


def test_a_deadline_does_not_change_the_order():
    s = scheduler(1, service=lambda rows: 1.0)
    calls = [admit(s, deadline=100.0 - n if n % 3 else NEVER) for n in range(24)]
    assert [call for batch in batches(s, 3) for call, _, _ in batch.chunks] == calls


def test_the_rest_of_the_running_batch_counts():
    s = scheduler(1, slots=2, service=lambda rows: 1.0)
    admit(s, 8)
    s.bind(0.0)
    late, fine = admit(s, 8, deadline=1.75), admit(s, 8, deadline=2.25)
    _, batch = s.bind(0.25)
    assert batch.chunks[0][0] is fine
    assert s.late == [late]


def test_a_large_call_is_dropped_once_its_rest_is_hopeless():
    s = scheduler(1, service=lambda rows: 1.0)
    call = admit(s, 5 * BATCH, deadline=5.5)
    now = 0.0
    for _ in range(2):
        assert next_batch(s, now).chunks[0][0] is call
        now += 1.0
    now += 1.0  # a second is lost
    assert next_batch(s, now) is None
    assert s.late == [call]
    assert s.waiting_rows == 0


# What it costs.


def steps(action):
    """Calls of functions, heap operations and those of other built-in types included."""
    counted = 0

    def note(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return counted


def crowd(n, terms):
    """A scheduler where n one-row calls wait, and what 100 further calls and 100 batches cost."""
    s = scheduler(1)
    for number in range(n):
        admit(s, **terms(number))
    coming = [terms(number) for number in range(n, n + 100)]

    def more():
        for each in coming:
            admit(s, **each)
            next_batch(s)

    next_batch(s)
    return steps(more)


@pytest.mark.parametrize(
    "terms",
    [lambda n: {}, lambda n: {"tenant": n}, lambda n: {"tenant": n, "priority": n % 5}, lambda n: {"rows": 9}],
    ids=["calls", "tenants", "tenants at five priorities", "large calls"],
)
def test_what_20_000_wait_with_costs_what_1000_do(terms):
    few, many = crowd(1000, terms), crowd(20_000, terms)
    assert many < 1.5 * few + 1000
    assert many < 100 * 280


def test_a_call_of_ten_million_rows_is_one_entry():
    s = scheduler(4, slots=2)
    assert steps(lambda: admit(s, 10_000_000)) < 50
    assert stored(s) == 1
    cost = steps(lambda: [s.bind(0.0) for _ in range(8)])
    assert cost < 8 * 90
    assert stored(s) == 1
    assert s.waiting_rows == 10_000_000 - 8 * BATCH


@pytest.mark.parametrize("late", [100, 1000])
def test_a_late_call_is_looked_at_once(late):
    s = scheduler(1, service=lambda rows: 1.0)
    for _ in range(late):
        admit(s, deadline=0.5)
    assert steps(lambda: next_batch(s)) < 20 * late + 200
    assert len(s.late) == late


def test_a_batch_may_be_taken_over_after_a_later_one_has_ended():
    # Two threads of a lane take turns in any order. A staged batch used to be looked for by the time it would take.
    s = scheduler(2, slots=3)
    s.slots.timed = True
    s.slots.resize([3, 0], [AT_ONCE] * 2)
    batches = []
    for seconds in (1.0, 2.0, 3.0):
        s._estimate = lambda lane, rows, bucket, seconds=seconds: seconds
        admit(s, BATCH)
        batches.append(s.bind(0.0)[1])
    s.slots.resize([3, 3], [AT_ONCE] * 2)
    s.slots.release(0, 1.0, batches[0])
    s.slots.release(0, 4.0, batches[2])
    s.slots.move(batches[1], 0, 1, 4.0)
    assert (s.slots.in_flight(0), s.slots.in_flight(1)) == (0, 1)
    assert batches[1].due == 6.0


def test_a_lane_whose_last_batch_was_taken_over_is_idle_again():
    s = scheduler(2, slots=2, service=lambda rows: 1.0)
    admit(s, 2 * BATCH)
    s.slots.resize([2, 0], [AT_ONCE] * 2)
    (_, first), (_, second) = s.bind(0.0), s.bind(0.0)
    s.slots.resize([2, 2], [AT_ONCE] * 2)
    s.slots.release(0, 1.0, first)
    s.slots.move(second, 0, 1, 1.0)
    admit(s, 1)
    assert s.bind(1.0)[0] == 0


def test_a_call_that_several_small_executions_can_serve_in_time_is_not_hopeless():
    times = {1: 0.01, 8: 0.08}
    s = scheduler(4, sizes=(1, 8), service=times.get)
    assert not s.hopeless(Call(3, "a", deadline=0.05), 0.0)
    assert s.hopeless(Call(3, "a", deadline=0.005), 0.0)


def test_a_larger_size_that_is_faster_is_what_runs():
    s = scheduler(1, sizes=(4, 8), service={4: 0.006, 8: 0.005}.get)
    admit(s, 3)
    assert s.bind(0.0)[1].size == 8
