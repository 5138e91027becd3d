"""Models that take any length: which lengths they are padded to, and which calls share an execution."""

import asyncio
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from puppets import release_all, scenario

import aneuron
from aneuron import AsyncDataParallel, Buckets, CpuBackend, QueueFull, ShapeError, SimulatedBackend, Work
from aneuron.sched.call import Call, Cut
from aneuron.sched.grouping import FORESIGHT, ahead, cheapest
from aneuron.sched.scheduler import Rules, Scheduler
from aneuron.sched.sizes import Steps
from aneuron.stats import ServiceTimes
from aneuron.tensors.buckets import steps
from aneuron.testing import PuppetBackend, settle

pytestmark = pytest.mark.core

LIMIT = 8
STEPS = Steps(LIMIT)


# The lengths.


@given(st.integers(1, 5000), st.data())
def test_a_length_is_rounded_up_by_an_eighth_at_most_or_to_a_multiple_of_eight(most, data):
    length = data.draw(st.integers(1, most))
    bucket = Buckets(max=most).fit(length)
    assert length <= bucket <= most
    assert bucket - length < max(8, length / 8)
    assert len(steps(most)) <= 16 + 8 * most.bit_length()


def test_lengths_that_are_said_are_the_buckets():
    assert not Buckets(sizes=(8, 16)).free
    assert Buckets(max=16).sizes == (8, 16)
    with pytest.raises(ValueError, match=r"max=16 with sizes=\(8, 16\): .*leave it out"):
        Buckets(sizes=(8, 16), max=16)


@pytest.mark.parametrize("buckets", [Buckets(), Buckets(max=20, side="left")])
def test_a_copy_of_free_lengths_takes_any_length_too(buckets):
    assert replace(buckets) == buckets
    assert replace(buckets, pad=1).free
    assert eval(repr(buckets)) == buckets


# What executions cost.


def test_what_was_not_seen_lies_on_the_line_through_what_was():
    times = ServiceTimes()
    assert times.cost(8, 64) == 0.0
    times.learn((1, 8), 0.012, 0.0)
    assert times.cost(8, 8) == pytest.approx(8 * 0.012)  # nothing says that there is more to it than positions
    for _ in range(64):
        times.learn((8, 8), 0.026, 0.0)
    assert times.cost(8, 8) == 0.026
    assert times.cost(4, 8) == pytest.approx(0.018)


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(1, 512), st.floats(1e-5, 10.0)), min_size=1, max_size=8))
def test_no_cost_is_negative_or_falls_with_what_is_computed(seen):
    times = ServiceTimes()
    for rows, bucket, seconds in seen:
        times.learn((rows, bucket), seconds, 0.0)
    new = [times.cost(rows, 1000 + bucket) for rows in (1, 8) for bucket in (0, 1000)]
    assert min(new) >= 0.0
    assert new == sorted(new) or new[1] > new[2]


# The cut.


def jagged(seed):
    """Costs as they are measured: with the positions they rise, but for steps, and something once."""
    return lambda rows, bucket: 5.0 + rows * bucket * (1.0 + (rows * 7 + bucket * 13 + seed) % 5 / 5)


