#!/usr/bin/env bash
# One NaN makes a Prometheus histogram's sum and a counter NaN for the life of the process, and the histogram's count
# does not even see it.
# Library: prometheus-client 0.26.0, Python 3.11.
# Guess: NaN is refused (as a negative increment is, with ValueError) or ignored.
# Happens: `observe(nan)` adds to the sum and to no bucket: the count stays behind and `rate(sum) / rate(count)` is NaN
#   from then on. `Counter.inc(nan)` likewise.
# Who meets it: metrics of a model's outputs (scores, confidences) and of durations computed from its numbers.
# Seen: observe(1), observe(nan), observe(1): count 2.0, sum NaN; counter NaN after inc()
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'prometheus-client==0.26.0'

cat >"$dir/check.py" <<'PY'
import math

from prometheus_client import CollectorRegistry, Counter, Histogram

registry = CollectorRegistry()
scores = Histogram("scores", "of the model", registry=registry, buckets=(1, 2))
rows = Counter("rows", "weighted", registry=registry)
for value in (1, math.nan, 1):
    scores.observe(value)
rows.inc(math.nan)
rows.inc()
seen = [registry.get_sample_value(name) for name in ("scores_count", "scores_sum", "rows_total")]
print("count", seen[0], "sum", seen[1], "counter", seen[2])
assert seen[0] == 2 and math.isnan(seen[1]) and math.isnan(seen[2])
try:
    rows.inc(-1)
except ValueError:
    pass
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
