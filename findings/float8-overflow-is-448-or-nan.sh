#!/usr/bin/env bash
# What is too large for float8_e4m3fn becomes 448 in torch and NaN in ml_dtypes; infinity as well.
# Library: torch 2.13.0, ml_dtypes 0.6.0, numpy 2.4.6, Python 3.11, CPU.
# Guess (from memory, noted after a first look): NaN in both, as the format has no infinity.
# Happens: torch saturates: 500 and even inf become 448, so overflow leaves no trace; ml_dtypes (JAX, ONNX, NumPy files)
#   gives NaN from 465 on. float8_e5m2 agrees in both and overflows to inf.
# Who meets it: weights or inputs quantised by one library and compared with, or served by, the other; NaN checks behind
#   a float8 cast in torch find nothing.
# Seen: 500 -> torch 448, ml_dtypes nan; inf -> 448, nan; e5m2 inf -> inf, inf
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'ml_dtypes==0.6.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import math

import ml_dtypes
import numpy as np
import torch

for value in (449.0, 500.0, math.inf):
    torch_value = torch.tensor(value).to(torch.float8_e4m3fn).float().item()
    numpy_value = float(np.float32(value).astype(ml_dtypes.float8_e4m3fn))
    print(value, "-> torch", torch_value, "ml_dtypes", numpy_value)
    assert torch_value == 448
    assert numpy_value == 448 if value == 449 else math.isnan(numpy_value)
assert math.isnan(torch.tensor(math.nan).to(torch.float8_e4m3fn).float().item())
assert torch.tensor(math.inf).to(torch.float8_e5m2).float().item() == math.inf
assert float(np.float32(math.inf).astype(ml_dtypes.float8_e5m2)) == math.inf
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
