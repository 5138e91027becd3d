"""A short run of fuzz.py, where atheris is installed. Every night FUZZ_RUNS makes it a longer one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_what_parses_bytes_or_strings_gives_an_answer_or_its_own_error(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    script = Path(__file__).with_name("fuzz.py")
    runs = os.environ.get("FUZZ_RUNS", "4000")
    command = [sys.executable, str(script), f"-runs={runs}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600.0)
    assert done.returncode == 0, done.stderr[-3000:]
