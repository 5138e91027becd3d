"""A random schedule on virtual time, from a seed: puppet cores, and whatever may happen to models in service.

Every other seed has one model, the others two or three on a pool: of these, what happens to one is the others' affair
no further than that they wait. Whose an answer is its value tells.

`python tests/chaos/virtual.py SEED` replays one and says what happens.
"""

import asyncio
import logging
import random
import sys
import warnings
from collections import Counter

from callers import Callers, SickCoreError, Turns, Version, check_nothing_left, check_now

from aneuron import AsyncDataParallel, Closed, CoreFailed, Fault, Pool
from aneuron.testing import PuppetBackend, PuppetCore, PuppetWorkers, run, settle

APART = 1000  # more than the versions that any model has: number // APART says whose version it is
RUNS = 16  # that a row may take at most: one, halving of 32 rows, a trial, and the same on a second core


class Core(PuppetCore):
    """Counts what becomes of each row. `sound` until it has failed as a core."""

    sound = True

    @property
    def whose(self):
        return self._model.number // APART

    def execute(self, args, kwargs):
        assert not self.closed, "a closed core executes"
        rows = {(self.whose, row) for row in args[0].flatten().tolist() if row >= 0}
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


class SubmittingCore(Core):
    """One that is handed its batches, by the loop, and at times does as a driver should not."""

    def submit(self, args, kwargs, done):
        assert not self.closed, "a closed core is handed a batch"
        assert self.concurrent or not self.handed, "a core that takes one batch at a time is handed another"
        chance = self.backend.chance.random()
        if chance < 0.01:
            self._error = OSError("cannot be enqueued")
            self.execute(args, kwargs)
        handed = Handed(self, args, kwargs, done)
        if chance > 0.95:  # before it returns
            handed.release()
        else:
            self.handed.append(handed)

    @property
    def handed(self):
        return self.backend.handed.setdefault(self, [])


class Handed:
    """A batch that a core was handed: in `executing` it stands for the execution."""

    def __init__(self, core, args, kwargs, done):
        self.args, self.kwargs, self.done, self._core = args, kwargs, done, core

    @property
    def core(self):
        return self

    @property
    def whose(self):
        return self._core.whose

    def release(self, error=None):
        """End, also after the core was closed, and twice at times."""
        core, outcome = self._core, (None, OSError("too late"))
        if self in core.handed:
            core.handed.remove(self)
        if not core.closed:
            core._error = error
            try:
                outcome = core.execute(self.args, self.kwargs), None
            except Exception as raised:
                outcome = None, raised.with_traceback(None)
        self.args, self.kwargs = (), {}
        self.done(*outcome)
        if core.backend.chance.random() < 0.1:
            self.done(None, OSError("once more"))


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
        self.submits = False
        self.chance = random.Random(0)  # of what submitting cores do
        self.handed: dict[Core, list[Handed]] = {}
        self.runs: Counter[tuple[int, float]] = Counter()  # of each row
        self.failures: Counter[tuple[int, float]] = Counter()

    def load(self, model, core_id, batch_size):
        if self.random.random() < self.unloadable:
            raise OSError("does not load")
        kind = SubmittingCore if self.submits else Core
        core = self.loaded[core_id] = kind(model, core_id, self._concurrent)
        core.backend = self
        self.cores_made.append(core)
        return core

    def workers(self, name):
        self.workers_made.append(Workers(self))
        return self.workers_made[-1]

    def executing(self):
        """What has begun and not ended, also on cores that were given up."""
        handed = [each for core in self.handed.values() for each in core]
        return [each.current for each in self.workers_made if each.current is not None] + handed


