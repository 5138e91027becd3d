"""`python -m benchmarks`: rows W1 and W4 of the performance budget, as one table."""

import argparse
import asyncio
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look of about 20 s; its numbers are not worth quoting")
    parser.add_argument("--only", choices=("w1", "w4"), help="one group of rows")
    parser.add_argument("--seconds", type=float, help="of one contender's turn (0.25; quick: 0.1)")
    parser.add_argument("--turns", type=int, help="of each contender in a repetition (3; quick: 1)")
    parser.add_argument("--repetitions", type=int, help="of each row (5; quick: 3)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), help="event loop; uvloop if it is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE as well")
    parser.add_argument("--pinned-to", type=int, metavar="CPU", help=argparse.SUPPRESS)  # W4 in a process of its own
    args = parser.parse_args()
    args.seconds = args.seconds or (0.1 if args.quick else 0.25)
    args.turns = args.turns or (1 if args.quick else 3)
    args.repetitions = args.repetitions or (3 if args.quick else 5)
    args.loop = args.loop or ("uvloop" if installed("uvloop") else "asyncio")
    args.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return args


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    from benchmarks import workloads

    gc.collect()
    gc.freeze()  # as a server would: what the imports made is not searched for garbage again
    effort = workloads.Effort(args.seconds, args.repetitions, args.turns)
    rows: list[workloads.Row] = []
    with asyncio.Runner(loop_factory=loop_factory(args.loop)) as runner:
        if args.pinned_to is not None:
            return runner.run(workloads.w4(effort, say, "pinned"))
        if args.only != "w4":
            rows += runner.run(workloads.w1(effort, say))
        if args.only != "w1":
            rows += runner.run(workloads.w4(effort, say, "free"))
    if args.only != "w1":
        rows += pinned(args)
    return rows


def pinned(args: argparse.Namespace) -> list[Any]:
    """W4 on one CPU, in a process of its own: threads keep the CPUs of the thread that started them."""
    from benchmarks.workloads import Row

    if not hasattr(os, "sched_setaffinity"):
        say("this system cannot pin a process to a CPU: that part is left out")
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, "-m", "benchmarks", "--loop", args.loop, "--json", str(file)]
        command += ["--seconds", str(args.seconds), "--repetitions", str(args.repetitions), "--turns", str(args.turns)]
        command += ["--pinned-to", str(max(os.sched_getaffinity(0)))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        return [Row.from_json(row) for row in json.loads(file.read_text())["rows"]]


def report(args: argparse.Namespace, rows: list[Any]) -> str:
    from benchmarks import table, workloads

    sleep = workloads.sleep_length(workloads.SERVICE) * 1e3
    caveats = table.CAVEATS.format(
        repetitions=args.repetitions,
        turns=args.turns,
        seconds=args.seconds,
        service=workloads.SERVICE * 1e3,
        sleep=sleep,
        every=workloads.CHECK_EVERY,
    )
    with_versions = ", ".join(f"{name} {number}" for name, number in versions(args).items())
    return f"{table.table(rows)}\n\n{with_versions}\n\n{textwrap.fill(caveats.strip(), 120)}"


def versions(args: argparse.Namespace) -> dict[str, str]:
    import torch

    return {
        "aneuron": installed("aneuron") or "not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "uvloop": f"{installed('uvloop') or 'not installed'}{' (not used)' * (args.loop == 'asyncio')}",
        "CPUs": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load before": f"{args.load:.1f}",
    }


def main() -> None:
    args = arguments()
    if args.pinned_to is not None:
        os.sched_setaffinity(0, {args.pinned_to})  # before torch is imported and any thread is there
    rows = measure(args)
    print(report(args, rows))
    if args.json is not None:
        settings = {name: getattr(args, name) for name in ("seconds", "turns", "repetitions", "loop")}
        data = {"versions": versions(args), "settings": settings, "rows": [row.as_json() for row in rows]}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
