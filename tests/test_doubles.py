"""The doubles of the Neuron packages do what the facts about the real ones say."""

import copy
import sys

import doubles
import pytest
import torch
from torch import nn


class Net(nn.Module):
    def forward(self, x):
        return x * 2 + 1


def test_a_traced_module_answers_as_the_module_and_only_for_its_shape():
    with doubles.neuronx(cores=2) as machine:
        import torch_neuronx

        x = torch.rand(2, 3)
        traced = torch_neuronx.trace(Net(), x)
        assert machine.visible is None  # tracing takes no core
        assert isinstance(traced, torch.jit.ScriptModule)
        assert "neuron::forward_v2" in str(traced.graph)
        torch.testing.assert_close(traced(x), Net()(x))
        with pytest.raises(RuntimeError, match=r"(?s)^The following operation failed in the TorchScript interpreter"):
            traced(torch.rand(3, 3))
        with pytest.raises(RuntimeError, match="Incorrect type"):
            traced(x.double())
    assert "torch_neuronx" not in sys.modules


def test_a_copy_begins_without_a_core():
    with doubles.neuronx(cores=4) as machine:
        import torch_neuronx

        x = torch.rand(1, 3)
        traced = torch_neuronx.trace(Net(), x)
        torch_neuronx.set_neuron_cores(traced, 2, 1)
        twin = copy.deepcopy(traced)
        assert machine.loads == [0, 0, 1, 0]
        torch_neuronx.set_neuron_cores(twin, 3, 1)
        torch.testing.assert_close(twin(x), traced(x))
        assert [run.core for run in machine.executions] == [3, 2]


def test_a_file_goes_to_its_core_at_load_and_needs_the_package(tmp_path):
    file = str(tmp_path / "net.pt")
    with doubles.neuronx(cores=4) as machine:
        import torch_neuronx

        x = torch.rand(1, 3)
        torch.jit.save(torch_neuronx.trace(Net(), x), file)
        with torch_neuronx.neuron_cores_context(1, 1):
            loaded = torch.jit.load(file)
        assert machine.loads == [0, 1, 0, 0]
        torch.testing.assert_close(loaded(x), Net()(x))
    with pytest.raises(RuntimeError, match=r"Unknown type name '__torch__\.torch\.classes\.neuron\.Model'"):
        torch.jit.load(file)
