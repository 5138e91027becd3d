"""The machine under the doubles: cores belong to one process at a time, and the machine says to whom."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import doubles
import pytest

START = """
import os, sys
from doubles import machine

def count():
    try:
        return len(machine.start())
    except RuntimeError as error:
        return str(error)

print(count(), flush=True)
"""
HOLD = START + "print(machine.visible, flush=True); sys.stdin.read()"
REFUSED = "The PyTorch Neuron Runtime could not be initialized."
FORK = """
if os.fork() == 0:
    print(count(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.fixture
def root(tmp_path):
    doubles.build(tmp_path / "machine", cores=16, cores_per_chip=4, family="inf1")
    return tmp_path / "machine"


def process(root, script, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEURON")}
    paths = {"PYTHONPATH": str(doubles.HERE.parent), "DOUBLE_NEURON_DIR": str(root), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**kept, **paths, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def holder(root, **environment):
    """A process that has cores, as the machine numbers them."""
    other = process(root, HOLD, **environment)
    try:
        other.stdout.readline()
        yield other, json.loads(other.stdout.readline())
    finally:
        other.communicate(timeout=600)


def ended(root, script=START, **environment):
    output, log = process(root, script, **environment).communicate(timeout=600)
    return output.splitlines(), log.strip()


def neuron_ls(root):
    tool = root / "opt/aws/neuron/bin/neuron-ls"
    return json.loads(subprocess.run([tool, "-j"], check=True, capture_output=True, text=True, timeout=600).stdout)


def test_cores_belong_to_one_process_until_it_ends(root):
    with holder(root, NEURON_RT_VISIBLE_CORES="0-6") as (_, cores):
        assert cores == list(range(7))
        output, log = ended(root)
        assert output == [REFUSED]
        assert log == "ERROR  NRT:nrt_allocate_neuron_cores NeuronCore(s) not available - Requested:16 Available:9"
        output, log = ended(root, NEURON_RT_VISIBLE_CORES="6-7")
        assert output == [REFUSED]
        assert log.endswith("not available - Requested:nc6-nc7 Available:1")
        with holder(root, NEURON_RT_VISIBLE_CORES="7-15") as (_, others):
            assert others == list(range(7, 16))
    assert ended(root) == (["16"], "")


def test_a_number_of_cores_is_found_where_they_are_free(root):
    with holder(root, NEURON_RT_VISIBLE_CORES="2-3"), holder(root, NEURON_RT_NUM_CORES="4") as (_, cores):
        assert cores == [4, 5, 6, 7]
        with holder(root, NEURON_RT_NUM_CORES="2") as (_, more):
            assert more == [0, 1]
        assert ended(root, NEURON_RT_NUM_CORES="9")[0] == [REFUSED]
    assert ended(root, NEURON_RT_NUM_CORES="17")[1].endswith("Requested:17 Available:16")


def test_neuron_ls_names_who_has_the_cores(root):
    with holder(root, NEURON_RT_VISIBLE_CORES="3-4") as (other, _):
        devices = neuron_ls(root)
    assert [device["nc_count"] for device in devices] == [4, 4, 4, 4]
    assert devices[1]["neuroncore_ids"] == [4, 5, 6, 7]
    assert [[each["pid"] for each in device["neuron_processes"]] for device in devices] == [[other.pid]] * 2 + [[]] * 2
    assert not any(device["neuron_processes"] for device in neuron_ls(root))


def test_the_machine_shows_its_devices(root):
    assert sorted(os.listdir(root / "dev")) == ["neuron0", "neuron1", "neuron2", "neuron3"]
    counts = Path(root / "sys/devices/virtual/neuron_device").glob("neuron*/core_count")
    assert [int(path.read_text()) for path in counts] == [4] * 4


def test_a_forked_process_cannot_use_the_runtime(root):
    assert ended(root, START + FORK)[0] == ["16", "Incompatible runtime state: NRT_STATE_CHILD"]
    late = START.replace("print(count(), flush=True)", "") + FORK + "print(count())"
    assert ended(root, late)[0] == ["16", "16"]  # forked before the first use, one after the other


def test_the_environment_overrides_the_machine(root):
    script = START + "print(machine.config.service_time, machine.config.data_parallel_bugs, machine.config.family)"
    output, _ = ended(root, script, DOUBLE_NEURON_SERVICE_TIME="0.5", DOUBLE_NEURON_DATA_PARALLEL_BUGS="0")
    assert output == ["16", "0.5 False inf1"]


def test_a_process_finds_the_package_by_its_path_alone(root):
    script = "import torch, torch_neuronx; print(torch.classes.neuron.Runtime().get_nc_count())"
    assert ended(root, script, PYTHONPATH=str(doubles.HERE / "neuronx"))[0] == ["16"]
