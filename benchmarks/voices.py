"""Sound, live: silero-vad says of each 32 ms whether somebody speaks, with a state for each stream.

Lives here: who takes part, how the state goes along. Must not be here: timing (ways.py).

The package's model keeps the state on itself: one stream a model, or streams in lockstep, all of the same length. For
aneuron the state is an input and an output like any other, so that streams share batches as their chunks come.
"""

import asyncio
import copy
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from aneuron import AsyncDataParallel, CpuBackend
from aneuron.backends.precision import is_native
from benchmarks.ways import CALLERS, Missing, Way, Work

RATE, CHUNK, CONTEXT = 16000, 512, 64  # samples
HALF = torch.bfloat16

Stream = torch.Tensor  # (chunks, CHUNK)


class Step(torch.nn.Module):
    """One chunk of each of several streams: samples with what came before them, and the states, to both anew."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, samples: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        speech, after = self.net(samples, state.transpose(0, 1))
        return speech, after.transpose(0, 1)


def work(count: int) -> Work:
    """So many streams for each of the callers' places, of a second and a half."""
    threads = torch.get_num_threads()
    import silero_vad  # which sets the process's number of threads to 1

    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's end
        vad = silero_vad.load_silero_vad()
    items = [sound(seed) for seed in range(count)]
    expected = torch.stack([alone(vad, item) for item in items])
    makers: dict[str, Callable[[], Way]] = {
        "silero-vad, a model each": lambda: Each(vad),
        "silero-vad, in lockstep": lambda: Lockstep(vad),
        "aneuron": lambda: Aneuron(Step(vad._model).eval(), None),
        "aneuron, half precision": lambda: Aneuron(Step(vad._model).eval(), HALF),
    }
    chunk = f"chunk of {1000 * CHUNK // RATE} ms"
    title = f"voices ({CALLERS} callers: live streams)"
    return Work(title, chunk, items, expected, makers, "silero-vad, a model each", len, lone=2)


def sound(seed: int, chunks: int = 48) -> Stream:
    """Bursts of a buzz with formants between noise: some of it taken for speech."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(chunks * CHUNK) / RATE
    pitch = 90 + 120 * torch.rand((), generator=generator)
    buzz = torch.stack([torch.sin(2 * torch.pi * pitch * k * at) / k for k in range(1, 20)]).sum(0)
    bursts = torch.sin(2 * torch.pi * (2 + 2 * torch.rand((), generator=generator)) * at).clamp(0, 1)
    noise = 0.01 * torch.randn(len(at), generator=generator)
    return (0.2 * buzz * bursts + noise).reshape(chunks, CHUNK)


def alone(vad: torch.nn.Module, stream: Stream) -> torch.Tensor:
    """The package's own way, chunk by chunk."""
    vad.reset_states()  # type: ignore[operator]
    with torch.inference_mode():
        return torch.cat([vad(chunk[None], RATE) for chunk in stream])[:, 0]


class Each(Way):
    """As the package shows it: a model a stream, each chunk in a thread, of which there are as many as CPUs."""

    def __init__(self, vad: torch.nn.Module) -> None:
        self.free = [copy.deepcopy(vad) for _ in range(CALLERS)]

    async def start(self) -> None:
        self.threads = ThreadPoolExecutor(os.cpu_count())

    async def bulk(self, items: Sequence[Stream]) -> torch.Tensor:
        loop = asyncio.get_running_loop()

        def run(item: Stream) -> torch.Tensor:
            vad = self.free.pop()
            try:
                return alone(vad, item)
            finally:
                self.free.append(vad)

        return torch.stack(await asyncio.gather(*(loop.run_in_executor(self.threads, run, item) for item in items)))

    async def one(self, item: Stream) -> torch.Tensor:
        loop, vad = asyncio.get_running_loop(), self.free.pop()
        vad.reset_states()  # type: ignore[operator]

        def step(chunk: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return vad(chunk[None], RATE)

        try:
            found = [await loop.run_in_executor(self.threads, step, chunk) for chunk in item]
        finally:
            self.free.append(vad)
        return torch.cat(found).T

    async def stop(self) -> None:
        self.threads.shutdown()


class Lockstep(Way):
    """All streams as one batch: what there is for files, not for streams that come and go."""

    serves = False

    def __init__(self, vad: torch.nn.Module) -> None:
        self.vad = copy.deepcopy(vad)

    async def bulk(self, items: Sequence[Stream]) -> torch.Tensor:
        return await asyncio.to_thread(self._run, torch.stack(list(items)))

    def _run(self, streams: torch.Tensor) -> torch.Tensor:
        self.vad.reset_states()  # type: ignore[operator]
        with torch.inference_mode():
            return torch.cat([self.vad(chunks, RATE) for chunks in streams.unbind(1)], 1)


class Aneuron(Way):
    """One model for all streams."""

    def __init__(self, step: Step, dtype: torch.dtype | None) -> None:
        if dtype is not None and not is_native(dtype):
            raise Missing("this CPU has no instructions for bfloat16")
        example = torch.rand(8, CONTEXT + CHUNK) / 10, torch.zeros(8, 2, 128)
        self.model = AsyncDataParallel(step, backend=CpuBackend(dtype=dtype), example_inputs=example)

    async def start(self) -> None:
        await self.model.start()

    async def bulk(self, items: Sequence[Stream]) -> torch.Tensor:
        return torch.cat(await asyncio.gather(*map(self.one, items)))

    async def one(self, item: Stream) -> torch.Tensor:
        before, state = torch.zeros(1, CONTEXT), torch.zeros(1, 2, 128)
        found = []
        for chunk in item.split(1):
            samples = torch.cat([before, chunk], 1)
            speech, state = await self.model(samples, state)
            before = samples[:, -CONTEXT:]
            found.append(speech)
        return torch.cat(found, 1)

    async def stop(self) -> None:
        await self.model.aclose()
