"""The lanes of a pool as schedulers see them: what each has in flight, when that should have ended, and who is idle.

Must not be here: waiting calls (fair_queue.py), which batch is next (scheduler.py), clocks: `now` is an argument.
"""

from collections.abc import Callable, Iterable, Sequence

from aneuron.ownership import Owned
from aneuron.sched.call import NEVER
from aneuron.sched.filling import Batch


class Slots:
    """The right of each lane to have batches in flight, of whatever model.

    The loop alone sets `staging` and `timed`, and replaces `idle`; before it wakes anybody it asks without the lock
    whether any lane is idle.
    """

    owned = Owned(lock=("due", "slots", "ends", "bound", "_lead"), both=("staging", "timed", "idle"))

    def __init__(self) -> None:
        self.due: float | None = None  # when to ask again, if nothing else happens before
        self.staging = False  # whether any lane has a lead
        self.timed = False  # whether service times are asked for: there are deadlines, or leads
        self.slots: list[int] = []  # of each lane
        self.ends: list[float] = []  # when what is in flight should have ended
        self.bound: list[dict[Batch, None]] = []  # the batches in flight, oldest first
        self._lead: list[float | None] = []  # how long before that the loop may bind another batch; None: never
        self.idle: dict[int, None] = {}  # lanes with nothing in flight and a slot, longest idle first

    def resize(self, slots: Sequence[int], leads: Sequence[float | None] | None = None) -> None:
        """Give lane i `slots[i]` slots. Batches in flight beyond them finish; their slots do not come back.

        While a lane executes, the loop may bind its next batch `leads[i]` seconds before it should have ended.
        """
        more = len(slots) - len(self.slots)
        self.slots = list(slots)
        self._lead = list(leads) if leads is not None else [None] * len(slots)
        self.staging = any(lead is not None for lead in self._lead)
        self.timed = self.timed or self.staging
        self.ends += [0.0] * more
        self.bound += [{} for _ in range(more)]
        lanes = (*self.idle, *range(len(slots)))
        self.idle = {lane: None for lane in lanes if slots[lane] and not self.bound[lane]}

    def lead(self, lane: int, seconds: float) -> None:
        """Change a lane's lead."""
        self._lead[lane] = seconds
        self.staging = self.timed = True

    def release(self, lane: int, now: float, batch: Batch | None = None) -> None:
        """A batch of a lane has ended (None: its oldest); what is left begins now."""
        bound = self.bound[lane]
        self.unbind(lane, batch or next(iter(bound)))
        self.ends[lane] = now + sum([other.expected for other in bound])

    def move(self, batch: Batch, lane: int, to: int, now: float) -> None:
        """A batch that was bound to a lane, behind another, is taken over by a third."""
        self.unbind(lane, batch)
        self.ends[lane] -= batch.expected
        self.occupy(to, batch, now)

    def retire(self, lane: int) -> None:
        """A lane is out of service: nothing more is bound to it."""
        self.slots[lane] = 0
        self.idle.pop(lane, None)

    def has_slot(self, lane: int) -> bool:
        """Whether a lane may have another batch."""
        return len(self.bound[lane]) < self.slots[lane]

    def in_flight(self, lane: int) -> int:
        """Batches that are bound to a lane or executing on it."""
        return len(self.bound[lane])

    def occupy(self, lane: int, batch: Batch, now: float) -> None:
        """A batch is bound to a lane."""
        self.bound[lane][batch] = None
        self.ends[lane] = batch.due = max(now, self.ends[lane]) + batch.expected
        self.idle.pop(lane, None)

    def unbind(self, lane: int, batch: Batch) -> None:
        """However a batch leaves a lane: one that has a slot and nothing left is idle."""
        bound = self.bound[lane]
        del bound[batch]
        if not bound and self.slots[lane]:
            self.idle[lane] = None

    def soonest(self, lanes: Iterable[int], now: float, expected: Callable[[int], float]) -> float:
        """When an execution will have ended on the lane where it ends first, if it takes as `expected` says of each;
        -inf if one of these is not known (0).
        """
        ends = []
        for lane in lanes:
            if not (seconds := expected(lane)):
                return -NEVER
            ends.append(max(now, self.ends[lane]) + seconds)
        return min(ends)

    def is_too_early(self, lane: int, now: float) -> bool:
        """Whether the next batch of an executing lane is to be bound later."""
        lead = self._lead[lane]
        if lead is None:
            return True
        due = self.ends[lane] - lead
        if due > now:
            self.due = min(due, self.due or due)
        return due > now


def spread(slots: int, lanes: int) -> list[int]:
    """`slots` slots over `lanes` lanes, evenly; the first ones get those left over."""
    each, extra = divmod(slots, lanes)
    return [each + (lane < extra) for lane in range(lanes)]
