"""`python -m benchmarks.realwork`: real weights and real inputs, beside what people use for them today.

Lives here: the command line. Must not be here: who takes part (docstrings.py, voices.py), timing (ways.py).
"""

import argparse
import asyncio
import importlib
import os
import platform
import sys
from collections.abc import Sequence

import torch

from benchmarks.contenders import installed
from benchmarks.timing import Effort
from benchmarks.ways import measured

WORKS = {"docstrings": 256, "voices": 128}  # files of this folder, and items of a turn
QUICK = 8  # times fewer
PACKAGES = ("aneuron", "torch", "transformers", "sentence-transformers", "infinity_emb", "silero-vad", "openvino")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.realwork", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look of a minute or less; its numbers mean little")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), help="which work (default: all)")
    parser.add_argument("--items", type=int, help="docstrings, or streams of sound, in a turn (256, 128; "
                        "quick: 32, 16)")  # fmt: skip
    parser.add_argument("--repetitions", type=int, help="turns of each way (5; quick: 1)")
    args = parser.parse_args(argv)
    args.only = args.only or list(WORKS)
    args.repetitions = args.repetitions or (1 if args.quick else 5)
    return args


def load() -> str:
    return ", ".join(f"{each:.1f}" for each in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def say(text: str) -> None:
    """What is going on, for who waits."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    before = load()
    for name in args.only:
        try:
            module = importlib.import_module(f"benchmarks.{name}")
            work = module.work(args.items or WORKS[name] // (QUICK if args.quick else 1))
        except ImportError as error:
            print(f"{name}: left out: {error}\n")
            continue
        print(asyncio.run(measured(work, Effort(0.0, args.repetitions, 1), say)) + "\n", flush=True)
    from aneuron import _native

    core = f"as Python ({_native.why_pure})" if _native.why_pure else "compiled"
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name))
    print(f"{versions}, Python {platform.python_version()}; core {core}; {os.cpu_count()} CPUs, up to "
          f"{torch.backends.cpu.get_cpu_capability()}; load before {before}, after {load()}")  # fmt: skip
    print("Medians of turns that alternate; compare within one run only.")


if __name__ == "__main__":
    main()
