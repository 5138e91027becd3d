"""A lane's threads, and what they do with its executions.

Lives here: the only threads of the package. Must not be here: asyncio, callers' futures, decisions. A thread asks its
lane for executions, takes each through its steps (`following`, which puppets run as well), and posts it back.
"""

import atexit
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from aneuron.engine import modes
from aneuron.engine.execution import Execution
from aneuron.engine.failures import carried

P = ParamSpec("P")
T = TypeVar("T")

FREE: AbstractContextManager[Any] = nullcontext()


class Feed(Protocol):
    """A lane as its threads see it."""

    turn: AbstractContextManager[Any]  # held by who executes, where cores take one execution at a time

    def take(self, ended: Execution | None) -> Execution | None:
        """The next execution, for a thread whose last one has `ended`; None: wait until woken."""

    def park(self, execution: Execution) -> bool:
        """It may be stolen, and is prepared: whether it is still there."""

    def claim(self, execution: Execution) -> bool:
        """It may be stolen, and the core is free: whether it is still there, from now on for good."""


def following(lane: Feed, ended: Execution | None, clock: Callable[[], float]) -> tuple[Execution | None, bool]:
    """Post what has ended, and prepare what comes next: it is to be executed when the core is free, and if it was
    parked (the second value), to be claimed then. It cannot be asked: it may be in another thread's hands by then.
    """
    if ended is not None:
        ended.finish(clock)
    execution = lane.take(ended)
    while execution is not None:
        parks = execution.may_be_stolen
        execution.prepare(clock)
        if not parks or lane.park(execution):
            return execution, parks
        execution = lane.take(None)
    return None, False


def execute(execution: Execution, clock: Callable[[], float]) -> None:
    """Execute in the calling thread, in the context of the run, and put the thread's modes back."""
    own_modes, context = modes.of_this_thread(), execution.common.context
    if own_modes is not None:  # puppets have none
        own_modes.note()
    if context is None:
        execution.execute(clock)
    else:
        context.run(execution.execute, clock)
    if own_modes is not None:
        own_modes.restore()


class Workers(Executor):
    """Daemon threads of one core behind the interface of an executor, and a short way in for executions.

    The standard pool never lets the process end behind a hung run. Daemon threads that are inside torch when the
    interpreter ends would abort it: at exit they are told to stop and joined for a second at most.

    Each thread starts in a copy of `context`, None: that of the caller.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self, name: str, context: Context | None = None) -> None:
        self._name = name
        self._context = copy_context() if context is None else context  # an empty one is false
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lane: Feed | None = None
        self._job: Callable[[], None] | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._alive = 0
        self._stopping = False
        self._last_words: Callable[[], None] | None = None
        self.on_death: Callable[[BaseException], None] | None = None  # a thread has ended that was not told to
        _all.add(self)

    def grow(self, threads: int) -> None:
        """Have `threads` threads at least."""
        if sys.is_finalizing():
            raise RuntimeError("the interpreter ends: it starts no threads")
        with self._lock:  # others may be ending
            while self._alive < threads and not self._stopping:
                # A copy for each: two threads cannot be in one context.
                run, name = self._context.copy().run, f"{self._name}/{self._alive + 1}"
                thread = threading.Thread(target=run, args=(self._work,), name=name, daemon=True)
                thread.start()  # may fail, and then nothing has changed
                self._alive += 1
                self._threads.append(thread)

    def wake(self, lane: Feed) -> None:
        """Have a thread serve the lane until there is nothing to do."""
        if lane is not self._lane:
            self._lane, self._job = lane, partial(self._serve, lane)
        self._inbox.put(self._job)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in one of the threads."""
        if self._stopping:
            raise RuntimeError("the workers are stopped")
        future: Future[T] = Future()
        self._inbox.put(partial(_run, future, partial(fn, *args, **kwargs)))
        return future

    def stop(self, last_words: Callable[[], None] | None = None) -> None:
        """Let the threads end after what they were given; the last one says `last_words`. Not waited for."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._last_words = last_words
            alive = self._alive
        for _ in range(alive):
            self._inbox.put(None)
        if not alive and last_words is not None:
            last_words()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The executor's way to say `stop`, and to wait for it."""
        self.stop()
        if wait:
            self.join(None)

    def join(self, timeout: float | None) -> None:
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join(timeout)

    def forget(self) -> None:
        """Be in a process that was forked: the threads are the parent's, and may hold the lock."""
        self._threads, self._alive, self._stopping, self._lock = [], 0, True, threading.Lock()

    def _work(self) -> None:
        try:
            modes.keep()
            while (job := self._inbox.get()) is not None:
                job()
                del job
        except BaseException as error:  # none is expected: a job of ours ends with its own
            if self.on_death is not None:
                self.on_death(error)
        finally:
            with self._lock:
                self._alive -= 1
                last = self._alive == 0 and self._stopping
            if last and self._last_words is not None:
                self._last_words()

    def _serve(self, lane: Feed) -> None:
        clock = self.clock
        execution, parked = following(lane, None, clock)
        while execution is not None:
            with FREE if execution.loaded.concurrent else lane.turn:
                mine = not parked or lane.claim(execution)
                if mine and execution.begin(clock):
                    execute(execution, clock)
            execution, parked = following(lane, execution if mine else None, clock)


def _run(future: "Future[T]", fn: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn())
    except BaseException as error:
        future.set_exception(carried(error))
    finally:
        del future  # an exception's traceback holds this frame


_all: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    deadline = time.monotonic() + 1.0
    workers = list(_all)
    for each in workers:
        each.stop()
    for each in workers:
        each.join(max(0.0, deadline - time.monotonic()))


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
