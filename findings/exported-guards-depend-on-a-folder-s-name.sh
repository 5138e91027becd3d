#!/usr/bin/env bash
# Whether an exported module checks its inputs depends on the folder of the calling file; a copy may check nothing.
# Library: torch 2.13.0 (2.14.1 the same), Python 3.11.
# Guess (from memory, before the first run): `module()` has the same guards wherever it is called, and a deep copy has them.
# Happens: if the path of any file on the stack contains "torchao", "executorch", "modai" or "on_device_ai", no guards are
#   made (`_ok_to_generate_guards_fn`): a hook checks instead, with another type of error, and `copy.deepcopy` loses the
#   hook. Then 100 rows are taken by a program for 3 to 8. The copy has lost `range_constraints` too, and its `eval()`
#   no longer raises.
# Who meets it: a project, user or virtual environment with such a name; whoever copies a module for each thread.
# Seen: plain/: AssertionError, AssertionError; modai/: RuntimeError, (100, 3)
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

mkdir "$dir/plain" "$dir/modai"
cat >"$dir/plain/check.py" <<'PY'
import copy
import sys

import torch
from torch.export import Dim, export

rows = Dim("batch", min=3, max=8)
module = export(torch.nn.ReLU(), (torch.ones(4, 3),), dynamic_shapes=({0: rows},)).module()
seen = []
for each in (module, copy.deepcopy(module)):
    try:
        seen.append(str(tuple(each(torch.ones(100, 3)).shape)))
    except (AssertionError, RuntimeError) as error:
        seen.append(type(error).__name__)
print(sys.argv[1] + "/:", ", ".join(seen))
assert seen == (["AssertionError"] * 2 if sys.argv[1] == "plain" else ["RuntimeError", "(100, 3)"])
assert hasattr(module, "range_constraints") and not hasattr(copy.deepcopy(module), "range_constraints")
copy.deepcopy(module).eval()
try:
    module.eval()
    raise SystemExit("eval() was taken")
except NotImplementedError:
    pass
PY
cp "$dir/plain/check.py" "$dir/modai/check.py"
cd "$dir"
for folder in plain modai; do
  "$dir/venv/bin/python" -W ignore "$folder/check.py" "$folder"
done
