#!/usr/bin/env bash
# `torch.profiler.profile` and FlopCounterMode around `await model(x)` see nothing of a model that runs in a worker thread.
# Library: torch 2.13.0, Python 3.11.
# Guess: the profiler records the operations of all threads of the process; so does the counter.
# Happens: both are per thread. Around a call that a running executor thread computes the profile is empty and the count
#   is 0, without a warning. `_ExperimentalConfig(profile_all_threads=True)` makes the profiler see the worker.
# Who meets it: whoever profiles a service whose model runs in threads: the loop's thread runs no operation.
# Seen: profiler [] / all threads True / flops 0, in the same thread 64
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

pool = ThreadPoolExecutor(1)
pool.submit(int).result()  # the thread exists before the profiler starts
model = torch.nn.Linear(4, 4).eval()


def run():
    with torch.inference_mode():
        model(torch.ones(2, 4))


async def call():
    await asyncio.get_running_loop().run_in_executor(pool, run)


def profiled(**settings):
    with profile(activities=[ProfilerActivity.CPU], **settings) as seen:
        asyncio.run(call())
    return [event.key for event in seen.key_averages() if event.key.startswith("aten::")]


everything = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
alone, all_threads = profiled(), profiled(experimental_config=everything)
with FlopCounterMode(display=False) as awaited:
    asyncio.run(call())
with FlopCounterMode(display=False) as direct:
    run()
print("profiler", alone, "all threads", "aten::addmm" in all_threads)
print("flops", awaited.get_total_flops(), "in the same thread", direct.get_total_flops())
assert alone == [] and "aten::addmm" in all_threads
assert awaited.get_total_flops() == 0 and direct.get_total_flops() > 0
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
