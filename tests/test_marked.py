"""Inputs that belong to all rows (`Shared`), and Python objects of which each row has one (`Rows`), in and out."""

import asyncio
import re

import numpy as np
import pytest
import torch

from aneuron import AsyncDataParallel, Buckets, CpuBackend, OutputError, Rows, ShapeError, Shared, SimulatedBackend
from aneuron.tensors.signature import SMALL, measure


def one_core(model, **settings):
    return AsyncDataParallel(model, backend=CpuBackend(cores=1), **settings)


def key(*args, **kwargs):
    return measure(args, kwargs, 0).signature


X = torch.arange(12.0).reshape(6, 2)


# Shared.


def test_calls_share_a_batch_if_they_share_the_same_or_what_is_equal_and_small():
    table, large = torch.ones(3, 2), torch.ones(SMALL)
    assert key(X, Shared(table)) == key(X, Shared(table)) == key(X, Shared(table.clone()))
    assert key(X, Shared(table)) != key(X, Shared(table + 1))
    assert key(X, Shared(table)) != key(X, Shared(table.double()))
    assert key(X, Shared(table)) != key(X, Shared(table.T.contiguous()))
    assert key(X, Shared(large)) == key(X, Shared(large))
    assert key(X, Shared(large)) != key(X, Shared(large.clone()))
    assert key(X, Shared({"a": table, "k": 3})) == key(X, Shared({"a": table, "k": 3}))
    assert key(X, Shared({"a": table, "k": 3})) != key(X, Shared({"a": table, "k": 4}))
    assert key(X, Shared(table.numpy())) == key(X, Shared(table.numpy().copy()))


def test_what_was_changed_between_two_calls_is_not_the_same():
    large = torch.ones(SMALL)
    before = key(X, Shared(large))
    large[0] = 7
    assert key(X, Shared(large)) != before


@pytest.mark.parametrize(
    "value", [torch.empty(0, 3), torch.tensor(3), torch.ones(2, 2, dtype=torch.bfloat16), "text", 3]
)
def test_what_may_be_shared(value):
    assert key(X, Shared(value)) == key(X, Shared(value))


async def test_a_shared_input_reaches_every_piece_as_it_is():
    table = torch.arange(6.0).reshape(3, 2)
    seen = []

    def model(x, *, table, scale):
        seen.append((len(x), table))
        return torch.cdist(x, table).argmin(1), x * scale["by"]

    async with AsyncDataParallel(model, backend=CpuBackend(cores=2), batch_size=2, check_rows=False) as net:
        nearest, scaled = await net(X, table=Shared(table), scale={"by": Shared(np.array(2.0))})
        assert nearest.tolist() == torch.cdist(X, table).argmin(1).tolist()
        assert torch.equal(scaled, X * 2)
    assert [rows for rows, _ in seen] == [2, 2, 2]
    assert all(each is table for _, each in seen)


async def test_callers_of_one_table_share_a_batch_and_others_do_not():
    one, other = torch.ones(SMALL, 2), torch.zeros(SMALL, 2)
    batches = []

    def model(x, table):
        batches.append(x.shape[0])
        return x + table[0]

    backend = SimulatedBackend(cores=1, service_time=0.0)
    async with AsyncDataParallel(model, backend=backend, batch_size=4, check_rows=False) as net:
        calls = [net(X[n : n + 1], Shared(table)) for n, table in enumerate([one, other, one, other])]
        results = await asyncio.gather(*calls)
        assert [each.tolist() for each in results] == [
            (X[n : n + 1] + table[0]).tolist() for n, table in enumerate([one, other, one, other])
        ]
        assert net.statistics().batch_rows.sum == 4
    assert len(batches) == 2


async def test_an_example_fixes_what_is_shared():
    example = (torch.ones(1, 2), Shared(torch.ones(3, 2)))
    async with one_core(lambda x, table: x @ table.T, batch_size=4, example_inputs=example) as net:
        assert torch.equal(await net(X, Shared(torch.zeros(3, 2))), torch.zeros(6, 3))
        with pytest.raises(ShapeError, match=r"input 1 is shared and has tensors .*\(4, 2\).*compiled for .*\(3, 2\)"):
            await net(X, Shared(torch.zeros(4, 2)))
        with pytest.raises(ShapeError, match="input 1 is a Tensor, in example_inputs it is a Shared"):
            await net(X, torch.zeros(6, 2))


