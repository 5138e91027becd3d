"""What is given as a model, on its way to another process."""

import os
import pickle
import subprocess
import sys
import threading
import types
from functools import partial

import pytest
import torch

from aneuron.remote.control import Fd
from aneuron.remote.sources import Source, digest, is_factory

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


class Net(torch.nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.layer = torch.nn.Linear(size, size)
        self.names = {"one", "two", "three", "four"}

    def forward(self, x):
        return self.layer(x)


def double(x):
    return 2 * x


def make():
    return Net().eval()


def make_by_size():
    return {1: Net(), 8: Net()}


instance = Net()
of_eight = partial(Net, 8)


def crossed(source):
    """As it arrives at the other side of a channel."""
    saved = Fd(os.dup(source.saved.fileno())) if source.saved is not None else None
    rest = {name: value for name, value in vars(source).items() if name != "saved"}
    return Source(saved=saved, **pickle.loads(pickle.dumps(rest)))


def weights(model):
    return [each.detach().clone() for each in model.parameters()]


# Modules.


def test_a_module_arrives_as_it_is():
    net = Net().eval()
    x = torch.randn(2, 4)
    there = crossed(Source.of(net)).open()
    assert isinstance(there, Net)
    assert not there.training
    assert torch.equal(there(x), net(x))


@ON_LINUX
def test_weights_are_pages_of_one_file_and_copied_where_they_are_written_to():
    source = Source.of(Net(512))
    one, other = source.open(), crossed(source).open()
    with torch.no_grad():
        one.layer.weight.zero_()
    assert not torch.equal(one.layer.weight, other.layer.weight)
    assert torch.equal(other.layer.weight, source.open().layer.weight)
    with open("/proc/self/maps") as file:
        assert any("memfd:aneuron-model" in line for line in file)


def test_models_by_size_share_what_they_shared():
    net = Net()
    there = crossed(Source.of({1: net, 8: net, 16: make()})).open()
    assert there[1] is there[8]
    assert there[16] is not there[1]


@pytest.mark.parametrize(
    "model", [double, of_eight, torch.neg, instance.forward, torch.jit.trace(Net().eval(), torch.zeros(1, 4))]
)
def test_what_else_pickle_takes(model):
    x = torch.randn(1, 4)
    there = crossed(Source.of(model)).open()
    assert callable(there)
    if model is not of_eight:
        assert torch.equal(there(x), model(x))


def test_an_exported_program():
    net = Net().eval()
    program = torch.export.export(net, (torch.zeros(2, 4),))
    source = Source.of(program, fingerprint=True)
    assert Source.of(program, fingerprint=True).fingerprint == source.fingerprint
    there = crossed(source).open()
    x = torch.randn(2, 4)
    assert torch.allclose(there.module()(x), net(x))


@pytest.mark.parametrize("given", [lambda x: x, {1: double, 8: lambda x: x}])
def test_what_cannot_be_pickled_says_so_and_what_to_do(given):
    with pytest.raises(TypeError, match=r"(?s)model=.*lambda.* cannot be pickled .*'module:attribute'"):
        Source.of(given)


def test_a_module_that_holds_a_lock_says_why():
    net = Net()
    net.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot be pickled \(TypeError: cannot pickle '_thread.lock' object\)"):
        Source.of(net)


def test_what_is_defined_in_the_program_itself_is_seen(monkeypatch):
    assert not Source.of(Net()).needs_main
    monkeypatch.setattr(Net, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Net", Net, raising=False)
    assert Source.of(Net()).needs_main


# Paths.


def test_a_path_means_the_same_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pt").write_bytes(b"weights")
    source = Source.of("net.pt")
    monkeypatch.chdir("/")
    assert crossed(source).open() == str(tmp_path / "net.pt")
    assert Source.of({1: tmp_path / "net.pt", 8: double}).open() == {1: str(tmp_path / "net.pt"), 8: double}


def test_a_file_that_was_replaced_is_not_loaded(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"weights")
    source = Source.of(path)
    path.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"net.pt'?: the file was replaced since the model was given; .*swap"):
        source.open()


def test_what_is_no_file_is_left_to_the_backend():
    assert Source.of("hub://bert").open() == "hub://bert"
    assert Source.of("no-such-file.pt").open() == "no-such-file.pt"


# Import strings.


@pytest.fixture
def module(tmp_path, monkeypatch):
    made = types.ModuleType("nets_of_a_test")
    vars(made).update(Net=Net, make=make, double=double, instance=instance, of_eight=of_eight, sizes=make_by_size)
    made.space = types.SimpleNamespace(make=make)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.mark.parametrize(
    ("attribute", "kind"),
    [("Net", Net), ("make", Net), ("instance", Net), ("of_eight", Net), ("space.make", Net), ("sizes", dict)],
)
def test_an_import_string_is_called_if_it_makes_the_model(module, attribute, kind):
    assert isinstance(crossed(Source.of(f"nets_of_a_test:{attribute}", fingerprint=True)).open(), kind)


def test_an_import_string_of_a_function_is_the_model(module):
    assert Source.of("nets_of_a_test:double").open() is double
    assert Source.of({1: "nets_of_a_test:double"}).open() == {1: double}


def test_a_factory_is_called_without_arguments_only():
    assert is_factory(lambda size=3: None)
    assert is_factory(lambda **options: None)
    assert not is_factory(lambda *inputs: None)
    assert not is_factory(lambda x, size=3: None)
    assert not is_factory(torch.neg)
    assert not is_factory("text")


@pytest.mark.parametrize("text", ["nets_of_a_test:nothing", "no_such_module_here:make", "nets_of_a_test:make.it"])
def test_an_import_string_that_names_nothing(module, text):
    with pytest.raises(ValueError, match=f"model='{text}': .*'module:attribute'"):
        Source.of(text).open()


def test_a_file_with_a_colon_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net:pt").write_bytes(b"")
    assert Source.of("net:pt").open() == str(tmp_path / "net:pt")


# Telling one from another.

NET = """
import sys, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.tied = self.layer
        self.names = {"one", "two", "three", "four", "".join(["fi", "ve"])}
        self.register_buffer("kept", torch.ones(2), persistent=False)
        self.register_buffer("kept_too", torch.ones(2), persistent=False)
        self.register_buffer("kept_as_well", torch.ones(2), persistent=False)
"""
PRINT = """
import torch
from nets_in_a_file import Net
from aneuron import Buckets, CpuBackend
from aneuron.remote.sources import Source, digest
torch.manual_seed(0)
net = Net()
print(Source.of(net, fingerprint=True).fingerprint)
torch.manual_seed(0)
print(Source.of(torch.jit.trace(torch.nn.Linear(2, 2).eval(), torch.ones(1, 2)), fingerprint=True).fingerprint)
print(digest({"buckets": Buckets(dim=1, sizes=(4, 8)), "backend": CpuBackend(2), "outputs": {"a": "whole"}}))
with torch.no_grad():
    net.layer.bias[0] += 1
print(Source.of(net, fingerprint=True).fingerprint)
"""


def test_fingerprints_are_the_same_in_every_process(tmp_path, monkeypatch, capsys):
    """Here, and in one whose sets have another order."""
    (tmp_path / "nets_in_a_file.py").write_text(NET)
    path, seed = os.pathsep.join([str(tmp_path), *sys.path]), "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-W", "ignore", "-c", PRINT]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        monkeypatch.syspath_prepend(str(tmp_path))
        exec(PRINT, {})
        here = capsys.readouterr().out.split()
        assert len(set(here)) == 4
        assert process.communicate()[0].split() == here


def test_fingerprints_tell_apart():
    def mark(model):
        return Source.of(model, fingerprint=True).fingerprint

    net = Net()
    before = mark(net)
    assert mark(net) == before
    net.layer.eps = 1.0
    assert mark(net) != before
    assert mark(double) != mark(make)
    assert mark({1: double}) != mark({2: double})
    assert digest((1, 2)) != digest([1, 2])
    assert digest({1, 2}) != digest([1, 2])
    assert digest(torch.ones(2)) == digest(torch.ones(2).clone())
    assert digest(torch.ones(2)) != digest(torch.ones(2, 1))


def test_the_same_path_with_another_content_differs(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"weights")
    before = Source.of(path, fingerprint=True).fingerprint
    assert Source.of(path, fingerprint=True).fingerprint == before
    path.write_bytes(b"other weights")
    assert Source.of(path, fingerprint=True).fingerprint != before
