"""When a core is trusted, and who is to blame: pure."""

import pytest

from aneuron.engine.health import FIRST, LIMIT, LONGEST, STEADY, Bisection, Health


def up(recoverable=True, proven=True):
    health = Health(recoverable, proven)
    assert health.state == "loading"
    assert not health.serves
    health.loaded(0.0)
    assert health.state == "ready"
    return health


def test_a_core_that_cannot_be_mended_stays_out():
    health = up(recoverable=False)
    assert health.faulted(1.0, 0.5) is None
    assert (health.state, health.until, health.serves) == ("failed", None, False)


def test_a_core_comes_back_after_a_while_that_doubles():
    health, now, delays = up(), 10.0, []
    while (delay := health.faulted(now, 0.5)) is not None:
        assert (health.state, health.until) == ("quarantined", now + delay)
        delays.append(delay)
        now += delay
        health.loads()
        assert (health.state, health.until) == ("loading", None)
        health.loaded(now)
        assert health.state == "ready"
    assert delays == [min(LONGEST, FIRST * 2**n) for n in range(LIMIT - 1)]
    assert health.state == "failed"


@pytest.mark.parametrize(("chance", "factor"), [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_cores_that_fail_together_do_not_come_back_together(chance, factor):
    assert up().faulted(0.0, chance) == FIRST * factor


def test_no_delay_is_longer_than_the_longest():
    health = up()
    health.failures = LIMIT - 2
    assert FIRST * 2.0 ** (LIMIT - 2) <= LONGEST or health.faulted(0.0, 0.5) == LONGEST
    assert LONGEST * 1.25 <= 75.0


def test_a_core_that_was_loaded_again_without_a_run_is_proven_by_its_first_batch():
    health = up(proven=False)
    health.faulted(1.0, 0.5)
    health.loads()
    health.loaded(2.0)
    assert (health.state, health.serves) == ("suspect", True)
    health.served()
    assert health.state == "ready"


def test_failures_are_forgotten_after_steady_service_and_not_before():
    health = up()
    health.faulted(1.0, 0.5)
    health.loads()
    health.loaded(2.0)
    assert health.faulted(2.0 + STEADY - 1, 0.5) == 2 * FIRST
    health.loads()
    health.loaded(100.0)
    assert health.faulted(100.0 + STEADY, 0.5) == FIRST


def test_loads_that_fail_count_as_failures():
    health = Health(True, True)
    delays = [health.faulted(0.0, 0.5) for _ in range(LIMIT)]
    assert delays[:2] == [FIRST, 2 * FIRST]
    assert delays[-1] is None
    assert health.state == "failed"


# Bisections.


def test_who_fails_beside_one_that_does_not_is_to_blame_at_once():
    inquest = Bisection()
    inquest.split(2)
    assert inquest.ended(0, well=False, alone="a") == []
    assert inquest.ended(0, well=True) == ["a"]
    assert not inquest.open


def test_after_one_has_ended_well_the_others_are_not_held():
    inquest = Bisection()
    inquest.split(2)
    assert inquest.ended(0, well=True) == []
    assert inquest.ended(0, well=False, alone="b") == ["b"]
    assert not inquest.open


def test_who_fails_on_two_cores_between_them_is_to_blame():
    inquest = Bisection()
    inquest.split(2)
    assert inquest.ended(0, well=False, alone="a") == []
    assert inquest.ended(1, well=False, alone="b") == ["a", "b"]


def test_where_all_fail_on_one_core_another_has_to_be_asked():
    inquest = Bisection()
    inquest.split(2)
    inquest.split(2)  # the first half
    for alone in "abc":
        assert not inquest.open
        assert inquest.ended(0, well=False, alone=alone) == []
    assert inquest.open
    assert inquest.ask() == inquest.asked == "a"
    assert inquest.let_go() == ["b", "c"]
    assert not inquest.open


def test_parts_whose_callers_have_left_decide_nothing():
    inquest = Bisection()
    inquest.split(2)
    assert inquest.ended(0, well=False) == []
    assert not inquest.open
    assert inquest.ended(0, well=False, alone="b") == []
    assert inquest.open
