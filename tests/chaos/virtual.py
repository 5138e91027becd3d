"""A random schedule on virtual time, from a seed: puppet cores, and whatever may happen to a model in service.

`python tests/chaos/virtual.py SEED` replays one and says what happens.
"""

import asyncio
import logging
import random
import sys
import warnings
from collections import Counter

from callers import Callers, SickCoreError, Turns, Version, check_nothing_left, check_now

from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault
from aneuron.testing import PuppetBackend, PuppetCore, PuppetWorkers, run, settle

RUNS = 16  # that a row may take at most: one, halving of 32 rows, a trial, and the same on a second core


class Core(PuppetCore):
    """Counts what becomes of each row. `sound` until it has failed as a core."""

    sound = True

    def execute(self, args, kwargs):
        assert not self.closed, "a closed core executes"
        rows = {row for row in args[0].flatten().tolist() if row >= 0}
        self.backend.runs.update(rows)
        error = self._error
        if isinstance(error, (OSError, SystemError)):
            self.sound = False
            self.backend.failures.update(rows)
        try:
            return super().execute(args, kwargs)
        finally:
            self.executed.clear()

    def close(self):
        super().close()
        if self.backend.random.random() < 0.05:
            raise OSError("does not close")


class Workers(PuppetWorkers):
    """Tells of each batch that begins."""

    _current = None

    def __init__(self, backend):
        self.backend = backend
        super().__init__()

    @property
    def current(self):
        return self._current

    @current.setter
    def current(self, execution):
        self._current = execution
        if execution is not None and self.backend.turns is not None:
            self.backend.turns.begun(execution)


class Backend(PuppetBackend):
    """Puppets whose loading fails at times; `workers_made` finds what executes, also on cores that are given up."""

    def __init__(self, pick, **settings):
        super().__init__(pick.choice([1, 2, 3]), faults={OSError: Fault.CORE, SystemError: Fault.FATAL}, **settings)
        self.random = random.Random(pick.random())
        self.recoverable = pick.random() < 0.75
        self.unloadable = 0.0  # chance that a core does not load
        self.cores_made: list[Core] = []
        self.workers_made = []
        self.turns: Turns | None = None
        self.runs: Counter[float] = Counter()  # of each row
        self.failures: Counter[float] = Counter()

    def load(self, model, core_id, batch_size):
        if self.random.random() < self.unloadable:
            raise OSError("does not load")
        core = self.loaded[core_id] = Core(model, core_id, self._concurrent)
        core.backend = self
        self.cores_made.append(core)
        return core

    def workers(self, name):
        self.workers_made.append(Workers(self))
        return self.workers_made[-1]

    def executing(self):
        """What has begun and not ended, also on cores that were given up."""
        return [each.current for each in self.workers_made if each.current is not None]


