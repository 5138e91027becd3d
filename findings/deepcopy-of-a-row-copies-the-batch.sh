#!/usr/bin/env bash
# `copy.deepcopy` and `pickle` of one row copy the batch that it is a view of; protocol 5 does not send tensors out of band.
# Library: torch 2.13.0, numpy 2.4.6, Python 3.11.
# Guess: as with NumPy, a deep copy or a pickle of a view holds the view; protocol 5 hands out the buffer without a copy.
# Happens: both take the whole storage (400,000 bytes for a row of 400), so a cache of deep-copied or pickled rows holds
#   every batch once a row. `buffer_callback` is never called: the bytes go in-band. `.clone()` first.
# Who meets it: caches and queues behind a batching server, where an answer is a slice of the batch's output.
# Seen: tensor: deepcopy 400000, pickle 400409, 0 buffers; array: deepcopy 400, pickle 551, 1 buffer
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import copy
import pickle

import torch

batch = torch.zeros(1000, 100)
row = batch[0]
copied = copy.deepcopy(row).untyped_storage().nbytes()
pickled = len(pickle.dumps(row))
buffers = []
pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
print("tensor: deepcopy", copied, "pickle", pickled, "out-of-band buffers", len(buffers))
assert copied == 400_000 and pickled > 400_000 and buffers == []
assert row.clone().untyped_storage().nbytes() == 400

array = row.numpy()
copied = copy.deepcopy(array)
pickled = len(pickle.dumps(array))
pickle.dumps(batch.numpy(), protocol=5, buffer_callback=buffers.append)
print("array: deepcopy", copied.nbytes, "pickle", pickled, "out-of-band buffers", len(buffers))
assert copied.base is None and pickled < 1000 and len(buffers) == 1
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
