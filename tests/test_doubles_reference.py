"""The reference does what the facts about `torch_neuronx.DataParallel` and its legacy say, bugs included if asked."""

import logging
import warnings

import doubles
import pytest
import torch
from doubles.samples import Net, Pair, X, cores_of, quiet
from torch import nn

ROW = torch.rand(1, 3)


@pytest.fixture
def machine():
    with doubles.neuronx(cores=4) as machine:
        yield machine


@pytest.fixture
def tn(machine):
    import torch_neuronx

    return torch_neuronx


@pytest.fixture
def parallel(tn):
    """A DataParallel of a function, compiled for one row of the inputs' other dimensions."""

    def build(answer, *example, **settings):
        return tn.DataParallel(tn.trace(Net(answer), example or (ROW,)), **settings)

    return build


@pytest.fixture
def host(machine):
    """A DataParallel of a plain function: scatter and gather without a device's demands on shapes."""
    import torch_neuronx

    def build(answer, device_ids=(0, 1, 2, 3), **settings):
        return torch_neuronx.DataParallel(Net(answer), device_ids=list(device_ids), **settings)

    return build


# Construction and loading, facts 1.1 to 1.5.


def test_default_is_one_module_with_replicas_on_all_cores_and_two_workers(machine, parallel):
    model = parallel(lambda x: x * 2)
    assert isinstance(model, nn.Module)
    assert (model.device_ids, model.num_workers, model.split_size, model.dim) == ([0, 1, 2, 3], 2, -1, 0)
    assert (model.set_dynamic_batching, model.dynamic_batching_failed) == (True, False)
    assert len(model.loaded_modules) == 1
    assert machine.loads == [1, 1, 1, 1]
    x = torch.rand(8, 3)
    torch.testing.assert_close(model(x), x * 2)
    with pytest.raises(TypeError):
        model(x=x)


def test_scattered_ids_are_copies_and_the_order_is_lost(machine, parallel):
    ids = ["nc:3", 0, "xnc:0foo"]
    model = parallel(lambda x: x, device_ids=ids)
    assert model.device_ids == [0, 0, 3]
    assert ids == ["nc:3", 0, "xnc:0foo"]
    assert [cores_of(module) for module in model.loaded_modules] == [[0], [0], [3]]
    assert (machine.loads, model.num_workers) == ([2, 0, 0, 1], 6)


@pytest.mark.parametrize("wrong", ["0", 1.0, None, "cuda:0"])
def test_a_malformed_id_is_found_after_dynamic_batching_was_switched(tn, wrong):
    traced = tn.trace(Net(), ROW)
    with pytest.raises(ValueError, match=r"^Expected `nc:#` or an integer, but got:"):
        tn.DataParallel(traced, device_ids=[wrong])
    assert traced(torch.rand(3, 3)).shape == (3, 3)


def test_no_ids_is_an_index_error(parallel):
    with pytest.raises(IndexError):
        parallel(lambda x: x, device_ids=[])


def test_without_a_runtime_the_default_cannot_count(monkeypatch, parallel):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "9")
    with pytest.raises(RuntimeError, match="number of NeuronCores cannot be determined"):
        parallel(lambda x: x)


def test_too_many_cores_pass_for_a_failure_of_dynamic_batching(caplog, parallel):
    model = parallel(lambda x: x, device_ids=range(5))
    assert [record.name for record in caplog.records] == ["Neuron", "Neuron"]
    assert "Automatic dynamic batching failed due to Invalid NeuronCore count" in caplog.text
    with pytest.raises(RuntimeError, match=r"^Automatic dynamic batching must be disabled before running inference"):
        model(ROW)
    model.disable_dynamic_batching()
    assert model(torch.rand(5, 3)).shape == (5, 3)  # on whatever core


def test_switching_dynamic_batching_off_loads_again_and_forgets_the_workers(caplog, machine, parallel):
    caplog.set_level(logging.INFO)
    model = parallel(lambda x: x * 2, device_ids=[0, 1])
    model.num_workers, model.split_size = 7, 1
    model.disable_dynamic_batching()
    assert (model.num_workers, model.split_size, machine.loads) == (2, 1, [2, 2, 0, 0])
    x = torch.rand(2, 3)
    torch.testing.assert_close(model(x), x * 2)
    model.split_size = -1
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError on neuroncore 0\.(?s:.)*Incorrect shape"):
        model(torch.rand(4, 3))
    assert not caplog.records
    parallel(lambda x: x, set_dynamic_batching=False)
    parallel(lambda x: x, dim=1)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


# Splits and scatter, facts 1.6 and 1.7.


@pytest.mark.parametrize(
    ("rows", "cores", "split_size", "sizes"),
    [
        (8, 3, -1, [3, 3, 2]),
        (5, 4, -1, [2, 1, 1, 1]),
        (3, 4, -1, [1, 1, 1]),
        (8, 4, 3, [3, 3, 2]),
        (4, 2, 9, [4]),
    ],
)
def test_sizes_of_chunks(host, rows, cores, split_size, sizes):
    seen = []
    model = host(lambda x: seen.append(len(x)) or x, device_ids=range(cores))
    model.split_size, model.num_workers = split_size, 1
    x = torch.rand(rows, 2)
    assert torch.equal(quiet(model, x), x)
    assert seen == sizes


def test_wrong_settings_show_at_the_call(host):
    model = host(lambda x: x)
    model.split_size = 0
    with pytest.raises(ZeroDivisionError):
        model(X)
    model.split_size, model.num_workers = -1, 0
    with pytest.raises(ValueError, match="max_workers"), pytest.warns(UserWarning, match="utilized"):
        model(X)


