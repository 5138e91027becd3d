"""Which NeuronCores a process sees: the environment's spellings, device files, sysfs, neuron-ls, and which package."""

import json
import os
import sys
import types

import pytest
import torch

from aneuron import DeviceError
from aneuron.backends.neuron import cores, machine
from aneuron.backends.neuron.cores import Found, asked, count, found, global_id, package, parse_cores, taken_by
from aneuron.backends.neuron.machine import Holder, chips, count_cores, holders, neuron_ls, spelled


@pytest.fixture(autouse=True)
def not_started(monkeypatch):
    monkeypatch.setattr(cores, "_started", None)
    for name in list(os.environ):
        if name.startswith("NEURON"):
            monkeypatch.delenv(name)


def build(root, per_chip, devices=None, numbers=None):
    """A machine's files: `per_chip` cores on each chip (None: sysfs does not say), `devices` what neuron-ls prints."""
    (root / "dev").mkdir()
    (root / "dev" / "null").touch()
    for chip, number in zip(numbers or range(len(per_chip)), per_chip, strict=True):
        (root / "dev" / f"neuron{chip}").touch()
        device = root / "sys/devices/virtual/neuron_device" / f"neuron{chip}"
        device.mkdir(parents=True)
        if number is not None:
            (device / "core_count").write_text(f"{number}\n")
    if devices is not None:
        tool = root / "opt/aws/neuron/bin/neuron-ls"
        tool.parent.mkdir(parents=True)
        text = devices if isinstance(devices, str) else json.dumps(devices)
        tool.write_text(f"#!/bin/sh\n[ \"$1\" = --json-output ] || exit 1\ncat <<'END'\n{text}\nEND\n")
        tool.chmod(0o755)
    return root


# The environment.


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("3", (3,)),
        ("0", (0,)),
        ("3-6", (3, 4, 5, 6)),
        ("3-3", (3,)),
        ("3,4,5", (3, 4, 5)),
        ("3-5,6", (3, 4, 5, 6)),
        ("3,4-6,7", (3, 4, 5, 6, 7)),
        (" 3 - 5 , 6 ", (3, 4, 5, 6)),
        ("007", (7,)),
        ("0-23", tuple(range(24))),
        ("", ()),
        (" ", ()),
    ],
)
def test_the_spellings_of_visible_cores(text, ids):
    assert parse_cores(text) == ids


@pytest.mark.parametrize(
    "text",
    ["3,5,6", "2,3,5", "4,3", "6-3", "3,3", "3-5,5", "-1", "3-", "-3", "3,", ",3", "3,,4", "a", "nc:3", "3.0", "3;4",
     "0x3", "٣", "9999999", "1" * 5000],
)  # fmt: skip
def test_what_the_runtime_refuses_is_refused_with_the_value(text):
    with pytest.raises(DeviceError, match="NEURON_RT_VISIBLE_CORES=") as refused:
        parse_cores(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "ids", "number"),
    [
        ({}, None, None),
        ({"NEURON_RT_NUM_CORES": "4"}, None, 4),
        ({"NEURON_RT_NUM_CORES": " 4 "}, None, 4),
        ({"NEURON_RT_NUM_CORES": "0"}, None, None),
        ({"NEURON_RT_NUM_CORES": ""}, None, None),
        ({"NEURON_RT_VISIBLE_CORES": "2-3"}, (2, 3), 2),
        ({"NEURON_RT_VISIBLE_CORES": "2-3", "NEURON_RT_NUM_CORES": "8"}, (2, 3), 2),
        ({"NEURON_RT_VISIBLE_CORES": ""}, (), 0),  # Ray's way to say none
        ({"NEURONCORE_GROUP_SIZES": "4"}, None, None),  # obsolete
    ],
)
def test_what_the_environment_asks_for(environ, ids, number):
    wish = asked(environ)
    assert (wish.cores, wish.number) == (ids, number)


@pytest.mark.parametrize("text", ["-1", "two", "1.5", "1 2"])
def test_a_number_of_cores_that_is_none(text):
    with pytest.raises(DeviceError, match=f"NEURON_RT_NUM_CORES='{text}'"):
        asked({"NEURON_RT_NUM_CORES": text})


@pytest.mark.parametrize(
    ("environ", "core", "number"),
    [
        ({}, 14, 14),
        ({"NEURON_RT_VISIBLE_CORES": "0-6"}, 0, 0),
        ({"NEURON_RT_VISIBLE_CORES": "0-6"}, 7, None),
        ({"NEURON_RT_VISIBLE_CORES": "7-15"}, 0, 7),
        ({"NEURON_RT_VISIBLE_CORES": "7-15"}, 7, 14),
        ({"NEURON_RT_VISIBLE_CORES": "12-23"}, 1, 13),
        ({"NEURON_RT_NUM_CORES": "4"}, 0, None),  # the runtime chooses which
    ],
)
def test_the_machines_number_of_a_core(environ, core, number):
    assert global_id(core, environ) == number