def partitions(lengths):
    for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
        groups = [[lengths[0]]]
        for length, cut in zip(lengths[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(length)
        yield groups


@given(st.dictionaries(st.sampled_from([8, 16, 24, 64]), st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 9))
def test_the_cut_is_the_cheapest_of_all(rows, seed):
    cost, sizes = jagged(seed), lambda bucket: STEPS.sizes
    lengths = [bucket for bucket in sorted(rows, reverse=True) for _ in range(rows[bucket])]

    def price(groups):
        return sum(cost(STEPS.fit(len(group)), group[0]) for group in groups)

    least = min(price(groups) for groups in partitions(lengths) if max(map(len, groups)) <= LIMIT)
    cut = cheapest(rows, LIMIT, sizes, cost)
    assert [length for group in cut for length in Counted(group).elements()] == lengths
    assert price([list(Counted(group).elements()) for group in cut]) == pytest.approx(least)


class Counted(dict):
    def elements(self):
        return itertools.chain.from_iterable(itertools.repeat(*each) for each in self.items())


def test_rows_are_padded_up_where_that_is_cheaper():
    cost = {1: 1.0, 2: 1.5, 3: 9.0, 4: 2.0}.__getitem__
    assert cheapest({8: 3}, 4, lambda bucket: (1, 2, 4), lambda rows, bucket: cost(rows)) == [{8: 3}]
    assert cheapest({8: 3}, 4, lambda bucket: (1, 2, 3, 4), lambda rows, bucket: cost(rows)) == [{8: 2}, {8: 1}]


def test_a_plan_takes_in_no_more_than_the_most_urgent_can_wait_for():
    def cost(rows, bucket):
        return rows * bucket / 64.0

    now = [Call(1, None, bucket=8) for _ in range(100)]
    assert sum(ahead(now, 0.0, LIMIT, cost).values()) == 2 * LIMIT  # for twice what the first batch takes
    long = [Call(1, None, bucket=8) for _ in range(LIMIT)] + [Call(1, None, bucket=64) for _ in range(LIMIT)]
    assert sum(ahead(long, 0.0, LIMIT, cost).values()) == LIMIT
    assert sum(ahead(long, 8.0, LIMIT, cost).values()) == 2 * LIMIT  # they have waited for as long
    assert sum(ahead(now * 10, 1e9, LIMIT, cost).values()) == FORESIGHT * LIMIT
    assert ahead(now, 0.0, LIMIT, lambda rows, bucket: 0.0) == {}


# Who waits for how long.


def cost(rows, bucket):
    return 1.0 + rows * bucket / 32.0


def fair(arrivals):
    """When each call ends if calls are executed as they come, as many as there are and a batch holds."""
    free, at, ends = 0.0, 0, []
    while at < len(arrivals):
        free = max(free, arrivals[at][0])
        batch = [length for come, length in arrivals[at : at + LIMIT] if come <= free]
        free += cost(STEPS.fit(len(batch)), max(batch))
        ends += [free] * len(batch)
        at += len(batch)
    return ends


def planned(arrivals, known=True):
    """When each call ends on one lane of a scheduler."""
    buckets = sorted({length for _, length in arrivals})
    estimate = (lambda lane, *shape: cost(*shape)) if known else (lambda lane, *shape: 0.0)
    rules = Rules(1, None, LIMIT, None, True, None)
    target = Scheduler(rules, dict.fromkeys(buckets, STEPS), estimate, buckets=buckets)
    target.slots.resize([1])
    index, ends, now, at = {}, [0.0] * len(arrivals), 0.0, 0
    while at < len(arrivals) or target.has_work():
        if not target.has_work():
            now = max(now, arrivals[at][0])
        while at < len(arrivals) and arrivals[at][0] <= now:
            come, length = arrivals[at]
            call = Call(1, ("base", length), Cut(1), admitted=come, bucket=length)
            target.admit([call])
            index[call] = at
            at += 1
        lane, batch = target.bind(now)
        assert batch.rows <= LIMIT
        assert batch.bucket == max(call.bucket for call, _, _ in batch.chunks)
        now += cost(batch.size, batch.bucket)
        target.slots.release(lane, now, batch)
        for call, _, _ in batch.chunks:
            assert not ends[index[call]]
            ends[index[call]] = now
    return ends


arrived = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.0, 0.5, 3.0, 20.0]), st.sampled_from([8, 16, 32, 64, 256, 512]))
)


@settings(max_examples=300)
@given(arrived.filter(len))
def test_no_call_waits_for_longer_than_twice_what_it_would_in_order_of_coming(gaps):
    arrivals = list(zip(itertools.accumulate(gap for gap, _ in gaps), (length for _, length in gaps), strict=True))
    for (come, _), end, bound in zip(arrivals, planned(arrivals), fair(arrivals), strict=True):
        assert end - come <= 2 * (bound - come) + 1e-6


def test_many_lengths_take_much_less_than_in_order_of_coming():
    lengths = [8, 512, 16, 64, 32, 256, 8, 128] * 40
    arrivals = [(0.0, length) for length in lengths]
    assert max(planned(arrivals)) < 0.6 * max(fair(arrivals))


def test_before_anything_is_known_of_the_costs_shorter_calls_fill_up_what_is_begun():
    ends = planned([(0.0, length) for length in (8, 64, 8, 16)], known=False)
    assert ends == [cost(2, 8), cost(2, 8) + cost(2, 64), cost(2, 8), cost(2, 8) + cost(2, 64)]


# A model that takes any length, end to end.


class Encoder(torch.nn.Module):
    """Attention with a mask. One of its outputs carries the length, one does not, one does twice."""

    def __init__(self, side="right"):
        super().__init__()
        self.embed = torch.nn.Embedding(100, 16, padding_idx=0)
        self.attend = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.side = side

    def forward(self, ids):
        mask = ids == 0
        x = self.embed(ids)
        y, weights = self.attend(x, x, x, key_padding_mask=mask)
        pooled = y[:, -1] if self.side == "left" else y[:, 0]
        return {"tokens": y, "pooled": pooled, "weights": weights}


