#!/usr/bin/env bash
# `nn.Embedding(max_norm=...)` changes its own weights in a forward pass, also in eval() and inference_mode().
# Library: torch 2.13.0, Python 3.11.
# Guess: a forward pass in eval() and inference_mode() leaves parameters alone; max_norm acts while training.
# Happens: the rows that are looked up are scaled down in place. Copies that share parameters across threads write into
#   each other's weights while they are read; a checksum of the served weights changes with the traffic; code that
#   reads the weight itself (tied output layers) gives other answers before and after a lookup.
# Who meets it: one set of weights shared by several virtual cores or processes.
# Seen: tied score 25.0 before the lookup of another caller, 2.89 after it; _version raised by 1
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch

words = torch.nn.Embedding(4, 3, max_norm=1.0).eval()
torch.nn.init.constant_(words.weight, 5.0)
query = torch.full((3,), 5 / 3)
version = words.weight._version
with torch.inference_mode():
    before = (words.weight @ query)[1].item()
    words(torch.tensor([1]))
    after = (words.weight @ query)[1].item()
print("tied score", round(before, 2), "before,", round(after, 2), "after; _version +", words.weight._version - version)
assert abs(before - 25) < 1e-4 and abs(after - 2.8868) < 1e-3
assert words.weight._version == version + 1
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
