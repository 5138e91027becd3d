"""`python -m benchmarks`: every row of the performance budget, as one table, with plots."""

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: simulated cores have no threads of their own

from benchmarks.before import CHECKOUT

GROUPS = ("w1", "w1b", "w2", "w3", "w4", "w5", "bulk", "threadless", "many", "overload", "idle", "waiting", "lag",
          "loadgen", "processes")  # fmt: skip
PINNED = ("w4", "w5", "bulk", "threadless")  # measured once more on one CPU
RESULTS = Path(__file__).parent / "results"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a look of some minutes; its numbers are not worth quoting"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--seconds", type=float, help="of one turn (0.25; quick: 0.07); long ones in proportion")
    parser.add_argument("--turns", type=int, help="of each contender in a repetition (3; quick: 1)")
    parser.add_argument("--repetitions", type=int, help="of each row (5; quick: 1)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), help="event loop; uvloop if it is installed")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="for numbers, table and plots; a whole run that "
                        "is not quick writes to benchmarks/results")  # fmt: skip
    parser.add_argument("--against", metavar="CHECKOUT", help="measure the build in another checkout, too")
    parser.add_argument("--pinned-to", type=int, metavar="CPU", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    if args.results is None and not (args.quick or args.only):
        args.results = RESULTS
    if args.against is not None:
        os.environ[CHECKOUT] = str(Path(args.against).resolve(strict=True))
    args.only = args.only or GROUPS
    args.seconds = args.seconds or (0.07 if args.quick else 0.25)
    args.turns = args.turns or (1 if args.quick else 3)
    args.repetitions = args.repetitions or (1 if args.quick else 5)
    args.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return args


def say(text: str) -> None:
    """What is going on, for who waits."""
    print(text, file=sys.stderr, flush=True)


def loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if loop == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def measure(args: argparse.Namespace) -> list[Any]:
    """The rows that this process is for."""
    from aneuron import _native
    from benchmarks import arrivals, bulk, engines, loadgen, loops, quiet
    from benchmarks.rows import as_python
    from benchmarks.timing import Effort

    gc.collect()
    gc.freeze()  # as a server would: what the imports made is not searched for garbage again
    effort = Effort(args.seconds, args.repetitions, args.turns)
    where = "free" if args.pinned_to is None else "pinned"
    groups: dict[str, Callable[[], Any]] = {
        "w1": lambda: loops.w1(effort, say),
        "w1b": lambda: arrivals.w1b(effort, say),
        "w2": lambda: loops.w2(effort, say),
        "w3": lambda: loops.w3(effort, say),
        "w4": lambda: loops.w4(effort, say, where),
        "w5": lambda: loops.w5(effort, say, where),
        "bulk": lambda: bulk.bulk(effort, say, where),
        "threadless": lambda: bulk.threadless(effort, say, where),
        "many": lambda: arrivals.many(effort, say),
        "overload": lambda: arrivals.overload(effort, say),
        "idle": lambda: quiet.idle(effort, say),
        "waiting": lambda: quiet.waiting(effort, say),
        "lag": lambda: quiet.lag(effort, say),
        "loadgen": lambda: loadgen.loadgen(effort, say),
        "processes": lambda: engines.processes(effort, say),
    }
    rows: list[Any] = []
    with asyncio.Runner(loop_factory=loop_factory(args.loop)) as runner:
        for group in GROUPS:
            if group in args.only:
                own = runner.run(groups[group]())
                for row in own:
                    if _native.why_pure and (group in PINNED or row.unit == "us/row"):
                        as_python(row)
                rows += own
            if group == PINNED[-1] and args.pinned_to is None:
                rows += pinned(args)
    return rows


def pinned(args: argparse.Namespace) -> list[Any]:
    """What is also run on one CPU, in a process of its own: threads keep the CPUs of the thread that started them."""
    from benchmarks.rows import Row

    groups = [group for group in PINNED if group in args.only]
    if groups and not hasattr(os, "sched_setaffinity"):
        say("this system cannot pin a process to a CPU: that part is left out")
        return []
    if not groups:
        return []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "--only", *groups, "--loop", args.loop, "--results", folder]
        command += ["--seconds", str(args.seconds), "--repetitions", str(args.repetitions), "--turns", str(args.turns)]
        command += ["--pinned-to", str(max(os.sched_getaffinity(0)))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        return [Row.from_json(row) for row in json.loads(Path(folder, "numbers.json").read_text())["rows"]]


def report(args: argparse.Namespace, rows: list[Any]) -> str:
    from benchmarks import table

    with_versions = ", ".join(f"{name} {number}" for name, number in versions(args).items())
    paragraphs = table.CAVEATS.format(repetitions=args.repetitions).strip().split("\n\n")
    caveats = "\n\n".join(textwrap.fill(paragraph, 120) for paragraph in paragraphs)
    return f"{table.table(rows)}\n\n{with_versions}\n\n{caveats}"


def versions(args: argparse.Namespace) -> dict[str, str]:
    from aneuron import _native
    from benchmarks import before
    from benchmarks.contenders import versions as around

    cores = {"core": f"as Python ({_native.why_pure})" if _native.why_pure else "compiled"}
    if (package := before.package()) is not None:
        cores["core before"] = "as Python" if before.why_pure(package) else "compiled"
    packages = ("aneuron", "batched", "async-batcher", "mlcommons-loadgen", "torch", "uvloop")
    found = around(*packages, load=args.load)
    if args.loop == "asyncio":
        found["uvloop"] += " (not used)"
    return found | cores


def write(args: argparse.Namespace, rows: list[Any], text: str) -> None:
    """numbers.json, table.txt and, of a whole run, the plots."""
    args.results.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("seconds", "turns", "repetitions", "loop")}
    data = {"versions": versions(args), "settings": settings, "rows": [row.as_json() for row in rows]}
    (args.results / "numbers.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.results / "table.txt").write_text(text + "\n")
    if args.pinned_to is None:
        from benchmarks import plots

        say(plots.draw(rows, args.results))


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.pinned_to is not None:
        os.sched_setaffinity(0, {args.pinned_to})  # before torch is imported and any thread is there
    from benchmarks.contenders import installed

    args.loop = args.loop or ("uvloop" if installed("uvloop") else "asyncio")
    rows = measure(args)
    text = report(args, rows)
    print(text)
    if args.results is not None:
        write(args, rows, text)


if __name__ == "__main__":
    main()
