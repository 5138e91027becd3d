#!/usr/bin/env bash
# DataLoader's default collate takes the dtype of a batch of Python numbers, and the keys of dicts, from the first row.
# Library: torch 2.13.0, Python 3.11.
# Guess (from memory, noted after a first look): one dtype for all batches of floats; a key that one row has and another has not raises.
# Happens: [1, 2.7] gives float32, [1.5, 2] float64: the dtype of a batch changes with the order of its rows, and a
#   float32 model raises for some batches only. A key that the first row lacks is dropped silently (of a row that lacks
#   one of the first row's keys KeyError). [True, 2] is [1, 2].
# Who meets it: offline runs over JSON rows, where whole numbers are ints and optional keys are left out; with a warm-up
#   on one batch, the next one has another signature.
# Seen: [1, 2.7] float32, [1.5, 2] float64; [{a}, {a, b}] keys [a]; [{a, b}, {a}] KeyError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch
from torch.utils.data import default_collate

whole_first, float_first = default_collate([1, 2.7]).dtype, default_collate([1.5, 2]).dtype
print("[1, 2.7]", whole_first, "[1.5, 2]", float_first)
assert (whole_first, float_first) == (torch.float32, torch.float64)
keys = list(default_collate([{"a": 1}, {"a": 2, "b": 3}]))
print("[{a}, {a, b}] keys", keys)
assert keys == ["a"]
assert default_collate([True, 2]).tolist() == [1, 2]
try:
    default_collate([{"a": 1, "b": 2}, {"a": 2}])
except KeyError as error:
    print("[{a, b}, {a}]", type(error).__name__)
else:
    raise AssertionError("a missing key is taken now")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
