"""What torch_neuronx.DataParallel gets wrong or does oddly, fact by fact, and that aneuron does the right thing.

Each test quotes the fact in a comment: its bugs (BUG), its quirks (QUIRK), and what else of its behaviour would be
a trap if it came along with the names that were taken over.
"""

import asyncio
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from puppets import named

from aneuron import AsyncDataParallel, CpuBackend, DeviceError, OutputError, ShapeError
from aneuron.testing import PuppetBackend, run, settle


def serve(net, *calls, cores=4, expect=(), **settings):
    """The results of calls made at once, each a tuple of positional inputs, and the batches that the model saw."""

    async def main():
        batches = []

        def noted(*args, **kwargs):
            batches.append(args[0] if len(args) == 1 and not kwargs else (args, kwargs))
            return net(*args, **kwargs)

        backend = PuppetBackend(cores=cores, service_time=0.01)
        async with AsyncDataParallel(noted, backend=backend, **settings) as model:
            results = await asyncio.gather(*(model(*args) for args in calls), return_exceptions=True)
        return results, batches

    results, batches = run(main())
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, expect):
            raise result
    return results, batches


def column(rows, dim=0):
    """`rows` numbered rows along `dim`."""
    return torch.arange(rows, dtype=torch.float32).reshape([1] * dim + [rows] + [1] * (1 - dim if dim < 2 else 0))


def ordered(batches, dim=0):
    """Batches of numbered rows in the order of their rows: cores that run at once end in any order."""
    return sorted(batches, key=lambda batch: batch.select(dim, 0).flatten()[0].item())


def sizes(batches, dim=0):
    return [batch.shape[dim] for batch in batches]


# 1.1 Surface.


def test_keyword_inputs_are_inputs():
    # "No keyword inputs: `dp(x=...)` is a TypeError."
    async def main():
        async with AsyncDataParallel(lambda x, y: x - y, backend=PuppetBackend(service_time=0.01)) as model:
            return await model(column(5), y=column(5) * 2)

    assert torch.equal(run(main()), -column(5))


def test_workers_run_in_inference_mode_by_themselves():
    # "Grad/inference mode is thread-local, so a caller's `torch.inference_mode()` is NOT in force in pool threads."
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def net(x):
        seen.append(torch.is_inference_mode_enabled())
        return x * weight

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=2)) as model:
            return await model(column(4))

    result = asyncio.run(main())
    assert set(seen) == {True}
    assert not result.requires_grad
    assert not result.is_inference()


# 1.2 device_ids.


@pytest.mark.parametrize(
    "name", ["xnc:3foo", "xnc:1", "nc:1foo", "nc:1 ", " nc:1", "nc:1\n", "my nc:1", "nc: 1", "NC:1", "1"]
)
def test_a_device_name_is_matched_as_a_whole(name):
    # "String form: first un-anchored match of `nc:` + digits, so "xnc:3foo" is accepted as 3."
    with pytest.raises(DeviceError, match="expected an int from 0 or 'nc:#'"):
        AsyncDataParallel(torch.neg, device_ids=[name])


@pytest.mark.parametrize("value", [True, False, -1, -2])
def test_booleans_and_negative_numbers_are_no_device_ids(value):
    # "`int` (and so `True`, negatives) taken as is"
    with pytest.raises(DeviceError, match=str(value)):
        AsyncDataParallel(torch.neg, device_ids=[value])


def test_an_id_that_the_process_does_not_see_is_an_error_that_explains_it():
    # "Ids are zero-based within the process's visible cores, never global. [...] id 13 is invalid in both."
    async def main():
        model = AsyncDataParallel(torch.neg, ["nc:13"], backend=PuppetBackend(cores=12))
        with pytest.raises(DeviceError, match=r"\[13\].*12.*ids 0 to 11.*zero"):
            await model(column(1))

    run(main())


