#!/usr/bin/env bash
# `torch.from_dlpack` of a read-only NumPy array or an Arrow array gives a tensor that writes into it.
# Library: torch 2.13.0, numpy 2.4.6, pyarrow 26.0.1, Python 3.11.
# Guess: BufferError for memory that is read-only (DLPack 1.0 has a flag for it), or a warning as from torch.from_numpy.
# Happens: no error, no warning; `x.add_(1)` changes the "immutable" Arrow array, and every slice and table that shares it.
# Who meets it: a model that works in place on inputs that came from Arrow, Parquet or a memory-mapped file by DLPack.
# Seen: array [5.0, 0.0] writeable False; arrow [9.0, 2.0], its table [9.0, 2.0]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'pyarrow==26.0.1' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import warnings

import numpy as np
import pyarrow as pa
import torch

warnings.simplefilter("error")
array = np.zeros(2)
array.flags.writeable = False
torch.from_dlpack(array)[0] = 5
print("array", array.tolist(), "writeable", array.flags.writeable)
assert array.tolist() == [5.0, 0.0]

column = pa.array([1.0, 2.0])
table = pa.table({"x": column})
torch.from_dlpack(column)[0] = 9
print("arrow", column.to_pylist(), "its table", table["x"].to_pylist())
assert table["x"].to_pylist() == [9.0, 2.0]
assert not column.to_numpy().flags.writeable
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
