"""Every accepted call ends exactly once, with its own rows or an error that it may get: random schedules of whatever
may happen. CHAOS_SECONDS makes them longer, CHAOS_SEED begins elsewhere."""

import logging
import os
import time
from collections import Counter

import pytest
import threads
import virtual
from callers import check_freed

SEED = int(os.environ.get("CHAOS_SEED", "0"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "10"))
FEWEST = 150  # schedules, however slow the machine


@pytest.fixture(autouse=True)
def no_records():
    """The test runner keeps what is logged, with errors that callers got, and so their frames and inputs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def many(replay, fewest):
    """Schedules, one seed after the other, until the time is over; what became of their callers."""
    fates, callers, seed, end = Counter(), [], SEED, time.monotonic() + SECONDS
    for warm in (SEED, SEED + 1):  # the first loop of each kind opens what stays open
        replay(warm)
    opened = descriptors()
    while seed < SEED + fewest or time.monotonic() < end:
        one = replay(seed)
        fates.update(one.fates)
        callers.append(one)
        if len(callers) == 50:
            check_freed(callers)
            callers.clear()
        seed += 1
    check_freed(callers)
    assert descriptors() <= opened, f"{descriptors() - opened} file descriptors are left"
    assert "a wrong retry_after" not in fates
    print(f"{seed - SEED} schedules: {dict(fates)}")
    return fates


def test_schedules_on_virtual_time():
    fates = many(virtual.replay, FEWEST)
    assert {"answer", "bad", "scope", "refused", "closed", "core", "late", "none", "sick", "shape"} <= set(fates)


def test_schedules_on_real_threads():
    fates = many(threads.replay, 10)
    assert {"answer", "bad", "scope", "closed"} <= set(fates)
