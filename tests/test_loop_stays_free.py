"""The loop thread handles integers and references; tensors are worked on elsewhere, and big ones are not held twice."""

import os
import subprocess
import sys
import textwrap

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aneuron import AsyncDataParallel, CpuBackend


class Recorder(TorchDispatchMode):
    """Notes every tensor operation of the thread that has entered it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_recorder_sees_what_it_should():
    with Recorder() as recorder:
        torch.ones(2).split(1)
    assert any("split" in name for name in recorder.seen)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("kind", ["one row", "many rows", "nested", "array", "requires grad", "not contiguous"])
async def test_no_tensor_operation_runs_on_the_loop_thread(kind, batch_size):
    x = torch.randn(1 if kind == "one row" else 100, 64)
    inputs = {
        "nested": {"a": [x, (x, {"b": x.numpy()})], "c": 3},
        "array": numpy.asfortranarray(x.numpy())[::-1],
        "requires grad": x.clone().requires_grad_(),
        "not contiguous": torch.randn(64, 100).t(),
    }.get(kind, x)

    def model(value):
        return {"y": value["a"][0] * 2} if isinstance(value, dict) else value * 2

    async with AsyncDataParallel(model, backend=CpuBackend(cores=2), batch_size=batch_size) as parallel:
        with Recorder() as recorder:
            result = await parallel(inputs)
    assert recorder.seen == []
    result = result["y"] if isinstance(result, dict) else result
    expected = (
        torch.from_numpy(inputs.copy())
        if kind == "array"
        else x
        if kind in ("nested", "one row", "many rows")
        else inputs
    )
    assert torch.equal(result, expected.detach() * 2)


def test_a_large_input_is_held_once_more_for_the_result_and_no_more():
    program = """
        import asyncio, resource, torch, aneuron
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**18
        async def main():
            backend = aneuron.CpuBackend(cores=2)
            async with aneuron.AsyncDataParallel(torch.neg, backend=backend, batch_size=8) as model:
                await model(torch.ones(8, 2**18))
                x = torch.ones(256, 2**18)
                before = peak()
                y = await model(x)
                assert y.shape == x.shape and y[-1, -1] == -1 and y[0, 0] == -1
                print(peak() - before)
        asyncio.run(main())
    """
    # Pieces go back to the system at once, as larger ones of larger inputs do.
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.4  # times the input, of 256 MiB; the result is one
