"""A random schedule on virtual time of models on a pool with engines, which are killed, and fail to start.

All else that may happen is as in virtual.py. What is said of engines comes later than what happens there: which cores
serve is not compared at every moment. `python tests/chaos/engines.py SEED` replays one and says what happens.
"""

import asyncio
import random
import sys

import virtual
from callers import Callers, check_counted
from virtual import Backend, Guest, Schedule

from aneuron import CoreFailed, Pool
from aneuron.errors import DeviceError
from aneuron.testing import settle

RUNS, FAILURES = 3 * virtual.RUNS, 6  # a row begins again where an engine died, once, and where a swap came between


class Puppets(Backend):
    """Those of engines, which take their cores along when they are killed."""

    def __init__(self, pick, **settings):
        super().__init__(pick, **settings)
        self._cores = pick.choice([2, 3, 4, 6])
        self.killed = set()  # cores

    def executing(self):
        return [each for each in super().executing() if each.core not in self.killed]

    def kill(self, index):
        """End an engine, as SIGKILL does."""
        engine = self.supervision.spawned.get(index)
        if engine is None or engine.ended.done():
            return
        ids = self.supervision._plan.shares[index].local
        self.killed |= {core for core in self.cores_made if core.core_id in ids and not core.closed}
        engine.kill()


class EngineSchedule(Schedule):
    """One model, or two, on a pool with engines."""

    def __init__(self, seed, verbose=False):
        self.pick = pick = random.Random(f"{seed}/engines")
        random.seed(seed)
        self.verbose = verbose
        self.backend = Puppets(pick, concurrent=pick.random() < 0.5)
        self.backend.submits, self.backend.chance = pick.random() < 0.3, pick
        self.hung = set()
        processes = pick.randrange(1, self.backend._cores + 1)
        self.pool = Pool(backend=self.backend, num_workers=pick.choice([None, None, 8]), processes=processes)
        self.guests = [Guest(n, self, self.pool, False, pick.random() < 0.1) for n in range(pick.choice([1, 1, 2]))]
        self.at = self.guests[0]
        self.sick = pick.random() < 0.2
        for guest in self.guests:
            guest.callers = Callers(pick, guest.model)
            guest.callers.sick = self.sick
            guest.callers.versions = lambda guest=guest: range(guest.number * virtual.APART + 1, guest.versions + 1)

    # Events.

    async def kill_engine(self):
        self.backend.kill(self.pick.randrange(self.pool.processes))

    async def kill_soon(self):
        """While whatever follows is under way."""
        index = self.pick.randrange(self.pool.processes)
        asyncio.get_running_loop().call_later(self.pick.choice([0.0, 0.001, 0.15]), self.backend.kill, index)

    async def fail_to_start(self):
        self.backend.supervision.fail_to_start = self.pick.choice([1, 1, 2, 7])

    async def probe(self):
        """A call that comes while no core serves is told so before the clock moves."""
        run = self.model._life.run
        if run is None or not run.serving or run.in_service:
            return
        before = asyncio.get_running_loop().time()
        self.callers.add()
        task = self.callers.tasks[-1]
        await settle(3)
        assert task.done(), "no core serves, and a caller waits"
        assert asyncio.get_running_loop().time() == before

    async def swap(self):
        self.at.swaps.append(asyncio.ensure_future(self._swap(self.model, self.at.next_version())))

    EVENTS = {
        **{event: often for event, often in Schedule.EVENTS.items() if event.__name__ not in ("probe", "swap")},
        kill_engine: 5, kill_soon: 3, fail_to_start: 1, probe: 6, swap: 2,
    }  # fmt: skip

    # From the start to the end.

    async def start(self):
        """It may be that no engine is ready, or that one dies of it: as users do, again."""
        self.backend.unloadable = 0.0
        async with asyncio.timeout(300):
            while True:
                try:
                    await self.model.start()
                    break
                except (CoreFailed, DeviceError, OSError):
                    await self.release_all()
                    await asyncio.sleep(1.0)
        self.at.note()

    async def release_all(self):
        while any(each not in self.hung for each in self.backend.executing()):
            await self.release()

    async def _close(self, guests, end):
        self.say(end.__qualname__)
        for guest in guests:
            guest.note()
        closing = asyncio.ensure_future(end())
        await asyncio.sleep(0)
        for guest in guests:
            guest.callers.closings += 1
        while not closing.done() or any(run.futures.calls for guest in guests for run in guest.lanes):
            await self.release_all()
            if closing.done():
                self.hung.clear()
            await asyncio.sleep(0.01)
        await closing

    async def run(self):
        problems = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        for guest in self.guests:
            self.at = guest
            await self.start()
        kinds, weights = list(self.EVENTS), list(self.EVENTS.values())
        for kind in self.pick.choices(kinds, weights, k=self.pick.randrange(5, 120)):
            self.at = self.pick.choice(self.guests)
            self.say(kind.__name__)
            await kind(self)
            await settle(self.pick.choice([0, 0, 1, 4]))
            for guest in self.guests:
                guest.note()
                check_engines_now(guest.model)
        for guest in self.pick.sample(self.guests, len(self.guests)):
            self.at = guest
            await self.close()
        await self.pool.aclose()
        while self.backend.executing():
            self.hung |= set(self.backend.executing())
            await self.wake()
        await asyncio.sleep(1.0)
        for guest in self.guests:
            await guest.callers.finish()
            await asyncio.gather(*guest.swaps)
            check_counted(guest.model, guest.callers)
            for run in guest.lanes:
                assert not run.futures.calls
                assert not [*run._homeless, *run._suspects]
                assert not any(engine.flights or engine.rows for engine in run.dispatcher.engines)
        left = [core for core in self.backend.cores_made if not core.closed and core not in self.backend.killed]
        assert not left, "a core was not closed"
        assert asyncio.all_tasks() == {asyncio.current_task()}, f"tasks are left: {asyncio.all_tasks()}"
        assert max(self.backend.failures.values(), default=0) <= FAILURES, "rows failed core after core"
        assert max(self.backend.runs.values(), default=0) <= RUNS, "rows were run again and again"
        assert not problems, problems

    def say(self, what):
        if self.verbose:
            engines = [engine.state for engine in self.pool.statistics().engines]
            print(f"{asyncio.get_running_loop().time():9.4f}  {self.at.number} {what:20} {engines}")


def check_engines_now(model):
    """At any moment: the sum rule, and what is known of engines is what was sent to them."""
    calls = model.statistics().calls
    assert calls.accepted == calls.completed + calls.failed + calls.cancelled + calls.waiting + calls.running, calls
    assert min(calls.waiting, calls.running) >= 0, calls
    run = model._life.run
    assert not model.ready or (run.serving and run.in_service), "ready, and no engine serves"
    for engine in run.dispatcher.engines if run is not None else ():
        assert engine.rows == sum(flight.rows for flight in engine.flights.values())
        assert engine.wire is not None or not engine.flights
        assert engine.standing.rows >= 0, engine.standing


def replay(seed, verbose=False):
    """Run the schedule of a seed; its callers."""
    return virtual.replay(seed, verbose, EngineSchedule, "engines")


if __name__ == "__main__":
    print(*[callers.fates for callers in replay(int(sys.argv[1]), verbose=True)], sep="\n")
