"""Which of the models on a pool gets a lane: shares by weight.

Lives here: turns between models. Must not be here: which rows of a model go first (scheduler.py), asyncio, threads,
torch, a clock: `now` is an argument.

Models take turns by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in seconds of cores: each has a tag,
the lowest goes first, and its tag grows by the seconds that its batch takes, divided by its weight. What a batch was
expected to take is charged when it is bound, the rest when it has ended. A model that had nothing waiting starts at the
time of whoever was served last: it is owed nothing, and what it leaves is the others' at once. Where priorities differ
those levels go first that are more urgent, as within a model: a second of waiting counts as much as a unit of priority.
"""

from collections.abc import Sequence

from aneuron.sched.call import Call
from aneuron.sched.filling import Batch
from aneuron.sched.scheduler import Scheduler
from aneuron.sched.slots import Slots


class Decision:
    """What is to be done now: batches with their lanes, when to ask again at the latest, calls that are too late."""

    __slots__ = ("batches", "due", "late")

    def __init__(
        self, batches: Sequence[tuple[int, Batch]], due: float | None, late: Sequence[tuple[Scheduler, Call]]
    ) -> None:
        self.batches = batches
        self.due = due
        self.late = late


class Share:
    """What one model has had, as its tag says."""

    __slots__ = ("busy", "scheduler", "tag", "waits", "weight")

    def __init__(self, scheduler: Scheduler, weight: float) -> None:
        self.scheduler = scheduler
        self.weight = weight
        self.tag = 0.0
        self.busy = 0.0  # seconds that its batches have taken
        self.waits = False  # whether anything did when it was looked at last


class Shares:
    """The models on a pool, and the slots that they share."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.shares: list[Share] = []
        self._time = 0.0

    def has_work(self) -> bool:
        """Whether anything waits for a lane, or has come and is not queued."""
        for share in self.shares:  # noqa: SIM110  # no generator where a type is compiled
            if share.scheduler.arrivals or share.scheduler.has_work():
                return True
        return False

    def wants_calls(self) -> bool:
        """Whether a call that comes may begin, or be bound, before a lane ends what it executes."""
        return self.slots.staging or bool(self.slots.idle)

    def add(self, scheduler: Scheduler, weight: float) -> None:
        """A model has come."""
        self.shares.append(Share(scheduler, weight))
        if len(self.shares) > 1:
            self.slots.timed = True  # what batches will take is charged

    def remove(self, scheduler: Scheduler) -> None:
        """A model has left."""
        self.shares = [share for share in self.shares if share.scheduler is not scheduler]

    def bind(self, now: float) -> Decision:
        """What can begin, or be bound to lanes that execute."""
        if len(self.shares) == 1:
            bound = self.shares[0].scheduler.bind_at_once(now)
            if bound is not None:
                return Decision((bound,), None, ())
        self._flush()
        batches: list[tuple[int, Batch]] = []
        due: float | None = None
        more = True
        while more:
            more, due = False, None
            for share in self._in_turn():
                bound = share.scheduler.bind(now)
                if bound is not None:
                    self._charge(share, bound[1])
                    batches.append(bound)
                    more = True
                    break
                due = min(filter(None, (due, share.scheduler.due)), default=None)
        return Decision(batches, due, self._late())

    def pull(self, lane: int, now: float) -> Batch | None:
        """The next batch of a lane that has a slot; who is late meanwhile is told by the next `bind`."""
        self._flush()
        for share in self._in_turn():
            batch = share.scheduler.pull(lane, now)
            if batch is not None:
                self._charge(share, batch)
                return batch
        return None

    def tells(self) -> bool:
        """Whether `bind` has something to say even if nothing can begin."""
        for share in self.shares:  # noqa: SIM110  # see above
            if share.scheduler.late:
                return True
        return False

    def took(self, batch: Batch, seconds: float) -> None:
        """A batch has ended, and has taken so many seconds of its core."""
        for share in self.shares:
            if share.scheduler is batch.scheduler:
                share.busy += seconds
                share.tag += (seconds - batch.expected) / share.weight

    def _flush(self) -> None:
        for share in self.shares:
            if share.scheduler.arrivals:
                share.scheduler.flush()

    def _in_turn(self) -> Sequence[Share]:
        """Those that have something waiting, whose turn it is first."""
        shares = self.shares
        if len(shares) == 1:
            return shares
        levels: dict[float, float] = {}
        waiting: list[tuple[float, Share]] = []
        for share in shares:
            waited, share.waits = share.waits, share.scheduler.has_work()
            if share.waits:
                if not waited:
                    share.tag = max(share.tag, self._time)
                priority, since = share.scheduler.head()
                levels[priority] = min(since, levels.get(priority, since))
                waiting.append((priority, share))
        return [share for _, share in sorted(waiting, key=lambda each: (levels[each[0]], each[1].tag))]

    def _charge(self, share: Share, batch: Batch) -> None:
        self._time = max(self._time, share.tag)
        share.tag += batch.expected / share.weight

    def _late(self) -> list[tuple[Scheduler, Call]]:
        if not self.tells():
            return []
        late: list[tuple[Scheduler, Call]] = []
        for share in self.shares:
            if share.scheduler.late:
                late += [(share.scheduler, call) for call in share.scheduler.late]
                share.scheduler.late = []
        return late
