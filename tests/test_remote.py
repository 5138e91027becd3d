"""Calls through engines, on virtual time: what works as in one process, and what follows when an engine dies."""

import asyncio
import os
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from puppets import call, check_sum, named, row, scenario
from torch import Tensor

import aneuron
from aneuron import AsyncDataParallel, CoreFailed, NoHealthyCores, Pool
from aneuron.remote.packing import INLINE
from aneuron.testing import PuppetBackend, run, settle

pytestmark = pytest.mark.core


def double(x: Tensor) -> Tensor:
    return 2 * x


class Outputs(NamedTuple):
    doubled: Tensor
    names: list[str]
    nothing: None


def several(x: Tensor, *, names: list[str], shift: Tensor, prototypes: Tensor, factor: float = 1.0) -> Outputs:
    assert prototypes.shape == (3, 2)
    return Outputs(factor * 2 * x + shift, [name + "!" for name in names], None)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x + 1


def with_prototypes(x: Tensor) -> dict[str, Tensor]:
    return {"rows": x, "prototypes": torch.arange(4.0)}


def backend_of(**settings: Any) -> PuppetBackend:
    return PuppetBackend(**{"cores": 2, "service_time": 1.0, **settings})


def engines(backend: PuppetBackend, processes: int = 2, num_workers: int | None = None) -> Pool:
    return Pool(backend=backend, processes=processes, num_workers=num_workers)


def kill(backend: PuppetBackend, index: int) -> None:
    assert backend.supervision is not None
    backend.supervision.spawned[index].kill()


def now() -> float:
    return asyncio.get_running_loop().time()


# As in one process.


@scenario
async def test_every_call_gets_its_rows():
    async with AsyncDataParallel(double, pool=engines(backend_of()), batch_size=4) as model:
        answers = await asyncio.gather(*[call(model, value, rows) for value, rows in enumerate([1, 3, 4, 2, 9, 1])])
    for value, (rows, answer) in enumerate(zip([1, 3, 4, 2, 9, 1], answers, strict=True)):
        assert torch.equal(answer, 2 * row(value, rows))


@scenario
async def test_two_outputs_come_back():
    async with AsyncDataParallel(pair, pool=engines(backend_of())) as model:
        one, other = await model(row(1.0))
    assert torch.equal(one + 1, other)


@pytest.mark.parametrize("rows", [1, 2, 7])
@scenario
async def test_all_kinds_of_inputs_and_outputs(rows):
    async with AsyncDataParallel(several, pool=engines(backend_of()), batch_size=2) as model:
        result = await model(
            row(1.0, rows),
            names=aneuron.Rows([f"row {index}" for index in range(rows)]),
            shift=torch.arange(2.0 * rows).reshape(rows, 2).numpy(),
            prototypes=aneuron.Shared(torch.zeros(3, 2)),
            factor=3.0,
        )
    assert type(result) is Outputs
    assert torch.equal(result.doubled, 6 * row(1.0, rows) + torch.arange(2.0 * rows).reshape(rows, 2))
    assert result.names == [f"row {index}!" for index in range(rows)]
    assert result.nothing is None


@scenario
async def test_what_has_no_rows_is_not_joined_where_a_call_is_spread():
    pool = engines(backend_of())
    async with AsyncDataParallel(with_prototypes, pool=pool, batch_size=4, outputs={"prototypes": "whole"}) as model:
        result = await model(row(1.0, 16))
        assert torch.equal(result["rows"], row(1.0, 16))
        assert torch.equal(result["prototypes"], torch.arange(4.0))
        assert result["prototypes"].untyped_storage().nbytes() == 16


@scenario
async def test_a_large_call_is_spread_over_engines_and_comes_back_in_order():
    async with AsyncDataParallel(double, pool=engines(backend_of(cores=4)), batch_size=4) as model:
        x = torch.arange(64.0).reshape(32, 2)
        began = now()
        assert torch.equal(await model(x), 2 * x)
        assert now() - began == 2.0  # two batches on each of four cores
        await asyncio.sleep(0.1)
        assert [core.rows for core in model.statistics().cores] == [8] * 4


