"""Nobody reaches another's data, and nobody's answer depends on who sat beside him."""

import asyncio
import io
import weakref
from dataclasses import dataclass

import pytest
import torch
from puppets import named

from aneuron import AsyncDataParallel, CpuBackend, SimulatedBackend
from aneuron.testing import PuppetBackend, run, settle

WIDTH = 64  # a multiple of 16: BLAS kernels then treat every row alike, wherever it stands in the batch


def gather(net, *inputs, backend=None, **settings):
    """The results of calls made at once, on real threads."""

    async def main():
        async with AsyncDataParallel(net, backend=backend or CpuBackend(cores=2), **settings) as model:
            return await asyncio.gather(*(model(x) for x in inputs))

    return asyncio.run(main())


def row(value=0.0, rows=1):
    return torch.arange(rows * WIDTH, dtype=torch.float32).reshape(rows, WIDTH) + value


def tensors(value):
    """All tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for child in children for tensor in tensors(child)]


def extent(tensor):
    """Where a tensor's whole storage lies in memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def overlap(one, other):
    (a, b), (c, d) = extent(one), extent(other)
    return a < d and c < b


def mlp(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 128),
        torch.nn.GELU(),
        torch.nn.LayerNorm(128),
        torch.nn.Linear(128, 16),
        torch.nn.Softmax(1),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return net.eval()


def samples(rows, seed=0, *shape):
    return torch.randn(rows, *(shape or (WIDTH,)), generator=torch.Generator().manual_seed(seed))


# Memory.

OUTPUTS = {
    "the input itself": lambda x: x,
    "a view of the input": lambda x: x[:, ::2],
    "something new": lambda x: x * 2,
    "one number a row": lambda x: x.sum(1),
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:, :1].expand(-1, 1000),
    "the head of something larger": lambda x: torch.cat([x, x, x])[: len(x)],
    "nested": lambda x: {"a": (x, [x + 1]), "b": x},
    "channels last": lambda x: x.reshape(-1, 4, 4, 4).contiguous(memory_format=torch.channels_last),
    "split": lambda x: x.split(16, dim=1),
    "nothing in a row": lambda x: x[:, :0],
}
WAYS = {  # rows of the calls, settings
    "packed and padded": ([1, 1, 2], {"batch_size": 8}),
    "packed and full": ([1, 2, 5], {"batch_size": 8}),
    "alone and padded": ([3], {"batch_size": 8}),
    "alone and full": ([8], {"batch_size": 8}),
    "spread over batches": ([20, 3, 9, 1], {"batch_size": 8}),
    "any size": ([1, 1, 6], {}),
    "in pieces": ([5, 7, 1, 2], {"batch_size": 8, "split_size": 2}),
    "not packed": ([6, 4], {"set_dynamic_batching": False}),
    "one piece, not packed": ([2], {"set_dynamic_batching": False, "split_size": 2}),
}


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_result_has_storage_of_its_own_and_no_more_than_it_needs(kind, way):
    net, (sizes, settings) = OUTPUTS[kind], WAYS[way]
    inputs = [row(100.0 * index, rows) for index, rows in enumerate(sizes)]
    seen = []  # kept alive, so that no memory is used twice

    def kept(x):
        seen.append(x)
        seen.extend(tensors(output := net(x)))
        return output

    results = gather(kept, *inputs, **settings)
    for x, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, net(x), rtol=0, atol=0)
    ours = [tensor for result in results for tensor in tensors(result)]
    for index, tensor in enumerate(ours):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        for other in ours[:index] + inputs + seen:
            assert not overlap(tensor, other)


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize(("dim", "shape"), [(1, (4, 1, 8)), (-1, (2, 3, 1)), (1, (4, 6, 8))])
def test_it_has_along_other_dimensions_too(dim, shape):
    inputs = [torch.full(shape, float(index)) for index in range(3)]
    seen = []

    def net(x):
        seen.append(x)
        return x

    results = gather(net, *inputs, dim=dim)
    for index, (x, result) in enumerate(zip(inputs, results, strict=True)):
        assert torch.equal(result, x)
        assert result.untyped_storage().nbytes() == result.numel() * 4
        assert not any(overlap(result, other) for other in results[:index] + inputs + seen)


