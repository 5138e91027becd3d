"""Engines started, watched, started again; the same models on all of them. On virtual time."""

import asyncio

import pytest
from virtual_engines import Virtual, source

from aneuron.errors import Closed, CoreFailed, DeviceError
from aneuron.remote import starting
from aneuron.remote.division import divide
from aneuron.remote.supervision import Plan
from aneuron.remote.supervisor import DRAINS, LATEST, SOONEST, TRIES, Supervisor
from aneuron.testing import PuppetBackend, run, settle


def virtual(test, engines=2, cores=4, **plan):
    """Run a test with a supervisor that is started, and what it starts engines with."""

    async def main():
        spawner = Virtual()
        shares = divide(range(cores), engines, {})
        supervisor = Supervisor(Plan(shares, PuppetBackend(cores=cores), program={}, **plan), spawner)
        await supervisor.start()
        try:
            await test(supervisor, spawner)
        finally:
            await supervisor.aclose(drain=False)
        assert all(engine.ended.done() for engine in spawner.engines.values())
        left = {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}
        assert not left

    run(main())


def states(supervisor):
    return [engine.state for engine in supervisor.engines]


def served(spawner):
    return [engine.server.models for _, engine in sorted(spawner.engines.items())]


async def until(supervisor, condition):
    changed = asyncio.Event()
    stop = supervisor.subscribe(changed.set)
    while not condition(supervisor.engines):
        changed.clear()
        await changed.wait()
    stop()


def all_ready(engines):
    return all(engine.state == "ready" for engine in engines)


# Starting.


def test_each_engine_is_told_what_it_has():
    async def test(supervisor, spawner):
        assert [(e.index, e.pid, e.incarnation, e.state, e.cores, e.error) for e in supervisor.engines] == [
            (0, 1001, 1, "ready", (0, 1), None),
            (1, 1002, 1, "ready", (2, 3), None),
        ]
        told = [engine.server for engine in spawner.engines.values()]
        assert [(each.ids, each.total, each.num_workers) for each in told] == [((0, 1), 4, 6), ((2, 3), 4, 6)]
        assert await supervisor.connect(1) == "ours 1"

    virtual(test, num_workers=6)


def test_a_start_that_fails_ends_what_was_started():
    async def main():
        spawner = Virtual()
        spawner.fail = {1: 1}
        supervisor = Supervisor(Plan(divide(range(3), 3, {}), PuppetBackend(cores=3), program={}), spawner)
        with pytest.raises(OSError, match="no more processes"):
            await supervisor.start()
        assert all(engine.ended.done() for engine in spawner.engines.values())
        assert supervisor.engines == []
        await supervisor.start()  # the next one succeeds
        assert states(supervisor) == ["ready"] * 3
        await supervisor.aclose()

    run(main())


def test_a_start_that_is_cancelled_ends_what_was_started():
    async def main():
        spawner = Virtual()
        supervisor = Supervisor(Plan(divide(range(2), 2, {}), PuppetBackend(cores=2), program={}), spawner)
        start = asyncio.ensure_future(supervisor.start())
        while len(spawner.engines) < 2:
            await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert all(engine.ended.done() for engine in spawner.engines.values())

    run(main())


def test_a_program_that_is_being_imported_by_its_engine_starts_none(monkeypatch):
    monkeypatch.setattr(starting.multiprocessing.process.current_process(), "_inheriting", True, raising=False)
    supervisor = Supervisor(Plan(divide(range(2), 2, {}), PuppetBackend(cores=2), program={}), Virtual())
    with pytest.raises(RuntimeError, match=r"if __name__ == '__main__'"):
        run(supervisor.start())


# Models.


def test_a_model_is_loaded_on_all_side_by_side():
    async def test(supervisor, spawner):
        spawner.slow = 10.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        facts = await supervisor.load(0, source("net"), {"split_size": 4})
        assert loop.time() - began == 10.0
        assert {index: each.of for index, each in facts.items()} == {0: 0, 1: 1}
        assert served(spawner) == [{0: ("net", 0)}] * 2
        await supervisor.change(0, split_size=2)
        await settle()
        assert [engine.server.settings[0] for engine in spawner.engines.values()] == [{"split_size": 2}] * 2
        await supervisor.unload(0)
        await supervisor.unload(0)
        assert served(spawner) == [{}, {}]

    virtual(test)


def test_a_load_that_fails_on_one_is_undone_on_all():
    async def test(supervisor, spawner):
        spawner.model_fails["load", 1] = ValueError("cannot be run")
        with pytest.raises(ValueError, match="cannot be run"):
            await supervisor.load(0, source("net"), {})
        await settle()
        assert served(spawner) == [{}, {}]
        assert states(supervisor) == ["ready", "ready"]
        spawner.model_fails.clear()
        await supervisor.load(0, source("net"), {})
        assert served(spawner) == [{0: ("net", 0)}] * 2

    virtual(test)


