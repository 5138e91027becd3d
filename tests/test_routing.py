"""Which engine runs a call, and which rows of a large one: pure decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aneuron.remote.routing import Share, Standing, choose, room, spread

pytestmark = pytest.mark.core

standings = st.lists(
    st.one_of(
        st.none(),
        st.builds(
            Standing,
            cores=st.integers(0, 8),
            rows=st.integers(0, 1000),
            seconds=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
        ),
    ),
    min_size=1,
    max_size=6,
)


def test_the_engine_that_is_done_first_is_chosen() -> None:
    assert choose([Standing(1, 5), Standing(4, 8), Standing(1, 3)], 1) == 1


def test_a_slow_engine_is_given_less() -> None:
    fast, slow = Standing(1, 3, 0.001), Standing(1, 1, 0.010)
    assert choose([slow, fast], 1) == 1


def test_an_engine_that_nobody_has_measured_counts_as_the_others() -> None:
    assert choose([Standing(1, 2, 0.004), Standing(1, 1)], 1) == 1


def test_equal_engines_take_turns() -> None:
    same = [Standing(2, 0)] * 3
    assert [choose(same, 1, turn) for turn in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize("none", [[], [None], [Standing(0, 0), None]])
def test_there_may_be_no_engine(none: list[Standing | None]) -> None:
    assert choose(none, 1) is None
    assert spread(none, 8, 1) == []


def test_a_call_of_one_piece_is_not_cut() -> None:
    assert spread([Standing(4, 0), Standing(4, 0)], 8, 8, turn=1) == [Share(1, 0, 8)]


def test_a_large_call_goes_to_all_by_their_cores() -> None:
    assert spread([Standing(1, 0), Standing(3, 0)], 256, 8) == [Share(0, 0, 64), Share(1, 64, 256)]


def test_an_engine_that_has_much_to_do_is_left_out() -> None:
    assert spread([Standing(1, 512), Standing(1, 0), Standing(1, 0)], 64, 8) == [Share(1, 0, 32), Share(2, 32, 64)]


def test_without_dynamic_batching_each_core_has_one_piece() -> None:
    shares = spread([Standing(1, 900), None, Standing(3, 0)], 32, 8, even=True)
    assert shares == [Share(0, 0, 8), Share(2, 8, 32)]


@given(standings, st.integers(1, 5000), st.integers(1, 64), st.integers(0, 5), st.booleans())
def test_each_row_goes_to_one_engine_that_serves(
    there: list[Standing | None], rows: int, piece: int, turn: int, even: bool
) -> None:
    shares = spread(there, rows, piece, turn, even)
    serving = [index for index, each in enumerate(there) if each is not None and each.cores]
    assert bool(shares) == bool(serving)
    if not shares:
        return
    assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
    assert shares[-1].stop == rows
    assert all(share.stop > share.start and share.engine in serving for share in shares)
    assert len({share.engine for share in shares}) == len(shares)
    assert all(share.start % piece == 0 for share in shares)


@given(st.integers(1, 10**6), st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_the_engines_have_the_room_of_the_pool_together(bound: int, cores: list[int]) -> None:
    own = [room(bound, each, sum(cores)) for each in cores]
    assert min(own) >= 1
    assert bound <= sum(own) <= bound + len(cores)
