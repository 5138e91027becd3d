"""What every test is held to: it draws the same numbers wherever and after whatever it runs, and its threads end."""

import gc
import os
import random
import sys
import threading
from types import SimpleNamespace

import hypothesis
import pytest
import torch

os.environ["ANEURON_CHECK_OWNERS"] = "1"  # read at the first import: also by the processes that tests start

import aneuron._native
from aneuron import ownership

hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")


def seed():
    random.seed(0)
    torch.default_generator.manual_seed(0)


def pytest_collectstart(collector):
    seed()  # what a module draws when it is imported


def pytest_collection_modifyitems(items):
    if aneuron._native.why_pure is None:
        for item in items:
            if item.get_closest_marker("pure"):
                item.add_marker(pytest.mark.skip(reason="runs only as Python: ANEURON_PURE=1"))


def pytest_collection_finish():
    """Let no collection of garbage walk through what the imports made, which takes half a second. An application that
    ends would have it walked again: only what asks for `freezing` freezes anything.
    """
    gc.collect()
    gc.freeze()
    if lifecycle := sys.modules.get("aneuron.web.lifecycle"):
        lifecycle.gc = SimpleNamespace(collect=int, freeze=int, unfreeze=int)


@pytest.fixture
def freezing(monkeypatch):
    """Applications freeze what is there, as outside of tests; when the test begins nothing is frozen."""
    monkeypatch.setattr("aneuron.web.lifecycle.gc", gc)
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def pytest_report_header():
    return f"aneuron's core: {aneuron._native.why_pure or 'compiled'}"


@pytest.fixture(autouse=True)
def the_same_numbers():
    seed()


@pytest.fixture(autouse=True)
def nobody_touches_what_is_not_his():
    """Where the core runs as Python: an error in a thread, or behind another, may reach nobody else."""
    yield
    found, ownership.violations[:] = ownership.violations[:], []
    assert not found, "\n".join(found)


@pytest.fixture(autouse=True)
def no_thread_of_ours_survives():
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("aneuron"):
            thread.join(60.0)  # told to stop; it may be inside its last batch
            assert not thread.is_alive(), f"{thread.name} survives its test"