def test_an_engine_that_dies_of_a_load_fails_it():
    async def test(supervisor, spawner):
        spawner.kill_on = "load", 1
        with pytest.raises(CoreFailed, match=r"engine 1 \(pid 1002\) was killed by SIGKILL while it was asked to load"):
            await supervisor.load(0, source("net"), {})
        await until(supervisor, all_ready)
        assert served(spawner) == [{}, {}]

    virtual(test)


def test_a_load_that_is_cancelled_is_undone():
    async def test(supervisor, spawner):
        spawner.slow = 10.0
        load = asyncio.ensure_future(supervisor.load(0, source("net"), {}))
        await asyncio.sleep(5.0)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        await asyncio.sleep(20.0)
        assert served(spawner) == [{}, {}]
        await supervisor.load(0, source("net"), {})

    virtual(test)


def test_with_min_cores_the_rest_serves_and_the_engine_is_tried_again():
    async def test(supervisor, spawner):
        spawner.model_fails["load", 1] = ValueError("cannot be run")
        facts = await supervisor.load(0, source("net"), {}, min_cores=2)
        assert list(facts) == [0]
        await until(supervisor, lambda engines: engines[1].state == "restarting")
        assert states(supervisor)[0] == "ready"
        spawner.model_fails.clear()
        await until(supervisor, all_ready)
        assert served(spawner) == [{0: ("net", 0)}] * 2
        with pytest.raises(DeviceError, match="min_cores=5, and there are 4 cores"):
            await supervisor.load(1, source("net"), {}, min_cores=5)

    virtual(test)


def test_with_min_cores_too_few_fail_the_load():
    async def test(supervisor, spawner):
        spawner.model_fails["load", 1] = ValueError("cannot be run")
        with pytest.raises(ValueError, match="cannot be run"):
            await supervisor.load(0, source("net"), {}, min_cores=3)
        await settle()
        assert served(spawner) == [{}, {}]

    virtual(test)


# Restarts.


def test_an_engine_that_dies_comes_back_with_its_models():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {"split_size": 4})
        await supervisor.load(1, source("other"), {})
        await supervisor.change(0, split_size=2)
        seen = []
        stop = supervisor.subscribe(lambda: seen.append(supervisor.engines[1]))
        spawner.engines[1].kill()
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        stop()
        assert [(each.state, each.pid, each.incarnation) for each in seen] == [
            ("restarting", None, 1),
            ("ready", 1003, 2),
        ]
        assert "was killed by SIGKILL" in seen[0].error
        assert seen[1].error is None
        assert served(spawner) == [{0: ("net", 0), 1: ("other", 0)}] * 2
        assert spawner.engines[1].server.settings[0] == {"split_size": 2, "min_cores": 1}
        assert supervisor.engines[0].incarnation == 1

    virtual(test)


def test_an_engine_that_cannot_be_started_again_is_tried_less_and_less_often():
    async def test(supervisor, spawner):
        loop, spawner.fail = asyncio.get_running_loop(), {1: TRIES + 2}
        began, times, failed = loop.time(), [], []

        def spawn(*args, real=spawner.spawn):
            times.append(loop.time() - began)
            return real(*args)

        spawner.spawn = spawn
        supervisor.subscribe(lambda: failed.append(states(supervisor)[1] == "failed"))
        spawner.engines[1].kill()
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        assert gaps[:TRIES] == pytest.approx([SOONEST * 2**n for n in range(TRIES)])
        assert gaps[TRIES:] == pytest.approx([LATEST] * 3)
        assert any(failed)
        assert await supervisor.connect(1)

    virtual(test)


def test_the_back_off_begins_anew_after_a_time_of_service():
    async def test(supervisor, spawner):
        loop = asyncio.get_running_loop()
        waits = []
        for rest in (0.0, 0.0, 0.0, 100.0):
            await asyncio.sleep(rest)
            spawner.engines[0].kill()
            began = loop.time()
            await until(supervisor, lambda engines: not all_ready(engines))
            await until(supervisor, all_ready)
            waits.append(loop.time() - began)
        assert waits == pytest.approx([SOONEST, 2 * SOONEST, 4 * SOONEST, SOONEST])

    virtual(test)


