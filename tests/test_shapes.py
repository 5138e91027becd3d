"""Several compiled sizes and buckets, end to end: what runs, with which rows, and what each caller gets back.

Every model here was compiled for one shape: it refuses all others, as a device would, and notes that it ran.
"""

import asyncio
import time
import warnings
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from puppets import scenario

from aneuron import AsyncDataParallel, Buckets, OutputError, ShapeError, SimulatedBackend
from aneuron.testing import PuppetBackend, run, settle

pytestmark = pytest.mark.core

TIMES = {1: 0.001, 8: 0.006}  # inf2: a row takes 1 ms on the batch-1 model, and up to eight take 6 ms on the other


class BadRowError(Exception):
    """What the model raises for a token of -1."""


class Encoded(NamedTuple):
    """An output with the length in one dim, in none, in two and in another one; one size is equal to a bucket."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    pairs: torch.Tensor
    logits: torch.Tensor


def encode(ids):
    if (ids == -1).any():
        raise BadRowError("a token of -1")
    pooled = ids.sum(1, keepdim=True).expand(-1, 8)
    return Encoded(ids.unsqueeze(2) * 3, pooled, ids.unsqueeze(1) * ids.unsqueeze(2), torch.stack([ids, -ids], 1))


class Compiled:
    """Models compiled from one; `ran` has the shape of each execution, (rows, bucket), `given` what it was given."""

    def __init__(self, plain=encode):
        self.plain = plain
        self.ran: list[tuple[int, int]] = []
        self.given: list[torch.Tensor] = []
        self.refused = 0

    def model(self, size, bucket=0):
        def net(ids):
            if len(ids) != size or (bucket and ids.shape[1] != bucket):
                self.refused += 1
                raise RuntimeError(f"compiled for {size} rows of {bucket}, not for {tuple(ids.shape)}")
            self.ran.append((size, bucket))
            self.given.append(ids)
            return self.plain(ids)

        return net

    def sizes(self, *sizes):
        return {size: self.model(size) for size in sizes}

    def grid(self, sizes, buckets):
        return {(size, bucket): self.model(size, bucket) for size in sizes for bucket in buckets}

    def take(self):
        """What has run since the last time, nothing in a wrong shape."""
        assert not self.refused
        ran, self.ran, self.given = self.ran, [], []
        return ran


def puppets(cores=1, times=TIMES):
    return PuppetBackend(cores, lambda rows: times.get(rows, 0.004))


def ids(rows, length, start=0):
    """Token ids, all different, none 0."""
    return torch.arange(start + 1, start + 1 + rows * length).reshape(rows, length)


def same(result, x, plain=encode):
    """The plain model's answer to a call that it alone was given, in storage of its own."""
    for got, wanted in zip(result, plain(x), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
    return True


async def ask(model, *inputs):
    """All at once; results or errors."""
    return await asyncio.gather(*(model(x) for x in inputs), return_exceptions=True)


async def train(model, compiled, *inputs):
    """Calls that make every size of a bucket known."""
    for x in inputs:
        await model(x)
    compiled.take()


# What cannot be meant.


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({}, "model={}: no model; expected {8: model}"),
        ({True: encode}, "True is neither a batch size nor"),
        ({0: encode}, "0 is neither a batch size nor"),
        ({-8: encode}, "-8 is neither"),
        ({"8": encode}, "'8' is neither"),
        ({8.0: encode}, "8.0 is neither"),
        ({(): encode}, r"\(\) is neither"),
        ({(8,): encode}, r"\(8,\) is neither"),
        ({(8, 4, 2): encode}, r"\(8, 4, 2\) is neither"),
        ({(8, True): encode}, r"\(8, True\) is neither"),
        ({(8, 0): encode}, r"\(8, 0\) is neither"),
        ({8: encode, (8, 4): encode}, r"keys \[8, \(8, 4\)\] are of two kinds"),
        ({(8, 4): encode}, r"models for buckets \[4\], and buckets=\[4, 8\]: they must be the same"),
        ({(8, 4): encode, (8, 8): encode, (8, 16): encode}, r"models for buckets \[4, 8, 16\], and buckets=\[4, 8\]"),
    ],
)
def test_a_mapping_that_names_no_shapes(models, said):
    with pytest.raises(ValueError, match=said):
        AsyncDataParallel(models, buckets=Buckets(sizes=(4, 8)))


