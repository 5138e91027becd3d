"""A waiting call as data: its rows, how they may be cut, and on what terms they wait.

Must not be here: anything that decides.
"""

from collections.abc import Hashable
from typing import NamedTuple, TypeVar


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


class Waiting:
    """A call as the scheduler sees it. `bound` of its `rows` belong to a batch already, or never will.

    There may be one a row: what is as usual is a class attribute, and costs a call nothing.
    """

    __slots__ = ("__dict__", "admitted", "bound", "rows", "sequence", "signature")

    cut: Cut = ANYWHERE
    terms: Terms | None = None  # None: the usual ones
    deadline: float = NEVER
    bucket: int = 0
    since: float | None = None  # when it had its last turn, if it has had one

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
        self.signature = signature  # equal for calls that may share a batch
        self.admitted = admitted
        self.bound = self.sequence = 0
        self.cut, self.terms, self.deadline, self.bucket = cut, terms, deadline, bucket


C = TypeVar("C", bound=Waiting)

Chunk = tuple[C, int, int]  # rows `start` to `stop` of a call, which travel together; a bare tuple: there is one a row