class Schedule:
    """One model and what happens to it. A new kind of event is a method and a line in EVENTS."""

    def __init__(self, seed, verbose=False):
        self.pick = pick = random.Random(seed)
        random.seed(seed)  # recovery's jitter
        self.verbose = verbose
        self.backend = Backend(pick, concurrent=pick.random() < 0.5)
        self.exec_timeout = pick.choice([None, 0.05, 0.05])
        self.min_cores = pick.choice([None, 1])
        self.hung = set()  # executions that do not end by themselves
        self.lanes = []
        plain = pick.random() < 0.25  # no priorities, tenants, deadlines, pieces: what is fair can be counted
        by_size = self.by_size = not plain and pick.random() < 0.1
        self.versions = 0
        self.swaps = []
        self.model = AsyncDataParallel(
            self.next_version(),
            backend=self.backend,
            batch_size=None if by_size else pick.choice([4, 8] if plain else [None, 1, 4, 8]),
            num_workers=pick.choice([None, 1, 5]),
            max_pending=pick.choice([None, 10, 40]),
            split_size=None if plain else pick.choice([None, None, 2]),
            max_delay=0.0 if plain else pick.choice([0.0, 0.0, 0.002, None]),
            set_dynamic_batching=by_size or plain or pick.random() < 0.9,
            exec_timeout=self.exec_timeout,
            min_cores=self.min_cores,
        )
        # What is bound to a concurrent core waits behind whatever that executes, and this is released in any order:
        # turns are told where batches begin. That they are kept where batches are bound, test_fairness.py tells.
        self.backend.turns = Turns(self.model) if plain and not self.backend._concurrent else None
        self.callers = Callers(pick, self.model, self.backend.turns)
        self.callers.sick = self.sick = pick.random() < 0.3

    def next_version(self):
        self.versions += 1
        model = Version(self.versions)
        return {2: model, 8: model} if self.by_size else model

    def say(self, what):
        if self.verbose:
            states = [core.state for core in self.model.statistics().cores]
            print(f"{asyncio.get_running_loop().time():9.4f}  {what:20} {states}")

    # Events.

    async def call(self):
        self.callers.add()

    async def burst(self):
        for _ in range(self.pick.randrange(30)):
            self.callers.add()

    async def cancel(self):
        self.callers.cancel_one()

    async def release(self, error=None):
        ready = [each for each in self.backend.executing() if each not in self.hung]
        if ready:
            self.pick.choice(ready).core.release(error)

    async def sicken(self):
        if self.sick:
            await self.release(SickCoreError("whoever's rows they are"))

    async def core_fault(self):
        await self.release(OSError("the core"))

    async def fatal(self):
        await self.release(SystemError("the process"))

    async def hang(self):
        if self.exec_timeout is not None:
            self.hung |= set(self.backend.executing()[:1])

    async def wake(self):
        """A hang ends after all, perhaps too late."""
        still = [each for each in self.backend.executing() if each in self.hung]
        if still:
            execution = self.pick.choice(still)
            self.hung.discard(execution)
            execution.core.release()

    async def resize(self):
        self.model.num_workers = self.pick.randrange(1, 9)

    async def bound(self):
        self.model.max_pending = self.pick.choice([None, 1, 10, 40])

    async def map(self):
        self.callers.add_map()

    async def split(self):
        if self.backend.turns is None:
            self.model.split_size = self.pick.choice([None, 1, 3])

    async def swap(self):
        """Another version takes the place of the one that serves, if all cores load it. Not waited for."""
        if self.backend.turns is None:
            self.swaps.append(asyncio.ensure_future(self._swap(self.next_version())))

    async def _swap(self, model):
        try:
            await self.model.swap(model)
        except (Closed, CoreFailed, OSError):
            pass  # closed meanwhile, or a core has not loaded it
        except RuntimeError as error:
            if "another swap is in progress" not in str(error):
                raise

    def note(self):
        """The runs of the model, of which a swap makes more."""
        if self.model._life.run not in (None, *self.lanes):
            self.lanes.append(self.model._life.run)

    async def unloadable(self):
        self.backend.unloadable = self.pick.choice([0.0, 0.5, 1.0])

    async def pass_time(self):
        seconds = self.pick.choice([0, 0.001, 0.001, 0.02, 0.06, 1.0])
        if seconds > 0.02 and self.pick.random() < 0.8:  # what is not released meanwhile has hung
            while any(each not in self.hung for each in self.backend.executing()):
                await self.release()
        await asyncio.sleep(seconds)

    async def probe(self):
        """A call that comes while no core serves is told so before the clock moves."""
        lanes = self.model._life.run
        swapped = any(not swap.done() for swap in self.swaps)  # soon, to cores that may serve
        if lanes is None or not lanes.serving or lanes.recovery.in_service or swapped:
            return
        before = asyncio.get_running_loop().time()
        self.callers.add()
        task = self.callers.tasks[-1]
        await settle(3)
        assert task.done(), "no core serves, and a caller waits"
        assert asyncio.get_running_loop().time() == before
        await asyncio.sleep(2.0)
        if not lanes.recovery.in_service:
            await self.restart()

    async def restart(self):
        await self.close()
        await self.start()

    EVENTS = {
        call: 30, burst: 3, cancel: 10, release: 30, sicken: 4, core_fault: 4, fatal: 0.4, hang: 3, wake: 2,
        resize: 3, bound: 1, map: 1, split: 1, unloadable: 1, pass_time: 12, probe: 6, restart: 1, swap: 2,
    }  # fmt: skip

    # From the start to the end.

    async def start(self):
        unloadable, self.backend.unloadable = self.backend.unloadable, 0.0
        await self.model.start()
        self.backend.unloadable = unloadable
        self.note()

    async def close(self):
        """Drain or abort, while cores go on to answer, but for those that hang."""
        end = self.pick.choice([self.model.aclose, self.model.abort])
        self.say(end.__name__)
        self.note()
        closing = asyncio.ensure_future(end())
        await asyncio.sleep(0)
        self.callers.closings += 1  # calls that came before this iteration ended found it open
        while not closing.done() or not all(run.closed.done() for run in self.lanes):
            assert not self.model.ready, "ready while it closes"
            while any(each not in self.hung for each in self.backend.executing()):
                await self.release()
            if self.exec_timeout is None or closing.done():  # nobody looks for hangs after an abort
                while self.hung & set(self.backend.executing()):
                    await self.wake()
            await asyncio.sleep(0.01)
        await closing

    async def run(self):
        problems = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        await self.start()
        kinds, weights = list(self.EVENTS), list(self.EVENTS.values())
        for kind in self.pick.choices(kinds, weights, k=self.pick.randrange(5, 80)):
            self.say(kind.__name__)
            await kind(self)
            await settle(self.pick.choice([0, 0, 1, 4]))
            self.note()
            check_now(self.model, self.min_cores)
        await settle(4)  # what the workers have posted has arrived
        if self.model.ready:
            sound = [core for core in self.backend.cores_made if core.sound and not core.closed]
            assert len(sound) >= (self.min_cores or 1), "ready, and no core is sound"
        await self.close()
        while self.backend.executing():  # too late, and nobody must be harmed
            self.hung |= set(self.backend.executing())
            await self.wake()
        await settle()
        await self.callers.finish()
        await asyncio.gather(*self.swaps)
        check_nothing_left(self.model, self.lanes, self.callers)
        assert all(core.closed for core in self.backend.cores_made), "a core was not closed"
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"
        assert max(self.backend.failures.values(), default=0) <= 2, "rows that failed two cores were tried on a third"
        assert max(self.backend.runs.values(), default=0) <= RUNS, "rows were run again and again"
        assert not problems, problems


def replay(seed, verbose=False):
    """Run the schedule of a seed; its callers. What fails says how to see it again."""
    schedules = []
    logging.disable(logging.NOTSET if verbose else logging.CRITICAL)

    async def main():
        schedules.append(Schedule(seed, verbose))
        await schedules[0].run()

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the cores are not fully used")
            run(main())
    except BaseException as error:
        command = f"python tests/chaos/virtual.py {seed}"
        raise AssertionError(f"{type(error).__name__}: {error}; replay it with: {command}") from error
    finally:
        logging.disable(logging.NOTSET)
    return schedules[0].callers


if __name__ == "__main__":
    print(replay(int(sys.argv[1]), verbose=True).fates)
