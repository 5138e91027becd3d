"""The lanes as the scheduler sees them: what each has in flight, when that should have ended, and who is idle.

Must not be here: waiting calls (fair_queue.py), which batch is next (scheduler.py), clocks: `now` is an argument.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from aneuron.sched.filling import Batch

Estimate = Callable[[int, int, int], float]  # seconds that a lane takes for a shape, (rows, bucket); 0 = unknown


class Slots:
    """The right of each lane to have batches in flight."""

    def __init__(self, estimate: Estimate) -> None:
        self.due: float | None = None  # when to ask again, if nothing else happens before
        self.staging = False  # whether any lane has a lead
        self.timed = False  # whether service times are asked for: there are deadlines, or leads
        self._estimate = estimate
        self._slots: list[int] = []
        self._ends: list[float] = []  # when what is in flight should have ended
        self._bound: list[dict[Batch[Any], None]] = []  # the batches in flight, oldest first
        self._lead: list[float | None] = []  # how long before that the loop may bind another batch; None: never
        self._idle: dict[int, None] = {}  # lanes with nothing in flight and a slot, longest idle first

    def resize(self, slots: Sequence[int], leads: Sequence[float | None] | None = None) -> None:
        """Give lane i `slots[i]` slots. Batches in flight beyond them finish; their slots do not come back.

        While a lane executes, the loop may bind its next batch `leads[i]` seconds before it should have ended.
        """
        more = len(slots) - len(self._slots)
        self._slots = list(slots)
        self._lead = list(leads) if leads is not None else [None] * len(slots)
        self.staging = any(lead is not None for lead in self._lead)
        self.timed = self.timed or self.staging
        self._ends += [0.0] * more
        self._bound += [{} for _ in range(more)]
        lanes = (*self._idle, *range(len(slots)))
        self._idle = {lane: None for lane in lanes if slots[lane] and not self._bound[lane]}

    def lead(self, lane: int, seconds: float) -> None:
        """Change a lane's lead."""
        self._lead[lane] = seconds
        self.staging = self.timed = True

    def release(self, lane: int, now: float, batch: Batch[Any] | None = None) -> None:
        """A batch of a lane has ended (None: its oldest); what is left begins now."""
        bound = self._bound[lane]
        self._unbind(lane, batch or next(iter(bound)))
        self._ends[lane] = now + sum([other.expected for other in bound])

    def move(self, batch: Batch[Any], lane: int, to: int, now: float) -> None:
        """A batch that was bound to a lane, behind another, is taken over by a third."""
        self._unbind(lane, batch)
        self._ends[lane] -= batch.expected
        self._occupy(to, batch, now)

    def retire(self, lane: int) -> None:
        """A lane is out of service: nothing more is bound to it."""
        self._slots[lane] = 0
        self._idle.pop(lane, None)

    def has_slot(self, lane: int) -> bool:
        """Whether a lane may have another batch."""
        return len(self._bound[lane]) < self._slots[lane]

    def in_flight(self, lane: int) -> int:
        """Batches that are bound to a lane or executing on it."""
        return len(self._bound[lane])

    def _occupy(self, lane: int, batch: Batch[Any], now: float) -> None:
        self._bound[lane][batch] = None
        self._ends[lane] = batch.due = max(now, self._ends[lane]) + batch.expected
        self._idle.pop(lane, None)

    def _unbind(self, lane: int, batch: Batch[Any]) -> None:
        """However a batch leaves a lane: one that has a slot and nothing left is idle."""
        bound = self._bound[lane]
        del bound[batch]
        if not bound and self._slots[lane]:
            self._idle[lane] = None

    def _lanes(self) -> Iterator[int]:
        return (lane for lane, slots in enumerate(self._slots) if slots)

    def _next_to_end(self, now: float) -> int | None:
        """The executing lane that another batch may be bound to now."""
        lanes = [lane for lane in self._lanes() if self.has_slot(lane) and not self._too_early(lane, now)]
        return min(lanes, key=self._ends.__getitem__, default=None)

    def _too_early(self, lane: int, now: float) -> bool:
        """Whether the next batch of an executing lane is to be bound later."""
        lead = self._lead[lane]
        if lead is None:
            return True
        due = self._ends[lane] - lead
        if due > now:
            self.due = min(due, self.due or due)
        return due > now


def spread(slots: int, lanes: int) -> list[int]:
    """`slots` slots over `lanes` lanes, evenly; the first ones get those left over."""
    each, extra = divmod(slots, lanes)
    return [each + (lane < extra) for lane in range(lanes)]
