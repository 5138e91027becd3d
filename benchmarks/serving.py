"""`python -m benchmarks.serving`: the HTTP servers that `aneuron serve` might use, with the same bare handler.

Lives here: the scene, the command line, the table. Must not be here: the client (wrk.py), processes, the handler.
"""

import argparse
import asyncio
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import wrk
from benchmarks.contenders import versions
from benchmarks.processes import Server
from benchmarks.rows import as_json, percentile
from benchmarks.timing import Effort, Seen, Turn, reason, rounds

SERVERS = {
    "aiohttp": "aiohttp",
    "aiohttp, routed": "aiohttp-app",
    "uvicorn": "uvicorn",
    "granian ASGI": "granian-asgi",
    "granian RSGI": "granian-rsgi",
    "granian embedded, ASGI": "embedded-asgi",
    "granian embedded, RSGI": "embedded-rsgi",
    "v2 on aiohttp": "v2-aiohttp",
    "v2 on aiohttp, routed": "v2-aiohttp-app",
    "v2 on uvicorn": "v2-uvicorn",
    "mosec": "mosec",
}
V2_HEAD = (
    b'{"inputs":[{"name":"input0","shape":[1,64],"datatype":"FP32","parameters":{"binary_data_size":256}}],'
    b'"parameters":{"binary_data_output":true}}'
)
PACKAGES = ("aneuron", "uvicorn", "httptools", "granian", "aiohttp", "mosec", "uvloop", "torch")
CONNECTIONS = (1, 32, 256)
SCENE = {"cores": 4, "batch": 8, "seconds": 0.005, "features": 64}
YARDSTICK = "aiohttp"

CAVEATS = """
One bare handler, on every server but the last ones, that awaits aneuron's model on four simulated cores of 5 ms and
cancels its call if the client leaves. A row is 64 float32 numbers, raw bytes in and out; of "v2" the Open Inference
Protocol, JSON before the bytes. mosec has a process a core and its window of 10 ms. Servers are processes of their
own with one worker each, on uvloop; they take turns, another one first each time, while the others are stopped.
Medians of {repetitions} repetitions of {seconds} s; x is beside "{yardstick}", the median of the repetitions' ratios.
us of CPU are all that a server's processes used, for each answer.
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS), metavar="NAME",
                        help=f"of {', '.join(map(repr, SERVERS))}")  # fmt: skip
    parser.add_argument("--connections", nargs="+", type=int, default=CONNECTIONS, help="1 32 256")
    parser.add_argument("--seconds", type=int, default=2, help="of one turn (2)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each (5)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="for the figures, as JSON")
    args = parser.parse_args(argv)
    args.load = os.getloadavg()[0]
    return args


async def look(server: Server, connections: int, seconds: int) -> Turn:
    """One turn of a server, at that load."""
    server.resume()
    try:
        cpu = server.cpu()
        seen = await wrk.load(server.url, connections, seconds, server.features, server.head)
        cpu = server.cpu() - cpu
    finally:
        server.pause()
    if seen.failed or seen.refused:
        raise RuntimeError(f"{seen.failed} requests failed, {seen.refused} were refused")
    return Turn(seen.answers_per_second, cpu / max(1, len(seen.latencies)), seen.latencies)


def contender(what: str) -> Server:
    """A server, not started."""
    module = "mosec_app" if what == "mosec" else "raw_app"
    server = Server(f"benchmarks.servers.{module}", {**SCENE, "server": what})
    if what.startswith("v2"):
        server.url = server.url.replace("/predict", "/v2/models/net/infer")
        server.head = V2_HEAD
    return server


async def measure(args: argparse.Namespace) -> dict[int, Seen]:
    """What was seen of each server at each number of connections."""
    contenders = {name: contender(SERVERS[name]) for name in args.only}
    fails: dict[str, str] = {}
    found: dict[int, Seen] = {}
    try:
        for name, server in contenders.items():
            print(f"starting {name}", file=sys.stderr, flush=True)
            await server.start()
            try:
                await server.wait_until_right()
            except* Exception as error:
                fails[name] = reason(error)
            server.pause()
        able = {name: server for name, server in contenders.items() if name not in fails}
        for connections in args.connections:
            print(f"{connections:,} connections", file=sys.stderr, flush=True)
            effort = Effort(args.seconds, args.repetitions, 1)
            seen = await rounds(able, effort, lambda server: look(server, connections, args.seconds))  # noqa: B023 - called at once
            found[connections] = replace(seen, fails={**fails, **seen.fails})
    finally:
        for server in contenders.values():
            await server.stop()
    return found


def table(found: dict[int, Seen]) -> str:
    """A line for each server at each load, for Markdown."""
    lines = [
        "| connections | server | answers/s | x | p50 ms | p99 ms | us of CPU |",
        "| ---: | --- " + "| ---: " * 5 + "|",
    ]
    for connections, seen in found.items():
        beside = seen.turns.get(YARDSTICK, [])
        for name, turns in seen.turns.items():
            rates = [turn.rows_per_second for turn in turns]
            ratios = [rate / turn.rows_per_second for rate, turn in zip(rates, beside, strict=False)]
            ratio = f"{median(ratios):.2f}" if ratios else ""
            p50, p99 = (median(percentile(turn.latencies, part) * 1e3 for turn in turns) for part in (0.5, 0.99))
            cpu = median(turn.cpu_per_row for turn in turns) * 1e6
            lines.append(
                f"| {connections} | {name} | {median(rates):,.0f} | {ratio} | {p50:.1f} | {p99:.1f} | {cpu:.0f} |"
            )
        lines += [f"| {connections} | {name} | fails: {why} | | | | |" for name, why in seen.fails.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if not wrk.there() or not Path("/proc/self/smaps_rollup").exists():
        sys.exit("this benchmark needs Linux and wrk (Debian's package of that name)")
    found = asyncio.run(measure(args))
    said = " ".join(CAVEATS.split()).format(yardstick=YARDSTICK, repetitions=args.repetitions, seconds=args.seconds)
    around = versions(
        "aneuron", "uvicorn", "httptools", "granian", "aiohttp", "mosec", "uvloop", "torch", load=args.load
    )
    with_versions = ", ".join(f"{name} {number}" for name, number in around.items())
    print(f"{table(found)}\n\n{textwrap.fill(with_versions, 120)}\n\n{textwrap.fill(said, 120)}")
    if args.results is not None:
        seen = {connections: as_json(seen) for connections, seen in found.items()}
        args.results.write_text(json.dumps({"versions": around, "seen": seen}, indent=1) + "\n")


if __name__ == "__main__":
    main()
