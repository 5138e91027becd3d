#!/usr/bin/env bash
# OpenVINO hands a bfloat16 output to NumPy as float16: other numbers, no error.
# Library: openvino 2026.4.1, numpy 2.4.6, Python 3.11.
# Guess: float32, an error, or ml_dtypes' bfloat16.
# Happens: NumPy has no bfloat16, and the two bytes are taken for float16: 1, 2, -3 read 1.875, 2.0, -2.125. So do `results`,
#   `compiled(x)[0]` and `get_output_tensor().data`; element_type says bf16. `.view("uint16")` has the right bits.
# Who meets it: whoever converts a `model.bfloat16()`, or an ONNX file with bfloat16 outputs, and reads what it returns.
# Seen: float16 [1.875, 2.0, -2.125] for bf16 1, 2, -3
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'openvino==2026.4.1' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
import openvino
from openvino import opset13 as ops

x = ops.parameter([-1], openvino.Type.f32, name="x")
model = openvino.Model([ops.convert(x, "bf16")], [x], "cast")
request = openvino.Core().compile_model(model, "CPU").create_infer_request()
value = np.array([1.0, 2.0, -3.0], "float32")  # exact in bfloat16
result = request.infer([value])[0]
tensor = request.get_output_tensor(0)
print(tensor.element_type, "reads", result.dtype, result.tolist())
right = (tensor.data.view("uint16").astype("uint32") << 16).view("float32")
assert tensor.element_type == openvino.Type.bf16 and result.dtype == np.float16
assert result.tolist() == [1.875, 2.0, -2.125] and right.tolist() == [1.0, 2.0, -3.0]
PY
"$dir/venv/bin/python" "$dir/check.py"