class Guest:
    """One model, and what has become of it."""

    def __init__(self, number, schedule, pool, plain, by_size, **settings):
        pick = schedule.pick
        self.number, self.by_size = number, by_size
        self.exec_timeout = pick.choice([None, 0.05, 0.05])
        self.min_cores = pick.choice([None, 1])
        self.versions = number * APART
        self.lanes, self.swaps = [], []
        where = (
            {"backend": schedule.backend} if pool is None else {"pool": pool, "weight": pick.choice([0.5, 1.0, 3.0])}
        )
        self.model = AsyncDataParallel(
            self.next_version(),
            batch_size=None if by_size else pick.choice([4, 8] if plain else [None, 1, 4, 8]),
            max_pending=pick.choice([None, 10, 40]),
            split_size=None if plain else pick.choice([None, None, 2]),
            max_delay=0.0 if plain else pick.choice([0.0, 0.0, 0.002, None]),
            set_dynamic_batching=by_size or plain or pick.random() < 0.9,
            exec_timeout=self.exec_timeout,
            min_cores=self.min_cores,
            **where,
            **settings,
        )

    def next_version(self):
        self.versions += 1
        model = Version(self.versions)
        return {2: model, 8: model} if self.by_size else model

    def note(self):
        """The runs of the model, of which a swap makes more."""
        if self.model._life.run not in (None, *self.lanes):
            self.lanes.append(self.model._life.run)


