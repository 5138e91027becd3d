#!/usr/bin/env bash
# Span attributes that are NumPy scalars become strings, except np.float64; as metric values they are numbers.
# Library: opentelemetry-sdk 1.45.2, numpy 2.4.6, Python 3.11.
# Guess: numbers are kept as numbers, or the attribute is dropped with a warning (as in earlier versions).
# Happens: np.int64(3) is stored as "3", np.float32(1) as "1.0", np.True_ as "True"; np.float64 is
#   a float and stays. A query such as `batch.rows > 2` then compares text. Counters take all of them.
# Who meets it: spans that carry batch sizes, scores or lengths computed with NumPy. Write `int(n)`, `float(x)`.
# Seen: int64 '3' float32 '1.0' bool 'True' float64 1.0; counter 3
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'opentelemetry-sdk==1.45.2' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import logging

import numpy as np
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

logging.disable(logging.CRITICAL)  # it does warn, on the log
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
values = {"int64": np.int64(3), "float32": np.float32(1), "bool": np.True_}
with provider.get_tracer("t").start_as_current_span("batch") as span:
    span.set_attributes(values | {"float64": np.float64(1)})
attributes = dict(exporter.get_finished_spans()[0].attributes)
print(*(f"{key} {value!r}" for key, value in attributes.items()))
assert attributes == {"int64": "3", "float32": "1.0", "bool": "True", "float64": 1.0}

reader = InMemoryMetricReader()
counter = MeterProvider(metric_readers=[reader]).get_meter("t").create_counter("rows")
counter.add(np.int64(3))
point = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics[0].data.data_points[0]
print("counter", point.value)
assert point.value == 3
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
