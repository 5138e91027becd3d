"""Measuring: how many rows a second a design gives, and how long its calls take.

Lives here: designs, their trials in turns, which of them is best. Must not be here: arguments, printing.
"""

import asyncio
import gc
import math
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import aneuron

TURNS = 3  # of each design; all others come between them, so that a slow minute of the machine strikes all alike
NOISE = 0.03  # rates that differ by less are equal


@dataclass(frozen=True)
class Design:
    """One choice of what can be chosen, and the callers that it is put to."""

    batch_size: int
    num_workers: int
    split_size: int | None
    callers: int


@dataclass(frozen=True)
class Result:
    """What a design gave: medians over its turns; `calls` is the number of calls in all of them. Times in seconds."""

    design: Design
    rows_per_second: float
    p50: float
    p99: float
    calls: int


@dataclass(frozen=True)
class Study:
    """All that was measured. `failed` says by batch size why it does not run."""

    cores: int
    results: list[Result]
    failed: dict[int, str]


@dataclass(frozen=True)
class Choices:
    """What to try. Where the user says nothing: one and two slots a core, pieces for all cores, callers for a full
    machine; and with a bound on latency fewer callers, too, for a full machine need not keep it.
    """

    batch_sizes: Sequence[int]
    num_workers: Sequence[int | None] | None
    split_sizes: Sequence[int | None] | None
    callers: Sequence[int] | None
    rows: int

    def designs(self, cores: int, bounded: bool) -> Iterator[Design]:
        """Every combination that differs from the others."""
        full = math.ceil(2 * cores * max(self.batch_sizes) / self.rows)
        callers = self.callers or sorted({max(1, full // 4**step) for step in range(5 if bounded else 1)})
        workers = dict.fromkeys(slots or 2 * cores for slots in self.num_workers or (cores, 2 * cores))
        for batch_size in self.batch_sizes:
            for num_workers in workers:
                for split_size in self.split_sizes or (None, max(1, self.rows // cores)):
                    if split_size is None or split_size < min(batch_size, self.rows):
                        for count in callers:
                            yield Design(batch_size, num_workers, split_size, count)


def resized(example: Any, rows: int) -> Any:
    """The example with `rows` rows: its own, repeated."""
    if isinstance(example, torch.Tensor):
        return example[torch.arange(rows) % example.shape[0]]
    if isinstance(example, dict):
        return {name: resized(value, rows) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(resized(value, rows) for value in example)
    return example


async def call(model: Any, inputs: Any) -> Any:
    """Call a model with an example."""
    if isinstance(inputs, dict):
        return await model(**inputs)
    return await (model(*inputs) if isinstance(inputs, tuple) else model(inputs))


async def service_time(model: Any, example: Any, batch_size: int, seconds: float) -> tuple[float, Any]:
    """Seconds that one core takes for a full batch, the median, and the output."""
    inputs = resized(example, batch_size)
    async with model:
        stop = time.perf_counter() + seconds
        output = await call(model, inputs)
        while time.perf_counter() < stop:
            output = await call(model, inputs)
        return model.statistics().cores[0].service_seconds, output


async def study(
    make: Callable[[int], Awaitable[Any]],
    choices: Choices,
    example: Any,
    seconds: float,
    bounded: bool,
    say: Callable[[str], None],
) -> Study:
    """Measure every design; `make` gives the model for a batch size; what it or the model raises is a failure."""
    inputs = resized(example, choices.rows)
    models: dict[int, Any] = {}
    failed: dict[int, str] = {}
    turns: dict[Design, list[tuple[float, list[float]]]] = {}
    async with AsyncExitStack() as stack:
        for batch_size in choices.batch_sizes:
            say(f"batch size {batch_size}: loading")
            try:
                models[batch_size] = await stack.enter_async_context(await make(batch_size))
            except aneuron.DeviceError:
                raise
            except Exception as error:
                failed[batch_size] = _one_line(error)
        cores = max((len(model.statistics().cores) for model in models.values()), default=0)
        designs = [d for d in choices.designs(cores or 1, bounded) if d.batch_size not in failed]
        for turn in range(TURNS):
            for number, design in enumerate(designs[:: -1 if turn % 2 else 1], turn * len(designs) + 1):
                say(f"trial {number} of {TURNS * len(designs)}")
                if design.batch_size not in failed:
                    try:
                        turns.setdefault(design, []).append(
                            await _trial(models[design.batch_size], design, inputs, choices.rows, seconds)
                        )
                    except Exception as error:
                        failed[design.batch_size] = _one_line(error)
    results = [_result(design, turns[design]) for design in designs if design.batch_size not in failed]
    return Study(cores, results, failed)


async def _trial(model: Any, design: Design, inputs: Any, rows: int, seconds: float) -> tuple[float, list[float]]:
    """Rows a second and the latencies of the calls, once it is in full swing."""
    model.num_workers, model.split_size = design.num_workers, design.split_size
    gc.collect()  # no design pays for what another has left
    clock = time.perf_counter
    ended: list[tuple[float, float]] = []
    begin = clock()
    stop = begin + seconds

    async def caller() -> None:
        now = begin
        while now < stop:
            called = clock()
            await call(model, inputs)
            now = clock()
            ended.append((now, now - called))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cores that are not fully used: the rates will tell
            async with asyncio.TaskGroup() as group:
                for _ in range(design.callers):
                    group.create_task(caller())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    swing = begin + seconds / 5
    latencies = [latency for at, latency in ended if swing <= at <= stop]
    if not latencies:  # one call takes longer than the trial
        return rows * len(ended) / (ended[-1][0] - begin), [latency for _, latency in ended]
    return rows * len(latencies) / (stop - swing), latencies


def _result(design: Design, turns: list[tuple[float, list[float]]]) -> Result:
    def quantile(part: float) -> float:
        return median(sorted(latencies)[math.ceil(part * len(latencies)) - 1] for _, latencies in turns)

    calls = sum(len(latencies) for _, latencies in turns)
    return Result(design, median(rate for rate, _ in turns), quantile(0.5), quantile(0.99), calls)


def _one_line(error: BaseException) -> str:
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{kind}: {lines[-1].removeprefix(f'{kind}: ') if lines else ''}"  # TorchScript's reason comes last


def best(results: Sequence[Result], bound: float | None) -> Result | None:
    """The most rows a second with a p99 within the bound; of those that are equal to it the one with the least p99."""
    fit = [result for result in results if bound is None or result.p99 <= bound]
    most = max((result.rows_per_second for result in fit), default=0.0)
    equal = [result for result in fit if result.rows_per_second >= (1 - NOISE) * most]
    return min(equal, key=lambda result: result.p99, default=None)
