#!/usr/bin/env bash
# What one sets in torch._dynamo.config holds in the thread that set it only: in a thread of an executor torch.compile
# still stops at eight programs.
# Library: torch 2.13.0, Python 3.11.
# Guess: a setting of a module is the process's; set at start, it holds in every thread.
# Happens: a value that is set is kept in a ContextVar, which a new thread begins without. There the default holds: the
#   ninth shape runs as Python, with a warning, or raises with fullgraph=True. `torch._dynamo.config.recompile_limit` reads
#   100 in the main thread and 8 in the other. asyncio.to_thread, which copies the context, has the setting;
#   loop.run_in_executor has not.
# Who meets it: a service that raises the limit at import and compiles in worker threads. Say it where it is called:
#   torch.compile(..., recompile_limit=100), or set it in each thread.
# Seen: main thread limit 100, 12 of 12 compiled; to_thread the same; run_in_executor limit 8, 8 of 12
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import asyncio
import logging

import torch
import torch._dynamo

logging.disable(logging.WARNING)
compiled = []


def count(graph, example):
    compiled.append(1)
    return graph.forward


def programs(**options):
    torch._dynamo.reset()
    compiled.clear()
    square = torch.compile(lambda x: x * x, backend=count, dynamic=False, **options)
    for rows in range(2, 14):
        square(torch.ones(rows))
    return torch._dynamo.config.recompile_limit, len(compiled)


async def main():
    seen = {
        "main": programs(),
        "to_thread": await asyncio.to_thread(programs),
        "run_in_executor": await asyncio.get_running_loop().run_in_executor(None, programs),
        "an argument": await asyncio.get_running_loop().run_in_executor(None, lambda: programs(recompile_limit=100)),
    }
    for where, (limit, number) in seen.items():
        print(where, "limit", limit, "compiled", number, "of 12")
    assert seen["main"] == seen["to_thread"] == (100, 12)
    assert seen["run_in_executor"] == (8, 8)
    assert seen["an argument"] == (8, 12)


torch._dynamo.config.recompile_limit = 100
asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