def test_an_engine_that_does_not_load_again_is_not_ready():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {})
        spawner.model_fails["load", 1] = RuntimeError("out of memory")
        spawner.engines[1].kill()
        await until(supervisor, lambda engines: engines[1].state == "failed")
        assert "out of memory" in supervisor.engines[1].error
        with pytest.raises(CoreFailed, match=r"engine 1 is failed: .*out of memory"):
            await supervisor.connect(1)
        await supervisor.load(1, source("another"), {})  # on those that serve
        assert served(spawner)[0] == {0: ("net", 0), 1: ("another", 0)}
        spawner.model_fails.clear()
        await until(supervisor, all_ready)
        assert served(spawner) == [{0: ("net", 0), 1: ("another", 0)}] * 2

    virtual(test)


def test_without_an_engine_a_load_says_why():
    async def test(supervisor, spawner):
        spawner.fail = {0: 1}
        spawner.engines[0].kill()
        await until(supervisor, lambda engines: engines[0].state == "restarting")
        with pytest.raises(CoreFailed, match=r"no engine is ready: engine 0 .* was killed by SIGKILL"):
            await supervisor.load(0, source("net"), {})

    virtual(test, engines=1)


# Lost cores.


def test_an_engine_that_loses_a_core_is_drained_and_replaced():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {})
        seen, old = [], spawner.engines[1]
        supervisor.subscribe(lambda: seen.append((supervisor.engines[1].state, supervisor.engines[1].cores)))
        old.server.draining = 3.0
        old.tell("state", {"lost": [3], "in_service": 1})
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert seen == [("ready", (2,)), ("draining", (2,)), ("restarting", ()), ("ready", (2, 3))]
        assert old.server.drained
        assert served(spawner)[1] == {0: ("net", 0)}

    virtual(test)


@pytest.mark.parametrize("what", ["load", "prepare"])
def test_what_an_engine_was_asked_that_is_drained_meanwhile_fails_for_that_reason(what):
    """Its models are closed then, which nobody has asked for: it must not be what the caller is told."""

    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {})
        spawner.slow, spawner.engines[1].server.draining = 1.0, 5.0
        spawner.model_fails[what, 1] = Closed("the pool was closed, and this model with it")
        asked = supervisor.load(1, source("other"), {}) if what == "load" else supervisor.swap(0, source("new"))
        task = asyncio.ensure_future(asked)
        await asyncio.sleep(0.5)
        spawner.engines[1].tell("state", {"lost": [3], "in_service": 1})
        with pytest.raises(CoreFailed, match=r"engine 1 .* has lost core 3 for good.* while it was asked to " + what):
            await task
        spawner.model_fails.clear()
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert served(spawner) == [{0: ("net", 0)}] * 2

    virtual(test)


def test_a_core_that_stays_away_costs_no_other():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {})
        spawner.cannot_load = {3}
        spawner.engines[1].tell("state", {"lost": [3], "in_service": 1})
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert spawner.engines[1].server.settings[0] == {"min_cores": 1}
        spawner.engines[1].tell("state", {"lost": [3], "in_service": 1})  # it says what is known
        await asyncio.sleep(1000.0)
        assert [(each.state, each.incarnation, each.cores) for each in supervisor.engines] == [
            ("ready", 1, (0, 1)),
            ("ready", 2, (2,)),
        ]
        spawner.engines[1].tell("state", {"lost": [2, 3], "in_service": 0})
        await until(supervisor, lambda engines: engines[1].incarnation == 3)

    virtual(test)


def test_settings_of_the_pool_are_those_of_engines_that_come_back():
    async def test(supervisor, spawner):
        await supervisor.change(None, num_workers=3)
        spawner.engines[1].kill()
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert [engine.server.settings[None] for engine in spawner.engines.values()] == [{"num_workers": 3}] * 2

    virtual(test)


def test_engines_that_are_abandoned_stay_away():
    async def main():
        spawner = Virtual()
        supervisor = Supervisor(Plan(divide(range(2), 2, {}), PuppetBackend(cores=2), program={}), spawner)
        await supervisor.start()
        supervisor.abandon()
        await asyncio.sleep(1000.0)
        assert spawner.started == [0, 1]
        assert all(engine.ended.done() for engine in spawner.engines.values())

    run(main())


def test_a_drain_that_lasts_too_long_is_given_up():
    async def test(supervisor, spawner):
        old = spawner.engines[1]
        old.server.draining = 1e6
        began = asyncio.get_running_loop().time()
        old.tell("state", {"lost": [2], "in_service": 1})
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert asyncio.get_running_loop().time() - began == pytest.approx(DRAINS + SOONEST)
        assert not old.server.drained

    virtual(test)


def test_engines_that_lose_cores_at_once_are_drained_one_after_the_other():
    async def test(supervisor, spawner):
        ready = []
        supervisor.subscribe(lambda: ready.append(states(supervisor).count("draining")))
        for engine in list(spawner.engines.values()):
            engine.server.draining = 5.0
            engine.tell("state", {"lost": [engine.server.ids[0]], "in_service": 1})
        await until(supervisor, lambda engines: all(e.incarnation == 2 for e in engines) and all_ready(engines))
        assert max(ready) == 1

    virtual(test)