@pytest.mark.parametrize(
    ("model", "rest", "error", "said"),
    [
        ({8: encode}, {"batch_size": 8}, ValueError, "batch_size=8: the keys of the models say the batch sizes"),
        ({8: encode}, {"dim": 1}, ValueError, "dim=1: .* needs dim=0"),
        ({8: None}, {}, TypeError, "model=None: expected a module"),
        ({8: {8: encode}}, {}, TypeError, "expected a module"),
        ({(8, 4): encode}, {}, ValueError, r"models for buckets \[4\] need buckets=Buckets\(dim=..., sizes=\(4,\)\)"),
        (encode, {"buckets": (4, 8)}, TypeError, r"buckets=\(4, 8\): expected aneuron.Buckets"),
        (encode, {"buckets": {"dim": 1}}, TypeError, "expected aneuron.Buckets"),
        (encode, {"buckets": Buckets(dim=0)}, ValueError, r"buckets.dim=0 is the batch dimension \(dim=0\)"),
        (encode, {"buckets": Buckets(dim=-1), "dim": -1}, ValueError, "buckets.dim=-1 is the batch dimension"),
        (encode, {"buckets": Buckets(sizes=(4, 8)), "example_inputs": ids(1, 9)}, ShapeError, "largest bucket is 8"),
        (encode, {"buckets": Buckets(sizes=(4, 8)), "example_inputs": ids(1, 9)[0]}, ShapeError, "^example_inputs: "),
    ],
)
def test_settings_that_contradict_each_other(model, rest, error, said):
    with pytest.raises(error, match=said):
        AsyncDataParallel(model, **rest)


def test_every_model_of_a_mapping_is_looked_at():
    with pytest.warns(UserWarning, match="training mode"):
        AsyncDataParallel({1: torch.nn.Linear(2, 2).eval(), 8: torch.nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (ids(1, 9), "length 9 along dim 1; the largest bucket is 8"),
        (ids(1, 1)[:, :0], "length 0 along dim 1"),
        (ids(1, 3)[0], r"lacks a dim 1 .*x.unsqueeze\(0\)"),
        (ids(1, 3)[:0], "empty batch"),
    ],
)
@scenario
async def test_a_call_that_fits_no_bucket_is_refused_before_any_device_work(x, said):
    compiled = Compiled()
    model = AsyncDataParallel(compiled.grid((1, 8), (4, 8)), backend=puppets(), buckets=Buckets(sizes=(4, 8)))
    async with model:
        with pytest.raises(ShapeError, match=said):
            await model(x)
        assert not compiled.ran
        assert same(await model(ids(1, 3)), ids(1, 3))


@scenario
async def test_a_length_that_counts_from_the_end_is_not_the_batch_dimension():
    compiled = Compiled()
    model = AsyncDataParallel(compiled.sizes(4), backend=puppets(), buckets=Buckets(dim=-2, sizes=(4, 8)))
    async with model:
        with pytest.raises(ShapeError, match="lacks a dim -2 beside the rows"):
            await model(ids(2, 3))
        assert not compiled.ran


# Several sizes.


@scenario
async def test_untrained_the_smallest_size_that_holds_the_rows_runs():
    compiled = Compiled()
    async with AsyncDataParallel(compiled.sizes(2, 4, 8), backend=puppets()) as model:
        for rows in (1, 2, 8):
            assert same(await model(ids(rows, 3)), ids(rows, 3))
        assert compiled.take() == [(2, 0), (2, 0), (8, 0)]


@scenario
async def test_rows_run_on_the_cheapest_cover_by_measured_times():
    compiled = Compiled()
    async with AsyncDataParallel(compiled.sizes(1, 8), backend=puppets()) as model:
        await train(model, compiled, ids(1, 3), ids(8, 3))
        for rows, expected in ((1, [1]), (5, [1] * 5), (6, [8]), (8, [8]), (17, [8, 8, 1]), (21, [8, 8, *[1] * 5])):
            assert same(await model(ids(rows, 3)), ids(rows, 3))
            assert [size for size, _ in compiled.take()] == expected


@scenario
async def test_rows_of_many_callers_are_covered_together():
    compiled = Compiled()
    async with AsyncDataParallel(compiled.sizes(1, 8), backend=puppets()) as model:
        await train(model, compiled, ids(1, 3), ids(8, 3))
        xs = [ids(1, 3, 10 * n) for n in range(11)]
        assert all(map(same, await ask(model, *xs), xs))
        assert compiled.take() == [(8, 0), (1, 0), (1, 0), (1, 0)]


@scenario
async def test_a_size_that_was_slow_once_is_measured_again():
    compiled, hiccups = Compiled(), [0.05]
    times = PuppetBackend(1, lambda rows: 0.001 if rows == 1 else hiccups.pop() if hiccups else 0.006)
    async with AsyncDataParallel(compiled.sizes(1, 8), backend=times) as model:
        await train(model, compiled, ids(8, 3), ids(1, 3))
        await model(ids(8, 3))
        assert compiled.take() == [(1, 0)] * 8
        for _ in range(50):  # 50 ms, eight times, in singles
            await model(ids(8, 3))
        ran = [size for size, _ in compiled.take()]
        assert 300 < ran.index(8) < 400
        assert ran[-1] == 8


