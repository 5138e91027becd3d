"""What is said of a study: the table, the plot, JSON, and the constructor call that it recommends.

Lives here: words and numbers for people and programs. Must not be here: measuring.
"""

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from aneuron.cli.reading import Written
from aneuron.cli.survey import Survey, is_alike
from aneuron.cli.trials import NOISE, Design, Result, Study
from aneuron.cli.ways import Way
from aneuron.tensors.likeness import Likeness


def milliseconds(seconds: float) -> str:
    """Three significant digits or more, in ms."""
    value = 1000 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def table(study: Study, best: Result | None, bound: float | None) -> str:
    """The results, a line for each design, numbers aligned under their names and units."""
    lines: list[tuple[str, ...]] = [("batch", "slots", "split", "callers", "rows/s", "p50 ms", "p99 ms", "")]
    for result in study.results:
        design = result.design
        verdict = "<- best" if result is best else "over the bound" if bound and result.p99 > bound else ""
        lines.append(
            (
                _size(design.batch_size), str(design.num_workers), str(design.split_size or "-"), str(design.callers),
                f"{result.rows_per_second:,.0f}", milliseconds(result.p50), milliseconds(result.p99), verdict,
            )
        )  # fmt: skip
    head, *said = _aligned(lines, 7)
    sizes = [result.design.batch_size for result in study.results]
    width = max(len(line[0]) for line in lines)
    said += [f"{_size(size):>{width}}  does not run: {why:.100}" for size, why in study.failed.items()]
    order = sorted(zip([*sizes, *study.failed], said, strict=True), key=lambda line: line[0] or 0)
    return "\n".join([head, *(line for _, line in order)])


def ways(survey: Survey, best: Way | None, least: float) -> str:
    """The ways, a line for each that was measured, that does not run, or was not tried."""
    lines: list[tuple[str, ...]] = [
        ("backend", "cores x threads", "dtype", "lengths", "rows/s", "p50 ms", "p99 ms", "cosine", "deviation", "")
    ]
    for result in sorted(survey.results, key=lambda result: -result.rows_per_second):
        way = result.design.way
        assert way is not None, "it is one of a survey"
        seen = survey.alike[way]
        verdict = "<- best" if way == best else "" if is_alike(seen, least) else "answers differ"
        lines.append(
            (
                *_columns(way), f"{result.rows_per_second:,.0f}", milliseconds(result.p50), milliseconds(result.p99),
                *_likeness(seen), verdict,
            )
        )  # fmt: skip
    said = {"does not run": survey.failed, "not tried": survey.untried}
    lines += [(*_columns(way), f"{what}: {why:.100}") for what, ways in said.items() for way, why in ways.items()]
    note = f"Answers could not be compared: the model alone does not run, one call at a time: {survey.why}"
    callers = {result.design.callers for result in survey.results}
    title = [f"ways, with {_many(callers.pop(), 'caller')}:"] if callers else []
    return "\n".join([*title, *_aligned(lines, 9), *([note] if survey.why else [])])


def no_way(least: float) -> str:
    """What to do where no way is good enough."""
    return (
        f"No way answers as the model alone does, with a cosine of {least:g} at least: one call at a time, beside the "
        "same calls together. Next: real inputs with their attention masks if outputs depend on padding, eval() if the "
        "model draws at random, or --min-cosine if that is good enough."
    )


def inputs(described: dict[str, Any]) -> str:
    """What the model is called with."""
    if not described["real"]:
        return "inputs: the same for all calls"
    known = described["lengths"]
    lengths = f", {known['shortest']} to {known['longest']} long along dim {known['dim']}" if known else ""
    return f"inputs: {_many(described['calls'], 'call')} in turn{lengths}"


def _columns(way: Way) -> tuple[str, ...]:
    division = f"{way.cores or 'all'} x {way.threads or 'auto'}"
    return way.backend, division, way.dtype or "own", way.lengths


def _likeness(seen: Likeness | None) -> tuple[str, str]:
    """A cosine and the largest deviation; of outputs that are no numbers how many entries differ."""
    if seen is None:
        return "-", "-"
    if seen.cosine is None:
        return "-", f"{seen.differ} of {seen.entries}"
    return f"{seen.cosine:.5f}", f"{seen.deviation:.2g}"


def _aligned(lines: Sequence[tuple[str, ...]], columns: int) -> list[str]:
    """Columns to the right, words at the end as they are; a line may have them early."""
    whole = [line for line in lines if len(line) > columns]
    short = [line[:-1] for line in lines if len(line) <= columns]
    widths = [max(len(line[at]) for line in [*whole, *short] if len(line) > at) for at in range(columns)]
    return ["  ".join([*map(str.rjust, line[:-1], widths), line[-1]]).rstrip() for line in lines]


def constructor(design: Design, model: Written, example: Written | None, where: Sequence[str]) -> str:
    """A program that makes the model of a design."""
    needed = {"import aneuron", example.needs if example else "", "import torch" * any("torch." in x for x in where)}
    needs = [*sorted(needed - {""}), *([model.needs] if model.needs else [])]
    arguments = [
        model.text,
        *where,
        *([f"batch_size={design.batch_size}"] if design.batch_size else []),
        *([f"example_inputs={example.text}"] if example else []),
        f"num_workers={design.num_workers}",
        *([f"split_size={design.split_size}"] if design.split_size else []),
    ]
    inside = "".join(f"    {argument},\n" for argument in arguments)
    return "\n".join([*needs, "", f"model = aneuron.AsyncDataParallel(\n{inside})"])


