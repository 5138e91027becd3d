"""Which rows of one model form the next batch, for which lane, and when.

Lives here: the decision, deadlines, the arithmetic of backpressure. Who goes first is fair_queue.py's, what the lanes
have in flight slots.py's, holding back batch_delay.py's, which lengths go together
grouping.py's, which of several models shares.py's. Must not be here:
asyncio, threads, torch, a clock: `now` is an argument. Decisions come back as data; the effects are the engine's.

Late binding is the rule that carries this file: rows stay in the queue, where they can be cancelled and joined by
others, until a lane has a free slot. They are cut when the batch is formed, so a call of ten million rows is one
entry.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Protocol

from aneuron.ownership import Owned
from aneuron.sched.batch_delay import BatchDelay
from aneuron.sched.call import ANYWHERE, NEVER, Call, Chunk, Cut
from aneuron.sched.fair_queue import FairQueue
from aneuron.sched.filling import Batch, Filling, Retry
from aneuron.sched.flows import Flow, Kind
from aneuron.sched.grouping import Grouping
from aneuron.sched.room import Room, one, positions
from aneuron.sched.slots import Slots

Estimate = Callable[[int, int, int], float]  # seconds that a lane takes for a shape, (rows, bucket); 0 = unknown


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides how calls are cut and packed; replaced whole when a setting changes at run time."""

    cores: int
    batch_size: int | None  # rows of the largest execution, as compiled; None = any number
    preferred: int  # rows to pack up to where any number will do
    split_size: int | None
    packing: bool  # dynamic batching
    max_pending: int | None
    max_delay: float | None = 0.0  # seconds; None = learned
    by_positions: bool = False  # whether `max_pending` counts these, and not rows
    most: int | None = None  # rows that an execution may have where any number will do up to it

    def cut(self, rows: int, limit: int | None = None) -> Cut:
        """The pieces of a call of `rows` rows (design: `split_size`, else `max(1, rows // cores)` a piece).

        A batch holds `limit` rows, None: `batch_size`.
        """
        if self.split_size is not None:
            piece = min(self.split_size, limit or self.batch_size or self.most or self.split_size)
            return Cut(piece, shared=self.packing)
        if self.batch_size is not None and self.packing:
            return ANYWHERE
        pieces = min(rows, self.cores)
        if self.packing:
            pieces = max(pieces, -(-rows // self.preferred))
        piece, extra = divmod(rows, pieces)
        return Cut(piece, extra * (piece + 1), self.packing)


class Sizes(Protocol):
    """The compiled sizes of one bucket."""

    limit: int  # the largest
    sizes: list[int]

    def pick(self, rows: int, at_once: bool = False) -> int:
        """The one to execute now if `rows` rows wait; if `at_once`, one that does not hold them is of no use."""

    def fit(self, rows: int) -> int:
        """The smallest that holds `rows` rows."""

    def learn(self, size: int, seconds: float) -> None:
        """Note what an execution took."""


class Scheduler:
    """The queue of all calls of a model that wait for lanes, and the rules by which they get them.

    `run` is whoever executes its batches; nothing of it is known here. `arrivals`, `outside` and `_again` are deques
    that others change with the lock, and of which the loop asks without it whether anything is there.
    """

    owned = Owned(
        lock=("due", "late", "out"),
        both=("draining",),
        set_with_lock=("rules",),  # replaced whole
        set_by_loop=("slack",),  # a guess
        parts=("_queue", "_delay", "_room"),
    )

    def __init__(
        self,
        rules: Rules,
        sizes: Mapping[int, Sizes] | None = None,
        estimate: Estimate = lambda lane, rows, bucket: 0.0,
        slots: Slots | None = None,
        run: Any = None,
        cost: Estimate | None = None,
        buckets: Iterable[int] = (),
    ) -> None:
        self.rules = rules
        self.run = run
        self.draining = False
        self.slots = slots or Slots()  # other models may have them, too
        self.out: set[int] = set()  # lanes that do not serve this model
        self.arrivals: deque[Call] = deque()  # appended without the lock, by the loop; taken with it, by whoever binds
        self.due: float | None = None  # when to ask again, if nothing else happens before
        self.late: list[Call] = []  # calls dropped because they cannot meet their deadline; whoever binds ends them
        self.slack = 0.0  # seconds to allow for beyond what was estimated, when deadlines are judged
        self.slots.timed = self.slots.timed or rules.max_delay is None
        self._estimate = estimate
        self._cost = cost or estimate  # a guess will do
        self._sizes = sizes or {}
        self.unit = positions(buckets or self._sizes) if rules.by_positions else one  # of a bucket, in `max_pending`
        self._queue: FairQueue = FairQueue(self.unit)
        self._delay: BatchDelay = BatchDelay(self._queue)
        self._preferred = rules.batch_size or rules.preferred  # as compiled: no setting changes it
        self._grouping = Grouping(self._queue, self._sizes, buckets or self._sizes, self._preferred)
        self._room: Room = Room(self._queue, self._limit, self.unit)
        self.outside = self._room.outside  # calls of maps that wait for room, and some that have left
        self._again: deque[Batch] = deque()

    # Calls in, calls out.

    @property
    def waiting_rows(self) -> int:
        """Rows that belong to no batch yet."""
        return self._queue.rows

    @property
    def waiting_work(self) -> int:
        """The same, as `max_pending` counts it."""
        return self._queue.work

    @property
    def waiting_calls(self) -> int:
        """Calls of which no row belongs to a batch."""
        outside = sum([call.bound < call.rows for call in self.outside]) if self.outside else 0
        return self._queue.fresh + outside

    def excess(self, rows: int, bucket: int = 0) -> int:
        """Work that must leave before `max_pending` admits a call of `rows` rows; 0: it does."""
        return self._room.excess(rows, bucket, self.rules.max_pending)

    def make_room(self, call: Call, now: float) -> list[Call] | None:
        """Make room for a call that is to be admitted: the calls to refuse for it, None if it is the one."""
        return self._room.make(call, self.rules.max_pending, now)

    def lets_in(self, rows: int, bucket: int, now: float) -> bool:
        """Whether a call would be admitted, of which no more is known."""
        return self._room.lets_in(rows, bucket, self.rules.max_pending, now)

    def is_plain(self, rows: int, bucket: int) -> bool:
        """Whether nothing is to be noted of a call that has found room: no map's call gives way, and it is not huge."""
        return self._room.is_plain(rows, bucket, self.rules.max_pending)

    def has_room(self, call: Call) -> bool:
        """Whether a map's call may be admitted; else it is to be put `outside`, and is when there is room."""
        return self._room.enter(call, self.rules.max_pending)

    def _refill(self) -> None:
        """Queue the calls of maps that have found room."""
        while (call := self._room.next(self.rules.max_pending)) is not None:
            self.admit([call])

    def _limit(self, bucket: int) -> int:
        """Rows that a batch may hold."""
        sizes = self._sizes.get(bucket)
        return self._preferred if sizes is None else sizes.limit

    def hopeless(self, call: Call, now: float) -> bool:
        """Whether a call cannot meet its deadline even alone, on cores that wait for it."""
        limit, sizes = self._limit(call.bucket), self._sizes.get(call.bucket)
        shapes = [rounded(min(call.cut.piece or call.rows, limit))] if sizes is None else sizes.sizes
        times = [self._estimate(lane, shape, call.bucket) for lane in self.lanes() for shape in shapes]
        rounds = -(-call.rows // (limit * max(1, self.rules.cores)))
        return call.deadline < now + rounds * min(times, default=0.0)

    def flush(self) -> None:
        """Queue the calls that have come."""
        if count := len(self.arrivals):
            self.admit([self.arrivals.popleft() for _ in range(count)])

    def admit(self, calls: Sequence[Call]) -> None:
        """Queue calls."""
        self._queue.push(calls, self._limit)
        if self.rules.max_delay != 0.0:
            for call in calls:
                if not call.bound:  # it has not left again
                    self._delay.note(call)

    def discard(self, call: Call) -> None:
        """Take a call's waiting rows out of the queue; does nothing if none waits."""
        self._queue.discard(call)
        self._delay.mend(call.signature)

    def rerun(self, batch: Batch, chunks: Sequence[Chunk], retry: Retry) -> None:
        """Queue rows of a failed batch as one, ahead of everything else; they are not packed with others."""
        rows = sum(stop - start for _, start, stop in chunks)
        size = batch.size and self._sizes[batch.bucket].fit(rows)
        again = Batch(list(chunks), rows, "rerun", size, batch.bucket, batch.expected, retry=retry, scheduler=self)
        self._again.appendleft(again)

    def recall(self, lane: int, batch: Batch) -> None:
        """A batch that was bound to a lane, and has not begun, is to run elsewhere."""
        self.slots.unbind(lane, batch)
        self._again.appendleft(batch)

    def calls(self) -> list[Call]:
        """The calls that have rows here: waiting, also for room, or to be run again."""
        again = (call for batch in self._again for call, _, _ in batch.chunks)
        return [*self.arrivals, *self._queue.calls(), *again, *self.outside]

    # The decision.

    def lanes(self) -> Iterator[int]:
        """Those that may have batches of this model."""
        return (lane for lane, slots in enumerate(self.slots.slots) if slots and lane not in self.out)

    def has_work(self) -> bool:
        """Whether anything waits for a lane."""
        return self._queue.rows > 0 or bool(self._again) or bool(self.outside)

    def head(self) -> tuple[float, float]:
        """The level of what waits: its priority, and since when its eldest waits, less a second for each unit of that.

        Only if anything does.
        """
        level = self._queue.level()
        urgency = level.urgency() if level is not None else None
        head = (0.0, NEVER) if level is None or urgency is None else (level.priority, urgency)
        if not self._again:
            return head
        call = self._again[0].chunks[0][0]
        priority = call.terms.priority if call.terms is not None else 0.0
        return min(head, (priority, call.admitted - priority), key=itemgetter(1))

    @property
    def has_full(self) -> bool:
        """Whether a lane that executes may get a batch behind that."""
        return bool(self._again) or self._queue.has_full()

    def bind(self, now: float, contended: bool = False) -> tuple[int, Batch] | None:
        """The next batch and the lane that gets it, or None if none can start anywhere: ask again when a call comes, a
        lane is free, or it is `due`.

        An idle lane takes what is there; of several the one that has been idle for the longest. A lane that is
        executing takes the batch that the head of the queue would start, only if it is full, and as late as useful:
        rows wait in the queue, not behind a lane. Of several the one that should end first. `contended`: there is
        another model's full batch; then it need not be full, else that would go first.
        """
        slots = self.slots
        self.due = slots.due = None
        if self.outside:
            self._refill()
        if not self._queue.rows and not self._again:
            return None
        lane = self._idlest() if slots.timed or self._again or self.out else next(iter(slots.idle), None)
        if lane is None and slots.staging and (contended or self.has_full):
            lane = self._next_to_end(now)
        batch = None if lane is None else self.pull(lane, now, contended)
        self.due = min(filter(None, (self.due, slots.due)), default=None)
        return None if lane is None or batch is None else (lane, batch)

    def bind_at_once(self, now: float) -> tuple[int, Batch] | None:
        """What `bind` would make of the calls that have just come, where it is one batch: nothing else waits, a lane is
        idle, and there is nothing to choose. They need not be queued then; None if they must be.
        """
        calls = self.arrivals
        if not calls or not self.slots.idle or self.out or self.has_work() or self.rules.max_delay != 0.0:
            return None
        first = calls[0]
        rows = 0
        for call in calls:
            if call.signature is not first.signature or call.bound or call.deadline != NEVER:
                return None
            if call.cut is not ANYWHERE:
                return None
            rows += call.rows
        sizes = self._sizes.get(first.bucket)
        size = self._preferred if sizes is None else sizes.pick(rows, at_once=True)
        if rows > size:
            return None
        for call in calls:
            call.bound = call.rows
        reason = "full" if rows == size else "drain" if self.draining else "core_idle"
        chunks = [(call, 0, call.rows) for call in calls]
        calls.clear()
        batch = Batch(chunks, rows, reason, None if sizes is None else size, first.bucket, scheduler=self)
        lane = next(iter(self.slots.idle))
        if self.slots.timed:
            batch.expected = self._estimate(lane, self._grouping.shape(first.bucket, rows), first.bucket)
        self.slots.occupy(lane, batch, now)
        return lane, batch

    def _idlest(self) -> int | None:
        """The idle lane for the next batch: the fastest if it has a deadline, else the one longest idle."""
        idle = [lane for lane in self.slots.idle if lane not in self.out] if self.out else list(self.slots.idle)
        if self._again:
            return next((lane for lane in idle if not self._avoids(lane)), next(iter(idle), None))
        head = self._queue.head() if len(idle) > 1 else None
        if head is None or head.calls[0].deadline == NEVER:
            return next(iter(idle), None)
        shape = self._grouping.shape(head.kind.bucket, min(head.kind.rows, head.kind.limit))
        return min(idle, key=lambda lane: self._estimate(lane, shape, head.kind.bucket))

    def _next_to_end(self, now: float) -> int | None:
        """The executing lane that another batch may be bound to now."""
        may = (lane for lane in self.lanes() if self.slots.has_slot(lane) and not self.slots.is_too_early(lane, now))
        return min(may, key=self.slots.ends.__getitem__, default=None)

    def pull(self, lane: int, now: float, contended: bool = False) -> Batch | None:
        """The next batch of a lane that has a free slot, by the rules of `bind`."""
        slots = self.slots
        while True:
            if self.outside:
                self._refill()
            bound = len(slots.bound[lane])
            busy, waits = bound > 0, self._queue.rows or self._again
            if not waits or bound >= slots.slots[lane] or lane in self.out:
                return None
            if busy and slots.is_too_early(lane, now):
                return None
            again = bool(self._again) and not self._avoids(lane)
            batch = self._again.popleft() if again else self._form(lane, busy, now, contended)
            if batch is not None:
                slots.occupy(lane, batch, now)
            if batch is not None or self._queue.rows or not self.outside:  # else all were late: there is room anew
                return batch

    def _avoids(self, lane: int) -> bool:
        """Whether the next batch to run again must go to another lane than this one."""
        retry = self._again[0].retry
        return retry is not None and retry.avoid == lane and any(other != lane for other in self.lanes())

    def _form(self, lane: int, busy: bool, now: float, contended: bool) -> Batch | None:
        """A batch that starts with the head of the order; None if nothing waits, or `busy` and it would not be full.

        Calls that cannot meet their deadline are dropped on the way; a busy lane's batch may be short of their rows.
        """
        while (head := self._queue.head()) is not None:
            kind = head.kind
            if kind.rows < kind.limit and head.calls[0].cut.shared:
                if busy and not contended:
                    return None
                if self.rules.max_delay != 0.0 and self._is_held(lane, kind, now):
                    other = self._delay.a_full_batch()
                    if other is None:
                        return None
                    head, kind = other, other.kind
            batch = self._take(head, kind, lane, busy, now)
            if batch is not None:
                return batch
        return None

    def _take(self, head: Flow, kind: Kind, lane: int, busy: bool, now: float) -> Batch | None:
        """A batch that starts with `head`; None if all its calls were late."""
        group = self._grouping.group(head, now, partial(self._cost, lane)) if kind.bucket else None
        bucket = max([each.bucket for each, _ in group]) if group else kind.bucket
        sizes = self._sizes.get(bucket)
        if group:
            waiting = sum([rows for _, rows in group])
            size = waiting if sizes is None else sizes.fit(waiting)
        else:
            size = kind.limit if sizes is None or not kind.anywhere else sizes.pick(min(kind.rows, kind.limit))
            waiting = min(kind.rows, size)
        shape = self._grouping.shape(bucket, waiting)
        expected = self._estimate(lane, shape, bucket) if self.slots.timed else 0.0
        end = partial(self._end, lane, busy, shape, bucket, now)
        pace = expected / max(1, self.rules.cores)
        filling = Filling(self._queue, size, kind.limit, end, pace, one_piece=not busy and len(self.slots.idle) > 1)
        if group:
            filling.take_group(head, group)
        else:
            filling.take(head, kind)
        if kind.bucket and sizes is not None and not filling.full and not busy:  # rows that would be padding
            for other in self._grouping.fillers(kind, bucket):
                filling.take(head, other)
        self.late += filling.late
        chunks = filling.chunks
        if not chunks:
            return None
        self._queue.started(filling.shares[0][0], chunks[0][0], now)
        rows = size - filling.room
        if group:
            bucket = max([call.bucket for call, _, _ in chunks])  # the longest may have left
            sizes = self._sizes.get(bucket)
        if sizes is None:
            compiled = None
        else:
            compiled = size if kind.anywhere and not filling.late and not group else sizes.fit(rows)
            if rows < compiled and self._queue.rows:
                filling.charge(compiled - rows, rows)
        for flow, _ in filling.shares:
            self._delay.mend(flow.kind.signature)
        reason = "full" if (rows >= kind.limit if group else filling.full) else self._reason(kind)
        return Batch(chunks, rows, reason, compiled, bucket, expected, scheduler=self)

    def _end(self, lane: int, busy: bool, shape: int, bucket: int, now: float) -> float:
        """When an execution of that shape will have ended: behind what the lane executes, or else on the lane that is
        soonest; -inf if that is not known.
        """
        lanes: Iterable[int] = (lane,) if busy else self.lanes()
        soonest = self.slots.soonest(lanes, now, lambda each: self._estimate(each, shape, bucket))
        return soonest + (self.slack if len(self.slots.idle) < 2 else 0.0)

    def _reason(self, kind: Kind) -> str:
        """Why a batch that is not full starts."""
        if self.draining:
            return "drain"
        if self._delay.over:
            return "delay"
        return "signature" if self._queue.rows > kind.rows else "core_idle"

    def _is_held(self, lane: int, kind: Kind, now: float) -> bool:
        """Whether a batch that is not full is held back for company: while another lane executes, and not for long."""
        others = any(bound for other, bound in enumerate(self.slots.bound) if other != lane)
        seconds = self.rules.max_delay if others and not self.draining else 0.0
        if seconds is None:
            service = self._estimate(lane, self._grouping.shape(kind.bucket, kind.limit), kind.bucket)
            seconds = self._delay.learned(service, self.rules.cores, now)
        until = self._delay.until(seconds, now)
        if until is not None:
            self.due = min(until, self.due or until)
        return until is not None


def rounded(rows: int) -> int:
    """A power of two that is not smaller: service times are learned for these where any number of rows will do."""
    return 1 << (rows - 1).bit_length()
