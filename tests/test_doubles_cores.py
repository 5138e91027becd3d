"""The doubles of the Neuron packages do what the facts about the real ones say: placement, the runtime, faults."""

import copy
import gc
import threading

import doubles
import pytest
import torch
from doubles.hardware import Execution, parse_cores
from doubles.samples import Net, X, cores_of, fails_in_torchscript, saved
from torch import nn


@pytest.fixture
def machine():
    with doubles.neuronx(cores=4) as machine:
        yield machine


@pytest.fixture
def tn(machine):
    import torch_neuronx

    return torch_neuronx


# Placement, facts 2.1 to 2.6.


def test_a_copy_begins_without_a_core(machine, tn):
    traced = tn.trace(Net(), X)
    tn.set_neuron_cores(traced, 2, 1)
    twin = copy.deepcopy(traced)
    assert machine.loads == [0, 0, 1, 0]
    tn.set_neuron_cores(twin, 3, 1)
    torch.testing.assert_close(twin(X), traced(X))
    assert [run.core for run in machine.executions] == [3, 2]


def test_placing_again_unloads_and_loads(machine, tn):
    traced = tn.trace(Net(), X)
    for core in (1, 1, 3):
        tn.set_neuron_cores(traced, core, 1)
    assert machine.loads == [0, 2, 0, 1]
    assert [machine.core(i).unloads for i in range(4)] == [0, 2, 0, 0]
    assert [machine.core(i).used > 0 for i in range(4)] == [False, False, False, True]
    del traced
    gc.collect()
    assert machine.core(3).used == 0  # the core itself stays with the process


def test_replicas_take_turns_call_by_call(machine, tn, tmp_path):
    traced = tn.trace(Net(), X)
    tn.set_neuron_cores(traced, 1, 3)
    for _ in range(4):
        traced(X)
    assert [run.core for run in machine.executions] == [1, 2, 3, 1]
    tn.set_multicore(traced)
    assert cores_of(traced) == [0, 1, 2, 3]
    with tn.multicore_context():
        assert cores_of(torch.jit.load(saved(traced, tmp_path))) == [0, 1, 2, 3]
    assert machine.default == (-1, -1)


def test_every_part_of_a_module_is_placed(machine, tn):
    both = nn.Sequential(tn.trace(Net(), X), nn.ReLU(), tn.trace(Net(), X))
    tn.set_neuron_cores(both, 2, 1)
    assert cores_of(both) == [2, 2]
    torch.testing.assert_close(both(X), (X * 2 + 1) * 2 + 1)
    outer = torch.jit.trace(both, X)
    tn.set_neuron_cores(outer, 3, 1)
    assert cores_of(outer) == [3, 3]


@pytest.mark.parametrize("count", [0, -2, 5])
def test_a_wrong_count_is_a_value_error(tn, count):
    with pytest.raises(ValueError, match=f"Invalid NeuronCore count nc_count={count}"):
        tn.set_neuron_cores(tn.trace(Net(), X), 0, count)
    with pytest.raises(ValueError, match=f"nc_count={count}"), tn.neuron_cores_context(0, count):
        pass


def test_a_core_outside_the_process_does_not_load(tn):
    with pytest.raises(RuntimeError, match="Could not load the model status=9"):
        tn.set_neuron_cores(tn.trace(Net(), X), 4, 1)


def test_contexts_change_the_default_of_the_whole_process(tn, tmp_path):
    file = saved(tn.trace(Net(), X), tmp_path)
    loaded = []
    with tn.neuron_cores_context(3, 1):
        thread = threading.Thread(target=lambda: loaded.append(torch.jit.load(file)))
        thread.start()
        thread.join()
    assert cores_of(loaded[0]) == [3]  # in a thread that never asked for it


@pytest.mark.parametrize("where", ["top", "experimental", "experimental.placement"])
def test_placement_has_its_names_in_one_place(where):
    with doubles.neuronx(placement=where):
        import torch_neuronx
        import torch_neuronx.experimental.placement

        homes = {
            "top": torch_neuronx,
            "experimental": torch_neuronx.experimental,
            "experimental.placement": torch_neuronx.experimental.placement,
        }
        assert [name for name, home in homes.items() if hasattr(home, "set_neuron_cores")] == [where]
        homes[where].set_neuron_cores(traced := torch_neuronx.trace(Net(), X), 1, 1)
        assert cores_of(traced) == [1]


