"""Which outputs are per row is found out by executing, at warm-up or at first use; it costs little, and only once."""

import asyncio
import logging
import re
import threading

import pytest
import torch

from aneuron import AsyncDataParallel, CpuBackend, OutputError, ShapeError
from aneuron.engine.evidence import check_declared


class Counting:
    """A model that counts what it is given."""

    def __init__(self, model):
        self.model = model
        self.batches = []

    def __call__(self, *args, **kwargs):
        self.batches.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).clone())
        return self.model(*args, **kwargs)


def one_core(model, **settings):
    return AsyncDataParallel(model, backend=CpuBackend(cores=1), **settings)


def lstm(layers=2):
    torch.manual_seed(0)
    net = torch.nn.LSTM(3, 3, layers, batch_first=True).eval()

    def states(x):
        y, (hidden, _) = net(x)
        return y, hidden

    return states


TEXT = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0))
KINDS = {
    "compiled": {"batch_size": 2},
    "any number": {},
    "warmed up": {"batch_size": 2, "example_inputs": torch.zeros(1, 4, 3)},
    "warmed up, any number": {"example_inputs": torch.ones(1, 4, 3)},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_gets_the_hidden_state_of_others(kind):
    torch.manual_seed(1)
    model = one_core(lstm(), **KINDS[kind])
    said = r"output\[1\] has shape \(2, .*, 3\).*rows stand along dim 1.*movedim\(1, 0\)"
    if "warmed" in kind:
        with pytest.raises(OutputError, match=said):
            await model.start()
        return
    async with model:
        results = await asyncio.gather(*[model(torch.rand(1, 4, 3)) for _ in range(2)], return_exceptions=True)
        for result in results:
            assert isinstance(result, OutputError)
            assert re.search(said, str(result))


async def test_nor_where_inputs_are_integers_and_a_lone_call_is_padded():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lstm = torch.nn.Embedding(9, 3), torch.nn.LSTM(3, 3, 4, batch_first=True)

        def forward(self, x):
            y, (hidden, _) = self.lstm(self.table(x))
            return y, hidden

    async with one_core(Net().eval(), batch_size=4) as model:
        with pytest.raises(OutputError, match=r"output\[1\]"):
            await model(TEXT[:1])


async def test_what_has_rows_is_handed_out_and_costs_two_executions_at_most():
    for settings in ({"batch_size": 4}, {}, {"batch_size": 4, "set_dynamic_batching": False}):
        net = Counting(lambda x: {"double": 2 * x, "sum": x.sum(1)})
        async with one_core(net, **settings) as model:
            x = torch.arange(12.0).reshape(4, 3)
            for _ in range(3):
                result = await model(x)
                assert torch.equal(result["double"], 2 * x)
                assert torch.equal(result["sum"], x.sum(1))
        assert 3 <= len(net.batches) <= 5


@pytest.mark.parametrize("example", [torch.zeros(1, 3), torch.ones(1, 3), torch.arange(6.0).reshape(2, 3)])
@pytest.mark.parametrize("batch_size", [None, 4])
async def test_a_warm_up_costs_two_executions_more_at_most_on_one_core_and_nothing_later(example, batch_size):
    net = Counting(lambda x: 2 * x)
    async with AsyncDataParallel(
        net, backend=CpuBackend(cores=3), batch_size=batch_size, example_inputs=example
    ) as model:
        assert 2 * 3 < len(net.batches) <= 2 * 3 + 2
        warm = len(net.batches)
        assert torch.equal(await model(torch.arange(6.0).reshape(2, 3)), torch.arange(6.0).reshape(2, 3) * 2)
        executions = sum(core.batches for core in model.statistics().cores)
        assert len(net.batches) == warm + executions


async def test_several_sizes_are_compared_with_each_other():
    nets = {size: Counting(lambda x: 2 * x) for size in (1, 4)}
    async with one_core(nets, example_inputs=torch.ones(1, 3)) as model:
        assert sum(len(net.batches) for net in nets.values()) == 5  # in other company
        assert torch.equal(await model(torch.ones(3, 3)), torch.full((3, 3), 2.0))
    hidden = lstm()
    with pytest.raises(OutputError, match="rows stand along dim 1"):
        async with one_core({1: hidden, 2: hidden}, example_inputs=torch.ones(1, 4, 3)):
            pass


async def test_without_two_different_rows_there_is_no_evidence_yet():
    net = Counting(lambda x: x + 1)
    async with one_core(net, batch_size=4) as model:
        for _ in range(3):
            assert torch.equal(await model(TEXT[:1]), TEXT[:1] + 1)
        assert len(net.batches) == 3
        assert torch.equal(await model(TEXT), TEXT + 1)
        assert 4 < len(net.batches) <= 6
        spent = len(net.batches)
        await model(TEXT)
        assert len(net.batches) == spent + 1


async def test_what_is_whole_can_be_declared_and_each_gets_a_copy_of_its_own():
    prototypes = torch.arange(6.0).reshape(3, 2)

    def nearest(x):
        return {"nearest": torch.cdist(x, prototypes).argmin(1), "prototypes": prototypes, "loss": 0.5}

    x = torch.tensor([[0.1, 1.0], [4.2, 5.0]])
    async with one_core(nearest, batch_size=4) as model:
        with pytest.raises(
            OutputError, match=r"'prototypes'.*the same whatever the rows are.*outputs=\{'prototypes': 'whole'\}"
        ):
            await model(x)
    async with one_core(nearest, batch_size=4, outputs={"prototypes": "whole", "loss": "whole"}) as model:
        one, other = await asyncio.gather(model(x[:1]), model(x[1:]))
        assert one["nearest"].tolist() == [0]
        assert other["nearest"].tolist() == [2]
        for result in (one, other):
            assert torch.equal(result["prototypes"], prototypes)
            assert result["loss"] == 0.5
        one["prototypes"].zero_()
        assert prototypes[2, 1] == 5
        assert other["prototypes"][2, 1] == 5
        long = await model(x.repeat(5, 1))  # spread over three batches
        assert long["nearest"].tolist() == [0, 2] * 5
        assert torch.equal(long["prototypes"], prototypes)


@pytest.mark.parametrize("outputs", [["x"], {"x": "hole"}, {-1: "whole"}, {True: "rows"}, {"": "rows"}, 3])
def test_declarations_that_mean_nothing_are_refused(outputs):
    with pytest.raises(ValueError, match="outputs="):
        AsyncDataParallel(torch.neg, outputs=outputs)
    assert check_declared(None) == {}


async def test_a_declaration_of_what_is_not_there_says_what_is():
    async with one_core(torch.neg, outputs={"logits": "whole"}) as model:
        with pytest.raises(OutputError, match="no 'logits'; there are 0: output"):
            await model(torch.ones(2, 2))


async def test_one_warning_of_rows_that_influence_one_another(caplog):
    norm = torch.nn.BatchNorm1d(3)
    norm.training = True
    for settings in ({"batch_size": 4}, {"batch_size": 4, "example_inputs": torch.rand(1, 3)}, {}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "aneuron"):
            async with one_core(lambda x: {"y": norm(x)}, **settings) as model:
                for _ in range(3):
                    await model(torch.rand(4, 3))
        (said,) = [record.message for record in caplog.records if "influence" in record.message]
        assert "output['y']" in said
        assert "set_dynamic_batching=False" in said
        assert "%" in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
async def test_dynamic_int8_with_one_scale_a_batch_is_warned_of(caplog):
    torch.manual_seed(0)
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this CPU has no engine for int8")
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
    int8 = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
    with caplog.at_level(logging.WARNING, "aneuron"):
        async with one_core(int8, batch_size=4, example_inputs=torch.rand(1, 64)):
            pass
    assert [record for record in caplog.records if "influence" in record.message]


async def test_no_warning_of_rows_that_only_round_differently(caplog):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    for settings in ({"batch_size": 4}, {}, {"example_inputs": torch.rand(1, 5, 32)}):
        with caplog.at_level(logging.WARNING, "aneuron"):
            async with one_core(layer, **settings) as model:
                await asyncio.gather(*[model(torch.rand(1, 5, 32)) for _ in range(4)])
    assert not caplog.records


async def test_what_samples_goes_by_numbers_of_rows_and_where_there_is_one_by_its_shape_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING, "aneuron"):
        async with one_core(lambda x: torch.rand(len(x), 3)) as model:
            assert (await model(torch.rand(3, 2))).shape == (3, 3)
        assert not caplog.records
        async with one_core(lambda x: torch.rand(len(x), 3), batch_size=4) as model:
            for _ in range(3):
                assert (await model(torch.rand(3, 2))).shape == (3, 3)
    (record,) = caplog.records
    assert "samples" in record.message


