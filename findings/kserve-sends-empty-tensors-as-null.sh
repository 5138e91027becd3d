#!/usr/bin/env bash
# kserve's REST client sends a binary tensor without rows as `"data": null`, and takes null in an answer for a number.
# Library: kserve 0.21.0, numpy 2.4.6, Python 3.11.
# Guess (from memory, before the first run): an input of shape (0, 3) goes out as `"data": []`, by binary as no bytes, and
#   as_numpy() of what arrives is (0, 3) again; so it is with outputs, also where a server has written `"data": null`.
# Happens: by binary it goes out as JSON with `"data": null`, `"binary_data_size": 0` and no header that says where the
#   JSON ends, so that a server sees JSON with neither data nor bytes. In an answer `null` is made an array of one NaN: a
#   ValueError where there are no rows, and where there is one number NaN, without a word.
# Who meets it: servers of the protocol (take null where a size is 0); clients of servers that write null for nothing.
# Seen: data None and binary_data_size 0; [] is (0, 3), null "cannot reshape array of size 1 into shape (0,3)", or [[nan]]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'kserve==0.21.0' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import json

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse

EMPTY = np.zeros((0, 3), np.float32)


sent = {}


def seen(read):
    try:
        array = read().as_numpy()
        return array.shape if array.size != 1 else array.tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def of_request(binary, array):
    x = InferInput("x", list(array.shape), "FP32")
    x.set_data_from_numpy(array, binary_data=binary)
    body, length = InferRequest("net", [x]).to_rest()
    if length is None:
        data = body["inputs"][0]
        body = json.dumps(body).encode()
        print("binary" if binary else "json", array.shape, "sent as", data)
        sent[binary, array.shape] = data["data"], data.get("parameters")
        length = len(body)
    return seen(lambda: InferRequest.from_bytes(body, length, "net").inputs[0])


def of_response(binary):
    y = InferOutput("y", [0, 3], "FP32")
    y.set_data_from_numpy(EMPTY, binary_data=binary)
    body, length = InferResponse("1", "net", [y], use_binary_outputs=binary).to_rest()
    if length is None:
        print("response", body["outputs"])
        return seen(lambda: InferResponse.from_rest(json.loads(json.dumps(body))).outputs[0])
    print("response", body)
    return seen(lambda: InferResponse.from_bytes(body, length).outputs[0])


def written(data, shape):
    body = {"model_name": "net", "outputs": [{"name": "y", "shape": shape, "datatype": "FP32", "data": data}]}
    return seen(lambda: InferResponse.from_rest(body).outputs[0])


for binary in (False, True):
    print("request", binary, of_request(binary, EMPTY), of_request(binary, np.ones((1, 3), np.float32)))
    print("response", binary, of_response(binary))
nothing = [written([], [0, 3]), written(None, [0, 3]), written(None, [1, 1])]
print("an answer with data [], null, and null for one number:", nothing)
assert sent[False, (0, 3)] == ([], None)
assert sent[True, (0, 3)] == (None, {"binary_data_size": 0})
assert nothing[0] == (0, 3) and "cannot reshape" in nothing[1] and str(nothing[2]) == "[[nan]]"
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
