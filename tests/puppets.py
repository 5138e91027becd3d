"""Models on puppet cores and virtual time: what several test files tell their stories with."""

import asyncio
import functools
import re

import torch

from aneuron.testing import run, settle


def scenario(test):
    """Run an async test on a virtual-time loop."""

    @functools.wraps(test)
    def wrapper(*args, **kwargs):
        return run(test(*args, **kwargs))

    return wrapper


def row(value=0.0, rows=1):
    return torch.full((rows, 2), float(value))


def call(model, value=0.0, rows=1):
    return asyncio.ensure_future(model(row(value, rows)))


def check_sum(model):
    calls = model.statistics().calls
    assert calls.accepted == calls.completed + calls.failed + calls.cancelled + calls.waiting + calls.running
    assert min(calls.waiting, calls.running) >= 0
    return calls


async def release_all(backend, *tasks):
    while not all(task.done() for task in tasks):
        for core in backend.loaded.values():
            if core.executing is not None:
                core.release()
        await settle()


def named(value):
    """A value as the id of a test: without addresses, which every process that collects the tests has others of."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