def test_the_order_of_the_device_ids_is_kept():
    # "The list is copied, parsed, then sorted ascending: the order given by the caller is lost"
    async def main():
        ids = [3, "nc:0", 2]
        backend = PuppetBackend(cores=4)
        async with AsyncDataParallel(torch.neg, ids, backend=backend) as model:
            assert ids == [3, "nc:0", 2]
            assert [core.id for core in model.statistics().cores] == [3, 0, 2]
            call = asyncio.ensure_future(model(column(3)))
            await settle()
            assert [backend[core].executing[0][0].item() for core in (3, 0, 2)] == [0.0, 1.0, 2.0]
            for core in (3, 0, 2):
                backend[core].release()
            assert torch.equal(await call, -column(3))

    run(main())


@pytest.mark.parametrize("ids", [[0, 0], ["nc:1", 1], [0, 1, 2, 1]])
def test_a_core_named_twice_is_refused(ids):
    # "Duplicates are allowed; they count as "not consecutive", so several copies load on the same core."
    with pytest.raises(DeviceError, match="more than once"):
        AsyncDataParallel(torch.neg, device_ids=ids)


def test_no_device_ids_at_all_are_refused_when_the_object_is_made():
    # "`[]` -> IndexError while loading"
    with pytest.raises(DeviceError, match="names no core"):
        AsyncDataParallel(torch.neg, device_ids=[])


# 1.3 Loading and placement.


@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3], [1], [0, 2, 3]], ids=named)
def test_there_is_one_load_for_each_core_whether_or_not_the_ids_are_consecutive(ids):
    # "`loaded_modules` therefore has length 1 (consecutive) or len(ids) (non-consecutive)."
    # "Consecutive mode: Python neither knows nor chooses the core that runs a chunk."
    async def main():
        backend = PuppetBackend(cores=4, service_time=0.01)
        async with AsyncDataParallel(torch.neg, ids, backend=backend) as model:
            expected = ids or [0, 1, 2, 3]
            assert sorted(backend.loaded) == expected
            assert torch.equal(await model(column(8)), -column(8))
            assert [core.batches for core in model.statistics().cores] == [1] * len(expected)
            assert [len(backend[core].executed) for core in expected] == [1] * len(expected)

    run(main())


def test_the_model_is_not_copied():
    # "Non-consecutive ids: `copy.deepcopy` once per further core"
    class Net(torch.nn.Module):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def forward(self, x):
            seen.add(id(self))
            return x

    seen = set()
    serve(Net().eval(), (column(8),), device_ids=[0, 2, 3])
    assert len(seen) == 1


# 1.4 num_workers.


@pytest.mark.parametrize("ids", [None, [0, 1], [0, 2, 3]], ids=named)
def test_there_are_two_workers_for_each_core_by_default(ids):
    # "Code: `2 * len(loaded_modules)`. On the consecutive/default path that is **2, for any number of cores**"
    async def main():
        async with AsyncDataParallel(torch.neg, ids, backend=PuppetBackend(cores=12, concurrent=True)) as model:
            cores = len(ids or range(12))
            assert model.num_workers == 2 * cores
            calls = [asyncio.ensure_future(model(column(32))) for _ in range(100)]
            await settle()
            assert sum(core.in_flight for core in model.statistics().cores) == 2 * cores
            for call in calls:
                call.cancel()
            await model.abort()

    run(main())


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_disabling_dynamic_batching_keeps_the_number_of_workers(workers):
    # "`disable_dynamic_batching()` reloads and resets `num_workers` to the default, losing the user's value."
    async def main():
        backend = PuppetBackend(cores=4, service_time=0.01)
        model = AsyncDataParallel(torch.neg, backend=backend)
        model.num_workers = workers
        async with model:
            before = dict(backend.loaded)
            model.split_size = 2
            model.disable_dynamic_batching()
            assert model.num_workers == workers
            assert model.split_size == 2
            assert torch.equal(await model(column(8)), -column(8))
            assert dict(backend.loaded) == before  # nothing is loaded again

    run(main())


