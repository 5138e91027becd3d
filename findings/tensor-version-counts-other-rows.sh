#!/usr/bin/env bash
# `tensor._version` counts writes to other rows of the same storage, misses writes through NumPy and `.data`, and raises
# for an inference tensor.
# Library: torch 2.13.0, Python 3.11.
# Guess: it counts the in-place writes to this tensor, however they are made; of an inference tensor it is 0.
# Happens: all views share one counter, so a write to slot 3 of a buffer counts for the view of slot 0, which did not
#   change; `x.numpy()[:] = 1`, `x.data.add_(1)` and a tensor made by from_numpy of the same array leave it as it was; a
#   tensor made in inference_mode has none: RuntimeError.
# Who meets it: whoever uses it to find inputs that were changed while they waited: ring buffers give false alarms, reused
#   NumPy buffers none, outputs of another model an exception.
# Seen: other row +1, numpy 0, data 0, from_numpy 0, copy of itself +1, inference tensor RuntimeError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch

buffer = torch.zeros(4, 2)
row = buffer[0]
writes = {
    "other row": lambda: buffer[3].add_(1),
    "numpy": lambda: row.numpy().fill(1),
    "data": lambda: row.data.add_(1),
    "from_numpy": lambda: torch.from_numpy(row.numpy()).add_(1),
    "copy of itself": lambda: row.copy_(row.clone()),
}
seen = {}
for name, write in writes.items():
    version, value = row._version, row.clone()
    write()
    seen[name] = row._version - version, not torch.equal(row, value)
    print(name, "version", f"+{seen[name][0]}", "changed", seen[name][1])
assert seen == {
    "other row": (1, False), "numpy": (0, True), "data": (0, True), "from_numpy": (0, True), "copy of itself": (1, False)
}
with torch.inference_mode():
    output = torch.ones(2)
try:
    output._version
except RuntimeError as error:
    print("inference tensor", type(error).__name__)
else:
    raise AssertionError("inference tensors have a version now")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
