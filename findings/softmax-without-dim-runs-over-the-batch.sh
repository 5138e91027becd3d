#!/usr/bin/env bash
# `nn.Softmax()` and `F.softmax(x)` without `dim` normalise over the batch for inputs of three dimensions.
# Library: torch 2.13.0, Python 3.11.
# Guess: over the last dimension (it is right for two).
# Happens: the implicit dimension is 0 for 0, 1 and 3 dimensions, else 1: of (batch, positions, classes) each caller's
#   answer depends on who else is in the batch, and a row alone gives ones everywhere. A UserWarning says that the choice
#   is deprecated, not what it is. Softmin and log_softmax the same.
# Who meets it: token classifiers and detectors under dynamic batching; a test with one row passes shape checks.
# Seen: alone all 1.0; in a batch of 2 another answer; two dimensions: over classes
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch

softmax = torch.nn.Softmax()
x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
alone, together = softmax(x[:1])[0], softmax(x)[0]
print("alone", alone[0].tolist(), "in a batch of 2", [round(v, 3) for v in together[0].tolist()])
assert torch.equal(alone, torch.ones(3, 4))
assert torch.allclose(softmax(x).sum(0), torch.ones(3, 4)) and not torch.allclose(together, alone)
assert torch.allclose(softmax(x[0]).sum(-1), torch.ones(3))
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
