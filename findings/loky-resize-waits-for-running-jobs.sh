#!/usr/bin/env bash
# `loky.get_reusable_executor(max_workers=other)` blocks its caller until every running job has ended.
# Library: loky 3.7.0 (joblib's default backend uses it), Python 3.11.
# Guess: it returns at once: a larger pool gets another worker, a smaller one is resized when the jobs are done.
# Happens: a resize first waits for all pending jobs of whoever shares the executor, also when it grows. Called on an
#   event loop's thread the loop stands still for that long. With the same number it returns at once.
# Who meets it: two libraries of one service with different `n_jobs`, one of them called from a coroutine.
# Seen: same number: the job runs on; another number: it returned after the job
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'loky==3.7.0'

cat >"$dir/check.py" <<'PY'
import time

from loky import get_reusable_executor

if __name__ == "__main__":
    executor = get_reusable_executor(max_workers=1)
    executor.submit(time.sleep, 0).result()
    job = executor.submit(time.sleep, 2)
    get_reusable_executor(max_workers=1)
    same = job.done()
    get_reusable_executor(max_workers=2)
    other = job.done()
    print("job done on return: same number", same, "another number", other)
    assert (same, other) == (False, True)
    get_reusable_executor().shutdown()
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
