"""A row of the table: each contender's values, what aneuron's are held to, and whether it keeps to it.

Lives here: the arithmetic of bounds. Must not be here: measuring, text.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.contenders import PEERS
from benchmarks.timing import Seen, Turn


@dataclass(frozen=True)
class Bound:
    """At least or at most `limit`, for aneuron's value divided by `of`'s, less `of`'s, or (`of` is None) itself."""

    limit: float
    of: str | None = "floor"
    at_least: bool = True
    difference: bool = False

    def compare(self, ours: float, theirs: float) -> float:
        return ours - theirs if self.difference else ours / theirs

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def at_least(limit: float, of: str | None = "floor") -> Bound:
    return Bound(limit, of)


def at_most(limit: float, of: str | None = "floor") -> Bound:
    return Bound(limit, of, at_least=False)


def above(limit: float, of: str) -> Bound:
    """At most so much more than `of`."""
    return Bound(limit, of, at_least=False, difference=True)


@dataclass
class Row:
    """A value of each contender in each repetition; of one that failed there is the reason instead."""

    name: str
    unit: str
    must: Bound | None = None
    goal: Bound | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    p50: dict[str, float] = field(default_factory=dict)  # milliseconds from call to result, median of the repetitions
    p99: dict[str, float] = field(default_factory=dict)
    fails: dict[str, str] = field(default_factory=dict)

    def against(self, bound: Bound) -> list[float]:
        """What the bound is about, in each repetition, sorted; empty where either side is missing."""
        ours = self.values.get("aneuron", [])
        if bound.of is None:
            return sorted(ours)
        theirs = self.values.get(bound.of, [])
        return sorted(map(bound.compare, ours, theirs)) if len(ours) == len(theirs) else []

    def kept(self, bound: Bound | None) -> bool | None:
        """Whether the median of the repetitions is within the bound; None where nothing can be said."""
        if bound is None:
            return None
        if "aneuron" in self.fails:
            return False
        seen = self.against(bound)
        return bound.met(median(seen)) if seen else None

    def ahead_of(self, package: str) -> bool | None:
        """Whether aneuron's value is the better one, or as good; None where either is missing."""
        bound = self.must or self.goal
        return None if bound is None else self.kept(Bound(1.0, package, bound.at_least))

    def add_best_peer(self, at_least: bool = False) -> None:
        """The best peer of each repetition becomes a contender."""
        peers = [self.values[name] for name in PEERS if name in self.values]
        if peers:
            self.values["best peer"] = [(max if at_least else min)(values) for values in zip(*peers, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the comparisons drawn."""
        others = [name for name in self.values if name != "aneuron"]
        bound = self.must or self.goal or at_least(0.0)
        ratios = {name: self.against(Bound(0.0, name, difference=bound.difference)) for name in others}
        return {**asdict(self), "against": ratios, "met": self.kept(self.must), "goal met": self.kept(self.goal)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Row":
        """What `as_json` has written."""
        must, goal = (Bound(**data[name]) if data[name] else None for name in ("must", "goal"))
        rest = (data[name] for name in ("values", "p50", "p99", "fails"))
        return cls(data["name"], data["unit"], must, goal, *rest)


def as_python(row: Row) -> None:
    """Hold it to what the core must gain on the build before without being compiled, where both run as Python."""
    if row.must is not None and "before" in row.values:
        more = row.must.at_least
        row.must, row.goal = (Bound(gain if more else 1 / gain, "before", more) for gain in (1.25, 1.5))


def row(
    name: str,
    unit: str,
    seen: Seen,
    value: Callable[[Turn], float],
    must: Bound | None = None,
    goal: Bound | None = None,
    ideal: Callable[[float], float] | None = None,
) -> Row:
    """The row of what was seen; `ideal` makes its value of the length that the service time's sleep had."""
    made = Row(name, unit, must, goal, fails=dict(seen.fails))
    if ideal is not None:
        made.values["ideal"] = [ideal(sleep) for sleep in seen.sleeps]
    for who, turns in seen.turns.items():
        made.values[who] = [value(turn) for turn in turns]
        made.p50[who], made.p99[who] = (
            median(percentile(turn.latencies, part) for turn in turns) * 1e3 for part in (0.5, 0.99)
        )
    return made


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest of the values that at least this part of them does not exceed; NaN of nothing."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else float("nan")


def rate(turn: Turn) -> float:
    return turn.rows_per_second


def p50(scale: float = 1e3) -> Callable[[Turn], float]:
    return lambda turn: percentile(turn.latencies, 0.5) * scale


def p99(turn: Turn) -> float:
    return percentile(turn.latencies, 0.99) * 1e3


def as_json(seen: Seen) -> dict[str, list[dict[str, float]]]:
    """What was seen of servers, turn by turn; times in milliseconds, CPU in microseconds an answer."""
    return {
        name: [
            {"answers/s": turn.rows_per_second, "us of CPU": turn.cpu_per_row * 1e6}
            | {f"p{part}": percentile(turn.latencies, part / 100) * 1e3 for part in (50, 99)}
            | turn.more
            for turn in turns
        ]
        for name, turns in seen.turns.items()
    }