@pytest.mark.parametrize("workers", [0, -1, -2])
def test_no_workers_are_refused_when_they_are_set(workers):
    # "`num_workers = 0` -> ThreadPoolExecutor's ValueError at call time."
    with pytest.raises(ValueError, match="num_workers"):
        AsyncDataParallel(torch.neg, num_workers=workers)
    model = AsyncDataParallel(torch.neg)
    with pytest.raises(ValueError, match="num_workers"):
        model.num_workers = workers


# 1.5 The switch.


def test_a_bad_device_id_is_refused_before_the_model_has_been_touched():
    # "the module has already been changed when a bad device id is rejected"
    async def main():
        touched = []
        backend = PuppetBackend(cores=2)
        backend.load = lambda *args: touched.append(args)
        model = AsyncDataParallel(touched.append, [5], backend=backend)
        with pytest.raises(DeviceError):
            await model.start()
        assert touched == []

    run(main())


def test_too_many_cores_are_not_taken_for_a_failure_of_dynamic_batching(caplog):
    # "QUIRK: [...] asking for too many cores is reported as a dynamic batching failure. After the advised
    # `disable_dynamic_batching()` the same ValueError is swallowed again and calls go ahead on wherever the module
    # happens to be."
    async def main():
        model = AsyncDataParallel(torch.neg, range(5), backend=PuppetBackend(cores=4, service_time=0.01))
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"device ids \[4\]") as caught:
                await model(column(1))
            assert "batching" not in str(caught.value)
            assert not model.ready
            model.disable_dynamic_batching()

    run(main())
    assert caplog.records == []


def test_dynamic_batching_can_be_disabled_while_calls_are_running():
    # "Not safe while calls are running (no lock)."
    async def main():
        backend = PuppetBackend(cores=2)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2) as model:
            before = [asyncio.ensure_future(model(column(rows))) for rows in (1, 3, 6)]
            await settle()
            model.disable_dynamic_batching()
            after = [asyncio.ensure_future(model(column(4) + index)) for index in range(3)]
            refused = asyncio.ensure_future(model(column(3)))
            await settle()
            while not all(call.done() for call in before + after):
                for core in backend.loaded.values():
                    if core.executing:
                        core.release()
                await settle()
            for rows, call in zip((1, 3, 6), before, strict=True):
                assert torch.equal(call.result(), -column(rows))
            for index, call in enumerate(after):
                assert torch.equal(call.result(), -column(4) - index)
            with pytest.raises(ShapeError):
                await refused

    run(main())


def test_with_batching_off_rows_by_cores_must_be_the_compiled_rows():
    # "With it off, `input.shape[dim] / len(device_ids)` must equal the compile-time size in `dim`."
    example = torch.zeros(2, 1)
    off = {"example_inputs": example, "batch_size": 2, "set_dynamic_batching": False, "cores": 3}
    (result,), batches = serve(torch.neg, (column(6),), **off)
    assert torch.equal(result, -column(6))
    assert sizes(batches[6:]) == [2, 2, 2]  # after two runs of the example on each core
    for rows in (1, 2, 3, 4, 5, 7, 8, 12):
        (error,), batches = serve(torch.neg, (column(rows),), expect=ShapeError, **off)
        assert type(error) is ShapeError
        for number in (f"{rows} rows", "3 cores", "2 compiled rows"):
            assert number in str(error)
        assert len(batches) == 6


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize(
    ("rows", "size", "fits"), [(6, 2, True), (4, 2, True), (4, 1, False), (6, 6, True), (5, 2, False)]
)
def test_with_batching_off_a_split_size_must_give_the_compiled_rows(rows, size, fits):
    # "With it off, `input.shape[dim] / len(device_ids)` must equal the compile-time size": so must pieces asked for.
    off = {"batch_size": 2, "set_dynamic_batching": False, "split_size": size, "cores": 3}
    (result,), batches = serve(torch.neg, (column(rows),), expect=ShapeError, **off)
    assert isinstance(result, torch.Tensor) is fits
    assert sizes(batches) == ([2] * (rows // 2) if fits else [])


# 1.6 Split sizes and scatter.


@pytest.mark.parametrize(
    ("rows", "cores", "pieces"),
    [(8, 3, [3, 3, 2]), (5, 4, [2, 1, 1, 1]), (3, 4, [1, 1, 1]), (1, 4, [1]), (12, 4, [3] * 4)],
)
def test_the_remainder_is_spread_one_row_at_a_time_and_makes_no_extra_piece(rows, cores, pieces):
    # "Docs claim chunks of `max(1, n // cores)`, which would make more chunks than cores on a remainder"
    (result,), batches = serve(torch.neg, (column(rows),), cores=cores)
    assert torch.equal(result, -column(rows))
    assert sizes(ordered(batches)) == pieces
    assert torch.equal(torch.cat(ordered(batches)), column(rows))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 100])
