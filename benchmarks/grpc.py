"""`python -m benchmarks.grpc`: the Open Inference Protocol over gRPC, aneuron beside MLServer.

`python -m benchmarks.grpc client PORT CALLERS SECONDS` is the client, a process of its own.

Lives here: the client, the turns, the table. Must not be here: servers (servers/).
"""

import argparse
import asyncio
import itertools
import os
import re
import struct
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np

from aneuron.web.v2.messages import SERVICE, message
from benchmarks.contenders import versions
from benchmarks.processes import START, Server
from benchmarks.timing import Effort, Seen, Turn, WrongAnswer, rounds

FEATURES = 64
CALLERS = (1, 32, 256)
CHANNELS = 8
SCENE = {"cores": 4, "batch": 8, "seconds": 0.005, "features": FEATURES}
FOLDER = Path(__file__).parents[1]


class Grpc(Server):
    """A server that is asked by gRPC. `python`: what runs it; None: this one."""

    def __init__(self, module: str, python: str | None = None) -> None:
        super().__init__(module, SCENE)
        self._python = python

    async def start(self) -> None:
        if self._python is None:
            await super().start()
            return
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - until it is stopped
        path = FOLDER / "benchmarks" / "servers" / f"{self.module}.py"
        self.process = await asyncio.create_subprocess_exec(
            self._python, str(path), cwd=path.parent, env={**os.environ, **self._environment},
            stdin=asyncio.subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    async def check(self, callers: int, seconds: float) -> None:
        """Have each answer of so many callers compared with the right one; it is warm after that."""
        command = [sys.executable, "-m", "benchmarks.grpc", "client", str(self.port), str(callers), str(seconds)]
        client = await asyncio.create_subprocess_exec(*command, cwd=FOLDER)
        if await client.wait():
            raise RuntimeError(f"the client ended with {client.returncode}; {self.said()}")

    async def turn(self, callers: int, seconds: float, request: str) -> Turn:
        """What h2load has seen of it, from so many connections with one request each: it costs less than Python."""
        command = ["h2load", "--clients", str(callers), "--max-concurrent-streams", "1", "--duration", str(seconds)]
        command += ["--data", str(request), "--header", "content-type: application/grpc", "--header", "te: trailers"]
        url = f"http://127.0.0.1:{self.port}/{SERVICE}/ModelInfer"
        self.resume()
        try:
            cpu = self.cpu()
            load = await asyncio.create_subprocess_exec(*command, url, stdout=asyncio.subprocess.PIPE)
            said = (await load.communicate())[0].decode()
            cpu = self.cpu() - cpu
        finally:
            self.pause()
        answers = int(_one(r"(\d+) 2xx", said))
        size = float(_one(r"\((\d+)\) data", said)) / max(1, answers)
        if int(_one(r"(\d+) failed", said)) or size < 4 * FEATURES:
            raise RuntimeError(f"not every request was answered: {said}")
        return Turn(answers / seconds, cpu / answers)


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"h2load said no {pattern}: {text}")
    return found[1]


def framed(number: float) -> tuple[Any, bytes]:
    """A request for one row, and the same as it goes over the wire."""
    row = np.arange(FEATURES, dtype=np.float32) + number
    asked = message("ModelInferRequest")(model_name="net", raw_input_contents=[row.tobytes()])
    asked.inputs.add(name="input0", datatype="FP32", shape=[1, FEATURES])
    data = asked.SerializeToString()
    return asked, struct.pack(">BI", 0, len(data)) + data


async def client(port: int, callers: int, seconds: float) -> None:
    """Keep so many calls going; each answer is compared with its row's."""
    request, response = message("ModelInferRequest"), message("ModelInferResponse")
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(min(CHANNELS, callers))
    ]
    method = f"/{SERVICE}/ModelInfer"
    calls = [channel.unary_unary(method, request.SerializeToString, response.FromString) for channel in channels]
    until = time.perf_counter() + START

    async def caller(number: int) -> None:
        for turn in itertools.count():
            if time.perf_counter() > until:
                return
            asked, _ = framed(number + turn % 100 * 1000)
            answer = await calls[number % len(calls)](asked, timeout=60)
            row = np.frombuffer(asked.raw_input_contents[0], np.float32)
            if answer.raw_output_contents:
                y = np.frombuffer(answer.raw_output_contents[0], np.float32)
            else:
                y = np.array(answer.outputs[0].contents.fp32_contents, np.float32)
            if not np.array_equal(y, row * 2 + 1):
                raise WrongAnswer(f"{y} for {row}")

    for call in calls:  # until it has started
        while True:
            try:
                await call(framed(0)[0], wait_for_ready=True, timeout=60)
                break
            except grpc.aio.AioRpcError:
                if time.perf_counter() > until:
                    raise
                await asyncio.sleep(0.2)
    until = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(caller(number))
    for channel in channels:
        await channel.close()


async def measure(args: argparse.Namespace) -> dict[int, Seen]:
    """What was seen of each server at each number of connections."""
    servers = {"aneuron": Grpc("benchmarks.servers.grpc_app")}
    if args.mlserver:
        servers["MLServer"] = Grpc("mlserver_app", args.mlserver)
    effort, found = Effort(args.seconds, args.repetitions, 1), {}
    request = tempfile.NamedTemporaryFile()  # noqa: SIM115 - until this ends
    request.write(framed(1)[1])
    request.flush()
    try:
        for server in servers.values():
            await server.start()
        for server in servers.values():
            await server.check(32, 1)
            server.pause()
        for callers in CALLERS:
            found[callers] = await rounds(
                servers, effort, lambda server: server.turn(callers, args.seconds, request.name)  # noqa: B023 - called at once
            )  # fmt: skip
    finally:
        for server in servers.values():
            await server.stop()
    return found


def table(found: dict[int, Seen]) -> str:
    """A line for each server at each load; the ratio is beside the last of them, turn by turn."""
    lines = []
    for callers, seen in found.items():
        last = next(reversed(seen.turns), None)
        for name, turns in seen.turns.items():
            rates = [turn.rows_per_second for turn in turns]
            beside = [rate / other.rows_per_second for rate, other in zip(rates, seen.turns[last], strict=True)]
            ms = callers / median(rates) * 1e3
            us = median(turn.cpu_per_row for turn in turns) * 1e6
            lines.append(
                f"{callers:4} connections  {name:9} {median(rates):7.0f} answers/s  {ms:6.1f} ms  {us:6.0f} us of CPU  "
                f"{median(beside):.2f}x {last} ({min(beside):.2f} to {max(beside):.2f})"
            )
        lines += [f"{callers:4} connections  {name:9} fails: {why}" for name, why in seen.fails.items()]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["client"]:
        import uvloop

        uvloop.run(client(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpc", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mlserver", metavar="PYTHON", help="of an environment that has mlserver: its pins exclude ours"
    )
    parser.add_argument("--seconds", type=int, default=3, help="of one turn (3)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each (5)")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(table(asyncio.run(measure(args))))
    print(", ".join(f"{name} {number}" for name, number in versions("aneuron", "grpcio", "torch", load=load).items()))


if __name__ == "__main__":
    main()