@scenario
async def test_a_smaller_size_that_was_slow_once_is_tried_with_the_rows_of_a_lone_caller():
    compiled, hiccups = Compiled(), [0.05]
    times = PuppetBackend(1, lambda rows: 0.006 if rows == 8 else hiccups.pop() if hiccups else 0.001)
    async with AsyncDataParallel(compiled.sizes(4, 8), backend=times) as model:
        await train(model, compiled, ids(4, 3), ids(8, 3))
        for _ in range(100):
            await model(ids(8, 3))
        ran = [size for size, _ in compiled.take()]
        assert 60 < ran.index(4) < 80  # after 50 ms, eight times
        assert set(ran[ran.index(4) + 2 :]) == {4}  # two of them take 2 ms


@scenario
async def test_executions_that_fail_say_nothing_of_how_long_a_size_takes():
    compiled, fails = Compiled(), []

    def refusing(model):
        def net(ids):
            if fails:
                raise ValueError("refused")
            return model(ids)

        return net

    backend = PuppetBackend(1, lambda rows: 0.0001 if fails else TIMES[rows])
    models = {size: refusing(model) for size, model in compiled.sizes(1, 8).items()}
    async with AsyncDataParallel(models, backend=backend) as model:
        await train(model, compiled, ids(8, 3), ids(1, 3))
        fails.append(True)
        for _ in range(40):
            with pytest.raises(ValueError, match="refused"):
                await model(ids(8, 3))
        fails.clear()
        (core,) = model.statistics().cores
        assert core.errors >= 40
        assert dict(core.services) == pytest.approx({(8, 0): 0.006, (1, 0): 0.001})
        assert same(await model(ids(3, 3)), ids(3, 3))
        assert compiled.take() == [(1, 0)] * 3


@scenario
async def test_sizes_share_the_statistics():
    compiled = Compiled()
    async with AsyncDataParallel(compiled.sizes(1, 8), backend=puppets()) as model:
        _, timing = await model.timed(ids(3, 3))
        assert (timing.batch_rows, timing.padded_rows, timing.why) == (3, 5, "core_idle")
        assert (timing.queued, timing.device, timing.total) == pytest.approx((0.0, 0.006, 0.006))
        await model(ids(1, 3))
        _, timing = await model.timed(ids(3, 3))  # three singles, one after the other
        assert (timing.batch_rows, timing.padded_rows, timing.why) == (1, 0, "full")
        assert (timing.queued, timing.device) == pytest.approx((0.0, 0.003))
        (core,) = model.statistics().cores
        assert dict(core.services) == pytest.approx({(8, 0): 0.006, (1, 0): 0.001})
        assert (core.batches, core.rows, core.padded_rows) == (5, 7, 5)


@scenario
async def test_what_was_measured_outlives_a_restart():
    compiled = Compiled()
    model = AsyncDataParallel(compiled.grid((1, 8), (4, 8)), backend=puppets(), buckets=Buckets(sizes=(4, 8)))
    for expected in ([(8, 4)], [(1, 4)] * 3):
        async with model:
            compiled.take()
            assert same(await model(ids(3, 3)), ids(3, 3))
            assert [shape for shape in compiled.take() if shape[1] == 4] == expected
            await model(ids(1, 3))


# Buckets.


@scenario
async def test_calls_of_one_bucket_are_packed_whatever_their_length():
    compiled = Compiled()
    model = AsyncDataParallel(compiled.grid((4,), (4, 8)), backend=puppets(), buckets=Buckets(sizes=(4, 8)))
    async with model:
        await train(model, compiled, ids(1, 3))  # and what carries the length is learnt
        xs = [ids(1, 1), ids(1, 5, 10), ids(2, 4, 20), ids(3, 7, 40), ids(1, 2, 60)]
        assert all(map(same, await ask(model, *xs), xs))
        assert compiled.given[0][1].tolist() == [21, 22, 23, 24]
        assert compiled.take() == [(4, 4), (4, 8)]


@scenario
async def test_inputs_are_padded_with_what_was_said():
    given = []

    def net(ids, mask, scale):
        given.append((ids, mask))
        return (ids * mask).sum(1, keepdim=True) * scale

    buckets = Buckets(sizes=(4, 8), pad={"ids": 99, "mask": 0}, unpad=False)
    async with AsyncDataParallel(net, backend=puppets(), batch_size=2, buckets=buckets) as model:
        result = await model(ids=ids(1, 3), mask=torch.ones(1, 3), scale=torch.tensor([[2.0]]))
    assert result.tolist() == [[12.0]]
    assert given[0][0].tolist() == [[1, 2, 3, 99]] * 2
    assert given[0][1].tolist() == [[1, 1, 1, 0]] * 2