def test_saving_one_row_does_not_write_the_whole_batch():
    results = gather(lambda x: {"wide": x.repeat(1, 64)}, *[row(index) for index in range(64)], batch_size=64)
    file = io.BytesIO()
    torch.save(results[5], file)
    assert WIDTH * 64 * 4 <= len(file.getvalue()) < 2 * WIDTH * 64 * 4
    loaded = torch.load(io.BytesIO(file.getvalue()))
    assert torch.equal(loaded["wide"], row(5).repeat(1, 64))


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_size": 8}, {"split_size": 1}, {}], ids=named)
def test_changing_one_s_result_changes_nobody_else_s_and_no_input(settings):
    inputs = [row(index, 4) for index in range(4)]
    results = gather(lambda x: x, *inputs, **settings)
    for index in range(4):
        results[index].fill_(-1.0)
        for other in range(index + 1, 4):
            assert torch.equal(results[other], row(other, 4))
    for index, x in enumerate(inputs):
        assert torch.equal(x, row(index, 4))


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"set_dynamic_batching": False}], ids=named)
def test_a_model_that_answers_from_one_buffer_does_not_overwrite_results(settings):
    buffer = torch.zeros(4, WIDTH)

    def net(x):  # as a device does that keeps its output tensors
        buffer[: len(x)] = x * 2
        return buffer[: len(x)]

    backend = CpuBackend(cores=1)
    calls = [row(index, rows) for index, rows in enumerate((4, 1, 10, 2))]

    async def main():
        async with AsyncDataParallel(net, backend=backend, **settings) as model:
            return [await model(x) for x in calls]

    if "batch_size" not in settings:
        calls = [x[:4] for x in calls]
    results = asyncio.run(main())
    for x, result in zip(calls, results, strict=True):
        assert torch.equal(result, x * 2)


def test_what_a_model_keeps_of_an_output_is_not_the_caller_s():
    kept = []

    def net(x):
        kept.append(x + 1)
        return kept[-1]

    (result,) = gather(net, row(0.0, 8), batch_size=8)
    result.fill_(-1.0)
    assert torch.equal(kept[0], row(1.0, 8))


def test_attributes_beside_the_fields_carry_nobody_else_s_rows():
    @dataclass
    class Output:
        logits: torch.Tensor

        def __post_init__(self):
            self.probabilities = self.logits.softmax(1)  # no field

    class Labelled(dict):
        pass

    def labelled(x):
        made = Labelled(x=x)
        made.extra = x
        return made

    for net in (Output, labelled):
        for result in gather(net, row(0.0), row(5.0, 2), batch_size=8):
            rows = len(result.logits if net is Output else result["x"])
            for name, value in vars(result).items():
                assert len(value) == rows, f"{name} holds {len(value)} rows of the batch, the caller sent {rows}"


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outcome", ["result", "error"])
def test_nothing_holds_a_call_s_tensors_once_it_has_ended(way, outcome):
    sizes, settings = WAYS[way]
    seen = []

    def net(x):
        seen.append(weakref.ref(x))
        if outcome == "error":
            raise ValueError("no")
        seen.append(weakref.ref(y := x + 1))
        return y

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=2), **settings) as model:
            inputs = [row(index, rows) for index, rows in enumerate(sizes)]
            seen.extend(map(weakref.ref, inputs))
            results = await asyncio.gather(*map(model, inputs), return_exceptions=True)
            assert all(isinstance(each, torch.Tensor if outcome == "result" else ValueError) for each in results)
            seen.extend(map(weakref.ref, results if outcome == "result" else ()))
            del inputs, results
            for _ in range(1000):  # a worker that has posted its batch may be slow to let go of it
                if not any(ref() is not None for ref in seen):
                    break
                await asyncio.sleep(0.002)
            return [tensor for ref in seen if (tensor := ref()) is not None]

    assert asyncio.run(main()) == []


