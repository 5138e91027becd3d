"""`aneuron tune`: what is tried, what is chosen, what is printed. Turns are short here, so figures mean little."""

import asyncio
import json
import math
import re
import subprocess
import sys
import tomllib
import types
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from aneuron import AsyncDataParallel
from aneuron.cli import main, reading, report, trials
from aneuron.cli.trials import Choices, Design, Result, Study
from aneuron.testing import run

NETS = """
import functools
import torch

torch.manual_seed(0)
net = torch.nn.Linear(16, 4)
ready = torch.nn.Linear(16, 4).eval()
words = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Flatten()).eval()
number = 3

class Pair(torch.nn.Module):
    def forward(self, x, y):
        return x + y

class Picky(torch.nn.Module):  # as compiled for four rows
    def forward(self, x):
        return x.reshape(4, 16) * 2

def make(bias=False):
    return torch.nn.Linear(16, 4, bias=bias)

def double(x):
    return x * 2

def broken(x):
    raise OSError("the weights are gone")

class Holder:
    inner = net

def explodes():
    raise OSError("no weights")
"""

QUICK = ["--seconds", "0.02", "--no-plot"]


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    """A folder to be in, with a module of models."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "gc", types.SimpleNamespace(collect=int))  # which takes long beside pytest's objects
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("nets", None)


def tune(capsys, *args):
    """Exit status, what is printed, what is said of errors."""
    try:
        status = main(["tune", *args])
    except SystemExit as exit_:
        status = exit_.code
    said = capsys.readouterr()
    return status, said.out, said.err


def program(out):
    """The constructor call that is printed: from the imports to the closing bracket."""
    return out[out.index("import aneuron") : out.index("\n)\n") + 3]


def table(out):
    """The lines about sizes and slots, without their names."""
    lines = out.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.split()[:1] == ["batch"])
    return lines[begin + 1 : lines.index("", begin)]


def result(batch_size, rate, p99, num_workers=2, callers=8, split_size=None):
    return Result(Design(batch_size, num_workers, split_size, callers), rate, p99 / 2, p99, 1000)


# The whole.


def test_it_recommends_a_call_that_runs_as_printed(nets):
    # With -P the folder is not on the path already, as for the installed command.
    command = [sys.executable, "-P", "-m", "aneuron", "tune", "nets:net", "--inputs", "1x16", "--batch-sizes", "1,4"]
    quick = ["--seconds", "0.02", "--backend", "cpu"]  # OpenVINO takes its time to begin
    ended = subprocess.run([*command, *quick], capture_output=True, text=True, check=False, timeout=600)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert "batch slots split callers rows/s p50 ms p99 ms" in [" ".join(line.split()) for line in lines]
    assert len({len(line.removesuffix("  <- best")) for line in table(ended.stdout)}) == 1  # aligned
    assert sum("<- best" in line for line in table(ended.stdout)) == 1
    assert (nets / "aneuron-tune.png").read_bytes().startswith(b"\x89PNG")
    assert "Plot: aneuron-tune.png" in lines
    assert lines[-1].startswith("Next: ")
    check = "\nimport asyncio\nprint(asyncio.run(model(torch.zeros(3, 16))).shape)"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program(ended.stdout) + check],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "torch.Size([3, 4])\n", ran.stderr


def test_the_command_is_installed_under_its_name():
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"aneuron": "aneuron.cli:main"}
    assert "matplotlib>=3.8" in pyproject["project"]["optional-dependencies"]["tune"]


def test_help_shows_examples(capsys):
    status, out, _ = tune(capsys, "--help")
    assert status == 0
    assert "examples:" in out
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_sizes_that_do_not_run_are_lines_of_the_table(capsys):
    from nets import Picky

    torch.jit.trace(Picky().eval(), torch.zeros(4, 16)).save("picky.pt")
    status, out, _ = tune(
        capsys, "picky.pt", "--inputs", "4x16", "--batch-sizes", "2,4,8", "--num-workers", "2,4", *QUICK
    )
    assert status == 0
    sizes = [line.split()[:2] for line in table(out)]
    assert sizes == [["2", "does"], ["4", "2"], ["4", "4"], ["8", "does"]]
    assert "2  does not run: RuntimeError: shape '[4, 16]' is invalid" in out
    assert "batch_size=4," in program(out)
    assert "'picky.pt'," in program(out)


def test_where_nothing_runs_it_says_so(capsys):
    status, out, _ = tune(capsys, "nets:broken", "--inputs", "1x16", "--batch-sizes", "1,2", *QUICK)
    assert status == 1
    assert "does not run: OSError: the weights are gone" in out
    assert "No batch size runs" in out
    assert "import aneuron" not in out


def test_where_nothing_keeps_the_bound_it_says_so(capsys):
    status, out, _ = tune(capsys, "nets:double", "--inputs", "1x16", "--batch-sizes", "1", "--p99", "1e-9", *QUICK)
    assert status == 1
    assert "Nothing keeps p99 within 0.00 ms. The least was" in out
    assert "over the bound" in out
    assert "import aneuron" not in out


def test_a_bound_is_tried_with_fewer_callers_too(capsys):
    status, out, _ = tune(
        capsys, "nets:double", "--inputs", "1x16", "--batch-sizes", "8", "--backend", "cpu", "--cores", "2",
        "--num-workers", "auto", "--p99", "60", *QUICK,
    )  # fmt: skip
    assert status == 0
    assert [line.split()[:4] for line in table(out)] == [["8", "4", "-", n] for n in ("1", "2", "8", "32")]
    assert "with p99 within 60000 ms" in out
    assert "backend=aneuron.CpuBackend(cores=2, threads_per_core=None)," in program(out)


def test_simulated_cores_take_the_times_that_are_given(capsys):
    status, out, err = tune(
        capsys, "nets:double", "--inputs", "1x16", "--backend", "simulated", "--cores", "3", "--json",
        "--seconds", "0.05", "--service-times", "1:0.004,8:0.004", "--plot", "plot.png",
    )  # fmt: skip
    assert status == 0
    said = json.loads(out)
    assert (said["cores"], said["backend"], said["rows"]) == (3, "simulated", 1)
    assert said["service_times"] == {"1": 0.004, "8": 0.004}
    assert [(t["batch_size"], t["num_workers"], t["callers"]) for t in said["trials"]] == [
        (size, slots, 48) for size in (1, 8) for slots in (3, 6)
    ]
    assert said["best"] in said["trials"]
    assert said["best"]["batch_size"] == 8  # eight times as many rows in the same time
    assert all(t["p99"] >= t["p50"] >= 0.004 for t in said["trials"])
    assert "    device_ids=range(3),\n" in said["constructor"]  # on the machine that is planned for
    assert "backend" not in said["constructor"]
    assert err == "Plot: plot.png\n"
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")


def test_simulated_cores_take_the_time_measured_on_one_real_core(capsys):
    from nets import Picky

    torch.jit.trace(Picky().eval(), torch.zeros(4, 16)).save("picky.pt")
    status, out, _ = tune(
        capsys, "picky.pt", "--inputs", "4x16", "--backend", "simulated", "--batch-sizes", "2,4", *QUICK
    )
    assert status == 0
    assert "4 cores, backend simulated" in out
    assert "service time of a core by batch size: 4: " in out
    assert "2  does not run" in out


def test_several_inputs_rows_and_split_sizes(capsys):
    status, out, _ = tune(
        capsys, "nets:Pair", "--inputs", "1x16", "2x16", "--rows", "12", "--batch-sizes", "8", "--num-workers", "2",
        "--callers", "3", "--backend", "cpu", "--cores", "3", *QUICK,
    )  # fmt: skip
    assert status == 2  # the examples of one call have unequal rows
    status, out, _ = tune(
        capsys, "nets:Pair", "--inputs", "1x16", "1x16", "--rows", "12", "--batch-sizes", "8", "--num-workers", "3",
        "--callers", "3", "--backend", "cpu", "--cores", "3", *QUICK,
    )  # fmt: skip
    assert status == 0
    assert [line.split()[:4] for line in table(out)] == [["8", "3", split, "3"] for split in ("-", "4")]
    assert "3 callers of 12 rows" in out
    assert "example_inputs=(torch.zeros(1, 16), torch.zeros(1, 16))," in program(out)


def test_inputs_from_a_file_are_written_as_the_file(capsys):
    torch.save({"x": torch.zeros(2, 16), "y": torch.ones(2, 16)}, "example.pt")
    status, out, _ = tune(
        capsys, "nets:Pair", "--inputs", "example.pt", "--backend", "cpu", "--batch-sizes", "2", *QUICK
    )
    assert status == 0
    assert "example_inputs=torch.load('example.pt', weights_only=True)," in program(out)


def test_a_plot_that_cannot_be_drawn_loses_nothing_else(capsys):
    status, out, _ = tune(
        capsys, "nets:double", "--inputs", "1x16", "--batch-sizes", "1", "--seconds", "0.02", "--plot", "plot.mp3"
    )
    assert status == 0
    assert "No plot: Format 'mp3' is not supported" in out
    assert program(out)


def test_without_matplotlib_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, _ = tune(capsys, "nets:double", "--inputs", "1x16", "--batch-sizes", "1", "--seconds", "0.02")
    assert status == 0
    assert "No plot: matplotlib is not installed; pip install 'aneuron[tune]'" in out
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["nowhere", "--inputs", "1x16"], "neither a file nor of the form module:attribute"),
        (["nets:", "--inputs", "1x16"], "neither a file nor"),
        (["nets:nothing", "--inputs", "1x16"], "there is no 'nothing' in 'nets'"),
        (["nowhere:net", "--inputs", "1x16"], "'nowhere' cannot be imported: ModuleNotFoundError"),
        (["nets:number", "--inputs", "1x16"], "is 3: expected a model"),
        (["nets:explodes", "--inputs", "1x16"], "'nets:explodes' makes no model: OSError: no weights"),
        (["nets:net"], "required: --inputs"),
        (["nets:net", "--inputs", "nowhere.pt"], "neither a file nor a shape"),
        (["nets:net", "--inputs", "1x16:float99"], "no dtype of real numbers"),
        (["nets:net", "--inputs", "1x16:complex64"], "no dtype of real numbers"),
        (["nets:net", "--inputs", "1x16:nn"], "no dtype of real numbers"),
        (["nets:net", "--inputs", "0x16"], "every size must be at least 1"),
        (["nets:net", "--inputs", "1x16:int64:9-3"], "ends before it begins"),
        (["nets:net", "--inputs", "1x16", "nets.py"], "cannot be loaded with weights_only=True"),
        (["nets:net", "--inputs", "1x16", "--batch-sizes", "1,0"], "whole numbers of at least 1"),
        (["nets:net", "--inputs", "1x16", "--batch-sizes", "auto"], "whole numbers of at least 1"),
        (["nets:net", "--inputs", "1x16", "--num-workers", "two"], "or 'auto'"),
        (["nets:net", "--inputs", "1x16", "--rows", "0"], "at least 1"),
        (["nets:net", "--inputs", "1x16", "--rows", "1,2"], "one whole number"),
        (["nets:net", "--inputs", "1x16", "--p99", "-1"], "more than 0"),
        (["nets:net", "--inputs", "1x16", "--seconds", "inf"], "more than 0"),
        (["nets:net", "--inputs", "1x16", "--seconds", "soon"], "more than 0"),
        (["nets:net", "--inputs", "1x16", "--backend", "abacus"], "backend='abacus'"),
        (["nets:net", "--inputs", "1x16", "--cores", "4000"], "outside the cores that this process sees"),
        (["nets:net", "--inputs", "1x16", "--plot", "nowhere/plot.png"], "there is no folder nowhere"),
        (["nets:net", "--inputs", "1x16", "--service-times", "1:0.1"], "for --backend simulated"),
        (
            ["nets:net", "--inputs", "1x16", "--service-times", "1:0.1", "--backend", "simulated"],
            "says the batch sizes, too",
        ),
        (["nets:net", "--inputs", "1x16", "--service-times", "1"], "more than 0"),
        (["nets:net", "--inputs", "1x16", "1x16:int64", "kept.pt"], "a tensor each"),
    ],
)
def test_arguments_that_do_not_fit_are_status_two(capsys, args, hint):
    torch.save({"x": torch.zeros(1, 16)}, "kept.pt")
    status, out, err = tune(capsys, *(["--batch-sizes=1", "--seconds=0.02"] * ("--batch-sizes" not in args)), *args)
    assert status == 2
    assert re.search(hint, err), err
    assert not out


# What is read.


@pytest.mark.parametrize(
    ("text", "written", "needs"),
    [
        ("nets:net", "net.eval()", "from nets import net"),
        ("nets:ready", "ready", "from nets import ready"),
        ("nets:make", "make().eval()", "from nets import make"),
        ("nets:Pair", "Pair().eval()", "from nets import Pair"),
        ("nets:double", "double", "from nets import double"),
        ("nets:Holder.inner", "Holder.inner.eval()", "from nets import Holder"),
        ("torch:neg", "neg", "from torch import neg"),
    ],
)
def test_a_model_is_named_by_its_module(text, written, needs):
    read = reading.model(text)
    assert (read.text, read.needs) == (written, needs)
    assert callable(read.value)
    assert not getattr(read.value, "training", False)
    names = {}
    exec(needs, names)
    assert type(eval(written, names)) is type(read.value)


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "low", "high"),
    [
        ("1x16", (1, 16), torch.float32, -math.inf, math.inf),
        ("2x3x4x5", (2, 3, 4, 5), torch.float32, -math.inf, math.inf),
        ("8", (8,), torch.float32, -math.inf, math.inf),
        ("1x128:int64", (1, 128), torch.int64, 0, 1),
        ("4x1000:int32:10-12", (4, 1000), torch.int32, 10, 12),
        ("1x9:bool", (1, 9), torch.bool, 0, 1),
        ("1x9:bfloat16", (1, 9), torch.bfloat16, -math.inf, math.inf),
        ("1x9:float64:-3-5", (1, 9), torch.float64, -3, 5),
    ],
)
def test_inputs_are_made_up_from_a_shape_and_written_in_python(text, shape, dtype, low, high):
    read = reading.inputs(text)
    assert (tuple(read.value.shape), read.value.dtype) == (shape, dtype)
    assert low <= read.value.min() <= read.value.max() <= high
    if text == "4x1000:int32:10-12":
        assert read.value.unique().tolist() == [10, 11, 12]
    again = eval(read.text, {"torch": torch})
    assert (tuple(again.shape), again.dtype) == (shape, dtype)
    assert low <= again.min()


def test_a_file_holds_a_tensor_a_tuple_or_a_dict(nets):
    for value in (torch.zeros(1, 2), (torch.zeros(1, 2), 3), {"x": torch.zeros(1, 2)}):
        torch.save(value, "inputs.pt")
        read = reading.inputs("inputs.pt")
        assert type(eval(read.text, {"torch": torch})) is type(read.value) is type(value)
    torch.save([torch.zeros(1, 2)], "inputs.pt")
    with pytest.raises(ArgumentTypeError, match="holds a list; expected a tensor, a tuple"):
        reading.inputs("inputs.pt")
    torch.save({"x": Design(1, 1, None, 1)}, "inputs.pt")  # to load it would be to run code
    with pytest.raises(ArgumentTypeError, match="cannot be loaded with weights_only=True"):
        reading.inputs("inputs.pt")


# What is tried, and what is chosen.


def test_what_is_tried_where_nothing_is_said():
    alone = list(Choices([1, 8], None, None, None, rows=1).designs(cores=4, bounded=False))
    assert alone == [Design(size, slots, None, 64) for size in (1, 8) for slots in (4, 8)]
    bounded = list(Choices([8], [None], None, None, rows=1).designs(cores=4, bounded=True))
    assert [design.callers for design in bounded] == [1, 4, 16, 64]
    large = list(Choices([8], [4], None, None, rows=100).designs(cores=32, bounded=False))
    assert large == [Design(8, 4, None, 6), Design(8, 4, 3, 6)]  # 512 rows are twice what fills them


def test_splits_that_change_nothing_are_not_tried():
    choices = Choices([4, 8], [2], [None, 4, 100], [1], rows=16)
    assert [(d.batch_size, d.split_size) for d in choices.designs(2, False)] == [(4, None), (8, None), (8, 4)]


def test_an_example_is_resized_by_repeating_its_rows():
    x = torch.tensor([[1.0], [2.0]])
    assert trials.resized(x, 5)[:, 0].tolist() == [1, 2, 1, 2, 1]
    sized = trials.resized({"a": (x, 3), "b": [x]}, 1)
    assert sized["a"][0].shape == sized["b"][0].shape == (1, 1)
    assert sized["a"][1] == 3


@pytest.mark.parametrize(
    ("bound", "chosen"),
    [
        (None, 16),  # the most
        (0.010, 8),  # within 3 % of 4, and earlier
        (0.0045, 4),
        (0.001, None),
    ],
)
def test_the_best_has_the_most_rows_within_the_bound(bound, chosen):
    results = [result(1, 100, 0.002), result(4, 500, 0.0044), result(8, 490, 0.0050), result(16, 900, 0.020)]
    if chosen == 8:
        results[1] = result(4, 500, 0.0060)
    best = trials.best(results, bound)
    assert (best and best.design.batch_size) == chosen


def test_a_result_is_the_median_of_the_turns():
    turns = [(10.0, [1.0] * 99 + [5.0]), (30.0, [2.0] * 98 + [6.0] * 2), (20.0, [3.0] * 10)]
    made = trials._result(Design(1, 1, None, 1), turns)
    assert (made.rows_per_second, made.p50, made.p99, made.calls) == (20.0, 2.0, 3.0, 210)


def test_a_trial_counts_what_ends_while_it_is_in_full_swing(monkeypatch):
    class Model:
        num_workers = split_size = None

        def __init__(self, seconds):
            self.seconds = seconds

        async def __call__(self, x):
            await asyncio.sleep(self.seconds)

    def trial(model, seconds):
        return run(trials._trial(model, Design(8, 6, 4, callers=3), [torch.zeros(2, 1)], seconds))

    clock = types.SimpleNamespace(perf_counter=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(trials, "time", clock)
    model = Model(0.25)
    assert trial(model, 5.0) == (2 * 51 / 4, [0.25] * 51)  # three callers, from 1 s to 5 s
    assert (model.num_workers, model.split_size) == (6, 4)
    assert trial(Model(10.0), 5.0) == (2 * 3 / 10, [10.0] * 3)  # a call takes longer than the trial

    async def fail(x):
        raise OSError("gone")

    monkeypatch.setattr(Model, "__call__", lambda self, x: fail(x))
    with pytest.raises(OSError, match="gone"):
        trial(Model(1.0), 5.0)


async def test_a_size_that_fails_in_the_middle_is_left_out():
    executions = 0

    def tires(x):
        nonlocal executions
        executions += 1
        if executions > 20:
            raise OSError("tired")
        return x

    async def make(batch_size):
        return AsyncDataParallel(tires if batch_size == 2 else torch.neg, batch_size=batch_size)

    said = []
    choices = Choices([1, 2], [2], [None], [4], rows=1)
    study = await trials.study(make, choices, [torch.zeros(1, 2)], 0.02, False, said.append)
    assert [result.design.batch_size for result in study.results] == [1]
    assert study.failed == {2: "OSError: tired"}
    assert said[0] == "batch size 1: loading"
    assert said[-1] == "trial 6 of 6"


# What is said.


def test_the_report_says_what_to_try_next():
    study = Study(2, [result(1, 100, 0.01), result(8, 500, 0.02)], {})
    assert "--batch-sizes 8,16" in report.next_step(study, study.results[1], None)
    assert "--p99" in report.next_step(study, study.results[0], None)
    assert "max_pending" in report.next_step(study, study.results[0], 0.1)
    refused = Study(2, study.results, {16: "too large"})
    assert "--batch-sizes" not in report.next_step(refused, study.results[1], None)


def test_the_report_says_when_a_p99_is_of_few_calls():
    few = Result(Design(1, 2, None, 1), 10.0, 0.1, 0.1, 20)
    assert "Only 20 calls were measured" in report.verdict(Study(2, [few], {}), few, None, "of 1 row")
    assert "Only" not in report.verdict(Study(2, [], {}), few, None, "of 1 row")
    assert "1 caller of 1 row;" in report.verdict(Study(2, [few], {}), few, None, "of 1 row")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0001234, "0.12"), (0.00512, "5.12"), (0.0512, "51.2"), (0.512, "512"), (5.12, "5120")]
)
def test_milliseconds_have_digits_enough(seconds, text):
    assert report.milliseconds(seconds) == text