@scenario
async def test_results_share_memory_with_nothing():
    async with AsyncDataParallel(double, pool=engines(backend_of())) as model:
        answers = await asyncio.gather(*[call(model, value) for value in range(5)])
    for answer in answers:
        assert answer.untyped_storage().nbytes() == answer.nbytes
        answer += 1  # writable, and nobody else's
    assert [answer[0, 0].item() for answer in answers] == [2 * value + 1 for value in range(5)]


@pytest.mark.parametrize("rows", [1, 3])
@scenario
async def test_what_is_large_goes_through_shared_memory(rows):
    x = torch.rand(rows, INLINE // 2)
    async with AsyncDataParallel(double, pool=engines(backend_of()), batch_size=1) as model:
        assert torch.equal(await model(x), 2 * x)
        assert torch.equal(await model(x + 1), 2 * (x + 1))


@scenario
async def test_an_input_that_is_written_to_before_it_runs_again_is_found_out():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        x = row(1.0)
        waiting = asyncio.ensure_future(model(x))
        await settle(100)
        x += 1
        kill(backend, 0)
        kill(backend, 1)
        with pytest.raises(aneuron.InputModified):
            await waiting


@scenario
async def test_several_sizes():
    async with AsyncDataParallel({2: double, 8: double}, pool=engines(backend_of())) as model:
        for rows in (1, 2, 5, 16, 41):
            assert torch.equal(await model(row(1.0, rows)), 2 * row(1.0, rows))


@pytest.mark.parametrize(
    "buckets", [aneuron.Buckets(1, sizes=(4, 16), pad=0.0), aneuron.Buckets(1, max=64, pad=0.0)], ids=repr
)
@scenario
async def test_lengths(buckets):
    pool = engines(backend_of())
    async with AsyncDataParallel(double, pool=pool, batch_size=4, buckets=buckets, outputs=None) as model:
        inputs = [torch.rand(1 + n % 5, 1 + 3 * n % 16) for n in range(20)]
        for x, y in zip(inputs, await asyncio.gather(*map(model, inputs)), strict=True):
            assert torch.equal(y, 2 * x)


@scenario
async def test_without_dynamic_batching():
    pool = engines(backend_of(cores=4))
    async with AsyncDataParallel(double, pool=pool, set_dynamic_batching=False, batch_size=2) as model:
        assert torch.equal(await model(row(1.0, 8)), 2 * row(1.0, 8))
        with pytest.raises(aneuron.ShapeError, match="9 rows / 4 cores != 2 compiled rows"):
            await model(row(1.0, 9))


@scenario
async def test_another_batch_dimension():
    async with AsyncDataParallel(double, None, 1, pool=engines(backend_of())) as model:
        x = torch.arange(24.0).reshape(3, 8)
        assert torch.equal(await model(x), 2 * x)


@scenario
async def test_terms_and_deadlines_hold():
    async with AsyncDataParallel(double, pool=engines(backend_of(cores=1), 1), batch_size=1) as model:
        first = call(model)
        await asyncio.sleep(0.1)
        late = asyncio.ensure_future(model.options(timeout=0.5)(row()))
        background = asyncio.ensure_future(model.options(priority=-10, tenant="batch")(row(1.0)))
        urgent = asyncio.ensure_future(model.options(priority=10, tenant=("acme", 7))(row(2.0)))
        with pytest.raises(aneuron.DeadlineExceeded, match=r"timeout=0.5 s"):
            await late
        await first
        await urgent
        assert not background.done()
        await background


@scenario
async def test_a_deadline_holds_whatever_the_engine_does():
    backend = backend_of(service_time=None)  # it never ends
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        began = now()
        with pytest.raises(aneuron.DeadlineExceeded):
            await model.options(timeout=3.0)(row())
        assert now() - began == 3.0
        for core in backend.loaded.values():
            if core.executing is not None:
                core.release()


@scenario
async def test_how_a_call_was_run_is_told():
    async with AsyncDataParallel(double, pool=engines(backend_of(cores=1), 1), batch_size=4) as model:
        first = call(model)
        await asyncio.sleep(0.25)
        _, timing = await model.timed(row(1.0, 3))
        await first
    assert (timing.queued, timing.device, timing.total) == (0.75, 1.0, 1.75)
    assert (timing.core, timing.batch_rows, timing.padded_rows, timing.why) == (0, 3, 1, "core_idle")


@scenario
async def test_a_map_goes_through_engines():
    async with AsyncDataParallel(double, pool=engines(backend_of())) as model:
        assert [y[0, 0].item() async for y in model.map(row(n) for n in range(20))] == [2.0 * n for n in range(20)]


@scenario
async def test_an_observer_is_told_of_executions_and_calls():
    seen: list[Any] = []

    class Observer:
        def call(self, timing):
            return _Noted(seen, "call")

        def batch(self, calls, *, core, rows, padded_rows, why):
            return _Noted(seen, "batch", len(calls), core, rows, padded_rows, why)

    async with AsyncDataParallel(double, pool=engines(backend_of(cores=1), 1), batch_size=4) as model:
        model.observe(Observer())
        await asyncio.gather(call(model), call(model, 1.0))
    batch = ("batch", 2, 0, 2, 2, "core_idle")
    calls = [("call", "in")] * 2
    assert seen == [*calls, (*batch, "in"), (*batch, "out"), ("call", "out"), ("call", "out")]


class _Noted:
    def __init__(self, seen: list[Any], *what: Any) -> None:
        self.seen, self.what = seen, what

    def __enter__(self) -> "_Noted":
        self.seen.append((*self.what, "in"))
        return self

    def __exit__(self, *error: Any) -> None:
        self.seen.append((*self.what, "out"))


@pytest.mark.parametrize("after", [0, 1, 30, 300], ids=named)
@scenario
async def test_a_cancelled_call_leaves_others_alone(after):
    async with AsyncDataParallel(double, pool=engines(backend_of(cores=1), 1), batch_size=1) as model:
        first, left, last = call(model, 0), call(model, 1), call(model, 2)
        for _ in range(after):
            await asyncio.sleep(0)
        left.cancel()
        assert torch.equal(await first, row(0))
        assert torch.equal(await last, 2 * row(2))
        assert left.cancelled()
        assert check_sum(model).cancelled == (after > 0)
    assert not model._life._last.futures.calls


@scenario
async def test_what_an_engine_refuses_counts_as_refused():
    pool = engines(backend_of(cores=1), 1, num_workers=1)
    async with AsyncDataParallel(double, pool=pool, batch_size=1, max_pending=2) as model:
        calls = [call(model, value) for value in range(5)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in answers if isinstance(each, aneuron.QueueFull)]
        counts = check_sum(model)
    assert (len(refused), counts.refused, counts.accepted, counts.failed) == (2, 2, 3, 0)


@scenario
async def test_admission_can_be_asked_for():
    pool = engines(backend_of(cores=1), 1, num_workers=1)
    async with AsyncDataParallel(double, pool=pool, batch_size=1, max_pending=1) as model:
        model.check_admission()
        calls = [call(model), call(model)]
        await settle(100)
        with pytest.raises(aneuron.QueueFull):
            model.check_admission()
        await asyncio.gather(*calls)
        await settle(100)
        model.check_admission()


@scenario
async def test_inputs_that_do_not_fit_are_refused_before_they_are_sent():
    async with AsyncDataParallel(double, pool=engines(backend_of())) as model:
        with pytest.raises(aneuron.ShapeError):
            await model(torch.empty(0, 2))
        with pytest.raises(TypeError, match=r"input 1 is a .*cannot be sent"):
            await model(row(), lambda: None)
        assert torch.equal(await call(model, 1), 2 * row(1))


def closures(x: Tensor) -> Any:
    return [(lambda: None) for _ in range(len(x))]


def picky(x: Tensor) -> Any:
    if x[0, 0] == 3:
        raise Unpicklable("three", lambda: None)
    return x


class Unpicklable(Exception):
    pass


@scenario
async def test_a_result_that_cannot_be_sent_fails_its_call_alone():
    backend = backend_of(probes=False)
    async with AsyncDataParallel(closures, pool=engines(backend), check_rows=False) as model:
        with pytest.raises((TypeError, aneuron.OutputError)):
            await call(model)
    async with AsyncDataParallel(picky, pool=engines(backend_of()), batch_size=1) as model:
        answers = await asyncio.gather(*[call(model, n) for n in range(5)], return_exceptions=True)
    assert [isinstance(each, Exception) for each in answers] == [False, False, False, True, False]
    assert "three" in str(answers[3])


@scenario
async def test_settings_change_in_all_engines():
    backend = backend_of(cores=4)
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        model.max_pending = 7
        model.split_size = 2
        model.num_workers = 4
        await asyncio.sleep(1.0)
        assert backend.supervision is not None
        for spawned in backend.supervision.spawned.values():
            inner = spawned.server.models[0].model
            assert (inner.max_pending, inner.split_size, inner.num_workers) == (4, 2, 2)
        kill(backend, 0)
        await asyncio.sleep(5.0)
        inner = backend.supervision.spawned[0].server.models[0].model
        assert (inner.max_pending, inner.split_size) == (4, 2)  # the successor's, too


def negate(x: Tensor) -> Tensor:
    return -x


@scenario
async def test_models_share_the_engines():
    pool = engines(backend_of())
    async with pool:
        one, other = AsyncDataParallel(double, pool=pool, weight=2.0), AsyncDataParallel(negate, pool=pool)
        answers = await asyncio.gather(*[call(model, n) for n in range(4) for model in (one, other)])
        assert [answer[0, 0].item() for answer in answers] == [0, 0, 2, -1, 4, -2, 6, -3]
        assert [share.weight for share in pool.statistics().models] == [2.0, 1.0]
        await one.aclose()
        assert torch.equal(await call(other, 1), -row(1))
    assert pool.dispatcher is not None
    assert pool.dispatcher.stopped


@scenario
async def test_a_swap_answers_each_call_wholly_by_one_model():
    async with AsyncDataParallel(double, pool=engines(backend_of(cores=4)), batch_size=2) as model:
        before = [call(model, 1.0, rows) for rows in (1, 16, 3)]
        await settle(100)
        swap = asyncio.ensure_future(model.swap(negate))
        during = []
        while not swap.done():
            during.append(call(model, 1.0, 16))
            await asyncio.sleep(0.05)
        await swap
        after = await call(model, 1.0, 16)
        assert torch.equal(after, -row(1.0, 16))
        for answer in await asyncio.gather(*before, *during):
            assert answer.unique().tolist() in ([2.0], [-1.0])
        assert all(torch.equal(answer.result(), 2 * row(1.0, len(answer.result()))) for answer in before)


@scenario
async def test_rows_of_two_models_are_not_joined():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend), batch_size=2) as model:
        assert backend.supervision is not None
        late, go = backend.supervision.spawned[0].server, asyncio.Event()
        commit = late.commit

        async def commit_late(key: int, generation: int) -> None:
            await go.wait()
            await commit(key, generation)

        late.commit = commit_late
        swap = asyncio.ensure_future(model.swap(negate))
        await asyncio.sleep(0.1)
        spread = call(model, 1.0, 4)  # two rows by the old model, two by the new one
        await asyncio.sleep(0.5)
        go.set()  # while the old one executes
        assert (await spread).unique().tolist() == [-1.0]
        await swap


