"""Bad input, bad models and bad moments: each a clear error of the right type, nothing hangs, nobody else is harmed.

On virtual time, where waiting for what never comes is an error, unless threads are the point.
"""

import asyncio
import gc
import math
import pickle
import threading
import traceback
import zipfile
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from puppets import named

from aneuron import (
    AneuronError,
    AsyncDataParallel,
    Closed,
    CpuBackend,
    DeviceError,
    Fault,
    InputModified,
    OutputError,
    ShapeError,
)
from aneuron.testing import PuppetBackend, PuppetCore, run, settle

GOOD = torch.arange(3.0).reshape(3, 1)


def puppets(cores=1):
    return PuppetBackend(cores=cores, service_time=0.01)


def executions(backend):
    return sum(len(core.executed) for core in backend.loaded.values())


def contained(start, main):
    """Run a loop; what would end the process fails the test instead."""
    try:
        start(main)
        return
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        ended = repr(error)
    gc.collect()  # the loop's tasks complain now, not in the middle of the report
    raise AssertionError(f"{ended} ended the caller's loop")


async def finished(*tasks):
    """Their outcomes, errors included."""
    return await asyncio.gather(*tasks, return_exceptions=True)


# Inputs that no model could take.


class Handle:
    """Not a tensor."""


def sparse(layout):
    return torch.eye(4).to_sparse(layout=layout, **({"blocksize": (2, 2)} if layout is torch.sparse_bsr else {}))


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (torch.zeros(0, 3),), ["input 0", "(0, 3)", "0 rows", "at least"]),
        (lambda: ({"x": [torch.zeros(0)]},), ["input 0['x'][0]", "0 rows"]),
        (lambda: (np.zeros((0, 2)),), ["0 rows"]),
        (lambda: (torch.zeros(2, 1), torch.zeros(3, 1)), ["unequal rows", "input 0 has 2", "input 1 has 3", "expand"]),
        (lambda: ((torch.zeros(2), np.zeros(1)),), ["unequal rows", "input 0[0] has 2", "input 0[1] has 1"]),
        (lambda: (torch.zeros(2), torch.zeros(0)), ["input 1", "0 rows"]),
        (lambda: (torch.tensor(1.0),), ["input 0", "0-d", "reshape(1)"]),
        (lambda: (torch.zeros(2), torch.tensor(1.0)), ["input 1", "0-d"]),
        (lambda: (np.array(1.0),), ["0-d"]),
        (lambda: (), ["no tensor"]),
        (lambda: (None, 1, "text", [], {}), ["no tensor"]),
        (lambda: (Handle(),), ["no tensor"]),
        (lambda: (torch.zeros(2, 1, device="meta"),), ["input 0", "meta"]),
        (lambda: (torch.zeros(2), {"m": torch.zeros(2, device="meta")}), ["input 1['m']", "meta"]),
        (lambda: (sparse(torch.sparse_coo),), ["input 0", "sparse_coo", "to_dense"]),
        (lambda: (sparse(torch.sparse_csr),), ["sparse_csr"]),
        (lambda: (sparse(torch.sparse_csc),), ["sparse_csc"]),
        (lambda: (sparse(torch.sparse_bsr),), ["sparse_bsr"]),
        (lambda: (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),), ["input 0", "nested"]),
        (lambda: (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),), ["nested"]),
        (lambda: (np.array([None, 1], dtype=object),), ["object", "astype"]),
    ],
    ids=lambda value: None if callable(value) else value[0] + " " + value[-1],
)
def test_an_input_without_equal_rows_is_refused_and_nobody_else_harmed(make, words):
    async def main():
        backend = puppets()
        args = make()
        idle = AsyncDataParallel(torch.neg, backend=backend)
        with pytest.raises(ShapeError):
            await idle(*args)
        assert not idle.ready  # nothing was even started
        assert not backend.loaded
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            before, bad, after = await finished(model(GOOD), model(*args), model(GOOD))
            assert type(bad) is ShapeError
            assert isinstance(bad, ValueError)
            for word in words:
                assert word in str(bad)
            assert torch.equal(before, -GOOD)
            assert torch.equal(after, -GOOD)
            assert executions(backend) == 1
            calls = model.statistics().calls
            assert (calls.accepted, calls.completed, calls.failed) == (2, 2, 0)

    run(main())


@pytest.mark.parametrize("dim", [2, -3, 7])
def test_an_input_without_the_batch_dimension_is_refused(dim):
    async def main():
        async with AsyncDataParallel(torch.neg, dim=dim, backend=puppets()) as model:
            with pytest.raises(ShapeError, match=rf"shape \(3, 1\) and no dimension {dim}"):
                await model(GOOD)

    run(main())


def test_keyword_inputs_are_named_in_errors():
    async def main():
        async with AsyncDataParallel(torch.neg, backend=puppets()) as model:
            with pytest.raises(ShapeError, match=r"input 0 has 3, input 'mask' has 2"):
                await model(GOOD, mask=torch.zeros(2))

    run(main())


# Lists of what was meant as rows.


@pytest.mark.parametrize(
    "make",
    [
        lambda: ([torch.zeros(3, 32, 48), torch.zeros(3, 32, 48)],),
        lambda: ([torch.zeros(3, 32, 48), torch.zeros(3, 40, 8)],),
        lambda: ([torch.zeros(3, 224, 224)],),
        lambda: ([torch.zeros(3, 8, 8)] * 3,),
        lambda: ({"pixel_values": [np.zeros((3, 32, 32), "f4")] * 4},),
        lambda: ([np.zeros((32, 48, 3), "u1")] * 2,),
        lambda: ("a prompt", [torch.zeros(3, 32, 32)] * 2),
    ],
    ids=named,
)
def test_a_list_of_images_is_refused_with_what_to_pass(make):
    async def main():
        backend = puppets()
        async with AsyncDataParallel(lambda *args: args[0], backend=backend, batch_size=8) as model:
            good, bad = await finished(model(GOOD), model(*make()))
            assert torch.equal(good, GOOD)
            assert type(bad) is ShapeError
            for word in ("torch.stack", "Rows", "tuple", "image"):
                assert word in str(bad)
            assert executions(backend) == 1
        with pytest.raises(ShapeError, match=r"^example_inputs: a list of"):
            AsyncDataParallel(torch.neg, example_inputs=make())

    run(main())


