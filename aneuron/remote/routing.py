"""Which engine runs a call, and which rows of a large one.

Lives here: pure decisions over what is known of each engine. Must not be here: links, futures, a clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class Standing:
    """What is known of an engine: the rows that it has accepted and not answered, and how fast its cores are."""

    cores: int  # that serve
    rows: int  # of all clients
    seconds: float = 0.0  # of a core, for a row; 0 where none was measured

    def ends(self, rows: int, seconds: float) -> float:
        """When it would be done with so many rows more; `seconds` a row where nobody has measured it."""
        return (self.rows + rows) * (self.seconds or seconds) / self.cores


class Share(NamedTuple):
    """Rows `start` to `stop` of a call, for an engine."""

    engine: int
    start: int
    stop: int


def choose(standings: Sequence[Standing | None], rows: int, turn: int = 0) -> int | None:
    """The engine that would be done first with so many rows; None if there is none.

    standings: of each engine, None for one that takes no calls. Of equals the next one from `turn` on.

        >>> choose([Standing(4, 8), None, Standing(4, 0)], 1)
        2
        >>> choose([Standing(1, 0), Standing(1, 0)], 1, turn=1)
        1
    """
    if len(standings) == 1:
        return 0 if standings[0] is not None and standings[0].cores else None
    usual = 0.0
    best, least = None, float("inf")
    for step in range(len(standings)):
        index = (turn + step) % len(standings)
        standing = standings[index]
        if standing is None or not standing.cores:
            continue
        usual = standing.seconds or usual or _usual(standings)
        if (end := standing.ends(rows, usual)) < least:
            best, least = index, end
    return best


def spread(
    standings: Sequence[Standing | None], rows: int, piece: int, turn: int = 0, even: bool = False
) -> list[Share]:
    """The engines that run a call, and which of its rows each. A call of one piece is not cut.

    piece: rows of an execution; of more, each goes where it would be done first, and what goes to one engine stays
        together. `even`: each core gets one piece, whatever it has to do.

        >>> spread([Standing(1, 0), Standing(3, 0)], 32, 8)
        [Share(engine=0, start=0, stop=8), Share(engine=1, start=8, stop=32)]
        >>> spread([Standing(1, 24), Standing(1, 0)], 16, 8)
        [Share(engine=1, start=0, stop=16)]
    """
    there = [index for index, standing in enumerate(standings) if standing is not None and standing.cores]
    if not there:
        return []
    if rows <= piece or len(there) == 1:
        engine = choose(standings, rows, turn)
        assert engine is not None, "one is there"
        return [Share(engine, 0, rows)]
    counts = dict.fromkeys(there, 0)
    usual, found = _usual(standings), {index: standings[index] for index in there}
    cores = sum([standing.cores for standing in found.values() if standing is not None])
    if even:
        for index, standing in found.items():
            counts[index] = standing.cores * piece if standing is not None else 0
    else:
        step = piece * max(1, rows // (piece * cores * 8))  # of very large calls not piece by piece
        for _ in range(0, rows, step):  # whole pieces: only the last of all may be shorter
            ends = {i: standing.ends(counts[i] + step, usual) for i, standing in found.items() if standing is not None}
            counts[min(ends, key=lambda index: ends[index])] += step
    shares: list[Share] = []
    start = 0
    for index, count in counts.items():
        stop = min(rows, start + count)
        if stop > start:
            shares.append(Share(index, start, stop))
            start = stop
    if start < rows:  # pieces that were to be even, and are too few
        shares[-1] = shares[-1]._replace(stop=rows)
    return shares


def _usual(standings: Sequence[Standing | None]) -> float:
    """Seconds for a row where an engine has not measured it: as the others have, or all alike."""
    known = [standing.seconds for standing in standings if standing is not None and standing.seconds]
    return sum(known) / len(known) if known else 1.0


def room(max_pending: int, own: int, cores: int) -> int:
    """What of a bound on all engines is one's of `own` of the `cores`.

    >>> [room(10, 1, 4), room(1, 1, 4)]
    [3, 1]
    """
    return max(1, -(-max_pending * own // cores))
