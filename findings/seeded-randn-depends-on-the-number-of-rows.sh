#!/usr/bin/env bash
# `torch.manual_seed(0); torch.randn(rows, n)`: the first row depends on how many rows follow, unless n is a multiple of 16.
# Library: torch 2.13.0, Python 3.11, CPU.
# Guess: the stream is the same: more rows only append numbers, as with torch.rand and NumPy.
# Happens: below 16 numbers in all another algorithm runs, and the last 16 are drawn anew when the count is no multiple of
#   16: rows of 8 or 20 change with the batch, rows of 16 or 64 do not.
# Who meets it: generative models that seed for reproducible answers (latents, noise of speech models) and run in batches
#   of changing size. Draw each row with a generator of its own.
# Seen: rows of 8 False, 16 True, 20 False; rand True; NumPy True
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import numpy as np
import torch


def same_first_row(draw, length):
    first = []
    for rows in (1, 2):
        torch.manual_seed(0)
        first.append(draw(rows, length)[0])
    return bool((first[0] == first[1]).all())


seen = {length: same_first_row(torch.randn, length) for length in (8, 16, 20, 64)}
uniform = same_first_row(torch.rand, 20)
numpy = same_first_row(lambda rows, length: np.random.default_rng(0).standard_normal((rows, length)), 20)
print("randn", seen, "rand", uniform, "NumPy", numpy)
assert seen == {8: False, 16: True, 20: False, 64: True} and uniform and numpy
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