@pytest.mark.parametrize("how", ["abort", "aclose"])
@scenario
async def test_a_model_may_be_started_again_at_once_while_another_keeps_the_engines(how):
    pool = engines(backend_of())
    async with AsyncDataParallel(negate, pool=pool) as other:
        model = AsyncDataParallel(double, pool=pool)
        for value in range(3):
            await model.start()
            assert torch.equal(await call(model, value), 2 * row(value))
            await getattr(model, how)()
        await asyncio.sleep(1.0)
        assert len(pool.statistics().models) == 1
        assert torch.equal(await call(other, 1), -row(1))


@scenario
async def test_a_swap_that_fails_leaves_the_old_model_everywhere():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        await call(model)
        backend._load_error = (1, OSError("this core does not take it"))
        with pytest.raises((OSError, CoreFailed)):
            await model.swap(negate)
        for value in range(4):
            assert torch.equal(await call(model, value), 2 * row(value))


@scenario
async def test_closing_finishes_what_was_accepted():
    model = AsyncDataParallel(double, pool=engines(backend_of()), batch_size=1)
    await model.start()
    calls = [call(model, value) for value in range(6)]
    await settle(3)
    closing = asyncio.ensure_future(model.aclose())
    await settle(3)
    with pytest.raises(aneuron.Closed):
        await call(model)
    await closing
    assert [each.result()[0, 0].item() for each in calls] == [0, 2, 4, 6, 8, 10]
    statistics = model.statistics()
    assert sum(core.rows for core in statistics.cores) == 6
    assert {core.state for core in statistics.cores} == {"closed"}
    async with model:  # opened again
        assert torch.equal(await call(model, 1), 2 * row(1))