# The machine.


def test_the_chips_are_those_with_a_device_file(tmp_path):
    build(tmp_path, [2, 2, 2], numbers=[0, 2, 11])
    (tmp_path / "dev" / "neuronx").touch()
    (tmp_path / "sys/devices/virtual/neuron_device/neuron1").mkdir()  # of the host, not of this container
    (tmp_path / "sys/devices/virtual/neuron_device/neuron1/core_count").write_text("2")
    assert chips(tmp_path) == [0, 2, 11]
    assert count_cores(tmp_path, {}) == 6
    assert chips(tmp_path / "nowhere") == []
    assert count_cores(tmp_path / "nowhere", {}) is None


@pytest.mark.parametrize(
    ("per_chip", "total"),
    [([4] * 4, 16), ([2] * 12, 24), ([2], 2), ([4], 4)],
    ids=["inf1.6xlarge", "inf2.48xlarge", "trn1.2xlarge", "inf1.xlarge"],
)
def test_cores_are_counted_in_sysfs(tmp_path, per_chip, total):
    assert count_cores(build(tmp_path, per_chip), {}) == total


@pytest.mark.parametrize(("chips", "two_in_one", "physical"), [(1, 4, 8), (4, 16, 32), (16, 64, 128)])
def test_the_chips_of_trn2_and_trn3_have_eight_cores(tmp_path, chips, two_in_one, physical):
    """trn2.3xlarge and trn3.3xlarge; a server of a Trn3 Gen2 UltraServer; trn2.48xlarge, and one of Trn3 Gen1."""
    build(tmp_path, [8] * chips)
    assert count_cores(tmp_path, {}) == two_in_one
    assert count_cores(tmp_path, {"NEURON_LOGICAL_NC_CONFIG": "1"}) == physical


def test_cores_are_counted_by_their_directories(tmp_path):
    build(tmp_path, [None])
    for core in range(2):
        (tmp_path / f"sys/devices/virtual/neuron_device/neuron0/neuron_core{core}").mkdir()
    assert count_cores(tmp_path, {}) == 2


@pytest.mark.parametrize(
    ("lnc", "with_tool", "without"), [("1", 8, 8), ("2", 4, 4), (None, 8, 4), ("3", 8, 4)]
)  # fmt: skip
def test_physical_cores_make_up_logical_ones(tmp_path, lnc, with_tool, without):
    environ = {} if lnc is None else {"NEURON_LOGICAL_NC_CONFIG": lnc}
    (tmp_path / "a").mkdir()
    build(tmp_path / "a", [8])  # trn2.3xlarge
    assert count_cores(tmp_path / "a", environ) == without  # two in one is the runtime's default
    (tmp_path / "b").mkdir()
    build(tmp_path / "b", [8], [{"neuron_device": 0, "nc_count": 8, "logical_neuroncore_config": 1}])
    assert count_cores(tmp_path / "b", environ) == with_tool  # the machine's default is one


def test_neuron_ls_counts_where_sysfs_does_not(tmp_path):
    build(tmp_path, [None, None], [{"nc_count": 4}, {"nc_count": 4}])
    assert count_cores(tmp_path, {}) == 8


@pytest.mark.parametrize("answer", ["", "no devices found", "{}", "[1]", "[" * 100_000], ids=range(5))
def test_a_tool_that_says_something_else_says_nothing(tmp_path, answer):
    build(tmp_path, [None], answer)
    assert neuron_ls(tmp_path) is None
    assert count_cores(tmp_path, {}) is None
    assert holders(tmp_path, None, 0) == []


def test_a_tool_that_fails_says_nothing(tmp_path):
    build(tmp_path, [2], [])
    tool = tmp_path / machine._TOOL
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert neuron_ls(tmp_path) is None
    tool.chmod(0o644)
    assert neuron_ls(tmp_path) is None


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 16),
        ({"NEURON_RT_VISIBLE_CORES": "0-6"}, 7),
        ({"NEURON_RT_VISIBLE_CORES": "7-15"}, 9),
        ({"NEURON_RT_NUM_CORES": "16"}, 16),
        ({"NEURON_RT_NUM_CORES": "3"}, 3),
        ({"NEURON_RT_VISIBLE_CORES": ""}, 0),
    ],
)
def test_the_cores_of_a_process(tmp_path, environ, number):
    assert count(build(tmp_path, [4] * 4), environ)[0] == number