@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_a_split_size_that_does_not_divide_the_rows_makes_a_shorter_last_piece(size, batching):
    # "User value s: chunks = ceil(n/s), last one shorter [...]; `s` larger than n -> one chunk."
    (result,), batches = serve(torch.neg, (column(8),), split_size=size, set_dynamic_batching=batching, cores=8)
    assert torch.equal(result, -column(8))
    assert sizes(ordered(batches)) == [min(size, 8 - start) for start in range(0, 8, size)]


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("rows", [1, 4, 7, 20])
def test_a_split_size_changes_nothing_about_the_compiled_rows(size, rows):
    # "Unit is rows of the input (not compile batches)"
    (result,), batches = serve(torch.neg, (column(rows),), split_size=size, batch_size=4)
    assert torch.equal(result, -column(rows))
    assert set(sizes(batches)) == {4}


@pytest.mark.parametrize("size", [0, -1, -2])
def test_a_split_size_below_one_is_refused_when_it_is_set(size):
    # "`s = 0` -> ZeroDivisionError; s < -1 -> no chunks at all."
    with pytest.raises(ValueError, match="split_size"):
        AsyncDataParallel(torch.neg, split_size=size)
    model = AsyncDataParallel(torch.neg)
    with pytest.raises(ValueError, match="split_size"):
        model.split_size = size
    assert model.split_size is None  # and unset it is not -1


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_containers_are_rebuilt_as_what_they_were(kind):
    # "Dict keys are kept; dict subclasses are rebuilt through `type(obj)(pairs)`."
    (result,), _ = serve(lambda d: kind(y=d["x"], x=d["y"]), (kind(x=column(5), y=-column(5)),))
    assert type(result) is kind
    assert list(result) == ["y", "x"]
    assert torch.equal(result["y"], column(5))


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("cores", [2, 4])
@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_no_row_is_lost_along_other_dimensions(dim, rows, cores):
    # "BUG scatter-1 (silent data loss, dim != 0): [...] 5 rows on 4 cores -> rows 0,2,3,4 (row 1 lost); 7 on 2 -> 2
    # is lost; n < cores -> `steps=0` -> empty chunks."
    x = torch.arange(2 * 3 * rows, dtype=torch.float32).reshape((2, rows, 3) if dim == 1 else (2, 3, rows))
    (result,), batches = serve(torch.neg, (x,), dim=dim, cores=cores)
    assert torch.equal(result, -x)
    batches = ordered(batches, dim)
    assert torch.equal(torch.cat(batches, dim), x)
    assert sizes(batches, dim) == [rows // cores + (core < rows % cores) for core in range(min(rows, cores))]


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 100])
@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_a_split_size_that_does_not_divide_works_along_other_dimensions(dim, size):
    # "BUG scatter-2 (dim != 0 with user split_size not dividing n): last chunk's indices run past the end"
    x = torch.arange(14.0).reshape(2, 7)
    (result,), batches = serve(torch.neg, (x,), dim=dim, split_size=size)
    assert torch.equal(result, -x)
    assert sizes(ordered(batches, dim), dim) == [min(size, 7 - start) for start in range(0, 7, size)]


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 2}, {"set_dynamic_batching": False}, {"split_size": 1}, {"dim": 1}], ids=named
)
def test_inputs_of_unequal_rows_are_refused_instead_of_cut_short(settings):
    # "BUG scatter-3 (silent data loss): `zip` stops at the leaf with the fewest chunks. Inputs of batch 8 and a
    # broadcast tensor of batch 1 on 4 cores -> only ONE chunk of 2 rows runs"
    for other in (1, 7, 9):
        (error,), batches = serve(
            lambda x, y: x * y, (torch.ones(8, 8), torch.ones(other, other)), expect=ShapeError, **settings
        )
        assert type(error) is ShapeError
        assert "8" in str(error)
        assert str(other) in str(error)
        assert batches == []


