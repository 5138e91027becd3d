#!/usr/bin/env bash
# A model that OpenVINO has converted and compiled goes on to read some of the PyTorch module's weights.
# Library: openvino 2026.4.1, torch 2.13.0, Python 3.11.
# Guess: a compiled model has weights of its own: changing the module changes nothing.
# Happens: `convert_model` shares memory by default (`share_weights=True`), and compiling copies only the weights that it
#   reorders: after an in-place change of the embedding the compiled model answers with the new one. `load_state_dict` of a
#   new version into the module leaves the compiled model with a mixture. `share_weights=False` copies them.
# Who meets it: services that convert a module and load new weights into it, or train on.
# Seen: shared: the change shows; not shared: it does not
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'openvino==2026.4.1' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import numpy as np
import openvino
import torch

ids = torch.tensor([[1, 2, 3]])
shows = {}
for shared in (True, False):
    module = torch.nn.Sequential(torch.nn.Embedding(10, 16)).eval()
    converted = openvino.convert_model(module, example_input=ids, share_weights=shared)
    compiled = openvino.Core().compile_model(converted, "CPU")
    del converted
    before = compiled([ids.numpy()])[0].copy()
    module.load_state_dict({"0.weight": torch.zeros(10, 16)})
    shows[shared] = not np.array_equal(before, compiled([ids.numpy()])[0])
print("whether a change of the module shows, by share_weights:", shows)
assert shows == {True: True, False: False}
PY
CI=true "$dir/venv/bin/python" -W ignore "$dir/check.py"
