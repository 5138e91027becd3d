"""What is bound, in flight and free on every lane of a pool: the one place, behind the one lock.

Lives here: the lock, which the loop and the workers take in turn, and what it guards: the slots, the queues of the
models that share the lanes (sched/), and each lane's queue and executions. Must not be here: decisions (sched/),
calling anybody: what is asked for is answered, and whoever asks acts on it.
"""

import asyncio
from collections.abc import Sequence

from aneuron.engine.execution import Execution
from aneuron.ownership import Owned, adopt, lock
from aneuron.sched.filling import Batch
from aneuron.sched.scheduler import Scheduler
from aneuron.sched.shares import Decision, Shares


class Bound:
    """What one lane has been given."""

    owned = Owned(lock=("queue", "in_flight", "staged", "given_up", "since", "busy_until"))

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Batch] = asyncio.Queue()  # bound by the loop, not taken by a thread yet
        self.in_flight: list[Execution] = []
        self.staged: list[Execution] = []  # those that are prepared and wait for the core
        self.given_up: list[Execution] = []  # whose threads have not come back
        self.since = 0.0  # when the oldest one in flight came to be the oldest
        self.busy_until = 0.0  # what came before that has been charged


class Board:
    """The lanes of a pool, by number. Whoever calls a method holds the `lock`, but where it says that it takes it."""

    owned = Owned(lock=("stopped",), free=("lock",), parts=("shares", "slots"))  # another lock after a fork

    def __init__(self, lanes: int) -> None:
        self.lock = lock()
        self.shares = Shares()
        self.slots = self.shares.slots
        self.lanes = [Bound() for _ in range(lanes)]
        self.stopped = False  # nothing is bound any more
        adopt(self.lock, self, *self.lanes)

    def bind(self, now: float) -> Decision:
        """Bind what can begin to lanes. Takes the lock."""
        with self.lock:
            if self.stopped:
                return Decision((), None, ())
            decision = self.shares.bind(now)
            for lane, batch in decision.batches:
                self.lanes[lane].queue.put_nowait(batch)
            return decision

    # For a thread of a lane.

    def begin(self, lane: int, execution: Execution, waits: bool) -> None:
        """Somebody has an execution in hand. Who waits with it, behind another one, may be robbed of it until the core
        is free for it.
        """
        bound = self.lanes[lane]
        execution.may_be_stolen = waits and bool(bound.in_flight)
        bound.in_flight.append(execution)

    def end(self, lane: int, execution: Execution, now: float) -> bool:
        """Somebody has come back with an execution; False if that had been given up."""
        bound = self.lanes[lane]
        if execution.abandoned:
            if execution in bound.given_up:  # else its lane has been forgotten since
                bound.given_up.remove(execution)
            return False
        if bound.in_flight[0] is execution:
            bound.since = now
        bound.in_flight.remove(execution)
        self.slots.release(lane, now, execution.batch)
        self._charge(bound, execution, execution.ended)
        return True

    def _charge(self, bound: Bound, execution: Execution, ended: float) -> None:
        """Charge the time that an execution has had a core for: its model's next batch is bound with that known."""
        seconds = ended - max(execution.started, bound.busy_until) if execution.begun else 0.0
        bound.busy_until = max(bound.busy_until, ended)
        self.shares.took(execution.batch, max(0.0, seconds))

    def next(self, lane: int, now: float) -> Batch | Execution | None:
        """What a lane is to do next: from its queue, from the schedulers, or stolen from a lane that is late."""
        bound = self.lanes[lane]
        if self.stopped:
            return None
        if not bound.queue.empty():
            return bound.queue.get_nowait()
        batch = self.shares.pull(lane, now)
        if batch is not None or bound.in_flight or not self.slots.staging or not self.slots.has_slot(lane):
            return batch
        return self._steal(lane, now)

    def _steal(self, lane: int, now: float) -> Batch | Execution | None:
        """What is bound to another lane and has not begun, for one that has nothing to do."""
        for index, other in enumerate(self.lanes):
            for execution in other.staged:
                if lane not in execution.batch.scheduler.out:
                    other.staged.remove(execution)
                    other.in_flight.remove(execution)
                    self.slots.move(execution.batch, index, lane, now)
                    return execution
            if other.in_flight and not other.queue.empty():
                batch = other.queue.get_nowait()
                if lane not in batch.scheduler.out:
                    self.slots.move(batch, index, lane, now)
                    return batch
                other.queue.put_nowait(batch)
        return None

    def park(self, lane: int, execution: Execution) -> bool:
        """An execution that may be stolen is prepared; whether it is still this lane's. Takes the lock."""
        with self.lock:
            bound = self.lanes[lane]
            if execution not in bound.in_flight:
                return False
            bound.staged.append(execution)
            return True

    def claim(self, lane: int, execution: Execution) -> bool:
        """The core is free for it; whether it is still this lane's, from now on for good. Takes the lock."""
        with self.lock:
            bound = self.lanes[lane]
            if execution not in bound.staged:
                return False
            bound.staged.remove(execution)
            execution.may_be_stolen = False
            return True

    # For the loop.

    def recall(self, lane: int, scheduler: Scheduler) -> None:
        """Nothing more of a model is bound to a lane; what of it has not begun there is to run elsewhere."""
        scheduler.out.add(lane)
        self.take_back(lane, scheduler)

    def take_back(self, lane: int, scheduler: Scheduler) -> None:
        """What of a model is bound to a lane, and has not begun, waits again."""
        bound = self.lanes[lane]
        queued = [bound.queue.get_nowait() for _ in range(bound.queue.qsize())]
        back = [batch for batch in queued if batch.scheduler is scheduler]
        for batch in queued:
            if batch.scheduler is not scheduler:
                bound.queue.put_nowait(batch)
        for execution in [each for each in bound.in_flight if each.may_be_stolen]:
            if execution.batch.scheduler is scheduler:
                bound.in_flight.remove(execution)
                if execution in bound.staged:
                    bound.staged.remove(execution)
                back.append(execution.batch)
        for batch in reversed(back):
            scheduler.recall(lane, batch)
            self.shares.took(batch, 0.0)

    def give_up(self, lane: int, execution: Execution, now: float) -> bool:
        """Wait for an execution no more; whether it had not ended."""
        bound = self.lanes[lane]
        if execution not in bound.in_flight:
            return False
        if execution.submission is None:
            bound.given_up.append(execution)
        elif not execution.submission.drop():  # the loop is about to hear of it
            return False
        execution.abandoned = True
        bound.in_flight.remove(execution)
        self.slots.release(lane, now, execution.batch)
        self._charge(bound, execution, now)
        return True

    def executing(self, scheduler: Scheduler) -> list[list[Execution]]:
        """What executes of a model, by lane, oldest first; not where another one's is older. Takes the lock."""
        with self.lock:
            found = [[each for each in bound.in_flight if each.begun and not each.over] for bound in self.lanes]
        return [
            [each for each in executions if each.batch.scheduler is scheduler]
            for executions in found
            if executions and executions[0].batch.scheduler is scheduler
        ]

    def holds(self, lane: int, loaded: object) -> bool:
        """Whether any thread of a lane has an execution of what is loaded in hand, given up or not."""
        bound = self.lanes[lane]
        return any(each.loaded is loaded for each in (*bound.in_flight, *bound.given_up))

    def forget(self, lane: int, gone: object) -> None:
        """The threads of a lane that was replaced have ended, and have nothing in hand any more."""
        bound = self.lanes[lane]
        bound.given_up = [each for each in bound.given_up if each.lane is not gone]

    def not_begun(self, scheduler: Scheduler) -> list[Batch]:
        """The batches of a model that are bound, and have not begun; those in queues are taken out of them."""
        batches: list[Batch] = []
        for index, bound in enumerate(self.lanes):
            for batch in [bound.queue.get_nowait() for _ in range(bound.queue.qsize())]:
                if batch.scheduler is scheduler:
                    self.slots.unbind(index, batch)
                    batches.append(batch)
                else:
                    bound.queue.put_nowait(batch)
            batches += [each.batch for each in bound.in_flight if not each.begun and each.batch.scheduler is scheduler]
        return batches

    def in_flight(self, scheduler: Scheduler) -> Sequence[int]:
        """Batches of a model that are bound to each lane, or execute there."""
        return [sum([batch.scheduler is scheduler for batch in bound]) for bound in self.slots.bound]
