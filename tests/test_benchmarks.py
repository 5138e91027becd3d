"""The benchmarks run, notice wrong answers, and say what their numbers mean. Nothing here depends on how fast."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import workloads

    return workloads


def test_the_table_comes_out(tmp_path):
    file = tmp_path / "numbers.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--seconds",
        "0.01",
        "--repetitions",
        "1",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    data = json.loads(file.read_text())
    names = [(row["name"], row["unit"]) for row in data["rows"]]
    assert len(set(names)) == len(names) >= 9
    for row in data["rows"]:
        assert row["must"], "every row of these two has a bound"
        assert {"floor", "fair floor", "aneuron"} <= set(row["values"])
        assert all(len(values) == 1 for values in row["values"].values())
        assert row["name"] in done.stdout
        assert row["unit"] in done.stdout
    for version in data["versions"].values():
        assert version in done.stdout
    assert "met" in done.stdout


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
    return (x * 2 + 1).expand(8, -1)


async def test_right_answers_are_counted(workloads):
    turn = await workloads.take_turn(right, 20, 0.01)
    assert turn.rows_per_second > 0
    assert turn.latencies
    assert all(latency > 0 for latency in turn.latencies)


@pytest.mark.parametrize("wrong", [late, slightly_off, all_rows])
async def test_a_wrong_answer_ends_the_run(workloads, wrong):
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(workloads.take_turn(wrong, 20, 30.0), 20.0)
    assert caught.value.subgroup(workloads.WrongAnswer)
    assert len(asyncio.all_tasks()) == 1


async def test_the_floors_serve_large_calls_and_report_errors(workloads):
    for make in (workloads.Floor, workloads.FairFloor):
        floor = make()
        await floor.start(2, 0.0, 8)
        large, small = torch.rand(37, 16), torch.rand(3, 16)
        answers = await asyncio.gather(floor.call(large), floor.call(small), floor.call(large))
        for answer, x in zip(answers, (large, small, large), strict=True):
            assert torch.equal(answer, x * 2 + 1)
        with pytest.raises(ValueError, match="fixed shape"):
            await floor.call(torch.rand(1, 15))
        await floor.stop()
        assert not any(thread.is_alive() for thread in floor.threads)


def test_bounds_are_judged_by_the_median(workloads):
    must = workloads.Must(0.6, "fair floor")
    row = workloads.Row(
        "W4", "rows/s", must, {"floor": [10.0] * 3, "fair floor": [5.0] * 3, "aneuron": [2.9, 3.0, 9.0]}
    )
    assert row.verdict is True
    assert row.against("floor") == [0.29, 0.3, 0.9]
    row.values["aneuron"] = [2.9, 2.9, 9.0]
    assert row.verdict is False
    assert workloads.Row.from_json(json.loads(json.dumps(row.as_json()))) == row
    lone = workloads.Row("W1", "ms", workloads.Must(0.2, at_least=False, difference=True), {"floor": [0.1]})
    assert lone.must.met(lone.must.compare(0.25, 0.1))
    assert not lone.must.met(lone.must.compare(0.35, 0.1))
