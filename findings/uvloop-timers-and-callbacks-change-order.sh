#!/usr/bin/env bash
# uvloop runs `call_later(0)` before an earlier-due `call_soon`, and timers of one millisecond in an order of its own.
# Library: uvloop 0.23.0, Python 3.11, Linux.
# Guess (from memory, noted after a first look): the same order as asyncio: ready callbacks first, timers by their time.
# Happens: `call_later(0, ...)` is `call_soon`; of timers for 10.2, 10.1 and 10.0 ms after one another the one set
#   first runs first, since times are rounded to whole milliseconds. asyncio: by time.
# Who meets it: batching windows and deadlines that differ by less than a millisecond, and tests of them.
# Seen: asyncio soon, later0, 10.0, 10.1, 10.2; uvloop later0, soon, 10.2, 10.1, 10.0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'uvloop==0.23.0'

cat >"$dir/check.py" <<'PY'
import asyncio

import uvloop


async def order():
    loop = asyncio.get_running_loop()
    seen = []
    loop.call_later(0, seen.append, "later0")
    loop.call_soon(seen.append, "soon")
    await asyncio.sleep(0.01)
    while True:  # not across a tick of uvloop's clock
        names = []
        start = loop.time()
        for delay in ("10.2", "10.1", "10.0"):
            loop.call_later(float(delay) / 1000, names.append, delay)
        same_tick = loop.time() - start < 0.0001
        await asyncio.sleep(0.05)
        if same_tick:
            return seen + names


plain, uv = asyncio.run(order()), uvloop.run(order())
print("asyncio", *plain)
print("uvloop ", *uv)
assert plain == ["soon", "later0", "10.0", "10.1", "10.2"]
assert uv == ["later0", "soon", "10.2", "10.1", "10.0"]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
