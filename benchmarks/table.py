"""The table as text, and what must be said beside it."""

from collections.abc import Sequence
from statistics import median

from benchmarks.workloads import Must, Row

HEADER = ("", "", "floor", "fair floor", "aneuron", "of the floor", "of the fair floor", "of the ideal",
          "p50 / p99 ms", "floor's", "must", "met")  # fmt: skip

CAVEATS = """
How to read it. Values are medians of {repetitions} repetitions, each the median of {turns} turns of {seconds:g} s;
after each comparison comes its range over the repetitions. The contenders take turns within one process, and
comparisons hold within this run only: on a machine with neighbours the same code may run at twice the speed a minute
later, and the values themselves say little. The floors are loops without features (no limits, cancellation,
deadlines, statistics, signatures, isolation of errors). The cores are simulated: a core of W1 sleeps without the GIL
for {service:g} ms, the model's own time included, for all contenders alike; a core of W4 takes no time, which no real
one does, so that W4 shows nothing but the cost of the runtime, and most of that is handing the GIL from thread to
thread. The ideal is the rows that the cores could do at this machine's measured length of that sleep ({sleep:.2f} ms
at the end of this run). CPU a row is that of the whole process, callers included. Every caller compares every
{every}th of its answers with the right one, whoever answers; a wrong one ends the run.
"""


def table(rows: Sequence[Row]) -> str:
    """The rows, in columns."""
    lines = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    text = ["  ".join(_justified(line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _justified(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    left = (0, 1, len(widths) - 2, len(widths) - 1)
    return [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.unit,
        *(_number(median(row.values[who])) for who in ("floor", "fair floor", "aneuron")),
        *(_comparison(row, who) for who in ("floor", "fair floor", "ideal")),
        *(f"{row.p50[who]:.3g} / {row.p99[who]:.3g}" if row.p50 else "" for who in ("aneuron", "floor")),
        _bound(row.must, row.unit) if row.must else "",
        {True: "yes", False: "NO", None: ""}[row.verdict],
    )


def _comparison(row: Row, other: str) -> str:
    if other not in row.values:
        return ""
    seen = row.against(other)
    if row.must is not None and row.must.difference:
        return f"{median(seen):+.3f} ({seen[0]:+.3f} to {seen[-1]:+.3f})"
    if row.must is not None and not row.must.at_least:
        return f"{median(seen):.2f}x ({seen[0]:.2f}-{seen[-1]:.2f})"
    return f"{median(seen):.1%} ({seen[0] * 100:.1f}-{seen[-1] * 100:.1f})"


def _bound(must: Must, unit: str) -> str:
    if must.difference:
        return f"<= {must.of} {must.bound:+g} {unit.partition(' ')[0]}"
    return f">= {must.bound * 100:g} % of {must.of}" if must.at_least else f"<= {must.bound:g}x {must.of}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
