#!/usr/bin/env bash
# `remove_parametrizations` on a deep copy breaks the module that it was copied from.
# Library: torch 2.13.0, Python 3.11.
# Guess (from memory, noted after a first look): the copy is independent; at worst the call fails.
# Happens: parametrize gives the module a class of its own with `weight` as a property; a deep copy shares that class. To
#   remove the parametrization of the copy deletes the property from the class: the original still says it is
#   parametrized, and its next call raises AttributeError ('weight').
# Who meets it: vocoders and other models with weight norm, where each core's copy is made ready by removing it (the
#   second copy fails), or a served model from which an export is made.
# Seen: copy answers; original: is_parametrized True, AttributeError
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import copy

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

original = weight_norm(torch.nn.Linear(2, 2)).eval()
x = torch.ones(1, 2)
expected = original(x)
copied = copy.deepcopy(original)
assert type(copied) is type(original)
parametrize.remove_parametrizations(copied, "weight")
assert torch.allclose(copied(x), expected)
try:
    original(x)
except AttributeError as error:
    print("original: is_parametrized", parametrize.is_parametrized(original), type(error).__name__)
else:
    raise AssertionError("the original survives now")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
