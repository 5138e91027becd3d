"""Which outputs have rows, judged from executions that are there: no model runs, no thread, no clock."""

import pytest
import torch

from aneuron.tensors.nested import mark
from aneuron.tensors.outputs import Output
from aneuron.tensors.verdicts import Seen, judge, repeats, row_lists

X = torch.linspace(-1.0, 2.0, 24).reshape(6, 4).sin()  # six rows, all different


def see(model, *rows):
    return [Seen(each, model(X[list(each)])) for each in rows]


def verdicts(seen, dim=0):
    """The verdicts on all leaves of what a model returned."""
    marks = dict.fromkeys(row_lists(seen, dim), __import__("aneuron").Rows)
    outputs = [Output(mark(each.value, marks), None, dim) for each in seen]
    columns = list(zip(*[output.leaves for output in outputs], strict=True))
    tried = repeats(seen, [output.leaves for output in outputs])
    return [judge(seen, leaves, dim, tried) for leaves in columns]


def flip(x):
    return x.flip(0)


def sample(x):
    return torch.rand(len(x), 3)


TABLE = torch.arange(12.0).reshape(3, 4)

NUMBERS = [(0, 1), (1, 0, 0)]
ORDER = [(0, 1, 2), (1, 2, 0)]


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda x: x * 2, "row"),
        (lambda x: x.sum(1), "row"),
        (lambda x: x.argmax(1), "row"),
        (lambda x: x > 0, "row"),
        (lambda x: (x * 2).bfloat16(), "row"),
        (lambda x: torch.complex(x, x), "row"),
        (lambda x: x.to(torch.float8_e5m2), "row"),
        (lambda x: (x * 100).to(torch.uint16), "row"),
        (lambda x: x.new_zeros(len(x)), "row"),  # the same for every row
        (lambda x: x / 0, "row"),  # infinities and NaNs are equal to themselves
        (lambda x: TABLE.clone(), "whole"),
        (lambda x: torch.tensor(3.0), "whole"),
        (lambda x: x.mean(), "mixed"),
        (lambda x: x.mean(0), "mixed"),
        (lambda x: x @ x.T, "mixed"),
        (lambda x: torch.stack([x, -x]), "mixed"),
        (lambda x: x.repeat_interleave(2, 0), "mixed"),
    ],
)
@pytest.mark.parametrize("rows", [NUMBERS, ORDER], ids=["numbers", "order"])
def test_a_verdict_by_two_executions(model, what, rows):
    seen = see(model, *rows)
    (verdict,) = verdicts(seen)
    further = {"repeat": rows[-1], "company": (rows[-1][0],) * len(rows[-1])}
    if verdict.need is not None:
        (verdict,) = verdicts(seen + see(model, further[verdict.need]))
    assert (verdict.what, verdict.need) == (what, None)


def test_a_table_with_as_many_entries_as_the_only_number_of_rows_is_whole():
    (verdict,) = verdicts(see(lambda x: TABLE.clone(), *ORDER))
    assert verdict.need == "company"  # it might be a sum of the rows
    (verdict,) = verdicts(see(lambda x: TABLE.clone(), *ORDER, (1, 1, 1)))
    assert (verdict.what, verdict.need) == ("whole", None)


def test_layers_that_are_as_many_as_the_only_number_of_rows_are_mixed_and_it_is_said_where_the_rows_are():
    lstm = torch.nn.LSTM(4, 3, 3, batch_first=True).eval()
    with torch.no_grad():
        seen = see(lambda x: lstm(x[:, None])[1][0], *ORDER, ORDER[1])
    (verdict,) = verdicts(seen)
    assert (verdict.what, verdict.elsewhere) == ("mixed", 1)


@pytest.mark.parametrize("rows", [NUMBERS, ORDER], ids=["numbers", "order"])
@pytest.mark.parametrize("model", [flip, lambda x: x.sort(0).values, lambda x: x.cumsum(0)])
def test_rows_that_do_not_stay_in_their_places_are_mixed(model, rows):
    (verdict,) = verdicts(see(model, *rows))
    further = {"repeat": rows[-1], "company": (rows[-1][0],) * len(rows[-1])}
    seen = see(model, *rows, further[verdict.need])
    assert verdicts(seen)[0].what == "mixed"


def centre(x):
    return x - x.mean(0, keepdim=True)


