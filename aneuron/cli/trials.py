"""Measuring: how many rows a second a design gives, and how long its calls take.

Lives here: designs, their trials in turns, which of them is best. Must not be here: ways to serve a model (survey.py),
arguments, printing.
"""

import asyncio
import gc
import math
import time
import warnings
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any, TypeVar

import torch

import aneuron
from aneuron.cli import calls as calls_
from aneuron.cli.ways import Way

K = TypeVar("K", bound=Hashable)
Say = Callable[[str], None]
Make = Callable[[], Awaitable[Any]]

TURNS = 3  # of each design; all others come between them, so that a slow minute of the machine strikes all alike
NOISE = 0.03  # rates that differ by less are equal
LARGEST = 16  # rows that a batch of any number of rows is thought to have, to say how many callers fill a machine


@dataclass(frozen=True)
class Design:
    """One choice of what can be chosen, and the callers that it is put to."""

    batch_size: int | None  # None: any number of rows
    num_workers: int
    split_size: int | None
    callers: int
    way: Way | None = None  # None: the same for all


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
    """All that was measured of sizes and slots. `failed` says by batch size why it does not run."""

    cores: int
    results: list[Result]
    failed: dict[int | None, str]


@dataclass(frozen=True)
class Choices:
    """What to try. Where the user says nothing: one and two slots a core, pieces for all cores, callers for a full
    machine; and with a bound on latency fewer callers, too, for a full machine need not keep it.
    """

    batch_sizes: Sequence[int | None]
    num_workers: Sequence[int | None] | None
    split_sizes: Sequence[int | None] | None
    callers: Sequence[int] | None
    rows: int
    machine: int = 0  # cores that callers are to fill, where these are more than those of the model

    def designs(self, cores: int, bounded: bool) -> Iterator[Design]:
        """Every combination that differs from the others."""
        full = self.full(max(cores, self.machine))
        callers = self.callers or sorted({max(1, full // 4**step) for step in range(5 if bounded else 1)})
        workers = dict.fromkeys(slots or 2 * cores for slots in self.num_workers or (cores, 2 * cores))
        for batch_size in self.batch_sizes:
            for num_workers in workers:
                for split_size in self.split_sizes or (None, max(1, self.rows // cores)):
                    if split_size is None or split_size < min(batch_size or self.rows, self.rows):
                        for count in callers:
                            yield Design(batch_size, num_workers, split_size, count)

    def full(self, cores: int) -> int:
        """Callers that are twice what fills all cores."""
        return math.ceil(2 * cores * max(size or LARGEST for size in self.batch_sizes) / self.rows)


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
    make: Callable[[int | None], Awaitable[Any]],
    choices: Choices,
    calls: Sequence[Any],
    seconds: float,
    bounded: bool,
    say: Say,
) -> Study:
    """Measure every design; `make` gives the model for a batch size; what it or the model raises is a failure."""
    cores = 0

    def designs(models: Mapping[int | None, Any]) -> Iterator[tuple[int | None, Design]]:
        nonlocal cores
        cores = max((len(model.statistics().cores) for model in models.values()), default=0)
        return ((design.batch_size, design) for design in choices.designs(cores or 1, bounded))

    makers = {size: partial(make, size) for size in choices.batch_sizes}
    names = {size: f"batch size {size or 'any'}" for size in makers}
    results, failed = await heats(makers, names, designs, calls, seconds, say)
    return Study(cores, results, failed)


async def heats(
    makers: Mapping[K, Make],
    names: Mapping[K, str],
    designs: Callable[[Mapping[K, Any]], Iterable[tuple[K, Design]]],
    calls: Sequence[Any],
    seconds: float,
    say: Say,
    look: Callable[[K, Any], Awaitable[None]] | None = None,
) -> tuple[list[Result], dict[K, str]]:
    """Load models, and measure designs of them in turns: the results, and why others do not run. `look`: at each that
    is loaded.
    """
    models: dict[K, Any] = {}
    failed: dict[K, str] = {}
    turns: dict[Design, list[tuple[float, list[float]]]] = {}
    async with AsyncExitStack() as stack:
        for key, make in makers.items():
            say(f"{names[key]}: loading")
            try:
                model = await stack.enter_async_context(await make())
                if look is not None:
                    await look(key, model)
                models[key] = model
            except aneuron.DeviceError:
                raise
            except Exception as error:
                failed[key] = one_line(error)
        tried = [(key, design) for key, design in designs(models) if key not in failed]
        for turn in range(TURNS):
            for number, (key, design) in enumerate(tried[:: -1 if turn % 2 else 1], turn * len(tried) + 1):
                say(f"trial {number} of {TURNS * len(tried)}")
                if key not in failed:
                    try:
                        turns.setdefault(design, []).append(await _trial(models[key], design, calls, seconds))
                    except Exception as error:
                        failed[key] = one_line(error)
    return [_result(design, turns[design]) for key, design in tried if key not in failed], failed


async def _trial(model: Any, design: Design, calls: Sequence[Any], seconds: float) -> tuple[float, list[float]]:
    """Rows a second and the latencies of the calls, which callers make in turn, once it is in full swing."""
    model.num_workers, model.split_size = design.num_workers, design.split_size
    gc.collect()  # no design pays for what another has left
    clock = time.perf_counter
    ended: list[tuple[float, float, int]] = []
    turn = cycle([(inputs, calls_.rows(inputs)) for inputs in calls])
    begin = clock()
    stop = begin + seconds

    async def caller() -> None:
        now = begin
        while now < stop:
            inputs, rows = next(turn)
            called = clock()
            await call(model, inputs)
            now = clock()
            ended.append((now, now - called, rows))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cores that are not fully used: the rates will tell
            async with asyncio.TaskGroup() as group:
                for _ in range(design.callers):
                    group.create_task(caller())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    swing = begin + seconds / 5
    counted = [each for each in ended if swing <= each[0] <= stop]
    if not counted:  # one call takes longer than the trial
        counted, swing, stop = ended, begin, ended[-1][0]
    return sum(rows for _, _, rows in counted) / (stop - swing), [latency for _, latency, _ in counted]


def _result(design: Design, turns: list[tuple[float, list[float]]]) -> Result:
    def quantile(part: float) -> float:
        return median(sorted(latencies)[math.ceil(part * len(latencies)) - 1] for _, latencies in turns)

    calls = sum(len(latencies) for _, latencies in turns)
    return Result(design, median(rate for rate, _ in turns), quantile(0.5), quantile(0.99), calls)


def one_line(error: BaseException) -> str:
    """An error in a line."""
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{kind}: {lines[-1].removeprefix(f'{kind}: ') if lines else ''}"  # TorchScript's reason comes last


def best(results: Sequence[Result], bound: float | None) -> Result | None:
    """The most rows a second with a p99 within the bound; of those that are equal to it the one with the least p99."""
    fit = [result for result in results if bound is None or result.p99 <= bound]
    most = max((result.rows_per_second for result in fit), default=0.0)
    equal = [result for result in fit if result.rows_per_second >= (1 - NOISE) * most]
    return min(equal, key=lambda result: result.p99, default=None)
