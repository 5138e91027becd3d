#!/usr/bin/env bash
# `torch.jit.save` of the same traced module writes other bytes in a process that has traced another one before.
# Library: torch 2.13.0.
# Guess: the same module with the same weights is the same file, so that its hash names it.
# Happens: torch numbers classes as it meets them (`___torch_mangle_1`), and the number is in the file: in the names of
#   its entries, in its code and its pickles. `torch.save` of the plain module is the same each time.
# Who meets it: caches and registries of models that go by a hash of the file; workers of one program that compare theirs.
# Seen: the same: torch.save True, torch.jit.save False
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import hashlib
import io

import torch

net = torch.nn.Linear(2, 2).eval()


def hashed(save, model):
    file = io.BytesIO()
    save(model, file)
    return hashlib.sha256(file.getvalue()).hexdigest()


def traced():
    return hashed(torch.jit.save, torch.jit.trace(net, torch.ones(1, 2)))


plain, script = hashed(torch.save, net) == hashed(torch.save, net), traced() == traced()
print("the same: torch.save", plain, "torch.jit.save", script)
assert (plain, script) == (True, False)
PY
"$dir/venv/bin/python" -W ignore "$dir/check.py"
