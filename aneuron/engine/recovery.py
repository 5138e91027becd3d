"""What follows from a fault: who gets which error, which core goes out of service, and how it comes back.

Lives here: the effects of health.py's decisions, all of it on the loop thread. Must not be here: what is a fault
(backends), when a core is trusted (health.py), the lock (board.py), tensors, blocking.

What is loaded on a lane (loading.py) is never mended: it goes out of service, is closed when no thread executes it any
more, and what is loaded later is another one. A thread that hangs has only the old one.
"""

import asyncio
import logging
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol

from aneuron.backends import Fault
from aneuron.engine.execution import Execution
from aneuron.engine.failures import carried, text
from aneuron.engine.futures import Futures, has_left
from aneuron.engine.health import Bisection, Health
from aneuron.engine.loading import Loaded
from aneuron.errors import Closed, CoreFailed, NoHealthyCores
from aneuron.ownership import Owned
from aneuron.sched.call import Chunk
from aneuron.sched.filling import Retry

logger = logging.getLogger("aneuron")

Chunks = Sequence[Chunk]


class Host(Protocol):
    """A run, as far as it concerns recovery."""

    futures: Futures
    loaded: list[Loaded]  # the last one on each lane

    def running(self) -> list[tuple[Loaded, list[Execution]]]:
        """What executes, oldest first, by core; also on those that are out of service."""

    def has_work(self) -> bool:
        """Whether anything is to be executed yet, or is in flight, though it be behind another model's."""

    def since(self, loaded: Loaded) -> float:
        """When the oldest execution in flight on a core's lane came to be the oldest."""

    def clock(self) -> float:
        """Seconds."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Have the loop call; what it raises closes the run."""

    def reload(self, index: int, done: Callable[[Loaded, BaseException | None], None]) -> None:
        """Load a core anew."""

    def install(self, loaded: Loaded) -> None:
        """What has been loaded anew serves."""

    def retire(self, loaded: Loaded) -> None:
        """Take a core out of service, and what has not begun there back into the queue."""

    def give_up(self, execution: Execution) -> bool:
        """Give an execution up: its thread hangs, and others serve the lane; whether it had not ended."""

    def run_again(self, execution: Execution, chunks: Chunks, retry: Retry) -> None:
        """Queue rows of an execution ahead of everything else, as one batch."""

    def spread(self) -> None:
        """Cores have come into service, or gone."""

    def end_waiting(self, error: Callable[[], Exception]) -> None:
        """End the calls that wait, each with an error of its own."""


class Held(NamedTuple):
    """Rows that failed alone, and why."""

    chunk: Chunk
    error: BaseException
    execution: Execution
    loaded: Loaded


