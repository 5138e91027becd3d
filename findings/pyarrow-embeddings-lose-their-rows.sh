#!/usr/bin/env bash
# A sliced or nullable column of fixed-size lists: `.values` gives other rows, `.flatten()` fewer rows, neither an error.
# Library: pyarrow 26.0.1, numpy 2.4.6, Python 3.11.
# Guess: both give the elements of the rows in view; a row that is null comes as NaN.
# Happens: `.values` ignores the slice (row 0 of the parent instead of row 2); `.flatten()` honours it, but leaves null
#   rows out, so that all later rows move up by one. After a cast to fixed_shape_tensor, `to_numpy_ndarray()` honours the
#   slice and raises for nulls: the one way that is right.
# Who meets it: embeddings and feature rows read batch by batch from Parquet, Arrow Flight or a vector store.
# Seen: rows 2 to 4: values start with 0.0, flatten with 2.0; three rows with a null: flatten gives 2 rows
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'pyarrow==26.0.1' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
import pyarrow as pa

kind = pa.list_(pa.float32(), 2)
part = pa.array([[float(n)] * 2 for n in range(6)], type=kind).slice(2, 3)
values = part.values.to_numpy().reshape(-1, 2)
flat = part.flatten().to_numpy().reshape(-1, 2)
print("rows 2 to 4: values", values[:3, 0], "flatten", flat[:, 0])
assert values[:3, 0].tolist() == [0.0, 1.0, 2.0] and flat[:, 0].tolist() == [2.0, 3.0, 4.0]

nullable = pa.array([[1.0, 1.0], None, [3.0, 3.0]], type=kind)
flat = nullable.flatten().to_numpy().reshape(-1, 2)
print("three rows, one null: flatten", flat[:, 0])
assert flat[:, 0].tolist() == [1.0, 3.0]

tensors = pa.fixed_shape_tensor(pa.float32(), (2,))
right = pa.ExtensionArray.from_storage(tensors, part).to_numpy_ndarray()
assert np.array_equal(right[:, 0], [2.0, 3.0, 4.0])
try:
    pa.ExtensionArray.from_storage(tensors, nullable).to_numpy_ndarray()
except pa.ArrowInvalid as error:
    print("fixed_shape_tensor:", type(error).__name__)
else:
    raise AssertionError("null rows are taken now")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
