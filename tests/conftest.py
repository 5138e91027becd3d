"""What every test is held to: its threads end with it."""

import re
import threading

import pytest


@pytest.fixture(autouse=True)
def no_thread_of_ours_survives():
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("aneuron"):
            thread.join(10.0)  # told to stop; it may be inside its last batch
            assert not thread.is_alive(), f"{thread.name} survives its test"


def pytest_collection_modifyitems(items):
    """Names without addresses: each process that collects the tests must give them the same."""
    for item in items:
        item._nodeid = re.sub(r" at 0x[0-9a-f]+", "", item.nodeid)
