"""The benchmarks run, notice wrong answers, and say what their numbers mean. Nothing here depends on how fast."""

import asyncio
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aneuron

ROOT = Path(__file__).parents[1]
MODULES = (
    "arrivals",
    "before",
    "bulk",
    "contenders",
    "engines",
    "floors",
    "loadgen",
    "loops",
    "plots",
    "quiet",
    "replay",
    "rows",
    "table",
    "timing",
)
PACKAGES = {"batched": "batched", "async-batcher": "async_batcher"}
WITHOUT_THREADS = {"aneuron, inline": {"inline": True}, "aneuron, submit": {"submits": True}}


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in MODULES})


@pytest.fixture
def quick(benchmarks, monkeypatch):
    """Fewer contenders, faster cores, smaller large calls, and little time."""
    for module in (benchmarks.loops, benchmarks.quiet, benchmarks.loadgen):
        monkeypatch.setattr(module, "SERVICE", 0.001)
    for module in (benchmarks.loops, benchmarks.arrivals, benchmarks.quiet):
        monkeypatch.setattr(module, "everybody", benchmarks.contenders.yardsticks)
    monkeypatch.setattr(benchmarks.quiet, "WAITING", 200)
    for module in (benchmarks.loops, benchmarks.bulk):
        monkeypatch.setattr(module, "MANY", (3, 5))
    for module in (benchmarks.timing, benchmarks.arrivals, benchmarks.loadgen):
        monkeypatch.setattr(module, "sleep_length", lambda seconds: seconds)
    monkeypatch.setattr(benchmarks.loops, "LARGE", 24)
    return benchmarks.timing.Effort(0.003, 1, 1)


# The whole of it.


async def test_every_row_of_the_budget_comes_out(benchmarks, quick):
    loops, bulk, arrivals, quiet = (getattr(benchmarks, name) for name in ("loops", "bulk", "arrivals", "quiet"))
    said = []
    rows = []
    for group in (
        loops.w1,
        loops.w2,
        loops.w3,
        arrivals.w1b,
        arrivals.many,
        arrivals.overload,
        quiet.idle,
        quiet.waiting,
    ):
        rows += await group(quick, said.append)
    for group in (loops.w4, loops.w5, bulk.bulk, bulk.threadless):
        rows += await group(quick, said.append, "free")
    names = [(row.name, row.unit) for row in rows]
    assert len(set(names)) == len(names)
    families = (
        "W1 ",
        "W1b ",
        "W2 ",
        "W3 ",
        "256 beside",
        "W4 ",
        "W5 ",
        "24 cores",
        "overload",
        "idle",
        "a waiting",
        "bulk ",
    )
    assert all(any(name.startswith(family) for name, _ in names) for family in families)
    text = benchmarks.table.table(rows)
    for row in rows:
        assert not row.fails, f"{row.name}: {row.fails}"
        assert {"floor", "fair floor", "aneuron"} <= set(row.values)
        assert all(len(values) == 1 and math.isfinite(values[0]) for values in row.values.values()), row
        assert row.name in text
        bound = row.must or row.goal
        assert bound is not None, f"{row.name} has no bound"
        assert row.kept(bound) in (True, False), f"{row.name}: nothing to compare with"
        assert benchmarks.rows.Row.from_json(json.loads(json.dumps(row.as_json()))) == row
    assert max(map(len, text.splitlines())) <= 150


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix sockets with descriptors")
async def test_the_rows_of_engines_come_out(benchmarks, quick, monkeypatch):
    """Those for which few processes are started."""
    monkeypatch.setattr(benchmarks.engines, "SERVICE", 0.001)
    rows = await benchmarks.engines.processes(quick, lambda text: None, cheap=True)
    for row in rows:
        assert not row.fails, f"{row.name}: {row.fails}"
        assert all(len(values) == 1 and math.isfinite(values[0]) for values in row.values.values()), row
        assert (row.must or row.goal) is None or row.kept(row.must or row.goal) is not None, row.name
    values = {(row.name, row.unit): row.values["aneuron"][0] for row in rows}
    assert [values["killed engines", unit] for unit in ("lost", "wrong", "deaths")] == [0.0, 0.0, 1.0]
    assert "in proc." in benchmarks.table.table(rows)


async def test_the_lag_row_comes_out(benchmarks, quick, monkeypatch):
    monkeypatch.setattr(benchmarks.quiet, "ROWS", 1024)
    tail, most = await benchmarks.quiet.lag(quick, lambda text: None)
    assert tail.kept(tail.must) is not None
    assert most.values["aneuron"][0] >= tail.values["aneuron"][0] >= 0.0
    assert not tail.fails


