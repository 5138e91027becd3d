"""Calls at a time, in one thread for all: what takes the place of a thread that sleeps for each execution.

Lives here: that thread, and who stands in for it. Must not be here: devices, what is called.

One thread has the lead: it sleeps until the next call is due, and makes it. Others wait, or make a call themselves that
was said to take long. Where a call turns out to block, the lead passes to another thread: nobody waits behind it.
"""

import atexit
import heapq
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from aneuron.engine.modes import Modes

logger = logging.getLogger("aneuron")

PATIENCE = 0.005  # seconds after which a call counts as blocked
IDLE = 1.0  # seconds without a call after which a thread ends

_Planned = tuple[float, int, Callable[[], None], object, bool]  # due, in turn, what, whose, whether it takes long


class Timer:
    """Calls functions at their time; with torch's gradients off, and torch's modes put back after each.

    Its threads start when there is something to call, and end when there is not. After a fork the child has none, and
    nothing planned.

        >>> import threading, time
        >>> timer, called = Timer("aneuron-example"), threading.Event()
        >>> timer.at(time.monotonic() + 0.01, called.set, owner=None)
        >>> called.wait(60.0)
        True
        >>> timer.drop(None)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Be in a process that was forked: the threads are the parent's, and may hold the lock."""
        self._lock = threading.Lock()
        self._plan: list[_Planned] = []  # a heap
        self._turn = itertools.count()
        self._leader: _Thread | None = None
        self._spare: list[_Thread] = []  # wait for the lead
        self._watcher: _Thread | None = None
        self._threads: set[_Thread] = set()
        self._began: float | None = None  # when the leader began with a call that is not over

    def at(self, due: float, call: Callable[[], None], owner: object, long: bool = False) -> None:
        """Plan a call, at a time of `time.monotonic()`. Those of one time are made in the order of their planning.

        `long`: it may take a while, and is made beside others. Raises `RuntimeError` if a thread is needed and none can
        be had.
        """
        with self._lock:
            leader = self._leader or self._pass_on()
            planned = due, next(self._turn), call, owner, long
            heapq.heappush(self._plan, planned)
            if self._plan[0] is planned:
                leader.wake.notify()

    def drop(self, owner: object) -> None:
        """Forget what was planned for an owner. Threads that have nothing to do any more end at once."""
        with self._lock:
            self._plan = [planned for planned in self._plan if planned[3] is not owner]
            heapq.heapify(self._plan)
            if not self._plan:
                for thread in self._threads:
                    thread.wake.notify()

    def stop(self) -> "set[_Thread]":
        """Forget all that was planned, and let the threads end; those that there are."""
        with self._lock:
            threads, self._plan = set(self._threads), []
            for thread in threads:
                thread.wake.notify()
        return threads

    def _start(self, name: str, work: "Callable[[_Thread], None]") -> "_Thread":
        thread = _Thread(name, work, self._lock, self._threads)
        thread.start()
        self._threads.add(thread)
        return thread

    def _pass_on(self) -> "_Thread":
        """With the lock: give the lead to a thread that has nothing to do."""
        if self._spare:
            self._leader = self._spare.pop()
            self._leader.wake.notify()
        else:
            self._leader = self._start(self._name, self._work)
        self._began = None
        return self._leader

    def _work(self, me: "_Thread") -> None:
        modes = Modes()
        while (call := self._next(me)) is not None:
            try:
                call()
            except BaseException:  # none is expected, and all others must go on
                logger.critical("a call of %s failed; please report this", self._name, exc_info=True)
            del call
            modes.restore()

    def _next(self, me: "_Thread") -> Callable[[], None] | None:
        """What a thread is to call now. None: it is to end."""
        with self._lock:
            if self._leader is not me:  # the lead was passed on meanwhile
                self._spare.append(me)
                me.wake.wait(IDLE)
                if self._leader is not me:
                    self._spare.remove(me)
                    return None
            self._began = None
            while not self._plan or (pause := self._plan[0][0] - time.monotonic()) > 0:
                me.wake.wait(pause if self._plan else IDLE)
                if not self._plan:
                    self._leader = None
                    if self._watcher is not None:
                        self._watcher.wake.notify()
                    return None
            _, _, call, _, long = heapq.heappop(self._plan)
            self._began = time.monotonic()
            with suppress(RuntimeError):  # there is no other thread to be had: then this one does it all
                if long:
                    self._pass_on()
                if self._watcher is None:
                    self._watcher = self._start(f"{self._name}-watch", self._watch)
            return call

    def _watch(self, me: "_Thread") -> None:
        """Pass the lead on when the one who has it does not come back."""
        with self._lock:
            while self._leader is not None:
                now = time.monotonic()
                if self._began is not None and now - self._began > PATIENCE:
                    with suppress(RuntimeError):
                        self._pass_on()
                quiet = 20 * PATIENCE if self._began is None else PATIENCE
                me.wake.wait(min(quiet, max(PATIENCE, self._plan[0][0] - now)) if self._plan else quiet)
            self._watcher = None


class _Thread(threading.Thread):
    """One that can be woken, and is in a set until it ends."""

    def __init__(
        self, name: str, work: "Callable[[_Thread], None]", lock: threading.Lock, among: "set[_Thread]"
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.wake = threading.Condition(lock)
        self._work, self._among = work, among

    def run(self) -> None:
        try:
            self._work(self)
        finally:
            self._among.discard(self)


_all: "weakref.WeakSet[Timer]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Daemon threads that are inside torch when the interpreter ends would abort it: wait a moment for them."""
    deadline = time.monotonic() + 1.0
    for thread in [thread for timer in list(_all) for thread in timer.stop()]:
        thread.join(max(0.0, deadline - time.monotonic()))


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
