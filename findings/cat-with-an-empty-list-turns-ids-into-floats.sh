#!/usr/bin/env bash
# Joining `torch.tensor([])` to integer ids gives float32 ids, whatever the ranks; large ids then name other rows.
# Library: torch 2.13.0, Python 3.11.
# Guess: `torch.cat` raises for another dtype, and for another number of dimensions.
# Happens: an empty tensor of rank 1 may be joined to anything (an old special case), and its dtype counts although it
#   has no elements: `torch.tensor([])` is float32, so ids above 2**24 change. vstack and hstack as well.
# Who meets it: hand-written batchers and gatherers where one caller's list is empty.
# Seen: float32 [16777216.0, 3.0] for [16777217, 3]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch

ids = torch.tensor([[2**24 + 1, 3]])
joined = torch.cat([torch.tensor([]), ids])
print(joined.dtype, joined.tolist(), "for", ids.tolist())
assert joined.dtype == torch.float32 and joined.shape == (1, 2)
assert joined.long().tolist() == [[2**24, 3]]
assert torch.cat([torch.tensor([], dtype=torch.int64), ids]).tolist() == ids.tolist()
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
