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
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from aneuron.engine.modes import Modes

logger = logging.getLogger("aneuron")

PATIENCE = 0.02  # seconds after which a call counts as blocked; to look more often costs more than it is worth
QUIET = 0.1  # seconds between two looks whether one has, where nothing is due sooner
IDLE = 10.0  # seconds without a call after which a thread ends
NOTABLE = 2e-4  # seconds of computing or launching, from which on it is not done between two other calls
INFINITY = float("inf")

_Planned = tuple[float, int, Callable[[], None], object, bool]  # due, in turn, what, whose, whether it takes long


class Length:
    """Whether calls of one kind take long, each of which may have had to wait for the interpreter as well.

    The CPU time of the last ones has no waiting in it. The shortest time ever tells of those that sleep.
    """

    def __init__(self) -> None:
        self._least = INFINITY
        self._computed: deque[float] = deque(maxlen=8)

    def add(self, seconds: float, computed: float) -> None:
        """One took so long, and so much CPU time of its thread."""
        self._least = min(self._least, seconds)
        self._computed.append(computed)

    @property
    def notable(self) -> bool:
        """Whether other calls should not wait for one. Of what was not seen yet: yes."""
        return self._least > NOTABLE or min(self._computed) > NOTABLE


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
        self._new: deque[_Planned] = deque()  # appended by anybody, without the lock: the loop does not wait for it
        self._turn = itertools.count()
        self._lock = threading.Lock()  # around what follows
        self._plan: list[_Planned] = []  # a heap
        self._leader: _Thread | None = None
        self._spare: list[_Thread] = []  # wait for the lead
        self._watcher: _Thread | None = None
        self._watching = False  # it looks again soon
        self._threads: set[_Thread] = set()
        self._began: float | None = None  # when the leader began with a call that is not over
        self._over = False  # threads with nothing to do are to end
        self._asleep_until = INFINITY  # what is due sooner has to wake somebody

    def at(self, due: float, call: Callable[[], None], owner: object, long: bool = False) -> None:
        """Plan a call, at a time of `time.monotonic()`. Those of one time are made in the order of their planning.

        `long`: it may take a while, and is made beside others. Raises `RuntimeError` if a thread is needed and none can
        be had, but not within a call of this timer.
        """
        planned = due, next(self._turn), call, owner, long
        self._new.append(planned)  # before the question: a leader looks here when it has said how long it sleeps
        if due < self._asleep_until:
            with self._lock:
                try:
                    leader = self._leader or self._pass_on()
                except RuntimeError:
                    if threading.current_thread() in self._threads:  # it has the lead when it has made its call
                        return
                    self._new.remove(planned)
                    raise
            leader.wake()

    def drop(self, owner: object) -> None:
        """Forget what was planned for an owner. Threads that have nothing else to do end at once."""
        with self._lock:
            self._take_in()
            self._plan = [planned for planned in self._plan if planned[3] is not owner]
            heapq.heapify(self._plan)
            if not self._plan:
                self._end_threads()

    def stop(self) -> "set[_Thread]":
        """Forget all that was planned, and let the threads end; those that there are."""
        with self._lock:
            self._take_in()
            self._plan = []
            return self._end_threads()

    def _end_threads(self) -> "set[_Thread]":
        self._over = True
        threads = set(self._threads)
        for thread in threads:
            thread.wake()
        return threads

    def _take_in(self) -> None:
        while self._new:
            self._over = False
            heapq.heappush(self._plan, self._new.popleft())

    def _pass_on(self) -> "_Thread":
        """With the lock: give the lead to a thread that has nothing to do."""
        leader = self._spare.pop() if self._spare else self._start(self._name, self._work)
        self._leader, self._began, self._asleep_until = leader, None, -INFINITY
        leader.wake()
        return leader

    def _start(self, name: str, work: "Callable[[_Thread], None]") -> "_Thread":
        thread = _Thread(name, work, self._threads)
        thread.start()
        self._threads.add(thread)
        return thread

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
        idle = time.monotonic() + IDLE
        while True:
            with self._lock:
                now, due = time.monotonic(), INFINITY
                if self._leader is None:
                    self._leader, self._spare = me, [each for each in self._spare if each is not me]
                if self._leader is me:
                    self._began, due = None, self._first_due()
                elif me not in self._spare:  # the lead was passed on meanwhile
                    self._spare.append(me)
                if due <= now:
                    return self._begin(now)
                if due == INFINITY and (self._over or now >= idle):
                    self._leave(me)
                    return None
            me.sleep((idle if due == INFINITY else due) - now)

    def _first_due(self) -> float:
        """When the leader has to be awake again. Others wake it for what is due sooner."""
        while True:
            self._take_in()
            self._asleep_until = self._plan[0][0] if self._plan else INFINITY
            if not self._new:  # else it came in between
                return self._asleep_until

    def _begin(self, now: float) -> Callable[[], None]:
        _, _, call, _, long = heapq.heappop(self._plan)
        self._began, self._asleep_until = now, -INFINITY
        with suppress(RuntimeError):  # there is no other thread to be had: then this one does it all
            if long:
                self._pass_on()
            if self._watcher is None:
                self._watcher = self._start(f"{self._name}-watch", self._watch)
            elif not self._watching:
                self._watcher.wake()
            self._watching = True
        return call

    def _leave(self, me: "_Thread") -> None:
        if self._leader is me:
            self._leader = None
            if self._watcher is not None:
                self._watcher.wake()
        else:
            self._spare.remove(me)

    def _watch(self, me: "_Thread") -> None:
        """Pass the lead on when the one who has it does not come back."""
        while True:
            with self._lock:
                if self._leader is None:
                    self._watcher = None
                    return
                now = time.monotonic()
                if self._began is not None and now - self._began > PATIENCE:
                    with suppress(RuntimeError):
                        self._pass_on()
                self._watching = self._asleep_until < INFINITY
                pause = PATIENCE if self._asleep_until < now + QUIET else QUIET if self._watching else IDLE
            me.sleep(pause)


class _Thread(threading.Thread):
    """One that sleeps until it is woken, and is in a set until it ends."""

    def __init__(self, name: str, work: "Callable[[_Thread], None]", among: "set[_Thread]") -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._among = work, among
        self._bell = threading.Lock()  # what is waited for; cheaper than a condition
        self._bell.acquire()

    def sleep(self, seconds: float) -> None:
        """Sleep, at most so long."""
        if seconds > 0:
            self._bell.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Have it sleep no longer, or not at all the next time."""
        with suppress(RuntimeError):
            self._bell.release()

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