@scenario
async def test_abort_leaves_what_executes():
    model = AsyncDataParallel(double, pool=engines(backend_of()), batch_size=1)
    await model.start()
    calls = [call(model, value) for value in range(12)]
    await asyncio.sleep(0.5)
    await model.abort()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    done = [each for each in answers if isinstance(each, Tensor)]
    assert 1 <= len(done) <= 4
    assert all(isinstance(each, aneuron.Closed) for each in answers if not isinstance(each, Tensor))
    await asyncio.sleep(10.0)


# When an engine dies.


@pytest.mark.parametrize("after", [0.0, 0.3, 0.999, 1.5])
@scenario
async def test_calls_of_an_engine_that_dies_run_once_more(after):
    backend = backend_of(cores=4)
    async with AsyncDataParallel(double, pool=engines(backend), batch_size=2) as model:
        calls = [call(model, value, 1 + value % 5) for value in range(20)]
        await asyncio.sleep(after)
        await settle(3)
        kill(backend, 0)
        for value, answer in enumerate(await asyncio.gather(*calls)):
            assert torch.equal(answer, 2 * row(value, 1 + value % 5))
        counts = check_sum(model)
        assert (counts.completed, counts.failed) == (20, 0)


@scenario
async def test_an_engine_that_died_serves_again():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        kill(backend, 0)
        await settle(50)
        assert model.ready
        assert [each.state for each in model.pool.statistics().engines] == ["restarting", "ready"]
        await asyncio.sleep(5.0)
        states = model.pool.statistics().engines
        assert [(each.state, each.restarts) for each in states] == [("ready", 1), ("ready", 0)]
        await asyncio.gather(*[call(model, value) for value in range(8)])
        await asyncio.sleep(1.0)
        assert all(core.batches for core in model.statistics().cores)


