"""The five programs of the guide to `torch_neuronx.DataParallel`, in its words, beside ours: on doubles of its package.

Where theirs is right, ours gives the same; where theirs is wrong, ours is right. What is compared with is `plain`, the
model on the CPU.
"""

import contextlib
import warnings

import doubles
import pytest
import torch
from puppets import named

from aneuron import AsyncDataParallel, DeviceError, NeuronBackend, ShapeError
from aneuron.backends.neuron import cores

IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Pictures(torch.nn.Module):
    """An image classifier with the parts of a ResNet: convolution, batch norm, a shortcut, pooling."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head((x + self.second(x)).mean((2, 3)))


class Seam(torch.nn.Module):
    """The guide's model for `dim=2`: what each core sees matters where the halves meet."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x) + 1


torch.manual_seed(0)
PICTURES, SEAM = Pictures().eval(), Seam().eval()


@pytest.fixture(params=["torch_neuronx", "torch_neuron"])
def package(request, monkeypatch):
    """The package whose programs these are: today's, and the one for Inf1. Two cores."""
    monkeypatch.setattr(cores, "_started", None)
    flavour = doubles.neuronx if request.param == "torch_neuronx" else doubles.neuron
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(flavour(cores=2))
        module = __import__(request.param)
        module.machine = machine
        yield module


def images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def plain(model, x):
    with torch.no_grad():
        return model(x)


def same(y, expected):
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def trace(package, model, example, dynamic=True):
    """As the guide does it; Inf1's compiler has to be told of batches of other sizes."""
    if package.__name__ == "torch_neuron" and dynamic:
        return package.trace(model, example, dynamic_batch_size=True)
    return package.trace(model, example)


def parallel(package):
    return package.DataParallel if package.__name__ == "torch_neuronx" else torch.neuron.DataParallel


def ours(*args, **kwargs):
    """The same program with the class replaced; the tests have no device files."""
    return AsyncDataParallel(*args, backend=NeuronBackend(root="/nowhere"), **kwargs)


async def answers(model, *batches):
    async with model:
        return [await model(x) for x in batches]


async def test_default_usage(package):
    x = images(5)
    theirs = parallel(package)(trace(package, PICTURES, IMAGE))
    (y,) = await answers(ours(trace(package, PICTURES, IMAGE), batch_size=1), x)
    assert len(y) == 5
    same(y, plain(PICTURES, x))
    same(y, theirs(x))


async def test_default_usage_with_nothing_but_the_model(package):
    """Where nobody says for how many rows it was compiled: the package cuts, and a warning says how to do better."""
    x = images(5)
    model = ours(trace(package, PICTURES, IMAGE))
    with pytest.warns(UserWarning, match="batch_size=") as caught:
        (y,) = await answers(model, x)
    assert sum("batch_size=" in str(each.message) for each in caught) == 1  # for both cores
    same(y, plain(PICTURES, x))


@pytest.mark.parametrize("device_ids", [["nc:0", "nc:1"], [0, 1]], ids=named)
async def test_specifying_neuroncores(package, device_ids):
    x = images(5)
    theirs = parallel(package)(trace(package, PICTURES, IMAGE), device_ids=device_ids)
    model = ours(trace(package, PICTURES, IMAGE), device_ids=device_ids, batch_size=1)
    same(theirs(x), plain(PICTURES, x))
    before = len(package.machine.executions)
    (y,) = await answers(model, x)
    same(y, plain(PICTURES, x))
    assert {each.core for each in package.machine.executions[before:]} == {0, 1}


async def test_a_core_that_the_process_has_not(package):
    model = ours(trace(package, PICTURES, IMAGE), device_ids=["nc:0", "nc:1", "nc:2"], batch_size=1)
    with pytest.raises(DeviceError, match=r"\[2\] are outside the cores that this process sees: 2"):
        await model.start()


async def test_dim_is_not_zero(package):
    example = torch.rand(1, 3, 8, 8)
    x = torch.rand(1, 3, 16, 8)
    halves = torch.cat([plain(SEAM, half) for half in x.chunk(2, dim=2)], dim=2)
    theirs = parallel(package)(trace(package, SEAM, example, dynamic=False), device_ids=[0, 1], dim=2)
    (y,) = await answers(ours(trace(package, SEAM, example, dynamic=False), device_ids=[0, 1], dim=2), x)
    assert y.shape == (1, 3, 12, 6)
    same(y, halves)
    same(theirs(x), halves)


async def test_dim_is_not_zero_and_does_not_divide(package):
    """Theirs loses a row without a word (the facts' scatter-1); ours loses none."""
    x = torch.rand(3, 5)
    theirs = parallel(package)(torch.nn.Identity(), device_ids=[0, 1], dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert theirs(x).shape != x.shape
    async with AsyncDataParallel(torch.nn.Identity().eval(), [0, 1], 1, backend="cpu") as model:
        torch.testing.assert_close(await model(x), x)


async def test_dynamic_batching(package):
    batches = [images(count) for count in (2, 3, 4, 5, 6)]
    theirs = parallel(package)(trace(package, PICTURES, IMAGE))
    for x, y in zip(batches, await answers(ours(trace(package, PICTURES, IMAGE), batch_size=1), *batches), strict=True):
        assert len(y) == len(x)
        same(y, plain(PICTURES, x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            same(y, theirs(x))


@pytest.mark.parametrize("said", ["batch_size", "example_inputs", "nothing"])
async def test_dynamic_batching_disabled(package, said):
    theirs = parallel(package)(trace(package, PICTURES, IMAGE, dynamic=False), device_ids=[0, 1], dim=0)
    theirs.disable_dynamic_batching()
    with pytest.raises(RuntimeError):
        theirs(images(4))
    options = {"batch_size": {"batch_size": 1}, "example_inputs": {"example_inputs": IMAGE}, "nothing": {}}[said]
    model = ours(trace(package, PICTURES, IMAGE, dynamic=False), device_ids=[0, 1], dim=0, **options)
    model.disable_dynamic_batching()
    async with model:
        with pytest.raises(RuntimeError if said == "nothing" else ShapeError) as caught:
            await model(images(4))
        if said != "nothing":  # then the device says it
            assert "4 rows / 2 cores != 1 compiled rows" in str(caught.value)
        x = images(2)
        same(await model(x), plain(PICTURES, x))
        same(theirs(x), plain(PICTURES, x))