def test_a_call_that_leaves_the_queue_lets_go_of_its_tensors_at_once():
    async def main():
        backend = PuppetBackend(cores=1)
        async with AsyncDataParallel(torch.neg, backend=backend, batch_size=1, num_workers=1) as model:
            running = asyncio.ensure_future(model(row()))
            x = row(1.0, 3)
            seen = weakref.ref(x)
            queued = asyncio.ensure_future(model(x))
            del x
            await settle()
            assert seen() is not None
            queued.cancel()
            await settle()
            assert queued.cancelled()
            del queued  # with the traceback of its cancellation
            assert seen() is None  # although the core is still busy with the other
            backend[0].release()
            assert torch.equal(await running, -row())

    run(main())


# Ordinary tensors.


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make", [CpuBackend, lambda cores: SimulatedBackend(cores, service_time=0.0)], ids=["cpu", "simulated"]
)
def test_results_are_ordinary_tensors(make, way):
    sizes, settings = WAYS[way]
    net = torch.nn.Linear(WIDTH, 3).eval()
    for model in (net, lambda x: x):
        for result in gather(model, *[row(0.0, rows) for rows in sizes], backend=make(cores=2), **settings):
            assert type(result) is torch.Tensor
            assert not result.is_inference()
            assert not result.requires_grad
            assert result.grad_fn is None
            assert result.is_leaf
            assert result.device.type == "cpu"
            assert result.is_contiguous()
            result.add_(1)  # inference tensors refuse this outside inference mode
            weight = torch.ones(result.shape[1], requires_grad=True)
            (result * weight).sum().backward()  # and this
            assert torch.equal(weight.grad, result.sum(0))
            result.requires_grad_()
            (result * 2).sum().backward()
            assert torch.equal(result.grad, torch.full_like(result, 2.0))


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["leaf", "with a history", "parameter", "made in inference mode"])
def test_inputs_of_any_kind_give_detached_results(kind, way):
    sizes, settings = WAYS[way]

    def make(rows):
        x = row(0.0, rows)
        if kind == "leaf":
            return x.requires_grad_()
        if kind == "with a history":
            return x.requires_grad_() * 1.0
        if kind == "parameter":
            return torch.nn.Parameter(x)
        with torch.inference_mode():
            return x.clone()

    net = torch.nn.Linear(WIDTH, 3).eval()
    with torch.no_grad():  # whole numbers: their sums are exact, in whatever order a kernel takes them
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape))
    for model in (net, lambda x: x, lambda x: x.view(-1, WIDTH)):
        inputs = [make(rows) for rows in sizes]
        for x, result in zip(inputs, gather(model, *inputs, **settings), strict=True):
            assert type(result) is torch.Tensor
            assert not result.requires_grad
            assert result.grad_fn is None
            assert not result.is_inference()
            with torch.no_grad():
                assert torch.equal(result, model(x))
            assert not x.is_leaf or x.grad is None


def test_a_model_that_turns_gradients_on_still_gives_detached_results():
    net = torch.nn.Linear(WIDTH, 3).eval()

    def sloppy(x):
        with torch.inference_mode(False):
            return net(x.clone())

    for result in gather(sloppy, row(), row(0.0, 9), row(0.0, 8), batch_size=8):
        assert not result.requires_grad
        assert not result.is_inference()


def test_a_caller_with_a_plain_tensor_gets_one_whoever_sits_beside_him():
    class Special(torch.Tensor):
        pass

    _, plain, _ = gather(lambda x: x * 2, row().as_subclass(Special), row(), row().as_subclass(Special), batch_size=8)
    assert type(plain) is torch.Tensor


def test_the_caller_s_modes_are_left_alone_and_do_not_reach_the_model():
    seen = []

    def net(x):
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x @ torch.ones(WIDTH, 16)

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=1), batch_size=8) as model:
            with torch.inference_mode():
                first = await model(row())
                assert torch.is_inference_mode_enabled()
            with torch.autocast("cpu", torch.bfloat16):
                second = await model(row())
            assert torch.is_grad_enabled()
            return first, second

    first, second = asyncio.run(main())
    assert set(seen) == {(True, False, False)}
    assert not first.is_inference()
    assert second.dtype == torch.float32


