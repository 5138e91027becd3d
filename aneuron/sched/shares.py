"""Which of the models on a pool gets a lane: shares by weight.

Lives here: turns between models. Must not be here: which rows of a model go first (scheduler.py), asyncio, threads,
torch, a clock: `now` is an argument.

Models take turns by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), in seconds of cores: each has a tag,
the lowest goes first, and its tag grows by the seconds that its batch takes, divided by its weight. What a batch was
expected to take is charged when it is bound, the rest when it has ended. A model that had nothing waiting starts where
whoever was served last has started, and one that passes its turn goes on from there: they are owed nothing, and what
they leave is the others' at once. Where priorities differ those levels go first that are more urgent, as within a
model: a second of waiting counts as much as a unit of priority.
"""

from collections.abc import Sequence

from aneuron.ownership import Owned
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


class Account:
    """What one model has had. Two of its schedulers share one while a swap goes on."""

    owned = Owned(lock=("tag", "turn", "busy"))

    def __init__(self, model: object, weight: float) -> None:
        self.model = model
        self.weight = weight
        self.tag = 0.0
        self.turn = 0  # the number of its last one: of equals it is that one's turn who has waited for longest
        self.busy = 0.0  # seconds that its batches have taken


class Share:
    """A scheduler, and whose account its batches are charged to."""

    owned = Owned(lock=("waits",), parts=("account",))

    def __init__(self, scheduler: Scheduler, account: Account) -> None:
        self.scheduler = scheduler
        self.account = account
        self.waits = False  # whether anything did when it was looked at last


class Shares:
    """The models on a pool, and the slots that they share."""

    owned = Owned(lock=("_turns", "_time"), both=("shares",))

    def __init__(self) -> None:
        self.slots = Slots()
        self.shares: list[Share] = []
        self._turns = 0
        self._time = 0.0  # where the batch that was bound last has started

    def has_work(self) -> bool:
        """Whether anything waits for a lane, or has come and is not queued."""
        for share in self.shares:  # no generator where a type is compiled
            # Where there is no GIL this takes the queue's own lock: who has appended to it before sees an idle lane, or
            # what it has appended is seen here.
            share.scheduler.arrivals.rotate(0)
            if share.scheduler.arrivals or share.scheduler.has_work():
                return True
        return False

    def wants_calls(self) -> bool:
        """Whether a call that comes may begin, or be bound, before a lane ends what it executes."""
        return self.slots.staging or bool(self.slots.idle)

    @property
    def accounts(self) -> Sequence[Account]:
        """Those of the models, in order of coming."""
        return list(dict.fromkeys([share.account for share in self.shares]))

    def add(self, scheduler: Scheduler, weight: float = 1.0, model: object = None) -> None:
        """A scheduler of a model has come; beside the one that it has already, whose place it will take."""
        same = [index for index, each in enumerate(self.shares) if model is not None and each.account.model is model]
        account = self.shares[same[-1]].account if same else Account(model, weight)
        self.shares.insert(same[-1] + 1 if same else len(self.shares), Share(scheduler, account))
        if len(self.shares) > 1:
            self.slots.timed = True  # what batches will take is charged

    def remove(self, scheduler: Scheduler) -> None:
        """It has left."""
        self.shares = [share for share in self.shares if share.scheduler is not scheduler]

    def bind(self, now: float) -> Decision:
        """What can begin, or be bound to lanes that execute."""
        if len(self.shares) == 1:
            bound = self.shares[0].scheduler.bind_at_once(now)
            if bound is not None:
                self._charge(self.shares[0], bound[1], ())
                return Decision((bound,), None, ())
        self._flush()
        batches: list[tuple[int, Batch]] = []
        due: float | None = None
        more = True
        while more:
            more, due = False, None
            passed: list[Share] = []
            turns = self._in_turn()
            for share in turns:
                bound = share.scheduler.bind(now, _contended(share, turns))
                if bound is not None:
                    self._charge(share, bound[1], passed)
                    batches.append(bound)
                    more = True
                    break
                passed.append(share)
                due = min(filter(None, (due, share.scheduler.due)), default=None)
        return Decision(batches, due, self._late())

    def pull(self, lane: int, now: float) -> Batch | None:
        """The next batch of a lane that has a slot; who is late meanwhile is told by the next `bind`."""
        self._flush()
        passed: list[Share] = []
        turns = self._in_turn()
        for share in turns:
            batch = share.scheduler.pull(lane, now, _contended(share, turns))
            if batch is not None:
                self._charge(share, batch, passed)
                return batch
            passed.append(share)
        return None

    def tells(self) -> bool:
        """Whether `bind` has something to say even if nothing can begin."""
        for share in self.shares:  # noqa: SIM110  # see above
            if share.scheduler.late:
                return True
        return False

    def took(self, batch: Batch, seconds: float) -> None:
        """A batch has ended, or will not begin, and has taken so many seconds of its core."""
        for share in self.shares:
            if share.scheduler is batch.scheduler:
                share.account.busy += seconds
                share.account.tag += (seconds - batch.expected) / share.account.weight

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
        waiting: list[tuple[float, Share]] = []  # with their priorities
        for share in shares:
            waited, share.waits = share.waits, share.scheduler.has_work()
            if share.waits:
                if not waited:
                    share.account.tag = max(share.account.tag, self._now(share))
                priority, since = share.scheduler.head()
                levels[priority] = min(since, levels.get(priority, since))
                waiting.append((priority, share))
        waiting.sort(key=lambda each: (levels[each[0]], each[1].account.tag, each[1].account.turn))
        return [share for _, share in waiting]

    def _now(self, share: Share) -> float:
        """Where a model starts that has come back: where the last batch has, or who has waited for longest, whose turns
        others may have had for their priority. After a time when nobody waited all are equal.
        """
        tags = [each.account.tag for each in self.shares if each.waits and each is not share]
        if tags:
            return min(self._time, *tags)
        return max([each.account.tag for each in self.shares])

    def _charge(self, share: Share, batch: Batch, passed: Sequence[Share]) -> None:
        account = share.account
        self._time = account.tag
        for other in passed:
            other.account.tag = max(other.account.tag, self._time)
        account.tag += batch.expected / account.weight
        self._turns += 1
        account.turn = self._turns

    def _late(self) -> list[tuple[Scheduler, Call]]:
        if not self.tells():
            return []
        late: list[tuple[Scheduler, Call]] = []
        for share in self.shares:
            if share.scheduler.late:
                late += [(share.scheduler, call) for call in share.scheduler.late]
                share.scheduler.late = []
        return late


def _contended(share: Share, turns: Sequence[Share]) -> bool:
    """Whether another model would take the slot that one leaves because it waits for company."""
    return len(turns) > 1 and any(other.scheduler.has_full for other in turns if other is not share)
