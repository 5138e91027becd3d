"""One lane: how a core's threads, or the loop in their place (onloop.py), get what they execute.

A lane is never mended: where a thread hangs or has died its threads are told to end, and what serves later in its place
is a new lane. Must not be here: callers' futures (futures.py), decisions (sched/), how a thread works (threads.py).
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

from aneuron.backends import Fault
from aneuron.engine.board import Board
from aneuron.engine.execution import Execution
from aneuron.engine.threads import Workers
from aneuron.ownership import Owned, adopt
from aneuron.sched.filling import Batch
from aneuron.stats import Recent

COPYING_PAYS = 1 << 20  # bytes of a batch to copy, in and out, from which on a lane has a second thread
INPUT = Fault.INPUT  # looked up for each execution
TICK = 0.001  # seconds: event loops' timers are no finer


class Host(Protocol):
    """The loop's side of the lanes, as a thread may ask it."""

    def execution(self, batch: Batch, lane: int) -> Execution:
        """A batch as it is executed on a lane."""

    def moved(self, execution: Execution, lane: int) -> None:
        """An execution that was prepared for another lane goes on here."""

    def ended(self, execution: Execution, lane: int) -> None:
        """With the lock: a thread has come back with an execution whose program is out of service there."""

    def ask(self) -> None:
        """Have the loop dispatch."""

    def failed(self, error: BaseException) -> None:
        """A thread has met a bug of ours: the loop is to deal with it."""


class Driver(Protocol):
    """What serves a lane in place of its threads: the loop (onloop.py)."""

    def wake(self) -> None:
        """There may be something to do."""


class Lane:
    """A core, and who serves it."""

    owned = Owned(lock=("gone",), loop=("ended", "_slots", "_staging", "_concurrent"), set_by_loop=("on_loop",))

    def __init__(self, index: int, core_id: int, workers: Workers, board: Board, host: Host) -> None:
        self.index = index
        self.core_id = core_id
        self.workers = workers
        self.on_loop: Driver | None = None  # what serves it instead; decided with the first program, for good
        self.turn: AbstractContextManager[Any] = threading.Lock()  # to execute
        self.gone = False  # its threads take nothing more
        self.ended = 0.0  # when its last execution did, of whichever model
        self._board = board
        self._host = host
        self._clock: Callable[[], float] = workers.clock
        self._preparing = Recent()  # seconds
        self._slots = 0
        self._staging = False  # whether a second thread prepares the next batch meanwhile
        self._concurrent = False
        adopt(board.lock, self)

    # Worker threads.

    def take(self, ended: Execution | None) -> Execution | None:
        """The next execution, for a thread whose last one has `ended`."""
        board, host = self._board, self._host
        try:
            with board.lock:
                now = self._clock()
                waited_for = ended is None or board.end(self.index, ended, now)
                if ended is not None and (ended.fault is not INPUT or ended.loaded.out or not waited_for):
                    host.ended(ended, self.index)
                execution = None
                # A core that takes one execution has the next when that has ended; threads wait for its turn instead.
                full = self.on_loop is not None and not self._concurrent and bool(board.lanes[self.index].in_flight)
                if waited_for and not full and not self.gone and (ended is None or not ended.failed):
                    found = board.next(self.index, now)
                    if isinstance(found, Batch):
                        execution = host.execution(found, self.index)
                    elif found is not None:
                        host.moved(found, self.index)
                        execution = found
                    if execution is not None:
                        execution.lane = self
                        board.begin(self.index, execution, self.on_loop is None)
                asks = board.shares.tells()
                if execution is None and not asks and not board.lanes[self.index].in_flight:
                    asks = board.shares.has_work()
            if asks:  # what waits is held back, or for the loop to decide
                host.ask()
            return execution
        except BaseException as error:
            host.failed(error)
            return None

    def park(self, execution: Execution) -> bool:
        """It may be stolen, and is prepared: whether it is still there."""
        return self._board.park(self.index, execution)

    def claim(self, execution: Execution) -> bool:
        """It may be stolen, and the core is free: whether it is still there, from now on for good."""
        return self._board.claim(self.index, execution)

    # The loop.

    def wake(self) -> None:
        """There may be something to do."""
        if self.on_loop is not None:
            self.on_loop.wake()
        else:
            self.workers.wake(self)

    def widen(
        self, slots: int, concurrent: bool, crowded: bool, on_loop: "Callable[[Lane], Driver] | None"
    ) -> float | None:
        """Serve `slots` slots; the lead with which the loop may bind batches while the lane executes.

        With `on_loop`, which makes what serves the lane, it has no thread but for what would hold the loop up.

        Else a concurrent core has a thread for each slot, which are kept busy. Another has one thread, which takes its
        next batch when the last has ended; where copying takes long a second prepares the next batch meanwhile. So it
        is where all cores together are faster than Python: there more threads only wait for one another.
        """
        if on_loop is not None and not self._slots:
            self.on_loop = on_loop(self)
        self._slots, self._concurrent = slots, concurrent
        if self.on_loop is not None:
            return float("inf") if concurrent else None
        if concurrent and not crowded:
            self.workers.grow(max(1, slots))
            return float("inf")
        self.workers.grow(1)
        return self.lead if slots > 1 and self._staging else None

    @property
    def lead(self) -> float:
        """Twice the time to prepare a batch."""
        return 2 * self._preparing.median + TICK

    def copied(self, size: int, preparing: float, now: float) -> bool:
        """Note how many bytes of a batch were copied, and the seconds to prepare it; whether `lead` has changed.

        With small rows the handing over of the interpreter between two threads costs more than it saves. Bytes tell,
        not seconds: on a busy machine most of these are waiting for the interpreter, which a second one makes worse.
        """
        if not self._staging and (size < COPYING_PAYS or self._concurrent or self._slots < 2):
            return False
        self._preparing.add(preparing, now)
        if not self._staging:
            self._staging = True
            with suppress(RuntimeError):  # no more threads to be had: then the one does both
                self.workers.grow(2)
        return True
