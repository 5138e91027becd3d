"""The lanes of a pool at work, on one loop: batches out to threads or cores, what they have done back in.

Lives here: what wakes whom, which models are served (run.py), and the end of all of it. Must not be here: callers'
futures (futures.py), faults (recovery.py), tensors, decisions (ask the board), blocking.

Lanes are driven by callbacks, not by tasks: `asyncio.run` cancels every task before a drain in `finally` gets its turn.
A worker that ends an execution takes its lane's next one itself (lane.py), as does the loop where it serves a lane
(onloop.py): rows are bound when the core is free for them, not before, and the way round by the loop is saved.
"""

import asyncio
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from threading import get_ident
from typing import Any, Protocol, TypeVar

from aneuron.backends import Backend
from aneuron.backends.traits import Traits
from aneuron.engine.board import Board
from aneuron.engine.execution import Execution
from aneuron.engine.failures import text
from aneuron.engine.lane import TICK, Driver, Lane
from aneuron.engine.loading import Loaded
from aneuron.engine.modes import OwnContext
from aneuron.engine.onloop import OnLoop, Submission
from aneuron.engine.threads import Workers
from aneuron.ownership import Owned, adopt, lock
from aneuron.sched.call import Call
from aneuron.sched.filling import Batch
from aneuron.sched.scheduler import Scheduler
from aneuron.sched.shares import Account
from aneuron.sched.slots import spread
from aneuron.stats import Counters, PoolStatistics, ShareStatistics

logger = logging.getLogger("aneuron")

T = TypeVar("T")

CROWDED = 4000.0  # executions a second that the cores could do, beyond which it is Python that they wait for
FORKED = (
    "this process was forked while the model was running: threads and devices stay with the parent; use the spawn "
    "method, or make and start a model of its own after the fork"
)


class Settling(Protocol):
    """What follows from executions that have ended."""

    def settle(self, execution: Execution, now: float) -> None:
        """End the calls that an execution has completed."""

    def relax(self) -> None:
        """Results have been handed out."""


class Served(Protocol):
    """A run of a model, as the lanes know it."""

    scheduler: Scheduler
    counters: Counters
    loaded: list[Loaded]  # the last one on each lane

    @property
    def settling(self) -> Settling:
        """What follows from its executions."""

    def serves(self, lane: int) -> bool:
        """Whether it may have batches on a lane."""

    def execution(self, batch: Batch, lane: int) -> Execution:
        """A batch as it is executed on a lane. Worker thread."""

    def expire(self, call: Call) -> None:
        """A call that waits cannot meet its deadline."""

    def close_what_is_out(self) -> None:
        """Close the cores that are out of service, if nothing executes on them."""

    def threads_died(self, lane: int, error: BaseException) -> None:
        """Threads of a lane have died: what they had in hand is lost."""

    def crash(self, why: str) -> None:
        """A bug of ours: end everything, whatever of it is broken."""

    def forget(self, why: str) -> None:
        """Be in a process that was forked."""

    def stop(self) -> None:
        """Begin nothing more, and free the cores as soon as nothing executes on them."""


