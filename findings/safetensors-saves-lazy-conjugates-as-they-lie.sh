#!/usr/bin/env bash
# safetensors writes the memory of a tensor that torch has conjugated or negated lazily: other numbers come back.
# Library: safetensors 0.8.0, torch 2.13.0, Python 3.11.
# Guess (from memory, before the first run): `x.conj()` of complex64 is saved by its values, as torch.save does, or refused,
#   as a transposed tensor is.
# Happens: the bytes at the tensor's address are written, whatever its conjugate and negative bits say: the file has the
#   numbers from before the conj(), without a word. torch.save keeps the bits, and resolve_conj() makes the difference
#   between two tensors that compare equal.
# Who meets it: weights and caches of models with Fourier layers, saved after a conj(). `x.resolve_conj()` and
#   `x.resolve_neg()` before saving.
# Seen: conj [(1-2j), (3+4j)] is loaded as [(1+2j), (3-4j)]; the imaginary part -2.0 as 2.0; resolved, and torch.save: right
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'numpy==2.4.6' 'torch==2.13.0' 'safetensors==0.8.0'

cat >"$dir/check.py" <<'PY'
import io

import torch
from safetensors.torch import load, save

z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
given = {"conj": z.conj(), "resolved": z.conj().resolve_conj()}
print({name: (x.is_conj(), x.is_contiguous(), x.tolist()) for name, x in given.items()})
back = load(save(given))
file = io.BytesIO()
torch.save(given["conj"], file)
file.seek(0)
print("safetensors", {name: x.tolist() for name, x in back.items()}, "torch.save", torch.load(file).tolist())
assert torch.equal(back["resolved"], given["conj"])
assert not torch.equal(back["conj"], given["conj"]) and torch.equal(back["conj"], z)

# The same of the imaginary part, which torch negates lazily.
negated = z.conj().imag[:1]
print("imag of conj", negated.is_neg(), negated.tolist(), load(save({"x": negated}))["x"].tolist())
assert negated.is_neg()
assert load(save({"x": negated}))["x"].item() == -negated.item()
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