def test_a_model_of_several_cores(machine, tn):
    traced = tn.trace(Net(), X, compiler_args=["--neuroncore-pipeline-cores", "2"])
    with pytest.raises(RuntimeError, match="status=9"):
        tn.set_neuron_cores(traced, 0, 1)
    tn.set_neuron_cores(traced, 1, 3)
    assert cores_of(traced) == [1, 2]  # one replica; the third core is left over
    torch.testing.assert_close(traced(X), X * 2 + 1)


def test_a_model_that_does_not_fit_leaves_nothing_behind(machine, tn):
    traced = tn.trace(Net(), X)
    machine.config.memory = traced.model.numel() * 3 // 2
    tn.set_neuron_cores(copy.deepcopy(traced), 2, 1)
    gc.collect()
    kept = copy.deepcopy(traced)
    tn.set_neuron_cores(kept, 2, 1)
    with pytest.raises(RuntimeError, match=r"^Could not load the model status=4 message=Allocation Failure$"):
        tn.set_neuron_cores(traced, 1, 2)
    assert [machine.core(i).models for i in range(4)] == [0, 0, 1, 0]


def test_a_core_can_fail_to_load_while_others_do_not(machine, tn):
    traced = tn.trace(Net(), X)
    machine.core(1).load_fails = 2
    with pytest.raises(RuntimeError, match=r"^Could not load the model status=2 message=Invalid$"):
        tn.set_neuron_cores(traced, 0, 3)
    tn.set_neuron_cores(traced, 2, 2)
    assert machine.loads == [1, 0, 1, 1]


# The runtime, facts 2.5 and 2.7.


def test_runtime(machine, tn):
    runtime = torch.classes.neuron.Runtime()
    assert runtime.get_nc_count() == runtime.get_visible_nc_count() == 4
    runtime.set_default_neuron_cores(2, 1)
    assert (runtime.get_default_start_nc(), runtime.get_default_nc_count()) == (2, 1)
    runtime.unsafe_close()
    assert machine.visible is None


@pytest.mark.parametrize(
    ("text", "cores"), [("3", [3]), ("3-6", [3, 4, 5, 6]), ("3,4,5", [3, 4, 5]), ("3-5,6", [3, 4, 5, 6])]
)
def test_visible_cores_in_all_spellings(text, cores):
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["3,5,6", "6-3", "3,2", "", "a", "1-", "-1", "3,3"])
def test_visible_cores_that_are_not_contiguous_and_rising_do_not_start(monkeypatch, tn, text):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", text)
    runtime = torch.classes.neuron.Runtime()
    assert runtime.get_nc_count() == -1
    with pytest.raises(RuntimeError, match=r"^The PyTorch Neuron Runtime could not be initialized\.$"):
        runtime.get_visible_nc_count()
    with pytest.raises(RuntimeError, match="could not be initialized"):
        tn.set_neuron_cores(tn.trace(Net(), X), 0, 1)


def test_the_environment_is_read_once(monkeypatch, machine, tn):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2-3")
    monkeypatch.setenv("NEURON_RT_NUM_CORES", "1")
    runtime = torch.classes.neuron.Runtime()
    assert runtime.get_nc_count() == 2  # the list wins over the number
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0")
    assert runtime.get_nc_count() == 2
    tn.trace(Net(), X)(X)
    assert machine.executions == [Execution(core=2, local=0, rows=2)]


def test_a_core_that_does_not_exist_is_not_opened(monkeypatch, capsys, tn):
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "3-4")
    assert torch.classes.neuron.Runtime().get_nc_count() == -1
    assert "Could not open the nd2" in capsys.readouterr().err


def test_logical_cores(monkeypatch, capsys):
    with doubles.neuronx(cores=8, cores_per_chip=8, lnc=2) as machine:
        import torch_neuronx as tn

        fit = tn.trace(Net(), X)
        monkeypatch.setenv("NEURON_CC_FLAGS", "--lnc=1")
        other = tn.trace(Net(), X)
        explicit = tn.trace(Net(), X, compiler_args=["--logical-nc-config=2"])  # wins over the environment
        tn.set_neuron_cores(fit, 3, 1)
        tn.set_neuron_cores(explicit, 3, 1)
        assert machine.visible == [0, 1, 2, 3]
        with pytest.raises(RuntimeError, match="Could not load the model status=2 message=Invalid"):
            tn.set_neuron_cores(other, 0, 1)
        assert (
            "Mismatch detected between Runtime configuration and NEFF: compiled with lnc=1" in capsys.readouterr().err
        )
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
        torch.classes.neuron.Runtime().unsafe_close()
        assert torch.classes.neuron.Runtime().get_nc_count() == 8