async def test_with_buckets_what_is_shared_has_no_length():
    buckets = Buckets(dim=1, sizes=(4, 8), pad=0)

    def model(x, table):
        return x.sum(1, keepdim=True) + table.sum()

    async with one_core(model, batch_size=4, buckets=buckets) as net:
        assert (await net(torch.ones(2, 3), Shared(torch.ones(1, 3)))).tolist() == [[6.0], [6.0]]


async def test_unequal_rows_suggest_it():
    async with one_core(torch.add) as net:
        with pytest.raises(ShapeError, match=r"aneuron\.Shared"):
            await net(torch.ones(4, 2), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shared(Shared(X)), "marks do not nest"),
        (lambda: Shared(Rows(["a"])), "marks do not nest"),
        (lambda: Rows([Shared(X)]), "object 0 .*marks do not nest"),
        (lambda: Rows(["a", Rows(["b"])]), "object 1 .*marks do not nest"),
        (lambda: Rows([]), "0 rows"),
        (lambda: Rows("abc"), "expected a list"),
        (lambda: Rows(3), "expected a list"),
        (lambda: key(X, Shared([Rows(["a"])])), "marks do not nest"),
        (lambda: key(X, Shared({"a": Shared(X)})), "marks do not nest"),
        (lambda: key(Shared(X)), r"aneuron\.Rows"),
        (lambda: key(Shared("x")), r"aneuron\.Rows"),
        (lambda: key(X, Rows(["a"])), "input 0 has 6, input 1 has 1"),
        (lambda: key(Rows(["a"]), X), "input 0 has 1, input 1 has 6"),
        (lambda: key(Rows(["a"]), Rows(["a", "b"])), "input 0 has 1, input 1 has 2"),
        (lambda: key(X, Shared(torch.ones(2, device="meta"))), "dense host tensor"),
        (lambda: key(X, Shared(torch.ones(2).to_sparse())), "dense host tensor"),
    ],
)
def test_marks_that_are_misused(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


# Rows.


def lengths(texts, x=None):
    assert isinstance(texts, list)
    count = torch.tensor([len(text) for text in texts])
    return count if x is None else (count, x * 2)


TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


@pytest.mark.parametrize("settings", [{}, {"batch_size": 2}, {"batch_size": 4}, {"set_dynamic_batching": False}])
async def test_objects_are_cut_and_packed_with_their_rows(settings):
    if "set_dynamic_batching" in settings:
        settings = settings | {"split_size": None}
    async with one_core(lengths, **settings) as net:
        assert (await net(Rows(TEXTS))).tolist() == [1, 2, 3, 4, 5]
        results = await asyncio.gather(*[net(Rows([text])) for text in TEXTS])
        assert [each.tolist() for each in results] == [[1], [2], [3], [4], [5]]
        x = torch.arange(5.0)[:, None]
        count, doubled = await net(Rows(TEXTS), x)
        assert count.tolist() == [1, 2, 3, 4, 5]
        assert torch.equal(doubled, 2 * x)


async def test_objects_reach_the_model_as_they_are_and_the_last_is_repeated():
    seen = []

    def model(objects):
        seen.append(objects)
        return torch.zeros(len(objects), 1)

    objects = [object(), torch.ones(3), {"boxes": torch.ones(1, 4)}]
    async with one_core(model, batch_size=4, check_rows=False) as net:
        await net(Rows(objects))
    assert [id(each) for each in seen[0]] == [id(each) for each in [*objects, objects[-1]]]


async def test_rows_in_example_inputs_and_a_call_without():
    async with one_core(lengths, batch_size=4, example_inputs={"texts": Rows(["a", "bb"])}) as net:
        assert (await net(texts=Rows(TEXTS))).tolist() == [1, 2, 3, 4, 5]
        with pytest.raises(ShapeError, match="input 'texts' is a Tensor, in example_inputs it is a Rows"):
            await net(texts=torch.ones(2, 2))


async def test_a_plain_list_that_looks_like_rows_warns_once_where_the_call_is_cut():
    def model(x, texts):
        return x * len(texts)

    async with one_core(model, batch_size=4, check_rows=False) as net:
        assert (await net(X[:4], ["a"] * 4))[0, 1] == 4  # not cut
        with pytest.warns(UserWarning, match=r"input 1 is a list of 6 entries.*aneuron\.Rows"):
            await net(X, ["a"] * 6)
        await net(X, ["a"] * 6)  # once
    async with one_core(model, batch_size=4, check_rows=False) as net:
        await net(X, ("a",) * 6)
        await net(X, ["a"] * 5)
        await net(X, Shared(["a"] * 6))


# Lists in outputs.


def detect(x):
    """For each image a dict of boxes, as many as its first pixel says."""
    return [
        {"boxes": torch.full((int(row[0]), 4), float(row[1])), "name": f"{float(row[1]):.0f}", "nothing": None}
        for row in x
    ]


def same(results, images):
    expected = detect(images)
    assert isinstance(results, list)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.keys() == wanted.keys()
        assert torch.equal(result["boxes"], wanted["boxes"])
        assert result["name"] == wanted["name"]


IMAGES = torch.tensor([[0.0, 10], [2, 11], [1, 12], [3, 13], [0, 14], [5, 15], [2, 16]])


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 2},
        {"batch_size": 4},
        {"batch_size": 4, "example_inputs": torch.tensor([[2.0, 1.0]])},
        {"example_inputs": torch.tensor([[2.0, 1.0], [1.0, 3.0]])},
        {"split_size": 3},
        {"batch_size": 4, "check_rows": False},
    ],
    ids=str,
)
async def test_detectors_under_packing_padding_and_splitting(cores, settings):
    async with AsyncDataParallel(detect, backend=CpuBackend(cores=cores), **settings) as net:
        for _ in range(2):
            same(await net(IMAGES), IMAGES)
            parts = [IMAGES[:1], IMAGES[1:3], IMAGES[3:]]
            for result, part in zip(await asyncio.gather(*map(net, parts)), parts, strict=True):
                same(result, part)


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("cores", [1, 2, 4])
async def test_detectors_without_dynamic_batching_are_joined_in_order(cores):
    async with AsyncDataParallel(detect, backend=CpuBackend(cores=cores), set_dynamic_batching=False) as net:
        same(await net(IMAGES[:4]), IMAGES[:4])
        same(await net(IMAGES[:1]), IMAGES[:1])