# Answers.


def test_nan_stays_in_its_row():
    bad = row()
    bad[0, 3] = torch.nan
    net = mlp()
    before, hurt, after, mixed = gather(
        net, samples(2), bad, samples(2, 1), torch.cat([samples(1, 2), bad]), batch_size=8
    )
    assert hurt.isnan().all()
    assert mixed[1].isnan().all()
    alone, alone_after, alone_mixed = gather(net, samples(2), samples(2, 1), samples(1, 2), batch_size=8)
    assert torch.equal(before, gather(net, samples(2), batch_size=8)[0])
    assert not before.isnan().any()
    torch.testing.assert_close(before, alone, rtol=0, atol=0)
    torch.testing.assert_close(after, alone_after, rtol=0, atol=0)
    torch.testing.assert_close(mixed[:1], alone_mixed, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 4, 8, 32])
def test_a_call_s_result_does_not_depend_to_the_bit_on_who_shared_its_batch(batch_size):
    net = mlp()

    async def main():
        # The puppets' order is fixed: each round packs the call with other neighbours, at another place in the batch.
        async with AsyncDataParallel(
            net, backend=PuppetBackend(cores=2, service_time=0.01), batch_size=batch_size, example_inputs=samples(1)
        ) as model:
            alone = [await model(samples(rows, rows)) for rows in (1, 3, 11)]
            for before in range(12):
                neighbours = [model(samples(1 + before % 3, 50 + before + index)) for index in range(before)]
                mine = [model(samples(rows, rows)) for rows in (1, 3, 11)]
                rest = [model(samples(2, 99, WIDTH) * 1e6), model(samples(1, 98) * torch.inf)]
                results = await asyncio.gather(*neighbours, *mine, *rest)
                for lone, result in zip(alone, results[before : before + 3], strict=True):
                    assert torch.equal(lone, result)

    run(main())


def test_so_it_is_on_real_threads():
    net = mlp()
    calls = [samples(1 + index % 11, index) for index in range(60)]

    async def main():
        backend = CpuBackend(cores=2, threads_per_core=1)
        async with AsyncDataParallel(net, backend=backend, batch_size=8, example_inputs=samples(1)) as model:
            alone = [await model(x) for x in calls]
            for _ in range(3):
                for one, other in zip(alone, await asyncio.gather(*map(model, calls)), strict=True):
                    assert torch.equal(one, other)

    asyncio.run(main())


MEMORY = {
    "contiguous": lambda x: x.clone(),
    "not aligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].reshape(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "flipped in NumPy": lambda x: x.flip(0).numpy()[::-1],
    "with room behind": lambda x: torch.cat([x, x])[: len(x)],
    "the tail of something larger": lambda x: torch.cat([x, x])[len(x) :],
}


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("rows", [1, 3, 8, 19])
def test_a_result_does_not_depend_on_how_the_input_lies_in_memory(kind, rows):
    net, x = mlp(), samples(rows)
    other = MEMORY[kind](x)
    seen = []

    def spied(batch):
        seen.append((batch.is_contiguous(), batch.data_ptr() % 64, len(batch)))
        return net(batch)

    one, two = (gather(spied, value, batch_size=8, backend=CpuBackend(cores=1))[0] for value in (x.clone(), other))
    assert torch.equal(one, two)
    assert set(seen) == {(True, 0, 8)}


@pytest.mark.parametrize("rows", [1, 8])
def test_an_expanded_input_is_served(rows):
    assert torch.equal(
        gather(torch.neg, torch.ones(1, 1).expand(rows, WIDTH), batch_size=8)[0], -torch.ones(rows, WIDTH)
    )


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_images_in_channels_last_order_are_served(rows):
    net = torch.nn.Conv2d(16, 16, 3).eval()
    images = samples(rows, 0, 16, 8, 8)
    plain = gather(net, images, batch_size=4)[0]
    ours = gather(net, images.contiguous(memory_format=torch.channels_last), batch_size=4)[0]
    assert torch.equal(ours, plain)
    with torch.inference_mode():
        torch.testing.assert_close(ours, net(images))


