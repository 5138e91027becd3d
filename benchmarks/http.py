"""`python -m benchmarks.http`: aneuron in web apps, beside the same apps without it and beside servers of models.

Lives here: the scenes, the bounds, the command line. Must not be here: the client (wrk.py), processes, servers.
"""

import argparse
import asyncio
import json
import os
import sys
import textwrap
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import TypeVar

from benchmarks import table, wrk
from benchmarks.contenders import installed, versions
from benchmarks.processes import CALLERS, Server
from benchmarks.rows import Row, above, as_json, at_least, at_most, percentile, row
from benchmarks.timing import Effort, Seen, Turn, reason, rounds

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
FRAMEWORKS = {"FastAPI": "fastapi_app", "aiohttp": "aiohttp_app"}
BEHIND = ("floor", "aneuron", "executor")
PEERS = {"LitServe": "litserve_app", "mosec": "mosec_app"}
CONNECTIONS = (1, 32, 256, 1024)
SCENE = {"cores": 4, "batch": 8, "seconds": 0.005}
OVERLOAD = {"cores": 1, "batch": 8, "seconds": 0.02, "max_pending": 16}
OVERLOAD_CONNECTIONS = 256
SETTLE = 0.3  # seconds for a server to notice that its callers have left

CAVEATS = """
Servers are processes of their own on the machine that the client runs on, one at a time, in turns; the others are
stopped meanwhile. The client is wrk with one thread: each connection asks again as soon as it has its answer, also
after a refusal. Values are medians of {repetitions} repetitions of {seconds:g} s. p50 and p99 are of right answers, in
ms; refused are 503 and 429; failed are other statuses, broken connections and answers that did not come. MB are
resident, of all processes of a server, what they share counted once. Every answer is compared with those that are
waited for; that each caller gets its own is checked on {callers} connections before. The times of 503 under overload
are those of one more caller, who asks again after 20 ms.

"executor" is one run_in_executor for each request, on as many threads as there are cores, without packing. All cores
are simulated: each sleeps for its service time, and the ideal is that of this machine. Each server takes the row as
raw bytes. LitServe and mosec have a process for each core, and the window of 10 ms that their documentation shows.
"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    names = [*FRAMEWORKS, *PEERS, "overload"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one second a turn, once; not worth quoting")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--behind", nargs="+", choices=BEHIND, default=BEHIND, help=f"of {', '.join(BEHIND)}")
    parser.add_argument("--connections", nargs="+", type=int, default=CONNECTIONS, help="1 32 256 1024")
    parser.add_argument("--seconds", type=int, help="of one turn (4; quick: 1)")
    parser.add_argument("--repetitions", type=int, help="of each row (5; quick: 1)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="for numbers and table; a whole run that is not "
                        "quick writes to benchmarks/results")  # fmt: skip
    args = parser.parse_args(argv)
    if args.results is None and not (args.quick or args.only):
        args.results = RESULTS
    args.only = args.only or names
    args.seconds = args.seconds or (1 if args.quick else 4)
    args.repetitions = args.repetitions or (1 if args.quick else 5)
    args.load = os.getloadavg()[0]
    return args


def say(text: str) -> None:
    """What is going on, for who waits."""
    print(text, file=sys.stderr, flush=True)


def servers(only: Iterable[str], behind: Iterable[str], settings: Mapping[str, object]) -> dict[str, Server]:
    """Those that were asked for and are installed."""
    modules = {
        f"{framework} {what}": (module, what)
        for framework, module in FRAMEWORKS.items()
        for what in behind
        if framework in only and installed(framework)
    }
    modules |= {peer: (module, "") for peer, module in PEERS.items() if peer in only and installed(peer)}
    return {
        name: Server(f"benchmarks.servers.{module}", {**settings, "behind": what})
        for name, (module, what) in modules.items()
    }


@asynccontextmanager
async def started(contenders: Mapping[str, Server]) -> AsyncIterator[dict[str, str]]:
    """All of them, checked, warm and stopped for now; why some are out."""
    fails: dict[str, str] = {}
    try:
        for server in contenders.values():
            await server.start()
        for name, server in contenders.items():
            say(f"waiting for {name}")
            try:
                await server.wait_until_right()
            except* Exception as error:
                fails[name] = reason(error)
            server.pause()
        yield fails
    finally:
        for server in contenders.values():
            await server.stop()


async def look(server: Server, connections: int, seconds: float, refusals: bool = False) -> Turn:
    """One turn of a server, at that load; with the times of refusals or without."""
    with _running(server):
        if refusals:
            seen, times = await _with_one_more(server, connections, seconds)
        else:
            seen, times = await wrk.load(server.url, connections, seconds), []
        memory = server.memory()
        await asyncio.sleep(SETTLE)
    more = {"MB": memory / 1e6, "failed": seen.failed, "refused": seen.refused / seen.seconds}
    more |= {f"refused p{part}": percentile(times, part / 100) * 1e3 for part in (50, 99)}
    return Turn(seen.answers_per_second, latencies=seen.latencies, more=more)


async def _with_one_more(server: Server, connections: int, seconds: float) -> tuple[wrk.Seen, list[float]]:
    times: list[float] = []

    async def collect() -> None:
        async with aclosing(wrk.refusals(server.url)) as refusals:
            async for took in refusals:
                times.append(took)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(collect())
        seen = await wrk.load(server.url, connections, seconds)
        task.cancel()
    return seen, times


@contextmanager
def _running(server: Server) -> Iterator[None]:
    server.resume()
    try:
        yield
    finally:
        server.pause()


async def loads(args: argparse.Namespace) -> list[tuple[str, Seen]]:
    """What was seen of each server at each load."""
    effort, scenes = Effort(args.seconds, args.repetitions, 1), []
    contenders = servers(args.only, args.behind, SCENE)
    if not contenders:
        return []
    async with started(contenders) as fails:
        for connections in args.connections:
            say(f"{connections:,} connections")
            scenes.append((f"{connections:,}", await _seen(contenders, fails, effort, connections, SCENE["seconds"])))
    return scenes


async def overload(args: argparse.Namespace) -> list[tuple[str, Seen]]:
    """256 connections that ask again at once, for a core that may let 16 rows wait."""
    if "overload" not in args.only or "aneuron" not in args.behind:
        return []
    effort = Effort(args.seconds, args.repetitions, 1)
    contenders = servers(FRAMEWORKS, ["aneuron"], OVERLOAD)
    async with started(contenders) as fails:
        say("overload")
        seen = await _seen(contenders, fails, effort, OVERLOAD_CONNECTIONS, OVERLOAD["seconds"], refusals=True)
    return [("overload", seen)]


async def _seen(
    contenders: Mapping[str, Server], fails: dict[str, str], effort: Effort, connections: int, service: float,
    refusals: bool = False,
) -> Seen:  # fmt: skip
    able = {name: server for name, server in contenders.items() if name not in fails}
    seen = await rounds(able, effort, lambda server: look(server, connections, effort.seconds, refusals), service)
    fails |= seen.fails  # whoever is out once stays out: its answers were wrong, or it is not there any more
    seen.fails.update(fails)
    return seen


def compared(scenes: list[tuple[str, Seen]]) -> list[Row]:
    """The rows with bounds: answers/s, what a lone caller waits, and overload."""
    rows: list[Row] = []
    for scene, seen in scenes:
        for framework in FRAMEWORKS:
            own = _of(seen, framework)
            if "aneuron" not in {**own.turns, **own.fails}:
                continue
            if scene == "overload":
                rows += _overload(framework, own)
                continue
            name = f"{framework}, {scene:>5}"
            must, goal = at_least(0.9), GOALS.get((framework, scene))
            rows.append(row(name, "answers/s", own, lambda turn: turn.rows_per_second, must, goal,
                            lambda sleep: SCENE["cores"] * SCENE["batch"] / SCENE["seconds"]))  # fmt: skip
            if (framework, scene) in (("aiohttp", "32"), ("aiohttp", "256")):
                beside = at_least(1.0, "mosec")
                rows.append(row(f"{name}, > mosec", "answers/s", own, lambda turn: turn.rows_per_second, beside))
            if scene == "1":
                rows[-1].values.pop("ideal")  # one caller cannot fill a batch
                rows.append(row(name, "p50 ms", own, lambda turn: percentile(turn.latencies, 0.5) * 1e3,
                                above(1.5, "ideal"), ideal=lambda sleep: sleep * 1e3))  # fmt: skip
    return rows


GOALS = {
    ("FastAPI", "32"): at_least(2.0, "LitServe"),
    ("FastAPI", "256"): at_least(1.3, "LitServe"),
    ("aiohttp", "32"): at_least(0.97),
    ("aiohttp", "256"): at_least(0.97),
}


def _of(seen: Seen, framework: str) -> Seen:
    """What was seen of one framework's apps, by what is behind them, and of the peers."""

    def mine(every: Mapping[str, T]) -> dict[str, T]:
        return {
            name.removeprefix(f"{framework} "): one
            for name, one in every.items()
            if name.startswith(framework) or name in PEERS
        }

    return Seen(mine(seen.turns), mine(seen.fails), seen.sleeps)


