"""Several models on one pool, with real threads: real modules, contexts, processes, a NeuronCore's double."""

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import doubles
import pytest
import torch

from aneuron import AsyncDataParallel, Closed, CpuBackend, Pool, SimulatedBackend

pytestmark = pytest.mark.core

PLACE = contextvars.ContextVar("PLACE", default="nowhere")


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = torch.nn.Embedding(100, 16), torch.nn.Linear(16, 8)

    def forward(self, ids):
        return torch.nn.functional.normalize(self.out(self.words(ids).mean(1)), dim=1)


class Reranker(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def forward(self, query, document):
        return self.layers(torch.cat([query, document], 1))


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("aneuron-core")}


async def test_an_encoder_and_a_reranker_on_the_same_two_cores():
    encoder, reranker = Encoder().eval(), Reranker().eval()
    texts = [torch.randint(100, (1, 12)) for _ in range(40)]
    async with Pool(backend=CpuBackend(cores=2)) as pool:
        encode = AsyncDataParallel(encoder, pool=pool, batch_size=8, weight=2.0)
        rank = AsyncDataParallel(reranker, pool=pool, batch_size=8)

        async def search(ids):
            vector = await encode(ids)
            return vector, await rank(vector, vector.flip(1))

        found = await asyncio.gather(*map(search, texts))
        assert [share.weight for share in pool.statistics().models] == [2.0, 1.0]
        assert all(share.busy_seconds > 0 for share in pool.statistics().models)  # how many, test_shares.py tells
    with torch.no_grad():
        for ids, (vector, score) in zip(texts, found, strict=True):
            torch.testing.assert_close(vector, encoder(ids))
            torch.testing.assert_close(score, reranker(vector, vector.flip(1)))


async def test_three_models_on_simulated_cores_answer_while_one_fails_and_one_is_swapped():
    fault = SimulatedBackend.fault
    backend = SimulatedBackend(cores=2, service_time=0.0005, faults=[fault("core", probability=0.02)], seed=3)
    pool = Pool(backend=backend)
    models = [AsyncDataParallel(fn, pool=pool, batch_size=4) for fn in (torch.neg, torch.abs, torch.relu)]
    await models[0].start()
    x = torch.tensor([[-2.0]])
    right = {0: {-x}, 1: {x.abs()}, 2: {x.relu(), x.sign()}}
    done = 0

    async def caller(index):
        nonlocal done
        for _ in range(50):
            try:
                y = await models[index](x)
            except (RuntimeError, OSError):
                await asyncio.sleep(0.001)
            else:
                assert any(torch.equal(y, each) for each in right[index])
                done += 1

    async def swap():
        for version in (torch.sign, torch.relu):
            with contextlib.suppress(RuntimeError):  # a core has failed in its warm-up
                await models[2].swap(version)

    await asyncio.gather(*[caller(index) for index in (0, 1, 2) for _ in range(8)], swap())
    assert done
    await pool.aclose()
    for model in models:
        calls = model.statistics().calls
        assert calls.accepted == calls.completed + calls.failed + calls.cancelled
        with pytest.raises(Closed, match="the pool was closed"):
            await model(x)
    for thread in threads():
        thread.join(60)
    assert not threads()


async def test_each_model_executes_in_the_context_of_its_own_start():
    seen = {}

    def remember(name):
        def model(x):
            seen[name] = PLACE.get()
            return x

        return model

    async with Pool(backend=SimulatedBackend(cores=1, service_time=0.0)) as pool:
        made = {name: AsyncDataParallel(remember(name), pool=pool) for name in ("first", "second", "third")}
        for name, model in made.items():
            PLACE.set(name)
            await model.start()
        PLACE.set("elsewhere")
        for model in made.values():
            await model(torch.ones(1, 1))
    assert seen == {"first": "first", "second": "second", "third": "third"}