@scenario
async def test_engines_are_among_the_metrics():
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    from aneuron.web.metrics import Collector

    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        registry.register(Collector(net=model))
        kill(backend, 0)
        await asyncio.sleep(0.05)
        labels = {"model": "net", "pid": str(os.getpid()), "engine": "0"}
        assert registry.get_sample_value("aneuron_engine_ready", labels) == 0.0
        assert registry.get_sample_value("aneuron_engine_ready", {**labels, "engine": "1"}) == 1.0
        await asyncio.sleep(5.0)
        assert registry.get_sample_value("aneuron_engine_restarts_total", labels) == 1.0


@scenario
async def test_while_no_engine_serves_calls_are_refused_and_those_that_were_accepted_wait():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        accepted = [call(model, value) for value in range(4)]
        await asyncio.sleep(0.5)
        kill(backend, 0)
        kill(backend, 1)
        await settle(50)
        assert not model.ready
        with pytest.raises(NoHealthyCores) as caught:
            await call(model)
        assert caught.value.retry_after is not None
        answers = await asyncio.gather(*accepted)
        assert [answer[0, 0].item() for answer in answers] == [0, 2, 4, 6]
        assert model.ready


@scenario
async def test_engines_that_do_not_start_again_are_given_up_in_the_end():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        accepted = call(model)
        await settle(50)
        assert backend.supervision is not None
        backend.supervision.fail_to_start = 1000
        kill(backend, 0)
        kill(backend, 1)
        with pytest.raises(NoHealthyCores, match="failed"):
            await accepted
        backend.supervision.fail_to_start = 0
        await asyncio.sleep(100.0)  # it is tried again, seldom
        assert torch.equal(await call(model, 1), 2 * row(1))