class Schedule:
    """Models and what happens to them, each time to the one `at`. A new kind is a method and a line in EVENTS."""

    def __init__(self, seed, verbose=False):
        self.pick = pick = random.Random(seed)
        random.seed(seed)  # recovery's jitter
        self.verbose = verbose
        self.backend = Backend(pick, concurrent=pick.random() < 0.5)
        own = random.Random(f"{seed}/submits")  # of its own: the other draws stay as they were
        self.backend.submits, self.backend.chance = own.random() < 0.4, own
        self.hung = set()  # executions that do not end by themselves
        count = 1 if seed % 2 else pick.choice([2, 2, 3])
        alone = count == 1
        plain = alone and pick.random() < 0.25  # no priorities, tenants, deadlines, pieces: what is fair can be counted
        num_workers = pick.choice([None, 1, 5])
        settings = {"num_workers": num_workers} if alone else {}
        self.pool = None if alone else Pool(backend=self.backend, num_workers=num_workers)
        self.guests = [
            Guest(number, self, self.pool, plain, not plain and pick.random() < 0.1, **settings)
            for number in range(count)
        ]
        self.at = self.guests[0]
        # What is bound to a concurrent core waits behind whatever that executes, and this is released in any order:
        # turns are told where batches begin. That they are kept where batches are bound, test_fairness.py tells.
        told = plain and not self.backend._concurrent and not self.backend.submits
        self.backend.turns = Turns(self.at.model) if told else None
        self.sick = pick.random() < 0.3
        for guest in self.guests:
            guest.callers = Callers(pick, guest.model, self.backend.turns)
            guest.callers.sick = self.sick

    @property
    def model(self):
        return self.at.model

    @property
    def callers(self):
        return self.at.callers

    def guest_of(self, execution):
        return self.guests[execution.core.whose]

    def say(self, what):
        if self.verbose:
            states = [core.state for core in self.model.statistics().cores]
            print(f"{asyncio.get_running_loop().time():9.4f}  {self.at.number} {what:20} {states}")

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
        may = [each for each in self.backend.executing() if self.guest_of(each).exec_timeout is not None]
        self.hung |= set(may[:1])

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
            self.at.swaps.append(asyncio.ensure_future(self._swap(self.model, self.at.next_version())))

    async def _swap(self, model, version):
        try:
            await model.swap(version)
        except (Closed, CoreFailed, OSError):
            pass  # closed meanwhile, or a core has not loaded it
        except RuntimeError as error:
            if "another swap is in progress" not in str(error):
                raise

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
        swapped = any(not swap.done() for swap in self.at.swaps)  # soon, to cores that may serve
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

    async def restart_pool(self):
        """Close all that share it, and start them again."""
        if self.pool is not None:
            await self._close(self.guests, self.pool.aclose)
            for guest in self.guests:
                self.at = guest
                await self.start()

    EVENTS = {
        call: 30, burst: 3, cancel: 10, release: 30, sicken: 4, core_fault: 4, fatal: 0.4, hang: 3, wake: 2,
        resize: 3, bound: 1, map: 1, split: 1, unloadable: 1, pass_time: 12, probe: 6, restart: 1, swap: 2,
        restart_pool: 0.5,
    }  # fmt: skip

    # From the start to the end.

    async def start(self):
        unloadable, self.backend.unloadable = self.backend.unloadable, 0.0
        await self.model.start()
        self.backend.unloadable = unloadable
        self.at.note()

    async def close(self):
        """Drain or abort, while cores go on to answer, but for those that hang."""
        await self._close([self.at], self.pick.choice([self.model.aclose, self.model.abort]))

    async def _close(self, guests, end):
        self.say(end.__qualname__)
        for guest in guests:
            guest.note()
        closing = asyncio.ensure_future(end())
        await asyncio.sleep(0)
        for guest in guests:
            guest.callers.closings += 1  # calls that came before this iteration ended found it open
        while not closing.done() or not all(run.closed.done() for guest in guests for run in guest.lanes):
            assert not any(guest.model.ready for guest in guests), "ready while it closes"
            while any(each not in self.hung for each in self.backend.executing()):
                await self.release()
            for each in self.hung & set(self.backend.executing()):  # nobody looks for hangs after an abort
                if closing.done():
                    self.hung.discard(each)
                    each.core.release()
            await asyncio.sleep(0.01)
        await closing

    async def run(self):
        problems = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        for guest in self.guests:
            self.at = guest
            await self.start()
        kinds, weights = list(self.EVENTS), list(self.EVENTS.values())
        count = self.pick.randrange(5, 80) * (len(self.guests) + 1) // 2
        for kind in self.pick.choices(kinds, weights, k=count):
            if self.pool is not None:
                self.at = self.pick.choice(self.guests)
            self.say(kind.__name__)
            await kind(self)
            await settle(self.pick.choice([0, 0, 1, 4]))
            for guest in self.guests:
                guest.note()
                check_now(guest.model, guest.min_cores)
        await settle(4)  # what the workers have posted has arrived
        for guest in self.guests:
            self.at = guest
            made = [core for core in self.backend.cores_made if core.whose == self.at.number]
            if self.model.ready:
                sound = [core for core in made if core.sound and not core.closed]
                assert len(sound) >= (self.at.min_cores or 1), "ready, and no core is sound"
        for guest in self.pick.sample(self.guests, len(self.guests)):
            self.at = guest
            await self.close()
        while self.backend.executing():  # too late, and nobody must be harmed
            self.hung |= set(self.backend.executing())
            await self.wake()
        await settle()
        for guest in self.guests:
            await guest.callers.finish()
            await asyncio.gather(*guest.swaps)
            check_nothing_left(guest.model, guest.lanes, guest.callers)
        assert self.pool is None or self.pool._dispatcher.stopped, "the pool is open without a model"
        assert all(core.closed for core in self.backend.cores_made), "a core was not closed"
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"
        assert max(self.backend.failures.values(), default=0) <= 2, "rows that failed two cores were tried on a third"
        assert max(self.backend.runs.values(), default=0) <= RUNS, "rows were run again and again"
        assert not problems, problems


def replay(seed, verbose=False, kind=Schedule, file="virtual"):
    """Run the schedule of a seed; its callers. What fails says how to see it again."""
    schedules = []
    logging.disable(logging.NOTSET if verbose else logging.CRITICAL)

    async def main():
        schedules.append(kind(seed, verbose))
        async with asyncio.timeout(1000.0):  # of virtual time: what waits for ever is found, too
            await schedules[0].run()

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the cores are not fully used")
            run(main())
    except BaseException as error:
        command = f"python tests/chaos/{file}.py {seed}"
        raise AssertionError(f"{type(error).__name__}: {error}; replay it with: {command}") from error
    finally:
        logging.disable(logging.NOTSET)
    return [guest.callers for guest in schedules[0].guests]


if __name__ == "__main__":
    print(*[callers.fates for callers in replay(int(sys.argv[1]), verbose=True)], sep="\n")