@scenario
async def test_without_an_example_one_more_run_tells_what_carries_the_length_once_for_each_structure():
    def net(ids, more):
        compiled.ran.append(tuple(ids.shape))
        return (ids * 2, ids.sum(1)) if more else {"tokens": ids * 2}

    compiled = Compiled()
    async with AsyncDataParallel(net, backend=puppets(), batch_size=4, buckets=Buckets(sizes=(4, 8))) as model:
        for more, shape in ((True, (4, 4)), (False, (4, 8))):
            other = (4, 12 - shape[1])
            for rows, length in ((1, shape[1]), (3, shape[1] - 1), (1, other[1])):
                out = await model(ids(rows, length), more)
                assert torch.equal(out[0] if more else out["tokens"], ids(rows, length) * 2)
            assert compiled.take() == [shape, other, shape, other]


@pytest.mark.parametrize("sizes", [(4,), (1, 4)])
@scenario
async def test_with_an_example_the_warm_up_covers_every_combination_and_nothing_is_learnt_later(sizes):
    compiled = Compiled()
    grid = compiled.grid(sizes, (4, 8))
    settings: Any = {"buckets": Buckets(sizes=(4, 8)), "example_inputs": ids(3, 5)}
    async with AsyncDataParallel(grid, backend=puppets(3), **settings) as model:
        assert Counter(compiled.take()) == dict.fromkeys(grid, 6)  # twice on each core
        stats = model.statistics()
        assert all(set(core.services) == set(grid) for core in stats.cores)
        assert not sum(core.batches for core in stats.cores)
        assert same(await model(ids(1, 7)), ids(1, 7))
        assert compiled.take() == [(sizes[0], 8)]


@scenario
async def test_one_bucket_is_enough_where_nothing_is_as_long_as_it():
    def sums(ids):
        return ids.sum(1, keepdim=True).expand(-1, 3)

    compiled = Compiled(sums)
    async with AsyncDataParallel(compiled.grid((2,), (4,)), backend=puppets(), buckets=Buckets(sizes=(4,))) as model:
        assert torch.equal(await model(ids(2, 3)), sums(ids(2, 3)))
        assert compiled.take() == [(2, 4)]


@pytest.mark.parametrize("example", [None, ids(1, 3)])
@scenario
async def test_one_bucket_with_an_output_as_long_asks_to_be_told(example):
    compiled = Compiled()
    models, buckets = compiled.grid((2,), (4,)), Buckets(sizes=(4,))
    with pytest.raises(OutputError, match=r"shape \(2, 4, 1\) in bucket 4, with no other .*unpad="):
        async with AsyncDataParallel(models, backend=puppets(), buckets=buckets, example_inputs=example) as model:
            await model(ids(2, 3))
    buckets = Buckets(sizes=(4,), unpad={"tokens": 1, "pairs": (1, 2), "logits": 2})
    async with AsyncDataParallel(models, backend=puppets(), buckets=buckets, example_inputs=example) as model:
        compiled.take()
        assert same(await model(ids(2, 3)), ids(2, 3))
        assert compiled.take() == [(2, 4)]


@scenario
async def test_unpad_false_hands_out_everything_as_it_comes():
    compiled = Compiled()
    buckets = Buckets(sizes=(4, 8), unpad=False)
    async with AsyncDataParallel(compiled.sizes(2), backend=puppets(), buckets=buckets) as model:
        result = await model(ids(2, 3))
        assert result.tokens.shape == (2, 4, 1)
        assert compiled.take() == [(2, 0)]


@scenario
async def test_an_output_that_cannot_be_decided_fails_its_calls_and_no_others():
    def net(ids, strides):
        return ids[:, ::2] if strides else ids

    async with AsyncDataParallel(net, backend=puppets(), batch_size=2, buckets=Buckets(sizes=(4, 8))) as model:
        for _ in range(2):
            results = await asyncio.gather(*(model(ids(1, 3), n == 1) for n in range(3)), return_exceptions=True)
            assert torch.equal(results[0], ids(1, 3))
            assert torch.equal(results[2], ids(1, 3))
            assert isinstance(results[1], OutputError)
            assert "unpad=" in str(results[1])


@scenario
async def test_a_combination_that_fails_to_load_is_named_with_its_core():
    class OneMissing(PuppetBackend):
        def load(self, model, core_id, batch_size):
            if model is broken and core_id == 1:
                raise RuntimeError("no such graph")
            return super().load(model, core_id, batch_size)

    compiled = Compiled()
    models = compiled.grid((1, 8), (4, 8))
    broken = models[8, 4]
    with pytest.raises(RuntimeError, match="no such graph") as caught:
        await AsyncDataParallel(models, backend=OneMissing(2), buckets=Buckets(sizes=(4, 8))).start()
    notes = "".join(caught.value.__notes__)
    assert "the model for 8 rows, bucket 4" in notes
    assert "core 1" in notes


