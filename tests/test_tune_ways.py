"""`aneuron tune` on real inputs: how they are read, which ways to serve a model are tried, what is said of them."""

import json
import math
import subprocess
import sys
import types
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

import aneuron
from aneuron import AsyncDataParallel
from aneuron.cli import calls, main, report, survey, trials, ways
from aneuron.cli.survey import Survey
from aneuron.cli.trials import Design, Result
from aneuron.cli.ways import Way
from aneuron.tensors.likeness import Likeness

LONG = """
import collections
import numpy
import torch

torch.manual_seed(0)
words = torch.nn.Embedding(50, 4)
seen = []

class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 4)
    def forward(self, input_ids, attention_mask):
        seen.append(tuple(input_ids.shape))
        mask = attention_mask[..., None].float()
        return (self.words(input_ids) * mask).sum(1) / mask.sum(1)

class Padded(Masked):  # takes padding for content
    def forward(self, x):
        return self.words(x).mean(1)

class Moody(Padded):
    def forward(self, x):
        return super().forward(x) + torch.randn(1)

def requests():
    for length in (3, 9, 5, 17, 12):
        ids = torch.arange(1, length + 1)[None]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

def ids():
    return (each["input_ids"] for each in requests())

def endless():
    while True:
        yield torch.ones(1, 3)

def reused():
    buffer = torch.zeros(1, 2)
    for number in (1, 2):
        yield buffer.fill_(number)

def arrays():
    yield numpy.ones((1, 2), dtype="float32")

def loader():
    yield [torch.ones(2, 2), torch.zeros(2, 2)]

def encodings():
    yield collections.UserDict(x=torch.ones(1, 2))

class Requests:
    def __iter__(self):
        return iter([(torch.ones(1, 2), 3)])

class Items:
    def __getitem__(self, index):
        if index == 2:
            raise IndexError
        return torch.full((1, 2), index)

listed = [torch.ones(1, 2)]
items = Items()
tensor, text, number = torch.ones(3, 2), "texts", 3

def breaks():
    yield torch.ones(1, 2)
    raise OSError("the log is gone")

def refuses():
    raise OSError("no log")

def nothing():
    yield from ()

def strings():
    yield torch.ones(1, 2)
    yield "a text"

def unlike():
    yield {"x": torch.ones(1, 2)}
    yield {"y": torch.ones(1, 2)}

def uneven():
    yield torch.ones(1, 2), torch.ones(2, 2)

def hollow():
    yield torch.ones(1, 0)

def none():
    return None

async def later():
    yield torch.ones(1, 2)
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    """A folder to be in, with a module of models and inputs."""
    (tmp_path / "long.py").write_text(LONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "gc", types.SimpleNamespace(collect=int))  # which takes long beside pytest's objects
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("long", None)


def lines(*said):
    Path("data.jsonl").write_bytes(
        b"".join((each if isinstance(each, bytes) else each.encode()) + b"\n" for each in said)
    )


def tune(capsys, *args):
    """Exit status, what is printed, what is said of errors."""
    try:
        status = main(["tune", *args, "--seconds", "0.02", "--no-plot"])
    except SystemExit as exit_:
        status = exit_.code
    said = capsys.readouterr()
    return status, said.out, said.err


# A file of calls.


def test_a_flat_list_is_a_row_and_a_nested_one_has_rows():
    lines("[1, 2, 3]", "", "  [4]  ")
    read = calls.inputs("data.jsonl")
    assert [call.tolist() for call in read.calls] == [[[1, 2, 3]], [[4]]]
    assert read.value is read.calls[0]
    lines("[[1.5, 2], [3, 4]]")
    assert calls.inputs("data.jsonl").value.shape == (2, 2)


def test_an_object_names_inputs_and_other_arguments():
    lines('\ufeff{"x": [1, 2], "k": 3, "how": "fast", "z": null}')
    (call,) = calls.inputs("data.jsonl").calls
    assert call.pop("x").tolist() == [[1, 2]]
    assert call == {"k": 3, "how": "fast", "z": None}


def test_an_input_has_one_dtype_in_all_calls():
    lines('{"x": [1, 2], "y": [true]}', '{"x": [0.5, 2], "y": [7]}')
    dtypes = [(call["x"].dtype, call["y"].dtype) for call in calls.inputs("data.jsonl").calls]
    assert dtypes == [(torch.float32, torch.int64)] * 2
    lines("[1]", "[0.5]")
    assert [call.dtype for call in calls.inputs("data.jsonl").calls] == [torch.float32] * 2


def test_an_example_is_written_with_its_numbers_unless_they_are_many():
    lines('{"x": [1, 0.1], "mask": [true, false], "k": 3}')
    read = calls.inputs("data.jsonl")
    again = eval(read.text, {"torch": torch})
    assert again.keys() == read.value.keys()
    assert all(torch.equal(again[name], read.value[name]) for name in ("x", "mask"))
    assert again["mask"].dtype is torch.bool
    lines(json.dumps([0] * 2000))
    assert calls.inputs("data.jsonl").text == "torch.ones(1, 2000, dtype=torch.int64)"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ([], "'data.jsonl' is empty: expected one call a line"),
        (["", "  "], "is empty"),
        (["[1]", "[1, 2"], "data.jsonl, line 2 is no JSON: "),
        (["[1]", "", "hello"], "data.jsonl, line 3 is no JSON: .*hello"),
        (["[1]", b"[1] \xff"], "data.jsonl, line 2 is no JSON: "),
        (["[" * 100_000], "line 1 is no JSON: "),
        (["3"], "line 1 is 3: expected a list of numbers, or an object"),
        (["{}"], "line 1 is {}: expected"),
        (["[1]", "[[1, 2], [3]]"], "line 2: expected numbers, in nested lists of equal length"),
        (['["a"]'], "line 1: expected numbers"),
        (["[1, null]"], "line 1: expected numbers"),
        (["[99999999999999999999]"], "line 1: expected numbers"),
        (["[1]", "[]"], "line 2 has an empty list"),
        (["[[], []]"], "line 1 has an empty list"),
        (["[1e99]"], "line 1 has a number that float32 cannot hold"),
        (["[NaN]"], "line 1 has a number that float32 cannot hold, or NaN"),
        (['{"x": {"y": [1]}}'], "line 1, 'x' is {'y': .*: expected a list"),
        (['{"x": [1], "k": NaN}'], "line 1, 'k' is nan"),
        (
            ['{"x": [1]}', '{"y": [1]}'],
            "line 2 has {y: int64 of 2 dimensions}; the first has {x: int64 of 2 dimensions}",
        ),
        (['{"x": [1]}', '{"x": [1], "y": [2]}'], "line 2 has {x: .*, y: .*}; the first has {x: "),
        (['{"x": [1]}', '{"x": 1}'], "line 2 has {x: another argument}"),
        (['{"x": [1]}', "[1]"], "line 2 has int64 of 2 dimensions; the first has {x"),
        (["[[1]]", "[[[1]]]"], "line 2 has int64 of 3 dimensions"),
        (['{"x": [[1], [2]], "y": [1]}'], "line 1: its tensors have 2, 1 rows"),
        (['{"k": 3}'], "line 1: its tensors have no rows"),
    ],
)
def test_a_line_that_is_no_call_is_named(said, hint):
    lines(*said)
    with pytest.raises(ArgumentTypeError, match=hint.replace("{", r"\{")):
        calls.inputs("data.jsonl")


def test_a_file_that_is_not_there():
    with pytest.raises(ArgumentTypeError, match=r"'nowhere\.jsonl' cannot be read: No such file"):
        calls.inputs("nowhere.jsonl")


# What Python yields.


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("requests", 5), ("ids", 5), ("reused", 2), ("arrays", 1), ("loader", 1), ("encodings", 1), ("Requests", 1),
        ("items", 2), ("listed", 1),
    ],
)  # fmt: skip
def test_calls_come_from_an_iterable_and_the_first_is_written(name, number):
    read = calls.inputs(f"long:{name}")
    assert len(read.calls) == number
    names = {"torch": torch}
    exec(read.needs, names)
    again = eval(read.text, names)
    assert type(again) is type(read.value)
    assert all(map(torch.equal, calls.tensors(again), calls.tensors(read.value)))


def test_a_buffer_that_is_filled_again_is_copied():
    assert [call.tolist() for call in calls.inputs("long:reused").calls] == [[[1, 1]], [[2, 2]]]


def test_of_an_endless_generator_the_first_are_taken():
    assert len(calls.inputs("long:endless").calls) == calls.MOST


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("breaks", r"'long:breaks' failed after 1 calls: OSError: the log is gone \(.*long.py, line \d+\)"),
        ("refuses", r"'long:refuses' yields nothing: OSError: no log \(.*long.py, line \d+\)"),
        ("nothing", "'long:nothing' yields nothing: expected calls"),
        ("strings", "long:strings, call 2 is 'a text', a str; expected a tensor, a tuple"),
        ("unlike", "long:unlike, call 2 has {y: float32 of 2 dimensions}; the first has {x: "),
        ("uneven", "call 1: its tensors have 1, 2 rows"),
        ("hollow", "call 1 has an empty tensor"),
        ("none", "makes a NoneType: expected a plain generator"),
        ("later", "makes a async_generator: expected a plain generator"),
        ("tensor", "is a Tensor: expected a generator function .* put a lone call into a list"),
        ("text", "is a str: expected a generator function"),
        ("number", "is 3: expected a generator function"),
        ("missing", "there is no 'missing' in 'long'"),
    ],
)
def test_what_yields_no_calls_is_told_where(name, hint):
    with pytest.raises(ArgumentTypeError, match=hint):
        calls.inputs(f"long:{name}")


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(1, 3), (1, 5)], (1, [3, 5])),
        ([(1, 3), (2, 3)], None),  # rows are no length
        ([(1, 4, 4), (1, 6, 6)], (1, [4, 6])),
        ([(1, 3, 4), (1, 3, 6)], (2, [4, 6])),
        ([(2,), (3,)], None),
    ],
)
def test_lengths_are_found_where_calls_differ(shapes, found):
    assert calls.lengths([torch.zeros(shape) for shape in shapes]) == found


def test_named_inputs_are_the_same_in_any_order(tmp_path):
    file = tmp_path / "calls.jsonl"
    file.write_text('{"ids": [1, 2, 3], "box": [[[1, 2]]]}\n{"box": [[[3, 4]]], "ids": [4, 5, 6]}\n')
    read = calls.inputs(str(file)).calls
    assert [list(call) for call in read] == [["ids", "box"]] * 2
    assert calls.lengths(read) is None


# Ways.


def test_lengths_are_left_or_padded_to_quarters_or_to_any():
    way = Way("cpu", 2, 1)
    alone, quarters, free = ways.by_length(way, 1, [5, 40, 41, 300, 9, 17, 23, 60])
    assert alone is way
    assert quarters.lengths == "buckets 16,24,48,300"
    assert (free.lengths, free.buckets.max) == ("free", 300)
    assert ways.by_length(way, 1, [1, 2])[1].lengths == "buckets 2"
    assert free.written()[1] == "buckets=aneuron.Buckets(dim=1, max=300)"
    for each in (alone, quarters, free):
        for written, value in zip(each.written(), each.settings().values(), strict=True):
            assert repr(eval(written.partition("=")[2], {"aneuron": aneuron, "torch": torch})) == repr(value)


def test_dtypes_without_instructions_are_not_tried_unless_named(monkeypatch):
    monkeypatch.setattr(ways, "_native", lambda dtype: dtype == "float16")
    monkeypatch.setattr(ways, "_found", lambda backend: True)
    net, way = torch.nn.Linear(2, 2), Way("cpu", 2, 1)
    tried, untried = ways.by_engine(way, net, "auto", None)
    assert [(each.backend, each.dtype) for each in tried] == [
        ("cpu", None),
        ("cpu", "float16"),
        ("openvino", "float32"),
    ]
    assert {(each.backend, each.dtype) for each in untried} == {("cpu", "bfloat16"), ("openvino", "bfloat16")}
    assert "--dtypes bfloat16 tries it" in untried[Way("cpu", 2, 1, "bfloat16")]
    tried, untried = ways.by_engine(way, net, "cpu", ["bfloat16"])
    assert ([each.dtype for each in tried], untried) == ([None, "bfloat16"], {})
    assert ways.by_engine(way, torch.neg, "auto", None) == ([way], {})  # its weights are out of reach


def test_openvino_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(ways, "_found", lambda backend: False)
    _, untried = ways.by_engine(Way("cpu", 2, 1), torch.nn.Linear(2, 2), "auto", ["bfloat16"])
    assert {each.dtype for each in untried if each.backend == "openvino"} == {"float32", "bfloat16"}
    assert all("pip install 'aneuron[openvino]'" in why for why in untried.values())


def test_cpus_are_divided_unless_the_user_has_said_how():
    def divided(number, cores=None):
        return [(way.cores, way.threads) for way in ways.by_cores(Way("cpu", cores or number, 1), cores, number)]

    assert divided(1) == [(1, 1)]
    assert divided(2) == [(2, 1), (1, 2)]
    assert divided(16) == [(16, 1), (1, 16), (4, 4)]
    assert divided(2, cores=2) == [(2, 1)]
    assert ways.by_cores(Way("auto"), None, 16) == [Way("auto")]


def test_what_auto_means_leaves_a_choice_on_cpus_only(monkeypatch):
    monkeypatch.setattr(ways, "cpus", lambda: 4)
    found = set()
    monkeypatch.setattr(ways, "_found", lambda backend: backend.name in found)
    net = torch.nn.Linear(2, 2)
    assert ways.first("auto", net, None) == Way("cpu", 4, 1)
    assert ways.first("auto", net, 2) == Way("cpu", 2)
    assert ways.first("openvino", net, None) == Way("openvino", 4, 1, "float32")
    assert ways.first("auto", "model.onnx", None).backend == "openvino"
    with pytest.raises(ValueError, match="--backend cpu there are as many as are asked for"):
        ways.first("auto", net, 5)
    found.update({"onnx", "neuron"})
    assert ways.first("auto", "model.onnx", None) == Way("onnx", 4, 1)
    assert ways.first("auto", net, None) == Way("auto")
    assert ways.first("auto", torch.neg, None).backend == "cpu"
    found.discard("neuron")
    found.add("cuda")
    on_gpu = ways.first("auto", net, 1)
    assert [each.dtype for each in ways.by_engine(on_gpu, net, "auto", None)[0]] == [None, "bfloat16", "float16"]
    assert on_gpu.written()[1] == "device_ids=range(0, 1)"
    assert ways.first("neuron", net, 2).written() == ["backend='neuron'", "device_ids=range(0, 2)"]


# Which is best.


def of(way, rate, p99=0.01):
    return Result(Design(None, 2, None, 8, way), rate, p99 / 2, p99, 1000)


def test_the_chosen_way_is_the_fastest_whose_answers_are_alike():
    plain, half, wrong = Way("cpu"), Way("cpu", dtype="bfloat16"), Way("cpu", 1)
    alike = {plain: Likeness(1.0), half: Likeness(0.995, deviation=0.1), wrong: Likeness(0.3)}
    seen = Survey([of(plain, 100), of(half, 200), of(wrong, 900)], alike)
    assert survey.chosen(seen, None, 0.99).design.way == half
    assert survey.chosen(seen, None, 0.999).design.way == plain
    assert survey.chosen(seen, None, -1.0).design.way == wrong
    assert survey.chosen(seen, 0.001, 0.99).design.way in (plain, half)  # none keeps the bound: the nearest
    assert survey.chosen(Survey([of(wrong, 1)], alike), None, 0.99) is None
    said = report.ways(seen, half, 0.99).splitlines()
    assert [line.split("are  ")[1].split()[0] for line in said[2:]] == ["900", "200", "100"]
    assert said[0] == "ways, with 8 callers:"
    assert said[2].endswith("answers differ")
    assert said[3].endswith("0.99500        0.1  <- best")


@pytest.mark.parametrize(
    ("seen", "good"),
    [
        (None, True),  # nothing to compare with
        (Likeness(0.99), True),
        (Likeness(0.98), False),
        (Likeness(math.nan, deviation=math.inf), False),
        (Likeness(None, differ=1, entries=200), True),
        (Likeness(None, differ=1, entries=20), False),
    ],
)
def test_answers_are_alike_by_cosine_and_by_equal_entries(seen, good):
    assert survey.is_alike(seen, 0.99) is good


def test_answers_count_by_the_worst_of_them():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    seen = survey.alike([one, one], [one, other])
    assert (seen.cosine, seen.deviation) == pytest.approx((0.6, 0.8))
    unlike = survey.alike([one, one], [one * math.nan, other])
    assert math.isnan(unlike.cosine)
    with pytest.raises(ValueError, match="its outputs have the shapes"):
        survey.alike([one], [one[:, :1]])


async def test_ways_that_fail_are_told_and_others_go_on():
    plain, broken = Way("cpu", 1, 1), Way("cpu", 1, 1, "bfloat16")

    async def make(way):
        def answer(x):
            if way == broken:
                raise OSError("no kernel")
            return 2 * x

        return AsyncDataParallel(answer)

    found = await survey.survey(
        make,
        lambda: make(plain),
        [lambda way: ([way, broken], {}), lambda way: ([way], {Way("cpu", 9): "no such"})],
        plain, 2, [torch.ones(1, 2), torch.ones(1, 4)], 0.02, lambda seen: survey.chosen(seen, None, 0.9), str,
    )  # fmt: skip
    assert [result.design.way for result in found.results] == [plain]
    assert found.failed == {broken: "OSError: no kernel"}
    assert found.untried == {Way("cpu", 9): "no such"}
    assert (found.alike[plain].deviation, found.why) == (0.0, "")
    said = report.ways(found, plain, 0.9)
    assert "does not run: OSError: no kernel" in said
    assert "not tried: no such" in said


async def test_trials_make_the_calls_in_turn():
    made = []

    class Model:
        num_workers = split_size = None

        async def __call__(self, x):
            made.append(tuple(x.shape))
            if len(made) == 7:
                raise OSError("enough")

    with pytest.raises(OSError, match="enough"):
        await trials._trial(Model(), Design(None, 1, None, 1), [torch.ones(1, 2), torch.ones(1, 3)], 60.0)
    assert made == [(1, 2), (1, 3)] * 3 + [(1, 2)]


# The whole.


FEW = ["--num-workers", "1", "--callers", "4"]  # trials


@pytest.fixture
def one_cpu(monkeypatch):
    """So that there are few ways."""
    monkeypatch.setattr(ways, "cpus", lambda: 1)
    monkeypatch.setattr(ways, "_native", lambda dtype: False)


def test_ways_are_shown_side_by_side_and_the_call_runs_as_printed(capsys, one_cpu):
    lines(*(json.dumps({"input_ids": [1] * n, "attention_mask": [1] * n}) for n in (3, 9, 5, 17, 12)))
    status, out, _ = tune(
        capsys, "long:Masked", "--inputs", "data.jsonl", "--backend", "cpu", "--dtypes", "bfloat16", *FEW
    )
    assert status == 0
    assert "inputs: 5 calls in turn, 3 to 17 long along dim 1" in out
    assert "and the inputs in turn; the most" in out
    begin = out.index("\n", out.index("ways, with ")) + 1
    shown = out[begin : out.index("\n\n", begin)].splitlines()
    assert "cores x threads dtype lengths rows/s p50 ms p99 ms cosine deviation" in " ".join(shown[0].split())
    assert sum("<- best" in line for line in shown) == 1
    assert {"as they are", "buckets 8,16,17", "free", "bfloat16"} <= {
        word for line in shown for word in ("as they are", "buckets 8,16,17", "free", "bfloat16") if word in line
    }
    import long

    assert len({shape[1] for shape in long.seen}) > 3  # not one call again and again
    program = out[out.index("import aneuron") : out.index("\n)\n") + 3]
    check = """