@pytest.mark.parametrize("leaf", [None, 3, 2.5, "text", True, b"", [], {}, (), object()], ids=named)
def test_leaves_that_are_no_tensors_go_to_every_piece(leaf):
    # "BUG scatter-4 (non-tensor leaves): [...] UnboundLocalError for None, int, float, str, bool, empty
    # list/dict/tuple"
    (result,), batches = serve(lambda x, other: -x, (column(8), leaf))
    assert torch.equal(result, -column(8))
    assert len(batches) == 4
    for (_, seen), _ in batches:
        assert seen is leaf or seen == leaf


@pytest.mark.parametrize("args", [(), (None,), ([],), (3, "text")], ids=named)
def test_a_call_without_a_tensor_is_refused(args):
    # "[...] and for a call with no arguments."
    (error,), batches = serve(lambda *args: torch.zeros(1), args, expect=ShapeError)
    assert type(error) is ShapeError
    assert "no tensor" in str(error)
    assert batches == []


def test_a_tensor_without_dimensions_is_refused():
    # "0-d tensor input -> IndexError (shape[dim] of an empty shape)."
    (error,), batches = serve(torch.neg, (torch.tensor(1.0),), expect=ShapeError)
    assert type(error) is ShapeError
    assert "0-d" in str(error)
    assert batches == []


def test_an_empty_batch_is_refused_and_the_model_not_called():
    # "Batch of 0 rows: [...] the module is called once with no arguments"
    (error,), batches = serve(torch.neg, (torch.zeros(0, 3),), expect=ShapeError)
    assert type(error) is ShapeError
    assert "0 rows" in str(error)
    assert batches == []


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("size", [1, 2, 3])
def test_dict_inputs_with_a_small_split_size_give_all_rows(size):
    # "dict input with small split_size returned only part of the rows (Inf1)."
    (result,), _ = serve(
        lambda d: {"sum": d["a"] + d["b"]}, ({"a": column(11), "b": column(11)},), split_size=size, cores=2
    )
    assert torch.equal(result["sum"], 2 * column(11))


@pytest.mark.parametrize("rows", range(1, 14))
def test_any_batch_works_on_three_cores(rows):
    # "Doc example of batch 5 on 3 cores failed for a user unless batch was a multiple of 3 (Inf1, older version)"
    for settings in ({}, {"batch_size": 1}, {"batch_size": 4}):
        (result,), _ = serve(torch.neg, (column(rows),), cores=3, **settings)
        assert torch.equal(result, -column(rows))


# 1.7 Warnings.


