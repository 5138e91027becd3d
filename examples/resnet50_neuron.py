"""ResNet-50 on all NeuronCores: compile once, load the file on every core, await single images and a big batch.

On an Inf2, Trn1 or Trn2 machine, with torch-neuronx 2.9 (the last that traces) and torchvision:

    python examples/resnet50_neuron.py

Anywhere, with a small network on virtual CPU cores, without downloads:

    python examples/resnet50_neuron.py --backend cpu
"""

import argparse
import asyncio
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from aneuron import AsyncDataParallel


def resnet50() -> nn.Module:
    """The pre-trained network, with scores for the 1,000 classes of ImageNet."""
    from torchvision import models

    return models.resnet50(weights=models.ResNet50_Weights.DEFAULT).eval()


def small() -> nn.Module:
    """A network that any CPU runs in a moment."""
    torch.manual_seed(0)  # the same in the next run, which finds its file
    layers = [nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def compiler(backend: str) -> Callable[..., torch.jit.ScriptModule]:
    """What makes a graph of fixed shapes for the backend. On Neuron it takes minutes: save the file."""
    if backend == "cpu":
        return torch.jit.trace
    import torch_neuronx

    return torch_neuronx.trace


async def one_by_one(model: AsyncDataParallel, images: Tensor, callers: int) -> list[Tensor]:
    """Each image is a call of its own, made by one of so many callers: as in a web server."""
    results: list[Tensor] = [torch.empty(0)] * len(images)
    numbers = iter(range(len(images)))

    async def caller() -> None:
        for number in numbers:
            results[number] = await model(images[number : number + 1])

    await asyncio.gather(*(caller() for _ in range(callers)))
    return results


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("neuron", "cpu"), default="neuron")
    parser.add_argument("--batch-size", type=int, default=4, help="rows in one execution (default: 4)")
    parser.add_argument("--images", type=int, default=1024, help="default: 1024")
    parser.add_argument("--callers", type=int, default=128, help="concurrent calls with one image (default: 128)")
    parser.add_argument("--file", type=Path, help="the compiled model; made if it is not there (default: a new one)")
    args = parser.parse_args()

    plain = small() if args.backend == "cpu" else resnet50()
    example = torch.rand(args.batch_size, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace` is")  # TorchScript's end
        file = args.file or Path(folder, "model.pt")
        if not file.exists():
            print(f"compiling for {args.batch_size} images ...")
            compiler(args.backend)(plain, example).save(file)
        # By path: aneuron loads it on each core, and places it there.
        settings = {"backend": args.backend, "batch_size": args.batch_size, "example_inputs": example}
        async with AsyncDataParallel(file, **settings) as model:
            await serve(model, plain, torch.rand(args.images, 3, 224, 224), args.callers)
    print(f"images per core: {[core.rows for core in model.statistics().cores]}")  # now all of them are counted


async def serve(model: AsyncDataParallel, plain: nn.Module, images: Tensor, callers: int) -> None:
    cores = model.statistics().cores
    print(f"serving on {len(cores)} cores")

    begin = time.monotonic()
    singles = await one_by_one(model, images, callers)
    seconds = time.monotonic() - begin
    print(f"single images from {callers} callers: {len(images) / seconds:,.0f} images/s")

    begin = time.monotonic()
    batch = await model(images)  # cut to the compiled size, spread over all cores, joined in order
    seconds = time.monotonic() - begin
    print(f"one batch of {len(images)}: {len(images) / seconds:,.0f} images/s")

    assert batch.shape == (len(images), batch.shape[1])
    torch.testing.assert_close(torch.cat(singles), batch)
    with torch.inference_mode():
        expected = plain(images[:16])
    same = int((batch[:16].argmax(1) == expected.argmax(1)).sum())  # the scores differ: Neuron computes in bfloat16
    print(f"of {len(expected)} images {same} get the plain model's class")


if __name__ == "__main__":
    asyncio.run(main())