@scenario
async def test_a_combination_that_fails_in_the_warm_up_is_named():
    compiled = Compiled()
    models = compiled.grid((1, 8), (4, 8)) | {(8, 8): compiled.model(8, 4)}
    buckets = Buckets(sizes=(4, 8))
    with pytest.raises(RuntimeError, match="compiled for 8 rows of 4") as caught:
        await AsyncDataParallel(models, backend=puppets(), buckets=buckets, example_inputs=ids(1, 3)).start()
    assert "the model for 8 rows, bucket 8" in "".join(caught.value.__notes__)


# Both: who shares whose batch.


def on_a_grid(compiled, sizes, **rest):
    buckets = Buckets(sizes=(4, 8), unpad={"tokens": 1, "pairs": (1, 2), "logits": 2})
    return AsyncDataParallel(compiled.grid(sizes, (4, 8)), backend=puppets(), buckets=buckets, **rest)


@pytest.mark.parametrize(
    ("long", "short", "expected"),
    [
        (1, 3, [8]),  # an execution of four rows that would be padded anyway
        (3, 1, [8]),
        (1, 5, [8, 4]),  # two short ones are left over
        (4, 2, [8, 4]),  # nothing would be padded
        (5, 3, [8, 8]),
        (5, 4, [8, 8, 4]),
    ],
)
@scenario
async def test_short_calls_fill_a_longer_bucket_only_where_it_would_be_padded(long, short, expected):
    compiled = Compiled()
    async with on_a_grid(compiled, (4,)) as model:
        xs = [ids(1, 6, 10 * n) for n in range(long)] + [ids(1, 3, 100 + 10 * n) for n in range(short)]
        assert all(map(same, await ask(model, *xs), xs))
        assert [bucket for _, bucket in compiled.take()] == expected
        assert model.statistics().cores[0].padded_rows == 4 * len(expected) - long - short


@scenario
async def test_a_short_call_does_not_move_up_to_where_a_smaller_size_will_do():
    compiled = Compiled()
    async with on_a_grid(compiled, (1, 8)) as model:
        await train(model, compiled, ids(1, 6), ids(8, 6), ids(1, 3), ids(8, 3))
        xs = [ids(1, 6), ids(1, 6, 10), ids(1, 3, 20), ids(1, 3, 30)]
        assert all(map(same, await ask(model, *xs), xs))
        assert compiled.take() == [(1, 8), (1, 8), (1, 4), (1, 4)]


@scenario
async def test_a_long_call_does_not_move_down_and_others_do_not_mix_whatever_it_costs():
    compiled = Compiled()
    async with on_a_grid(compiled, (4,)) as model:
        xs = [ids(1, 3), ids(1, 6, 10), ids(1, 3, 20).float(), ids(1, 6, 30).float()]
        assert all(map(same, await ask(model, *xs), xs))
        assert compiled.take() == [(4, 4), (4, 8), (4, 8)]  # the last two together: by now it is known what they cost


@scenario
async def test_a_call_may_be_spread_over_buckets_and_sizes():
    compiled = Compiled()
    async with on_a_grid(compiled, (2, 4)) as model:
        xs = [ids(3, 6), ids(6, 3, 100), ids(5, 4, 200)]
        assert all(map(same, await ask(model, *xs), xs))
        ran = compiled.take()
        assert {bucket for _, bucket in ran} == {4, 8}
        assert sum(size for size, _ in ran) - 14 == model.statistics().cores[0].padded_rows


@scenario
async def test_each_bucket_learns_its_own_times():
    compiled = Compiled()
    async with on_a_grid(compiled, (1, 8)) as model:
        await train(model, compiled, ids(1, 3), ids(8, 3), ids(8, 6))
        assert set(model.statistics().cores[0].services) == {(1, 4), (8, 4), (8, 8)}
        for length in (3, 6):  # of the longer ones a single was not measured: it is now
            assert same(await model(ids(2, length)), ids(2, length))
            assert compiled.take() == [(1, 4 if length == 3 else 8)] * 2
        assert set(model.statistics().cores[0].services) == {(1, 4), (8, 4), (1, 8), (8, 8)}


@scenario
async def test_a_tenant_pays_for_the_padding_of_its_batches():
    compiled = Compiled()
    async with on_a_grid(compiled, (8,)) as model:
        await train(model, compiled, ids(1, 3))
        blocker = asyncio.ensure_future(model(ids(8, 3)))
        await settle()
        alone, many = model.options(tenant="alone"), model.options(tenant="many")
        calls = [alone(ids(1, 2).to(kind)) for kind in (torch.int32, torch.int16, torch.float32, torch.float64)]
        calls += [many(ids(8, 3)) for _ in range(4)]  # full batches, of which each of the above costs one
        await asyncio.gather(blocker, *calls)
        padded = [given.dtype != torch.int64 for given in compiled.given[1:]]
        assert padded == [True, False] * 4


# Errors, cancellation, restarts.


