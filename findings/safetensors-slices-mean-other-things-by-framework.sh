#!/usr/bin/env bash
# `safe_open(...).get_slice(name)[...]`: the same index on the same file works, fails or gives another row by framework.
# Library: safetensors 0.8.0, torch 2.13.0, numpy 2.4.6, Python 3.11.
# Guess: one implementation reads the file, so "pt" and "np" take the same indices, with Python's rules for slices.
# Happens: "pt" follows torch; "np" raises OverflowError for [-2:], SafetensorError for [5:100] of 10 rows (no clamping)
#   and for a list of rows, though [-1] works in both; [True] is row 1 in "np" and a new axis in "pt".
# Who meets it: loaders that read a shard or the last rows of a table of embeddings with either framework.
# Seen: [-2:] pt (2, 2), np OverflowError; [5:100] pt (5, 2), np SafetensorError; [[1, 3]] pt (2, 2), np SafetensorError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'safetensors==0.8.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

save_file({"x": torch.arange(20).reshape(10, 2)}, "x.safetensors")
indices = {"-2:": np.s_[-2:], "5:100": np.s_[5:100], "[1, 3]": [1, 3], "True": True, "-1": -1}
seen = {}
for framework in ("pt", "np"):
    with safe_open("x.safetensors", framework) as file:
        part = file.get_slice("x")
        for name, index in indices.items():
            try:
                seen[framework, name] = tuple(part[index].shape)
            except (OverflowError, SafetensorError) as error:
                seen[framework, name] = type(error).__name__
for name in indices:
    print(f"[{name}]", "pt", seen["pt", name], "np", seen["np", name])
assert [seen["pt", name] for name in indices] == [(2, 2), (5, 2), (2, 2), (1, 10, 2), (2,)]
errors = ["OverflowError", "SafetensorError", "SafetensorError"]
assert [seen["np", name] for name in indices] == [*errors, (2,), (2,)]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
