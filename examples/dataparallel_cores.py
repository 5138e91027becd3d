"""Chosen cores: the model on the cores that `device_ids` names, and on no other.

Before:  model = torch_neuronx.DataParallel(traced, device_ids=["nc:0", "nc:1"])    y = model(x)
After:   model = AsyncDataParallel(traced, device_ids=["nc:0", "nc:1"], ...)       y = await model(x)
"""

import asyncio
import warnings

import torch
from torch import nn

from aneuron import AsyncDataParallel, CpuBackend

# Four virtual cores stand in for an accelerator's, so that this runs anywhere.
CORES = CpuBackend(cores=4)


def network() -> nn.Module:
    """A small image classifier; any traced module is served the same way."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 10),
    ).eval()


async def main() -> None:
    plain = network()
    image = torch.rand(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace` is")  # TorchScript's end
        traced = torch.jit.trace(plain, image)

    # model = torch_neuronx.DataParallel(traced, device_ids=["nc:0", "nc:1"]); the same as device_ids=[0, 1]
    async with AsyncDataParallel(traced, device_ids=["nc:0", "nc:1"], backend=CORES, example_inputs=image) as model:
        images = torch.rand(5, 3, 64, 64)
        scores = await model(images)
        torch.testing.assert_close(scores, plain(images).detach())
        used = [core.id for core in model.statistics().cores]
        assert used == [0, 1], used
        print(f"{len(images)} images in, {len(scores)} results out, equal to the plain model's")
        print(f"cores used: {used}, of the four that this process sees")


if __name__ == "__main__":
    asyncio.run(main())
