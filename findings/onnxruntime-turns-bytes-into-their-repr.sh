#!/usr/bin/env bash
# ONNX Runtime takes an object array of bytes for a string input, and the model sees the text "b'...'"; None is "None".
# Library: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11.
# Guess: bytes are taken as UTF-8, or refused; None is refused.
# Happens: every element goes through str(): b"cat" arrives as "b'cat'", None as "None", 5 as "5".
# Who meets it: text models behind the Open Inference Protocol, whose BYTES elements are bytes in binary requests: the
#   tokenizer inside the graph then tokenises b, quote and all. Decode first: `[t.decode() for t in x.ravel()]`.
# Seen: [b"cat", None, 5] -> ["b'cat'", 'None', '5']
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

x = helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])
y = helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

(got,) = session.run(None, {"x": np.array([b"cat", None, 5], dtype=object)})
print(got.tolist())
assert got.tolist() == ["b'cat'", "None", "5"]
assert session.run(None, {"x": np.array(["cat"], dtype=object)})[0].tolist() == ["cat"]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
