#!/usr/bin/env bash
# `asyncio.timeout` around `anyio.to_thread.run_sync` leaves at once and gives the limiter's token back while the thread
# works on; `anyio.fail_after` waits for the thread and then does not even raise.
# Library: anyio 4.16.0, Python 3.11.
# Guess: with abandon_on_cancel=False (the default) every cancellation waits for the thread, and the limiter counts threads.
# Happens: the shield holds against anyio's scopes only. A native cancellation (asyncio.timeout, task.cancel(), a
#   server that cancels) abandons the thread; five cancelled calls under CapacityLimiter(1) run five threads at once.
# Who meets it: Starlette and FastAPI run sync handlers so, with 40 tokens: under timeouts more threads than that compute.
# Seen: CapacityLimiter(1), 5 calls timed out: 5 threads at once, 0 tokens borrowed; fail_after: "done", no error
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'anyio==4.16.0'

cat >"$dir/check.py" <<'PY'
import asyncio
import threading

import anyio
import anyio.to_thread

release = threading.Event()
lock = threading.Lock()
running = 0


def work():
    global running
    with lock:
        running += 1
    release.wait()
    return "done"


async def main():
    limiter = anyio.CapacityLimiter(1)
    for number in range(1, 6):
        try:
            async with asyncio.timeout(0.05):
                await anyio.to_thread.run_sync(work, limiter=limiter)
        except TimeoutError:
            pass
        else:
            raise AssertionError("the thread was waited for")
        while running < number:  # each has a thread of its own, in spite of the limit of one
            await asyncio.sleep(0.01)
    print("threads at once", running, "tokens borrowed", limiter.borrowed_tokens)
    assert running == 5 and limiter.borrowed_tokens == 0

    release.clear()
    asyncio.get_running_loop().call_later(0.5, release.set)
    with anyio.fail_after(0.05) as scope:
        answer = await anyio.to_thread.run_sync(work, limiter=limiter)
    print("fail_after:", answer, "cancel called", scope.cancel_called)
    assert answer == "done" and scope.cancel_called


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