class Deadly:
    """A model that a row kills its engine with."""

    backend: PuppetBackend

    def __call__(self, x: Tensor) -> Tensor:
        if (x == 13).any():
            core = next(core for core in self.backend.loaded.values() if core.executed and core.executed[-1][0][0] is x)
            for index, spawned in self.backend.supervision.spawned.items():
                if core.core_id in spawned.server.ids:
                    kill(self.backend, index)
        return 2 * x

    def __reduce__(self) -> Any:
        return Deadly, ()


@scenario
async def test_an_input_that_kills_two_engines_is_blamed_and_nobody_else():
    Deadly.backend = backend = backend_of(cores=3)
    async with AsyncDataParallel(Deadly(), pool=engines(backend, 3), batch_size=4) as model:
        calls = [call(model, value) for value in range(40)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for value, answer in enumerate(answers):
            if value == 13:
                assert isinstance(answer, CoreFailed)
                assert "died while they executed these rows" in str(answer)
            else:
                assert torch.equal(answer, 2 * row(value))
        assert sum(each.restarts for each in model.pool.statistics().engines) <= 2
        await asyncio.sleep(10.0)
        assert torch.equal(await call(model, 1), 2 * row(1))


@scenario
async def test_ten_thousand_calls_survive_their_engine():
    backend = backend_of(service_time=0.01)
    async with AsyncDataParallel(double, pool=engines(backend), batch_size=64) as model:
        calls = [call(model, value) for value in range(10_000)]
        await asyncio.sleep(0.2)
        kill(backend, 0)
        await asyncio.sleep(0.2)
        kill(backend, 1)
        answers = torch.cat(await asyncio.gather(*calls))
        assert torch.equal(answers[:, 0], 2 * torch.arange(10_000.0))


@scenario
async def test_an_engine_that_has_lost_a_core_is_replaced_while_the_others_serve():
    backend = backend_of(cores=4, faults={OSError: aneuron.Fault.CORE}, service_time=None)
    backend.recoverable = False
    async with AsyncDataParallel(double, pool=engines(backend), batch_size=1) as model:
        calls = [call(model, value) for value in range(4)]
        await settle(100)
        backend[0].release(OSError("lost"))
        await settle(100)
        states = [each.state for each in model.pool.statistics().engines]
        assert states == ["draining", "ready"]
        while not all(each.done() for each in calls):
            for core in list(backend.loaded.values()):
                if core.executing is not None:
                    core.release()
            await settle(50)
        assert [each.result()[0, 0].item() for each in calls] == [0, 2, 4, 6]
        await asyncio.sleep(60.0)
        assert [each.restarts for each in model.pool.statistics().engines] == [1, 0]


def uneven(x: Tensor) -> Tensor:
    return x.double() if x[0, 0] == 1 else x


@pytest.mark.parametrize("width", [2, INLINE])
@scenario
async def test_pieces_that_do_not_fit_together_fail_their_call_alone(width):
    pool = engines(backend_of())
    async with AsyncDataParallel(uneven, pool=pool, batch_size=1, set_dynamic_batching=False) as model:
        bad, good = torch.zeros(2, width), torch.zeros(2, width)
        bad[1] = 1
        answers = await asyncio.gather(model(bad), model(good), return_exceptions=True)
        assert isinstance(answers[0], aneuron.OutputError)
        assert torch.equal(answers[1], good)
        assert torch.equal(await model(good), good)


@scenario
async def test_what_a_leaving_engine_refuses_goes_to_another():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend), batch_size=1) as model:
        before = [call(model, value) for value in range(4)]
        await settle(100)
        assert backend.supervision is not None
        leaving = asyncio.ensure_future(backend.supervision.spawned[0].server.drain())  # of which clients are not told
        after = [call(model, value) for value in range(4)]
        for value, answer in enumerate(await asyncio.gather(*before, *after)):
            assert torch.equal(answer, 2 * row(value % 4))
        await leaving


