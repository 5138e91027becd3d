"""What every test is held to: its threads end with it."""

import threading

import pytest


@pytest.fixture(autouse=True)
def no_thread_of_ours_survives():
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("aneuron"):
            thread.join(10.0)  # told to stop; it may be inside its last batch
            assert not thread.is_alive(), f"{thread.name} survives its test"
