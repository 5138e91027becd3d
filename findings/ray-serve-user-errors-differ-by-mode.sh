#!/usr/bin/env bash
# What a deployment raises arrives through a handle as another class, and with another text, by an environment variable.
# Library: ray[serve] 2.60.0.
# Guess: the same exception either way: RAY_SERVE_THROUGHPUT_OPTIMIZED only makes it faster.
# Happens: by default it is a RayTaskError that also is of the raised class, whose text is the replica's whole traceback;
#   with RAY_SERVE_THROUGHPUT_OPTIMIZED=1 it is the raised exception itself, with its own text and no trace of the replica.
# Who meets it: front ends that show str(error) to clients (tracebacks by default), or look at `.cause` (there is none).
#   Take `getattr(error, "cause", error)`.
# Seen: default: RayTaskError(ValueError), with a traceback; optimized: ValueError 'too long'
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet 'ray[serve]==2.60.0'

cat >"$dir/check.py" <<'PY'
import asyncio
import os
import sys

import ray
from ray import serve


@serve.deployment
class Model:
    async def __call__(self, x):
        raise ValueError("too long")


async def main(handle):
    try:
        await handle.remote(1)
    except ValueError as error:
        return type(error).__name__, "Traceback" in str(error) or "File " in str(error), hasattr(error, "cause")


ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, _temp_dir=sys.argv[1])
seen = asyncio.run(main(serve.run(Model.bind())))
print(seen)
optimized = os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
assert seen == (("ValueError", False, False) if optimized else ("RayTaskError(ValueError)", True, True)), seen
ray.shutdown()
PY
export RAY_USAGE_STATS_ENABLED=0
for mode in 0 1; do
    RAY_SERVE_THROUGHPUT_OPTIMIZED=$mode "$dir/venv/bin/python" "$dir/check.py" "$dir/r$mode"
done
