"""What is said of a study: the table, the plot, JSON, and the constructor call that it recommends.

Lives here: words and numbers for people and programs. Must not be here: measuring.
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from aneuron.cli.reading import Written
from aneuron.cli.trials import NOISE, Design, Result, Study


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
                str(design.batch_size), str(design.num_workers), str(design.split_size or "-"), str(design.callers),
                f"{result.rows_per_second:,.0f}", milliseconds(result.p50), milliseconds(result.p99), verdict,
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    head, *said = ["  ".join([*map(str.rjust, line, widths), line[7]]).rstrip() for line in lines]
    said += [f"{size:>{widths[0]}}  does not run: {why:.100}" for size, why in study.failed.items()]
    return "\n".join([head, *sorted(said, key=lambda line: int(line.split()[0]))])


def constructor(design: Design, model: Written, example: Written, where: Sequence[str]) -> str:
    """A program that makes the model of a design."""
    needs = [*sorted({"import aneuron", example.needs} - {""}), *([model.needs] if model.needs else [])]
    arguments = [
        model.text,
        *where,
        f"batch_size={design.batch_size}",
        f"example_inputs={example.text}",
        f"num_workers={design.num_workers}",
        *([f"split_size={design.split_size}"] if design.split_size else []),
    ]
    inside = "".join(f"    {argument},\n" for argument in arguments)
    return "\n".join([*needs, "", f"model = aneuron.AsyncDataParallel(\n{inside})"])


def verdict(study: Study, best: Result | None, bound: float | None, rows: int) -> str:
    """What is recommended and why, or why nothing is; in words."""
    if not study.results:
        return "No batch size runs; see the errors above."
    if best is None:
        least = min(study.results, key=lambda result: result.p99)
        return (
            f"Nothing keeps p99 within {milliseconds(bound or 0.0)} ms. The least was {milliseconds(least.p99)} ms: "
            f"{_named(least.design)}, {_many(least.design.callers, 'caller')} of {_many(rows, 'row')}.\n"
            "Next: more cores (--cores), smaller batches (--batch-sizes), fewer callers (--callers), or another bound."
        )
    reason = "the most" if bound is None else f"the most with p99 within {milliseconds(bound)} ms"
    said = [
        f"Best: {_named(best.design)}: {best.rows_per_second:,.0f} rows/s, p50 {milliseconds(best.p50)} ms, "
        f"p99 {milliseconds(best.p99)} ms",
        f"      with {_many(best.design.callers, 'caller')} of {_many(rows, 'row')}; {reason} "
        f"(rates within {NOISE:.0%} count as equal, the least p99 decides).",
    ]
    if best.calls < 300:
        said.append(f"      Only {best.calls} calls were measured: p99 is nearly the slowest of them (--seconds).")
    return "\n".join(said)


def next_step(study: Study, best: Result, bound: float | None) -> str:
    """What to do after that."""
    tried = {*study.failed, *(result.design.batch_size for result in study.results)}
    largest = best.design.batch_size
    if len(tried) > 1 and largest == max(tried):
        return f"Next: the best batch size is the largest that was tried; try --batch-sizes {largest},{2 * largest}."
    if bound is None:
        return "Next: --p99 0.020 finds the most rows/s that keep a p99 of 20 ms."
    return (
        f"Next: with more than {_many(best.design.callers, 'caller')} calls wait longer; `max_pending=` refuses those "
        "that there is no room for."
    )


def as_json(study: Study, best: Result | None, call: str | None, facts: dict[str, Any]) -> str:
    """All of it for programs: times in seconds, sizes in rows."""

    def flat(result: Result) -> dict[str, Any]:
        whole = asdict(result)
        return {**whole.pop("design"), **whole}

    return json.dumps(
        {
            **facts,
            "cores": study.cores,
            "trials": [flat(result) for result in study.results],
            "failed": {str(batch_size): why for batch_size, why in study.failed.items()},
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
    sizes = sorted({result.design.batch_size for result in study.results})
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
            color=f"C{sizes.index(size) % 10}",
            label=f"batch {size}, {workers} slots" + (f", split {split}" if split else ""),
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


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