NESTINGS = [
    lambda x: (x,),
    lambda x: ([x, x + 1],),
    lambda x: ((x, x + 1), x),
    lambda x: (Pair(x, x + 1),),
    lambda x: ({"a": x, "b": [x + 1]},),
]


@pytest.mark.parametrize("bugs", [True, False])
@pytest.mark.parametrize("nest", NESTINGS)
def test_nested_inputs_are_scattered_and_gathered_in_their_nesting(machine, host, nest, bugs):
    machine.config.data_parallel_bugs = bugs
    inputs = nest(torch.rand(8, 2))
    output = host(lambda *args: args)(*inputs)
    torch.testing.assert_close(output, inputs)
    assert [type(each) for each in output] == [type(each) for each in inputs]


@pytest.mark.parametrize("nest", NESTINGS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_without_bugs_no_row_is_lost(machine, host, nest, dim):
    machine.config.data_parallel_bugs = False
    for rows in range(10):
        for split_size in (-1, 1, 3, 20):
            model = host(lambda *args: args, dim=dim)
            model.split_size = split_size
            shape = (rows, 2) if dim == 0 else (2, rows)
            inputs = nest(torch.rand(shape))
            torch.testing.assert_close(quiet(model, *inputs), inputs)


def test_without_bugs_other_leaves_are_replicated(machine, host):
    machine.config.data_parallel_bugs = False
    x, one = torch.rand(8, 2), torch.rand(1, 2)
    torch.testing.assert_close(host(lambda x, one, n, _: x * one + n)(x, one, 3, None), x * one + 3)
    assert host(lambda x: x).num_workers == 8  # as documented: twice the cores
    with pytest.raises(ValueError, match=r"\[3, 8\] rows"):
        host(lambda x, y: x)(x, torch.rand(3, 2))


@pytest.mark.parametrize(
    ("rows", "cores", "kept"), [(5, 4, [0, 2, 3, 4]), (7, 2, [0, 1, 3, 4, 5, 6]), (8, 4, range(8))]
)
def test_bug_rows_are_lost_where_dim_is_not_0(host, rows, cores, kept):
    x = torch.rand(2, rows)
    assert torch.equal(quiet(host(lambda x: x, device_ids=range(cores), dim=1), x), x[:, list(kept)])


def test_bug_an_own_split_size_runs_past_the_end_where_dim_is_not_0(host):
    model = host(lambda x: x, dim=1)
    model.split_size = 3
    with pytest.raises((RuntimeError, IndexError)):
        model(torch.rand(2, 4))


def test_bug_the_input_with_the_fewest_chunks_decides(host):
    with pytest.warns(UserWarning, match="^The NeuronCores are not being fully utilized"):
        assert len(host(lambda x, one: x + one)(torch.rand(8, 2), torch.rand(1, 2))) == 2


@pytest.mark.parametrize("leaf", [None, 1, 1.0, "text", True, [], {}, ()])
def test_bug_what_is_no_tensor_cannot_be_scattered(host, leaf):
    with pytest.raises(UnboundLocalError):
        host(lambda x, y: x)(X, leaf)
    with pytest.raises(UnboundLocalError):
        host(lambda: X)()


def test_odd_batches(parallel):
    model = parallel(lambda x: x)
    with pytest.raises(IndexError):
        model(torch.tensor(1.0))
    with (
        pytest.raises(RuntimeError, match=r"forward\(\) is missing value"),
        pytest.warns(UserWarning, match="utilized"),
    ):
        model(torch.rand(0, 3))


@pytest.mark.parametrize(("rows", "warned"), [(8, 0), (5, 0), (3, 1)])
def test_the_warning_counts_chunks_not_rows(host, rows, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host(lambda x: x)(torch.rand(rows, 2))
    assert len(caught) == warned


# Execution and gather, facts 1.8 and 1.9.


def test_the_first_failing_chunk_is_raised_after_all_have_run(machine, host):
    seen = []

    def answer(x):
        seen.append(x[0, 0].item())
        if x[0, 0] in (1, 2):
            raise LookupError(f"row {x[0, 0].item()}")
        return x

    with pytest.raises(LookupError, match=r"^Caught LookupError on neuroncore 1\.(?s:.)*row 1\.0"):
        host(answer)(torch.arange(4.0).reshape(4, 1))
    assert sorted(seen) == [0, 1, 2, 3]


def test_what_is_no_exception_is_lost_in_its_thread(host):
    def answer(x):
        raise SystemExit

    with pytest.raises(KeyError):
        host(answer)(torch.rand(4, 2))


def test_the_modes_of_the_caller_do_not_reach_the_workers(host):
    seen = []
    with torch.inference_mode():
        host(lambda x: seen.append(torch.is_inference_mode_enabled()) or x)(torch.rand(4, 2))
    assert seen == [False] * 4


def test_gather(host):
    x = torch.arange(8.0).reshape(4, 2)
    with pytest.warns(UserWarning, match="^The model returns scalar outputs, which cannot be gathered"):
        assert host(torch.sum)(x).tolist() == [1.0, 5.0, 9.0, 13.0]
    assert host(lambda x: None)(x) is None
    assert host(lambda x: torch.ones(3))(x).shape == (12,)  # no batch dimension: one after the other
    assert host(lambda x: "text")(x).startswith("<map object")
    with pytest.raises(TypeError):
        host(lambda x: 1)(x)
    with pytest.raises(RuntimeError, match="zero-dimensional"):
        host(torch.sum, dim=1)(torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"^All dicts must have the same number of keys$"):
        host(lambda x: {"a": x} if x[0, 0] else {"a": x, "b": x})(x)
    with pytest.raises(KeyError):
        host(lambda x: {"a": x} if x[0, 0] else {"b": x})(x)
