"""A call as data: its rows, how they may be cut, and on what terms they wait.

Must not be here: anything that decides, or looks into tensors.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple


class Terms(NamedTuple):
    """What a caller asks for beside the rows."""

    priority: float = 0.0
    tenant: Hashable = None
    yields: bool = False  # whether it gives its room to others, and waits for room again: an element of a map


class Limit(float):
    """The seconds that a call may take. As text: whose they are, in the words that its error begins with.

    >>> str(Limit(2.0))
    'timeout=2 s'
    """

    __slots__ = ()

    def __str__(self) -> str:
        return f"timeout={self:g} s"


class Rest(Limit):
    """What is left of a limit."""

    __slots__ = ("whole",)
    whole: Limit

    def __str__(self) -> str:
        return str(self.whole)

    @classmethod
    def of(cls, whole: Limit, gone: float) -> "Rest":
        """The rest, when so many seconds of it have gone.

        >>> Rest.of(Limit(2.0), gone=0.5) == 1.5, str(Rest.of(Limit(2.0), gone=0.5))
        (True, 'timeout=2 s')
        """
        rest = cls(max(0.0, whole - gone))
        rest.whole = whole
        return rest


class Cut(NamedTuple):
    """How a call may be cut: in pieces of `piece` rows, the pieces within the first `longer` rows one row longer.

    `piece == 0` means anywhere. `shared` says whether the pieces may share a batch with other calls.
    """

    piece: int = 0
    longer: int = 0
    shared: bool = True

    def take(self, bound: int, rows: int, room: int, one_piece: bool) -> int:
        """Rows of the next chunk, 0 if no piece fits; `bound` of the call's `rows` are gone already."""
        left = rows - bound
        if not self.piece:
            return min(left, room)
        taken = size = self.next(bound, rows)
        while not one_piece and size and taken <= room:
            size = self.next(bound + taken, rows)
            if taken + size > room:
                break
            taken += size
        return taken if taken <= room else 0

    def next(self, bound: int, rows: int) -> int:
        """Rows of the piece that starts at row `bound`."""
        return min(self.piece + (bound < self.longer), rows - bound)

    def count(self, rows: int) -> int:
        """The number of pieces of a call of `rows` rows, each as short as it can get."""
        if not self.piece:
            return 1
        longer = self.longer // (self.piece + 1)
        return longer - (self.longer - rows) // self.piece


ANYWHERE = Cut()
NEVER = float("inf")


class Call:
    """One `await model(...)`. `bound` of its `rows` belong to a batch already, or never will.

    Created and ended on the loop. While it is admitted its place among the waiting ones (`bound`, `sequence`, `since`)
    is guarded by the board's lock; a worker that has rows of it in a batch reads the rest, and finds `leaves` gone when
    the caller has left.
    """

    __slots__ = (
        "admitted", "bound", "bucket", "cut", "deadline", "future", "leaves", "limit", "origin", "pads", "parts",
        "rows", "sequence", "settled", "signature", "since", "structure", "template", "terms", "timer", "trace",
        "version",
    )  # fmt: skip

    def __init__(
        self,
        rows: int,
        signature: Hashable,
        cut: Cut = ANYWHERE,
        terms: Terms | None = None,
        admitted: float = 0.0,
        deadline: float = NEVER,
        bucket: int = 0,
    ) -> None:
        self.rows = rows
        self.signature = (
            signature  # equal for calls that may share a batch; with a bucket (what is the same in all, it)
        )
        self.bound = self.sequence = 0
        self.admitted = admitted
        self.deadline = deadline
        self.cut = cut
        self.terms = terms  # None: the usual ones
        self.bucket = bucket  # the smallest that holds its length; 0: there are none
        self.since: float | None = None  # when it had its last turn, if it has had one
        # Its inputs; nothing here looks into them.
        self.leaves: Any = None  # tensors and arrays, in the order of the walk; None again at the end
        self.template: Any = None  # (args, kwargs); None for a single tensor
        self.structure: tuple[Any, ...] = ()  # what is around its tensors; empty for a single one
        self.version = 0  # of the leaves, see `version_of` in tensors/rows.py
        self.pads: Any = None  # what brings them to the bucket
        # Its end.
        self.future: Any = None  # engine/futures.py alone touches it
        self.settled = False
        self.parts: Any = None  # its result, where that grows in parts
        self.timer: Any = None  # that ends a call with a deadline
        self.limit: Any = None  # whose deadline that is
        self.trace: Any = None  # where it is noted how the call was run, if anybody asks
        self.origin: Any = None  # whose call it is, where it has come from another process, and what is sent to another


Chunk = tuple[
    Call, int, int
]  # rows `start` to `stop` of a call, which travel together; a bare tuple: there is one a row