def test_the_same_rows_in_the_same_compiled_shape_are_the_plain_model_s_to_the_bit():
    net, threads = mlp(), torch.get_num_threads()
    calls = [samples(8, seed) for seed in range(5)]
    ours = gather(net, *calls, batch_size=8, backend=CpuBackend(cores=2, threads_per_core=threads))
    with torch.inference_mode():
        for x, result in zip(calls, ours, strict=True):
            assert torch.equal(result, net(x))
        (padded,) = gather(net, calls[0][:5], batch_size=8, backend=CpuBackend(cores=1, threads_per_core=threads))
        assert torch.equal(padded, net(torch.cat([calls[0][:5], calls[0][4:5].expand(3, WIDTH)]))[:5])


@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"batch_size": 7}, {"split_size": 3}], ids=named)
@pytest.mark.filterwarnings("ignore:the cores are not fully used")
def test_in_any_other_shape_they_are_close(settings):
    net = mlp()
    calls = [samples(rows, rows) for rows in (1, 2, 3, 5, 8, 13, 100)]
    for x, result in zip(calls, gather(net, *calls, **settings), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(result, net(x))


def test_padding_repeats_a_real_row_and_reaches_nobody():
    seen = []

    def net(x):
        seen.append(x.clone())
        return x.log()  # zeros would be outside its domain

    one, two = gather(net, row(1.0), row(2.0, 2), batch_size=8, backend=CpuBackend(cores=1))
    assert torch.equal(one, row(1.0).log())
    assert torch.equal(two, row(2.0, 2).log())
    batch = seen[0]
    assert torch.equal(batch, torch.cat([row(1.0), row(2.0, 2), row(2.0, 2)[1:].expand(5, WIDTH)]))


def test_a_model_that_writes_to_its_input_writes_to_nobody_s():
    def net(x):
        x -= 1
        return x * 1

    example = torch.zeros(8, WIDTH)

    async def main():
        async with AsyncDataParallel(net, backend=CpuBackend(cores=2), batch_size=8, example_inputs=example) as model:
            x = torch.ones(16, WIDTH)
            assert torch.equal(await model(x), torch.zeros(16, WIDTH))
            assert torch.equal(x, torch.ones(16, WIDTH))
            results = await asyncio.gather(*(model(x[:8]) for _ in range(4)))
            assert all(torch.equal(result, torch.zeros(8, WIDTH)) for result in results)

    asyncio.run(main())
    assert torch.equal(example, torch.zeros(8, WIDTH))


def test_cancelled_calls_leave_no_inputs_behind_on_an_idle_model():
    async def main():
        backend = PuppetBackend(cores=1)
        seen = []
        async with AsyncDataParallel(lambda x, y: x, backend=backend, batch_size=8) as model:
            first = asyncio.ensure_future(model(row(), row()))
            await settle()
            for width in range(1, 100):
                x = torch.zeros(1, width)
                seen.append(weakref.ref(x))
                call = asyncio.ensure_future(model(x, x))
                del x
                await settle()
                call.cancel()
                await settle()
                del call
            assert [ref for ref in seen if ref() is not None] == []
            backend[0].release()
            await first
            await settle()
            assert len(model._life.run.scheduler._queue.kinds) <= 40

    run(main())


def test_gradients_that_a_model_leaves_on_do_not_reach_the_results():
    weight = torch.ones(WIDTH, requires_grad=True)

    def net(x):
        torch.set_grad_enabled(True)
        return x * weight

    for rows in (1, 8, 20):
        for result in gather(net, row(0.0, rows), backend=SimulatedBackend(cores=1, service_time=0.0), batch_size=8):
            assert not result.requires_grad
