"""The context and the modes of the threads that execute."""

import asyncio
import contextlib
import contextvars

import pytest
import torch
from torch import nn

from aneuron import AsyncDataParallel, CpuBackend, Fault
from aneuron.engine.threads import Workers

VARIABLE = contextvars.ContextVar("VARIABLE", default=0)


def _reads(x):
    return x + VARIABLE.get()


def test_threads_start_in_a_copy_of_the_context_of_the_start():
    async def main():
        VARIABLE.set(7)
        async with AsyncDataParallel(_reads, backend=CpuBackend(cores=3), num_workers=6) as model:
            VARIABLE.set(9)
            first = await asyncio.gather(*[model(torch.zeros(1, 1)) for _ in range(9)])
            await model.swap(_reads)
            model.num_workers = 12
            return first + await asyncio.gather(*[model(torch.zeros(1, 1)) for _ in range(9)])

    assert {y.item() for y in asyncio.run(main())} == {7.0}


def test_the_threads_of_a_core_that_is_loaded_again_do_too():
    async def main():
        VARIABLE.set(7)
        async with AsyncDataParallel(_reads, backend=CpuBackend(cores=1)) as model:
            VARIABLE.set(9)
            run = model._life.run
            values = []
            # As recovery does: those that load it, and those that serve in place of others.
            for again in (run.dispatcher.workers(0, run.context), run.dispatcher._new_lane(0).workers):
                again.grow(1)
                values.append(await asyncio.wrap_future(again.submit(VARIABLE.get)))
                again.stop()
                again.join(10)
            return values

    assert asyncio.run(main()) == [7, 7]


def test_what_a_thread_sets_is_its_own():
    workers = Workers("test")
    workers.grow(2)
    workers.submit(VARIABLE.set, 5).result()
    assert VARIABLE.get() == 0
    workers.stop()
    workers.join(10)


def test_dynamo_is_configured_as_where_the_model_is_started(monkeypatch):
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)

    def limit(x):
        return x + torch._dynamo.config.recompile_limit

    async def main():
        async with AsyncDataParallel(limit, backend=CpuBackend(cores=2)) as model:
            return await model(torch.zeros(1, 1))

    assert asyncio.run(main()).item() == 64.0


# What a model leaves behind.


def _autocast():
    torch.autocast("cpu", torch.float16, cache_enabled=False).__enter__()


LEFT = {
    "gradients": lambda: torch.set_grad_enabled(True),
    "inference mode": lambda: torch.inference_mode().__enter__(),
    "autocast": _autocast,
    "autocast by setters": lambda: (
        torch.set_autocast_enabled("cpu", True),
        torch.set_autocast_dtype("cpu", torch.half),
    ),
    "default device": lambda: torch.set_default_device("meta"),
    "device as a context": lambda: torch.device("meta").__enter__(),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
}


def _state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.empty(0).device,
    )


class Plain:
    """A backend that leaves modes to the model."""

    name = "plain"
    recoverable = False

    def __init__(self, threads=1):
        self.concurrent = threads > 1

    def cores(self):
        return [0]

    def load(self, model, core_id, batch_size):
        class Core:
            concurrent = self.concurrent

            def execute(self, args, kwargs):
                return model(*args, **kwargs)

            def close(self):
                pass

        return Core()

    def classify(self, error):
        return Fault.INPUT


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("example", [None, torch.zeros(1, 2)])
@pytest.mark.parametrize("kind", LEFT)
def test_modes_that_a_model_leaves_changed_are_put_back(kind, example, raises):
    states = []

    def model(x):
        states.append(_state())
        LEFT[kind]()
        if raises and x.sum() == 9:
            raise ValueError("no nines")
        return x * 2

    async def main():
        async with AsyncDataParallel(model, backend=Plain(), example_inputs=example) as served:
            for value in (1.0, 9.0, 2.0):
                with contextlib.suppress(ValueError):
                    y = await served(torch.full((1, 1 + (example is not None)), value)[:, :2])
                    assert y.device.type == "cpu"
                    assert y.dtype is torch.float32

    asyncio.run(main())
    assert set(states) == {
        (False, False, False, torch.bfloat16, True, torch.device("cpu"), torch.float32, torch.device("cpu"))
    }
    assert torch.get_default_dtype() is torch.float32


def test_a_default_dtype_that_is_set_between_executions_stays():
    async def main():
        async with AsyncDataParallel(torch.neg, backend=Plain()) as served:
            await served(torch.ones(1, 1))
            torch.set_default_dtype(torch.float64)
            try:
                await served(torch.ones(1, 1))
                return torch.get_default_dtype()
            finally:
                torch.set_default_dtype(torch.float32)

    assert asyncio.run(main()) is torch.float64


@pytest.mark.parametrize("where", ["model", "caller"])
def test_results_of_split_calls_are_on_the_cpu_whatever_the_default_device_is(where):
    def model(x):
        if where == "model":
            torch.set_default_device("meta")
        return x * 2

    async def main():
        async with AsyncDataParallel(model, backend=CpuBackend(cores=2), split_size=2) as served:
            if where == "caller":
                torch.set_default_device("meta")
            try:
                return await served(x)
            finally:
                torch.set_default_device(None)

    x = torch.arange(14.0).reshape(7, 2)
    y = asyncio.run(main())
    assert y.device.type == "cpu"
    assert y.tolist() == (x * 2).tolist()


# context=


def test_context_is_around_each_execution_those_of_the_warm_up_too():
    within = []

    @contextlib.contextmanager
    def context():
        within.append("in")
        with torch.autocast("cpu", torch.bfloat16):
            yield
        within.append("out")

    net = nn.Linear(2, 2).eval()

    async def main():
        backend = CpuBackend(cores=1)
        settings = {"example_inputs": torch.ones(1, 2), "check_rows": False}
        async with AsyncDataParallel(net, backend=backend, context=context, **settings) as model:
            assert within == ["in", "out"] * 2
            return await model(torch.ones(1, 2))

    assert asyncio.run(main()).dtype is torch.bfloat16
    assert within == ["in", "out"] * 3


class Raises:
    def __init__(self, where):
        self.where = where

    def __enter__(self):
        if self.where == "enter":
            raise ValueError("on enter")

    def __exit__(self, *error):
        if self.where == "exit":
            raise ValueError("on exit")
        return self.where == "suppress"


@pytest.mark.parametrize(
    ("context", "kind", "text"),
    [
        (lambda: Raises("enter"), ValueError, "on enter"),
        (lambda: Raises("exit"), ValueError, "on exit"),
        (lambda: Raises("suppress"), RuntimeError, "suppressed an exception of the model"),
        (lambda: 1 / 0, ZeroDivisionError, "division"),
        (lambda: None, TypeError, "context manager"),
    ],
)
def test_what_context_raises_is_the_calls(context, kind, text):
    def model(x):
        raise KeyError("the model's")

    async def main():
        async with AsyncDataParallel(model, backend=CpuBackend(cores=1), context=context) as served:
            with pytest.raises(kind, match=text):
                await served(torch.ones(1, 1))
            assert served.statistics().cores[0].state == "ready"

    asyncio.run(main())


@pytest.mark.parametrize("context", [torch.autocast("cpu"), contextlib.nullcontext(), 3, "autocast"])
def test_context_must_be_a_function_that_makes_one(context):
    with pytest.raises(TypeError, match=r"context=.*expected a function that makes a context manager"):
        AsyncDataParallel(torch.neg, context=context)
