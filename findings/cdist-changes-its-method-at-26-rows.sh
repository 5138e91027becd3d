#!/usr/bin/env bash
# `torch.cdist` computes another way from 26 rows on: a row's distance to itself grows from 0 to 0.1 and more.
# Library: torch 2.13.0, Python 3.11, CPU.
# Guess: the same distances, but for the last bits, however many rows are in the batch.
# Happens: with more than 25 rows on either side it uses a matrix product and subtracts large squares. For rows of norm 160
#   the distance to itself is 0 in a batch of 25 and up to 0.13 in one of 26; of norm 8,000 up to 5. The numbers change with
#   the traffic, thresholds ("is it the same face?") flip. `compute_mode="donot_use_mm_for_euclid_dist"` keeps one way.
# Who meets it: nearest-prototype and matching models under dynamic batching.
# Seen: 25 rows 0.0, 26 rows 0.125, 26 rows with the mode 0.0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch

rows = torch.randn(26, 64, generator=torch.Generator().manual_seed(0)) * 3 + 20
few = torch.cdist(rows[:25], rows[:25]).diagonal().max().item()
many = torch.cdist(rows, rows).diagonal().max().item()
exact = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").diagonal().max().item()
print("25 rows", few, "26 rows", many, "26 rows with the mode", exact)
assert few == exact == 0 and many > 0.01
one = torch.cdist(rows[:1], rows[:25])[0], torch.cdist(rows[:1], rows)[0, :25]
assert not torch.allclose(*one, rtol=0, atol=1e-5)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