@pytest.mark.parametrize(
    ("rows", "settings", "warns"),
    [
        (3, {}, False),
        (5, {"batch_size": 2}, False),
        (5, {"set_dynamic_batching": False}, False),  # four pieces
        (3, {"set_dynamic_batching": False}, True),
        (8, {"split_size": 2}, False),
        (8, {"split_size": 3}, True),
        (8, {"split_size": 8}, True),
        (6, {"dim": 1}, False),
        (2, {"dim": 1}, True),
    ],
    ids=named,
)
def test_unused_cores_are_warned_of_only_where_the_caller_decides_the_pieces(rows, settings, warns):
    # "It tests CHUNKS, not rows: batch 5 on 4 cores makes 4 chunks -> no warning; batch 3 on 4 -> warning"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        serve(torch.neg, (torch.zeros(rows, rows),), **settings)
    assert [warning.category for warning in caught] == [UserWarning] * warns
    assert all("not fully used" in str(warning.message) for warning in caught)


def test_an_empty_batch_does_not_warn_of_unused_cores():
    # "batch 0 -> one pseudo chunk -> warning (unless 1 core)"
    serve(torch.neg, (torch.zeros(0, 1),), expect=ShapeError, split_size=2)  # a warning would be an error


def test_one_value_for_a_whole_batch_is_refused_instead_of_one_element_a_piece():
    # "Scalar outputs UserWarning [...]; result is a 1-d tensor with one element per CHUNK (not per row)."
    for rows in (1, 4, 8):
        (error,), _ = serve(lambda x: x.mean(), (column(rows),), expect=OutputError)
        assert type(error) is OutputError
        assert "()" in str(error)


# 1.8 Execution.


def test_calls_run_in_the_same_few_threads():
    # "A new `ThreadPoolExecutor(num_workers)` for every call"
    seen = set()

    def net(x):
        seen.add(threading.current_thread())  # kept, so that no two have one identity
        return x

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=2), batch_size=2) as model:
            for _ in range(30):
                await asyncio.gather(*(model(column(9)) for _ in range(5)))

    asyncio.run(main())
    assert 1 <= len(seen) <= 4  # at most two a core
    assert {thread.name.partition("/")[0] for thread in seen} <= {"aneuron-core-0", "aneuron-core-1"}


def test_callers_share_one_bound_on_the_batches_in_flight():
    # "no shared bound across callers (k concurrent calls = k x num_workers threads on the same cores)"
    async def main():
        backend = PuppetBackend(cores=4, concurrent=True)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=1, num_workers=5) as model:
            calls = [asyncio.ensure_future(model(column(10))) for _ in range(30)]
            await settle()
            for _ in range(40):
                assert sum(core.in_flight for core in model.statistics().cores) == 5
                for core in backend.loaded.values():
                    core.release()
                await settle()
            for call in calls:
                call.cancel()
            await model.abort()

    run(main())


def test_a_list_is_not_spread_over_the_model_s_parameters():
    # "A list/tuple chunk is spread as positional arguments, anything else is wrapped in a 1-tuple."
    (result,), _ = serve(lambda pair, scale=1: (pair[0] + pair[1]) * scale, ([column(5), column(5)],))
    assert torch.equal(result, 2 * column(5))


def test_a_piece_that_fails_stops_the_rest_of_its_call():
    # "a failing chunk does not stop the rest"
    async def main():
        backend = PuppetBackend(cores=2)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2, num_workers=2) as model:
            call = asyncio.ensure_future(model(column(100)))
            await settle()
            backend[0].release(ValueError("no"))
            await settle()
            with pytest.raises(ValueError, match="no"):
                await call
            assert model.statistics().waiting_rows == 0
            backend[1].release()
            await settle()
            assert sum(len(core.executed) for core in backend.loaded.values()) == 2
            assert model.ready

    run(main())


def test_an_error_names_the_core_that_it_came_from():
    # "`i` is the CHUNK index, not the core."
    async def main():
        backend = PuppetBackend(cores=8)
        async with AsyncDataParallel(torch.neg, [7, 5], backend=backend, batch_size=2) as model:
            call = asyncio.ensure_future(model(column(4)))
            await settle()
            backend[5].release(ValueError("no"))
            with pytest.raises(ValueError, match="no") as caught:
                await call
            (note,) = caught.value.__notes__
            assert "core 5" in note
            assert "rows 2 to 3" in note
            backend[7].release()
            await settle()

    run(main())