@pytest.mark.parametrize("sizes", [(8,), (1, 8), (2, 4, 8)])
@scenario
async def test_a_bad_input_fails_alone_and_the_sizes_stay_right(sizes):
    compiled = Compiled()
    async with on_a_grid(compiled, sizes) as model:
        xs = [ids(1, 6), ids(1, 7, 20), *(ids(1, 3, 40 + 10 * n) for n in range(6))]
        xs[5] = torch.tensor([[7, -1, 7]])
        results = await ask(model, *xs)
        assert isinstance(results.pop(5), BadRowError)
        assert all(map(same, results, xs[:5] + xs[6:]))
        assert set(compiled.ran) <= set(compiled.grid(sizes, (4, 8)))
        assert len(compiled.take()) <= 1 + 6 + 2  # the halves of eight rows, and what did not share their batch
        assert all(map(same, await ask(model, *xs[:3]), xs))
        assert model.statistics().calls.failed == 1


@scenario
async def test_an_error_in_the_extra_run_leaves_the_learning_to_the_next():
    failures = [BadRowError("once")]

    def flaky(ids):
        if ids.shape[1] == 8 and failures:
            raise failures.pop()
        return encode(ids)

    compiled = Compiled(flaky)
    model = AsyncDataParallel(compiled.grid((4,), (4, 8)), backend=puppets(), buckets=Buckets(sizes=(4, 8)))
    async with model:
        with pytest.raises(BadRowError):
            await model(ids(1, 3))
        assert same(await model(ids(1, 3)), ids(1, 3))
        assert compiled.take() == [(4, 4), (4, 8), (4, 4), (4, 8)]


@scenario
async def test_what_a_cancelled_call_has_taught_is_not_learnt_again():
    compiled = Compiled()
    model = AsyncDataParallel(compiled.grid((4,), (4, 8)), backend=puppets(), buckets=Buckets(sizes=(4, 8)))
    async with model:
        first, second = (asyncio.ensure_future(model(ids(1, 3))) for _ in range(2))
        await settle()
        first.cancel()
        assert same(await second, ids(1, 3))
        assert first.cancelled()
        third = asyncio.ensure_future(model(ids(1, 6)))
        await settle()
        third.cancel()
        await asyncio.sleep(1)
        assert compiled.take() == [(4, 4), (4, 8), (4, 8)]
        calls = model.statistics().calls
        assert (calls.completed, calls.cancelled, calls.running) == (1, 2, 0)


@scenario
async def test_a_cancelled_call_makes_room_for_a_smaller_size():
    compiled = Compiled()
    async with on_a_grid(compiled, (1, 8)) as model:
        blocker = asyncio.ensure_future(model(ids(8, 3)))
        await settle()
        calls = [asyncio.ensure_future(model(ids(1, 6))) for _ in range(5)]
        await settle()
        for call in calls[1:]:
            call.cancel()
        await asyncio.gather(blocker, calls[0])
        assert compiled.take() == [(8, 4), (1, 8)]


# Batching off, and pieces.


@scenario
async def test_with_batching_off_pieces_must_have_the_compiled_rows():
    compiled = Compiled()
    model = AsyncDataParallel(compiled.grid((4,), (4, 8)), backend=puppets(2), buckets=Buckets(sizes=(4, 8)))
    model.disable_dynamic_batching()
    async with model:
        for length in (3, 6):
            assert same(await model(ids(8, length)), ids(8, length))
        assert set(compiled.take()) == {(4, 4), (4, 8)}
        for rows in (1, 4, 7, 16):
            with pytest.raises(ShapeError, match=f"{rows} rows / 2 cores != 4 compiled rows"):
                await model(ids(rows, 3))
        assert not compiled.ran


@scenario
async def test_batching_may_be_switched_off_while_calls_wait():
    compiled = Compiled()
    async with on_a_grid(compiled, (2,)) as model:
        before = [asyncio.ensure_future(model(ids(1, 3))) for _ in range(3)]
        await settle()
        model.disable_dynamic_batching()
        assert same(await model(ids(2, 3)), ids(2, 3))
        assert all(same(result, ids(1, 3)) for result in await asyncio.gather(*before))
        assert compiled.take() == [(2, 4)] * 3