def verdict(study: Study, best: Result | None, bound: float | None, calls: str) -> str:
    """What is recommended and why, or why nothing is; in words. `calls`: what callers ask for."""
    if not study.results:
        return "No batch size runs; see the errors above."
    if best is None:
        least = min(study.results, key=lambda result: result.p99)
        return (
            f"Nothing keeps p99 within {milliseconds(bound or 0.0)} ms. The least was {milliseconds(least.p99)} ms: "
            f"{_named(least.design)}, {_many(least.design.callers, 'caller')} {calls}.\n"
            "Next: more cores (--cores), smaller batches (--batch-sizes), fewer callers (--callers), or another bound."
        )
    reason = "the most" if bound is None else f"the most with p99 within {milliseconds(bound)} ms"
    said = [
        f"Best: {_named(best.design)}: {best.rows_per_second:,.0f} rows/s, p50 {milliseconds(best.p50)} ms, "
        f"p99 {milliseconds(best.p99)} ms",
        f"      with {_many(best.design.callers, 'caller')} {calls}; {reason} "
        f"(rates within {NOISE:.0%} count as equal, the least p99 decides).",
    ]
    if best.calls < 300:
        said.append(f"      Only {best.calls} calls were measured: p99 is nearly the slowest of them (--seconds).")
    return "\n".join(said)


def next_step(study: Study, best: Result, bound: float | None) -> str:
    """What to do after that."""
    tried = {*study.failed, *(result.design.batch_size for result in study.results)}
    largest = best.design.batch_size
    if largest and len(tried) > 1 and largest == max(size or 0 for size in tried):
        return f"Next: the best batch size is the largest that was tried; try --batch-sizes {largest},{2 * largest}."
    if bound is None:
        return "Next: --p99 0.020 finds the most rows/s that keep a p99 of 20 ms."
    return (
        f"Next: with more than {_many(best.design.callers, 'caller')} calls wait longer; `max_pending=` refuses those "
        "that there is no room for."
    )


def as_json(study: Study, survey: Survey, best: Result | None, call: str | None, facts: dict[str, Any]) -> str:
    """All of it for programs: times in seconds, sizes in rows."""

    def plain(way: Way) -> dict[str, Any]:
        return {name: getattr(way, name) for name in ("backend", "cores", "threads", "dtype", "lengths")}

    def judged(result: Result) -> dict[str, Any]:
        way = result.design.way
        assert way is not None, "it is one of a survey"
        seen = survey.alike[way]
        facts = {"cosine": None, "deviation": None} if seen is None else seen._asdict()
        facts = {
            name: value if value is None or math.isfinite(value) else None
            for name, value in facts.items()
            if name != "where"
        }
        return {**plain(way), **flat(result), **facts}

    def flat(result: Result) -> dict[str, Any]:
        whole = asdict(result)
        design = whole.pop("design")
        del design["way"]
        return {**design, **whole}

    return json.dumps(
        {
            **facts,
            "not_compared": survey.why or None,
            "ways": [judged(result) for result in survey.results],
            "ways_failed": [{**plain(way), "why": why} for way, why in survey.failed.items()],
            "ways_untried": [{**plain(way), "why": why} for way, why in survey.untried.items()],
            "cores": study.cores,
            "trials": [flat(result) for result in study.results],
            "failed": {_size(batch_size): why for batch_size, why in study.failed.items()},
            "best": flat(best) if best else None,
            "constructor": call,
        },
        indent=2,
    )


def plot(study: Study, best: Result | None, bound: float | None, title: str, file: str) -> str:
    """Draw p99 over rows/s into a file, and say so; or say what is missing to do it."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
    except ImportError:
        return "No plot: matplotlib is not installed; pip install 'aneuron[tune]'"
    axes = figure.subplots()
    sizes = sorted({result.design.batch_size or 0 for result in study.results})
    lines: dict[Any, list[Result]] = {}
    for result in study.results:
        design = result.design
        lines.setdefault((design.batch_size, design.num_workers, design.split_size), []).append(result)
    slots = sorted({design.num_workers for design in (result.design for result in study.results)})
    for (size, workers, split), results in lines.items():
        axes.plot(
            [result.rows_per_second for result in results],
            [1000 * result.p99 for result in results],
            marker="osv^D"[slots.index(workers) % 5],
            linestyle="--" if split else "-",
            fillstyle="none" if split else "full",
            color=f"C{sizes.index(size or 0) % 10}",
            label=f"batch {_size(size)}, {workers} slots" + (f", split {split}" if split else ""),
        )
    if bound is not None:
        axes.axhline(1000 * bound, color="grey", linestyle=":", label=f"bound: {milliseconds(bound)} ms")
    if best is not None:
        axes.plot(
            best.rows_per_second, 1000 * best.p99, "*", markersize=15, color="gold", markeredgecolor="black",
            linestyle="none", label="best",
        )  # fmt: skip
    axes.set(xlabel="throughput, rows/s", ylabel="p99 latency of a call, ms")
    axes.set(title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # what was measured is not to be lost for it
        return f"No plot: {error}"
    return f"Plot: {file}"


def _named(design: Design) -> str:
    split = f", split_size={design.split_size}" if design.split_size else ""
    return f"batch_size={design.batch_size}, num_workers={design.num_workers}{split}"


def _size(batch_size: int | None) -> str:
    return str(batch_size or "any")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