def test_an_error_is_the_model_s_own_object_with_its_attributes_and_cause():
    # "Re-raise keeps the type where `type(msg)` is constructible [...], otherwise RuntimeError; original object,
    # attributes and `__cause__` are lost."
    class Odd(Exception):
        def __init__(self, *, code, detail):
            super().__init__()
            self.code, self.detail = code, detail

    raised = []

    def net(x):
        try:
            {}["missing"]
        except KeyError as cause:
            error = Odd(code=7, detail=["d"])
            raised.append(error)
            raise error from cause

    (error,), _ = serve(net, (column(1),), expect=Odd)
    assert error is raised[0]
    assert (error.code, error.detail) == (7, ["d"])
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_base_exception_in_a_worker_reaches_its_caller(kind):
    # "BaseException (KeyboardInterrupt, SystemExit) inside a worker is not stored: the collector then hits KeyError"
    def net(x):
        if (x < 0).any():
            raise kind("from the model")
        return x

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=2)) as model:
            bad, good = await asyncio.gather(model(-torch.ones(2, 1)), model(column(3)), return_exceptions=True)
            assert type(bad) is RuntimeError
            assert kind.__name__ in str(bad)
            assert type(bad.__cause__) is kind
            assert torch.equal(good, column(3))
            assert torch.equal(await model(column(3)), column(3))

    asyncio.run(main())


def test_one_caller_s_rows_stay_in_order_beside_others():
    # "two threads can call the same DataParallel at once, and nothing orders them"
    async def main():
        async with AsyncDataParallel(torch.neg, backend=CpuBackend(cores=2), batch_size=4) as model:
            calls = [column(1 + index % 13) + 1000 * index for index in range(200)]
            for x, result in zip(calls, await asyncio.gather(*map(model, calls)), strict=True):
                assert torch.equal(result, -x)

    asyncio.run(main())


def test_a_call_can_be_cancelled():
    # "no timeout; no cancellation"
    async def main():
        backend = PuppetBackend(cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=1) as model:
            first = asyncio.ensure_future(model(column(1)))
            await settle()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5.0):
                    await model(column(3))
            backend[0].release()
            await first
            await settle()
            while backend[0].executing:  # a row that was bound to the core before the time was up
                backend[0].release()
            assert len(backend[0].executed) <= 2
            assert model.statistics().calls.cancelled == 1

    run(main())


# 1.9 Gather.


@pytest.mark.parametrize("batching", [True, False])
def test_pieces_of_different_dtype_are_not_cast_silently(batching):
    # "Quirks of the dim-0 copy: other dtype is cast silently"
    def net(x):
        return x if x[0, 0] < 2 else x.double()

    (error,), _ = serve(net, (column(8),), expect=OutputError, set_dynamic_batching=batching)
    assert type(error) is OutputError
    assert "float64" in str(error)


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_pieces_of_different_width_are_not_broadcast_silently(batching, width):
    # "trailing size 1 broadcasts silently"
    def net(x):
        return x.expand(-1, 3) if x[0, 0] < 2 else x.expand(-1, width)

    (error,), _ = serve(net, (column(8),), expect=OutputError, set_dynamic_batching=batching)
    assert type(error) is OutputError


@pytest.mark.parametrize("batching", [True, False])
def test_pieces_with_a_different_number_of_dimensions_are_not_joined(batching):
    # The same copy; torch.cat for its part takes empty one-dimensional tensors for nothing.
    def net(x):
        return x if x[0, 0] < 2 else x[:0, 0] if not batching else x[:, 0]

    (error,), _ = serve(net, (column(8),), expect=OutputError, set_dynamic_batching=batching)
    assert type(error) is OutputError