@pytest.mark.parametrize(
    "environ",
    [{"NEURON_RT_VISIBLE_CORES": "7-16"}, {"NEURON_RT_VISIBLE_CORES": "16"}, {"NEURON_RT_NUM_CORES": "17"}],
)
def test_cores_that_the_machine_has_not(tmp_path, environ):
    with pytest.raises(DeviceError, match=r"the machine has 16 cores, 0 to 15, in 4 chips"):
        count(build(tmp_path, [4] * 4), environ)


def test_a_container_with_some_chips_of_the_machine(tmp_path):
    """Kubernetes's plugin gives a pod a chip's device file, and the machine's numbers of its cores."""
    build(tmp_path, [2, 2], numbers=[5, 6])
    assert count(tmp_path, {"NEURON_RT_VISIBLE_CORES": "10-11"}) == (2, "NEURON_RT_VISIBLE_CORES=10-11")
    assert found(tmp_path, {"NEURON_RT_VISIBLE_CORES": "10-11"}).why.startswith("2 chips, but")  # not its numbers
    assert count(tmp_path, {}) == (4, "all cores of the machine")
    with pytest.raises(DeviceError, match="NEURON_RT_NUM_CORES=5: the machine has 4 cores"):
        count(tmp_path, {"NEURON_RT_NUM_CORES": "5"})
    assert global_id(1, {"NEURON_RT_VISIBLE_CORES": "10-11"}, tmp_path) == 11
    assert global_id(1, {}, tmp_path) is None


def test_the_environment_counts_where_nothing_else_does(tmp_path):
    assert count(tmp_path, {}) == (None, "all cores of the machine")
    assert count(tmp_path, {"NEURON_RT_VISIBLE_CORES": "12-23"}) == (12, "NEURON_RT_VISIBLE_CORES=12-23")


# Who holds them.


PROCESSES = [
    {"neuron_device": 0, "nc_count": 2, "neuroncore_ids": [0, 1], "neuron_processes": []},
    {
        "neuron_device": 1,
        "nc_count": 2,
        "neuroncore_ids": [2, 3],
        "neuron_processes": [{"pid": 7, "command": "python a.py"}, {"pid": 8}],
    },
    {"neuron_device": 2, "nc_count": 2, "neuron_processes": [{"pid": 9, "command": "python b.py"}, "?", {"pid": "x"}]},
]


@pytest.mark.parametrize(
    ("wanted", "but", "pids"),
    [(None, 0, [7, 8, 9]), ([0], 0, []), ([1, 2], 0, [7, 8]), ([5], 0, [9]), ([3], 7, [8]), ([6], 0, [])],
)
def test_who_holds_cores(tmp_path, wanted, but, pids):
    build(tmp_path, [2] * 3, PROCESSES)
    assert [holder.pid for holder in holders(tmp_path, wanted, but)] == pids


def test_a_holder_in_words(tmp_path):
    assert str(Holder(7, "python a.py", (2, 3))) == "pid 7 (python a.py), on the chip with cores 2-3"
    build(tmp_path, [2] * 3, PROCESSES)
    assert taken_by(tmp_path, {"NEURON_RT_VISIBLE_CORES": "2-3"}) == (
        "cores 2-3 of the machine, which this process asks for, are used by pid 7 (python a.py), on the chip with "
        "cores 2-3; pid 8 (command unknown), on the chip with cores 2-3"
    )
    assert taken_by(tmp_path, {}).startswith("the machine's cores are used by pid 7")
    assert taken_by(tmp_path, {"NEURON_RT_VISIBLE_CORES": "0-1"}) == ""
    assert taken_by(tmp_path, {"NEURON_RT_VISIBLE_CORES": "nonsense"}) == ""
    assert spelled([0, 2, 3, 4, 6, 7]) == "0,2-4,6-7"


# The package.


@pytest.fixture
def install(monkeypatch):
    """Put modules with these attributes in place of whatever is installed."""
    for name in ("torch_neuronx", "torch_neuron"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(torch, "neuron", raising=False)

    def put(name, **attributes):
        module = types.SimpleNamespace(__name__=name, **attributes)
        if name == "torch.neuron":
            monkeypatch.setattr(torch, "neuron", module, raising=False)
        else:
            monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


def test_a_package_is_told_by_what_it_can_do(install):
    assert package().kind == cores.NONE
    legacy = install("torch_neuron", trace=print)
    install("torch.neuron", trace=print, DataParallel=print)  # the old one puts itself there
    assert package() == cores.Package(cores.LEGACY, legacy)
    install("torch_neuronx", NeuronModule=print)  # TorchNeuron has this name, and no trace
    native = install("torch.neuron", device_count=lambda: 2)
    assert package() == cores.Package(cores.NATIVE, native)
    traced = install("torch_neuronx", trace=print)
    assert package() == cores.Package(cores.TRACE, traced)


def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "torch_neuronx.py").write_text("raise OSError('libnrt.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_neuronx", raising=False)
    monkeypatch.setitem(sys.modules, "torch_neuron", None)
    assert package().kind == cores.NONE
    assert "torch_neuronx is installed and cannot be imported (OSError: libnrt.so.1" in package().problem


