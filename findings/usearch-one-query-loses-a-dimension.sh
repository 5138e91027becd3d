#!/usr/bin/env bash
# USearch answers a batch of one query without the batch dimension, and fills up missing neighbours with key 0.
# Library: usearch 2.26.6, numpy 2.4.6, Python 3.11.
# Guess: queries of shape (n, d) give keys of shape (n, k) for every n; what is not found is left out or marked by -1.
# Happens: (1, d) gives `Matches` with keys (k,), (2, d) gives `BatchMatches` with (n, k). With k above the number of
#   entries a lone query gets fewer keys; in a batch the rest of the row is key 0 (a valid key) with distance NaN.
#   `BatchMatches.counts` tells how many of each row are real.
# Who meets it: a search behind dynamic batching, where the number of rows depends on the traffic.
# Seen: 1 query (4,), 2 queries (2, 4); k=6 of 4 entries: lone [3, 2, 1, 4], in a batch [3, 2, 1, 4, 0, 0]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'usearch==2.26.6' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
from usearch.index import Index

index = Index(ndim=3, metric="l2sq")
index.add(np.arange(1, 5), np.eye(4, 3, dtype=np.float32))  # keys 1 to 4: there is no key 0
one, two = np.ones((1, 3), np.float32), np.ones((2, 3), np.float32)
shapes = index.search(one, 4).keys.shape, index.search(two, 4).keys.shape
print("1 query", shapes[0], "2 queries", shapes[1])
assert shapes == ((4,), (2, 4))

lone, batch = index.search(one, 6), index.search(two, 6)
print("k=6 of 4 entries: lone", lone.keys.tolist(), "in a batch", batch.keys[0].tolist(), "counts", batch.counts.tolist())
assert sorted(lone.keys.tolist()) == [1, 2, 3, 4]
assert batch.keys[0].tolist()[4:] == [0, 0] and batch.counts.tolist() == [4, 4]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