async def test_a_model_that_refuses_the_second_execution_goes_by_shape_with_one_warning(caplog):
    taken = []

    def picky(x):
        taken.append(len(x))
        if len(taken) > 1 and not torch.equal(x, torch.ones(2, 3)):
            raise ValueError("not these rows, please")
        return x * 2

    with caplog.at_level(logging.WARNING, "aneuron"):
        async with one_core(picky) as model:
            x = torch.tensor([[1.0] * 3, [2.0] * 3])
            assert torch.equal(await model(x), x * 2)
            assert torch.equal(await model(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert len(taken) == 4
    (record,) = caplog.records
    assert "(ValueError)" in record.message
    assert "not these rows" not in record.message  # the text may tell of rows


async def test_a_model_for_one_number_of_rows_is_asked_in_another_order():
    def fixed(x):
        if len(x) != 2:
            raise ValueError("two rows, please")
        return x * 2, torch.stack([x.sum(0), x.sum(0) + 1])

    async with one_core(fixed) as model:
        with pytest.raises(OutputError, match=r"output\[1\]"):
            await model(torch.tensor([[1.0], [5.0]]))


async def test_a_switch_turns_all_of_it_off(caplog):
    net = Counting(lambda x: (x, x.mean(0).expand(2, 3)))
    async with one_core(net, batch_size=2, check_rows=False) as model:
        await model(torch.rand(2, 3))
    assert len(net.batches) == 1
    assert not caplog.records


async def test_kinds_of_calls_have_verdicts_of_their_own_but_not_each_value():
    def embed(x, *, pool, temperature=1.0):
        return temperature * (x.mean(1) if pool else x.transpose(0, 1))

    net = Counting(embed)
    async with one_core(net, batch_size=2) as model:
        x = torch.rand(2, 2, 2)
        torch.testing.assert_close(await model(x, pool=True), x.mean(1))
        with pytest.raises(OutputError, match="rows stand along dim 1"):
            await model(x, pool=False)
        spent = len(net.batches)
        for temperature in (0.1, 0.2, 0.3):
            await model(x, pool=True, temperature=temperature)
        assert len(net.batches) <= spent + 2 + 3


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
async def test_pieces_without_dynamic_batching_are_not_joined_along_what_are_no_rows():
    async with AsyncDataParallel(lstm(), backend=CpuBackend(cores=2), set_dynamic_batching=False) as model:
        with pytest.raises(OutputError, match=r"output\[1\].*rows stand along dim 1"):
            await model(torch.rand(4, 4, 3))
        y, hidden = await model(torch.rand(1, 4, 3))  # one piece: all of it is the call's
        assert y.shape == (1, 4, 3)
        assert hidden.shape == (2, 1, 3)


@pytest.mark.filterwarnings("ignore:the cores are not fully used")
async def test_a_value_for_the_whole_batch_is_returned_where_there_is_one_piece():
    def detect(x):
        return {"y": x, "seconds": 0.25}

    async with AsyncDataParallel(detect, backend=CpuBackend(cores=2), set_dynamic_batching=False) as model:
        assert (await model(torch.ones(1, 2)))["seconds"] == 0.25
        with pytest.raises(OutputError, match=r"0\.25.*one piece"):
            await model(torch.ones(4, 2))


async def test_a_swap_compares_what_has_rows():
    example = torch.arange(6.0).reshape(2, 3)
    async with one_core(lambda x: {"y": x, "z": x}, batch_size=2, example_inputs=example) as model:
        with pytest.raises(ShapeError, match="the new model"):
            await model.swap(lambda x: {"y": x, "z": torch.stack([x.sum(0), x.prod(0)])})
        await model.swap(lambda x: {"y": x + 1, "z": x})
        assert torch.equal((await model(example))["y"], example + 1)


async def test_evidence_is_taken_on_one_core_while_others_wait_for_it():
    inside, go_on = threading.Semaphore(0), threading.Event()
    batches = []

    def slow(x):
        batches.append(len(x))
        inside.release()
        go_on.wait(60.0)
        return x * 2

    async with AsyncDataParallel(slow, backend=CpuBackend(cores=2), batch_size=4) as model:
        calls = [asyncio.ensure_future(model(torch.rand(4, 3) + n)) for n in range(2)]
        for _ in calls:
            await asyncio.to_thread(inside.acquire)
        go_on.set()
        results = await asyncio.gather(*calls)
        assert [len(each) for each in results] == [4, 4]
    assert len(batches) == 4  # two calls, and the evidence of one of them


async def test_a_result_of_an_output_buffer_that_is_used_again_is_right_while_evidence_is_taken():
    buffer = torch.empty(4, 3)

    def into(x):
        return torch.mul(x, 2, out=buffer)

    async with one_core(into, batch_size=4) as model:
        x = torch.rand(4, 3)
        assert torch.equal(await model(x), 2 * x)


async def test_who_hangs_while_evidence_is_taken_is_given_up_and_others_take_it():
    hung, let_go = [], threading.Event()

    def model(x):
        if len(x) == 3 and not hung:  # the first execution that is nobody's
            hung.append(threading.current_thread())
            let_go.wait(60.0)
        return x * 2

    settings = {"backend": CpuBackend(cores=2), "exec_timeout": 0.3}
    async with AsyncDataParallel(model, **settings) as served:
        xs = [torch.rand(4, 3) + n for n in range(4)]
        results = await asyncio.gather(*map(served, xs))
        assert all(torch.equal(result, 2 * x) for result, x in zip(results, xs, strict=True))
        assert hung
        let_go.set()


async def test_what_cannot_be_looked_at_goes_by_its_shape_with_one_warning(caplog, monkeypatch):
    def broken(*args):
        raise TypeError("no such comparison")

    monkeypatch.setattr("aneuron.engine.evidence.judge", broken)
    with caplog.at_level(logging.WARNING, "aneuron"):
        async with one_core(lambda x: x * 2, batch_size=4, example_inputs=torch.ones(1, 2)) as model:
            for _ in range(2):
                assert torch.equal(await model(torch.ones(3, 2)), torch.full((3, 2), 2.0))
    (record,) = caplog.records
    assert "(TypeError)" in record.message
