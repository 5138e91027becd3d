"""Another batch dimension: the input is cut along dim 2, one half for each core, and the results are joined there.

Before:  model = torch_neuronx.DataParallel(traced, device_ids=[0, 1], dim=2)    y = model(x)
After:   model = AsyncDataParallel(traced, device_ids=[0, 1], dim=2, ...)       y = await model(x)
"""

import asyncio
import warnings

import torch
from torch import nn

from aneuron import AsyncDataParallel, CpuBackend

# Two virtual cores stand in for an accelerator's, so that this runs anywhere.
CORES = CpuBackend(cores=2)


class Network(nn.Module):
    """A convolution, plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Six rows of output for eight of input: what each core sees matters at the seam."""
        return self.conv(x) + 1


async def main() -> None:
    plain = Network().eval()
    example = torch.rand(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace` is")  # TorchScript's end
        traced = torch.jit.trace(plain, example)

    # model = torch_neuronx.DataParallel(traced, device_ids=[0, 1], dim=2)
    async with AsyncDataParallel(traced, device_ids=[0, 1], dim=2, backend=CORES, example_inputs=example) as model:
        x = torch.rand(1, 3, 16, 8)  # 16 along dim 2: two cores times the 8 that were traced
        y = await model(x)
        # The whole input at once would give 14 along dim 2; two cores give 6 + 6, and that is what was asked for.
        halves = torch.cat([plain(half) for half in x.chunk(2, dim=2)], dim=2)
        torch.testing.assert_close(y, halves.detach())
        print(f"input {list(x.shape)} in two halves along dim 2, output {list(y.shape)}, equal to the two halves' own")


if __name__ == "__main__":
    asyncio.run(main())
