"""The doubles of the Neuron packages do what the facts about the real ones say: traced modules and their files."""

import sys
import threading
import time

import doubles
import pytest
import torch
from doubles.samples import Net, Pair, X, cores_of, fails_in_torchscript, saved
from torch import nn


@pytest.fixture
def machine():
    with doubles.neuronx(cores=4) as machine:
        yield machine


@pytest.fixture
def tn(machine):
    import torch_neuronx

    return torch_neuronx


# Compiled models, facts 3.


def test_a_traced_module_is_a_script_module_that_no_core_was_taken_for(machine, tn):
    traced = tn.trace(Net(), X)
    assert machine.visible is None
    assert isinstance(traced, torch.jit.ScriptModule)
    assert "neuron::forward_v2" in str(traced.graph)
    torch.testing.assert_close(traced(X), X * 2 + 1)
    assert machine.visible == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.sum(),
        lambda x: (x, x.sum()),
        lambda x: [x + 1, x],
        lambda x: {"a": x, "b": x.sum()},
        lambda x: (x, [x, x * 2], {"c": x}),
    ],
)
def test_outputs_come_back_as_the_model_made_them(tn, answer):
    torch.testing.assert_close(tn.trace(Net(answer), X)(X), answer(X))


def test_a_named_tuple_comes_back_as_a_tuple_as_traces_make_it(tn):
    output = tn.trace(Net(lambda x: Pair(x, x + 1)), X)(X)
    assert type(output) is tuple
    torch.testing.assert_close(output, (X, X + 1))


def test_inputs_keep_the_nesting_of_the_example(tn):
    example = (X, {"y": X + 1}, [X, X + 2], (X, X + 3))
    traced = tn.trace(Net(lambda x, d, lst, pair: x + d["y"] + lst[1] + pair[1]), example)
    torch.testing.assert_close(traced(X, {"y": X}, [X, X], (X, X)), X * 4)


def test_the_same_tensor_twice_in_the_example_is_one_input(tn):
    traced = tn.trace(Net(lambda x, y: x - y), (X, X))
    torch.testing.assert_close(traced(X, X + 1), torch.zeros(2, 3))


@pytest.mark.parametrize("x", [torch.rand(3, 3), torch.rand(2, 4), torch.rand(3), X.double()])
def test_another_shape_or_dtype_is_refused_before_a_core_runs(machine, tn, x):
    traced = tn.trace(Net(), X)
    with fails_in_torchscript(pattern="Incorrect (shape|type) of input 0: .*"):
        traced(x)
    assert not machine.executions


def test_wrong_arguments_are_refused_by_torchscript(tn):
    traced = tn.trace(Net(), X)
    with pytest.raises(RuntimeError, match=r"^forward\(\) is missing value for argument"):
        traced()
    with pytest.raises(RuntimeError, match=r"^forward\(\) Expected a value of type"):
        traced("x")


def test_dynamic_batch_runs_the_compiled_size_as_often_as_it_takes(machine, tn):
    traced = tn.trace(Net(lambda x: (x * 2, x.mean(0, keepdim=True) + x)), X)
    assert tn.dynamic_batch(traced) is traced
    x = torch.rand(5, 3)
    doubled, per_run = traced(x)
    torch.testing.assert_close(doubled, x * 2)
    assert [run.rows for run in machine.executions] == [2, 2, 1]
    # Each run reduces by itself, and the last one sees its padding too.
    torch.testing.assert_close(per_run[:2], x[:2] + x[:2].mean(0))
    torch.testing.assert_close(per_run[4:], x[4:] + x[4:] / 2)
    tn.dynamic_batch(traced, False)
    with pytest.raises(RuntimeError, match="Incorrect shape"):
        traced(x)


def test_dynamic_batch_needs_one_batch_size(tn):
    traced = tn.dynamic_batch(tn.trace(Net(lambda x, y: x + y), (X, X + 1)))
    with fails_in_torchscript("Inconsistent batch sizes found on inputs"):
        traced(torch.rand(4, 3), torch.rand(3, 3))
    with pytest.raises(RuntimeError, match="Incorrect shape"):
        traced(torch.rand(4, 4), torch.rand(4, 4))


def test_functions_do_nothing_to_a_module_that_is_not_traced_for_neuron(machine, tn):
    net = Net()
    assert tn.dynamic_batch(net) is net
    tn.set_neuron_cores(net, 1, 1)
    tn.move_trace_to_device(net, 0)
    assert machine.loads == [0, 0, 0, 0]


