#!/usr/bin/env bash
# Async caches key a tensor by its printed text, so two inputs get one answer.
# Library: aiocache 0.12.3, cashews 7.6.0, torch 2.13.0, Python 3.11.
# Guess: a tensor argument is keyed by its contents or refused as unhashable.
# Happens: both build the key with str() of the arguments. The text of a tensor shows four digits, and of more than 1,000
#   elements only the corners: inputs that differ in the middle share a key, and the second caller gets the first one's
#   answer. NumPy arrays (eight digits, the same cut) as well.
# Who meets it: whoever puts `@cached()` around `await model(x)`. Key by `x.numpy().tobytes()`, dtype and shape.
# Seen: tensors first 0.0 second 0.0 (true 5.0), arrays the same, computed 2 times for 4 inputs; cashews the same
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'aiocache==0.12.3' 'cashews==7.6.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import asyncio

import torch
from aiocache import cached
from cashews import cache

first = torch.zeros(2000)
second = first.clone()
second[1000] = 5.0  # true sum: 5
computed = []


async def total(x):
    computed.append(1)
    return float(x.sum())


async def main():
    cache.setup("mem://")
    for name, decorate in (("aiocache", cached()), ("cashews", cache(ttl="1h"))):
        computed.clear()
        model = decorate(total)
        answers = [await model(x) for x in (first, second, first.numpy(), second.numpy())]
        print(name, "answers", answers, "for sums 0, 5, 0, 5; computed", len(computed), "times")
        assert answers == [0.0] * 4 and len(computed) == 2
        model = decorate(total)
        near = await model(torch.tensor([1.00001])), await model(torch.tensor([1.00002]))
        assert near[0] == near[1] == float(torch.tensor([1.00001]))


asyncio.run(main())
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
