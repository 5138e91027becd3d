"""The client of the HTTP benchmark: `wrk`, with a script that asks for rows of its own and checks the answers.

Lives here: running it, what it saw, and one more caller for what it cannot see. Must not be here: servers, bounds.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.floors import FEATURES, model
from benchmarks.timing import WrongAnswer

SCRIPT = Path(__file__).with_name("wrk.lua")
PATIENCE = 30  # seconds after which wrk counts an answer as late
REFUSALS = (429, 503)
NOW_AND_THEN = 0.02  # seconds between two questions of one more caller


@dataclass(frozen=True)
class Seen:
    """What the client saw. Seconds are from the request to the end of its answer."""

    seconds: float
    latencies: list[float]  # of right answers
    refused: int  # 503 and 429
    failed: int  # other statuses, and connections that broke, or were not answered in time

    @property
    def answers_per_second(self) -> float:
        return len(self.latencies) / self.seconds


def there() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


async def load(url: str, connections: int, seconds: float, features: int = FEATURES, head: bytes = b"") -> Seen:
    """Keep so many connections busy, each with one request at a time, from one thread; whole seconds, at least one.

    Raises `WrongAnswer` where one answer is not that of a row which was asked for and waits for its answer.
    """
    command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", str(max(1, round(seconds)))]
    command += ["--timeout", str(PATIENCE), "--script", str(SCRIPT), url, "--", str(features), head.decode()]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = [line for line in output.decode().splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"wrk ended with {process.returncode}: {errors.decode()[-300:] or output.decode()[-300:]}")
    return understood(json.loads(lines[-1]))


def understood(report: dict[str, Any]) -> Seen:
    """What the script wrote at its end, in microseconds."""
    if report["wrong"]:
        raise WrongAnswer(f"{report['wrong']:,} of {report['wrong'] + report['answers']:,} answers")
    failed = report["failed"] + report["broken"] + report["late"]
    latencies = [microseconds / 1e6 for microseconds in report["took"]]
    return Seen(report["duration"] / 1e6, latencies, report["refused"], failed)


async def refusals(url: str) -> AsyncIterator[float]:
    """The seconds of each refusal that one more caller gets, who asks now and then, until it is closed.

    wrk cannot time them: a refusal does not say which request it answers, and wrk adds to its own times what it thinks
    that a caller who does not wait for answers would have seen.
    """
    async with aiohttp.ClientSession() as session:
        while True:
            x = torch.rand(1, FEATURES)
            began = time.perf_counter()
            async with session.post(url, data=x.numpy().tobytes()) as response:
                body = await response.read()
            if response.status in REFUSALS:
                yield time.perf_counter() - began
            elif body != model(x).numpy().tobytes():
                raise WrongAnswer(f"status {response.status} to one more caller: {body[:80]!r}")
            await asyncio.sleep(NOW_AND_THEN)
