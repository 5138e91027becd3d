#!/usr/bin/env bash
# `retry_if_not_exception_type` retries a cancellation: the task cannot be cancelled and `asyncio.timeout` does not fire.
# Library: tenacity 9.2.1, Python 3.11.
# Guess: tenacity retries subclasses of Exception only; CancelledError passes through, as with its default.
# Happens: the predicate is "not one of these types", and CancelledError is not: the call is made again. The caller who
#   cancelled gets a result, a timeout that has expired is swallowed, and the model computes for nobody.
# Who meets it: "retry everything but bad input" around `await model(x)`. Use `retry_if_exception(lambda e:
#   isinstance(e, Exception) and not isinstance(e, ValueError))`.
# Seen: cancelled task: answered, 2 calls; expired timeout: answered, 2 calls; default predicate: CancelledError, 1 call
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'tenacity==9.2.1'

cat >"$dir/check.py" <<'PY'
import asyncio

import tenacity


async def outcome(predicate, how):
    calls = []
    running = asyncio.Event()

    @tenacity.retry(retry=predicate, stop=tenacity.stop_after_attempt(3))
    async def model():
        calls.append(1)
        if len(calls) == 1:
            running.set()
            await asyncio.Event().wait()
        return "answered"

    async def with_timeout():
        async with asyncio.timeout(0.01):
            return await model()

    task = asyncio.create_task(model() if how == "cancel" else with_timeout())
    await running.wait()
    if how == "cancel":
        task.cancel()
    try:
        return await task, len(calls)
    except (asyncio.CancelledError, TimeoutError) as error:
        return type(error).__name__, len(calls)


not_value_error = tenacity.retry_if_not_exception_type(ValueError)
for predicate, how, expected in (
    (not_value_error, "cancel", ("answered", 2)),
    (not_value_error, "timeout", ("answered", 2)),
    (tenacity.retry_if_exception_type(), "cancel", ("CancelledError", 1)),
    (tenacity.retry_if_exception_type(), "timeout", ("TimeoutError", 1)),
):
    seen = asyncio.run(outcome(predicate, how))
    print(type(predicate).__name__, how, *seen)
    assert seen == expected
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