def test_a_model_of_another_family(monkeypatch, machine, tn):
    traced = tn.trace(Net(), X)
    machine.config.family = "trn2"
    with pytest.raises(RuntimeError, match="status=10"):
        tn.set_neuron_cores(traced, 0, 1)
    monkeypatch.setenv("NEURON_RT_ALLOW_LEGACY_NEFF", "TRUE")
    tn.set_neuron_cores(traced, 0, 1)


# Execution and its failures, facts 4 and 5.


class Watched:
    """A lock that says when somebody comes to wait for it."""

    def __init__(self):
        self.lock, self.came = threading.Lock(), threading.Semaphore(0)

    def __enter__(self):
        self.came.release()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_one_run_at_a_time_on_a_core_whatever_the_module(machine, tn):
    modules = [tn.trace(Net(), X), tn.trace(Net(), X), tn.trace(Net(), X)]
    for module, core in zip(modules, (0, 0, 1), strict=True):
        tn.set_neuron_cores(module, core, 1)
    turn = machine.core(0).turn = Watched()
    go = threading.Event()
    machine.fail(0, 0, wait=go)
    threads = [threading.Thread(target=module, args=(X,)) for module in modules[:2]]
    try:
        for thread in threads:
            thread.start()
            assert turn.came.acquire(timeout=30)
        modules[2](X)  # neither the GIL nor the other core is taken
        assert [run.core for run in machine.executions] == [0, 1]
    finally:
        go.set()
        for thread in threads:
            thread.join()
    assert [run.core for run in machine.executions] == [0, 1, 0]


@pytest.mark.parametrize(
    ("status", "text", "poisons"),
    [
        (1, "Failure", False),
        (2, "Invalid", False),
        (5, "Timeout Exceeded", True),
        (6, "Hardware Error", True),
        (7, "Queue Full", False),
        (101, "Execution Unit Unrecoverable", True),
        (1002, "Incorrect Input", False),
        (1003, "Numerical Error", False),
        (1004, "Execution was completed with other errors", True),
        (1006, "Execution Out-Of-Bounds Memory Access", False),
        (1201, "Unknown", True),
        (1203, "Unknown", True),
    ],
)
def test_a_fault_has_its_text_and_some_poison_the_core(machine, tn, status, text, poisons):
    traced, neighbour, elsewhere = (tn.trace(Net(), X) for _ in range(3))
    for module, core in ((traced, 1), (neighbour, 1), (elsewhere, 2)):
        tn.set_neuron_cores(module, core, 1)
    machine.fail(1, status, after=1)
    traced(X)
    with fails_in_torchscript(f"Failed to execute the model status={status} message={text}"):
        traced(X)
    elsewhere(X)
    if poisons:
        tn.set_neuron_cores(traced, 1, 1)  # does not mend it
        for module in (traced, neighbour):
            with pytest.raises(RuntimeError, match=f"status={status}"):
                module(X)
    else:
        traced(X)


def test_a_fault_can_go_away_by_itself_or_stay(machine, tn):
    traced = tn.trace(Net(), X)
    tn.set_neuron_cores(traced, 0, 1)
    machine.fail(0, 7, times=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="status=7"):
            traced(X)
    traced(X)
    machine.fail(0, 1, times=None, message="of its own")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="status=1 message=of its own"):
            traced(X)


def test_bad_values_are_found_by_the_device(tn):
    root = tn.trace(Net(torch.sqrt), X)
    with fails_in_torchscript("Failed to execute the model status=1003 message=Numerical Error"):
        root(-X - 1)
    root(X)
    look = tn.trace(nn.Embedding(10, 4), torch.zeros(2, dtype=torch.int64))
    with fails_in_torchscript("Failed to execute the model status=1006 message=Execution Out-Of-Bounds Memory Access"):
        look(torch.tensor([1, 10]))
    look(torch.tensor([1, 9]))


def test_a_device_does_not_see_the_callers_modes(tn):
    traced = tn.trace(nn.Linear(3, 3).eval(), X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert traced(X).dtype == torch.float32
    assert not traced(X).requires_grad
