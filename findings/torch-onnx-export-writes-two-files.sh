#!/usr/bin/env bash
# `torch.onnx.export` writes a second file, and fixes the batch to the example's rows.
# Library: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11.
# Guess (from memory, noted after a first look): a model of 8 kB is one file (external data is for models above 2 GB).
# Happens: since the exporter based on torch.export is the default, weights go to `m.onnx.data`, however few they are.
#   Where only `m.onnx` is uploaded, or its bytes are given to a session, loading fails. `external_data=False` keeps one
#   file, `dynamic_shapes=` a free batch; without it 3 rows for an example of 2 are refused.
# Who meets it: deployments that copy one file; batching runtimes.
# Seen: m.onnx, m.onnx.data; from bytes: Fail; 3 rows: InvalidArgument; external_data=False: m.onnx
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'onnx==1.23.2' 'onnxscript==0.7.2' 'onnxruntime==1.32.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import os
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

model, example = torch.nn.Linear(64, 32).eval(), (torch.ones(2, 64),)
for folder in ("plain", "one"):
    os.mkdir(folder)
torch.onnx.export(model, example, "plain/m.onnx", verbose=False)
torch.onnx.export(model, example, "one/m.onnx", external_data=False, verbose=False)
print("plain", sorted(os.listdir("plain")), "external_data=False", sorted(os.listdir("one")))
assert sorted(os.listdir("plain")) == ["m.onnx", "m.onnx.data"] and os.listdir("one") == ["m.onnx"]

session = onnxruntime.InferenceSession("plain/m.onnx")
(name,) = (given.name for given in session.get_inputs())
seen = []
for attempt in (
    lambda: onnxruntime.InferenceSession(Path("plain/m.onnx").read_bytes()),
    lambda: session.run(None, {name: np.ones((3, 64), np.float32)}),
):
    try:
        attempt()
    except (Fail, InvalidArgument) as error:
        seen.append(type(error).__name__)
print("from bytes:", seen[0], "3 rows:", seen[1])
assert seen == ["Fail", "InvalidArgument"]
onnxruntime.InferenceSession(Path("one/m.onnx").read_bytes())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