@pytest.mark.parametrize("split", [1, 2, 3, 100])
@scenario
async def test_pieces_are_never_longer_than_what_their_bucket_was_compiled_for(split):
    compiled = Compiled()
    models = compiled.grid((1, 2), (4,)) | compiled.grid((4,), (8,))
    buckets = Buckets(sizes=(4, 8), unpad={"tokens": 1, "pairs": (1, 2), "logits": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of cores that are not fully used
        async with AsyncDataParallel(models, backend=puppets(2), buckets=buckets, split_size=split) as model:
            xs = [ids(7, 3), ids(7, 6, 100), ids(1, 2, 200)]
            assert all(map(same, await ask(model, *xs), xs))
            waiting = [asyncio.ensure_future(model(x)) for x in xs]
            await settle()
            model.split_size = None
            assert all(map(same, await ask(model, *xs), xs))
            assert all(map(same, await asyncio.gather(*waiting), xs))


# Everything at once.


@st.composite
def grids(draw):
    buckets = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
    return sorted(sizes), sorted(buckets)


class Network:
    """The same as `encode`, in nested outputs of several containers, with what is not to be cut beside it."""

    def __init__(self, width):
        self.width = width  # may be equal to a bucket

    def __call__(self, ids):
        out = encode(ids)
        pooled = out.pooled[:, :1].expand(-1, self.width)
        return {"all": [out.tokens, (None, out.logits)], "pooled": pooled, "pairs": Pairs(out.pairs)}


class Pairs(NamedTuple):
    value: torch.Tensor


def leaves(value):
    tokens, (nothing, logits) = value["all"]
    assert nothing is None
    assert type(value["pairs"]) is Pairs
    return [tokens, logits, value["pooled"], value["pairs"].value]


@settings(deadline=None, max_examples=60)
@given(
    grids(),
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=15),
    st.integers(1, 3),
    st.booleans(),
    st.lists(st.integers(1, 20), min_size=3, max_size=3),
    st.data(),
)
def test_whatever_is_compiled_everybody_gets_the_plain_models_answer(grid, calls, cores, example, times, data):
    sizes, buckets = grid
    net = Network(data.draw(st.sampled_from(buckets)))
    compiled = Compiled(net)
    pace = {size: times[index] / 1000 for index, size in enumerate(sizes)}
    unpad = {"all": 1, "output['all'][1][1]": 2, "pairs": (1, 2)} if len(buckets) == 1 else None

    async def main():
        async with AsyncDataParallel(
            compiled.grid(sizes, buckets),
            backend=puppets(cores, pace),
            buckets=Buckets(sizes=buckets, unpad=unpad),
            example_inputs=ids(2, 1) if example else None,
        ) as model:
            compiled.take()

            async def one(number, rows, length, delay):
                await asyncio.sleep(delay / 500)
                x = ids(rows, length, 1000 * number)
                result = await model(x)
                for got, wanted in zip(leaves(result), leaves(net(x)), strict=True):
                    assert torch.equal(got, wanted)

            async with asyncio.TaskGroup() as group:
                for number, (rows, share, delay) in enumerate(calls):
                    group.create_task(one(number, rows, 1 + int(share * (buckets[-1] - 1)), delay))
            learning = 0 if example or unpad else cores  # extra runs, at most
            cores_stats = model.statistics().cores
            rows = sum(rows for rows, _, _ in calls)
            assert sum(core.rows for core in cores_stats) == rows
            batches = sum(core.batches for core in cores_stats)
            assert batches <= len(compiled.ran) <= batches + learning
            if not learning:
                assert sum(size for size, _ in compiled.ran) == rows + sum(core.padded_rows for core in cores_stats)

    run(main())


# On real threads.


def test_simulated_cores_of_every_shape_answer_like_the_plain_model():
    async def main():
        compiled = Compiled()
        backend = SimulatedBackend(cores=2, service_time=0.0005, per_row=0.0001)
        buckets = Buckets(sizes=(4, 8, 16))
        grid = compiled.grid((1, 4), buckets.sizes)
        async with AsyncDataParallel(grid, backend=backend, buckets=buckets, example_inputs=ids(1, 3)) as model:
            compiled.take()
            xs = [ids(1 + n % 3, 1 + n % 16, 100 * n) for n in range(80)]
            assert all(map(same, await ask(model, *xs), xs))
            stats = model.statistics()
            rows, padded = (sum(getattr(core, name) for core in stats.cores) for name in ("rows", "padded_rows"))
            assert rows == sum(len(x) for x in xs)
            assert sum(size for size, _ in compiled.ran) == rows + padded

    asyncio.run(main())


def test_the_warm_up_measures_what_then_decides():
    def quick_alone(ids):
        time.sleep(0.0 if len(ids) == 1 else 0.05)
        return encode(ids)

    async def main():
        compiled = Compiled(quick_alone)
        backend = SimulatedBackend(1, 0.0)
        async with AsyncDataParallel(compiled.sizes(1, 8), backend=backend, example_inputs=ids(3, 3)) as model:
            assert compiled.take() == [(1, 0), (1, 0), (8, 0), (8, 0)]
            assert set(model.statistics().cores[0].services) == {(1, 0), (8, 0)}
            assert same(await model(ids(3, 3)), ids(3, 3))
            assert compiled.take() == [(1, 0)] * 3

    asyncio.run(main())


def test_simulated_faults_in_buckets_reach_only_their_calls():
    async def main():
        compiled = Compiled()
        buckets = Buckets(sizes=(4, 8))
        async with AsyncDataParallel(
            compiled.grid((1, 4), buckets.sizes), backend=SimulatedBackend(2, 0.0005), buckets=buckets
        ) as model:
            xs = [ids(1, 1 + n % 8, 100 * n) for n in range(40)]
            for bad in (3, 17, 18):
                xs[bad][0, 0] = -1
            for _ in range(2):
                for n, (x, result) in enumerate(zip(xs, await ask(model, *xs), strict=True)):
                    assert isinstance(result, BadRowError) if n in (3, 17, 18) else same(result, x)
            compiled.take()

    asyncio.run(main())


def test_a_transformer_in_buckets_answers_like_the_plain_one():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attn_implementation="eager",
    )  # fmt: skip
    bert = transformers.BertModel(config).eval()
    texts = [torch.randint(1, 100, (1 + n % 2, 1 + 7 * n % 32)) for n in range(30)]

    async def main():
        buckets = Buckets(sizes=(8, 16, 32), pad={"input_ids": 0, "attention_mask": 0})  # 16 is the hidden size, too
        async with AsyncDataParallel(bert, backend=SimulatedBackend(2, 0.0), batch_size=4, buckets=buckets) as model:
            results = await asyncio.gather(
                *(
                    model(
                        input_ids=text,
                        attention_mask=torch.ones_like(text),
                        output_attentions=n % 3 == 0,
                        output_hidden_states=n % 3 == 1,
                    )
                    for n, text in enumerate(texts)
                )
            )
        for n, (text, result) in enumerate(zip(texts, results, strict=True)):
            with torch.no_grad():
                expected = bert(text, output_attentions=n % 3 == 0, output_hidden_states=n % 3 == 1)
            assert type(result) is type(expected)
            assert list(result) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, msg=f"{name}, {tuple(text.shape)}")

    asyncio.run(main())


