#!/usr/bin/env bash
# DuckDB's `.torch()` gives 0 for NULL; `torch.from_numpy` and `torch.tensor` drop the mask of a masked array.
# Library: duckdb 2.0.1, torch 2.13.0, numpy 2.4.6, Python 3.11.
# Guess: NULL becomes NaN in a float column and raises in an integer one; a masked array is refused.
# Happens: `fetchnumpy` gives masked arrays, `.torch()` takes what lies under the mask: 0 and 0.0, without a warning,
#   not to be told from real zeros.
# Who meets it: features read from SQL for a model. Use COALESCE in the query, or `fetchnumpy` and look at the mask.
# Seen: a [1, 0, 3] b [1.5, 0.0, 2.5]; masked [1.0, 2.0] for [1.0, --]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'duckdb==2.0.1' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import duckdb
import numpy as np
import torch

query = "select * from (values (1, 1.5::float), (null, null), (3, 2.5)) t(a, b)"
columns = duckdb.sql(query).torch()
print("a", columns["a"].tolist(), "b", columns["b"].tolist())
assert columns["a"].tolist() == [1, 0, 3] and columns["b"].tolist() == [1.5, 0.0, 2.5]
assert duckdb.sql(query).fetchnumpy()["b"].mask.tolist() == [False, True, False]

masked = np.ma.masked_array([1.0, 2.0], mask=[False, True])
print("masked", torch.from_numpy(masked).tolist(), "for", masked)
assert torch.from_numpy(masked).tolist() == torch.tensor(masked).tolist() == [1.0, 2.0]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
