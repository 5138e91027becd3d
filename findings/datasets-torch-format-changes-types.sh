#!/usr/bin/env bash
# Hugging Face datasets in torch format: float64 becomes float32, every integer int64, and a slice is a tensor or a list.
# Library: datasets 5.2.0, torch 2.13.0, numpy 2.4.6, Python 3.11.
# Guess: the column's type is kept; rows of different lengths are always a list, or always padded.
# Happens: a float64 id 16777217 reads 16777216; uint8 images take eight times the memory; and of a column of lists
#   a slice whose rows happen to have one length is one tensor, another slice of it a list of tensors.
# Who meets it: offline inference over a dataset: the first ragged batch has another type than those before.
#   `with_format("torch", dtype=...)` sets one type; or use "numpy".
# Seen: uint8 int64, int32 int64, float16 float32, float64 float32 (16777216.0); [0:2] Tensor, [0:3] list
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'datasets==5.2.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
from datasets import Dataset, Features, Value

kinds = {}
for kind in ("uint8", "int32", "float16", "float64"):
    data = Dataset.from_dict({"x": [1, 2]}, features=Features({"x": Value(kind)})).with_format("torch")
    kinds[kind] = str(data[:]["x"].dtype).removeprefix("torch.")
identifier = Dataset.from_dict({"x": [16777217.0]}).with_format("torch")[0]["x"].item()
print(kinds, identifier)
assert kinds == {"uint8": "int64", "int32": "int64", "float16": "float32", "float64": "float32"}
assert identifier == 16777216.0

rows = Dataset.from_dict({"x": [[1, 2], [3, 4], [5]]}).with_format("torch")
even, ragged = type(rows[0:2]["x"]).__name__, type(rows[0:3]["x"]).__name__
print("[0:2]", even, "[0:3]", ragged)
assert (even, ragged) == ("Tensor", "list")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