def test_an_output_without_a_batch_dimension_is_not_repeated_for_each_piece():
    # "an output without a batch dimension (e.g. a class-weights vector) is concatenated chunk times"
    weights = torch.arange(3.0)
    (error,), _ = serve(lambda x: (x, weights), (column(8),), expect=OutputError)
    assert type(error) is OutputError
    assert "(3,)" in str(error)


@pytest.mark.parametrize("batching", [True, False])
def test_dicts_whose_keys_differ_between_pieces_are_an_error(batching):
    # "differing key counts -> ValueError [...]; same count but other keys -> KeyError"
    def other_key(x):
        return {"low" if x[0, 0] < 2 else "high": x}

    def more_keys(x):
        return {"low": x} if x[0, 0] < 2 else {"low": x, "high": x}

    for net in (other_key, more_keys):
        (error,), _ = serve(net, (column(8),), expect=OutputError, set_dynamic_batching=batching)
        assert type(error) is OutputError, error


@pytest.mark.parametrize("batching", [True, False])
def test_none_is_none_only_where_every_piece_says_so(batching):
    # "None -> None (other chunks ignored)"
    (result,), _ = serve(lambda x: (x, None), (column(8),), set_dynamic_batching=batching)
    assert result[1] is None

    def net(x):
        return (x, None) if x[0, 0] < 2 else (x, x)

    (error,), _ = serve(net, (column(8),), expect=OutputError, set_dynamic_batching=batching)
    assert type(error) is OutputError


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("value", ["text", 3, 2.5, True, object()], ids=named)
def test_outputs_that_are_no_tensors_are_an_error(batching, value):
    # "int/float/bool -> TypeError; str -> the text of a map object (silent garbage)."
    for net in (lambda x: value, lambda x: {"y": x, "extra": value}):
        (error,), _ = serve(net, (column(8),), expect=OutputError, set_dynamic_batching=batching)
        assert type(error) is OutputError
        assert type(value).__name__ in str(error)


def test_lists_with_one_tensor_a_row_are_cut_like_tensors():
    # "Outputs whose length depends on data or that are lists of per-sample tensors go wrong (CRF decode case)"
    def decode(x):
        return [torch.arange(1 + int(value)) for value in x[:, 0]]

    async def main(rows):
        async with AsyncDataParallel(decode, backend=CpuBackend(cores=2)) as model:
            return await model(column(rows))

    for rows in (2, 3, 8):
        assert [len(each) for each in asyncio.run(main(rows))] == [1 + int(x) for x in column(rows)[:, 0]]


def test_results_are_put_together_away_from_the_caller_s_thread():
    # "the copy runs on the caller's thread after the last chunk"
    class Sealed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            threads.add(threading.current_thread())
            return super().__torch_function__(func, types, args, kwargs or {})

    threads = set()

    def net(x):
        return torch.neg(x).as_subclass(Sealed)

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=2), batch_size=4) as model:
            await asyncio.gather(model(column(11)), model(column(1)), model(column(2)))
            return set(threads)

    seen = asyncio.run(main())
    assert seen
    assert threading.main_thread() not in seen


# 1.10 The legacy class.


def test_a_single_piece_does_not_run_on_the_caller_s_thread():
    # "A single chunk/module is called directly on the caller's thread."
    threads = []

    def net(x):
        threads.append(threading.current_thread())
        return x

    async def main():
        async with AsyncDataParallel(net, [0], backend=CpuBackend(cores=1)) as model:
            await model(column(1))

    asyncio.run(main())
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()


def test_batching_that_cannot_be_enabled_warns_when_the_object_is_made():
    # "Warns when automatic dynamic batching cannot be enabled; user must then disable it."
    with pytest.warns(UserWarning, match="dynamic batching cannot be enabled for dim=1") as caught:
        AsyncDataParallel(torch.neg, None, 1, True)
    assert caught[0].filename == __file__
    AsyncDataParallel(torch.neg, None, 1)  # not asked for: no warning, which would be an error
    AsyncDataParallel(torch.neg, None, 1, False)