@pytest.mark.parametrize(
    "args",
    [
        ([torch.ones(3, 2), torch.ones(3, 5)],),
        ([torch.ones(3, 2, 32), torch.ones(3, 2, 32)],),  # states of two layers
        ([torch.ones(1, 32, 32), torch.ones(1, 32, 32)],),
        ([torch.ones(4, 32, 32), torch.ones(4, 32, 32)],),
        ((torch.ones(3, 32, 32), torch.ones(3, 32, 32)),),
        ([torch.ones(3, 32, 32), torch.ones(3)],),  # three rows, as the other says
        ([torch.ones(3, 32, 32)], torch.ones(3)),
        ([torch.ones(32, 48, 3)],),  # points
        ([torch.ones(2, 3, 32, 32)],),
    ],
    ids=named,
)
def test_lists_of_inputs_are_inputs(args):
    async def main():
        async with AsyncDataParallel(lambda *args: args[0][0] + 1, backend=puppets(cores=2), batch_size=4) as model:
            assert torch.equal(await model(*args), args[0][0] + 1)

    run(main())


def test_a_list_where_the_example_has_one_is_never_one_of_images():
    example = ([torch.ones(8, 32, 32), torch.ones(8, 32, 32)], 1)

    async def main():
        net = lambda pair, scale: pair[0] + pair[1] * scale  # noqa: E731
        async with AsyncDataParallel(net, backend=puppets(), example_inputs=example) as model:
            for rows in (1, 3, 4):
                pair = [torch.ones(rows, 32, 32), torch.ones(rows, 32, 32)]
                assert torch.equal(await model(pair, 3), pair[0] * 4)

    run(main())


@pytest.mark.parametrize("make", [torch.ones, np.ones])
def test_a_list_of_unequal_tensors_says_how_to_pass_one_a_row(make):
    async def main():
        async with AsyncDataParallel(torch.neg, backend=puppets()) as model:
            for args in (([make((5,)), make((7,))],), ({"ids": [make((5, 2)), make((7, 2))]}, make((5, 2)))):
                with pytest.raises(ShapeError, match=r"unequal rows.*torch\.stack\(list\).*aneuron\.Rows\(list\)"):
                    await model(*args)
            with pytest.raises(ShapeError, match=r"aneuron\.Shared\(x\)\)$"):
                await model(make((5,)), make((7,)))

    run(main())