def texts(seed, count, longest=200):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [torch.randint(1, 100, (1 + n % 3 // 2, length), generator=random) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("example", [None, torch.ones(2, 5, dtype=torch.int64)])
async def test_every_caller_gets_what_the_plain_model_answers(side, example):
    torch.manual_seed(0)
    net = Encoder(side).eval()
    buckets = Buckets(max=200, pad=0, side=side)
    asked = texts(1, 120)
    backend = CpuBackend(cores=2)
    async with AsyncDataParallel(net, backend=backend, buckets=buckets, example_inputs=example) as model:
        answers = await asyncio.gather(*map(model, asked))
        mapped = [answer async for answer in model.map(asked)]
    for answer, same, ids in zip(answers, mapped, asked, strict=True):
        with torch.inference_mode():
            expected = net(ids)
        for name, value in expected.items():
            torch.testing.assert_close(answer[name], value)
            torch.testing.assert_close(same[name], value)


@pytest.mark.parametrize(("side", "masked"), [("right", True), ("left", True), ("right", False), ("left", False)])
async def test_a_model_that_takes_padding_for_content_is_found_out(side, masked, caplog):
    def mean(x):
        return x.sum(1) / (x != 0).sum(1) if masked else x.mean(1)

    buckets, example = Buckets(max=64, side=side), torch.rand(2, 20, 3) + 0.1
    async with AsyncDataParallel(mean, backend=CpuBackend(cores=2), buckets=buckets, example_inputs=example) as model:
        assert torch.allclose(await model(example), mean(example)) or not masked
    said = [record.message for record in caplog.records if "takes padding for content" in record.message]
    assert len(said) == (not masked)
    assert masked or ("output: a row's result changed by" in said[0] and "64 positions instead of 24" in said[0])


@pytest.mark.parametrize("length", [None, 100, 255])
async def test_a_model_that_takes_no_short_inputs_is_served_with_what_it_takes(length):
    """A convolution needs as many positions as its kernel has: shorter calls get its own error."""
    net = torch.nn.Conv1d(2, 4, 16, padding="valid").eval()
    example = None if length is None else torch.rand(2, 2, length)
    settings = {"buckets": Buckets(dim=2, max=256, unpad=False), "example_inputs": example}
    async with AsyncDataParallel(net, backend=CpuBackend(cores=2), **settings) as model:
        with pytest.raises(RuntimeError, match="Kernel size"):
            await model(torch.rand(1, 2, 5))
        assert (await model(torch.rand(1, 2, 256))).shape == (1, 4, 241)


@pytest.mark.parametrize("length", [17, 100, 256])
async def test_what_carries_the_length_is_learnt_from_lengths_that_the_model_takes(length):
    """Without an example it is found out by another length: a longer one, where there is one."""

    def net(x):
        if x.shape[1] < 16:
            raise ValueError("too short")
        return 2 * x, x.sum(1)

    async with AsyncDataParallel(net, backend=CpuBackend(cores=1), buckets=Buckets(max=256)) as model:
        x = torch.rand(3, length)
        doubled, _ = await model(x)
        assert torch.equal(doubled, 2 * x)


@pytest.mark.parametrize("given", [torch.ones(1, 0, dtype=torch.int64), torch.ones(1, 201, dtype=torch.int64)])
async def test_a_length_that_the_model_does_not_take_is_refused(given):
    async with AsyncDataParallel(Encoder().eval(), backend=CpuBackend(cores=1), buckets=Buckets(max=200)) as model:
        with pytest.raises(ShapeError, match=r"length 0 along|length 201 .* longest is max=200.* raise Buckets\(max"):
            await model(given)


async def test_the_number_of_shapes_is_bounded_whatever_lengths_come():
    shapes = set()

    def net(ids):
        shapes.add(tuple(ids.shape))
        return ids * 2

    async with AsyncDataParallel(net, backend=SimulatedBackend(2, 0.0), buckets=Buckets(max=2000)) as model:
        for rows in (1, 7, 64):
            asked = [torch.full((1, length), length) for length in range(1, 2001)]
            for at in range(0, len(asked), rows):
                answers = await asyncio.gather(*map(model, asked[at : at + rows]))
                assert all(
                    torch.equal(answer, 2 * ids) for answer, ids in zip(answers, asked[at : at + rows], strict=True)
                )
    assert {length for _, length in shapes} <= set(steps(2000))
    assert {rows for rows, _ in shapes} <= set(Steps(32).sizes)


async def test_batching_may_be_switched_off_where_any_length_will_do():
    async with AsyncDataParallel(torch.neg, backend=CpuBackend(cores=1), buckets=Buckets(max=64)) as model:
        model.disable_dynamic_batching()
        x = torch.rand(5, 11)
        assert torch.equal(await model(x), -x)


# Room that is counted by length.


@scenario
async def test_a_long_call_takes_the_room_of_many_short_ones():
    backend = PuppetBackend(cores=1)
    bound = Work(positions=256)
    async with AsyncDataParallel(
        torch.neg, backend=backend, buckets=Buckets(max=512), num_workers=1, max_pending=bound
    ) as model:
        running = asyncio.ensure_future(model(torch.ones(1, 8)))
        await settle()
        short = [asyncio.ensure_future(model(torch.ones(1, 8))) for _ in range(16)]
        await settle()
        assert model.statistics().waiting_rows == 16
        assert model.statistics().waiting_work == 128
        long = asyncio.ensure_future(model(torch.ones(1, 128)))
        await settle()
        assert model.statistics().waiting_work == 256
        with pytest.raises(QueueFull, match=r"no room for 1 x 8 positions: 256 wait and .*Work\(positions=256\)"):
            await model(torch.ones(1, 5))
        long.cancel()
        await settle()
        assert model.statistics().waiting_work == 128
        last = asyncio.ensure_future(model(torch.ones(2, 64)))
        await settle()
        assert model.statistics().waiting_work == 256
        await release_all(backend, running, *short, last)
        assert model.statistics().waiting_work == 0
        assert model.max_pending == bound
        model.max_pending = Work(positions=10)
        with pytest.raises(ValueError, match="max_pending=10: it was constructed to count positions"):
            model.max_pending = 10


@scenario
async def test_what_is_told_of_waiting_follows_the_work():
    """A core that ends a call of 64 positions each second is told to a call of 8 as an eighth of that."""
    backend = PuppetBackend(cores=1)
    settings = {"batch_size": 1, "num_workers": 1, "buckets": Buckets(max=64), "max_pending": Work(positions=256)}
    async with AsyncDataParallel(torch.neg, backend=backend, **settings) as model:
        calls = [asyncio.ensure_future(model(torch.ones(1, 64))) for _ in range(5)]
        await settle()
        for _ in range(3):
            await asyncio.sleep(1.0)
            backend.loaded[0].release()
            await settle()
            calls.append(asyncio.ensure_future(model(torch.ones(1, 64))))
            await settle()
        for length, seconds in ((64, 1.0), (8, 0.125)):
            with pytest.raises(QueueFull) as caught:
                await model(torch.ones(1, length))
            assert caught.value.retry_after == pytest.approx(seconds)
        await release_all(backend, *calls)


def test_work_needs_lengths():
    with pytest.raises(ValueError, match=r"max_pending=Work\(positions=5\): only with buckets= .* say how many rows"):
        AsyncDataParallel(torch.neg, max_pending=Work(positions=5))
    with pytest.raises(ValueError, match="it was constructed to count rows"):
        AsyncDataParallel(torch.neg, buckets=Buckets()).max_pending = Work(positions=5)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm") or "ANEURON_PURE" in os.environ, reason="once is enough")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_lengths_keep_a_bounded_memory(dtype):
    """Kernels and allocators keep something for each shape, and there are few."""
    program = f"""
import asyncio, os, random, torch
import aneuron
from aneuron import AsyncDataParallel, Buckets, CpuBackend

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

async def main():
    shapes = set()
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        def forward(self, x):
            shapes.add(tuple(x.shape))
            return self.down(torch.nn.functional.gelu(self.up(x)))
    backend = CpuBackend(cores=1, threads_per_core=1, dtype=torch.{dtype})
    async with AsyncDataParallel(Net().eval(), backend=backend, buckets=Buckets(max=2000)) as model:
        lengths = random.Random(0).sample(range(1, 2001), 1000)
        xs = [torch.rand(1, length, 8) for length in lengths]
        await model(torch.rand(1, 2000, 8))
        before = resident()
        for at in range(0, 1000, 8):
            await asyncio.gather(*map(model, xs[at : at + 8]))
        print(len(shapes), resident() - before)

asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(aneuron.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    shapes, grown = map(float, done.stdout.split())
    assert shapes <= len(steps(2000)) * len(Steps(32).sizes)
    assert grown < 250