class Dispatcher:
    """The lanes of a pool, from its start to its close."""

    owned = Owned(
        loop=("runs", "num_workers", "held", "coming", "changed", "answer", "handing", "_scheduled", "_timer"),
        set_by_loop=("slots", "stopped", "forked", "thread"),
        free=("_posted", "_completing"),  # see `_deliver`
    )

    def __init__(
        self, backend: Backend, traits: Traits, core_ids: Sequence[int], num_workers: int | None, held: bool
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()  # the loop's; to ask for the running loop costs a system call
        self.backend, self.traits = backend, traits
        self.core_ids = core_ids
        self.board = Board(len(core_ids))
        self.runs: list[Served] = []  # that are loaded on the lanes, or being loaded
        self.context = copy_context()  # that of the start, for all threads there will be
        self.num_workers = num_workers  # batches that may be in flight, on all lanes; None: two for each in service
        self.slots = num_workers or 0  # the same, as it is
        self.held = held  # the threads stay, also without a model
        self.coming = 0  # models that are about to be loaded
        self.forked = self.stopped = False
        self.changed: Callable[[], None] | None = None  # is told when cores come into service, or go
        self.answer: Callable[[], None] | None = None  # sends on what `handing` out has ended of calls from elsewhere
        self.handing = False
        self._scheduled = False  # a dispatch is
        self._timer: asyncio.TimerHandle | None = None  # a dispatch that is due later
        self._done: deque[Execution] = deque()  # filled by the workers
        self._posted = False  # a delivery is
        self._completed: deque[Submission] = deque()  # filled by the cores
        self._completing = False  # somebody is to look at them
        self._own_context = OwnContext(self.context)
        self.lanes = [self._new_lane(index) for index in range(len(core_ids))]
        self.clock = self.lanes[0].workers.clock
        adopt(self.board.lock, self)
        _all.add(self)

    # Lanes.

    def workers(self, core_id: int, context: Context | None = None) -> Workers:
        """Threads of a core, which start in a copy of a context; None: that of the pool's start."""
        name, make = f"aneuron-core-{core_id}", self.traits.workers
        return make(name) if make is not None else Workers(name, self.context if context is None else context)

    def _new_lane(self, index: int) -> Lane:
        core_id = self.core_ids[index]
        lane = Lane(index, core_id, self.workers(core_id), self.board, self)
        lane.workers.on_death = lambda error: self.call_loop(partial(self._thread_died, lane, error))
        return lane

    def replace(self, lane: Lane) -> None:
        """Threads of a lane do not come back: others serve in its place."""
        if self.lanes[lane.index] is not lane:
            return
        with self.board.lock:
            lane.gone = True
            for run in self.runs:  # whatever waits behind what hangs, of whichever model
                self.board.take_back(lane.index, run.scheduler)
        self.lanes[lane.index] = self._new_lane(lane.index)
        lane.workers.stop(lambda: self.call_loop(partial(self._threads_ended, lane)))

    def _threads_ended(self, lane: Lane) -> None:
        """Whatever threads of a lane that was replaced had in hand, they have it no longer."""
        with self.board.lock:
            self.board.forget(lane.index, lane)
        for run in self.runs:
            run.close_what_is_out()

    def _thread_died(self, lane: Lane, error: BaseException) -> None:
        """A worker thread has ended that was not told to: what its lane had in hand runs elsewhere."""
        self.replace(lane)
        for run in list(self.runs):
            self.guard(partial(run.threads_died, lane.index, error))
        self.spread()

    def resize(self, num_workers: int) -> None:
        """Let so many batches be in flight; those that are, are left alone."""
        self.num_workers = self.slots = num_workers
        self.spread()

    def spread(self) -> None:
        """Spread the slots over the lanes in service, and dispatch."""
        serving = [[run.loaded[index] for run in self.runs if run.serves(index)] for index in range(len(self.lanes))]
        in_service = sum(map(bool, serving))
        if self.num_workers is None:
            self.slots = max(self.slots, 2 * in_service)
        slots = self._slots_of_lanes(serving)
        crowded = sum([min([each.pace for each in loaded]) for loaded in serving if loaded]) > CROWDED
        leads = [
            lane.widen(own, all(each.concurrent for each in loaded), crowded, self._driver(loaded)) if own else None
            for lane, own, loaded in zip(self.lanes, slots, serving, strict=True)
        ]
        with self.board.lock:
            self.board.slots.resize(slots, leads)
        self.dispatch_soon()
        if self.changed is not None:
            self.changed()

    def _driver(self, loaded: "Sequence[Loaded]") -> Callable[[Lane], Driver] | None:
        """What makes the loop serve a lane with these programs, where their cores need no threads."""
        if self.traits.inline or all(each.submits for each in loaded):
            return self._serve_on_loop
        return None

    def _serve_on_loop(self, lane: Lane) -> Driver:
        on_loop = OnLoop(lane, lane.workers, self, self._own_context, self.traits.inline)
        adopt(self.board.lock, on_loop)
        return on_loop

    def _slots_of_lanes(self, serving: "Sequence[Sequence[Loaded]]") -> list[int]:
        """The slots of each lane. Where they do not suffice for all lanes, those have them that most models can use; a
        model that has none of these has one all the same, for it would wait for ever.
        """
        slots = [0] * len(serving)
        lanes = sorted(
            (index for index, loaded in enumerate(serving) if loaded), key=lambda index: -len(serving[index])
        )
        for index, share in zip(lanes, spread(self.slots, max(1, len(lanes))), strict=False):
            slots[index] = share
        for run in self.runs:
            own = [index for index in lanes if run.serves(index)]
            if own and self.slots and not any(slots[index] for index in own):
                slots[own[0]] = 1
        return slots

    # Batches out.

    def dispatch_soon(self) -> None:
        """Dispatch at the end of this iteration of the loop, so that calls made in the same one are packed together."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.dispatch)

    def call_came(self) -> None:
        """See that it is dispatched, unless that is going to be, or a lane that ends looks for it."""
        if not self._scheduled and self.board.shares.wants_calls():
            self.dispatch_soon()

    def hold(self) -> bool:
        """Dispatch at `let_go`, for who knows all calls of this iteration; False if it is to be dispatched anyway."""
        if self._scheduled:
            return False
        self._scheduled = True
        return True

    def let_go(self) -> None:
        """Dispatch what has come since `hold`, and do not wait for the end of the iteration."""
        self.dispatch()

    def dispatch(self) -> None:
        """Queue what has come, and wake the lanes that can begin with it."""
        self._scheduled = False
        try:
            now = self.clock()
            decision = self.board.bind(now)
            for index, _ in decision.batches:
                self.lanes[index].wake()
            if decision.due is not None and not self.stopped:
                self._dispatch_at(decision.due, now)
            for scheduler, call in decision.late:
                scheduler.run.expire(call)
        except BaseException as error:
            self.crash(error)

    def _dispatch_at(self, due: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(max(due - now, TICK), self.dispatch)

    # For the lanes' threads.

    def execution(self, batch: Batch, lane: int) -> Execution:
        """A batch as it is executed on a lane. Worker thread."""
        return batch.scheduler.run.execution(batch, lane)  # type: ignore[no-any-return]

    def moved(self, execution: Execution, lane: int) -> None:
        """An execution that was prepared for another lane goes on here. Worker thread."""
        execution.loaded = execution.batch.scheduler.run.loaded[lane]

    def ended(self, execution: Execution, lane: int) -> None:
        """With the lock: a thread has come back with an execution, whose core has failed or is out of service."""
        if execution.loaded.out:
            if not self.board.holds(lane, execution.loaded):
                self.call_loop(partial(self.guard, execution.batch.scheduler.run.close_what_is_out))
        elif not execution.abandoned:
            self.board.recall(lane, execution.batch.scheduler)

    def ask(self) -> None:
        """Have the loop dispatch. Worker thread."""
        self.call_loop(self.dispatch_soon)

    def failed(self, error: BaseException) -> None:
        """A thread has met a bug of ours. Worker thread."""
        self.call_loop(partial(self.crash, error))

    def crash(self, error: BaseException) -> None:
        """A bug of ours must not leave anybody waiting, nor may a cancellation or an exit that has gone astray."""
        logger.critical("the lanes failed and are closed; please report this", exc_info=error)
        why = f"the model was closed by an internal error ({text(error)}); please report it. aclose(), then start()"
        for run in list(self.runs):
            run.crash(why)
        with suppress(BaseException):  # also if they are held: the next start has others
            self.stop()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error

    def took(self, execution: Execution, now: float) -> None:
        """An execution has ended."""
        lane = execution.lane
        if lane.copied(execution.copied, execution.preparing, now):
            with self.board.lock:
                self.board.slots.lead(lane.index, lane.lead)

    # Results back.

    def post(self, execution: Execution) -> None:
        """An execution has ended. Worker thread."""
        self._done.append(execution)
        if not self._posted:
            self._posted = True
            try:
                self.call_loop(self._deliver)
            except BaseException:
                self._posted = False  # the next one tries again
                raise

    def completed(self, submission: Submission) -> None:
        """A submission has ended: the loop is to go on with it. From any thread."""
        self._completed.append(submission)
        if not self._completing:
            self._completing = True
            self.call_loop(self._go_on)

    def _go_on(self) -> None:
        self._completing = False  # as in `_deliver`
        self._completed.rotate(0)
        try:
            while self._completed:
                submission = self._completed.popleft()
                submission.on_loop.completed(submission)
        except BaseException as error:
            self.crash(error)
        self._deliver()

    def call_loop(self, callback: Callable[[], Any]) -> None:
        """Have the loop call. From any thread."""
        try:
            if get_ident() == self.thread:
                self.loop.call_soon(callback)
            else:
                self.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            logger.debug("the loop is closed, nobody waits")

    def _deliver(self) -> None:
        self._posted = False  # before the queue is emptied: what is posted from here on posts again
        self._done.rotate(0)  # where there is no GIL: takes the queue's own lock, which orders the two
        self.hand_out()
        if self.board.slots.staging and self.board.shares.has_work():
            self.dispatch_soon()

    def hand_out(self) -> None:
        """End the calls that executions have completed; results need not wait for the end of a long iteration."""
        if not self._done:
            return
        now = self.clock()
        self.handing = True
        try:
            runs: list[Served] = []
            while self._done:
                execution = self._done.popleft()
                run = execution.batch.scheduler.run
                if run not in runs:  # of those that wait, the first has waited longest
                    runs.append(run)
                    run.counters.loop_lag_seconds.add(now - execution.posted)
                run.settling.settle(execution, now)
            for run in runs:
                run.settling.relax()
            if self.answer is not None:
                self.answer()
        except BaseException as error:
            self.crash(error)
        finally:
            self.handing = False

    # The loop.

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Have the loop call; what it raises closes the lanes."""
        return self.loop.call_later(delay, self.guard, callback)

    def guard(self, callback: Callable[[], None]) -> None:
        """Call; what it raises closes the lanes."""
        try:
            callback()
        except BaseException as error:
            self.crash(error)

    # Models come and go.

    def add(self, run: Served, weight: float) -> None:
        """A model is to be loaded on the lanes; it is served as soon as it serves on one of them."""
        self.runs.append(run)
        with self.board.lock:
            self.board.shares.add(run.scheduler, weight, run.counters)
            adopt(self.board.lock, *self.board.shares.shares)

    def remove(self, run: Served) -> None:
        """A model has left."""
        with suppress(ValueError):
            self.runs.remove(run)
        with self.board.lock:
            self.board.shares.remove(run.scheduler)
        self.stop_if_unused()
        if not self.stopped and not self.loop.is_closed():
            self.spread()

    def stop_if_unused(self) -> None:
        """End the threads where no model needs them any more."""
        if not self.runs and not self.held and not self.coming:
            self.stop()

    def stop(self) -> None:
        """Let every lane's threads end."""
        if self.stopped:
            return
        self.stopped = True
        with self.board.lock:
            self.board.stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for lane in self.lanes:
            lane.workers.stop()

    def join(self) -> None:
        """Wait for the threads to end, which have been told to and have nothing in hand."""
        with self.board.lock:
            idle = [lane for lane, bound in zip(self.lanes, self.board.lanes, strict=True) if not bound.in_flight]
        for lane in idle:
            lane.workers.join(1.0)

    async def gone(self) -> None:
        """Nothing else is waited for."""

    def statistics(self) -> PoolStatistics:
        """The frozen snapshot of now, from any thread."""
        board = self.board
        with board.lock:
            models = tuple(self._share(account) for account in board.shares.accounts)
            in_flight = tuple(map(len, board.slots.bound))
            return PoolStatistics(tuple(self.core_ids), tuple(board.slots.slots), in_flight, models)

    def _share(self, account: Account) -> ShareStatistics:
        schedulers = [share.scheduler for share in self.board.shares.shares if share.account is account]
        in_flight = sum(sum(self.board.in_flight(each)) for each in schedulers)
        return ShareStatistics(account.weight, in_flight, sum(each.waiting_rows for each in schedulers), account.busy)

    def forget(self) -> None:
        """Be in a process that was forked: nothing here works any more, and nothing may wait."""
        self.forked, self.thread = True, 0
        self.board.lock = lock()
        for run in self.runs:
            run.forget(FORKED)


async def in_a_thread(fn: Callable[[], T], make: Callable[[str], Any] | None = None) -> T:
    """What may take long; `make` makes threads, or what stands for them."""
    workers = (make or Workers)("aneuron-start")
    workers.grow(1)
    try:
        future: asyncio.Future[T] = asyncio.wrap_future(workers.submit(fn))
        return await future
    finally:
        workers.stop()


_all: "weakref.WeakSet[Dispatcher]" = weakref.WeakSet()


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
