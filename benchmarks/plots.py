"""The plots: what the table says in numbers, for all contenders at once.

Lives here: pictures. Must not be here: numbers that the table does not have.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import Row

# Of the same colour everywhere; aneuron stands out, yardsticks are grey.
STYLE: dict[str, dict[str, Any]] = {
    "floor": {"color": "#666666", "marker": "s", "linestyle": "--"},
    "fair floor": {"color": "#aaaaaa", "marker": "D", "linestyle": "--"},
    "aneuron": {"color": "#0b62c4", "marker": "o", "linewidth": 2.5, "zorder": 5},
    "batched": {"color": "#e08214", "marker": "^"},
    "async-batcher": {"color": "#1b9e77", "marker": "v"},
    "original": {"color": "#c2185b", "marker": "x"},
}


def draw(rows: Sequence[Row], folder: Path) -> str:
    """Write a PNG for each picture whose rows are there; say which."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: no plots"
    matplotlib.use("Agg")
    drawn = [name for name, picture in PICTURES.items() if picture(rows, folder / name)]
    return f"plots in {folder}: {', '.join(drawn) or 'none, their rows were not run'}"


def throughput(rows: Sequence[Row], file: Path) -> bool:
    """W1: rows a second against callers."""
    points = _points(rows, r"W1 +([\d,]+) callers", "rows/s")
    if not points:
        return False
    figure, axes = _figure()
    callers = [x for x, _ in points]
    ideal = [median(row.values["ideal"]) for _, row in points]
    axes.plot(callers, ideal, color="black", linewidth=1, linestyle=":", label="ideal")
    for who, style in STYLE.items():
        seen = [(x, median(row.values[who])) for x, row in points if who in row.values]
        if seen:
            axes.plot(*zip(*seen, strict=True), label=who, **style)
    axes.set(xscale="log", yscale="log", xlabel="callers, one row each", ylabel="rows per second")
    axes.set_xticks(callers, [f"{x:,}" for x in callers])
    axes.set_yticks([500, 1000, 2000, 4000, 6000], ["500", "1,000", "2,000", "4,000", "6,000"])
    axes.minorticks_off()
    axes.set_title("Throughput: 4 simulated cores, batch 8, 5 ms")
    return _save(figure, axes, file, {"loc": "center right"})


def latency(rows: Sequence[Row], file: Path) -> bool:
    """W1b: latency percentiles against load."""
    points = _points(rows, r"W1b (\d+) %, p99", "ms")
    if not points:
        return False
    figure, axes = _figure()
    for who, style in STYLE.items():
        for percentile, fainter in (("p99", {}), ("p50", {"alpha": 0.35})):
            seen = [(x, getattr(row, percentile)[who]) for x, row in points if who in row.p99]
            if seen:
                axes.plot(*zip(*seen, strict=True), label=f"{who}, {percentile}", **style, **fainter)
    axes.set(yscale="log", xlabel="Poisson arrivals, % of capacity", ylabel="latency from scheduled arrival, ms")
    axes.set_xticks([x for x, _ in points])
    _milliseconds(axes.yaxis, max(max(row.p99.values(), default=10.0) for _, row in points))
    failed = sorted({who for _, row in points for who in row.fails})
    without = f" ({', '.join(failed)} cannot keep up)" if failed else ""
    axes.set_title(f"Latency: 4 simulated cores, batch 8, 5 ms{without}")
    return _save(figure, axes, file, {"bbox_to_anchor": (1.01, 1), "loc": "upper left"})


def beside(rows: Sequence[Row], file: Path) -> bool:
    """W3: latency of one-row calls beside large ones."""
    row = next((row for row in rows if row.name == "W3 one row, p99"), None)
    if row is None:
        return False
    figure, axes = _figure()
    names = [who for who in STYLE if who in row.p99]
    for place, who in enumerate(names):
        color = STYLE[who]["color"]
        axes.plot([row.p50[who], row.p99[who]], [place, place], color=color, linewidth=3)
        axes.plot(row.p50[who], place, "o", color=color, markerfacecolor="white", markersize=9)
        axes.plot(row.p99[who], place, "o", color=color, markersize=9)
        text = f"p50 {row.p50[who]:,.3g}, p99 {row.p99[who]:,.3g}"
        axes.annotate(text, (row.p50[who], place), (0, 9), textcoords="offset points")
    service = median(row.values["ideal"])
    axes.axvline(service, color="black", linestyle=":", label=f"service time, {service:.2f} ms")
    axes.set(xscale="log", xlabel="latency of a one-row call, ms (ring: p50, dot: p99)")
    _milliseconds(axes.xaxis, 2 * max(row.p99[who] for who in names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_title("16 one-row callers beside 8 callers with 256 rows")
    return _save(figure, axes, file, {"loc": "center"})


PICTURES = {"throughput.png": throughput, "latency.png": latency, "beside-large-calls.png": beside}


def _points(rows: Sequence[Row], pattern: str, unit: str) -> list[tuple[int, Row]]:
    """The rows of a family, with the number in their name."""
    matches = [(re.fullmatch(pattern, row.name), row) for row in rows if row.unit == unit]
    return [(int(match[1].replace(",", "")), row) for match, row in matches if match]


def _milliseconds(axis: Any, most: float) -> None:
    """Plain numbers on a logarithmic axis."""
    steps = [step for step in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if step <= most]
    axis.set_ticks(steps, [f"{step:,}" for step in steps])
    axis.set_ticks([], minor=True)


def _figure() -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, 5), layout="constrained", facecolor="white")


def _save(figure: Any, axes: Any, file: Path, legend: dict[str, Any]) -> bool:
    from matplotlib import pyplot

    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, **legend)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return True