# Inputs that are not what the model was compiled for.


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"traced": True}], ids=named)
@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((torch.zeros(2, 3, dtype=torch.float64),), {}, ["float64", "float32", "x.to(torch.float32)"]),
        ((torch.zeros(2, 3, dtype=torch.int64),), {}, ["int64", "float32"]),
        ((np.zeros((2, 3)),), {}, ["float64", "float32"]),
        ((torch.zeros(2, 4),), {}, ["(2, 4)", "(4, 3)"]),
        ((torch.zeros(2, 3, 1),), {}, ["(2, 3, 1)", "(4, 3)"]),
        ((torch.zeros(3),), {}, ["(3,)", "x.unsqueeze(0)"]),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {}, ["1 tensor (input 0)", "2 tensors (input 0, input 1)"]),
        (((torch.zeros(2, 3),),), {}, ["input 0[0]"]),
        ((), {"x": torch.zeros(2, 3)}, ["input 'x'"]),
        ((torch.zeros(2, 3),), {"mask": torch.zeros(2)}, ["input 'mask'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_call_that_differs_from_what_was_compiled_never_reaches_a_shared_batch(settings, args, kwargs, words):
    example, settings = torch.ones(4, 3), dict(settings)
    net = torch.jit.trace(torch.nn.ReLU().eval(), example) if settings.pop("traced", False) else torch.neg

    async def main():
        backend = puppets()
        async with AsyncDataParallel(net, backend=backend, example_inputs=example, **settings) as model:
            warm = executions(backend)
            good, bad, also = await finished(model(torch.ones(1, 3)), model(*args, **kwargs), model(torch.ones(2, 3)))
            assert type(bad) is ShapeError
            for word in words:
                assert word in str(bad)
            assert torch.equal(good, net(torch.ones(1, 3)))
            assert torch.equal(also, net(torch.ones(2, 3)))
            assert executions(backend) == warm + 1

    run(main())


def test_an_example_for_an_eager_model_without_a_batch_size_fixes_nothing():
    async def main():
        async with AsyncDataParallel(torch.neg, backend=puppets(), example_inputs=torch.ones(4, 3)) as model:
            assert (await model(torch.ones(2, 7, dtype=torch.float64))).dtype == torch.float64

    run(main())


@pytest.mark.parametrize(
    "example",
    [(), {}, (1, 2), torch.tensor(1.0), torch.zeros(0, 3), (torch.zeros(2), torch.zeros(3)), np.array(["a"])],
    ids=named,
)
def test_a_bad_example_is_refused_when_the_object_is_made(example):
    with pytest.raises(ShapeError, match=r"^example_inputs: "):
        AsyncDataParallel(torch.neg, example_inputs=example)


# Outputs that cannot be handed out.


def forgotten_await(x):
    async def net(x):
        return x

    coroutine = net(x)
    coroutine.close()  # or it would warn
    return coroutine


BAD_OUTPUTS = {
    "too few rows": (lambda x: x[:-1], "rows"),
    "too many rows": (lambda x: torch.cat([x, x]), "rows"),
    "no rows": (lambda x: x[:0], "(0, 1)"),
    "a 0-d tensor": (lambda x: x.sum(), "()"),
    "a 0-d array": (lambda x: np.array(1.0), "()"),
    "a number": (lambda x: 1.5, "float"),
    "a text": (lambda x: "positive", "positive"),
    "one bad tensor among good ones": (lambda x: {"a": x, "b": (x, x[:1].expand(11, 1))}, "(11, 1)"),
    "one value for the whole batch": (lambda x: (x, x.mean()), "()"),
    "nothing": (lambda x: None, "no tensor"),
    "an empty dict": (lambda x: {}, "no tensor"),
    "a sparse tensor": (lambda x: torch.eye(len(x)).to_sparse(), "sparse_coo"),
    "a nested tensor": (lambda x: torch.nested.nested_tensor([torch.zeros(2)] * len(x)), "nested"),
    "a jagged tensor": (lambda x: torch.nested.nested_tensor([torch.zeros(2)] * len(x), layout=torch.jagged), "jagged"),
    "a meta tensor": (lambda x: x.to("meta"), "meta"),
    "an array of objects": (lambda x: np.array([None] * len(x)), "object"),
    "an array of texts": (lambda x: np.array(["a"] * len(x)), "U1"),
    "a generator": (lambda x: (row for row in x), "generator"),
    "a coroutine": (forgotten_await, "coroutine"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors|Sparse")
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
@pytest.mark.parametrize("settings", [{"batch_size": 8}, {}, {"batch_size": 2}], ids=named)
def test_an_output_that_cannot_be_handed_out_is_an_output_error_for_every_caller(kind, settings):
    net, word = BAD_OUTPUTS[kind]
    broken = [True]

    async def main():
        backend = puppets(cores=2)
        async with AsyncDataParallel(lambda x: net(x) if broken[0] else -x, backend=backend, **settings) as model:
            errors = await finished(model(GOOD), model(GOOD + 1), model(GOOD + 2))
            for error in errors:
                assert type(error) is OutputError, error
                assert isinstance(error, RuntimeError)
                assert word in str(error)
            assert len({id(error) for error in errors}) == len(errors)
            broken[0] = False
            assert torch.equal(await model(GOOD), -GOOD)
            calls = model.statistics().calls
            assert (calls.failed, calls.completed, calls.waiting, calls.running) == (3, 1, 0, 0)

    run(main())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors|Sparse")
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_a_warm_up_finds_it_before_the_model_is_ready(kind):
    net, word = BAD_OUTPUTS[kind]

    async def main():
        backend = puppets(cores=2)
        model = AsyncDataParallel(net, backend=backend, batch_size=4, example_inputs=GOOD)
        with pytest.raises(OutputError, match="(?i)" + word.replace("(", r"\(").replace(")", r"\)")) as caught:
            await model.start()
        assert any("core 0" in note for note in caught.value.__notes__)
        assert not model.ready
        assert [core.closed for core in backend.loaded.values()] == [True]

    run(main())


def test_only_the_callers_of_a_bad_batch_get_the_error():
    def net(x):
        return x if x.min() >= 0 else x[:1]

    async def main():
        backend = puppets()
        async with AsyncDataParallel(net, backend=backend, batch_size=8) as model:
            one, bad, two = await finished(model(GOOD), model(-torch.ones(2, 1)), model(GOOD + 1))
            assert torch.equal(one, GOOD)
            assert type(bad) is OutputError
            assert torch.equal(two, GOOD + 1)

    run(main())


async def released(backend, *order):
    """Let the cores end their batches one after the other, in this order, until no core executes any more."""
    while any(backend[core].executing is not None for core in order):
        for core in order:
            if backend[core].executing is not None:
                backend[core].release()
            await settle()


def outcome(call):
    """What a call has ended with, if it has."""
    return (call.exception() or call.result()) if call.done() else "it has not ended"


def torn(x):
    """A model whose output is wider where there is a row from 24 on, so that not all parts of a call fit together."""
    return torch.cat([x, x], 1) if (x >= 24).any() else x


def test_a_call_whose_parts_do_not_fit_together_harms_no_call_that_shared_a_batch_with_it():
    # Both calls end in one batch; its output does not fit the rest of the second, which is known by then. The first
    # call's rows must count once, however often the batch is run.
    async def main():
        backend = PuppetBackend(cores=3)
        async with AsyncDataParallel(torn, backend=backend, batch_size=8) as model:
            first = asyncio.ensure_future(model(torch.arange(12.0).reshape(12, 1)))
            second = asyncio.ensure_future(model(torch.arange(20.0, 32.0).reshape(12, 1)))
            await settle()
            await released(backend, 0, 2, 1)  # the second core has rows of both
            one, two = outcome(first), outcome(second)
            assert isinstance(one, torch.Tensor), one
            assert torch.equal(one, torch.arange(12.0).reshape(12, 1))
            assert type(two) is OutputError
            assert "joined" in str(two)

    run(main())


def test_rows_that_ran_twice_do_not_stand_for_rows_that_have_not_run():
    # As above, but the first half of the first call has not run when its second half runs for the second time.
    async def main():
        backend = PuppetBackend(cores=3)
        async with AsyncDataParallel(torn, backend=backend, batch_size=8) as model:
            inputs = [torch.ones(4, 1), torch.arange(1.0, 9.0).reshape(8, 1), torch.arange(20.0, 32.0).reshape(12, 1)]
            before, first, second = (asyncio.ensure_future(model(x)) for x in inputs)
            await settle()
            await released(backend, 2, 1)  # core 0 takes its time
            too_early = outcome(first)
            await released(backend, 0)
            one, two, three = outcome(before), outcome(first), outcome(second)
            assert isinstance(too_early, str), f"it has ended without its first rows: {too_early}"
            assert torch.equal(one, inputs[0])
            assert torch.equal(two, inputs[1])
            assert type(three) is OutputError
            assert "joined" in str(three)

    run(main())


def test_a_result_that_cannot_be_rebuilt_is_an_error_and_never_none():
    class Stubborn(dict):
        def __copy__(self):
            raise TypeError("one of a kind")

    async def main():
        backend = PuppetBackend(cores=2)
        async with AsyncDataParallel(lambda x: Stubborn(x=x), backend=backend, batch_size=8) as model:
            long = asyncio.ensure_future(model(torch.arange(12.0).reshape(12, 1)))
            short = asyncio.ensure_future(model(GOOD))
            await settle()
            await released(backend, 1, 0)
            for error in (outcome(long), outcome(short)):
                assert isinstance(error, OutputError), error
                assert "one of a kind" in str(error)

    run(main())


# Models that raise.


def picky(x):
    if (x < 0).any():
        raise LookupError("a negative row")
    return x * 2


@pytest.mark.parametrize("callers", range(1, 13))
@pytest.mark.parametrize("rows", [1, 3])
def test_one_bad_call_is_found_in_few_runs_and_its_batch_mates_get_their_results(callers, rows):
    async def main():
        for bad in range(callers):
            backend = puppets(cores=1 + bad % 3)
            async with AsyncDataParallel(picky, backend=backend, batch_size=callers * rows) as model:
                inputs = [torch.full((rows, 1), float(index)) for index in range(callers)]
                inputs[bad][rows // 2] = -1.0
                results = await finished(*map(model, inputs))
                for index, (x, result) in enumerate(zip(inputs, results, strict=True)):
                    if index != bad:
                        assert torch.equal(result, x * 2)
                assert type(results[bad]) is LookupError
                assert len(results[bad].__notes__) == 1
                assert "core " in results[bad].__notes__[0]
                assert f"rows 0 to {rows - 1}" in results[bad].__notes__[0]
                assert executions(backend) - 1 <= 2 * math.ceil(math.log2(callers))
                calls = model.statistics().calls
                assert (calls.completed, calls.failed) == (callers - 1, 1)

    run(main())


def test_every_bad_call_gets_an_error_of_its_own():
    raised = []

    def net(x):
        for value in x.flatten().tolist():
            if value < 0:
                raised.append(LookupError(value))
                raise raised[-1]
        return x

    async def main():
        backend = puppets(cores=2)
        async with AsyncDataParallel(net, backend=backend, batch_size=8) as model:
            values = [0.0, -1.0, 2.0, -3.0, -4.0, 5.0, -6.0, 7.0]
            results = await finished(*(model(torch.full((1, 1), value)) for value in values))
            for value, result in zip(values, results, strict=True):
                if value < 0:
                    assert type(result) is LookupError
                    assert result.args == (value,)
                    assert any(result is error for error in raised)
                else:
                    assert result.item() == value
            assert executions(backend) <= 15

    run(main())


def test_the_note_names_the_rows_of_the_caller_s_own_input():
    async def main():
        backend = puppets(cores=2)
        async with AsyncDataParallel(picky, backend=backend, batch_size=4) as model:
            x = torch.arange(10.0).reshape(10, 1)
            x[5] = -1.0
            with pytest.raises(LookupError, match="a negative row") as caught:
                await model(x)
            assert caught.value.__notes__ in (
                ["aneuron: core 0, rows 4 to 7 of this call"],
                ["aneuron: core 1, rows 4 to 7 of this call"],
            )

    run(main())


def test_the_traceback_leads_into_the_model():
    async def main():
        async with AsyncDataParallel(picky, backend=CpuBackend(cores=1), batch_size=4) as model:
            with pytest.raises(LookupError) as caught:
                await model(torch.full((1, 1), -1.0))
        assert "picky" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    asyncio.run(main())


class Unhelpful(Exception):
    def __init__(self, one, *, two):
        super().__init__(one)
        self.two = two

    def __str__(self):
        raise ValueError("no text")

    def add_note(self, note):
        raise TypeError("no notes")

    def __reduce__(self):
        raise TypeError("no copies")


@pytest.mark.parametrize(
    "error",
    [
        Unhelpful(1, two=2),
        ValueError(),
        TimeoutError("the model's"),
        StopAsyncIteration("x"),
        AneuronError("the model's"),
        Closed("the model's"),
        ExceptionGroup("several", [ValueError(1), KeyError(2)]),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        AssertionError("x"),
        MemoryError(),
        RecursionError("deep"),
        asyncio.InvalidStateError("x"),
        asyncio.QueueFull(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_model_s_own_exception_arrives_as_the_object_that_was_raised(error):
    def net(x):
        if (x < 0).any():
            raise error
        return x

    async def main():
        async with AsyncDataParallel(net, backend=puppets(), batch_size=8) as model:
            good, bad = await finished(model(GOOD), model(-GOOD - 1))
            assert torch.equal(good, GOOD)
            assert bad is error
            assert torch.equal(await model(GOOD), GOOD)

    run(main())


def test_an_error_that_the_model_keeps_and_raises_again_does_not_grow():
    kept = ValueError("always this one")

    def net(x):
        raise kept

    async def main():
        async with AsyncDataParallel(net, backend=puppets(), batch_size=1) as model:
            for _ in range(20):
                with pytest.raises(ValueError, match="always") as caught:
                    await model(GOOD[:1])
                assert caught.value is kept
            assert len(kept.__notes__) == 1

    run(main())


BASE_EXCEPTIONS = [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, StopIteration]


class Custom(BaseException):
    """Of the model's own making."""


@pytest.mark.parametrize("kind", [*BASE_EXCEPTIONS, Custom])
@pytest.mark.parametrize("make", [puppets, CpuBackend], ids=["puppet", "cpu"])
def test_a_base_exception_from_the_model_is_an_error_for_the_caller_and_nobody_else(kind, make):
    def net(x):
        if (x < 0).any():
            raise kind("from the model")
        return x

    async def main():
        async with AsyncDataParallel(net, backend=make(cores=1), batch_size=8) as model:
            before, bad, after = (asyncio.ensure_future(model(x)) for x in (GOOD, -GOOD - 1, GOOD + 1))
            results = await finished(before, bad, after)
            assert not bad.cancelled()
            assert torch.equal(results[0], GOOD)
            assert torch.equal(results[2], GOOD + 1)
            assert type(results[1]) is RuntimeError
            assert kind.__name__ in str(results[1])
            assert type(results[1].__cause__) is kind
            assert any("core 0" in note for note in results[1].__notes__)
            assert torch.equal(await model(GOOD), GOOD)
            assert model.ready
            calls = model.statistics().calls
            assert (calls.completed, calls.failed, calls.cancelled) == (3, 1, 0)

    contained(run if make is puppets else asyncio.run, main())


@pytest.mark.parametrize("kind", [*BASE_EXCEPTIONS, Custom])
@pytest.mark.parametrize("where", ["load", "warm-up"])
def test_a_base_exception_while_the_model_starts_ends_the_start_and_nothing_else(kind, where):
    def net(x):
        if where == "warm-up":
            raise kind("from the model")
        return x

    async def main():
        backend = PuppetBackend(cores=2, load_error=(1, kind("from loading")) if where == "load" else None)
        model = AsyncDataParallel(net, backend=backend, example_inputs=GOOD)
        start = asyncio.ensure_future(model.start())
        call = asyncio.ensure_future(model(GOOD))
        for _ in range(10):
            await settle()
        assert start.done(), "it hangs"
        for outcome in await finished(start, call):
            assert isinstance(outcome, RuntimeError), repr(outcome)
            assert kind.__name__ in str(outcome)
        assert all(core.closed for core in backend.loaded.values())
        assert not model.ready
        await model.aclose()

    contained(run, main())


def test_a_module_without_parameters_that_looks_for_one_says_so_at_the_start():
    # What such a model raises is StopIteration, which no future can carry.
    class Net(torch.nn.Module):
        def forward(self, x):
            return x.to(next(self.parameters()).dtype)

    async def main():
        model = AsyncDataParallel(Net().eval(), backend=CpuBackend(cores=2), example_inputs=GOOD)
        async with asyncio.timeout(60.0):  # not reached, unless it hangs
            with pytest.raises(RuntimeError, match="StopIteration"):
                await model.start()

    asyncio.run(main())


# Arguments.


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "names no core"),
        ([0, 0], "more than once"),
        (["nc:1", 1], "more than once"),
        ([True], "True"),
        ([False, 1], "False"),
        ([np.True_], "True"),
        ([-1], "-1"),
        (["nc:x"], "'nc:x'"),
        (["nc:"], "'nc:'"),
        (["nc:-1"], "'nc:-1'"),
        (["nc:1.0"], "'nc:1.0'"),
        (["nc:+1"], r"'nc:\+1'"),
        (["nc:1_0"], "'nc:1_0'"),
        (["nc:\N{SUPERSCRIPT ONE}"], "nc:"),
        (["nc:\N{ARABIC-INDIC DIGIT ONE}"], "nc:"),
        (["xnc:3foo"], "'xnc:3foo'"),
        (["0"], "'0'"),
        ([b"nc:0"], "b'nc:0'"),
        (["cuda:"], "'cuda:'"),
        (["cuda:0", "cuda:1", "cuda:0"], r"cores_per_device=2"),
        ([1.0], r"1\.0"),
        ([None], "None"),
        ([[0]], r"\[0\]"),
        ("nc:0", "expected a list"),
        (b"nc:0", "expected a list"),
        (0, "expected a list"),
        (1.5, "expected a list"),
        (True, "expected a list"),
    ],
    ids=named,
)
def test_device_ids_that_make_no_sense_are_refused_when_the_object_is_made(ids, words):
    with pytest.raises(DeviceError, match=words) as caught:
        AsyncDataParallel(torch.neg, device_ids=ids)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "ids", [[0, 1], ("nc:0", "nc:1"), range(2), iter([0, "nc:1"]), np.arange(2), ["nc:00", np.int64(1)]], ids=named
)
def test_device_ids_may_be_any_list_of_ints_and_names(ids):
    async def main():
        async with AsyncDataParallel(torch.neg, ids, backend=puppets(cores=3)) as model:
            assert [core.id for core in model.statistics().cores] == [0, 1]

    run(main())


@pytest.mark.parametrize("ids", [[3], [0, 7], ["nc:3"], [2**70]], ids=named)
def test_device_ids_that_the_process_does_not_see_are_refused_at_the_start(ids):
    async def main():
        backend = puppets(cores=3)
        model = AsyncDataParallel(torch.neg, ids, backend=backend)
        for attempt in (model.start, lambda: model(GOOD), model.start):
            with pytest.raises(DeviceError, match="outside the cores that this process sees: 3 of the puppet backend"):
                await attempt()
        assert not backend.loaded

    run(main())


def test_a_backend_without_cores_is_a_device_error():
    async def main():
        with pytest.raises(DeviceError, match="sees no cores"):
            await AsyncDataParallel(torch.neg, backend=puppets(cores=0)).start()

    run(main())


NO_COUNTS = [0, -1, True, False, 1.0, "2", math.inf, [1]]


@pytest.mark.parametrize("name", ["num_workers", "split_size", "max_pending", "batch_size"])
@pytest.mark.parametrize("value", NO_COUNTS, ids=named)
def test_a_number_that_is_no_count_is_refused_when_the_object_is_made(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        AsyncDataParallel(torch.neg, **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["num_workers", "split_size"])
@pytest.mark.parametrize("value", NO_COUNTS, ids=named)
def test_it_is_refused_when_it_is_set_and_the_old_one_stays(name, value):
    async def main():
        model = AsyncDataParallel(torch.neg, backend=puppets(cores=2), **{name: 2})
        for _ in range(2):
            with pytest.raises(ValueError, match=name):
                setattr(model, name, value)
            assert getattr(model, name) == 2
            await model.start()  # and again while it runs
        assert torch.equal(await model(torch.cat([GOOD, GOOD[:1]])), -torch.cat([GOOD, GOOD[:1]]))
        await model.aclose()

    run(main())


@pytest.mark.parametrize("dim", [True, False, 0.0, "0", None, [0]], ids=named)
def test_a_dimension_that_is_no_int_is_refused(dim):
    with pytest.raises(ValueError, match="dim="):
        AsyncDataParallel(torch.neg, dim=dim)


@pytest.mark.parametrize("backend", ["gpu", "", 3, None, object(), CpuBackend, [CpuBackend()]], ids=named)
def test_a_backend_that_is_none_is_refused(backend):
    with pytest.raises(ValueError, match="backend="):
        AsyncDataParallel(torch.neg, backend=backend)


@pytest.mark.parametrize("model", [None, 3, b"model.pt", [torch.neg], torch.zeros(1)], ids=named)
def test_a_model_that_is_none_is_refused(model):
    with pytest.raises(TypeError, match="model="):
        AsyncDataParallel(model)


def test_a_model_in_training_mode_warns():
    with pytest.warns(UserWarning, match=r"training mode.*eval\(\)") as caught:
        AsyncDataParallel(torch.nn.Dropout())
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["workers", "device", "timeout"])
def test_an_unknown_parameter_is_refused(name):
    with pytest.raises(TypeError, match=name):
        AsyncDataParallel(torch.neg, **{name: 1})


def test_a_file_that_does_not_exist_is_an_error_at_the_start(tmp_path):
    async def main():
        model = AsyncDataParallel(tmp_path / "missing.pt", backend=CpuBackend(cores=2))
        with pytest.raises(FileNotFoundError, match="missing"):
            await model.start()
        (tmp_path / "junk.pt").write_text("junk")
        with pytest.raises(RuntimeError):
            await AsyncDataParallel(str(tmp_path / "junk.pt"), backend=CpuBackend(cores=2))(GOOD)

    asyncio.run(main())


# Files that hold something else than a TorchScript model, told by what is in them.


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")


def cut(path, save, size):
    save(path)
    path.write_bytes(path.read_bytes()[:size])


def written(path, save):
    with path.open("wb") as file:  # given a name they would add to it
        save(file, np.ones(2))


def net():
    return torch.nn.Linear(3, 1).eval()


def pickled(value, path, protocol):
    path.write_bytes(pickle.dumps(value, protocol))


OTHER_FILES = {
    "a state_dict": (lambda path: torch.save(net().state_dict(), path), "state_dict.*load_state_dict.*weights_only"),
    "an old state_dict": (
        lambda path: torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False), "load_state_dict"
    ),
    "a checkpoint": (lambda path: torch.save({"model": net().state_dict(), "epoch": 1}, path), "checkpoint"),
    "a pickled state_dict": (lambda path: pickled(net().state_dict(), path, 5), "load_state_dict"),
    "a module": (lambda path: torch.save(net(), path), r"pickled torch\.nn\.modules\.linear\.Linear.*net\.eval"),
    "an old module": (
        lambda path: torch.save(net(), path, _use_new_zipfile_serialization=False), r"pickled torch.*\.Linear"
    ),
    "a pickled module": (lambda path: pickled(net(), path, 2), r"pickled torch.*\.Linear.*only if you trust it"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "pickled tensors"),
    "a list of tensors": (lambda path: torch.save([torch.ones(2)], path), "pickled tensors"),
    "a pickled number": (lambda path: pickled(3, path, 4), "pickled object"),
    "a broken pickle": (lambda path: cut(path, lambda path: pickled(net(), path, 4), 20), "damaged pickle"),
    "half an archive": (lambda path: cut(path, lambda path: torch.save(net(), path), 300), "damaged or incomplete"),
    "an exported program of torch 2.4": (
        lambda path: zipped(path, "serialized_exported_program.json"), "of an old PyTorch.*export it again"
    ),
    "an AOTInductor package": (
        lambda path: zipped(path, "p/archive_format", "p/data/aotinductor/model/x.so"), "holds the interpreter"
    ),
    "an archive of arrays": (lambda path: written(path, np.savez), "NumPy"),
    "any other archive": (lambda path: zipped(path, "readme"), "without TorchScript"),
    "an array": (lambda path: written(path, np.save), "NumPy"),
    "safetensors": (
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b'{"x": {}}'), "safetensors.*load_state_dict"
    ),
    "an ONNX model": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch"), "ONNX.*backend='onnx' or 'openvino'"),
    "a pointer to a file": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "lfs pull"),
    "a shared library": (lambda path: path.write_bytes(b"\x7fELF" + bytes(99)), "shared library"),
    "nothing": (lambda path: path.touch(), "empty"),
    "a directory": (lambda path: path.mkdir(), "directory"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_that_holds_no_script_is_said_what_it_is(kind, tmp_path, monkeypatch):
    write, words = OTHER_FILES[kind]
    path = tmp_path / "model"  # the name says nothing
    write(path)
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, None)

    async def main():
        for given, model in ((path, path), ({1: str(path)}, str(path))):
            with pytest.raises(ValueError, match=rf"(?s)' is .*{words}") as caught:
                await AsyncDataParallel(given, backend=CpuBackend(cores=2)).start()
            assert str(model) in str(caught.value)

    asyncio.run(main())


def test_a_script_is_loaded_whatever_its_name(tmp_path):
    for name in ("model.pt2", "model", "weights.safetensors"):
        torch.jit.save(torch.jit.trace(net(), torch.ones(2, 3)), tmp_path / name)

        async def main(path=tmp_path / name):
            async with AsyncDataParallel(path, backend=CpuBackend(cores=1)) as model:
                return await model(torch.ones(5, 3))

        assert asyncio.run(main()).shape == (5, 1)


def test_a_backend_of_one_s_own_takes_whatever_file_it_likes(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")

    class Runtime(PuppetBackend):
        def load(self, model, core_id, batch_size):
            assert model == tmp_path / "model.onnx"
            return super().load(torch.neg, core_id, batch_size)

    async def main():
        model = AsyncDataParallel(tmp_path / "model.onnx", backend=Runtime(cores=1, service_time=0.01), batch_size=4)
        async with model:
            return await model(GOOD)

    assert torch.equal(run(main()), -GOOD)


# Exported programs, and other things that only look like modules.


def test_the_module_of_an_exported_program_is_served_without_a_warning():
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(net(), (torch.ones(2, 3),), dynamic_shapes=({0: rows},))

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = program.module()

        def forward(self, x):
            return self.inner(x) * 2

    async def main(model, x):
        async with model:
            return await model(x)

    x = torch.arange(12.0).reshape(4, 3)
    for made in (program.module(), Around()):  # neither of which can be told to eval()
        model = AsyncDataParallel(made, backend=CpuBackend(cores=1), batch_size=4)
        torch.testing.assert_close(asyncio.run(main(model, x)), made(x).detach())


def test_a_class_and_weights_are_no_models():
    with pytest.raises(TypeError, match=r"Linear is a class; pass a module, as Linear\(\.\.\.\)"):
        AsyncDataParallel(torch.nn.Linear)
    for weights in (net().state_dict(), dict(net().state_dict())):
        with pytest.raises(ValueError, match=r"state_dict of 2 tensors.*load_state_dict"):
            AsyncDataParallel(weights)


# Inputs that are written to while their calls wait.


def rewritten(x):
    x.fill_(-1.0)


WRITES = {
    "fill_": rewritten,
    "an item": lambda x: x.__setitem__(0, -1.0),
    "out=": lambda x: torch.add(x, 1, out=x),
    "another view": lambda x: x.view(-1).add_(1),
    "a detached twin": lambda x: x.detach().add_(1),
    "in inference mode": torch.inference_mode()(rewritten),
    "another shape": lambda x: x.resize_(5, 1),
    "rows in place of columns": lambda x: x.t_(),
}
PLACES = {
    "alone": lambda x: (x,),
    "in a dict": lambda x: ({"a": [x], "b": x.clone()},),
    "as a subclass": lambda x: (torch.nn.Parameter(x, requires_grad=False),),
    "beside an array": lambda x: (x, x.clone().numpy()),
}


def first_of(value):
    """A model that doubles the first tensor of its input."""
    return (value["a"][0] if isinstance(value, dict) else value) * 2


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lone", [True, False])
def test_an_input_that_is_written_to_while_its_call_waits_fails_that_call_alone(write, place, lone):
    async def main():
        backend = PuppetBackend(cores=1)
        async with AsyncDataParallel(lambda *args: first_of(args[0]), backend=backend, batch_size=8) as model:
            busy = asyncio.ensure_future(model(GOOD))
            await settle()
            x = torch.arange(1.0, 4.0).reshape(3, 1)
            args = PLACES[place](x)
            mates = [] if lone else [PLACES[place](GOOD + 1), PLACES[place](GOOD[:2])]
            bad, *good = (asyncio.ensure_future(model(*each)) for each in (args, *mates))
            await settle()
            WRITES[write](x)
            while not all(call.done() for call in (busy, bad, *good)):
                if backend[0].executing is not None:
                    backend[0].release()
                await settle()
            error = outcome(bad)
            assert type(error) is InputModified
            assert isinstance(error, RuntimeError)
            assert "clone()" in str(error)
            for mate, call in zip(mates, good, strict=True):
                assert torch.equal(outcome(call), first_of(mate[0]))
            calls = model.statistics().calls
            assert (calls.completed, calls.failed) == (1 + len(mates), 1)

    run(main())


def test_a_call_of_which_a_part_was_read_before_the_write_fails_as_a_whole():
    async def main():
        backend = PuppetBackend(cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=2, num_workers=1) as model:
            x = torch.arange(5.0).reshape(5, 1)
            call = asyncio.ensure_future(model(x))
            await settle()
            x[4] = 7.0
            await released(backend, 0)
            assert type(outcome(call)) is InputModified
            assert torch.equal(await finish(backend, model(x)), -x)

    run(main())


async def finish(backend, call):
    call = asyncio.ensure_future(call)
    await settle()
    await released(backend, 0)
    return call.result()


def test_what_has_been_read_may_be_written_to():
    async def main():
        backend = PuppetBackend(cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            x = GOOD.clone()
            call = asyncio.ensure_future(model(x))
            await settle()
            x.zero_()  # its batch is on the core
            await released(backend, 0)
            assert torch.equal(call.result(), -GOOD)

    run(main())


def test_rows_of_one_buffer_count_for_themselves_as_data():
    async def main():
        backend = PuppetBackend(cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            buffer = torch.zeros(4, 1)
            busy = asyncio.ensure_future(model(GOOD))
            await settle()
            calls = []
            for index in range(4):
                buffer[index] = float(index)
                calls.append(asyncio.ensure_future(model(buffer[index : index + 1].data if index else buffer[:1])))
                await settle()
            await released(backend, 0)
            await busy
            assert type(outcome(calls[0])) is InputModified  # a view: it counts with all of the buffer
            assert [call.result().item() for call in calls[1:]] == [-1.0, -2.0, -3.0]

    run(main())


def test_inputs_whose_writes_nobody_counts_are_served():
    with torch.inference_mode():
        uncounted = torch.arange(3.0).reshape(3, 1)

    async def main():
        backend = puppets()
        async with AsyncDataParallel(lambda x: first_of(x), backend=backend, batch_size=8) as model:
            inputs = [uncounted, {"a": [uncounted], "b": GOOD}, uncounted.numpy()]
            for result in await asyncio.gather(*map(model, inputs)):
                assert torch.equal(result, GOOD * 2)

    run(main())


def test_a_source_that_reuses_one_buffer_is_told_so():
    async def rows(kind, pause=0):
        buffer = torch.zeros(1, 1)
        for n in range(20):
            buffer.fill_(n)
            yield {"copy": buffer.clone(), "alone": buffer, "tuple": (buffer,), "dict": {"x": buffer}}[kind]
            await settle(pause)

    async def main():
        async with AsyncDataParallel(lambda x: -x, backend=puppets(), batch_size=4) as model:
            assert [y.item() async for y in model.map(rows("copy"))] == [-n for n in range(20)]
            assert [y.item() async for y in model.map(rows("alone"), limit=1)] == [-n for n in range(20)]
            for kind in ("alone", "tuple", "dict"):
                for pause in range(5):
                    with pytest.raises(InputModified, match="clone"):
                        async for _ in model.map(rows(kind, pause)):
                            pass

    run(main())


def test_so_is_one_that_is_read_in_a_thread():
    def rows():
        buffer = torch.zeros(1, 1)
        for n in range(200):
            yield buffer.fill_(n)

    async def main():
        async with AsyncDataParallel(torch.neg, backend=CpuBackend(cores=2), batch_size=4) as model:
            results = [y async for y in model.map(rows(), return_exceptions=True)]
            assert len(results) == 200
            for n, result in enumerate(results):
                assert isinstance(result, InputModified) or result.item() == -n

    asyncio.run(main())


def test_rows_that_run_once_more_are_read_once_more():
    class Failing(PuppetBackend):
        def classify(self, error):
            return Fault.CORE

    async def main():
        backend = Failing(cores=2)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
            x, y = GOOD.clone(), GOOD.clone()
            calls = [asyncio.ensure_future(model(each)) for each in (x, y)]
            await settle()
            x.fill_(5.0)
            core = next(core for core in backend.loaded.values() if core.executing is not None)
            core.release(OSError("broken"))
            await settle()
            await released(backend, *backend.loaded)
            assert type(outcome(calls[0])) is InputModified
            assert torch.equal(calls[1].result(), -GOOD)

    run(main())


def test_on_real_threads_an_answer_is_that_of_what_was_passed_or_an_error():
    async def main():
        async with AsyncDataParallel(torch.neg, backend=CpuBackend(cores=2), batch_size=8) as model:
            for turn in range(50):
                inputs = [torch.full((3, 1), float(turn)) for _ in range(6)]
                calls = [asyncio.ensure_future(model(x)) for x in inputs]
                await asyncio.sleep(0)
                for x in inputs[::2]:
                    x.fill_(-7.0)
                for index, result in enumerate(await finished(*calls)):
                    if index % 2 or not isinstance(result, InputModified):
                        assert torch.equal(result, torch.full((3, 1), -float(turn)))

    asyncio.run(main())


# Bad moments.


def test_a_closed_model_refuses_calls_until_it_is_started_again():
    async def main():
        for close in ("aclose", "abort"):
            backend = puppets(cores=2)
            model = AsyncDataParallel(torch.neg, backend=backend)
            assert torch.equal(await model(GOOD), -GOOD)
            await getattr(model, close)()
            for _ in range(2):
                with pytest.raises(Closed, match=r"start\(\)") as caught:
                    await model(GOOD)
                assert isinstance(caught.value, RuntimeError)
                await getattr(model, close)()  # closing twice is nothing
            await settle()
            assert all(core.closed for core in backend.loaded.values())
            assert not model.ready
            model.num_workers, model.split_size = 3, 1  # neither hangs nor fails
            model.disable_dynamic_batching()
            model.statistics()
            await model.start()
            assert torch.equal(await model(GOOD[:2]), -GOOD[:2])
            await model.aclose()

    run(main())


def test_a_model_that_was_never_started_can_be_closed():
    async def main():
        model = AsyncDataParallel(torch.neg, backend=puppets())
        await model.aclose()
        await model.abort()
        with pytest.raises(Closed):
            await model(GOOD)

    run(main())


def test_closing_during_calls_finishes_them_and_refuses_new_ones():
    async def main():
        backend = PuppetBackend(cores=2)
        model = AsyncDataParallel(torch.neg, backend=backend, batch_size=2)
        calls = [asyncio.ensure_future(model(GOOD + index)) for index in range(10)]
        await settle()
        closes = [asyncio.ensure_future(model.aclose()) for _ in range(3)]
        await settle()
        with pytest.raises(Closed):
            await model(GOOD)
        with pytest.raises(Closed, match="closing"):
            await model.start()
        assert not any(close.done() for close in closes)
        while not all(call.done() for call in calls):
            for core in backend.loaded.values():
                if core.executing is not None:
                    core.release()
            await settle()
        for index, call in enumerate(calls):
            assert torch.equal(call.result(), -GOOD - index)
        await asyncio.gather(*closes)
        assert all(core.closed for core in backend.loaded.values())
        assert not model.ready

    run(main())


def test_aborting_during_calls_ends_every_one_of_them():
    async def main():
        backend = PuppetBackend(cores=2)
        model = AsyncDataParallel(torch.neg, backend=backend, batch_size=2, num_workers=2)
        running = [asyncio.ensure_future(model(GOOD[:2] + index)) for index in range(2)]
        await settle()
        waiting = [asyncio.ensure_future(model(GOOD)) for _ in range(5)]
        await settle()
        drain = asyncio.ensure_future(model.aclose())
        await settle()
        await asyncio.gather(model.abort(), model.abort())
        for call in waiting:
            with pytest.raises(Closed):
                await call
        assert not any(call.done() for call in running)
        for core in backend.loaded.values():
            core.release()
        for index, call in enumerate(running):
            assert torch.equal(await call, -GOOD[:2] - index)
        await drain
        assert all(core.closed for core in backend.loaded.values())

    run(main())


def test_a_second_loop_is_refused_while_the_first_one_lives():
    model = AsyncDataParallel(torch.neg, backend=PuppetBackend(cores=1))
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(model.start())

        async def use():
            for attempt in (lambda: model(GOOD), model.start, model.aclose, model.abort):
                with pytest.raises(RuntimeError, match="another event loop") as caught:
                    await attempt()
                assert not isinstance(caught.value, AneuronError)

        second.run(use())
        assert model.ready
        first.run(model.aclose())
        second.run(model.start())  # closed, it may go to another loop
        second.run(model.aclose())


def test_a_second_loop_is_refused_while_the_model_starts_on_the_first():
    class Intruded(PuppetBackend):
        def load(self, model, core_id, batch_size):
            thread = threading.Thread(target=asyncio.run, args=(second(),))
            thread.start()
            thread.join()
            return super().load(model, core_id, batch_size)

    async def second():
        with pytest.raises(RuntimeError, match="another event loop"):
            await model(GOOD)
        refused.append(True)

    async def first():
        async with model:
            assert torch.equal(await model(GOOD), -GOOD)

    refused = []
    model = AsyncDataParallel(torch.neg, backend=Intruded(cores=1, service_time=0.01))
    run(first())
    assert refused == [True]


class Stepwise(PuppetBackend):
    """Takes a second of virtual time to load a core, so that a start can be interrupted."""

    def workers(self, name):
        made = super().workers(name)

        def later(fn, *args):
            future = Future()

            def go():
                if future.set_running_or_notify_cancel():
                    future.set_result(submit(fn, *args).result())

            asyncio.get_running_loop().call_later(1.0, go)
            return future

        submit, made.submit = made.submit, later
        return made


def test_a_cancelled_start_frees_what_it_has_loaded():
    async def main():
        for seconds in (0.0, 0.5, 1.5, 2.5, 3.5):
            backend = Stepwise(cores=4)
            model = AsyncDataParallel(torch.neg, backend=backend)
            start = asyncio.ensure_future(model.start())
            await asyncio.sleep(seconds)
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
            await asyncio.sleep(10.0)
            assert len(backend.loaded) <= math.ceil(seconds)
            assert all(core.closed for core in backend.loaded.values())
            assert not model.ready
            await model.start()
            assert model.ready
            await model.aclose()

    run(main())


def test_a_call_that_comes_as_a_start_is_cancelled_is_served():
    async def main():
        for iterations in range(8):
            model = AsyncDataParallel(torch.neg, backend=Stepwise(cores=2, service_time=0.01))
            first = asyncio.ensure_future(model(GOOD))
            await asyncio.sleep(1.5)
            first.cancel()
            await settle(iterations)
            assert torch.equal(await model(GOOD), -GOOD)  # nobody has closed the model
            assert first.cancelled()
            await model.aclose()

    run(main())


def test_a_start_can_follow_a_close_that_interrupted_one():
    async def main():
        backend = Stepwise(cores=2, service_time=0.01)
        model = AsyncDataParallel(torch.neg, backend=backend)
        waiting = asyncio.ensure_future(model(GOOD))
        await asyncio.sleep(1.5)
        await model.aclose()
        await model.start()
        assert torch.equal(await model(GOOD), -GOOD)
        with pytest.raises(Closed):
            await waiting
        await model.aclose()

    run(main())


@pytest.mark.parametrize("failing", range(4))
def test_a_start_that_fails_half_way_frees_what_it_has_loaded(failing):
    async def main():
        error = OSError("no such core")
        backend = PuppetBackend(cores=4, service_time=0.01, load_error=(failing, error))
        model = AsyncDataParallel(torch.neg, backend=backend)
        outcomes = await finished(model.start(), model(GOOD), model(GOOD))
        assert outcomes == [error] * 3
        assert any(f"core {failing} of the puppet backend" in note for note in error.__notes__)
        assert sorted(backend.loaded) == list(range(failing))
        assert all(core.closed for core in backend.loaded.values())
        assert not model.ready
        backend._load_error = None  # mended
        async with model:
            assert torch.equal(await model(GOOD), -GOOD)

    run(main())


def test_an_error_that_takes_no_notes_ends_a_start_as_itself():
    async def main():
        error = Unhelpful(1, two=2)
        backend = PuppetBackend(cores=2, load_error=(1, error))
        model = AsyncDataParallel(torch.neg, backend=backend)
        (outcome,) = await finished(model.start())
        assert outcome is error
        assert backend[0].closed

    run(main())


def test_a_warm_up_that_fails_frees_what_it_has_loaded():
    runs = []

    def net(x):
        runs.append(len(x))
        if len(runs) == 4:  # the second run on the second core
            raise ArithmeticError("a bad program")
        return x

    async def main():
        backend = puppets(cores=3)
        model = AsyncDataParallel(net, backend=backend, batch_size=8, example_inputs=GOOD)
        with pytest.raises(ArithmeticError, match="a bad program") as caught:
            await model.start()
        assert any("core 1" in note for note in caught.value.__notes__)
        assert runs == [8] * 4
        assert [core.closed for core in backend.loaded.values()] == [True, True]

    run(main())


def test_a_core_that_does_not_close_keeps_nobody_from_closing(caplog):
    class Stuck(PuppetCore):
        def close(self):
            raise OSError("stuck")

    async def main():
        backend = puppets(cores=2)
        backend.load = lambda model, core_id, batch_size: backend.loaded.setdefault(core_id, Stuck(model, core_id))
        async with AsyncDataParallel(torch.neg, backend=backend) as model:
            assert torch.equal(await model(GOOD), -GOOD)
        assert not model.ready

    run(main())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "core 0" in caplog.text
    assert "stuck" in caplog.text


def test_a_model_is_not_to_be_pickled_into_another_process():
    # Whatever pickle says of it: no half-working copy.
    model = AsyncDataParallel(torch.nn.ReLU().eval(), backend=puppets())
    try:
        twin = pickle.loads(pickle.dumps(model))
    except (TypeError, AttributeError, pickle.PicklingError):
        return
    assert not twin.ready


def test_inputs_that_contain_themselves_are_refused():
    endless = [GOOD]
    endless.append(endless)

    async def main():
        async with AsyncDataParallel(torch.neg, backend=PuppetBackend(cores=1, service_time=0.01)) as model:
            with pytest.raises(ShapeError, match="nested too deeply"):
                await model(endless)
            assert torch.equal(await model(GOOD), -GOOD)

    run(main())
