#!/usr/bin/env bash
# An `ExportedProgram` can be pickled, and not unpickled.
# Library: torch 2.13.0 (2.14.1 the same), Python 3.11.
# Guess (from memory, before the first run): pickle refuses it (there is torch.export.save), or a round trip works.
# Happens: `pickle.dumps` and `torch.save` succeed, `pickle.loads` raises TypeError where it arrives: "missing 1 required
#   positional argument: 'scope_root'". What `module()` returns is refused at once ("Can't pickle local object").
#   `torch.export.save` to a BytesIO goes both ways.
# Who meets it: multiprocessing, Ray and joblib, which report it in the worker; caches on disk, months later.
# Seen: dumped; loads: TypeError; module(): AttributeError; torch.export.save and load: the same answer
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import io
import pickle

import torch

example = (torch.ones(4, 3),)
program = torch.export.export(torch.nn.Linear(3, 2).eval(), example)
dumped = pickle.dumps(program)
print("dumped", len(dumped) > 1000)
try:
    pickle.loads(dumped)
    raise SystemExit("it was loaded")
except TypeError as error:
    print("loads:", error)
    assert "scope_root" in str(error)
try:
    pickle.dumps(program.module())
    raise SystemExit("the module was dumped")
except (AttributeError, pickle.PicklingError) as error:
    print("module():", error)

file = io.BytesIO()
torch.export.save(program, file)
file.seek(0)
assert torch.equal(torch.export.load(file).module()(*example), program.module()(*example))
print("torch.export.save and load: the same answer")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