def _overload(framework: str, own: Seen) -> list[Row]:
    name = f"{framework}, overload"
    return [
        row(name, "answers/s", own, lambda turn: turn.rows_per_second, at_least(0.95, "ideal"),
            ideal=lambda sleep: OVERLOAD["cores"] * OVERLOAD["batch"] / OVERLOAD["seconds"]),
        row(name, "p99 ms", own, lambda turn: percentile(turn.latencies, 0.99) * 1e3, at_most(150, None)),
        row(name, "503, p50 ms", own, lambda turn: turn.more["refused p50"]),
        row(name, "503, p99 ms", own, lambda turn: turn.more["refused p99"]),
    ]  # fmt: skip


COLUMNS = ("connections", "server", "answers/s", "p50 ms", "p99 ms", "refused/s", "failed", "MB")


def everything(scenes: list[tuple[str, Seen]]) -> str:
    """A line for each server at each load; who failed says so."""
    lines = [COLUMNS]
    for scene, seen in scenes:
        for name, turns in seen.turns.items():
            values = (
                median(turn.rows_per_second for turn in turns),
                *(median(percentile(turn.latencies, part) * 1e3 for turn in turns) for part in (0.5, 0.99)),
                *(median(turn.more[what] for turn in turns) for what in ("refused", "failed", "MB")),
            )
            lines.append((scene, name, *map(_number, values)))
        lines += [(scene, name, "fails", "", "", "", "", "") for name in seen.fails]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [
        "  ".join(cell.ljust(width) if column == 1 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:.3g}"


def report(args: argparse.Namespace, scenes: list[tuple[str, Seen]], rows: list[Row]) -> str:
    said = CAVEATS.format(repetitions=args.repetitions, seconds=args.seconds, callers=CALLERS)
    caveats = "\n\n".join(textwrap.fill(paragraph, 120) for paragraph in said.strip().split("\n\n"))
    with_versions = textwrap.fill(", ".join(f"{name} {number}" for name, number in around(args).items()), 120)
    return "\n\n".join([everything(scenes), table.table(rows), with_versions, caveats])


def around(args: argparse.Namespace) -> dict[str, str]:
    return versions("aneuron", "fastapi", "starlette", "uvicorn", "aiohttp", "uvloop", "httptools", "litserve", "mosec",
                    "torch", load=args.load)  # fmt: skip


def write(args: argparse.Namespace, scenes: list[tuple[str, Seen]], rows: list[Row], text: str) -> None:
    """http.json and http.txt."""
    args.results.mkdir(parents=True, exist_ok=True)
    seen = {scene: as_json(seen) for scene, seen in scenes}
    settings = {name: getattr(args, name) for name in ("seconds", "repetitions", "connections")}
    data = {"versions": around(args), "settings": settings, "seen": seen, "rows": [one.as_json() for one in rows]}
    (args.results / "http.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.results / "http.txt").write_text(text + "\n")


async def measure(args: argparse.Namespace) -> list[tuple[str, Seen]]:
    return [*await loads(args), *await overload(args)]


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if not wrk.there() or not Path("/proc/self/smaps_rollup").exists():
        sys.exit("this benchmark needs Linux and wrk (Debian's package of that name)")
    scenes = asyncio.run(measure(args))
    rows = compared(scenes)
    text = report(args, scenes, rows)
    print(text)
    if args.results is not None:
        write(args, scenes, rows, text)


if __name__ == "__main__":
    main()
