"""The five programs of the documents, in their own words, run on the doubles; and the legacy package."""

import threading

import doubles
import pytest
import torch
from doubles.samples import Net, cores_of, quiet
from torch import nn

ROW = torch.rand(1, 3)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x) + 1


@pytest.mark.parametrize("bugs", [True, False])
def test_programs_of_the_documents(bugs):
    with doubles.neuronx(cores=4, data_parallel_bugs=bugs) as machine:
        import torch_neuronx as tn

        run_programs(machine, tn)


def run_programs(machine, tn):
    network = Conv().eval().requires_grad_(False)
    image = torch.rand(1, 3, 8, 8)

    def neuron():
        return tn.trace(network, image)

    parallel = tn.DataParallel(neuron())
    for batch in (5, 2, 3, 4, 5, 6):
        x = torch.rand(batch, 3, 8, 8)
        torch.testing.assert_close(quiet(parallel, x), network(x))

    chosen = tn.DataParallel(neuron(), device_ids=["nc:0", "nc:1"])
    assert {run.core for run in ran(machine, lambda: chosen(x))} == {0, 1}

    other = tn.DataParallel(neuron(), device_ids=[0, 1], dim=2)
    x = torch.rand(1, 3, 16, 8)
    torch.testing.assert_close(other(x), torch.cat([network(half) for half in x.chunk(2, 2)], 2))

    fixed = tn.DataParallel(neuron(), device_ids=[0, 1], dim=0)
    fixed.disable_dynamic_batching()
    with pytest.raises(RuntimeError, match="Incorrect shape"):
        fixed(torch.rand(4, 3, 8, 8))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(fixed(x), network(x))


def ran(machine, call):
    before = len(machine.executions)
    call()
    return machine.executions[before:]


# Legacy, facts 1.10.


def test_legacy():
    with doubles.neuron(cores=16) as machine:
        import torch_neuron

        assert torch.neuron is torch_neuron
        traced = torch.neuron.trace(Net(), ROW)
        model = torch.neuron.DataParallel(traced, device_ids=["nc:0", "nc:1", "nc:2"])
        assert [cores_of(module) for module in model.loaded_modules] == [[0], [1], [2]]
        assert model.num_workers == 6
        x = torch.rand(7, 3)
        torch.testing.assert_close(model(x), x * 2 + 1)
        assert {run.core for run in machine.executions} == {0, 1, 2}
        torch_neuron.experimental.set_neuron_cores(traced, 14, 1)
        assert cores_of(traced) == [14]
        assert torch.neuron.trace(Net(), ROW, dynamic_batch_size=True)(x).shape == (7, 3)
        with pytest.raises(TypeError):
            torch.neuron.DataParallel(traced, set_dynamic_batching=False)
        pipeline = torch.neuron.trace(Net(), ROW, compiler_args=["--neuroncore-pipeline-cores", "4"])
        with pytest.raises(RuntimeError, match="status=9"):
            torch.neuron.DataParallel(pipeline)
    assert not hasattr(torch, "neuron")


def test_legacy_calls_a_single_chunk_on_the_callers_thread():
    with doubles.neuron(cores=4):
        import torch_neuron

        seen = []
        model = torch_neuron.DataParallel(Net(lambda x: seen.append(threading.current_thread()) or x))
        model.split_size = 8
        quiet(model, torch.rand(4, 3))
        assert seen == [threading.current_thread()]
