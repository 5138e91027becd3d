#!/usr/bin/env bash
# OpenVINO computes int64 in 32 bits on a CPU, int8 saturating, float64 as float32; the declared types stay.
# Library: openvino 2026.4.1, numpy 2.4.6, Python 3.11.
# Guess: what a model declares is what it is computed in, and integers wrap around as in NumPy and PyTorch.
# Happens: 2**33 + 0 is 0 and comes as int64; uint8 20 * 20 is 255, 1 - 5 is 0; float64 1e300 is 3.4e38.
# Who meets it: models that carry ids, hashes or timestamps through, and whatever counts on wrapping bytes.
# Seen: int64 [1, 0] for [1, 8589934592]; uint8 255 and 0 for 144 and 252; float64 3.4028234663852886e+38 for 1e+300
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'openvino==2026.4.1' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
import openvino
from openvino import opset13 as ops


def computed(operation, value, other):
    x = ops.parameter([-1], openvino.Type(value.dtype), name="x")
    model = openvino.Model([operation(x, ops.constant(np.array([other], value.dtype)))], [x], "m")
    answer = openvino.Core().compile_model(model, "CPU")(value)[0]
    assert answer.dtype == value.dtype
    return answer.tolist()


wide = computed(ops.add, np.array([1, 2**33], "int64"), 0)
times = computed(ops.multiply, np.array([20], "uint8"), 20)
minus = computed(ops.subtract, np.array([1], "uint8"), 5)
double = computed(ops.add, np.array([1e300], "float64"), 0.0)
print("int64", wide, "uint8", times, minus, "float64", double)
assert wide == [1, 0] and times == [255] and minus == [0] and 3.4e38 < double[0] < 3.5e38
PY
"$dir/venv/bin/python" "$dir/check.py"
