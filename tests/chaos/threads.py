"""A random schedule on real threads, from a seed: simulated cores that fail, hang and are slow, of one
model or of several.

`python tests/chaos/threads.py SEED` runs one again; threads make it another run each time, of the same kind.
"""

import asyncio
import random
import sys
import threading
from unittest import mock

import uvloop
from callers import Callers, Version, check_nothing_left, check_now

from aneuron import AsyncDataParallel, Pool, SimulatedBackend
from aneuron.engine import health


def names():
    """The threads of the lanes."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("aneuron-core")}


def plan(pick):
    fault = SimulatedBackend.fault
    possible = [
        fault("core", probability=0.01),
        fault("hang", probability=0.003, seconds=0.4),
        fault("slow", probability=0.02, seconds=0.01),
        fault("fatal", probability=0.001),
    ]
    return [each for each in possible if pick.random() < 0.6]


async def bounded(seed, callers_made):
    async with asyncio.timeout(60.0):
        await schedule(seed, callers_made)


async def schedule(seed, callers_made):
    pick = random.Random(seed)
    backend = SimulatedBackend(
        cores=pick.choice([1, 3]),
        service_time=0.0005,
        copy_time=pick.choice([0.0, 0.0002]),
        load_time=pick.choice([0.0, 0.002]),
        faults=plan(pick),
        seed=seed,
    )
    pool = Pool(backend=backend)  # of one model, two or three
    for number in range(1 + seed // 2 % 3):
        model = AsyncDataParallel(
            Version(1 + 1000 * number),
            pool=pool,
            weight=pick.choice([0.5, 1.0, 3.0]),
            batch_size=4,
            max_pending=40,
            max_delay=pick.choice([0, 0.001, None]),
            exec_timeout=0.1,
        )
        callers_made.append(Callers(pick, model))
    runs = {callers: [] for callers in callers_made}

    async def start(callers):
        await callers.model.start()
        runs[callers].append(callers.model._life.run)

    async def end(callers):
        callers.closings += 1
        await pick.choice([callers.model.aclose, callers.model.abort])()

    for callers in callers_made:
        await start(callers)
    for _ in range(60):
        callers = pick.choice(callers_made)
        for _ in range(pick.randrange(8)):
            callers.add()
        if pick.random() < 0.5:
            callers.cancel_one()
        if pick.random() < 0.1:
            pool.num_workers = pick.randrange(1, 9)
        await asyncio.sleep(pick.choice([0, 0, 0.0005, 0.002]))
        if pick.random() < 0.03:
            await end(callers)
            await start(callers)
        for each in callers_made:
            check_now(each.model, None)
    for callers in callers_made:
        await end(callers)
        if callers.tasks:
            await asyncio.wait(callers.tasks)
        await callers.finish()
        for run in runs[callers]:
            await asyncio.shield(run.closed)
        check_nothing_left(callers.model, runs[callers], callers)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"


def replay(seed):
    """Run the schedule of a seed; its callers. What fails says how to try it again."""
    made = []
    random.seed(seed)
    loop = uvloop.new_event_loop if seed % 2 else asyncio.new_event_loop
    try:
        with mock.patch.object(health, "FIRST", 0.01), asyncio.Runner(loop_factory=loop) as runner:
            runner.run(bounded(seed, made))
        for thread in names():
            thread.join(60.0)
            assert not thread.is_alive(), f"{thread.name} is left"
    except BaseException as error:
        command = f"python tests/chaos/threads.py {seed}"
        raise AssertionError(f"{type(error).__name__}: {error}; run it again with: {command}") from error
    return made


if __name__ == "__main__":
    print(*[callers.fates for callers in replay(int(sys.argv[1]))], sep="\n")
