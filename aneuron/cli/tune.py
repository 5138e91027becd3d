"""`aneuron tune`: find the peak by trying.

Lives here: its arguments, and the way from them to the answer. Must not be here: what may be tried (ways.py), measuring
(trials.py), words (report.py).
"""

import argparse
import asyncio
import os
import random
import sys
from functools import partial
from typing import Any

import aneuron
from aneuron.cli import calls, reading, report, survey, trials, ways
from aneuron.cli.ways import Untried, Way

DESCRIPTION = """\
Try ways to serve a model, and recommend a constructor call: for throughput, or for a bound on latency. First, where
inputs differ in length, batches of one length, buckets and free lengths; then dtypes and OpenVINO; then how CPUs are
divided into cores and threads; each with what was best so far, and beside it how far answers are from the model's own,
of one call at a time. Then batch sizes, slots and split sizes, the best way. Callers call in a loop; everything gets
three turns of --seconds, all of them taking turns. What does not run, or was not tried, is shown with the reason."""

EXAMPLES = """\
examples:
  aneuron tune nets:encoder --inputs requests.jsonl
  aneuron tune nets:encoder --inputs nets:requests --dtypes bfloat16
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
    option("model", metavar="MODEL", type=reading.model, help="path of a TorchScript, .pt2, ONNX or OpenVINO file, or "
           "module:attribute: an nn.Module, a callable, or a function without arguments that makes one")  # fmt: skip
    option(
        "--inputs",
        nargs="+",
        required=True,
        type=calls.inputs,
        metavar="INPUT",
        help="real ones, which differ as "
        f"yours do, {calls.MOST} at most: a .jsonl file with one call a line, a list of numbers (a flat one is one "
        "row, a nested one has its rows first) or an object of named ones; or module:attribute, a generator function "
        "or an iterable of what calls take: a tensor, a tuple, a dict. Or one for all calls: a .pt file with such; "
        "or the shape of each tensor, its rows first, dtype and range if need be: 1x3x224x224, 1x128:int64:0-30000",
    )
    option("--rows", type=reading.count, help="rows of a call (default: 1; real inputs have their own)")
    option("--p99", type=reading.seconds, metavar="SECONDS", help="the latency to keep; without it, the most rows/s")
    option("--batch-sizes", type=reading.numbers(), metavar="N,N", help="default: any number and 1,2,4,8,16; "
           "where lengths differ any number only")  # fmt: skip
    option("--num-workers", type=reading.numbers("auto"), metavar="N,N", help="slots, of all cores together "
           "(default: one and two a core; auto: two a core)")  # fmt: skip
    option("--split-sizes", type=reading.numbers("auto"), metavar="N,N", help="default: auto and rows // cores, where "
           "that makes a difference")  # fmt: skip
    option("--callers", type=reading.numbers(), metavar="N,N", help="concurrent calls (default: twice what fills all "
           "cores; with --p99 also a quarter of that, and so on)")  # fmt: skip
    option("--dtypes", type=reading.dtypes, metavar="D,D", help="beside the model's own (default: bfloat16, "
           "float16, each where there are instructions for it)")  # fmt: skip
    option("--min-cosine", type=reading.cosine, default=0.99, metavar="COSINE", help="of answers with the model's own, "
           "the smallest; a way below it is shown, and not recommended (default: 0.99)")  # fmt: skip
    option("--seconds", type=reading.seconds, default=0.5, help="length of a turn (default: 0.5)")
    option("--backend", default="auto", help="auto: all that there are here; cpu, openvino, onnx, cuda or neuron: "
           "that one; or simulated: cores that take as long as one real core was "
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
    try:
        args.example = reading.together(args.inputs)
        args.calls, args.lengths = _calls(args)
        way = ways.first(args.backend, args.model.value, args.cores)
        settings = {"device_ids": [0]} if simulated else way.settings()  # one to measure, then those planned for
        aneuron.AsyncDataParallel(args.model.value, **settings, batch_size=1, example_inputs=args.example.value)
    except (argparse.ArgumentTypeError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    try:
        seen, best, study, curve = asyncio.run(_tried(args, way))
    except aneuron.DeviceError as error:
        parser.error(str(error))
    finally:
        _say("")
    return _answer(args, seen, best, study, curve)


def _answer(
    args: argparse.Namespace, seen: survey.Survey, way: Way | None, study: trials.Study, curve: dict[int, float]
) -> int:
    """Print it; the exit status."""
    best = trials.best(study.results, args.p99)
    where = [f"device_ids=range({args.cores or 4})"] if args.backend == "simulated" else way.written() if way else []
    example = args.example if best is None or way is None or _has_example(args, best.design.batch_size, way) else None
    call = report.constructor(best.design, args.model, example, where) if best else None
    cores = f"{study.cores} core{'s' * (study.cores != 1)}, " if way else ""
    setting = f"{args.model.text}, {cores}backend {args.backend}"
    if args.json:
        facts = {"backend": args.backend, "rows": args.rows, "p99_bound": args.p99, "service_times": curve}
        facts["inputs"] = _described(args)
        print(report.as_json(study, seen, best, call, facts))
    else:
        times = ", ".join(f"{size}: {report.milliseconds(time)} ms" for size, time in curve.items())
        print(f"{setting}; median of {trials.TURNS} turns of {args.seconds:g} s, latencies with queueing")
        print(report.inputs(_described(args)))
        print(f"service time of a core by batch size: {times}\n" if curve else "")
        if seen.alike or seen.failed:
            print(f"{report.ways(seen, way, args.min_cosine)}\n")
        if way is None:
            print(report.no_way(args.min_cosine))
        else:
            of = "and the inputs in turn" if args.example.calls else f"of {args.rows} row{'s' * (args.rows != 1)}"
            print(report.table(study, best, args.p99))
            print("\n" + report.verdict(study, best, args.p99, of))
    if args.plot and study.results:
        print(report.plot(study, best, args.p99, setting, args.plot), file=sys.stderr if args.json else sys.stdout)
    if best and not args.json:
        print(f"\n{call}\n\n{report.next_step(study, best, args.p99)}")
    return 0 if best else 1


def _calls(args: argparse.Namespace) -> tuple[list[Any], tuple[int, list[int]] | None]:
    """The calls that are made in turn, and their lengths where these differ. Sets `rows`, of a call on average."""
    real = list(args.example.calls)
    if not real:
        args.rows = args.rows or 1
        return [trials.resized(args.example.value, args.rows)], None
    if args.rows is not None:
        raise argparse.ArgumentTypeError("--rows is for one example; real inputs have their own")
    args.rows = max(1, round(sum(map(calls.rows, real)) / len(real)))
    lengths = calls.lengths(real)
    if lengths and args.backend == "simulated":
        raise argparse.ArgumentTypeError("--backend simulated takes as long for every length; give inputs of one")
    return random.Random(0).sample(real, len(real)), lengths  # a slow trial gets no further than the first of them


def _described(args: argparse.Namespace) -> dict[str, Any]:
    """The inputs, in numbers."""
    dim, found = args.lengths or (None, [])
    known = {"dim": dim, "shortest": min(found), "longest": max(found)} if found else None
    return {"calls": len(args.calls), "real": bool(args.example.calls), "lengths": known}


def _axes(args: argparse.Namespace) -> list[survey.Axis]:
    """What is varied of ways, one after the other."""

    def lengths(way: Way) -> tuple[list[Way], Untried]:
        return (ways.by_length(way, *args.lengths) if args.lengths else [way]), {}

    def engines(way: Way) -> tuple[list[Way], Untried]:
        return ways.by_engine(way, args.model.value, args.backend, args.dtypes)

    def cores(way: Way) -> tuple[list[Way], Untried]:
        return ways.by_cores(way, args.cores, ways.cpus()), {}

    return [] if args.backend == "simulated" else [lengths, engines, cores]


async def _tried(
    args: argparse.Namespace, way: Way
) -> tuple[survey.Survey, Way | None, trials.Study, dict[int, float]]:
    """Ways, the best of them, the study of sizes that way, and the service times by batch size of simulated cores."""
    curve: dict[int, float] = {}
    seen = await _surveyed(args, way)
    found = survey.chosen(seen, args.p99, args.min_cosine)
    if found is None and seen.results:
        return seen, None, trials.Study(0, [], {}), curve
    best = (found and found.design.way) or way

    async def make(batch_size: int | None) -> aneuron.AsyncDataParallel:
        if args.backend != "simulated":
            return _model(args, batch_size, best)
        assert batch_size is not None, "its time would not be known"
        seconds = 0.0 if args.service_times else args.seconds
        example = args.example.value
        one = aneuron.AsyncDataParallel(args.model.value, [0], batch_size=batch_size, example_inputs=example)
        time, output = await trials.service_time(one, example, batch_size, seconds)
        curve[batch_size] = args.service_times[batch_size] if args.service_times else time
        return aneuron.AsyncDataParallel(
            lambda *args, **kwargs: output, batch_size=batch_size, example_inputs=example, check_rows=False,  # no rows
            backend=aneuron.SimulatedBackend(args.cores or 4, curve[batch_size]),
        )  # fmt: skip

    sizes = args.batch_sizes or args.service_times or ([] if args.lengths else [1, 2, 4, 8, 16])
    any_number = not sizes or (seen.results and not args.batch_sizes)
    choices = trials.Choices(
        [*([None] if any_number else []), *sorted(sizes)],
        args.num_workers, args.split_sizes, args.callers, args.rows, ways.cpus() if seen.results else 0,
    )  # fmt: skip
    study = await trials.study(make, choices, args.calls, args.seconds, args.p99 is not None, _say)
    return seen, best, study, curve


async def _surveyed(args: argparse.Namespace, way: Way) -> survey.Survey:
    """Ways measured; none where there is only one."""
    axes = _axes(args)
    if not any(len(tried) + len(untried) > 1 for tried, untried in (axis(way) for axis in axes)):
        return survey.Survey()
    full = trials.Choices([None], None, None, None, args.rows).full(ways.cpus())
    callers = max(args.callers) if args.callers else full if args.p99 is None else max(1, full // 4)

    async def make(way: Way) -> aneuron.AsyncDataParallel:
        return _model(args, None, way)

    async def plain() -> aneuron.AsyncDataParallel:
        settings = ways.plain(way, args.model.value).settings()
        return aneuron.AsyncDataParallel(args.model.value, check_rows=False, **settings)

    def choose(seen: survey.Survey) -> trials.Result | None:
        return survey.chosen(seen, args.p99, args.min_cosine)

    return await survey.survey(make, plain, axes, way, callers, args.calls, args.seconds, choose, _say)


def _model(args: argparse.Namespace, batch_size: int | None, way: Way) -> aneuron.AsyncDataParallel:
    example = args.example.value if _has_example(args, batch_size, way) else None
    return aneuron.AsyncDataParallel(args.model.value, batch_size=batch_size, example_inputs=example, **way.settings())


def _has_example(args: argparse.Namespace, batch_size: int | None, way: Way) -> bool:
    """Whether a model is given its example, which fixes the shapes of a file, and of batches of a size."""
    lengths_are_free = args.lengths and way.buckets is None and way.backend != "openvino"
    return not (lengths_are_free and (batch_size or not ways.is_module(args.model.value)))


def _say(progress: str) -> None:
    """Show what is going on, to somebody who is there to see it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
