#!/usr/bin/env bash
# One tensor, four ways to send it: without a content type MLServer's model gets four different things.
# Library: MLServer 1.7.1, Python 3.11.
# Guess (from memory, before the first run): self.decode(input) of a model that says nothing of codecs is the same for
#   JSON (nested or flat), gRPC with typed contents, and gRPC with raw contents: an array of the declared shape.
# Happens: without a content type the data comes as it stood in the message, and the shape beside it is not looked at:
#   nested JSON has 2 entries, flat JSON, typed contents and raw bytes (unpacked into Python floats) have 6.
# Who meets it: models that take `len(x)` for rows, or `np.array(x)`: right for the client they were tried with. Say
#   default_codec=NumpyCodec to decode(), or content_type "np" in the model's metadata.
# Seen: TensorData, of lengths 2, 6, 6, 6; with NumpyCodec (2, 3) by all
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'mlserver==1.7.1' 'uvloop<0.22' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import json
import struct

from mlserver import MLModel, ModelSettings
from mlserver.codecs import NumpyCodec
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.converters import ModelInferRequestConverter
from mlserver.types import InferenceRequest

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
FLAT = [x for row in ROWS for x in row]
model = MLModel(ModelSettings(name="net", implementation=MLModel))


def by_json(data):
    tensor = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": data}
    return InferenceRequest.model_validate_json(json.dumps({"inputs": [tensor]}))


def by_grpc(raw):
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", shape=[2, 3], datatype="FP32")
    request = pb.ModelInferRequest(model_name="net", inputs=[tensor])
    if raw:
        request.raw_input_contents.append(struct.pack("<6f", *FLAT))
    else:
        request.inputs[0].contents.fp32_contents.extend(FLAT)
    return ModelInferRequestConverter.to_types(request)


ways = {
    "JSON, nested": by_json(ROWS),
    "JSON, flat": by_json(FLAT),
    "gRPC, contents": by_grpc(raw=False),
    "gRPC, raw": by_grpc(raw=True),
}
lengths, shapes = {}, {}
for way, request in ways.items():
    got = model.decode(request.inputs[0])
    lengths[way] = len(got)
    shapes[way] = model.decode(request.inputs[0], default_codec=NumpyCodec).shape
    print(way, type(got).__name__, got, len(got), shapes[way])
assert list(lengths.values()) == [2, 6, 6, 6]
assert set(shapes.values()) == {(2, 3)}
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
