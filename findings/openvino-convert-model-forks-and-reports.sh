#!/usr/bin/env bash
# `import openvino` and `openvino.convert_model` fork the process and report to Google Analytics, without having asked.
# Library: openvino 2026.4.1, openvino-telemetry 2025.2.0, torch 2.13.0, Python 3.11, Linux.
# Guess: a conversion computes; what reports usage asks first, or is opt-in.
# Happens: consent is assumed until somebody runs `opt_in_out --opt_out`; each event is sent by a `multiprocessing.Process`,
#   which on Linux before Python 3.14 is a fork of the process, from a thread; nothing is sent where `CI` is set. The
#   frontend itself (`openvino.frontend`) reports nothing.
# Who meets it: services that convert at their start: forks beside running threads, and connections that policy forbids.
# Seen: 8 processes started by one conversion, 0 with CI=true (here nothing leaves: a stub takes the place of the process)
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'openvino==2026.4.1' 'openvino-telemetry==2025.2.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import multiprocessing
import os
import time

import torch

addresses = []


class Stub:
    """Notes where a process would send to, in its place."""

    def __init__(self, target, args):
        addresses.append(args[0].host)

    def start(self):
        pass

    def join(self, timeout):
        pass

    def is_alive(self):
        return False


def started(since):
    """Processes that were to be started, some time after the event."""
    deadline = time.monotonic() + 10
    while len(addresses) == since and time.monotonic() < deadline and "CI" not in os.environ:
        time.sleep(0.05)
    time.sleep(0.5)
    return len(addresses)


multiprocessing.Process = Stub
import openvino

imported = started(0)
openvino.convert_model(torch.nn.ReLU(), example_input=torch.ones(1, 2))
converted = started(imported)
print("processes started by import:", imported, "with a conversion:", converted, "to", sorted(set(addresses)))
assert (0 < imported < converted) == ("CI" not in os.environ)
assert not (imported or converted) or "CI" not in os.environ
assert set(addresses) <= {"www.google-analytics.com"}
PY
mkdir "$dir/home"
export HOME=$dir/home
env --unset=CI "$dir/venv/bin/python" -W ignore "$dir/check.py"
CI=true "$dir/venv/bin/python" -W ignore "$dir/check.py"
