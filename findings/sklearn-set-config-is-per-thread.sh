#!/usr/bin/env bash
# `sklearn.set_config` in main is seen by no other thread, whichever way the thread gets its context.
# Library: scikit-learn 1.9.1, Python 3.11.
# Guess: set_config is global ("Set global scikit-learn configuration"), or at least follows `asyncio.to_thread`.
# Happens: it is thread-local: another thread has the defaults. With `transform_output="pandas"` a transformer gives a
#   DataFrame in main and an array in a worker; what `assume_finite=True` was to save is checked again. joblib's own
#   threads do get it, through scikit-learn's `delayed`.
# Who meets it: pipelines served from worker threads. Use `estimator.set_output(...)`, or config_context in the call.
# Seen: main DataFrame, to_thread ndarray, run_in_executor ndarray
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'scikit-learn==1.9.1' 'pandas==3.0.5' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import asyncio

import numpy as np
import sklearn
from sklearn.preprocessing import StandardScaler

rows = np.arange(6.0).reshape(3, 2)
scaler = StandardScaler().fit(rows)


def kind():
    return type(scaler.transform(rows)).__name__


async def main():
    sklearn.set_config(transform_output="pandas")
    loop = asyncio.get_running_loop()
    seen = kind(), await asyncio.to_thread(kind), await loop.run_in_executor(None, kind)
    print("main", seen[0], "to_thread", seen[1], "run_in_executor", seen[2])
    assert seen == ("DataFrame", "ndarray", "ndarray")
    scaler.set_output(transform="pandas")
    assert await asyncio.to_thread(kind) == "DataFrame"


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
