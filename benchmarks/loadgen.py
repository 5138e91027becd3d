"""MLCommons' LoadGen as the one who calls, from its own threads: server and offline scenarios, short settings.

Not an MLPerf result, and not to be called one: no MLPerf model, data set, accuracy run, duration or review. It is a
second opinion: somebody else's arrivals, clock and percentiles.

Lives here: the bridge to LoadGen. Must not be here: our own timing.
"""

import asyncio
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Aneuron, installed
from benchmarks.floors import FEATURES, model
from benchmarks.loops import BATCH, CAPACITY, CORES, SERVICE
from benchmarks.rows import Row
from benchmarks.timing import Effort, Say, WrongAnswer, reason, sleep_length

SAMPLES = 1024
LOAD = 0.7  # of the capacity, in the server scenario


class Bridge:
    """LoadGen's queries, served by one loop: one loop wake-up a query, one call a sample, every answer checked."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        x = torch.arange(float(SAMPLES))[:, None] + torch.rand(SAMPLES, FEATURES)
        self._rows, self._right = x.split(1), model(x).split(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self.errors: list[BaseException] = []
        self.answered = 0

    def issue(self, samples: Sequence[Any]) -> None:
        """What LoadGen calls, in a thread of its own."""
        self._loop.call_soon_threadsafe(self._start, [(sample.id, sample.index) for sample in samples])

    def _start(self, samples: list[tuple[int, int]]) -> None:
        for sample in samples:
            task = self._loop.create_task(self._serve(*sample))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, ident: int, index: int) -> None:
        import mlperf_loadgen

        try:
            y = await self._call(self._rows[index])
            if not torch.equal(y, self._right[index]):
                raise WrongAnswer(f"sample {index}: got {y}")
            self.answered += 1
        except Exception as error:  # LoadGen waits for a response to every query, whatever it is
            self.errors.append(error)
        mlperf_loadgen.QuerySamplesComplete([mlperf_loadgen.QuerySampleResponse(ident, 0, 0)])


async def loadgen(effort: Effort, say: Say) -> list[Row]:
    """Rows without bounds: percentiles and rates as LoadGen reports them."""
    if not installed("mlcommons-loadgen"):
        say("mlcommons-loadgen is not installed: it is left out")
        return []
    rows = []
    seconds = 12 * effort.seconds
    contender = Aneuron()
    await contender.start(CORES, SERVICE, BATCH)
    try:
        for scenario in ("Server", "Offline"):
            say(f"LoadGen, {scenario.lower()} scenario, {seconds:g} s")
            sleep = sleep_length(SERVICE)
            bridge = Bridge(contender.call)
            found = await asyncio.to_thread(_test, bridge, scenario, CAPACITY, seconds)
            if scenario == "Server":
                made = Row("LoadGen server, p99", "ms", values={"ideal": [sleep * 1e3]})
                made.values["aneuron"] = [found["99.00 percentile latency (ns)"] / 1e6]
                made.p50["aneuron"] = found["50.00 percentile latency (ns)"] / 1e6
                made.p99["aneuron"] = found["99.00 percentile latency (ns)"] / 1e6
            else:
                made = Row("LoadGen offline", "rows/s", values={"ideal": [CAPACITY]})
                made.values["aneuron"] = [found["Samples per second"]]
            if bridge.errors:
                made.fails["aneuron"] = reason(bridge.errors[0])
            rows.append(made)
    finally:
        await contender.stop()
    return rows


def _test(bridge: Bridge, scenario: str, capacity: float, seconds: float) -> dict[str, float]:
    """Run one test, in this thread and LoadGen's own; the numbers of its summary."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1e3)
    settings.min_query_count = 1
    settings.server_target_qps = LOAD * capacity
    settings.server_target_latency_ns = int(50e6)
    settings.offline_expected_qps = capacity
    logs = lg.LogSettings()
    logs.enable_trace = False
    with tempfile.TemporaryDirectory() as folder:
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False
        system = lg.ConstructSUT(bridge.issue, lambda: None)
        library = lg.ConstructQSL(SAMPLES, SAMPLES, lambda indices: None, lambda indices: None)
        try:
            lg.StartTestWithLogSettings(system, library, settings, logs, "")
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(system)
        summary = Path(folder, "mlperf_log_summary.txt").read_text()
    return {name: float(value) for name, value in re.findall(r"^(\S.*?) *: ([\d.e+]+)$", summary, re.M)}