def test_rows_that_influence_one_another_are_rows_in_another_order():
    (verdict,) = verdicts(see(centre, *NUMBERS))
    assert verdict.need == "order"  # influence, or no rows at all: the same rows in another order tell
    (verdict,) = verdicts(see(centre, *NUMBERS, (0, 0, 1)))
    assert (verdict.what, verdict.need) == ("row", None)
    assert 0.05 < verdict.influence < 1.0


def test_where_there_is_one_number_influence_shows_in_other_company():
    (verdict,) = verdicts(see(centre, *ORDER))
    assert (verdict.what, verdict.need, verdict.influence) == ("row", "company", 0.0)
    (verdict,) = verdicts(see(centre, *ORDER, (1, 1, 1)))
    assert verdict.what == "row"
    assert verdict.influence > 0.05


def test_what_samples_has_rows_by_its_numbers():
    (verdict,) = verdicts(see(sample, *NUMBERS))
    assert verdict.need == "repeat"
    (verdict,) = verdicts(see(sample, *NUMBERS, NUMBERS[-1]))
    assert (verdict.what, verdict.sampled) == ("row", True)


def test_what_samples_has_rows_by_its_shape_where_there_is_one_number():
    (verdict,) = verdicts(see(sample, *ORDER, ORDER[-1]))
    assert (verdict.what, verdict.sampled) == ("row", True)


def test_equal_rows_say_nothing_but_that_there_are_no_entries_for_them_where_entries_differ():
    (verdict,) = verdicts(see(lambda x: x * 2, (0, 0, 0)))
    assert (verdict.what, verdict.need) == ("row", "other rows")
    (verdict,) = verdicts(see(lambda x: TABLE.clone(), (0, 0, 0)))
    assert verdict.need == "repeat"
    (verdict,) = verdicts(see(lambda x: TABLE.clone(), (0, 0, 0), (0, 0, 0)))
    assert verdict.what == "mixed"


def test_rounding_is_no_influence():
    seen = see(lambda x: x * 2, *NUMBERS)
    seen[1] = Seen(seen[1].rows, seen[1].value * (1 + 1e-6))
    (verdict,) = verdicts(seen)
    assert (verdict.what, verdict.need, verdict.influence) == ("row", None, 0.0)


def boxes(x):
    return [
        {"boxes": torch.full((index % 3, 4), float(row[0])), "name": f"{row[0]:.3f}"} for index, row in enumerate(x)
    ]


def ragged(x):
    return [torch.full((1 + int(row[0] > 0),), float(row[1])) for row in x]


@pytest.mark.parametrize("rows", [NUMBERS, ORDER], ids=["numbers", "order"])
def test_a_list_with_an_entry_for_each_row(rows):
    assert list(row_lists(see(ragged, *rows), 0)) == [()]
    assert [verdict.what for verdict in verdicts(see(ragged, *rows))] == ["row"]


@pytest.mark.parametrize("rows", [NUMBERS, ORDER], ids=["numbers", "order"])
def test_lists_in_tuples_and_dicts(rows):
    seen = see(lambda x: (ragged(x), {"texts": [f"{row[0]:.3f}" for row in x], "scores": x.sum(1)}), *rows)
    assert set(row_lists(seen, 0)) == {(0,), (1, "texts")}
    assert [verdict.what for verdict in verdicts(seen)] == ["row"] * 3


@pytest.mark.parametrize("rows", [NUMBERS, ORDER], ids=["numbers", "order"])
def test_a_list_of_as_many_tensors_as_there_are_rows_is_no_list_of_rows(rows):
    levels = len(rows[0])
    seen = see(lambda x: [x * level for level in range(levels)], *rows)
    assert list(row_lists(seen, 0)) == []
    assert {verdict.what for verdict in verdicts(seen)} == {"row"}


def test_entries_that_happen_to_be_as_long_as_the_batch_are_told_by_where_they_go():
    seen = see(lambda x: [row[:3].clone() for row in x], *ORDER)
    assert list(row_lists(seen, 0)) == [()]


def test_a_list_of_layers_is_whole_or_mixed_like_what_is_in_it():
    seen = see(lambda x: [TABLE.clone(), x.mean(0)], *NUMBERS)
    assert [verdict.what for verdict in verdicts(seen)] == ["whole", "mixed"]


def test_pieces_with_another_number_of_entries_may_be_joined_as_they_come_unless_these_are_no_rows():
    twice, fixed = lambda x: x.repeat_interleave(2, 0), lambda x: torch.stack([x.mean(0), x.sum(0)])
    assert verdicts(see(twice, *NUMBERS))[0].loose
    assert not verdicts(see(fixed, *NUMBERS))[0].loose