async def test_loadgen_drives_a_model(benchmarks, quick):
    pytest.importorskip("mlperf_loadgen")
    server, offline = await benchmarks.loadgen.loadgen(quick, lambda text: None)
    assert server.p50["aneuron"] > 0.0
    assert offline.values["aneuron"][0] > 0.0
    assert not server.fails
    assert not offline.fails


async def test_loadgen_is_told_of_wrong_answers(benchmarks, quick, monkeypatch):
    pytest.importorskip("mlperf_loadgen")
    monkeypatch.setattr(benchmarks.contenders.Aneuron, "start", start_wrong)
    monkeypatch.setattr(benchmarks.contenders.Aneuron, "stop", lambda self: asyncio.sleep(0))
    rows = await benchmarks.loadgen.loadgen(quick, lambda text: None)
    assert all(row.fails["aneuron"].startswith("WrongAnswer") for row in rows)


async def start_wrong(self, cores, seconds, batch):
    self.call = slightly_off


def test_the_command_line_prints_one_table_and_writes_what_it_has(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks", "--only", "w2", "w4", "--seconds", "0.002", "--turns", "1"]
    command += ["--repetitions", "2", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "numbers.json").read_text())
    names = [row["name"] for row in data["rows"]]
    assert names[0] == "W2 256 rows"
    assert sum(name.startswith("W4 free") for name in names) == 3
    assert sum(name.startswith("W4 pinned") for name in names) in (0, 3)  # not where it cannot be
    assert all(len(values) == 2 for row in data["rows"] for values in row["values"].values())
    assert all(name in done.stdout for name in names)
    assert all(version in done.stdout for version in data["versions"].values())
    assert (tmp_path / "table.txt").read_text() == done.stdout


def test_only_a_whole_run_writes_where_results_are_kept(benchmarks):
    main = importlib.import_module("benchmarks.__main__")
    assert main.arguments([]).results == ROOT / "benchmarks" / "results"
    assert main.arguments(["--quick"]).results is None
    assert main.arguments(["--only", "w1"]).results is None
    assert main.arguments(["--quick", "--results", "here"]).results == Path("here")