@scenario
async def test_a_bug_in_an_engine_leaves_nobody_waiting():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend, 1)) as model:
        assert backend.supervision is not None
        backend.supervision.spawned[0].server._pool.dispatcher.crash(ValueError("a bug"))
        async with asyncio.timeout(100.0):
            ended = await asyncio.gather(call(model), call(model), return_exceptions=True)
        assert all(isinstance(each, (aneuron.Closed, NoHealthyCores)) for each in ended)


@scenario
async def test_many_that_wait_are_told_together_that_nobody_will_come():
    backend = backend_of()
    async with AsyncDataParallel(double, pool=engines(backend)) as model:
        calls = [call(model, value) for value in range(3000)]
        await settle(100)
        assert backend.supervision is not None
        backend.supervision.fail_to_start = 1000
        kill(backend, 0)
        kill(backend, 1)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {NoHealthyCores}


def test_engines_end_with_a_loop_that_leaves_them_in_the_middle():
    backend = backend_of()

    async def main() -> None:
        async with AsyncDataParallel(double, pool=engines(backend)) as model:
            calls = [call(model) for _ in range(4)]
            await settle(100)
            raise ZeroDivisionError(len(calls))

    with pytest.raises(ZeroDivisionError) as caught:  # whose traceback holds the model
        run(main())
    assert backend.supervision is not None
    assert [engine.ended.done() for engine in backend.supervision.spawned.values()] == [True, True]
    assert caught.value.args == (4,)


@scenario
async def test_deaths_and_calls_in_any_order_lose_nothing():
    generator = torch.Generator().manual_seed(7)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for _ in range(30):
        backend = backend_of(cores=1 + draw(4), service_time=0.1)
        processes = 1 + draw(backend._cores)
        async with AsyncDataParallel(double, pool=engines(backend, processes), batch_size=1 + draw(4)) as model:
            calls: list[tuple[int, int, Any]] = []
            for value in range(40):
                try:
                    calls.append((value, rows := 1 + draw(9), call(model, value, rows)))
                except aneuron.AneuronError:
                    continue
                if not draw(6):
                    kill(backend, draw(processes))
                if not draw(4):
                    calls[draw(len(calls))][2].cancel()
                await asyncio.sleep(draw(10) / 50)
            for value, rows, answer in calls:
                try:
                    assert torch.equal(await answer, 2 * row(value, rows))
                except asyncio.CancelledError:
                    assert answer.cancelled()
                except (NoHealthyCores, CoreFailed):
                    pass  # nobody served, or two engines were killed under it
            check_sum(model)


def test_a_pool_is_pickled_with_its_engines_not_started():
    pool = pickle.loads(pickle.dumps(Pool([0, 1], aneuron.CpuBackend(cores=2), processes=2, share="x", linger=1.5)))
    assert (pool.processes, pool._share, pool._linger) == (2, "x", 1.5)


@pytest.mark.parametrize(
    "settings", [{"processes": 0}, {"processes": 1.5}, {"share": "x"}, {"processes": 1, "share": ""}, {"linger": -1}]
)
def test_bad_settings_of_a_pool(settings):
    with pytest.raises(ValueError, match=next(reversed(settings))):
        Pool(**settings)


@scenario
async def test_more_engines_than_cores():
    with pytest.raises(aneuron.DeviceError, match="processes=3, and the pool has 2 cores"):
        await AsyncDataParallel(double, pool=engines(backend_of(), 3)).start()
