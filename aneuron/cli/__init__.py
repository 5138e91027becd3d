"""The command `aneuron`; also `python -m aneuron`.

Lives here: the list of its subcommands, each a file of this folder with `add(subparsers)`, which gives its parser a
default `run(args)` that returns the exit status. Must not be here, nor in those files: anything of aneuron that the
front door does not export, but the judgement of how far outputs are apart (tensors/likeness.py).
"""

import argparse
import sys
from collections.abc import Sequence

from aneuron.cli import info, serve, tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status: 0, 1 for a negative answer, 2 for arguments that do not fit."""
    parser = argparse.ArgumentParser(prog="aneuron", description="Run PyTorch models on many cores from asyncio.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    info.add(subparsers)
    serve.add(subparsers)
    tune.add(subparsers)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse itself would show the usage of `aneuron`
        advice = getattr(args, "unknown", "")
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}{advice and f'; {advice}'}")
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    return status