def test_the_other_build_is_beside_this_one_under_a_name_of_its_own(benchmarks, tmp_path, monkeypatch):
    before = benchmarks.before
    monkeypatch.setattr(before, "BUILDS", tmp_path)
    folder = before.renamed(ROOT / "aneuron")
    assert before.renamed(ROOT / "aneuron") == folder, "made once for the same sources"
    code = f"""
import sys
import aneuron, {before.NAME} as other
assert other.Pool is not aneuron.Pool
assert other.AsyncDataParallel(len).pool.__class__ is other.Pool
assert other._native.modules({{"sched/call.py": ""}}) == {{"{before.NAME}.sched.call": "sched/call.py"}}
mixed = [name for name, module in sys.modules.items() if name.startswith("{before.NAME}") and any(
    str(getattr(value, "__module__", "")).startswith("aneuron.") for value in vars(module).values())]
print(mixed)
"""
    environment = {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "ANEURON_PURE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# Contenders.


@pytest.mark.parametrize(
    "name", ["floor", "fair floor", "aneuron", *WITHOUT_THREADS, "batched", "async-batcher", "original"]
)
async def test_contenders_answer_small_and_large_calls(benchmarks, name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if name in WITHOUT_THREADS:
        contender = benchmarks.contenders.without_threads(WITHOUT_THREADS[name])["aneuron"]()
    else:
        contender = benchmarks.contenders.everybody()[name]()
    await contender.start(2, 0.0, 8)
    large, small = torch.rand(37, 16), torch.rand(1, 16)
    answers = await asyncio.gather(*map(contender.call, (large, small, large)))
    for answer, x in zip(answers, (large, small, large), strict=True):
        assert torch.equal(answer, x * 2 + 1)
    for _ in range(500):  # a batch that another has overtaken on its way to the loop is counted after the answer
        if contender.executed() == 75:
            break
        await asyncio.sleep(0.01)
    assert contender.executed() == 75
    await contender.stop()


@pytest.mark.parametrize(("device", "expected"), [
    (None, (False, False)), ({"inline": True}, (False, True)), ({"submits": True}, (True, False)),
])  # fmt: skip
async def test_aneurons_cores_are_executed_in_threads_unless_the_row_is_about_others(benchmarks, device, expected):
    contenders = benchmarks.contenders
    made = contenders.yardsticks() if device is None else contenders.without_threads(device)
    for name, (submits, inline) in {"aneuron": expected, "threads": (False, False)}.items():
        if name in made:
            contender = made[name]()
            await contender.start(1, 0.0, 8)
            backend = contender.call.pool.backend
            assert (backend.submits, backend.inline) == (submits, inline)
            await contender.stop()


async def test_a_build_before_that_knows_threads_only_takes_part(benchmarks):
    class Backend(aneuron.SimulatedBackend):
        def __init__(self, cores=4, service_time=0.005):
            super().__init__(cores, service_time)

    package = SimpleNamespace(SimulatedBackend=Backend, AsyncDataParallel=aneuron.AsyncDataParallel)
    contender = benchmarks.contenders.Aneuron(package, {"submits": True})
    await contender.start(1, 0.0, 8)
    assert torch.equal(await contender.call(torch.ones(1, 16)), torch.full((1, 16), 3.0))
    await contender.stop()


@pytest.mark.parametrize("name", ["floor", "aneuron"])
async def test_a_map_is_in_order_checked_and_over_when_the_turn_is(benchmarks, monkeypatch, name):
    contender = benchmarks.contenders.yardsticks()[name]()
    await contender.start(2, 0.0, 8)
    turn = await benchmarks.bulk._mapping(2, 0.005)(contender)
    assert turn.executed_per_second > 0
    with pytest.raises(benchmarks.timing.WrongAnswer):
        await benchmarks.bulk._mapping(2, 60.0)(SimpleNamespace(call=slightly_off, executed=lambda: 0))
    await contender.stop()
    assert len(asyncio.all_tasks()) == 1


async def test_the_floors_report_errors_and_let_their_threads_go(benchmarks):
    for make in (benchmarks.floors.Floor, benchmarks.floors.FairFloor):
        floor = make()
        await floor.start(2, 0.0, 8)
        with pytest.raises(ValueError, match="fixed shape"):
            await floor.call(torch.rand(1, 15))
        await floor.stop()
        assert not any(thread.is_alive() for thread in floor.threads)


async def test_the_original_runs_two_batches_at_a_time_however_many_cores(benchmarks):
    original, running, most = benchmarks.contenders.Original(), 0, 0
    await original.start(4, 0.001, 8)
    run = benchmarks.floors.Core.run

    def watched(core, x):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return run(core, x)
        finally:
            running -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.floors.Core, "run", watched)
        await original.call(torch.rand(256, 16))
    assert most == 2
    assert [core.executions for core in original.cores] == [8, 8, 8, 8]
    await original.stop()


def test_the_learned_hold_takes_part_once_there_is_one(benchmarks, monkeypatch):
    class WithHold:
        def __init__(self, model, *, max_delay=0.0):
            pass

    class Without:
        def __init__(self, model):
            pass

    monkeypatch.setattr(aneuron, "AsyncDataParallel", WithHold)
    assert list(benchmarks.contenders.learned_hold()) == ["aneuron, held"]
    monkeypatch.setattr(aneuron, "AsyncDataParallel", Without)
    assert benchmarks.contenders.learned_hold() == {}


def test_a_row_of_the_learned_hold_has_it_in_the_place_of_aneuron(benchmarks):
    turn, held = benchmarks.timing.Turn(latencies=[0.2]), benchmarks.timing.Turn(latencies=[0.1])
    seen = benchmarks.timing.Seen(
        {"floor": [turn], "aneuron": [turn], "aneuron, held": [held]}, {"original": "no"}, [1.0]
    )
    other = benchmarks.arrivals._only(seen, "aneuron, held")
    assert seen.turns == {"floor": [turn], "aneuron": [turn]}
    assert other.turns == {"floor": [turn], "aneuron": [held]}
    assert other.fails == seen.fails == {"original": "no"}
    assert benchmarks.arrivals._only(seen, "aneuron, held") is None


# Checking.


async def right(x):
    await asyncio.sleep(0)
    return x * 2 + 1


async def late(x, last=[None]):  # noqa: B006
    """The answer of whoever called before."""
    await asyncio.sleep(0)
    mine, last[0] = last[0], x * 2 + 1
    return last[0] if mine is None else mine


async def slightly_off(x):
    await asyncio.sleep(0)
    y = x * 2 + 1
    y[0, -1] += 1e-3
    return y


async def all_rows(x):
    await asyncio.sleep(0)
    return (x[:1] * 2 + 1).expand(8, -1)


class WrongOnce:
    """One wrong answer, the tenth."""

    def __init__(self):
        self.calls = 0

    async def __call__(self, x):
        self.calls += 1
        return await (slightly_off if self.calls == 10 else right)(x)


async def test_right_answers_are_counted(benchmarks):
    turn = await benchmarks.timing.take_turn(right, [1] * 20, 0.01)
    assert turn.rows_per_second > 0
    assert turn.latencies
    assert all(latency > 0 for latency in turn.latencies)


@pytest.mark.parametrize("wrong", [late, slightly_off, all_rows, WrongOnce()])
@pytest.mark.parametrize("callers", [[1] * 20, [1, 1, 37]])
async def test_a_wrong_answer_ends_a_turn(benchmarks, wrong, callers):
    if isinstance(wrong, WrongOnce):
        wrong.calls = 0
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(benchmarks.timing.take_turn(wrong, callers, 300.0), 60.0)
    assert caught.value.subgroup(benchmarks.timing.WrongAnswer)
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("wrong", [late, slightly_off, all_rows, WrongOnce()])
async def test_a_wrong_answer_ends_a_replay(benchmarks, wrong):
    if isinstance(wrong, WrongOnce):
        wrong.calls = 0
    schedule = [index * 1e-5 for index in range(50)]
    with pytest.raises(benchmarks.timing.WrongAnswer):
        await benchmarks.replay.Replay(wrong, schedule).run()
    assert len(asyncio.all_tasks()) == 1


async def test_a_contender_that_fails_is_out_of_the_row_and_nobody_else(benchmarks):
    timing, rows = benchmarks.timing, benchmarks.rows
    contenders = {"floor": right, "aneuron": right, "batched": late, "original": None}

    async def look(call):
        return await timing.take_turn(call, [1] * 8, 0.002)

    seen = await timing.rounds(contenders, timing.Effort(0.002, 3, 2), look)
    assert {name: len(turns) for name, turns in seen.turns.items()} == {"floor": 3, "aneuron": 3}
    assert seen.fails["batched"].startswith("WrongAnswer: ")
    assert seen.fails["original"].startswith("TypeError: ")
    row = rows.row("W1", "rows/s", seen, rows.rate, rows.at_least(0.001))
    text = benchmarks.table.table([row])
    assert "fails: wrong" in text.splitlines()[2]
    assert "fails: TypeError" in text.splitlines()[2]
    assert row.kept(row.must) is True
    row.fails["aneuron"] = "RuntimeError: no"
    assert row.kept(row.must) is False


# Arrivals.


def test_a_schedule_is_the_same_every_time_and_has_its_rate(benchmarks):
    schedule = benchmarks.replay.poisson(1000.0, 10.0, seed=3)
    assert schedule == benchmarks.replay.poisson(1000.0, 10.0, seed=3) == sorted(schedule)
    assert schedule != benchmarks.replay.poisson(1000.0, 10.0, seed=4)
    assert 9_500 < len(schedule) < 10_500
    assert schedule[-1] < 10.0


async def test_latency_counts_from_the_schedule_when_the_loop_is_held_up(benchmarks):
    import time

    held = []

    async def holds_the_loop_up(x):
        if not held:
            held.append(True)
            time.sleep(0.1)  # in the first call; nine more come in that time
        return x * 2 + 1

    turn = await benchmarks.replay.Replay(holds_the_loop_up, [index * 0.001 for index in range(10)]).run()
    assert len(turn.latencies) == 10
    assert min(turn.latencies) > 0.08


async def test_refused_calls_are_counted_and_missing_answers_are_a_timeout(benchmarks):
    async def refuses(x):
        if x[0, 0] < 5:
            raise aneuron.QueueFull("full", retry_after=1.0)
        return x * 2 + 1

    async def never(x):
        await asyncio.get_running_loop().create_future()

    schedule = [index * 1e-4 for index in range(20)]
    turn = await benchmarks.replay.Replay(refuses, schedule, (aneuron.QueueFull,)).run()
    assert turn.more == {"refused": 5}
    assert len(turn.latencies) == 15
    with pytest.raises(aneuron.QueueFull):
        await benchmarks.replay.Replay(refuses, schedule).run()
    with pytest.raises(TimeoutError):
        await benchmarks.replay.Replay(never, schedule).run(patience=0.01)
    assert len(asyncio.all_tasks()) == 1


# Bounds.


def test_bounds_are_judged_by_the_median(benchmarks):
    rows = benchmarks.rows
    row = rows.Row("W4", "rows/s", rows.at_least(0.6, "fair floor"), rows.at_least(0.75))
    row.values = {"floor": [10.0] * 3, "fair floor": [5.0] * 3, "aneuron": [2.9, 3.0, 9.0]}
    assert row.kept(row.must) is True
    assert row.kept(row.goal) is False
    assert row.against(row.goal) == [0.29, 0.3, 0.9]
    row.values["aneuron"] = [2.9, 2.9, 9.0]
    assert row.kept(row.must) is False
    assert row.kept(rows.at_least(0.6, "nobody")) is None
    assert row.kept(None) is None


@pytest.mark.parametrize(
    ("make", "limit", "of", "kept", "missed"),
    [
        ("at_most", 1.1, "floor", 10.9, 11.1),
        ("at_least", 0.985, "floor", 9.86, 9.84),
        ("above", 0.2, "floor", 10.1, 10.3),
        ("at_most", 500.0, None, 499.0, 501.0),
    ],
)
def test_the_arithmetic_of_bounds(benchmarks, make, limit, of, kept, missed):
    row = benchmarks.rows.Row("a", "b", getattr(benchmarks.rows, make)(limit, of))
    row.values = {"floor": [10.0], "aneuron": [kept]}
    assert row.kept(row.must) is True
    row.values["aneuron"] = [missed]
    assert row.kept(row.must) is False


def test_who_is_ahead_of_a_package_is_told(benchmarks):
    rows = benchmarks.rows
    fast = rows.Row("W4", "rows/s", rows.at_least(0.6, "fair floor"))
    fast.values = {"aneuron": [9.0, 10.0, 11.0], "batched": [10.0, 10.0, 10.0], "async-batcher": [11.0, 11.0, 11.0]}
    cheap = rows.Row("W1", "us/row", None, rows.above(1.0, "floor"))
    cheap.values = {"aneuron": [1.0], "batched": [2.0]}
    assert [fast.ahead_of("batched"), fast.ahead_of("async-batcher")] == [True, False]
    assert [cheap.ahead_of("batched"), cheap.ahead_of("async-batcher")] == [True, None]
    text = benchmarks.table.table([fast, cheap])
    assert "ahead of batched in 2 of 2 rows" in text.splitlines()
    assert "ahead of async-batcher in 0 of 1 rows; not in W4 (rows/s)" in text.splitlines()
    fast.fails["aneuron"] = "TimeoutError"
    assert fast.ahead_of("batched") is False


def test_as_python_a_row_is_held_to_what_it_gains_on_the_build_before(benchmarks):
    rows = benchmarks.rows
    more, less = rows.Row("W4", "rows/s", rows.at_least(0.8)), rows.Row("W4", "us", rows.at_most(1.2))
    for row, values in ((more, [13.0]), (less, [7.9])):
        rows.as_python(row)
        assert row.must.of == "floor", "there is no build before"
        row.values = {"aneuron": values, "before": [10.0]}
        rows.as_python(row)
        assert row.kept(row.must) is True
        assert row.kept(row.goal) is False
    more.values["aneuron"], less.values["aneuron"] = [12.4], [8.1]
    assert more.kept(more.must) is less.kept(less.must) is False


def test_the_best_peer_is_chosen_in_each_repetition(benchmarks):
    row = benchmarks.rows.Row(
        "W1b", "ms", values={"batched": [3.0, 1.0], "async-batcher": [2.0, 2.0], "floor": [0.0] * 2}
    )
    row.add_best_peer()
    assert row.values["best peer"] == [2.0, 1.0]


def test_percentiles(benchmarks):
    percentile = benchmarks.rows.percentile
    assert percentile(range(1000), 0.99) == 990
    assert percentile([7.0], 0.999) == 7.0
    assert math.isnan(percentile([], 0.5))


def test_plots_are_drawn_of_the_rows_that_are_there(benchmarks, tmp_path):
    pytest.importorskip("matplotlib")
    numbers = {"floor": 6000.0, "aneuron": 5900.0}
    rows = [
        benchmarks.rows.Row(f"W1 {callers:>5,} callers", "rows/s", values={who: [n] for who, n in numbers.items()})
        for callers in (16, 1024)
    ]
    for row in rows:
        row.values["ideal"] = [6250.0]
    assert "throughput.png" in benchmarks.plots.draw(rows, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["throughput.png"]
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
