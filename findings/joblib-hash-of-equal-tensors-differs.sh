#!/usr/bin/env bash
# `joblib.hash` gives equal tensors different hashes, so `joblib.Memory` never hits for a tensor.
# Library: joblib 1.6.0, torch 2.13.0, numpy 2.4.6, Python 3.11.
# Guess: hashed by contents, as arrays are.
# Happens: the hash covers the pickle, and that of a tensor names its storage by an address: equal tensors, and equal
#   modules, differ. The cache computes each time and grows on disk with every call. `x.numpy()` is hashed by contents.
# Who meets it: `Memory(...).cache` on pre-processing or embedding functions that take tensors.
# Seen: tensors False, modules False, arrays True; Memory computed 3 times for 3 equal tensors, 1 time for arrays
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'joblib==1.6.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import copy

import joblib
import numpy as np
import torch

tensors = [torch.ones(3) for _ in range(3)]
module = torch.nn.Linear(2, 2)
same = (
    joblib.hash(tensors[0]) == joblib.hash(tensors[1]),
    joblib.hash(module) == joblib.hash(copy.deepcopy(module)),
    joblib.hash(np.ones(3)) == joblib.hash(np.ones(3)),
)
print("equal hashes: tensors", same[0], "modules", same[1], "arrays", same[2])
assert same == (False, False, True)

calls = []


def embed(x):
    calls.append(1)
    return float(x.sum())


cached = joblib.Memory("cache", verbose=0).cache(embed)
counts = []
for inputs in (tensors, [x.numpy() for x in tensors]):
    calls.clear()
    assert [cached(x) for x in inputs] == [3.0] * 3
    counts.append(len(calls))
print("computed", counts[0], "times for 3 equal tensors,", counts[1], "for 3 equal arrays")
assert counts == [3, 1]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
