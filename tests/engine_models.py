"""Models that engines import, on the doubles, with what is planned for them in files."""

import os
from pathlib import Path

import torch


def on_neuron():
    """A traced model. The file "lose" beside the machine names a core that is lost soon, once."""
    import torch_neuronx
    from doubles import machine

    traced = torch_neuronx.trace(torch.nn.ReLU().eval(), torch.ones(2, 2))
    plan = Path(os.environ["DOUBLE_NEURON_DIR"]) / "lose"
    own = machine.start()
    try:
        lost = int(plan.read_text())
    except FileNotFoundError:  # nothing is planned, or the engine that it is for has taken it, maybe just now
        return traced
    if lost in own:
        machine.fail(own.index(lost), 101, after=3)
        plan.unlink()
    return traced


class OnNoDevice:
    """What pytest's `monkeypatch` is, for a process that ends with what was patched."""

    setattr = staticmethod(setattr)


def on_cuda():
    """A module, where `torch.cuda` is doubled with as many devices as this process is to see."""
    from fake_cuda import FakeCuda

    FakeCuda(OnNoDevice, len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    return torch.nn.ReLU().eval()
