#!/usr/bin/env bash
# Importing silero_vad sets PyTorch's number of threads to 1, for the process.
# Library: silero-vad 6.2.3, torch 2.13.0, Python 3.11.
# Guess: an import changes no setting of another library; at most loading the model does, for itself.
# Happens: the package's module calls `torch.set_num_threads(1)` when it is imported: whatever else runs in the process
#   has one thread within operations from then on, on the importing thread and on all that start later.
# Who meets it: services with a model beside voice detection; benchmarks that import it. Put the number back after the
#   import.
# Seen: 4 threads before, 1 after, 1 in a new thread
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'silero-vad==6.2.3' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
from concurrent.futures import ThreadPoolExecutor

import torch

torch.set_num_threads(4)
before = torch.get_num_threads()

import silero_vad  # noqa: E402, F401

with ThreadPoolExecutor(1) as pool:
    seen = before, torch.get_num_threads(), pool.submit(torch.get_num_threads).result()
print("{} threads before, {} after, {} in a new thread".format(*seen))
assert seen == (4, 1, 1)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
