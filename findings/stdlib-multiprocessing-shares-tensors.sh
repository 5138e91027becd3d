#!/usr/bin/env bash
# Plain `multiprocessing` and ProcessPoolExecutor share tensors with the other process, once torch is imported.
# Library: torch 2.13.0, Python 3.11, Linux.
# Guess: only `torch.multiprocessing` shares memory; the standard library's pools pickle, so each side has a copy.
# Happens: importing torch registers its reducers with the standard ForkingPickler. What is sent is moved into shared
#   memory in place, an in-place operation of the worker shows in the caller's tensor, and every tensor that is
#   received holds a file descriptor for as long as it lives (50 results: 50 descriptors). NumPy arrays are copied.
# Who meets it: `loop.run_in_executor(ProcessPoolExecutor(), preprocess, x)` before a model; a service that keeps
#   results runs into the limit of open files.
# Seen: tensor [7, 0] is_shared True; array [0, 0]; 50 kept results hold 50 descriptors
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch


def write(x):
    x[0] = 7


def make(n):
    return torch.zeros(n)


if __name__ == "__main__":
    tensor, array = torch.zeros(2), np.zeros(2)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(write, tensor).result()
        pool.submit(write, array).result()
        print("tensor", tensor.tolist(), "is_shared", tensor.is_shared(), "array", array.tolist())
        assert tensor.tolist() == [7.0, 0.0] and tensor.is_shared() and array.tolist() == [0.0, 0.0]
        before = len(os.listdir("/proc/self/fd"))
        kept = [pool.submit(make, 3).result() for _ in range(50)]
        held = len(os.listdir("/proc/self/fd")) - before
        print(len(kept), "kept results hold", held, "descriptors")
        assert held == 50
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