import asyncio, long
print(asyncio.run(model(**next(iter(long.requests())))).shape)"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program + check], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "torch.Size([1, 4])\n", ran.stderr


def test_a_way_whose_answers_differ_is_shown_and_not_recommended(capsys, one_cpu):
    status, out, _ = tune(capsys, "long:Padded", "--inputs", "long:ids", "--backend", "cpu", "--json", *FEW)
    assert status == 0
    said = json.loads(out)
    assert said["inputs"] == {"calls": 5, "real": True, "lengths": {"dim": 1, "shortest": 3, "longest": 17}}
    cosines = {way["lengths"]: way["cosine"] for way in said["ways"]}
    assert cosines["as they are"] > 0.9999
    assert cosines["free"] < 0.99
    assert "Buckets" not in said["constructor"]
    assert "example_inputs=next(iter(long.ids()))" in said["constructor"]
    assert {way["dtype"] for way in said["ways_untried"]} == {"bfloat16", "float16"}
    assert (said["ways_failed"], said["not_compared"]) == ([], None)


def test_where_no_answers_are_alike_nothing_is_recommended(capsys, one_cpu):
    lines("[1, 2]", "[3, 4]")
    status, out, _ = tune(capsys, "long:Moody", "--inputs", "data.jsonl", "--backend", "cpu")
    assert status == 1
    assert "No way answers as the model alone does, with a cosine of 0.99 at least" in out
    assert "import aneuron" not in out