def test_what_is_found(tmp_path, install):
    nothing = found(tmp_path, {})
    assert (nothing.cores, nothing.package) == (0, cores.NONE)
    assert "/dev/neuron*" in nothing.lacks[0]
    build(tmp_path, [4] * 4)
    without = found(tmp_path, {})
    package = "a Neuron package: torch_neuronx, or torch_neuron for Inf1"
    assert (without.cores, without.lacks) == (0, (package,))
    assert nothing.lacks[1:] == (package,)
    assert without.why.startswith("4 chips, but no Neuron package is installed")
    install("torch_neuronx", trace=print)
    assert found(tmp_path, {}) == Found(16, cores.TRACE, "all cores of the machine")
    assert found(tmp_path, {"NEURON_RT_NUM_CORES": "3"}) == Found(3, cores.TRACE, "NEURON_RT_NUM_CORES=3")
    none = found(tmp_path, {"NEURON_RT_VISIBLE_CORES": ""})
    assert (none.cores, none.lacks) == (0, ("cores for this process",))
    wrong = found(tmp_path, {"NEURON_RT_VISIBLE_CORES": "15-16"})
    assert wrong.cores == 0
    assert "the machine has 16 cores" in wrong.why


def test_what_is_found_where_nothing_counts_the_cores(tmp_path, install):
    build(tmp_path, [None])
    install("torch_neuronx", trace=print)
    assert found(tmp_path, {}).cores == 1  # enough to choose the backend
    assert "only the runtime knows" in found(tmp_path, {}).why


def test_nothing_is_imported_where_there_is_no_device(tmp_path, monkeypatch):
    (tmp_path / "torch_neuronx.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_neuronx", raising=False)
    monkeypatch.setattr(cores, "package", lambda: pytest.fail("asked for the package"))
    assert found(tmp_path, {}).cores == 0
    assert len(found(tmp_path, {}).lacks) == 1  # it is seen, for all that


def test_what_is_found_is_what_the_runtime_goes_by(tmp_path, install, monkeypatch):
    install("torch_neuronx", trace=print)
    build(tmp_path, [2])
    cores.note_start()
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "")  # for a child process that is to have none
    assert found(tmp_path).cores == 2
    monkeypatch.setattr(cores, "_started", None)
    assert found(tmp_path).cores == 0


# The runtime.


def test_a_change_of_the_environment_after_the_start_is_told(monkeypatch):
    monkeypatch.setenv("NEURON_RT_NUM_CORES", "2")
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-1")
    cores.check_environment()  # not started: it may change
    cores.note_start()
    cores.check_environment()
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    cores.check_environment()
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2-3")
    monkeypatch.delenv("NEURON_RT_NUM_CORES")
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    with pytest.warns(UserWarning, match="changed after the Neuron runtime has started") as caught:
        cores.check_environment()
    text = str(caught[0].message)
    assert text.startswith(
        "NEURON_LOGICAL_NC_CONFIG='1', NEURON_RT_NUM_CORES=None, NEURON_RT_VISIBLE_CORES='2-3': changed"
    )
    assert cores.frozen_environment()["NEURON_RT_VISIBLE_CORES"] == "0-1"
    cores.note_start()  # the second model; the runtime started once
    with pytest.warns(UserWarning, match="choose cores by device_ids"):
        cores.check_environment()


def test_a_child_of_the_process_that_started_the_runtime(monkeypatch):
    cores.check_fork()
    cores.note_start()
    cores.check_fork()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(RuntimeError, match=rf"started in process {parent}.*NRT_STATE_CHILD.*spawn"):
        cores.check_fork()
    with pytest.raises(RuntimeError, match="NRT_STATE_CHILD"):
        cores.note_start()


@pytest.mark.parametrize("number", [3, -1])
def test_asking_the_runtime(monkeypatch, number):
    runtime = types.SimpleNamespace(get_nc_count=lambda: number)
    monkeypatch.setitem(vars(torch.classes.neuron), "Runtime", lambda: runtime)
    if number < 0:
        with pytest.raises(RuntimeError, match="could not be initialized"):
            cores.ask(cores.Package(cores.TRACE))
    else:
        assert cores.ask(cores.Package(cores.TRACE)) == number
    assert (cores.frozen_environment() is os.environ) == (number < 0)  # whether it has started


def test_asking_the_native_device(monkeypatch):
    assert cores.ask(cores.Package(cores.NATIVE, types.SimpleNamespace(device_count=lambda: 3))) == 3
    assert cores.frozen_environment() is os.environ  # it has not started
