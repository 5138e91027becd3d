"""The servers of the HTTP benchmark as processes: started, checked, paused while others have their turn, stopped.

Lives here: processes and their memory. Must not be here: the load, what a server does.
"""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.floors import FEATURES, model
from benchmarks.timing import WrongAnswer
from benchmarks.wrk import REFUSALS

START = 120.0  # seconds within which a server must answer
STOP = 10.0
CALLERS, CALLS = 32, 8  # that check a server before it is measured


class Server:
    """One server, with all its processes in a session of their own."""

    def __init__(self, module: str, settings: Mapping[str, object]) -> None:
        self.module = module
        self.features = int(str(settings.get("features", FEATURES)))
        self.head = b""  # JSON that goes before each row, by the Open Inference Protocol; an answer ends with its row
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}/predict"
        values = {"port": self.port, **settings}
        self._environment = {f"BENCHMARK_{name.upper()}": str(value) for name, value in values.items()}
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it; it answers some time later."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until it is stopped
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self.module, cwd=Path(__file__).parents[1], env={**os.environ, **self._environment},
            stdin=asyncio.subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
        )  # fmt: skip

    async def wait_until_right(self) -> None:
        """Wait for it, and let callers on connections of their own compare each answer with the right one.

        It is warm after that. Raises `WrongAnswer`, or `RuntimeError` with what the server last said.
        """
        try:
            async with asyncio.timeout(START), aiohttp.ClientSession() as session:
                while not await self._answers(session):
                    if self.process is not None and self.process.returncode is not None:
                        raise RuntimeError(f"it ended with {self.process.returncode}: {self.said()}")
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise RuntimeError(f"no answer within {START:g} s: {self.said()}") from None
        connector = aiohttp.TCPConnector(limit=CALLERS)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(self._check(session, caller))

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with self._post(session, bytes(4 * self.features)) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def _check(self, session: aiohttp.ClientSession, caller: int) -> None:
        for _ in range(CALLS):
            x = torch.full((1, self.features), float(caller)) + torch.rand(1, self.features)
            async with self._post(session, x.numpy().tobytes()) as response:
                body = await response.read()
                if response.status in REFUSALS:
                    continue
            if (body[-4 * self.features :] if self.head else body) != model(x).numpy().tobytes():
                raise WrongAnswer(f"status {response.status} to caller {caller}: {body[:80]!r}")

    def _post(self, session: aiohttp.ClientSession, row: bytes) -> Any:
        headers = {"Inference-Header-Content-Length": str(len(self.head))} if self.head else {}
        return session.post(self.url, data=self.head + row, headers=headers)

    def pause(self) -> None:
        """Take its turn away: some poll while they have nothing to do."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run."""
        self._signal(signal.SIGCONT)

    def memory(self) -> float:
        """Resident bytes of all its processes, what they share counted once; NaN where the system does not say."""
        try:
            return sum(map(_memory, self._processes()))
        except OSError:
            return float("nan")

    def cpu(self) -> float:
        """Seconds of CPU that all its processes have used."""
        return sum(map(_cpu, self._processes()))

    def said(self) -> str:
        """The end of its output."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-800:]

    async def stop(self) -> None:
        """As a supervisor does: SIGTERM, and after some time SIGKILL for what is left of it."""
        if self.process is None:
            return
        self.resume()
        if self.process.returncode is None:
            self.process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP)
        self._signal(signal.SIGKILL)
        await self.process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in list(self._processes()):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _processes(self) -> Iterator[int]:
        """Those of its session."""
        if self.process is None:
            return
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid:
                    yield int(entry.name)
            except ProcessLookupError:
                continue


def _memory(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError):
        return 0.0  # it has ended
    return sum(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("Pss:"))


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (ProcessLookupError, FileNotFoundError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