async def test_tuples_of_lists_and_lists_beside_tensors():
    def model(x):
        found = detect(x)
        return [each["boxes"] for each in found], {"names": [each["name"] for each in found], "sum": x.sum(1)}

    async with AsyncDataParallel(model, backend=CpuBackend(cores=2), batch_size=2) as net:
        boxes, rest = await net(IMAGES)
        assert [len(each) for each in boxes] == [int(row[0]) for row in IMAGES]
        assert rest["names"] == ["10", "11", "12", "13", "14", "15", "16"]
        assert torch.equal(rest["sum"], IMAGES.sum(1))


async def test_what_is_in_a_list_shares_memory_with_nothing():
    kept = torch.zeros(4, 2)

    def model(x):
        kept[: len(x)] = x
        return [kept[row : row + 1] for row in range(len(x))]

    async with one_core(model, batch_size=4, check_rows=False) as net:
        one = await net(X[:1])
        kept.zero_()
        assert torch.equal(one[0], X[:1])


async def test_a_list_that_is_shorter_than_the_batch_reaches_nobody():
    async with one_core(lambda x: detect(x)[:-1], batch_size=2) as net:
        with pytest.raises(OutputError):
            await net(IMAGES[:2])
        with pytest.raises(OutputError):
            await net(IMAGES)


async def test_an_error_in_one_row_of_a_list_fails_its_call_alone():
    def model(texts):
        if "bad" in texts:
            raise ValueError("a bad text")
        return [text.upper() for text in texts]

    async with one_core(model, batch_size=4) as net:
        results = await asyncio.gather(*[net(Rows([text])) for text in ("a", "bad", "c")], return_exceptions=True)
        assert results[0] == ["A"]
        assert isinstance(results[1], ValueError)
        assert results[2] == ["C"]


def test_marks_say_what_they_are():
    assert repr(Rows(["a", "b"])) == "Rows(2 objects)"
    assert re.fullmatch(r"Shared\(Tensor\)", repr(Shared(X)))
    assert list(Rows(["a", "b"])) == ["a", "b"]
    assert Rows(["a", "b"])[1] == "b"
