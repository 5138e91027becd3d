"""What CI asks of each wheel, installed: that it is compiled, for this Python, and answers a call."""

import asyncio

import torch

import aneuron
from aneuron import _native


async def main() -> None:
    """Await a model."""
    async with aneuron.AsyncDataParallel(torch.nn.Linear(3, 2).eval(), batch_size=4, backend="cpu") as model:
        answers = await asyncio.gather(*(model(torch.ones(1, 3)) for _ in range(9)))
    assert [answer.shape for answer in answers] == [(1, 2)] * 9


assert "site-packages" in aneuron.__file__, aneuron.__file__
assert _native.why_pure is None, _native.why_pure
asyncio.run(main())
