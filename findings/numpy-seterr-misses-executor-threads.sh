#!/usr/bin/env bash
# `np.seterr(all="raise")` in main holds for `asyncio.to_thread`, not for `run_in_executor`.
# Library: numpy 2.4.6, Python 3.11.
# Guess: seterr sets the whole process.
# Happens: since NumPy 2 the state lives in a context variable. `asyncio.to_thread` copies the context, so it raises;
#   an executor's threads start with an empty context, so overflow there stays inf. Print options go the same way.
# Who meets it: models and pre-processing in worker threads that were to fail on overflow or NaN, and do not.
# Seen: main FloatingPointError, to_thread FloatingPointError, run_in_executor inf
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import asyncio

import numpy as np


def overflow():
    try:
        return str(np.float32(3e38) * np.float32(10))
    except FloatingPointError as error:
        return type(error).__name__


async def main():
    np.seterr(all="raise")
    np.set_printoptions(precision=2)
    loop = asyncio.get_running_loop()
    seen = overflow(), await asyncio.to_thread(overflow), await loop.run_in_executor(None, overflow)
    print("main", seen[0], "to_thread", seen[1], "run_in_executor", seen[2])
    assert seen == ("FloatingPointError", "FloatingPointError", "inf")
    text = str(np.array([1 / 3])), await loop.run_in_executor(None, str, np.array([1 / 3]))
    assert text == ("[0.33]", "[0.33333333]")


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