class Recovery:
    """The health of the cores of a run, and the calls that faults have hit. Who serves, anybody may ask."""

    owned = Owned(loop=("_watch", "_timers", "_bisections", "_stopped", "_cause"))

    def __init__(self, host: Host, cores: int, recoverable: bool, proven: bool, exec_timeout: float | None) -> None:
        self.health = [Health(recoverable, proven) for _ in range(cores)]
        self._host = host
        self._exec_timeout = exec_timeout
        self._watch: asyncio.TimerHandle | None = None
        self._timers: dict[int, asyncio.TimerHandle] = {}  # of the cores that are to be loaded again
        self._bisections: weakref.WeakSet[Bisection[Held]] = weakref.WeakSet()
        self._stopped = False
        self._cause = ""  # of the last core's failure; not the error, which a caller may get: it would hold his frames

    @property
    def in_service(self) -> int:
        """How many cores serve."""
        return sum([health.serves for health in self.health])

    def stop(self) -> None:
        """Bring no core back any more. What executes is watched until it ends: somebody may wait for it."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._close_bisections()

    def end(self) -> None:
        """Nothing executes any more, or will be waited for."""
        if self._watch is not None:
            self._watch.cancel()

    def _close_bisections(self) -> None:
        """Nothing will be run again: who has failed alone is to blame."""
        for bisection in list(self._bisections):
            self._blame(bisection.close())

    def none_left(self) -> NoHealthyCores:
        """What to say while no core serves."""
        untils = [health.until for health in self.health if health.until is not None]
        retry_after = None
        if untils:
            retry_after = max(0.0, min(untils) - self._host.clock())
        elif any(health.state == "loading" for health in self.health):
            retry_after = 0.0
        then = "none can be loaded again: restart the process"
        if retry_after is not None:
            then = f"one is loaded again {f'in {retry_after:.3g} s' if retry_after else 'now'}; try again then"
        cause = f" (the last: {self._cause})" if self._cause else ""
        return NoHealthyCores(f"every core is out of service{cause}; {then}", retry_after=retry_after)

    # What a batch has come to.

    def succeeded(self, execution: Execution) -> None:
        """A batch has ended well, or nobody was left to execute it for."""
        loaded, batch = execution.loaded, execution.batch
        health = self.health[loaded.index]
        if execution.begun and not loaded.out and health.state == "suspect":
            health.served()
            loaded.show(health.state)
        retry = batch.retry or Retry()
        if retry.bisection is not None:
            self._conclude(retry.bisection, retry.bisection.ended(loaded.core_id, well=execution.begun))
        if retry.trial is not None:
            self._acquit(retry.trial, execution.begun)

    def failed(self, execution: Execution, error: BaseException) -> None:
        """A batch has failed: give its calls the error, or another chance."""
        chunks = [chunk for chunk in execution.chunks if not has_left(chunk[0])]
        if execution.fault is Fault.INPUT:
            self._input_failed(execution, error, chunks)
        else:
            self.take_out(execution.loaded, error, for_good=execution.fault is Fault.FATAL)
            self._core_failed(execution, error, chunks)

    def _input_failed(self, execution: Execution, error: BaseException, chunks: list[Chunk]) -> None:
        """Give the error to the call that caused it: a batch of several runs again in halves until it stands alone."""
        retry, loaded = execution.batch.retry or Retry(), execution.loaded
        alone = len(execution.chunks) == 1  # a caller who has left since may be the one to blame: of those executed
        held = [Held(chunk, error, execution, loaded) for chunk in chunks]
        if not alone and (self._stopped or not self.in_service):
            closed = "the model was closed before it could run this call again"
            errors = [Closed(closed) if self._stopped else self.none_left() for _ in chunks]
            calls = [call for call, _, _ in chunks]
            self._host.futures.end(zip(calls, errors, strict=True), failed=True)  # their bisection is closed already
        elif not alone:
            bisection = retry.bisection or Bisection[Held]()
            self._bisections.add(bisection)
            half = (len(chunks) + 1) // 2
            parts = [part for part in (chunks[:half], chunks[half:]) if part]
            bisection.split(len(parts))
            for part in reversed(parts):
                self._host.run_again(execution, part, Retry(bisection=bisection))
            self._conclude(bisection, [])
        elif retry.bisection is not None:
            guilty = retry.bisection.ended(loaded.core_id, False, held[0] if held else None)
            self._conclude(retry.bisection, guilty)
        else:
            self._blame(held if retry.trial is None else [*held, *retry.trial.let_go()])

    def _conclude(self, bisection: "Bisection[Held]", guilty: list[Held]) -> None:
        """Blame the guilty; where all parts have failed on one core, ask another core about one of them."""
        self._blame(guilty)
        if bisection.open and self.in_service > 1:
            asked = bisection.ask()
            retry = Retry(trial=bisection, avoid=asked.loaded.index)
            self._host.run_again(asked.execution, [asked.chunk], retry)
        elif bisection.open:
            self._blame(bisection.let_go())

    def _acquit(self, bisection: "Bisection[Held]", well: bool) -> None:
        """What failed on one core, with all its batch-mates, has ended well on another: the core is what fails."""
        asked, held = bisection.asked, bisection.let_go()
        if not well or asked is None:  # its caller has left: nothing is known
            self._blame(held)
            return
        self.take_out(asked.loaded, asked.error)
        for chunk, error, execution, _ in held:
            if not has_left(chunk[0]):
                self._core_failed(execution, error, [chunk])

    def _blame(self, guilty: Iterable[Held]) -> None:
        """Each call gets the model's own exception."""
        outcomes = []
        for (call, start, stop), error, _, loaded in guilty:
            note = f"aneuron: core {loaded.core_id}, rows {start} to {stop - 1} of this call"
            outcomes.append((call, own(error, note)))
        self._host.futures.end(outcomes, failed=True)

    def _core_failed(self, execution: Execution, error: BaseException, chunks: Chunks) -> None:
        """The rows of a core that has failed run once more, on another, each call alone: the fault may be in one."""
        retry, loaded = execution.batch.retry or Retry(), execution.loaded
        if retry.bisection is not None:
            self._conclude(retry.bisection, retry.bisection.ended(loaded.core_id, well=False))
        if retry.trial is not None:
            self._blame(retry.trial.let_go())
        if retry.tried is not None:
            why = f"aneuron: failed on core {retry.tried} and then on core {loaded.core_id}: the input is to blame"
            self._host.futures.end([(call, own(error, why)) for call, _, _ in chunks], failed=True)
        elif self.in_service and not self._stopped:
            for chunk in reversed(chunks):
                self._host.run_again(execution, [chunk], Retry(tried=loaded.core_id))
        else:
            self._host.futures.end([(call, core_failed(loaded, error)) for call, _, _ in chunks], failed=True)

    # Out of service, and back.

    def take_out(self, loaded: Loaded, error: BaseException, *, for_good: bool = False) -> None:
        """A core has failed; `for_good`: and no other will work in this process."""
        if not for_good and (self._host.loaded[loaded.index] is not loaded or not self.health[loaded.index].serves):
            return  # it is out already
        for other in self._host.loaded if for_good else (loaded,):
            health = self.health[other.index]
            served, delay = health.serves, None
            if for_good:
                health.fail()
            else:
                delay = health.faulted(self._host.clock(), random.random())
            other.show(health.state)
            if served:
                self._host.retire(other)
            self._come_back_in(other.index, delay)
        what = self.health[loaded.index].state
        if what == "failed":
            what = "fatal: restart the process" if for_good else "out of service until the process is restarted"
        level = logging.ERROR if for_good else logging.WARNING
        logger.log(level, "core %d failed (%s): %s", loaded.core_id, what, text(error), exc_info=error)
        self._cause = text(error)
        if self.in_service:
            self._host.spread()
        else:
            self._close_bisections()
            self._host.end_waiting(self.none_left)

    def not_loaded(self, loaded: Loaded, error: BaseException) -> None:
        """A core could not be loaded: the others serve without it."""
        health = self.health[loaded.index]
        delay = health.faulted(self._host.clock(), random.random())
        loaded.show(health.state)
        loaded.counters.errors += 1
        logger.warning("core %d did not load (%s): %s", loaded.core_id, health.state, text(error))
        self._come_back_in(loaded.index, delay)

    def _come_back_in(self, index: int, delay: float | None) -> None:
        if (timer := self._timers.pop(index, None)) is not None:
            timer.cancel()
        if delay is not None and not self._stopped:
            self._timers[index] = self._host.call_later(delay, partial(self._load, index))

    def _load(self, index: int) -> None:
        self.health[index].loads()
        self._host.reload(index, self._loaded)

    def _loaded(self, loaded: Loaded, error: BaseException | None) -> None:
        if self._stopped or self.health[loaded.index].state != "loading":
            return  # closed, or fatal, meanwhile
        if error is not None:
            self.not_loaded(loaded, error)
            return
        health = self.health[loaded.index]
        health.loaded(self._host.clock())
        loaded.show(health.state)
        logger.warning("core %d is back in service (%s)", loaded.core_id, health.state)
        self._host.install(loaded)

    # Hangs.

    def watch(self) -> None:
        """Something may be executed from now on: look after `exec_timeout` whether it has ended."""
        if self._exec_timeout is not None and self._watch is None:
            self._watch = self._host.call_later(self._exec_timeout, self._look)

    def _look(self) -> None:
        timeout, now = self._exec_timeout or 0.0, self._host.clock()
        self._watch = None
        due = []
        for loaded, executions in self._host.running():
            oldest = executions[0]
            since = max(oldest.started, oldest.since, self._host.since(loaded))  # it may have had to wait for others
            if since + timeout > now:
                due.append(since + timeout)
            else:
                why = f"core {loaded.core_id} has not answered within exec_timeout={timeout:g} s"
                self.hung(executions, CoreFailed(why, loaded.core_id))
        if self._host.has_work():
            due.append(now + timeout)
        if due:
            self._watch = self._host.call_later(max(min(due) - now, 0.001), self._look)

    def hung(self, executions: Sequence[Execution], error: BaseException) -> None:
        """The first of what a core executes has taken too long: it is lost, with the rest, unless it has just ended."""
        first, *rest = executions
        if self._host.give_up(first):
            self._give_up([first, *filter(self._host.give_up, rest)], error)

    def lost(self, executions: Sequence[Execution], error: BaseException) -> None:
        """A core, or its threads, will not answer any more: what it executes is lost, but for what has just ended."""
        self._give_up(list(filter(self._host.give_up, executions)), error)

    def _give_up(self, given_up: Sequence[Execution], error: BaseException) -> None:
        """Give up what a core executes, for the sake of the first of these, and the core with it. What the core was
        given besides has failed nothing: it runs elsewhere as it would have run here.
        """
        if not given_up:
            return
        first = given_up[0]
        loaded = first.loaded
        loaded.counters.errors += 1
        if not self._stopped:
            self.take_out(loaded, error)
        for execution in given_up:
            self._host.futures.end(execution.finished)  # its thread may have come as far as that
            chunks = [chunk for chunk in execution.chunks if not has_left(chunk[0])]
            if execution is first or not chunks or not self.in_service or self._stopped:
                self._core_failed(execution, error, chunks)
            else:
                self._host.run_again(execution, chunks, execution.batch.retry or Retry())


def core_failed(loaded: Loaded, error: BaseException) -> CoreFailed:
    """What a call gets whose rows no other core could take."""
    failure = CoreFailed(
        f"core {loaded.core_id} failed while it ran this call, and no other could take its rows: {text(error)}",
        loaded.core_id,
    )
    failure.__cause__ = error.with_traceback(None)  # its frames hold the rows of all who shared the batch
    return failure


def own(error: BaseException, note_text: str) -> Exception:
    """The model's exception as it reaches its caller."""
    owned = carried(error)
    note(owned, note_text)
    return owned


def note(error: Exception, note_text: str) -> None:
    """Add a note, once, unless the exception will not have it."""
    with suppress(Exception):
        if note_text not in getattr(error, "__notes__", ()):
            error.add_note(note_text)
