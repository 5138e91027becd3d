"""Every accepted call ends exactly once, with its own rows or an error that it may get: random schedules of whatever
may happen. Always the same ones: CHAOS_SECONDS makes them more, CHAOS_SEED begins elsewhere, as every night in CI."""

import gc
import itertools
import logging
import os
import time
from collections import Counter

import engines
import pytest
import threads
import virtual
from callers import check_freed

pytestmark = pytest.mark.core

SEED = int(os.environ.get("CHAOS_SEED", "0"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "0"))
FEWEST = 60 if os.environ.get("ANEURON_PURE") else 200  # of each half; every night there are thousands, of other seeds


@pytest.fixture(autouse=True)
def no_records():
    """The test runner keeps what is logged, with errors that callers got, and so their frames and inputs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def many(replay, fewest, seeds):
    """So many schedules, one seed after the other, and more until the time is over; what became of their callers."""
    fates, callers, end = Counter(), [], time.monotonic() + SECONDS
    for warm in (SEED, SEED + 1):  # the first loop of each kind opens what stays open
        replay(warm)
    gc.collect()
    opened = descriptors()
    for done, seed in enumerate(seeds):
        if done >= fewest and time.monotonic() > end:
            break
        ended = replay(seed)
        callers += ended
        for each in ended:
            fates.update(each.fates)
        if len(callers) >= 500:
            check_freed(callers)
            callers.clear()
    check_freed(callers)
    callers.clear()  # with what they have called, and puppets that were killed in the middle
    ended = each = None
    gc.collect()
    assert descriptors() <= opened, f"{descriptors() - opened} file descriptors are left"
    assert "a wrong retry_after" not in fates
    print(f"{done} schedules: {dict(fates)}")
    return fates


@pytest.mark.parametrize("half", [0, 1], ids=["on a pool", "alone"])
def test_schedules_on_virtual_time(half):
    fates = many(virtual.replay, FEWEST, itertools.count(SEED + half, 2))
    assert {"answer", "bad", "scope", "refused", "closed", "core", "late", "none", "sick", "shape"} <= set(fates)


def test_schedules_with_engines_that_die():
    """So few of them each time, for each takes ten times as long."""
    fates = many(engines.replay, 15, itertools.count(SEED))
    assert {"answer", "bad", "scope", "refused", "closed", "core", "late", "none"} <= set(fates)


def test_schedules_on_real_threads():
    fates = many(threads.replay, 10, itertools.count(SEED))
    assert {"answer", "bad", "scope", "closed"} <= set(fates)
