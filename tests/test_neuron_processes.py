"""Processes that share a machine's NeuronCores, each with its own view of them. Real processes, on the double."""

import contextlib
import multiprocessing
from pathlib import Path

import doubles
import neuron_process
import pytest

pytestmark = pytest.mark.xdist_group("neuron processes")  # forked from one that has imported torch
DOUBLES = Path(__file__).parent / "doubles"


@pytest.fixture(scope="module")
def context():
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["aneuron"])
    return made


class Process:
    """A process on the machine."""

    def __init__(self, context, root, package="torch_neuronx", **environ):
        path = DOUBLES / {"torch_neuronx": "neuronx", "torch_neuron": "neuron"}[package]
        environ |= {"DOUBLE_NEURON_DIR": str(root)}
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=neuron_process.run, args=(theirs, package, str(path), environ))
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self.count, self.taken = self._ours.recv()

    def use(self, *ids):
        """Run a model on these device ids; the machine's numbers of the cores that it ran on, or the error."""
        return self.ask(list(ids) or None)

    def ask(self, what):
        self._ours.send(what)
        return self._ours.recv()

    def kill(self):
        self._process.kill()
        self._process.join()
        self._ours.close()


@pytest.fixture
def processes(context):
    with contextlib.ExitStack() as stack:

        def start(*args, **environ):
            process = Process(context, *args, **environ)
            stack.callback(process.kill)
            return process

        yield start


def test_an_inf1_6xlarge_as_the_seeds_have_it(tmp_path, processes):
    """Four chips of four cores."""
    root = tmp_path / "machine"
    doubles.build(root, cores=16, cores_per_chip=4, family="inf1")

    def chip_and_core(cores):
        return [divmod(core, 4) for core in cores]

    alone = processes(root, "torch_neuron")
    assert (alone.count, alone.taken) == (16, None)  # counted, not taken
    assert chip_and_core(alone.use("nc:0")) == [(0, 0)]
    assert chip_and_core(alone.use("nc:14")) == [(3, 2)]
    alone.kill()
    first = processes(root, "torch_neuron", NEURON_RT_VISIBLE_CORES="0-6")
    second = processes(root, "torch_neuron", NEURON_RT_VISIBLE_CORES="7-15")
    assert (first.count, second.count) == (7, 9)
    for process in (first, second):
        refused = process.use("nc:14")
        assert refused.startswith("DeviceError: device ids [14] are outside the cores that this process sees")
    assert chip_and_core(second.use("nc:7")) == [(3, 2)]
    assert chip_and_core(first.use("nc:0")) == [(0, 0)]
    assert chip_and_core(second.use("nc:0")) == [(1, 3)]
    assert first.use() == list(range(7))
    assert second.use() == list(range(7, 16))


def test_an_inf2_48xlarge_in_two_halves(tmp_path, processes):
    """Twelve chips of two cores. A process that finds its cores taken says by whom; they are free when that ends."""
    root = tmp_path / "machine"
    doubles.build(root, cores=24, cores_per_chip=2)
    first = processes(root, NEURON_RT_VISIBLE_CORES="0-11")
    second = processes(root, NEURON_RT_VISIBLE_CORES="12-23")
    assert first.use("nc:0", "nc:11") == [0, 11]
    assert second.use(1) == [13]
    assert second.use(13).startswith("DeviceError: device ids [13] are outside")
    for process in (first, second):
        assert process.use(12).startswith("DeviceError: device ids [12] are outside")
    third = processes(root, NEURON_RT_VISIBLE_CORES="10-11")
    refused = third.use()
    assert refused.startswith("DeviceError: core 0 could not load the model: ")
    assert "could not be initialized" in refused
    assert "cores 10-11 of the machine, which this process asks for, are used by pid " in refused
    assert f"pid {first.pid} (" in refused
    assert f"pid {second.pid} (" not in refused
    assert "NEURON_RT_NUM_CORES" in refused
    first.kill()
    assert third.use() == [10, 11]
    assert second.use() == list(range(12, 24))


def test_a_number_of_cores_takes_what_is_free(tmp_path, processes):
    root = tmp_path / "machine"
    doubles.build(root, cores=4, cores_per_chip=2)
    first = processes(root, NEURON_RT_NUM_CORES="3")
    second = processes(root, NEURON_RT_NUM_CORES="2")
    assert first.use() == [0, 1, 2]
    refused = second.use()
    assert "the machine's cores are used by pid " in refused
    assert f"pid {first.pid} (" in refused
    first.kill()
    assert second.use() == [0, 1]


def test_a_forked_process_is_told(tmp_path, processes):
    root = tmp_path / "machine"
    doubles.build(root, cores=2, cores_per_chip=2)
    process = processes(root)
    texts = process.ask("fork")
    assert len(texts) == 3
    for text in texts:
        assert f"started in process {process.pid}, and this is its child" in text
        assert "spawn" in text
    assert process.use(1) == [1]  # the parent goes on
