"""How many rows to execute: which of a model's compiled batch sizes, by what each has taken, or a step of any number.

Must not be here: what waits (fair_queue.py), the lengths that a model was compiled for (tensors/buckets.py), clocks.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from math import nan
from typing import NamedTuple

from aneuron.ownership import Owned

SAMPLES = 15  # times of a size of which the median counts: a hiccup or two do not move it
MOVED = 0.05  # share by which a median must move before covers are chosen anew
PATIENCE = 8, 100  # times its own time that others must run before a size is tried again: at first, and at most


class Steps:
    """The numbers of rows to which those of a model that takes any are rounded up, where it takes any length besides:
    with both the shapes would be too many. The largest is `limit`.

        >>> Steps(32).sizes, Steps(20).fit(17)
        ([1, 2, 3, 4, 6, 8, 12, 16, 24, 32], 20)
    """

    def __init__(self, limit: int, least: int = 1) -> None:
        self.limit = limit
        powers = [1 << power for power in range(limit.bit_length())]
        steps = (size for one in powers for size in (one, one * 3 // 2) if least <= size < limit)
        self.sizes = sorted({least, limit, *steps})

    def pick(self, rows: int, at_once: bool = False) -> int:
        """As many as may be executed at once, while it is not known which: there is room for others."""
        return self.limit

    def fit(self, rows: int) -> int:
        """The smallest that holds `rows` rows; the largest if none does."""
        return self.sizes[bisect_left(self.sizes, rows)] if rows < self.limit else self.limit

    def learn(self, size: int, seconds: float) -> None:
        """Nothing is chosen here."""


class Range(NamedTuple):
    """The numbers of rows that a model takes in one execution, where it was not compiled for one.

    >>> Range(2, 64).clip(1), Range(2, 64).clip(100), Range().clip(100), 65 in map(Range(2, 64).clip, range(100))
    (2, 64, 100, False)
    """

    least: int = 1
    most: int | None = None  # None: no bound

    def holds(self, rows: int) -> bool:
        """Whether it takes so many."""
        return self.clip(rows) == rows

    def clip(self, rows: int) -> int:
        """The nearest number that it takes."""
        return max(self.least, rows if self.most is None else min(rows, self.most))

    def trials(self) -> list[int] | None:
        """Some of them, of which another than the usual can be tried; None: whatever one likes to try from 3 on."""
        return None if self.holds(3) and self.holds(4) else sorted({self.clip(self.least + 1), self.clip(self.least)})

    def __str__(self) -> str:
        if self.least == self.most:
            return f"exactly {self.least}"
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


ANY = Range()


class Cover:
    """Which of a model's compiled batch sizes to run now for so many waiting rows.

    Rows run on the cheapest set of executions that holds them, by measured times; until every size has been measured,
    on the smallest size that holds them. What a size took when it ran last may have been a hiccup, its start, or a busy
    moment: one that does not run is tried again when the others have run for a hundred times its time; one that is
    in no cover for eight times at first, then each time for twice as long; one that was never measured, at once. So
    trials take at most one part in a hundred of the time, whatever they find, beside the first five of each size.

        >>> cover = Cover([1, 8])
        >>> cover.pick(3)
        8
        >>> cover.learn(1, 0.001)
        >>> cover.learn(8, 0.006)
        >>> [cover.pick(rows) for rows in (1, 3, 5, 6, 7, 8, 100)]  # six rows: as fast at once
        [1, 1, 1, 8, 8, 8, 8]
    """

    owned = Owned(lock=("_samples", "_times", "_spent", "_last", "_cost", "_patience", "_due", "_table", "_covering"))

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = sorted(set(sizes))
        self.limit = self.sizes[-1]  # rows that the largest one holds
        self._samples: dict[int, deque[float]] = {size: deque(maxlen=SAMPLES) for size in self.sizes}
        self._times = dict.fromkeys(self.sizes, nan)  # those that the table was made with; NaN = not measured
        self._spent = 0.0  # seconds, by all sizes
        self._last = dict.fromkeys(self.sizes, 0.0)  # how much that was when a size began or ended last
        self._cost = dict.fromkeys(self.sizes, 0.0)  # seconds that it took then
        self._patience = dict.fromkeys(self.sizes, PATIENCE[0])
        self._most = PATIENCE[1] * (len(self.sizes) - 1)  # all the others together take one part in a hundred
        self._due: set[int] = set()  # sizes to be tried
        # [rows]: what to run; the last entry is for all beyond
        self._table = [self.limit]
        if len(self.sizes) > 1:
            self._table = [self.sizes[bisect_left(self.sizes, rows)] for rows in range(self.limit + 1)]
        self._covering = set(self._table)  # sizes that are in a cover

    def pick(self, rows: int, at_once: bool = False) -> int:
        """The size to execute now; `rows` >= 1 wait. Of the cheapest cover the largest comes first.

        at_once: the caller executes only a size that holds all of them, and asks again if this one does not.
        """
        if self._due:
            fitting = self.fit(rows)
            for size in self._due:
                if size == fitting or size <= rows:
                    if size >= rows or not at_once:
                        self._try(size)
                    return size
        return self._table[min(rows, len(self._table) - 1)]

    def fit(self, rows: int) -> int:
        """The smallest size that holds `rows` rows; the largest if none does."""
        return self.sizes[bisect_left(self.sizes, rows)] if rows < self.limit else self.limit

    def _try(self, size: int) -> None:
        self._due.remove(size)
        self._last[size] = self._spent
        self._patience[size] = min(2 * self._patience[size], self._most)
        samples = self._samples[size]
        while len(samples) > 1:
            samples.popleft()  # of two times the shorter counts: a hiccup is forgotten, a new pace counts at once

    def learn(self, size: int, seconds: float) -> None:
        """Note what an execution of `size` took."""
        if len(self.sizes) == 1:
            return
        self._samples[size].append(seconds)
        self._update(size)
        self._spent += seconds
        self._last[size] = self._spent
        self._cost[size] = seconds
        self._due.discard(size)
        for other, last in self._last.items():
            patience = self._most if other in self._covering else self._patience[other]
            if self._spent - last >= patience * self._cost[other] and other != size:
                self._due.add(other)

    def _update(self, size: int) -> None:
        """Choose covers anew if a time has moved."""
        median = _median(self._samples[size])
        if abs(median - self._times[size]) <= MOVED * self._times[size]:
            return
        self._times[size] = median
        if all(self._samples.values()):
            self._times = {size: _median(samples) for size, samples in self._samples.items()}
            self._table = cheapest(self._times, self.limit)
            self._covering = set(self._table)


def _median(samples: Collection[float]) -> float:
    return sorted(samples)[(len(samples) - 1) // 2]  # of two the smaller: hiccups only add


def cheapest(times: Mapping[int, float], limit: int) -> list[int]:
    """For 0 to `limit` rows the largest size in the cheapest set of executions that holds them.

    `times` are the seconds of each size. Of equally cheap sets the one with the fewest executions counts, then the one
    with the least padding, then the one with the largest size.
    """
    costs = {size: round(seconds * 1e9) for size, seconds in times.items()}  # whole numbers: equal sums are equal
    best = [(0, 0, 0, 0)]  # [rows]: cost, executions, rows held, -size; of all orders the one with the largest first
    for rows in range(1, limit + 1):
        ways = []
        for size, own in costs.items():
            cost, executions, held, _ = best[max(0, rows - size)]
            ways.append((cost + own, executions + 1, held + size, -size))
        best.append(min(ways))
    return [-size for _, _, _, size in best]
