"""Calls that come when they come: a schedule is made once and replayed for every contender.

Lives here: schedules and their replay. Must not be here: which schedules, bounds.
"""

import asyncio
import threading
import time
from array import array
from collections.abc import Sequence
from random import Random
from statistics import linear_regression

import torch

from benchmarks.floors import FEATURES, model
from benchmarks.timing import CHECK_EVERY, Call, Turn, WrongAnswer

POOL = 256  # different rows; calls take them in turn


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds from the start at which independent calls come, `rate` of them a second on average; at least one."""
    random, times, at = Random(seed), [], 0.0
    while (at := at + random.expovariate(rate)) < seconds:
        times.append(at)
    return times or [0.0]


class Replay:
    """One-row calls at the scheduled times, whether earlier ones are answered or not; every answer is checked.

    A latency counts from the time in the schedule, however late the call was made: a contender that holds the loop up
    is not spared the calls of that time. A thread posts what is due to the loop, as a network would: the loop's own
    timers know only milliseconds.
    """

    def __init__(self, call: Call, schedule: Sequence[float], refused: tuple[type[Exception], ...] = ()) -> None:
        self._call, self._schedule, self._refusals = call, schedule, refused
        self._pool = torch.arange(float(POOL))[:, None] + torch.rand(POOL, FEATURES)
        self._right = model(self._pool)
        self._rows = [self._pool[index : index + 1] for index in range(POOL)]
        self._ends = array("d", bytes(8 * len(schedule)))  # not a list: the memory that a row looks at is not ours
        self._answers: list[torch.Tensor] = []
        self._asked: list[int] = []
        self._next, self._left = 0, len(schedule)
        self._posted = self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, patience: float = 5.0) -> Turn:
        """Raises what a call raises (a refusal counts in `more`), and `TimeoutError` if answers are missing `patience`
        seconds after the last arrival.
        """
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        cpu, self._begin = time.process_time(), time.perf_counter()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(self._schedule[-1] + patience):
                await self._over
        finally:
            self._stopped = True
            thread.join()  # at most until the next arrival
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._compare()
        return self._turn(time.process_time() - cpu)

    def _watch(self) -> None:
        for index, at in enumerate(self._schedule):
            now = time.perf_counter() - self._begin
            if at > now:
                time.sleep(at - now)
            if self._stopped:
                return
            if index >= self._next and not self._posted:
                self._posted = True
                self._loop.call_soon_threadsafe(self._post)

    def _post(self) -> None:
        self._posted = False
        now = time.perf_counter() - self._begin
        while not self._stopped and self._next < len(self._schedule) and self._schedule[self._next] <= now:
            task = self._loop.create_task(self._one(self._next))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._next += 1

    async def _one(self, index: int) -> None:
        try:
            answer = await self._call(self._rows[index % POOL])
            self._ends[index] = time.perf_counter() - self._begin
            self._answers.append(answer)
            self._asked.append(index % POOL)
            if len(self._answers) >= CHECK_EVERY:
                self._compare()
        except self._refusals:
            pass
        except Exception as error:
            if not self._over.done():
                self._over.set_exception(error)
        self._left -= 1
        if not self._left and not self._over.done():
            self._over.set_result(None)

    def _compare(self) -> None:
        answers, asked, self._answers, self._asked = self._answers, self._asked, [], []
        if answers and not torch.equal(torch.cat(answers), self._right[asked]):
            raise WrongAnswer(f"not the answers to the rows {asked}")

    def _turn(self, cpu: float) -> Turn:
        """The rate is that of answers while calls came, without the first tenth."""
        span = self._schedule[-1]
        latencies = [end - at for at, end in zip(self._schedule, self._ends, strict=True) if end]
        seen = sorted(end for end in self._ends if span / 10 < end <= span)
        rate = linear_regression(seen, range(len(seen))).slope if len(seen) > 1 else float("nan")
        return Turn(rate, cpu / max(1, len(latencies)), latencies, more={"refused": len(self._ends) - len(latencies)})
