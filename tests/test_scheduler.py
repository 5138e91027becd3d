"""The pure scheduler: tables and random histories, without a loop, a clock or a thread."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aneuron.sched.call import Call, Cut
from aneuron.sched.filling import Batch, Retry
from aneuron.sched.scheduler import Rules, Scheduler
from aneuron.sched.sizes import Cover
from aneuron.sched.slots import spread

pytestmark = pytest.mark.core

AT_ONCE = float("inf")  # lanes that execute may be given their next batch at any time
RULES = Rules(cores=4, batch_size=8, preferred=32, split_size=None, packing=True, max_pending=None)


def rules(**changes):
    return Rules(**{name: changes.get(name, getattr(RULES, name)) for name in Rules.__slots__})


def scheduler(slots=(2, 2, 2, 2), **changes):
    own = rules(cores=len(slots), **changes)
    made = Scheduler(own, {0: Cover([own.batch_size])} if own.batch_size else {})
    made.slots.resize(slots, [AT_ONCE] * len(slots))
    return made


def admit(target, rows, signature="a"):
    call = Call(rows, signature, target.rules.cut(rows))
    target.admit([call])
    return call


def bind_all(target, now=0.0):
    bound = []
    while (one := target.bind(now)) is not None:
        bound.append(one)
    return bound


def stored(target):
    """Calls that are still held on to, with rows or without."""
    return sum(len(flow.calls) for kind in target._queue.kinds.values() for flow in kind.flows.values())


def sizes(bound):
    return [(lane, batch.rows, batch.reason) for lane, batch in bound]


@pytest.mark.parametrize(
    ("changes", "rows", "pieces"),
    [
        ({"batch_size": None, "packing": False}, 8, [2, 2, 2, 2]),
        ({"batch_size": None}, 5, [2, 1, 1, 1]),  # the remainder one row at a time, on the first pieces
        ({"batch_size": None}, 3, [1, 1, 1]),
        ({"batch_size": None}, 131, [27, 26, 26, 26, 26]),  # at most the preferred 32
        ({"batch_size": None}, 400, [31] * 10 + [30] * 3),
        ({"batch_size": None, "split_size": 3}, 8, [3, 3, 2]),
        ({"batch_size": None, "split_size": 100}, 150, [100, 50]),
        ({"split_size": 3}, 8, [3, 3, 2]),
        ({"split_size": 100}, 20, [8, 8, 4]),  # min(split_size, batch_size)
        ({"split_size": 8}, 17, [8, 8, 1]),
        ({"packing": False, "batch_size": 1}, 4, [1, 1, 1, 1]),
        ({"packing": False, "batch_size": None, "cores": 3}, 8, [3, 3, 2]),
    ],
)
def test_a_call_is_cut_as_the_seeds_say_and_never_loses_a_row(changes, rows, pieces):
    cut = rules(**changes).cut(rows)
    found, bound = [], 0
    while bound < rows:
        found.append(cut.take(bound, rows, 1000, True))
        bound += found[-1]
    assert found == pieces
    assert cut.count(rows) == len(pieces)


@given(rows=st.integers(1, 10_000), cores=st.integers(1, 130), split=st.none() | st.integers(1, 300))
def test_pieces_cover_every_row_once(rows, cores, split):
    for packing in (True, False):
        cut = rules(batch_size=None, cores=cores, split_size=split, packing=packing).cut(rows)
        bound = pieces = 0
        while bound < rows:
            taken = cut.take(bound, rows, 10_000, True)
            assert taken >= 1
            bound += taken
            pieces += 1
        assert bound == rows
        assert pieces == cut.count(rows)


def test_with_a_batch_size_rows_are_cut_anywhere():
    assert rules().cut(20) == Cut()


def test_calls_of_one_iteration_are_packed_and_fill_one_core_before_the_next():
    s = scheduler()
    for _ in range(11):
        admit(s, 1)
    assert sizes(bind_all(s)) == [(0, 8, "full"), (1, 3, "core_idle")]


def test_a_large_call_is_one_entry_and_is_cut_when_lanes_take_it():
    s = scheduler()
    call = admit(s, 10_000_000)
    bound = bind_all(s)
    assert sizes(bound) == [(lane, 8, "full") for lane in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert [start for _, batch in bound for _, start, _ in batch.chunks] == list(range(0, 64, 8))
    assert call.bound == 64
    assert s.waiting_rows == 10_000_000 - 64


def test_an_executing_lane_takes_only_full_batches():
    s = scheduler(slots=(2,))
    admit(s, 1)
    assert sizes(bind_all(s)) == [(0, 1, "core_idle")]
    for _ in range(7):
        admit(s, 1)
    assert bind_all(s) == []
    admit(s, 1)
    assert sizes(bind_all(s)) == [(0, 8, "full")]


def test_an_executing_lane_gets_nothing_that_passes_the_head():
    s = scheduler(slots=(2,))
    admit(s, 1)
    bind_all(s)
    admit(s, 1, "rare")
    for _ in range(64):
        admit(s, 1, "busy")
    assert bind_all(s) == []
    s.slots.release(0, 0.0)
    (_, batch), *rest = bind_all(s)
    assert batch.chunks[0][0].signature == "rare"
    assert batch.reason == "signature"
    assert sizes(rest) == [(0, 8, "full")]


def test_the_second_batch_goes_to_the_lane_that_began_first():
    s = scheduler(slots=(2, 2, 2))
    for _ in range(24):
        admit(s, 1)
    assert [lane for lane, _ in bind_all(s)] == [0, 1, 2]
    s.slots.release(1, 1.0)
    admit(s, 8)
    assert [lane for lane, _ in bind_all(s, 1.0)] == [1]  # idle, before executing ones
    admit(s, 8)
    admit(s, 8)
    assert [lane for lane, _ in bind_all(s, 1.0)] == [0, 2]  # began before lane 1 did


def test_calls_of_different_signatures_never_share_a_batch_and_keep_their_order():
    s = scheduler(slots=(1,))
    for signature in "abab":
        admit(s, 3, signature)
    seen = []
    while s.waiting_rows:
        ((_, batch),) = bind_all(s)
        seen.append((batch.chunks[0][0].signature, batch.rows))
        assert len({call.signature for call, _, _ in batch.chunks}) == 1
        s.slots.release(0, 0.0)
    assert seen == [("a", 6), ("b", 6)]


def test_pieces_of_a_split_call_spread_over_idle_lanes_and_share_with_others():
    s = scheduler(split_size=2)
    admit(s, 8)
    admit(s, 2)
    assert sizes(bind_all(s)) == [(0, 4, "core_idle"), (1, 2, "core_idle"), (2, 2, "core_idle"), (3, 2, "core_idle")]


def test_pieces_are_never_cut_again():
    s = scheduler(slots=(1,), split_size=3)
    admit(s, 9)
    ((_, batch),) = bind_all(s)
    assert [chunk[1:] for chunk in batch.chunks] == [(0, 6)]  # a third piece of 3 does not fit in 8
    assert batch.reason == "full"


def test_without_packing_a_batch_is_one_piece_of_one_call():
    s = scheduler(packing=False, batch_size=None)
    admit(s, 5)
    admit(s, 1)
    assert [batch.rows for _, batch in bind_all(s)] == [2, 1, 1, 1, 1]


def test_discard_takes_rows_out_at_once():
    s = scheduler(slots=(1,))
    calls = [admit(s, 1) for _ in range(20)]
    for call in calls[::2]:
        s.discard(call)
    assert (s.waiting_rows, s.waiting_calls) == (10, 10)
    ((_, batch),) = bind_all(s)
    assert [call for call, _, _ in batch.chunks] == calls[1:17:2]
    s.discard(calls[0])  # again
    s.discard(calls[1])  # bound: nothing of it waits
    assert s.waiting_rows == 2


def test_discarded_calls_do_not_pile_up_behind_a_head_that_does_not_move():
    s = scheduler(slots=(1,))
    admit(s, 1)
    bind_all(s)
    admit(s, 1)
    for _ in range(10_000):
        s.discard(admit(s, 1))
    assert stored(s) < 50


def test_one_signature_a_call_leaves_nothing_behind():
    s = scheduler(slots=(1,))
    for number in range(1000):
        admit(s, 1, number)
        bind_all(s)
        s.slots.release(0, 0.0)
    assert len(s._queue.kinds) < 50


def test_small_calls_behind_a_long_one_in_pieces_do_not_pile_up():
    s = scheduler(slots=(1, 1), batch_size=None, split_size=1)
    admit(s, 100_000)
    for _ in range(2000):
        for _ in range(31):
            admit(s, 1)
        for lane, _ in bind_all(s):
            s.slots.release(lane, 0.0)
    assert stored(s) - s._queue.live < 100


@pytest.mark.parametrize(
    ("waiting", "rows", "room"),
    [
        ([], 16, True),
        ([], 17, True),  # larger than the room, but nobody of its kind waits
        ([8, 8], 1, False),
        ([8, 7], 1, True),
        ([8, 8], 9, False),
        ([8], 9, True),  # a call takes room for its next batch; the row behind it has room of its own
        ([24], 8, True),  # so that a large call shuts out nobody
        ([24], 9, False),  # until this is full too
        ([20], 12, True),
        ([100], 100, False),  # one call may be larger than the room
        ([100], 16, True),
        ([100, 24], 9, False),
        ([100], 8, True),
        ([8, 8], 100, False),
    ],
)
def test_room(waiting, rows, room):
    s = scheduler(slots=(1,), max_pending=16)
    for n in waiting:
        call = Call(n, "a")
        assert s.make_room(call, 0.0) == []
        s.admit([call])
    assert (s.make_room(Call(rows, "a"), 0.0) == []) is room
    assert (s.excess(rows) == 0) is room


def test_parts_of_a_failed_batch_run_next_and_alone():
    s = scheduler(slots=(1,))
    for _ in range(5):
        admit(s, 1)
    ((_, failed),) = bind_all(s)
    for _ in range(8):
        admit(s, 1)
    s.slots.release(0, 0.0)
    s.rerun(failed, failed.chunks[3:], Retry())
    s.rerun(failed, failed.chunks[:3], Retry())
    seen = []
    for _ in range(3):
        ((_, batch),) = bind_all(s)
        seen.append((batch.rows, batch.reason))
        s.slots.release(0, 0.0)
    assert seen == [(3, "rerun"), (2, "rerun"), (8, "full")]


def test_a_batch_that_must_avoid_a_lane_waits_for_another_and_holds_nobody_up():
    s = scheduler(slots=(1, 1))
    admit(s, 1)
    ((lane, failed),) = bind_all(s)
    admit(s, 8)
    assert [other for other, _ in bind_all(s)] == [1 - lane]
    s.slots.release(lane, 0.0, failed)
    s.rerun(failed, failed.chunks, Retry(avoid=lane))
    assert bind_all(s) == []
    admit(s, 8)
    ((other, batch),) = bind_all(s)
    assert (other, batch.rows) == (lane, 8)
    s.slots.release(1 - lane, 0.0)
    ((other, batch),) = bind_all(s)
    assert (other, batch.rows, batch.reason) == (1 - lane, 1, "rerun")


def test_a_batch_that_must_avoid_the_only_lane_left_does_not_wait():
    s = scheduler(slots=(1, 1))
    admit(s, 1)
    ((lane, failed),) = bind_all(s)
    s.slots.release(lane, 0.0, failed)
    s.rerun(failed, failed.chunks, Retry(avoid=lane))
    s.slots.retire(1 - lane)
    assert [other for other, _ in bind_all(s)] == [lane]


def test_a_retired_lane_gets_nothing_and_its_bound_batches_run_elsewhere():
    s = scheduler(slots=(2, 1), leads=[AT_ONCE] * 2)
    for _ in range(3):
        admit(s, 8)
    bound = bind_all(s)
    assert len(bound) == 3
    first, second = [batch for lane, batch in bound if lane == 0]
    s.slots.retire(0)
    s.recall(0, second)
    s.slots.release(0, 0.0, first)
    assert bind_all(s) == []
    s.slots.release(1, 0.0)
    assert bind_all(s) == [(1, second)]
    assert not s.has_work()


@pytest.mark.parametrize(
    ("slots", "lanes", "expected"), [(8, 4, [2, 2, 2, 2]), (5, 4, [2, 1, 1, 1]), (2, 4, [1, 1, 0, 0]), (1, 1, [1])]
)
def test_odd_slots_go_to_the_first_lanes(slots, lanes, expected):
    assert spread(slots, lanes) == expected


def test_slots_can_be_taken_away_and_given_back_while_batches_are_in_flight():
    s = scheduler(slots=(2, 2))
    for _ in range(10):
        admit(s, 8)
    assert len(bind_all(s)) == 4
    s.slots.resize([1, 0], [AT_ONCE] * 2)
    s.slots.release(0, 0.0)
    s.slots.release(1, 0.0)
    assert bind_all(s) == []
    s.slots.release(0, 0.0)
    s.slots.release(1, 0.0)
    assert [lane for lane, _ in bind_all(s)] == [0]
    s.slots.resize([2, 2], [AT_ONCE] * 2)
    assert sorted(lane for lane, _ in bind_all(s)) == [0, 1, 1]


def test_draining_says_so():
    s = scheduler()
    s.draining = True
    admit(s, 1)
    assert sizes(bind_all(s)) == [(0, 1, "drain")]


class History:
    """Drives a scheduler with random events, and checks what must hold after each."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        pick = self.random.choice
        self.lanes = pick([1, 2, 4])
        self.scheduler = scheduler(
            slots=[2] * self.lanes,
            batch_size=pick([None, 1, 4, 8]),
            split_size=pick([None, None, 1, 3, 50]),
            packing=pick([True, True, False]),
        )
        self.calls = []
        self.flying: list[tuple[int, Batch]] = []
        self.slots = [2] * self.lanes
        self.rows_bound = {}

    def step(self):
        event = self.random.random()
        if event < 0.45:
            rows = self.random.choice([1, 1, 1, 2, 5, 8, 9, 40])
            self.calls.append(admit(self.scheduler, rows, self.random.choice("aaab")))
        elif event < 0.6 and self.calls:
            self.scheduler.discard(self.calls.pop(self.random.randrange(len(self.calls))))
        elif event < 0.65:
            self.slots = [self.random.randrange(4) for _ in range(self.lanes)]
            self.slots[0] = max(1, self.slots[0])
            self.scheduler.slots.resize(self.slots, [AT_ONCE] * self.lanes)
        elif event < 0.8 and self.flying:
            lane, _ = self.flying.pop(self.random.randrange(len(self.flying)))
            self.scheduler.slots.release(lane, 0.0)
        else:
            self.bind()

    def bind(self):
        s = self.scheduler
        limit = s.rules.batch_size or s.rules.preferred
        while True:
            idle = [lane for lane in range(self.lanes) if not s.slots.in_flight(lane) and self.slots[lane]]
            before = s.waiting_rows
            bound = s.bind(0.0)
            if bound is None:
                assert not (idle and before), "an idle lane while rows wait"
                return
            lane, batch = bound
            assert not idle or lane in idle, "idle lanes first"
            assert lane in idle or batch.reason == "full", "a busy lane gets full batches only"
            assert s.slots.in_flight(lane) <= self.slots[lane]
            assert batch.rows == sum(stop - start for _, start, stop in batch.chunks) > 0
            assert batch.rows <= max(limit, s.rules.split_size or 0) or len(batch.chunks) == 1
            assert len({call.signature for call, _, _ in batch.chunks}) == 1
            assert s.rules.packing or len(batch.chunks) == 1
            for call, start, stop in batch.chunks:
                assert self.rows_bound.get(call, 0) == start < stop <= call.rows, "in order, none lost, none twice"
                self.rows_bound[call] = stop
            self.flying.append(bound)

    def finish(self):
        while self.scheduler.waiting_rows or self.flying:
            for lane, _ in self.flying:
                self.scheduler.slots.release(lane, 0.0)
            self.flying = []
            self.bind()
        assert all(self.rows_bound[call] == call.rows for call in self.calls)
        assert self.scheduler.waiting_calls == 0


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_histories(seed):
    history = History(seed)
    for _ in range(60):
        history.step()
        live = [call for call in history.calls if call.bound < call.rows]
        assert history.scheduler.waiting_rows == sum(call.rows - call.bound for call in live)
        assert history.scheduler.waiting_calls == sum(call.bound == 0 for call in live)
    history.finish()