# Hanging.


def test_an_engine_whose_loop_hangs_is_killed():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {"exec_timeout": 2.0})
        await asyncio.sleep(100.0)
        began = asyncio.get_running_loop().time()
        spawner.engines[1].hangs = True
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert 10.0 <= asyncio.get_running_loop().time() - began <= 13.0
        assert supervisor.engines[0].incarnation == 1
        assert served(spawner)[1] == {0: ("net", 0)}

    virtual(test)


def test_nobody_is_killed_where_executions_may_take_any_time():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("net"), {"exec_timeout": 2.0})
        await supervisor.load(1, source("net"), {"exec_timeout": None})
        spawner.engines[1].hangs = True
        await asyncio.sleep(1000.0)
        assert all_ready(supervisor.engines)
        assert supervisor.engines[1].incarnation == 1

    virtual(test)


# Swaps.


def test_a_swap_is_on_all():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("old"), {})
        facts = await supervisor.swap(0, source("new"))
        assert [each.of for each in facts.values()] == [0, 1]
        assert served(spawner) == [{0: ("new", 1)}] * 2
        spawner.engines[0].kill()
        await until(supervisor, lambda engines: engines[0].incarnation == 2 and all_ready(engines))
        assert served(spawner) == [{0: ("new", 1)}] * 2
        with pytest.raises(Closed):
            await supervisor.swap(7, source("new"))

    virtual(test)


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_swap_that_fails_on_one_is_on_none(how):
    async def test(supervisor, spawner):
        await supervisor.load(0, source("old"), {})
        if how == "raises":
            spawner.model_fails["prepare", 1] = ValueError("another shape")
        else:
            spawner.kill_on = "prepare", 1
        with pytest.raises(ValueError if how == "raises" else CoreFailed):
            await supervisor.swap(0, source("new"))
        await asyncio.sleep(10.0)
        assert served(spawner) == [{0: ("old", 0)}] * 2
        assert all(not engine.server.prepared for engine in spawner.engines.values())
        spawner.model_fails.clear()
        await supervisor.swap(0, source("newer"))
        assert served(spawner) == [{0: ("newer", 1)}] * 2

    virtual(test)


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_an_engine_that_fails_when_all_have_the_new_model_comes_back_with_it(how):
    async def test(supervisor, spawner):
        await supervisor.load(0, source("old"), {})
        if how == "raises":
            spawner.model_fails["commit", 1] = RuntimeError("no more threads")
        else:
            spawner.kill_on = "commit", 1
        await supervisor.swap(0, source("new"))
        spawner.model_fails.clear()
        await until(supervisor, lambda engines: engines[1].incarnation == 2 and all_ready(engines))
        assert served(spawner) == [{0: ("new", 1)}] * 2

    virtual(test)


def test_an_engine_that_comes_back_meanwhile_has_the_new_model():
    async def test(supervisor, spawner):
        await supervisor.load(0, source("old"), {})
        await supervisor.load(1, source("other"), {})
        spawner.slow = 10.0
        spawner.engines[1].kill()
        await asyncio.sleep(15.0)  # it has loaded the first again, and not the second
        await supervisor.swap(0, source("new"))
        await until(supervisor, all_ready)
        assert served(spawner) == [{0: ("new", 1), 1: ("other", 0)}] * 2

    virtual(test)


# Ends.


def test_closing_drains():
    async def main():
        spawner = Virtual()
        supervisor = Supervisor(Plan(divide(range(2), 2, {}), PuppetBackend(cores=2), program={}), spawner)
        await supervisor.start()
        engines = list(spawner.engines.values())
        engines[0].server.draining = 1000.0
        await supervisor.aclose()
        assert asyncio.get_running_loop().time() >= 1000.0
        assert all(engine.server.drained and engine.server.aborted and engine.ended.done() for engine in engines)
        with pytest.raises(Closed):
            await supervisor.load(0, source("net"), {})
        await supervisor.aclose()

    run(main())


def test_closing_that_is_cancelled_kills():
    async def main():
        spawner = Virtual()
        supervisor = Supervisor(Plan(divide(range(2), 2, {}), PuppetBackend(cores=2), program={}), spawner)
        await supervisor.start()
        spawner.engines[0].server.draining = 1e6
        close = asyncio.ensure_future(supervisor.aclose())
        await asyncio.sleep(1.0)
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        await settle()
        assert all(engine.ended.done() for engine in spawner.engines.values())

    run(main())