def test_a_file_that_takes_any_length_is_given_no_example_that_would_fix_it(capsys, one_cpu):
    from long import Padded

    lines(*("[" + ", ".join("1" * n) + "]" for n in (3, 9, 5)))
    torch.jit.trace(Padded().eval(), torch.ones(2, 7, dtype=torch.int64)).save("padded.pt")
    status, out, _ = tune(capsys, "padded.pt", "--inputs", "data.jsonl", "--min-cosine", "0.9999", *FEW)
    assert status == 0
    assert "does not run" not in out
    assert "example_inputs" not in out
    status, out, _ = tune(
        capsys, "long:Padded", "--inputs", "data.jsonl", "--backend", "cpu", "--batch-sizes", "4", *FEW
    )
    assert status == 0
    assert "batch_size=4," in out
    assert "example_inputs" not in out


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--inputs", "data.jsonl", "--rows", "2"], "real inputs have their own"),
        (["--inputs", "data.jsonl", "1x2"], "stand alone"),
        (["--inputs", "data.jsonl", "--backend", "simulated"], "takes as long for every length"),
        (["--inputs", "data.jsonl", "--dtypes", "bf16"], "'bf16' is none of bfloat16"),
        (["--inputs", "data.jsonl", "--min-cosine", "2"], "a number up to 1"),
    ],
)
def test_arguments_that_do_not_fit_real_inputs(capsys, args, hint):
    lines("[1, 2]", "[3]")
    status, out, err = tune(capsys, "long:Padded", *args)
    assert (status, out) == (2, "")
    assert hint in " ".join(err.split())
