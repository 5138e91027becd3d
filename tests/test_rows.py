"""Rows into batches and back, without the threads of a runtime: calls are cut anywhere, and run in any order."""

import random
import threading
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aneuron import OutputError
from aneuron.tensors import copying, rows
from aneuron.tensors.outputs import Output
from aneuron.tensors.signature import measure

NATIVE = copying.native
WAYS = [pytest.param("torch"), pytest.param("native", marks=pytest.mark.skipif(NATIVE is None, reason="not built"))]
Pair = namedtuple("Pair", "one two")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(copying, "native", NATIVE if request.param == "native" else None)


def double(x):
    return x * 2


MODELS = {
    "a tensor": double,
    "a dict": lambda x: {"double": x * 2, "sum": x.flatten(1).sum(1), "itself": x},
    "a tuple": lambda x: (x * 2, x[:, :1]),
    "a list": lambda x: [x, x.t().contiguous().t()],
    "a named tuple": lambda x: Pair(x, x + 1),
    "nested": lambda x: {"a": [x, {"b": x * 3}], "none": None},
    "one in a tuple": lambda x: (x,),
    "booleans": lambda x: {"sign": x > 0, 7: x},
    "nothing in a row": lambda x: (x[:, :0], x),
}


def inputs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 99, (count, 4), generator=generator).float()


def batches(calls, size, shuffle):
    """All rows of calls in batches of up to `size`, as the scheduler may cut them."""
    found, batch, room = [], [], size
    for call in calls:
        at = 0
        while at < call.rows:
            stop = min(call.rows, at + room)
            batch.append((call, at, stop))
            room -= stop - at
            at = stop
            if not room:
                found.append(batch)
                batch, room = [], size
    found += [batch] * bool(batch)
    shuffle.shuffle(found)
    return found


def execute(model, chunks, size, guard, as_output=False):
    chunks, leaves, template = rows.gather(chunks)
    args, kwargs = rows.collate(chunks, leaves, template, size, 0)
    rows.check_unmodified(chunks, leaves, template)
    value = model(*args, **kwargs)
    return rows.scatter(Output(value, None, 0) if as_output else value, chunks, size, 0, guard)


def equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    return type(one) is type(other)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 9), st.booleans(), st.integers(0, 9))
def test_every_call_gets_what_the_model_makes_of_its_rows(native, kind, sizes, size, as_output, seed):
    model, guard, shuffle = MODELS[kind], threading.Lock(), random.Random(seed)
    calls = [measure((inputs(count, index),), {}, 0) for index, count in enumerate(sizes)]
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "native", NATIVE if native == "native" else None)
        cut = batches(calls, size, shuffle)
        again = [batch for batch in cut if any(stop - at != call.rows for call, at, stop in batch)][:2]
        for chunks in again + cut:  # a batch may run twice: where its core failed after all
            for call, result in execute(model, chunks, size, guard, as_output):
                spread = call.parts is not None
                assert not spread or id(call) not in results, "a spread call is complete once"
                results[id(call)] = result
    for call in calls:
        assert equal(results[id(call)], model(call.leaves[0]))


def test_parts_of_one_call_are_placed_by_several_threads_at_once(way):
    guard, start = threading.Lock(), threading.Barrier(4)
    for turn in range(20):
        call = measure((inputs(256, turn),), {}, 0)
        cut = batches([call], 8, random.Random(turn))
        found = []

        def work(share, found=found):
            start.wait()
            for chunks in share:
                found.extend(execute(MODELS["a dict"], chunks, 8, guard))

        threads = [threading.Thread(target=work, args=(cut[index::4] + cut[:2],)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ((owner, result),) = found
        assert owner is call
        assert equal(result, MODELS["a dict"](call.leaves[0]))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:, :2],
        lambda x: x.double(),
        lambda x: x[:, :, None],
        lambda x: (x,),
        lambda x: {"a": x},
        lambda x: x.int(),
        lambda x: x.bool(),
    ],
    ids=["narrower", "another dtype", "another dimension", "in a tuple", "in a dict", "integers", "booleans"],
)
@pytest.mark.parametrize("as_output", [False, True])
def test_parts_that_differ_in_more_than_rows_are_refused(way, other, as_output):
    call, guard = measure((inputs(16, 0),), {}, 0), threading.Lock()
    assert execute(lambda x: x, [(call, 0, 8)], 8, guard, as_output) == []
    with pytest.raises(OutputError, match="cannot be joined"):
        execute(other, [(call, 8, 16)], 8, guard, as_output)
    ((_, result),) = execute(lambda x: x, [(call, 8, 16)], 8, guard, as_output)
    assert torch.equal(result, call.leaves[0])


def test_inputs_in_containers_reach_the_model_as_they_were_passed(way):
    seen = []

    def model(*args, **kwargs):
        seen.append((args, kwargs))
        return args[0] if args else kwargs["a"]

    one, two = inputs(2, 1), inputs(2, 2)
    for args, kwargs in [
        ((one, two), {}),
        ((), {"b": two, "a": one}),
        ((one,), {"flag": True, "scale": 2.0, "name": "x", "none": None, "b": two}),
        ((one, 3, [two]), {}),
        ((one,), {"nested": {"b": two}}),
        ((one.numpy(), two), {}),
    ]:
        calls = [measure(args, kwargs, 0), measure(args, kwargs, 0)]
        done = execute(model, [(call, 0, 2) for call in calls], 4, threading.Lock())
        assert len(done) == 2
        twice = [torch.cat([each, each]) for each in (one, two)]
        flat, structure, expected = [], [], []
        rows.walk(seen[-1], flat, structure, [])
        rows.walk((args, dict(sorted(kwargs.items()))), expected, shape := [], [])
        assert structure == shape
        assert len(flat) == len(expected)
        assert all(torch.equal(each, want) for each, want in zip(flat, twice, strict=False))


def test_who_is_gone_is_left_out(way):
    calls = [measure((inputs(1, index), inputs(1, 9)), {}, 0) for index in range(3)]
    chunks = [(call, 0, 1) for call in calls]
    calls[0].leaves = None
    there, leaves, template = rows.gather(chunks)
    assert [chunk[0] for chunk in there] == calls[1:]
    assert leaves == [call.leaves for call in calls[1:]]
    assert template is calls[1].template
    for call in calls:
        call.leaves = None
    assert rows.gather(chunks) == ([], [], None)
    assert rows.gather([]) == ([], [], None)
