"""`make soak`: mixed traffic at 120 % of capacity with 1 % faults on simulated cores; prints what it came to.

`python tests/chaos/soak.py --seconds 60` takes a minute; with `--engines 2 --kill-every 2` the cores are in so many
processes, of which one is killed that often. Leaves with 1 if an answer is wrong or lost.
"""

import argparse
import asyncio
import logging
import os
import random
import signal
import sys
import threading
import time
from collections import Counter

import torch
from callers import SERVING, BadRowError, model_of

from aneuron import AsyncDataParallel, CoreFailed, NoHealthyCores, Pool, QueueFull, SimulatedBackend
from aneuron.backends.simulated import SimulatedFault

CORES, BATCH, SERVICE, LOAD = 4, 8, 0.02, 1.2
BAD = 0.003  # of the calls, about three of which share an execution: with the cores' own, 1 % of executions fail


def rss():
    """MB of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


class Soak:
    def __init__(self, engines=None, kill_every=None):
        self.kill_every, self.kills = kill_every, 0
        fault = SimulatedBackend.fault
        settings = {"batch_size": BATCH, "max_pending": 256, "exec_timeout": 0.25, "example_inputs": torch.ones(8, 2)}
        faults = [fault("core", probability=0.0002), fault("hang", probability=0.0001, seconds=2.0)]
        self.pool = Pool(backend=SimulatedBackend(CORES, SERVICE, faults=faults), processes=engines)
        self.model = AsyncDataParallel(model_of, pool=self.pool, **settings)
        self.fates, self.seconds = Counter(), []
        self.rows = self.core_seconds = 0.0

    async def one(self, number, rows, bad):
        x = (torch.arange(rows) + 64 * number % 2**20).float()[:, None].repeat(1, 2)
        if bad:
            x[0] = -1
        begin = time.monotonic()
        try:
            y = await self.model(x)
            fate = "answer" if torch.equal(y, x * 2 + 1) and not bad else "wrong"
        except BadRowError:
            fate = "bad" if bad else "wrong"
        except QueueFull:
            fate = "refused"
        except NoHealthyCores:
            fate = "none"
        except (CoreFailed, SimulatedFault):
            fate = "core"
        if fate == "answer":
            self.rows += rows
            self.seconds.append(time.monotonic() - begin)
        self.fates[fate] += 1

    async def traffic(self, until):
        """Calls of 1 to 30 rows, a few of them bad, as they come: nobody waits for an answer before the next."""
        tasks, number, due = set(), 0, time.monotonic()
        rate = LOAD * CORES * BATCH / SERVICE  # rows a second
        while time.monotonic() < until:
            while due < time.monotonic():
                rows = random.choice([1, 1, 1, 1, 2, 8, 30])
                task = asyncio.ensure_future(self.one(number, rows, random.random() < BAD))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
                due += rows * random.expovariate(rate)
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
        return number

    async def capacity(self):
        """The seconds that cores have been in service."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.02)
            now = time.monotonic()
            if engines := self.pool.statistics().engines:
                cores = sum(len(engine.cores) for engine in engines if engine.state == "ready")
            else:
                cores = sum(core.state in SERVING for core in self.model.statistics().cores)
            self.core_seconds, last = self.core_seconds + cores * (now - last), now

    async def kill(self):
        """End an engine every now and then, as the system does that is out of memory."""
        while self.kill_every:
            await asyncio.sleep(self.kill_every)
            running = [engine.pid for engine in self.pool.statistics().engines if engine.pid is not None]
            if running:
                os.kill(random.choice(running), signal.SIGKILL)
                self.kills += 1

    def busy(self):
        """Seconds that cores have executed."""
        return sum(core.busy_seconds for core in self.model.statistics().cores)

    async def run(self, seconds):
        async with self.model:
            await self.traffic(time.monotonic() + min(5.0, seconds / 4))  # warm: allocators and pools have grown
            self.fates.clear()
            self.seconds.clear()
            self.rows, rss_before, threads = 0.0, rss(), threading.active_count()
            busy_before = self.busy()
            beside = [asyncio.ensure_future(each) for each in (self.capacity(), self.kill())]
            sent = await self.traffic(time.monotonic() + seconds)
            for each in beside:
                each.cancel()
            after = rss()
            threads_after = threading.active_count()
            self.restarts = [engine.restarts for engine in self.pool.statistics().engines]
        possible = self.core_seconds * BATCH / SERVICE
        self.seconds.sort()
        p50, p99, p999 = (1e3 * self.seconds[int(len(self.seconds) * q)] for q in (0.5, 0.99, 0.999))
        errors = sum(core.errors for core in self.model.statistics().cores)
        lost = sent - sum(self.fates.values())
        print(f"{sent} calls in {seconds:g} s: {dict(self.fates)}; {errors} faults of executions; {lost} lost")
        if self.kills:
            print(f"{self.kills} engines killed; restarts: {self.restarts}")
        done, share = self.rows / seconds, self.rows / possible
        cores = self.model.statistics().cores
        busy = (self.busy() - busy_before) / (CORES * seconds)
        print(f"cores executed {busy:.1%} of the time; {sum(core.padded_rows for core in cores)} rows of padding")
        print(f"goodput {done:.0f} rows/s, {share:.1%} of what the cores in service could do")
        print(f"latency p50 {p50:.0f} ms, p99 {p99:.0f} ms, p99.9 {p999:.0f} ms")
        print(f"RSS {rss_before:.0f} -> {after:.0f} MB, threads {threads} -> {threads_after}")
        return not lost and not self.fates["wrong"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--engines", type=int, help="processes that have the cores; without it, this one")
    parser.add_argument("--kill-every", type=float, help="seconds until one of them is killed, again and again")
    said = parser.parse_args()
    if said.kill_every is not None and said.engines is None:
        parser.error("--kill-every kills engines: say --engines too")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.exit(not asyncio.run(Soak(said.engines, said.kill_every).run(said.seconds)))
