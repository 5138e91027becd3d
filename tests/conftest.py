"""What every test is held to: it draws the same numbers wherever and after whatever it runs, and its threads end."""

import random
import threading

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")


def seed():
    random.seed(0)
    torch.default_generator.manual_seed(0)


def pytest_collectstart(collector):
    seed()  # what a module draws when it is imported


@pytest.fixture(autouse=True)
def the_same_numbers():
    seed()


@pytest.fixture(autouse=True)
def no_thread_of_ours_survives():
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("aneuron"):
            thread.join(60.0)  # told to stop; it may be inside its last batch
            assert not thread.is_alive(), f"{thread.name} survives its test"
