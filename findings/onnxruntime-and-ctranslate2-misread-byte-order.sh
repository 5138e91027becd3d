#!/usr/bin/env bash
# ONNX Runtime and CTranslate2 read a big-endian array as if it were native: wrong numbers, no error.
# Library: onnxruntime 1.32.0, ctranslate2 4.8.5, onnx 1.23.2, numpy 2.4.6, Python 3.11, a little-endian machine.
# Guess: they raise, as torch.from_numpy, pyarrow and orjson do, or convert, as safetensors does.
# Happens: the element type is taken from the array, its byte order is not: [1, 2, 3] arrives as [4.6e-41, 9e-44, 2.3e-41],
#   in `run`, OrtValue and StorageView. ONNX Runtime reads strided arrays rightly, CTranslate2 refuses them.
# Who meets it: inputs from `np.frombuffer(..., ">f4")`, FITS or NetCDF files. `x.astype(x.dtype.newbyteorder("="))`.
# Seen: given [1. 2. 3.] got [4.6006e-41 8.9683e-44 2.3049e-41]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'onnxruntime==1.32.0' 'ctranslate2==4.8.5' 'onnx==1.23.2' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import ctranslate2
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

big = np.array([1, 2, 3], dtype=">f4")
misread = big.view("<f4")
(got,) = session.run(None, {"x": big})
print("given", big, "got", got)
assert np.array_equal(got, misread) and not np.allclose(got, big)
assert np.array_equal(onnxruntime.OrtValue.ortvalue_from_numpy(big).numpy(), misread)
assert np.array_equal(np.array(ctranslate2.StorageView.from_array(big)), misread)
assert np.array_equal(session.run(None, {"x": big.astype("<f4")})[0], big)
strided = np.arange(6, dtype=np.float32)[::2]
assert np.array_equal(session.run(None, {"x": strided})[0], strided)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
