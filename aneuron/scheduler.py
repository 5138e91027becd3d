"""Which rows form the next batch, and for which lane.

Lives here: the queue of waiting calls, cutting and packing, the lanes' slots, the arithmetic of backpressure.
Must not be here: asyncio, threads, torch, a clock. Decisions come back as data; the effects are the lane's.

Late binding is the rule that carries this file: rows stay in the queue, where they can be cancelled and joined by
others, until a lane has a free slot. They are cut when the batch is formed, so a call of ten million rows is one
entry.
"""

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar


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


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides how calls are cut and packed; replaced whole when a setting changes at run time."""

    cores: int
    batch_size: int | None  # rows of one execution, as compiled; None = any number
    preferred: int  # rows to pack up to where any number will do
    split_size: int | None
    packing: bool  # dynamic batching
    max_pending: int | None

    @property
    def limit(self) -> int:
        """Rows that a shared batch may hold."""
        return self.batch_size or self.preferred

    def cut(self, rows: int) -> Cut:
        """The pieces of a call of `rows` rows (design: `split_size`, else `max(1, rows // cores)` a piece)."""
        if self.split_size is not None:
            piece = min(self.split_size, self.batch_size or self.split_size)
            return Cut(piece, shared=self.packing)
        if self.batch_size is not None and self.packing:
            return ANYWHERE
        pieces = min(rows, self.cores)
        if self.packing:
            pieces = max(pieces, -(-rows // self.preferred))
        piece, extra = divmod(rows, pieces)
        return Cut(piece, extra * (piece + 1), self.packing)


class Waiting:
    """A call as the scheduler sees it. `bound` of its `rows` belong to a batch already."""

    __slots__ = ("bound", "cut", "rows", "sequence", "signature")

    def __init__(self, rows: int, signature: Hashable, cut: Cut = ANYWHERE) -> None:
        self.rows = rows
        self.signature = signature
        self.cut = cut
        self.bound = 0
        self.sequence = 0


C = TypeVar("C", bound=Waiting)

Chunk = tuple[C, int, int]  # rows `start` to `stop` of a call, which travel together; a bare tuple: there is one a row


@dataclass(slots=True, eq=False)
class Batch(Generic[C]):
    """What one core executes at once: `rows` rows in `chunks`, and why it was not made larger."""

    chunks: list[Chunk[C]]
    rows: int
    because: str  # "full" | "core_idle" | "signature" | "drain" | "rerun"


class _Group(Generic[C]):
    """The waiting calls of one signature, in order of coming. Calls that have no row left are skipped on the way."""

    __slots__ = ("anywhere", "calls", "key", "live", "rows")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.calls: deque[C] = deque()
        self.live = 0  # calls that still have rows to bind
        self.rows = 0  # rows that are not bound
        self.anywhere = True  # all its calls may be cut anywhere


class Scheduler(Generic[C]):
    """The one queue of all waiting calls, and the slots that they wait for."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.draining = False
        self._limit = rules.limit  # as compiled: no setting changes it
        self.waiting_calls = 0  # calls of which no row is bound
        self.waiting_rows = 0  # rows that belong to no batch yet
        self._large_rows = 0  # those of them that belong to calls of more than one batch
        self._groups: dict[Hashable, _Group[C]] = {}
        self._order: list[tuple[int, _Group[C]]] = []  # heap of groups by their first call; keys may lag behind
        self._sequence = 0
        self._again: deque[Batch[C]] = deque()
        self._slots: list[int] = []
        self._in_flight: list[int] = []
        self._open: list[dict[int, None]] = [{}]  # [n]: lanes with n batches in flight and a free slot, oldest first

    # Calls in, calls out.

    def room(self, rows: int) -> bool:
        """Whether `max_pending` admits a call of `rows` rows now.

        Calls of at most one batch and larger ones have that much room each, so that neither shuts the other out;
        a call larger than the room is admitted when none of its kind waits.
        """
        waiting = self._ahead(rows)
        return self.rules.max_pending is None or not waiting or waiting + rows <= self.rules.max_pending

    def excess(self, rows: int) -> int:
        """Rows that must leave before `room(rows)` holds."""
        return self._ahead(rows) + rows - (self.rules.max_pending or 0)

    def _ahead(self, rows: int) -> int:
        """Waiting rows that count for a call of `rows` rows."""
        return self._large_rows if rows > self._limit else self.waiting_rows - self._large_rows

    def admit(self, call: C) -> None:
        """Queue a call."""
        rows = call.rows
        group = self._groups.get(call.signature)
        self._sequence = call.sequence = self._sequence + 1
        if group is None:
            group = self._groups[call.signature] = _Group(call.signature)
            heapq.heappush(self._order, (call.sequence, group))
        group.calls.append(call)
        group.live += 1
        group.rows += rows
        if call.cut.piece:
            group.anywhere = False
        self.waiting_calls += 1
        self.waiting_rows += rows
        if rows > self._limit:
            self._large_rows += rows

    def discard(self, call: C) -> None:
        """Take a call's waiting rows out of the queue; does nothing if none waits."""
        left = call.rows - call.bound
        if not left:
            return
        self.waiting_calls -= call.bound == 0
        self.waiting_rows -= left
        if call.rows > self._limit:
            self._large_rows -= left
        call.bound = call.rows
        group = self._groups[call.signature]
        group.rows -= left
        group.live -= 1
        if not group.live:
            group.calls.clear()
        elif len(group.calls) > 2 * group.live + 16:
            group.calls = deque(other for other in group.calls if other.bound < other.rows)

    def rerun(self, chunks: Sequence[Chunk[C]]) -> None:
        """Queue the two halves of a failed batch ahead of everything else; they are not packed with others."""
        half = (len(chunks) + 1) // 2
        for part in filter(None, (chunks[:half], chunks[half:])):
            self._again.append(Batch(list(part), sum(stop - start for _, start, stop in part), "rerun"))

    def calls(self) -> list[C]:
        """The calls that have rows here: waiting, or to be run again."""
        waiting = [call for group in self._groups.values() for call in group.calls if call.bound < call.rows]
        return waiting + [call for batch in self._again for call, _, _ in batch.chunks]

    # Slots.

    def resize(self, slots: Sequence[int]) -> None:
        """Give lane i `slots[i]` slots. Batches in flight beyond them finish; their slots do not come back."""
        lanes = [lane for level in self._open for lane in level]
        lanes += sorted(set(range(len(slots))) - set(lanes))
        self._slots = list(slots)
        self._in_flight += [0] * (len(slots) - len(self._in_flight))
        self._open = [{} for _ in range(max(1, *slots))]
        for lane in lanes:
            self._reopen(lane)

    def release(self, lane: int) -> None:
        """Lane `lane` has a batch less in flight."""
        in_flight = self._in_flight[lane]
        if in_flight < self._slots[lane]:
            del self._open[in_flight][lane]
        self._in_flight[lane] = in_flight - 1
        self._reopen(lane)

    def in_flight(self, lane: int) -> int:
        """Batches that are bound to a lane or executing on it."""
        return self._in_flight[lane]

    def _reopen(self, lane: int) -> None:
        in_flight = self._in_flight[lane]
        if in_flight < self._slots[lane]:
            self._open[in_flight][lane] = None

    # The decision.

    @property
    def has_work(self) -> bool:
        """Whether anything waits for a lane."""
        return self.waiting_rows > 0 or bool(self._again)

    def bind(self) -> tuple[int, Batch[C]] | None:
        """The next batch and the lane that gets it, or None if no batch can start anywhere.

        An idle lane takes what is there. A lane that is executing takes the batch that the head of the order would
        start, and only if it is full: rows wait in the queue, not behind a lane. Of several lanes the one that has
        been in its state for the longest gets the batch: among executing lanes it is expected to end first.
        """
        if not self.has_work:
            if len(self._order) > 16:
                self._head()  # let go of the groups that have run empty
            return None
        lanes = next(filter(None, self._open), None)
        if lanes is None:
            return None
        busy = lanes is not self._open[0]
        batch = self._again.popleft() if self._again else self._form(busy, not busy and len(lanes) > 1)
        if batch is None:
            return None
        lane = next(iter(lanes))
        del lanes[lane]
        self._in_flight[lane] += 1
        self._reopen(lane)
        return lane, batch

    def _head(self) -> _Group[C] | None:
        """The group whose first call came first."""
        order = self._order
        while order:
            key, group = order[0]
            calls = group.calls
            while calls and calls[0].bound == calls[0].rows:
                calls.popleft()
            if not calls:
                heapq.heappop(order)
                del self._groups[group.key]
            elif calls[0].sequence != key:
                heapq.heapreplace(order, (calls[0].sequence, group))
            else:
                return group
        return None

    def _form(self, busy: bool, one_piece: bool) -> Batch[C] | None:
        """A batch that starts with the head of the order; None if nothing waits, or `busy` and it would not be full.

        `one_piece` of each call while other lanes are idle, so that a call's pieces spread over them.
        """
        group = self._head()
        if group is None or (busy and group.rows < self._limit and group.calls[0].cut.shared):
            return None
        others = self.waiting_rows > group.rows
        chunks, full = self._take_rows(group) if group.anywhere else self._take_pieces(group, busy, one_piece)
        if busy and not full:
            return None
        rows = large = 0
        for call, start, stop in chunks:
            rows += stop - start
            call.bound = stop
            if not start:
                self.waiting_calls -= 1
            if call.rows > self._limit:
                large += stop - start
            if stop == call.rows:
                group.live -= 1
        group.rows -= rows
        self.waiting_rows -= rows
        self._large_rows -= large
        idle = "drain" if self.draining else "signature" if others else "core_idle"
        return Batch(chunks, rows, "full" if full else idle)

    def _take_rows(self, group: _Group[C]) -> tuple[list[Chunk[C]], bool]:
        """Chunks from calls that may be cut anywhere, and whether they fill a batch."""
        calls, room = group.calls, self._limit
        chunks: list[Chunk[C]] = []
        while calls and room:
            call = calls[0]
            start, stop = call.bound, call.rows
            if stop - start > room:
                chunks.append((call, start, start + room))  # and the call stays at the front
                return chunks, True
            calls.popleft()
            if start < stop:
                chunks.append((call, start, stop))
                room -= stop - start
        return chunks, not room

    def _take_pieces(self, group: _Group[C], busy: bool, one_piece: bool) -> tuple[list[Chunk[C]], bool]:
        """Chunks of whole pieces, and whether no further one fits; if `busy` and it would, the calls are left alone."""
        calls, limit = group.calls, self._limit
        shared = calls[0].cut.shared
        chunks: list[Chunk[C]] = []
        rows, full, one_piece = 0, not shared, one_piece or not shared
        while calls and not (chunks and full):
            call = calls.popleft()
            start, cut = call.bound, call.cut
            if start == call.rows:
                continue
            room = limit - rows if chunks else max(limit, cut.next(start, call.rows))
            taken = cut.take(start, call.rows, room, one_piece)
            chunks.append((call, start, start + taken))
            rows += taken
            # Nothing fits any more, not even the next piece of this call.
            full = full or not taken or rows >= limit or (start + taken < call.rows and not one_piece)
        keep = busy and not full
        calls.extendleft(call for call, _, stop in reversed(chunks) if keep or stop < call.rows)
        return [chunk for chunk in chunks if chunk[1] < chunk[2]], full


def spread(slots: int, lanes: int) -> list[int]:
    """`slots` slots over `lanes` lanes, evenly; the first ones get those left over."""
    each, extra = divmod(slots, lanes)
    return [each + (lane < extra) for lane in range(lanes)]
