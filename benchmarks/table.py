"""The table as text, and what must be said beside it."""

from collections.abc import Sequence
from statistics import median

from benchmarks.contenders import PACKAGES
from benchmarks.rows import Bound, Row

COLUMNS = {
    "ideal": "ideal",
    "floor": "floor",
    "fair floor": "fair",
    "in process": "in proc.",
    "one client": "1 client",
    "aneuron": "aneuron",
    "threads": "threads",
    "before": "before",
    "batched": "batched",
    "async-batcher": "async-b",
    "original": "original",
    "executor": "executor",
    "LitServe": "LitServe",
    "mosec": "mosec",
}
SHORT = {"fair floor": "fair", "best peer": "a peer"}
FAILURES = {"TimeoutError": "late", "WrongAnswer": "wrong"}
HEADER = ("p50/p99 ms", "compared (range)", "must", "goal", "kept")

CAVEATS = """
How to read it. Values are medians of {repetitions} repetitions. "compared" is aneuron's value with that of whom "must"
names (else "goal"), in each repetition; median and range. "kept": the goal, only the must, or NO; "no" where only a
goal is set. p50/p99 is aneuron's in ms, from call to result, or from the scheduled time where calls come by schedule;
beside large calls that of the smallest calls. "fair" is the fair floor, "async-b" the package async-batcher, "a peer"
the best of the last three contenders.

The contenders take turns within one process, and comparisons hold within this run only: on a machine with neighbours
the same code may run at twice the speed a minute later. The floors are loops without features (no limits, cancellation,
deadlines, statistics, signatures, isolation of errors). The original is the behaviour of torch_neuronx.DataParallel,
re-created, in asyncio's default executor. The cores are simulated, for all alike: one runs a batch at a time, for the
service time, without the GIL, and begins with another that it was given meanwhile when the first has ended; a core of
W4 takes no time, which no real one does. The ideal of rows/s is every core executing full batches without a gap; of a
lone call, this machine's measured length of a sleep for the service time; of a p99 under overload, max_pending /
capacity. CPU a row is the whole process's, callers included. Every answer is compared with the right one; a contender
that gives a wrong one, raises, or is not done in time "fails". LoadGen rows are no MLPerf results.
"""


def table(rows: Sequence[Row]) -> str:
    """The rows, in columns; of the contenders, those that took part; below, why some failed."""
    present = [who for who in COLUMNS if any(who in row.values or who in row.fails for row in rows)]
    lines = [("", "", *(COLUMNS[who] for who in present), *HEADER), *(_cells(row, present) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = {0, 1, *range(len(widths) - 3, len(widths))}
    text = [" ".join(_justified(line, widths, left)).rstrip() for line in lines]
    notes = [f"{row.name}: {who} fails: {why[:160]}" for row in rows for who, why in row.fails.items()]
    against = [f"{row.name}, {row.unit}: {_against_before(row)}" for row in rows if "before" in row.values]
    if against:
        against = ["", "aneuron's value divided by that of the build before, median and range:", *against]
    packages = [line for package in PACKAGES if (line := _beside(package, rows))]
    notes = [*[""] * bool(notes), *notes, *[""] * bool(packages), *packages, *against]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], *notes])


def _beside(package: str, rows: Sequence[Row]) -> str:
    """In how many of the rows that both have aneuron is ahead, and where it is not."""
    seen = [(row, ahead) for row in rows if (ahead := row.ahead_of(package)) is not None]
    behind = ", ".join(f"{row.name} ({row.unit})" for row, ahead in seen if not ahead)
    if not seen:
        return ""
    return (
        f"ahead of {package} in {sum(ahead for _, ahead in seen)} of {len(seen)} rows{behind and f'; not in {behind}'}"
    )


def _against_before(row: Row) -> str:
    ratios = row.against(Bound(0.0, "before"))
    return f"{median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})" if ratios else "nothing to compare"


def _justified(line: Sequence[str], widths: Sequence[int], left: set[int]) -> list[str]:
    """Words to the left, numbers to the right."""
    return [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _cells(row: Row, contenders: Sequence[str]) -> tuple[str, ...]:
    must, goal = row.must, row.goal
    first = must or goal
    return (
        row.name,
        row.unit,
        *(_value(row, who) for who in contenders),
        f"{_number(row.p50['aneuron'])}/{_number(row.p99['aneuron'])}" if "aneuron" in row.p50 else "",
        _range(row.against(first), first) if first else "",
        _bound(must) if must else "",
        _bound(goal, named=must is None or must.of != goal.of) if goal else "",
        _kept(row),
    )


def _value(row: Row, who: str) -> str:
    if who in row.fails:
        why = row.fails[who].partition(":")[0]
        return f"fails: {FAILURES.get(why, why)}"
    return _number(median(row.values[who])) if row.values.get(who) else ""


def _kept(row: Row) -> str:
    must, goal = row.kept(row.must), row.kept(row.goal)
    if must is False:
        return "NO"
    return "goal" if goal else "must" if must else "no" if goal is False else ""


def _range(seen: Sequence[float], bound: Bound) -> str:
    if not seen:
        return ""
    middle, *ends = (_size(value, bound) for value in (median(seen), seen[0], seen[-1]))
    return f"{middle} ({ends[0].rstrip('%x')}-{ends[1].rstrip('%x')})".replace("(+", "(").replace("-+", "-")


def _size(value: float, bound: Bound) -> str:
    """A ratio as percent where more is better, as a factor where less is; a difference; a plain value."""
    if bound.of is None:
        return _number(value)
    if bound.difference:
        return f"{value:+.2f}"
    return f"{value * 100:.1f}%" if bound.at_least else f"{value:.2f}x"


def _bound(bound: Bound, named: bool = True) -> str:
    sign = ">=" if bound.at_least else "<="
    if bound.of is None:
        return f"{sign}{bound.limit:g}"
    if bound.difference:
        size = f"{bound.limit:+g}"
    else:
        size = f"{bound.limit * 100:.4g}%" if bound.at_least else f"{bound.limit:.3g}x"
    return f"{sign}{size} {SHORT.get(bound.of, bound.of)}" if named else f"{sign}{size}"


def _number(value: float) -> str:
    if abs(value) >= 9999.5:
        return f"{value / 1000:.4g}k"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.2f}" if abs(value) < 1 else f"{value:.3g}"
