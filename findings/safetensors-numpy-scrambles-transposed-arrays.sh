#!/usr/bin/env bash
# `safetensors.numpy.save` of a transposed or sliced array writes its memory, not its elements: other numbers come back.
# Library: safetensors 0.8.0, numpy 2.4.6, Python 3.11.
# Guess: it writes the elements in C order (as np.save), or raises, as safetensors.torch does for a tensor that is not
#   contiguous.
# Happens: the shape is that of the array, the bytes are those that begin where it begins: every transposed, Fortran-
#   ordered or strided array is silently another one. Byte order is converted.
# Who meets it: weights, prototypes and answers exported from NumPy (`w.T`, `y[:, 1]`, a DataFrame's `to_numpy()`, Fortran-
#   ordered results of SciPy) and loaded by a runtime. `np.ascontiguousarray` first.
# Seen: saved [[0, 3], [1, 4], [2, 5]] loaded [[0, 1], [2, 3], [4, 5]]; column [0, 3] loaded [0, 1]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'safetensors==0.8.0' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
import safetensors.numpy


def round_trip(array):
    return safetensors.numpy.load(safetensors.numpy.save({"x": array}))["x"]


rows = np.arange(6, dtype=np.float32).reshape(2, 3)
back = round_trip(rows.T)
print("saved", rows.T.tolist(), "loaded", back.tolist())
assert back.shape == (3, 2) and back.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
print("column", rows[:, 0].tolist(), "loaded", round_trip(rows[:, 0]).tolist())
assert round_trip(rows[:, 0]).tolist() == [0.0, 1.0]
assert np.array_equal(round_trip(np.ascontiguousarray(rows.T)), rows.T)
assert np.array_equal(round_trip(rows.astype(">f4")), rows)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