# Found by reading and by random tests; each was seen to fail.


class Either(torch.nn.Module):
    """Tokens or a pooled vector, as asked: outputs of one structure, of which one carries the length."""

    def forward(self, x, mode):
        return x if mode == "tokens" else x[:, :1].repeat(1, 8)


@pytest.mark.parametrize("modes", [("tokens", "pooled"), ("pooled", "tokens")])
def test_what_carries_the_length_is_learnt_for_each_kind_of_call(modes):
    async def main():
        buckets = Buckets(sizes=(8, 16))
        async with AsyncDataParallel(Either().eval(), backend=SimulatedBackend(1, 0.0), buckets=buckets) as model:
            for _ in range(2):
                for mode in modes:
                    assert (await model(torch.ones(1, 5), mode)).shape == (1, 5 if mode == "tokens" else 8)

    asyncio.run(main())


def test_without_batching_any_compiled_size_will_do():
    async def main():
        models = {1: torch.nn.Identity().eval(), 8: torch.nn.Identity().eval()}
        async with AsyncDataParallel(models, backend=SimulatedBackend(2, 0.0), set_dynamic_batching=False) as model:
            for rows in (2, 16):
                assert len(await model(torch.ones(rows, 3))) == rows
            with pytest.raises(ShapeError, match="4 rows / 2 cores != 1 or 8 compiled rows"):
                await model(torch.ones(4, 3))

    asyncio.run(main())


def test_without_batching_an_output_in_buckets_may_have_any_rows():
    async def main():
        backend, buckets = SimulatedBackend(1, 0.0), Buckets(sizes=(8, 16))

        def net(x):
            return x.sum(1).mean().reshape(1)

        async with AsyncDataParallel(net, backend=backend, buckets=buckets, set_dynamic_batching=False) as model:
            assert await model(torch.ones(4, 5)) == 5.0

    asyncio.run(main())


def test_what_cannot_be_decided_is_asked_once():
    runs = []

    def net(x):
        runs.append(x.shape)
        return x.repeat(1, 2)  # twice as long as the bucket

    async def main():
        settings = {"buckets": Buckets(sizes=(8, 16)), "check_rows": False}
        async with AsyncDataParallel(net, backend=SimulatedBackend(1, 0.0), **settings) as model:
            for _ in range(3):
                with pytest.raises(OutputError, match="unpad"):
                    await model(torch.ones(1, 5))

    asyncio.run(main())
    assert [shape[1] for shape in runs] == [8, 16, 8, 8]


def test_the_cover_counts_again_when_split_size_is_taken_back():
    async def main():
        async with AsyncDataParallel(
            {1: torch.nn.Identity().eval(), 8: torch.nn.Identity().eval()},
            backend=PuppetBackend(1, service_time=lambda rows: {1: 1.0, 8: 6.0}[rows]),
            example_inputs=torch.ones(1, 2),
        ) as model:
            for rows in (1, 8):
                await model(torch.ones(rows, 2))
            model.split_size = 3
            await model(torch.ones(3, 2))
            model.split_size = None
            before = model.statistics().cores[0].batches
            await model(torch.ones(3, 2))
            return model.statistics().cores[0].batches - before

    assert run(main()) == 3
