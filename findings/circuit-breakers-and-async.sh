#!/usr/bin/env bash
# purgatory opens its circuit for callers who leave; pybreaker's decorator never opens on an `async def`.
# Library: purgatory-circuitbreaker 0.7.2, pybreaker 1.4.1, circuitbreaker 2.1.3, Python 3.11.
# Guess: an asyncio breaker does not count CancelledError as a failure; a decorator that accepts an `async def` awaits it.
# Happens: purgatory counts every BaseException: three clients that disconnect or time out close the model for everybody.
#   pybreaker counts the making of the coroutine as a success: ten failures in a row, still closed. circuitbreaker does
#   what one expects in both.
# Who meets it: a breaker around `await model(x)`.
# Seen: cancelled 3 times: purgatory opened, circuitbreaker closed; failed 10 times: pybreaker closed, circuitbreaker opened
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'setuptools==75.8.0' 'purgatory-circuitbreaker==0.7.2' 'pybreaker==1.4.1' 'circuitbreaker==2.1.3'

cat >"$dir/check.py" <<'PY'
import asyncio

import circuitbreaker
import purgatory
import pybreaker


async def model(ok=True):
    await asyncio.sleep(0.05 if ok else 0)
    if not ok:
        raise ValueError("model failed")
    return "answered"


async def leave(call):
    for _ in range(3):
        try:
            async with asyncio.timeout(0.01):
                await call()
        except TimeoutError:
            pass
    try:
        return await call()
    except Exception as error:
        return type(error).__name__


async def fail(call):
    for _ in range(10):
        try:
            await call(ok=False)
        except Exception as error:
            last = type(error).__name__
    return last


async def main():
    breaker = await purgatory.AsyncCircuitBreakerFactory(default_threshold=3).get_breaker("model")

    async def guarded():
        async with breaker:
            return await model()

    left = await leave(guarded), await leave(circuitbreaker.circuit(failure_threshold=3)(model))
    failed = (
        await fail(pybreaker.CircuitBreaker(fail_max=3)(model)),
        await fail(circuitbreaker.circuit(failure_threshold=3)(model)),
    )
    print("cancelled 3 times: purgatory", left[0], "circuitbreaker", left[1])
    print("failed 10 times: pybreaker", failed[0], "circuitbreaker", failed[1])
    assert left == ("OpenedState", "answered")
    assert failed == ("ValueError", "CircuitBreakerError")


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
