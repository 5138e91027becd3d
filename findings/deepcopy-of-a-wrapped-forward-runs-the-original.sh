#!/usr/bin/env bash
# A deep copy of a module whose `forward` was wrapped by a closure computes with the original's weights.
# Library: torch 2.13.0, Python 3.11.
# Guess: `copy.deepcopy(module)` is independent of its original.
# Happens: functions are not copied, so the copy's `forward` still calls the original's: its own weights are never used,
#   what it keeps on itself is kept on the original, and `swap`, quantising or moving the copy has no effect. Wrapped
#   by functools.partial or a bound method it is independent: those are copied.
# Who meets it: "old = m.forward; m.forward = lambda x: old(x) + 1" (monkey patches, timing and logging wrappers), then
#   one copy a core or device: all run one module.
# Seen: closure: copy with zero weights answers like the original; partial: 1.0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import copy
import functools

import torch


def wrapped(by_partial):
    module = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(module.weight), torch.nn.init.zeros_(module.bias)
    old = module.forward
    module.forward = functools.partial(lambda inner, x: inner(x) + 1, old) if by_partial else lambda x: old(x) + 1
    return module


x = torch.ones(1, 2)
answers = {}
for by_partial in (False, True):
    module = wrapped(by_partial)
    copied = copy.deepcopy(module)
    torch.nn.init.zeros_(copied.weight)
    assert module(x).item() == 3
    answers[by_partial] = copied(x).item()
print("copy with zero weights: closure", answers[False], "partial", answers[True])
assert answers == {False: 3.0, True: 1.0}
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
