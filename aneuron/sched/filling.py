"""Forming a batch: taking rows from the waiting calls until it is full.

Must not be here: who goes first (fair_queue.py), when and for which lane (scheduler.py), tensors (tensors/rows.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aneuron.sched.call import NEVER, Call, Chunk
from aneuron.sched.fair_queue import FairQueue
from aneuron.sched.flows import Flow, Heap, Kind, first


@dataclass(frozen=True, slots=True)
class Retry:
    """Why rows run again, and what is to be learnt from it."""

    tried: int | None = None  # the core that has failed with these rows
    avoid: int | None = None  # a lane that must not take them
    bisection: Any = None  # of the failed batch that they are a part of
    trial: Any = None  # the bisection that asks this core


class Batch:
    """What one core executes at once: `rows` rows in `chunks`, and why it was not made larger."""

    __slots__ = ("bucket", "chunks", "due", "expected", "reason", "retry", "rows", "scheduler", "size")

    def __init__(
        self,
        chunks: list[Chunk],
        rows: int,
        reason: str,
        size: int | None = None,
        bucket: int = 0,
        expected: float = 0.0,
        retry: Retry | None = None,
        scheduler: Any = None,
    ) -> None:
        self.chunks = chunks
        self.rows = rows
        self.reason = reason  # "full" | "core_idle" | "delay" | "signature" | "drain" | "rerun"
        self.size = size  # rows to execute, as compiled; None = as many as there are
        self.bucket = bucket
        self.expected = expected  # seconds that it will take, as far as is known
        self.due = 0.0  # when it should have ended
        self.retry = retry
        self.scheduler = scheduler  # that formed it


class Filling:
    """A batch that is being filled: room for `room` rows more."""

    __slots__ = ("_queue", "chunks", "end", "full", "horizon", "late", "limit", "one_piece", "pace", "room", "shares")

    def __init__(
        self, queue: FairQueue, room: int, limit: int, end: Callable[[], float], pace: float, one_piece: bool
    ) -> None:
        self._queue = queue
        self.chunks: list[Chunk] = []
        self.shares: list[tuple[Flow, int]] = []  # rows of each flow
        self.late: list[Call] = []  # calls that were dropped because they cannot meet their deadline
        self.full = False  # no further row would fit
        self.room = room
        self.limit = limit
        self.end = end  # when the batch will have ended: asked once, if a call has a deadline
        self.horizon: float | None = None
        self.pace = pace  # seconds for each further batch of a call
        self.one_piece = one_piece  # of each call, where calls are in pieces, so that they spread over the idle lanes

    def take(self, head: Flow, kind: Kind) -> None:
        """Take rows of a kind for a batch that starts with `head`: first its own, then in fair order."""
        leader = head if kind is head.kind else None
        seen: set[int] = set()
        for heap in kind.heaps(head):
            if kind.anywhere:
                self._take_rows(heap, leader)
            else:
                self._take_pieces(heap, leader, seen)
            if self.full:
                return
            leader = None

    def take_group(self, head: Flow, group: Iterable[tuple[Kind, int]]) -> None:
        """Take so many rows of each kind, the head's first, for a batch that starts with `head`."""
        room = self.room
        for kind, rows in group:
            self.room, self.full = rows, False
            self.take(head, kind)
            room -= rows - self.room
        self.room, self.full = room, room <= 0

    def charge(self, padding: int, rows: int) -> None:
        """Charge the rows that were added to fill the batch to the tenants in it."""
        for flow, own in self.shares:
            self._queue.charge(flow, padding * own / rows)

    def _is_late(self, call: Call) -> bool:
        """Drop a call that has a deadline and will miss it."""
        if self.horizon is None:
            self.horizon = self.end()
        if call.deadline >= self.horizon + (call.rows - call.bound - 1) // self.limit * self.pace:
            return False
        self._queue.discard(call)
        self.late.append(call)
        return True

    def _take_rows(self, heap: Heap, leader: Flow | None) -> None:
        """From calls that may be cut anywhere; tenants take turns."""
        append, room = self.chunks.append, self.room
        while room and (flow := leader or first(heap)) is not None:
            leader = None
            calls, tag, had = flow.calls, flow.tenant.tag, room
            until = _others(heap, flow) if len(heap) > 1 else None  # then it is another tenant's turn
            fresh = finished = 0
            while calls and room:
                call = calls[0]
                start, stop = call.bound, call.rows
                if start == stop:
                    calls.popleft()
                    continue
                if call.deadline != NEVER and self._is_late(call):
                    continue  # to skip it
                if until is not None and room < had and (tag + had - room, call.sequence) > until:
                    break
                if stop - start > room:
                    stop = start + room  # and it stays at the front
                    self._queue.cut(flow)
                else:
                    calls.popleft()
                    finished += 1
                if not start:
                    fresh += 1
                append((call, start, stop))
                call.bound = stop
                room -= stop - start
            if room < had:
                self._queue.taken(flow, had - room, fresh, finished)
                self.shares.append((flow, had - room))
        self.room, self.full = room, not room

    def _take_pieces(self, heap: Heap, leader: Flow | None, seen: set[int]) -> None:
        """Whole pieces, until the next one does not fit; one of each call, where they are to spread over lanes."""
        while not self.full and (flow := leader or first(heap)) is not None and id(flow.twins) not in seen:
            leader = None
            if self.one_piece:
                seen.add(id(flow.twins))
            calls, tag = flow.calls, flow.tenant.tag
            until = _others(heap, flow)
            rows = fresh = finished = 0
            kept: list[Call] = []  # calls that have given their piece
            while calls and not self.full:
                call = calls[0]
                start, cut = call.bound, call.cut
                if start == call.rows:
                    calls.popleft()
                    continue
                if call.deadline != NEVER and self._is_late(call):
                    continue
                if rows and (tag + rows, call.sequence) > until:
                    break
                calls.popleft()
                room = self.room if self.chunks else max(self.room, cut.next(start, call.rows))
                size = cut.take(start, call.rows, room, self.one_piece or not cut.shared)
                if size:
                    self.chunks.append((call, start, start + size))
                    call.bound = start + size
                    rows += size
                    self.room -= size
                    fresh += not start
                self.full = not size or self.room <= 0 or not cut.shared
                if call.bound < call.rows:
                    kept.append(call)
                    self.full = self.full or not self.one_piece  # not even its next piece fits
                else:
                    finished += 1
            calls.extendleft(reversed(kept))
            if rows:
                self._queue.taken(flow, rows, fresh, finished)
                self.shares.append((flow, rows))
                if kept and kept[0].bound:
                    self._queue.cut(flow)


def _others(heap: Heap, flow: Flow) -> tuple[float, int]:
    """When it is another flow's turn: its tag, and the sequence of its first call."""
    return min([(tag, sequence) for tag, sequence, other in heap[:3] if other is not flow], default=(NEVER, 0))
