"""Dynamic batching: batches of any size on a model traced for one image, without recompilation.

Before:  model = torch_neuronx.DataParallel(traced)    y = model(x)
After:   model = AsyncDataParallel(traced, ...)       y = await model(x)
"""

import asyncio
import warnings

import torch
from torch import nn

from aneuron import AsyncDataParallel, CpuBackend

# Two virtual cores stand in for an accelerator's, so that this runs anywhere.
CORES = CpuBackend(cores=2)


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

    # model = torch_neuronx.DataParallel(traced)
    async with AsyncDataParallel(traced, backend=CORES, example_inputs=image) as model:
        for size in (2, 3, 4, 5, 6):
            images = torch.rand(size, 3, 64, 64)
            scores = await model(images)
            torch.testing.assert_close(scores, plain(images).detach())
            print(f"batch of {size}: {len(scores)} results, equal to the plain model's")


if __name__ == "__main__":
    asyncio.run(main())