def test_weights_of_their_own(machine, tn):
    net = nn.Linear(3, 3).eval()
    traced = tn.trace(net, X, inline_weights_to_neff=False)
    tn.set_neuron_cores(traced, 1, 1)
    torch.testing.assert_close(traced(X), net(X).detach())
    assert machine.slow_copies == 1
    tn.move_trace_to_device(traced, 0)
    assert machine.default == (0, -1)  # and stays so
    with fails_in_torchscript("Tensor input1 allocated on vnc 0 must be allocated on same vnc as model (1)"):
        traced(X)
    tn.move_trace_to_device(traced, 1)
    other = nn.Linear(3, 3).eval()
    assert tn.replace_weights(traced, other) is None
    torch.testing.assert_close(traced(X), other(X).detach())
    tn.replace_weights(traced, net.state_dict())
    torch.testing.assert_close(traced(X), net(X).detach())
    assert machine.slow_copies == 1
    with pytest.warns(UserWarning, match="cannot be replaced"):
        tn.replace_weights(tn.trace(net, X), net)


# Files, facts 2.3 and 3.5.


def test_a_file_goes_to_the_least_used_core_at_load(machine, tn, tmp_path):
    file = saved(tn.trace(Net(), X), tmp_path)
    loaded = [torch.jit.load(file) for _ in range(5)]
    assert [cores_of(module) for module in loaded] == [[0], [1], [2], [3], [0]]
    torch.testing.assert_close(loaded[1](X), X * 2 + 1)
    with open(file, "rb") as opened:
        assert cores_of(torch.jit.load(opened)) == [1]


def test_what_is_no_neuron_file_loads_as_ever(machine, tn, tmp_path):
    plain = torch.jit.load(saved(torch.jit.trace(nn.ReLU(), X), tmp_path))
    torch.testing.assert_close(plain(-X), X * 0)
    assert machine.visible is None
    (tmp_path / "text").write_text("no zip file")
    with pytest.raises(RuntimeError):
        torch.jit.load(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="does not exist"):
        torch.jit.load(str(tmp_path / "missing"))


def test_without_the_package_a_file_is_of_an_unknown_type(tmp_path):
    with doubles.neuronx():
        import torch_neuronx

        traced = torch_neuronx.trace(Net(), X)
        files = [saved(traced, tmp_path), saved(torch.jit.trace(nn.Sequential(traced), X), tmp_path, "outer.pt")]
    assert "torch_neuronx" not in sys.modules
    for file in files:
        with pytest.raises(RuntimeError, match=r"^\s*Unknown type name '__torch__\.torch\.classes\.neuron\.Model'"):
            torch.jit.load(file)


def test_options_travel_with_the_file_and_lazy_means_at_first_use(machine, tn, tmp_path):
    file = saved(tn.lazy_load(tn.dynamic_batch(tn.trace(Net(), X))), tmp_path)
    with tn.neuron_cores_context(2, 1):
        first = torch.jit.load(file)
    second = torch.jit.load(file)
    assert sum(machine.loads) == 0
    assert first(torch.rand(5, 3)).shape == (5, 3)
    assert machine.loads == [0, 0, 1, 0]
    tn.set_neuron_cores(second, 3, 1)
    assert machine.loads == [0, 0, 1, 1]


def test_an_asynchronous_load_fails_in_the_first_call(machine, tn, tmp_path):
    traced = tn.async_load(tn.trace(Net(), X))
    good = torch.jit.load(saved(traced, tmp_path))
    torch.testing.assert_close(good(X), X * 2 + 1)
    assert sum(machine.loads) == 1
    machine.config.memory = traced.model.numel() // 2
    bad = torch.jit.load(saved(traced, tmp_path))
    with fails_in_torchscript("Could not load the model status=4 message=Allocation Failure"):
        bad(X)


def test_loading_can_hold_the_gil(machine, tn, tmp_path):
    file = saved(tn.trace(Net(), X), tmp_path)
    machine.config.load_time, machine.config.jit_load_holds_gil = 0.2, True
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    torch.jit.load(file)
    stop.set()
    thread.join()
    assert max(later - sooner for sooner, later in zip(ticks, [*ticks[1:], time.monotonic()], strict=True)) >= 0.2
