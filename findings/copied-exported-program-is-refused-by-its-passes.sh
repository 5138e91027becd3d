#!/usr/bin/env bash
# A deep copy of an exported program whose input is called `input` is no valid program any more.
# Library: torch 2.13.0, Python 3.11.
# Guess: `copy.deepcopy` of an `ExportedProgram` gives a program as good as the one that was copied.
# Happens: the copied graph calls what has the name of a builtin by another one (`input_1`), the copied signature does
#   not: `validate()` raises, and so does `move_to_device_pass`, which calls it. The original passes both.
# Who meets it: who copies a program before the device pass, which writes into the one that it is given; the inputs of
#   `nn.Linear`, `nn.Conv2d`, `nn.Embedding` and nearly all other layers have that name.
# Seen: SpecViolationError: Input spec name input does not match node name input_1
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import copy

import torch
from torch.export.passes import move_to_device_pass


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def outcome(program):
    try:
        move_to_device_pass(program, "cpu")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "is valid"


x = torch.rand(3, 4)
for module in (torch.nn.Linear(4, 2), Twice()):
    program = torch.export.export(module, (x,))
    copied = outcome(copy.deepcopy(program))
    print(f"{type(module).__name__}: the copy {copied}, the original {outcome(program)}")
    assert outcome(program) == "is valid"
    assert (copied != "is valid") == isinstance(module, torch.nn.Linear), copied
PY
"$dir/venv/bin/python" -W ignore "$dir/check.py"
