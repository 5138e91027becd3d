"""`aneuron info`: what it asks, what it prints, and that it goes on where a backend cannot answer."""

import json
import sys

import pytest
import torch
from fake_cuda import FakeCuda

import aneuron
from aneuron.backends import cpus, graphs
from aneuron.cli import main


class NeuronBackend:
    """Twelve cores of an inf2.24xlarge."""

    def report(self):
        return {"found": True, "cores": 12, "why": "6 chips", "lacks": [], "takes": "traced models"}


class Broken:
    def report(self):
        raise OSError("/dev/neuron0: permission denied")


class Poor:
    def report(self):
        lacks = ["the driver: https://example.org/a-long-address-that-is-not-broken", "a package " + "word " * 30]
        return {"found": False, "cores": 0, "why": "no device file", "lacks": lacks}


class Silent:
    pass


@pytest.fixture
def asked(monkeypatch, capsys):
    """What the command prints, with this as the Neuron backend."""

    def ask(*arguments, neuron=None, columns="120"):
        monkeypatch.setenv("COLUMNS", columns)
        if neuron is not None:
            monkeypatch.setattr(aneuron, "NeuronBackend", neuron, raising=False)
        else:
            monkeypatch.delattr(aneuron, "NeuronBackend", raising=False)
        assert main(["info", *arguments]) == 0
        return capsys.readouterr().out

    return ask


def test_every_backend_has_a_line(asked, monkeypatch):
    FakeCuda(monkeypatch, devices=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(graphs, "is_installed", {"openvino": True, "onnxruntime": False}.__getitem__)
    monkeypatch.setattr(graphs, "_version", lambda package: " 2026.4.1")
    monkeypatch.setattr(cpus, "available", lambda: cpus.Cpus(3, "three CPUs", False))
    lines = asked(neuron=NeuronBackend).splitlines()
    assert lines[0] == f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    assert lines[2] == "backend    found  cores"
    assert lines[3] == "neuron     yes       12  6 chips"
    assert lines[4] == f"cuda       yes        2  2 devices, PyTorch {torch.__version__}"
    assert lines[5] == "cpu        yes        3  three CPUs"
    assert lines[6:8] == [
        "openvino   yes        3  OpenVINO 2026.4.1; three CPUs",
        "onnx       no         0  ONNX Runtime is not installed",
    ]
    assert lines[8] == "                         lacks: ONNX Runtime: pip install 'aneuron[onnx]'"
    assert lines[9].startswith("simulated  yes        4  timing and faults")
    assert lines[11:] == [
        'backend="auto" takes for',
        "  a callable: cpu",
        "  an nn.Module: an error: trace it for NeuronCores, or say backend='cpu'",
        "  a model traced for Neuron: neuron",
        "  an ONNX file: openvino",
        "  an OpenVINO file: openvino",
    ]


@pytest.mark.parametrize("neuron", [None, NeuronBackend, Broken, Poor, Silent])
def test_json_says_the_same(asked, neuron):
    answer = json.loads(asked("--json", neuron=neuron))
    assert list(answer["backends"]) == ["neuron", "cuda", "cpu", "openvino", "onnx", "simulated"]
    for backend in answer["backends"].values():
        assert {name: type(value) for name, value in backend.items() if name != "takes"} == {
            "found": bool, "cores": int, "why": str, "lacks": list,
        }  # fmt: skip
    assert answer["backends"]["neuron"]["found"] is (neuron is NeuronBackend)
    assert answer["auto"]["neuron"] == ("neuron" if neuron is NeuronBackend else None)
    assert answer["torch"] == torch.__version__
    for name, backend in answer["backends"].items():
        assert f"{name:<9}  {'yes' if backend['found'] else 'no':<5}  {backend['cores']:>5}  " in asked(neuron=neuron)


def test_a_backend_that_cannot_answer_is_not_found(asked):
    said = asked(neuron=Broken)
    assert "neuron     no         0  looking for it failed: OSError: /dev/neuron0: permission denied\n" in said
    assert "a model traced for Neuron: an error: no NeuronCore" in said
    assert "neuron     no         0  not in this version of aneuron\n" in asked(neuron=Silent)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_long_lines_are_folded_under_their_column(asked, columns):
    said = asked(neuron=Poor, columns=str(columns))
    lines = said.splitlines()
    first = lines.index("neuron     no         0  no device file")
    folded = lines[first + 1 : next(n for n, line in enumerate(lines) if line.startswith("cuda"))]
    assert all(line.startswith(" " * 25) and line[25] != " " for line in folded)
    assert all(len(line) <= columns or "https://" in line for line in folded)
    assert " ".join(" ".join(folded).split()) == " ".join(
        " ".join(f"lacks: {each}" for each in Poor().report()["lacks"]).split()
    )
    assert (len(folded) == 2) is (columns == 200)


def test_where_no_console_answers_it_says_so(capsys):
    assert main(["info", "http://127.0.0.1:9/console"]) == 1
    assert "no console answers at http://127.0.0.1:9/console" in capsys.readouterr().out
    assert main(["info", "nowhere"]) == 1
    assert "pass its address, as http://127.0.0.1:8000/console" in capsys.readouterr().out
