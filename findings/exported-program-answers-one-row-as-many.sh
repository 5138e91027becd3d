#!/usr/bin/env bash
# A program exported for 1 to 64 rows answers one row by the code for several.
# Library: torch 2.13.0 (2.14.1 the same), Python 3.11.
# Guess (from memory, before the first run): `Dim("batch", min=1)` with a branch on `x.shape[0] == 1` is refused at export,
#   or a guard refuses one row, since the range of the program says "from 1"; a range from 2 refuses one row.
# Happens: sizes 0 and 1 are never assumed while tracing, and never guarded: the branch for one row is dropped without a
#   word, the program says VR[1, 64], and its answer for one row is not the model's. A range from 2, which is what
#   Dim.DYNAMIC and Dim.AUTO give, takes 1 and 0 rows all the same; one from 3 is enforced.
# Who meets it: models with a special way for a lone row; runtimes that read ranges.
# Seen: VR[1, 64]: model 100.0, program 2.0; VR[2, 64] takes 1 and 0 rows; VR[3, 64]: Guard failed: x.size()[0] >= 3
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch
from torch.export import Dim, export


class Model(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] == 1:
            return x * 100
        return x * 2


def program(least):
    return export(Model(), (torch.ones(4, 3),), dynamic_shapes=({0: Dim("batch", min=least, max=64)},))


one = torch.ones(1, 3)
found, theirs, ours = program(1), Model()(one)[0, 0].item(), program(1).module()(one)[0, 0].item()
print(*found.range_constraints.values(), "model", theirs, "program", ours)
assert [str(each) for each in found.range_constraints.values()] == ["VR[1, 64]"]
assert (theirs, ours) == (100.0, 2.0)

from_two, from_three = program(2), program(3)
assert [str(each) for each in from_two.range_constraints.values()] == ["VR[2, 64]"]
print("from 2:", [tuple(from_two.module()(torch.ones(rows, 3)).shape) for rows in (1, 0)])
try:
    from_three.module()(one)
    raise SystemExit("from 3: one row was taken")
except AssertionError as error:
    print("from 3:", error)
    assert "x.size()[0] >= 3" in str(error)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
