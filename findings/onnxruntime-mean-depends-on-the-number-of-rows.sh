#!/usr/bin/env bash
# ONNX Runtime's mean over positions gives a row other bits alone than beside another row.
# Library: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64.
# Guess: a row's bits do not depend on its neighbours: so it is for MatMul, Gemm, Conv, Softmax, LayerNormalization, Erf.
# Happens: ReduceMean over axis 1 of (rows, positions, features) takes another way for one row than for several: 2 of 2 rows
#   differ from what each gives alone. Log does it by where in the flat batch a number lies: with 5 features a row alone
#   ends in other instructions than one in the middle.
# Who meets it: pooled embeddings compared by their bits: caches keyed by vectors, exact duplicates, reproducible tests.
# Seen: MatMul 0 of 36 companies differ, ReduceMean 36, Log 32
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

random = np.random.RandomState(0)


def differing(node, shape, weights=()):
    """In how many companies of 2 to 37 rows a row differs from itself alone."""
    x = random.rand(37, *shape).astype("float32") + 0.1
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", *shape])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", inputs, outputs, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    alone = np.concatenate([session.run(None, {"x": x[n : n + 1]})[0] for n in range(len(x))])
    answers = [session.run(None, {"x": x[:n]})[0] for n in range(2, len(x) + 1)]
    assert all(np.allclose(answer, alone[: len(answer)], rtol=1e-4) for answer in answers)
    return sum(not np.array_equal(answer, alone[: len(answer)]) for answer in answers)


weight = numpy_helper.from_array(random.randn(48, 131).astype("float32"), "w")
found = {
    "MatMul": differing(helper.make_node("MatMul", ["x", "w"], ["y"]), (9, 48), [weight]),
    "ReduceMean": differing(helper.make_node("ReduceMean", ["x"], ["y"], axes=[1]), (9, 48)),
    "Log": differing(helper.make_node("Log", ["x"], ["y"]), (5,)),
}
print("companies of 36 in which a row has other bits than alone:", found)
assert found["MatMul"] == 0 and found["ReduceMean"] == 36 and found["Log"] > 0
PY
"$dir/venv/bin/python" "$dir/check.py"
