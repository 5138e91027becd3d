"""A lane that the event loop serves: its cores need no thread to wait for them.

Lives here: how executions are handed to cores that say later that they are done (`SubmittingCore`), or are executed in
place (`inline`), and what of that goes to the lane's threads all the same, because it would hold the loop up: large
copies, executions that an observer is around, those that show which outputs have rows. Must not be here: which batch is
next (lane.py, board.py), how threads wait (threads.py), callers' futures.
"""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, Protocol

from aneuron.engine.execution import Execution
from aneuron.engine.lane import Lane
from aneuron.engine.modes import Aside, OwnContext
from aneuron.engine.threads import Workers, execute
from aneuron.observing import is_observed
from aneuron.ownership import Owned

TURN = 0.001  # seconds of executing in place, after which the loop gets its turn


class Host(Protocol):
    """The loop's side."""

    def completed(self, submission: "Submission") -> None:
        """A submission has ended: the loop is to go on with it. From any thread."""

    def call_loop(self, callback: Callable[[], Any]) -> None:
        """Have the loop call. From any thread."""

    def guard(self, callback: Callable[[], None]) -> None:
        """Call; what it raises closes the lanes."""

    def failed(self, error: BaseException) -> None:
        """A bug of ours: the loop is to deal with it."""


class Submission:
    """An execution that a core was handed. It is done, or given up, whichever comes first: the other has no effect. Who
    calls `done` first sets what is free, then the loop takes it.
    """

    owned = Owned(free=("output", "error"))

    __slots__ = ("_first", "_host", "error", "execution", "on_loop", "output")

    def __init__(self, on_loop: "OnLoop", execution: Execution, host: Host) -> None:
        self.on_loop, self.execution = on_loop, execution
        self.output: Any = None
        self.error: BaseException | None = None
        self._host = host
        self._first = Lock()

    def done(self, output: Any, error: BaseException | None) -> None:
        """What the core calls, once; more often has no effect. From any thread."""
        if self.drop():
            self.output, self.error = output, error
            self._host.completed(self)

    def drop(self) -> bool:
        """Heed no `done` from now on, nor keep what that brings; whether there has been none."""
        return self._first.acquire(blocking=False)


class OnLoop:
    """What drives a lane, in place of threads. All its methods are called on the loop."""

    def __init__(self, lane: Lane, workers: Workers, host: Host, context: OwnContext, inline: bool) -> None:
        self.inline = inline
        self._lane = lane
        self._workers = workers
        self._host = host
        self._context = context  # to execute in
        self._clock = workers.clock
        self._aside = Aside()

    def wake(self) -> None:
        """There may be something to begin with."""
        self._go_on(None)

    def completed(self, submission: Submission) -> None:
        """Take the result of a submission."""
        execution = submission.execution
        output, submission.output = submission.output, None
        error, submission.error = submission.error, None
        with self._aside:
            understood = execution.take_result(output, error, self._clock)
        del output, error
        if understood:
            self._ended(execution)
        else:
            self._in_thread(execution, partial(execution.understand, self._clock), self._ended)

    def _ended(self, execution: Execution) -> None:
        """The core goes on with the next one, before the results of this are handed out: they are its own."""
        after = self._lane.take(execution)
        over = after is not None and self._begin(after)
        if execution.gives_much:
            self._in_thread(execution, partial(execution.finish, self._clock))
        else:
            with self._aside:
                execution.finish(self._clock)
        if over:
            self._go_on(after)

    def _go_on(self, ended: Execution | None) -> None:
        """Begin with what comes next; what has `ended` is posted."""
        until = self._clock() + TURN
        while (execution := self._lane.take(ended)) is not None:
            if not self._begin(execution):
                return
            ended = execution
            if self._clock() > until:
                self._host.call_loop(partial(self._host.guard, partial(self._go_on, ended)))
                return

    def _begin(self, execution: Execution) -> bool:
        """Collate, and hand over; whether it is over, and posted."""
        if execution.takes_much:
            self._in_thread(execution, partial(execution.prepare, self._clock), self._prepared)
            return False
        with self._aside:
            execution.prepare(self._clock)
            return self._hand_over(execution)

    def _prepared(self, execution: Execution) -> None:
        with self._aside:
            over = self._hand_over(execution)
        if over:
            self._go_on(execution)

    def _hand_over(self, execution: Execution) -> bool:
        """Execute, or have it executed; whether it is over, and posted."""
        clock = self._clock
        if execution.begin(clock):
            if self.inline:
                (execution.common.context or self._context).run(execution.execute, clock)
            elif execution.loaded.submits and not (execution.watch is not None and is_observed(execution.chunks)):
                submission = Submission(self, execution, self._host)
                try:
                    execution.submit(submission)
                except BaseException as error:
                    if not submission.drop():  # it has said that it is done, and is
                        return False
                    execution.take_result(None, error, clock)
                else:
                    return False
            else:
                self._in_thread(execution, partial(execute, execution, clock), self._ended)
                return False
        execution.finish(clock)
        return True

    def _in_thread(
        self, execution: Execution, work: Callable[[], None], then: Callable[[Execution], None] | None = None
    ) -> None:
        """Have a thread work, and go on."""
        host = self._host

        def run() -> None:
            try:
                if execution.abandoned:  # while it waited for its turn: the core may be closed by now
                    execution.let_go(self._clock)
                else:
                    work()
            except BaseException as error:
                host.failed(error)
                return
            if then is not None:
                host.call_loop(partial(host.guard, partial(then, execution)))

        try:
            self._workers.grow(1)
            self._workers.submit(run)
        except RuntimeError:  # there are no threads any more, or none to be had
            host.call_loop(partial(self._in_place, run))

    def _in_place(self, run: Callable[[], None]) -> None:
        with self._aside:
            run()
