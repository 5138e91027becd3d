"""`aneuron tune`: find the peak by trying.

Lives here: its arguments, and the way from them to the answer. Must not be here: measuring (trials.py), words
(report.py).
"""

import argparse
import asyncio
import os
import sys
from functools import partial
from typing import Any

import aneuron
from aneuron.cli import reading, report, trials

DESCRIPTION = """\
Try batch sizes, slots and split sizes of a model, and recommend a constructor call: for throughput, or for a bound on
latency. Callers call in a loop, each with --rows rows; every design gets three turns of --seconds, all of them taking
turns. On a core that was compiled for one batch size, other sizes are shown as not running."""

EXAMPLES = """\
examples:
  aneuron tune encoder.pt --inputs 1x128:int64:0-30000 1x128:int64
  aneuron tune nets:encoder --inputs example.pt --p99 0.020
  aneuron tune nets:encoder --inputs 1x128 --backend simulated --cores 24
  aneuron tune nets:encoder --inputs 1x128 --backend simulated --cores 24 --service-times 1:0.001,8:0.006
"""


def add(subparsers: Any) -> None:
    """Add the subcommand to those of `aneuron`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune", help="find the batch size and the slots that serve a model best", description=DESCRIPTION,
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("model", metavar="MODEL", type=reading.model, help="path of a TorchScript or .pt2 file, or "
           "module:attribute: an nn.Module, a callable, or a function without arguments that makes one")  # fmt: skip
    option("--inputs", nargs="+", required=True, type=reading.inputs, metavar="INPUT", help="a .pt file with a tensor, "
           "a tuple or a dict; or the shape of each tensor, its rows first, dtype and range if need be: "
           "1x3x224x224, 1x128:int64:0-30000")  # fmt: skip
    option("--rows", type=reading.count, default=1, help="rows of a call (default: 1)")
    option("--p99", type=reading.seconds, metavar="SECONDS", help="the latency to keep; without it, the most rows/s")
    option("--batch-sizes", type=reading.numbers(), metavar="N,N", help="default: 1,2,4,8,16")
    option("--num-workers", type=reading.numbers("auto"), metavar="N,N", help="slots, of all cores together "
           "(default: one and two a core; auto: two a core)")  # fmt: skip
    option("--split-sizes", type=reading.numbers("auto"), metavar="N,N", help="default: auto and rows // cores, where "
           "that makes a difference")  # fmt: skip
    option("--callers", type=reading.numbers(), metavar="N,N", help="concurrent calls (default: twice what fills all "
           "cores; with --p99 also a quarter of that, and so on)")  # fmt: skip
    option("--seconds", type=reading.seconds, default=0.5, help="length of a turn (default: 0.5)")
    option("--backend", default="auto", help="auto, cpu, or simulated: cores that take as long as one real core was "
           "measured to take (default: auto)")  # fmt: skip
    option("--cores", type=reading.count, metavar="N", help="default: all; 4 if simulated")
    option("--service-times", type=reading.service_times, metavar="N:S,N:S", help="for simulated cores, seconds by "
           "batch size instead of measuring them here")  # fmt: skip
    option("--plot", metavar="FILE", default="aneuron-tune.png", help="default: aneuron-tune.png, with matplotlib")
    option("--no-plot", dest="plot", action="store_const", const=None, help="draw none")
    option("--json", action="store_true", help="print JSON: times in seconds, sizes in rows")
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Tune. 0: there is a recommendation; 1: nothing runs, or keeps the bound."""
    folder = os.path.dirname(args.plot or "") or "."
    if not os.path.isdir(folder):
        parser.error(f"--plot {args.plot}: there is no folder {folder}")
    simulated = args.backend == "simulated"
    if args.service_times and not (simulated and args.batch_sizes is None):
        parser.error("--service-times is for --backend simulated, and says the batch sizes, too")
    args.batch_sizes = sorted(args.service_times or args.batch_sizes or (1, 2, 4, 8, 16))
    try:
        args.example = reading.together(args.inputs)
        settings, where = _cores(args)
        aneuron.AsyncDataParallel(args.model.value, **settings, batch_size=1, example_inputs=args.example.value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    try:
        study, curve = asyncio.run(_study(args, settings))
    except aneuron.DeviceError as error:
        parser.error(str(error))
    finally:
        _say("")
    best = trials.best(study.results, args.p99)
    call = report.constructor(best.design, args.model, args.example, where) if best else None
    setting = f"{args.model.text}, {study.cores} core{'s' * (study.cores != 1)}, backend {args.backend}"
    if args.json:
        facts = {"backend": args.backend, "rows": args.rows, "p99_bound": args.p99, "service_times": curve}
        print(report.as_json(study, best, call, facts))
    else:
        times = ", ".join(f"{size}: {report.milliseconds(time)} ms" for size, time in curve.items())
        print(f"{setting}; median of {trials.TURNS} turns of {args.seconds:g} s, latencies with queueing")
        print(f"service time of a core by batch size: {times}\n" if curve else "")
        print(report.table(study, best, args.p99))
        print("\n" + report.verdict(study, best, args.p99, args.rows))
    if args.plot and study.results:
        print(report.plot(study, best, args.p99, setting, args.plot), file=sys.stderr if args.json else sys.stdout)
    if best and not args.json:
        print(f"\n{call}\n\n{report.next_step(study, best, args.p99)}")
    return 0 if best else 1


def _cores(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The arguments that choose real cores, and how they are written."""
    if args.backend == "simulated":
        return {"device_ids": [0]}, [f"device_ids=range({args.cores or 4})"]  # one to measure, those planned for
    if args.backend == "cpu" and args.cores:
        return {"backend": aneuron.CpuBackend(cores=args.cores)}, [f"backend=aneuron.CpuBackend(cores={args.cores})"]
    settings = {} if args.backend == "auto" else {"backend": args.backend}
    if args.cores:
        settings["device_ids"] = range(args.cores)
    return settings, [f"{name}={value!r}" for name, value in settings.items()]


async def _study(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[trials.Study, dict[int, float]]:
    """The study, and the service times by batch size if cores are simulated."""
    example, curve = args.example.value, {}

    def model(source: Any, batch_size: int, **settings: Any) -> aneuron.AsyncDataParallel:
        return aneuron.AsyncDataParallel(source, batch_size=batch_size, example_inputs=example, **settings)

    async def make(batch_size: int) -> aneuron.AsyncDataParallel:
        real = model(args.model.value, batch_size, **settings)
        if args.backend != "simulated":
            return real
        seconds = 0.0 if args.service_times else args.seconds
        time, output = await trials.service_time(real, example, batch_size, seconds)
        curve[batch_size] = args.service_times[batch_size] if args.service_times else time
        backend = aneuron.SimulatedBackend(args.cores or 4, curve[batch_size])
        return model(lambda *args, **kwargs: output, batch_size, backend=backend, check_rows=False)  # of no rows

    choices = trials.Choices(args.batch_sizes, args.num_workers, args.split_sizes, args.callers, args.rows)
    return await trials.study(make, choices, example, args.seconds, args.p99 is not None, _say), curve


def _say(progress: str) -> None:
    """Show what is going on, to somebody who is there to see it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