async def test_values_in_contexts_are_told_apart_without_being_compared():
    async with Pool(backend=SimulatedBackend(cores=1, service_time=0.0)) as pool:
        models = [AsyncDataParallel(lambda x: PLACE.get() + 0 * x, pool=pool) for _ in range(2)]
        for number, model in enumerate(models):
            PLACE.set(torch.tensor([[number, number]]))  # tensors are not simply equal or unequal
            await model.start()
        answers = [await model(torch.ones(1, 2)) for model in models]
    assert [y.tolist() for y in answers] == [[[0.0, 0.0]], [[1.0, 1.0]]]


async def test_an_empty_context_is_one_too():
    places = []

    class Remembering(SimulatedBackend):
        def load(self, model, core_id, batch_size):
            places.append(PLACE.get())
            return super().load(model, core_id, batch_size)

    async with Pool(backend=Remembering(cores=1, service_time=0.0)) as pool:
        models = [AsyncDataParallel(fn, pool=pool) for fn in (torch.neg, torch.abs)]
        PLACE.set("here")
        await models[0].start()
        await asyncio.create_task(models[1].start(), context=contextvars.Context())
    assert places == ["here", "nowhere"]


async def test_a_thread_lets_go_of_the_context_of_a_model_that_has_ended():
    async with Pool(backend=SimulatedBackend(cores=1, service_time=0.0)) as pool:
        first = AsyncDataParallel(torch.neg, pool=pool)
        await first(torch.ones(1, 1))  # whose context the threads have

        async def serve():
            value = torch.ones(1)
            PLACE.set(value)
            async with AsyncDataParallel(torch.abs, pool=pool) as model:
                await model(torch.ones(1, 1))
            return weakref.ref(value)

        held = await asyncio.create_task(serve())
        await asyncio.sleep(0)  # the loop holds the task until then, and that its context
        gc.collect()
        assert held() is None


def test_a_process_that_forked_is_told_so_and_may_use_what_was_closed_before():
    program = """
        import asyncio, os, sys, torch, aneuron

        async def refused(*uses):
            for use in uses:
                try:
                    await use()
                except RuntimeError as error:
                    assert "forked while the model was running" in str(error), error
                else:
                    raise AssertionError("no error")

        async def child(pool, model, other, idle):
            x = torch.ones(1, 1)
            await refused(model.start, lambda: model(x), other.start, lambda: other(x), pool.aclose)
            await idle.start()
            assert await idle(x) == -1
            await idle.aclose()

        async def main():
            cores = aneuron.CpuBackend(1)
            pool = aneuron.Pool(backend=cores)
            model, other = (aneuron.AsyncDataParallel(torch.neg, pool=pool) for _ in range(2))
            idle = aneuron.AsyncDataParallel(torch.neg, pool=aneuron.Pool(backend=cores))
            await idle(torch.ones(1, 1))
            await idle.aclose()
            await model(torch.ones(1, 1))
            pid = os.fork()
            if not pid:
                try:
                    asyncio.run(child(pool, model, other, idle))
                    os._exit(0)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            await other(torch.ones(1, 1))
            await pool.aclose()

        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


async def test_on_neuron_models_of_one_pool_sit_on_the_same_cores(monkeypatch):
    net, other = torch.nn.Linear(4, 3).eval(), torch.nn.Softmax(1).eval()
    x = torch.rand(2, 4)
    with doubles.neuronx(cores=2):
        import torch_neuronx

        async with Pool(backend="neuron") as pool:
            a, b = (
                AsyncDataParallel(torch_neuronx.trace(module, x), pool=pool, example_inputs=x)
                for module in (net, other)
            )
            answers = await asyncio.gather(*[model(x) for _ in range(6) for model in (a, b)])
            with torch.no_grad():
                for index, answer in enumerate(answers):
                    torch.testing.assert_close(answer, (net, other)[index % 2](x))
            for model in (a, b):
                assert [(core.id, core.state) for core in model.statistics().cores] == [(0, "ready"), (1, "ready")]
            assert doubles.machine.loads[:2] == [2, 2]  # both models on each
            await a.aclose()
            torch.testing.assert_close(await b(x), other(x))
